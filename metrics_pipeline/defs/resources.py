"""What the definitions share: the settings, and errors and states that read well in the UI."""

from collections.abc import Callable, Iterator, Sequence
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


def verdict(pipeline: Pipeline, drift: Callable[[Settings], list[str]]) -> dg.AssetCheckResult:
    """Red with each difference named; a service that does not answer is red, too, with its reason."""
    try:
        differences = drift(pipeline.load())
    except PipelineError as error:
        differences = [str(error)]
    return dg.AssetCheckResult(
        passed=not differences,
        description="; ".join(differences) or "as configured",
        metadata={"differences": len(differences), "drift": dg.MetadataValue.json(differences)},
    )


def active_runs(instance: dg.DagsterInstance, job: str) -> Sequence[dg.RunRecord]:
    """Runs of a job that have not ended, newest first."""
    return instance.get_run_records(dg.RunsFilter(job_name=job, statuses=ACTIVE), limit=10)


DEFINITIONS = dg.Definitions(resources={"pipeline": Pipeline()}, executor=dg.in_process_executor)
