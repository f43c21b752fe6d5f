"""Roles, databases and Dagster's own tables: what has to be there before Dagster can be."""

from __future__ import annotations

import os
import subprocess

from metrics_pipeline import postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.local import dagster
from metrics_pipeline.settings import Settings


def prepare(settings: Settings) -> list[str]:
    """Make what is missing; may be run again at any time.

    Returns:
        One line for each thing done.

    Raises:
        PipelineError: PostgreSQL or Dagster's storage cannot be used.
    """
    postgres.bootstrap(settings)
    dagster.prepare_home(settings)
    done = ["roles and databases are as configured"]
    if needed := dagster.tables_command(settings):
        what, command = needed
        made = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise ServiceError(
                f"Dagster's tables could not be {what}: {(made.stderr or made.stdout).strip().splitlines()[-1]}; "
                "correct DAGSTER_POSTGRES_URL, or drop the database `dagster` to start it afresh"
            )
        done.append(f"Dagster's tables were {what}")
    return done
