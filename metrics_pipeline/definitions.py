"""Dagster's entry point: `dagster dev`, `workspace.yaml` and `dagster job execute -m metrics_pipeline.definitions`."""

import dagster as dg

from metrics_pipeline.defs import archive, files, monitoring, production, provisioning, resources

defs = dg.Definitions.merge(
    resources.DEFINITIONS,
    provisioning.DEFINITIONS,
    production.DEFINITIONS,
    files.DEFINITIONS,
    archive.DEFINITIONS,
    monitoring.DEFINITIONS,
)
