"""The archive: a partition of the asset for each one of the table, and a schedule that archives those that are closed."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import dagster as dg

from metrics_pipeline.archive import keeping
from metrics_pipeline.archive.manifest import Manifest
from metrics_pipeline.defs.provisioning import metrics, not_provisioned
from metrics_pipeline.defs.resources import OWNERS, Pipeline, active_runs, plain_errors
from metrics_pipeline.errors import PipelineError, SettingError
from metrics_pipeline.settings import PartitionWidth, Settings

BEGIN: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""Before the first partition that any table can have."""
AT_ONCE: Final = 24
"""Most runs that a tick launches."""


def partitions_of(width: PartitionWidth) -> dg.TimeWindowPartitionsDefinition:
    """Dagster's partitions for a width of those of the table, in UTC."""
    if width == "hour":
        return dg.HourlyPartitionsDefinition(BEGIN)
    if width == "day":
        return dg.DailyPartitionsDefinition(BEGIN)
    if width == "month":
        return dg.MonthlyPartitionsDefinition(BEGIN)
    # Of minutes, which are for tests, there would be half a million a year.
    begin = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)
    return dg.TimeWindowPartitionsDefinition(start=begin, cron_schedule="* * * * *", fmt="%Y-%m-%d-%H:%M")


def _width() -> PartitionWidth:
    """Dagster has to know it when it loads the definitions; a bad setting is told by the runs."""
    try:
        return Settings.load().metrics_partition
    except SettingError:
        return "day"


PARTITIONS: Final = partitions_of(_width())


@dg.asset(partitions_def=PARTITIONS, group_name="readings", kinds={"parquet", "file"}, owners=OWNERS, deps=[metrics])
def metrics_archive(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult[None]:
    """The closed partitions of the readings as Parquet in METRICS_ARCHIVE, each compared with the table; a backfill archives again."""
    with plain_errors():
        window = context.partition_time_window
        return _result(keeping.archived(pipeline.load(), window.start, window.end))


def _result(archives: Sequence[Manifest]) -> dg.MaterializeResult[None]:
    metadata: dict[str, Any] = {
        "dagster/row_count": sum(archive.sums.rows for archive in archives),
        "bytes": sum(archive.bytes for archive in archives),
        "checksum": " ".join(archive.sha256 for archive in archives),
        "archives": dg.MetadataValue.json([archive.document() for archive in archives]),
    }
    return dg.MaterializeResult(metadata=metadata)


# A partition of a day takes longer than the limit that other runs have.
archive_job = dg.define_asset_job(
    "archive",
    selection=dg.AssetSelection.assets(metrics_archive),
    executor_def=dg.in_process_executor,
    tags={dg.MAX_RUNTIME_SECONDS_TAG: "86400"},
    description="Archive a partition of the readings, again if it has an archive.",
)


@dg.schedule(
    job=archive_job,
    cron_schedule="5-59/10 * * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every ten minutes: archives the partitions that are closed and have no archive; off while METRICS_ARCHIVE is empty.",
)
def archive_schedule(context: dg.ScheduleEvaluationContext, pipeline: Pipeline) -> list[dg.RunRequest] | dg.SkipReason:
    """A run for each part of the asset that is due."""
    try:
        settings = pipeline.load()
        if settings.archive_path is None:
            return dg.SkipReason("METRICS_ARCHIVE is not set")
        if reason := not_provisioned(context.instance):
            return dg.SkipReason(reason)
        if active_runs(context.instance, archive_job.name):
            return dg.SkipReason("partitions are being archived")
        keys = due_keys(settings)
    except PipelineError as error:
        return dg.SkipReason(str(error))
    if not keys:
        return dg.SkipReason("each closed partition has its archive")
    return [dg.RunRequest(partition_key=key) for key in keys[:AT_ONCE]]


def due_keys(settings: Settings, now: datetime | None = None) -> list[str]:
    """Keys of the asset's partitions that have something to archive, in order of time."""
    lows = [one.low for one in keeping.due(settings, now) if one.low is not None and one.low >= BEGIN]
    return list(dict.fromkeys(PARTITIONS.get_partition_key_for_timestamp(low.timestamp()) for low in lows))


DEFINITIONS = dg.Definitions(assets=[metrics_archive], jobs=[archive_job], schedules=[archive_schedule])
