"""What the definitions share: the settings, and errors and states that read well in the UI."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg

from metrics_pipeline.errors import PipelineError
from metrics_pipeline.settings import Settings

OWNERS = ["team:metrics"]

ACTIVE = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


class Pipeline(dg.ConfigurableResource[Settings]):
    """The settings, read when they are used: no secret becomes part of a run's config or of the event log."""

    def load(self, **overrides: Any) -> Settings:
        """Read the environment and the env file; see `Settings.load`."""
        return Settings.load(**overrides)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show our own errors as the one line they are; they stay as the cause."""
    try:
        yield
    except PipelineError as error:
        raise dg.Failure(str(error), allow_retries=False) from error


def active_runs(instance: dg.DagsterInstance, job: str) -> Sequence[dg.RunRecord]:
    """Runs of a job that have not ended, newest first."""
    return instance.get_run_records(dg.RunsFilter(job_name=job, statuses=ACTIVE), limit=10)


DEFINITIONS = dg.Definitions(resources={"pipeline": Pipeline()}, executor=dg.in_process_executor)
