"""The embedded PostgreSQL's configuration."""

from __future__ import annotations

from pathlib import Path

from metrics_pipeline.data_folder import cluster_name, make_folder_id
from metrics_pipeline.local.budget import Budget
from metrics_pipeline.local.postgres import configuration
from metrics_pipeline.settings import Settings


def test_it_bears_the_name_of_its_data_folder(tmp_path: Path) -> None:
    settings = Settings.load(pipeline_data_dir=tmp_path)
    assert "cluster_name" not in configuration(settings, Budget.of(settings)), "nothing was started in it yet"
    identity = make_folder_id(tmp_path)
    assert configuration(settings, Budget.of(settings))["cluster_name"] == f"'{cluster_name(identity)}'"
    assert len(cluster_name(identity)) < 64, "PostgreSQL cuts it off there"
