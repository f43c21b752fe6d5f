"""The archive: a partition of the asset for each one of the table, and a schedule that archives those that are closed."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeGuard

import dagster as dg

# There are no public names for these.
from dagster._core.definitions.data_version import DATA_VERSION_TAG
from dagster._core.storage.tags import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG

from metrics_pipeline import partitions
from metrics_pipeline.archive import keeping, manifest
from metrics_pipeline.archive.folder import ArchiveFolder
from metrics_pipeline.archive.manifest import Manifest
from metrics_pipeline.defs.provisioning import metrics, not_provisioned
from metrics_pipeline.defs.resources import ACTIVE, OWNERS, Pipeline, plain_errors, verdict
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.settings import PartitionWidth, Settings

BEGIN: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""Where the partitions are taken to begin when it cannot be asked: before the first one that any table can have."""
AT_ONCE: Final = 4
"""Most runs that a tick launches, each for partitions that follow each other; one of them works at a time."""
PARTITION_SECONDS: Final = 86400
"""How long a run may take for each of its partitions."""
REASONS_NAMED: Final = 3


def partitions_of(width: PartitionWidth, begin: datetime = BEGIN) -> dg.TimeWindowPartitionsDefinition:
    """Dagster's partitions for a width of those of the table, from a bound on, in UTC."""
    if width == "hour":
        return dg.HourlyPartitionsDefinition(begin)
    if width == "day":
        return dg.DailyPartitionsDefinition(begin)
    if width == "month":
        return dg.MonthlyPartitionsDefinition(begin)
    # Of minutes, which are for tests, there would be half a million a year.
    begin = max(begin, datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1))
    return dg.TimeWindowPartitionsDefinition(start=begin, cron_schedule="* * * * *", fmt="%Y-%m-%d-%H:%M")


def _partitions() -> dg.TimeWindowPartitionsDefinition:
    """Dagster has to know them when it loads the definitions; a bad setting, or no PostgreSQL, is told by the runs."""
    width: PartitionWidth = "day"
    try:
        settings = Settings.load()
        width = settings.metrics_partition
        # Only then is anybody asked: what lies before the first partition would be shown as missing, and asked for in backfills.
        if settings.archive_path is not None:
            return partitions_of(width, keeping.first(settings))
    except PipelineError:
        pass
    return partitions_of(width)


PARTITIONS: Final = _partitions()


with warnings.catch_warnings():
    warnings.simplefilter("ignore", dg.BetaWarning)  # of the policy; the release is pinned
    # A backfill is one run, whatever it has chosen: a run for each partition would be a process for each, all of them at once, of
    # which one can work.
    _partitioned = dg.asset(
        partitions_def=PARTITIONS,
        backfill_policy=dg.BackfillPolicy.single_run(),
        output_required=False,
        group_name="readings",
        kinds={"parquet", "file"},
        owners=OWNERS,
        deps=[metrics],
    )


@_partitioned
def metrics_archive(context: dg.AssetExecutionContext, pipeline: Pipeline) -> Iterator[dg.MaterializeResult[None]]:
    """The closed partitions of the readings as Parquet in METRICS_ARCHIVE, each compared with the table; a backfill archives again."""
    keys = list(context.partition_keys)
    # However it was launched: what other runs may take is too little for a day's readings.
    context.instance.add_run_tags(context.run.run_id, {dg.MAX_RUNTIME_SECONDS_TAG: str(len(keys) * PARTITION_SECONDS)})
    with plain_errors():
        settings = pipeline.load()
    failed: dict[str, list[str]] = {}
    for key in keys:
        if reason := _archive(context, settings, key):
            context.log.error(f"{key}: {reason}")
            failed.setdefault(reason, []).append(key)
    if failed:
        raise dg.Failure(_reasons(failed, len(keys)), allow_retries=False)
    yield from ()


def _archive(context: dg.AssetExecutionContext, settings: Settings, key: str) -> str | None:
    """Archive one partition and show it at once, since the others may take days, or fail; returns why it could not be."""
    window = PARTITIONS.time_window_for_partition_key(key)
    try:
        archives = keeping.archived(settings, window.start, window.end)
    except PipelineError as error:
        return str(error)
    context.log_event(materialization(key, archives, settings.archive_path))
    return None


def _reasons(failed: Mapping[str, Sequence[str]], count: int) -> str:
    """Why partitions were not archived, each reason once."""
    if count == 1:
        return next(iter(failed))
    reasons = [
        f"{keys[0]}{f' and {len(keys) - 1} more' if keys[1:] else ''}: {reason}" for reason, keys in failed.items()
    ]
    more = [f"and {len(reasons) - REASONS_NAMED} reasons more in the log"] if len(reasons) > REASONS_NAMED else []
    number = sum(map(len, failed.values()))
    return f"{number} of {count} partitions were not archived: " + "; ".join(reasons[:REASONS_NAMED] + more)


def materialization(key: str, archives: Sequence[Manifest], folder: Path | None) -> dg.AssetMaterialization:
    """What Dagster shows of the archives of one of the asset's partitions, which lie in a folder."""
    checksums = " ".join(archive.sha256 for archive in archives)
    metadata: dict[str, Any] = {
        "dagster/row_count": sum(archive.sums.rows for archive in archives),
        "bytes": sum(archive.bytes for archive in archives),
        "checksum": checksums,
        "archived_at": dg.MetadataValue.timestamp(max(archive.created_at for archive in archives)),
        "folder": dg.MetadataValue.path(str(folder / archives[0].name if folder and len(archives) == 1 else folder)),
        "archives": dg.MetadataValue.json([archive.document() for archive in archives]),
    }
    return dg.AssetMaterialization(
        metrics_archive.key, partition=key, metadata=metadata, tags={DATA_VERSION_TAG: checksums}
    )


# Of the readings, not of the archive: there, whoever launches a backfill would launch it, too, and it would be skipped.
@dg.asset_check(asset=metrics.key)
def archive_complete(pipeline: Pipeline) -> dg.AssetCheckResult:
    """Each closed partition has its archive in time, and archives are as they were made, as far as that shows without reading them."""
    return verdict(pipeline, keeping.behind)


archive_job = dg.define_asset_job(
    "archive",
    selection=[metrics_archive],
    executor_def=dg.in_process_executor,
    description="Archive partitions of the readings, again where they have an archive.",
)


@dg.schedule(
    job=archive_job,
    cron_schedule="5-59/10 * * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every ten minutes: archives the partitions that are closed and have no archive; off while METRICS_ARCHIVE is empty.",
)
def archive_schedule(context: dg.ScheduleEvaluationContext, pipeline: Pipeline) -> list[dg.RunRequest] | dg.SkipReason:
    """A run for each stretch of the asset that is due."""
    try:
        settings = pipeline.load()
        if settings.archive_path is None:
            return dg.SkipReason("METRICS_ARCHIVE is not set")
        if reason := not_provisioned(context.instance):
            return dg.SkipReason(reason)
        if archiving(context.instance):
            return dg.SkipReason("partitions are being archived")
        found = report(context.instance, settings)
        keys = due_keys(settings)
    except PipelineError as error:
        return dg.SkipReason(str(error))
    if not keys:
        noted = f"; noted {len(found)} that were made otherwise: {', '.join(found[:3])}" if found else ""
        return dg.SkipReason(f"each closed partition has its archive{noted}")
    return [_request(stretch) for stretch in stretches(keys)[:AT_ONCE]]


def archiving(instance: dg.DagsterInstance) -> bool:
    """Whether a run of the asset has not ended, by this job or by what the UI launches."""
    active = instance.get_runs(dg.RunsFilter(statuses=ACTIVE))
    return any(run.job_name == archive_job.name or metrics_archive.key in (run.asset_selection or ()) for run in active)


def _request(stretch: Sequence[str]) -> dg.RunRequest:
    if len(stretch) == 1:
        return dg.RunRequest(run_key=stretch[0], partition_key=stretch[0])
    ends = {ASSET_PARTITION_RANGE_START_TAG: stretch[0], ASSET_PARTITION_RANGE_END_TAG: stretch[-1]}
    return dg.RunRequest(run_key=stretch[0], tags=ends)


def due_keys(settings: Settings, now: datetime | None = None) -> list[str]:
    """Keys of the asset's partitions that have something to archive, in order of time."""
    return list(dict.fromkeys(_key(one.low) for one in keeping.due(settings, now) if _is_shown(one.low)))


def _is_shown(low: datetime | None) -> TypeGuard[datetime]:
    return low is not None and low >= PARTITIONS.start


def _key(low: datetime) -> str:
    return PARTITIONS.get_partition_key_for_timestamp(low.timestamp())


def stretches(keys: Sequence[str]) -> list[list[str]]:
    """Keys in order of time, those that follow each other together."""
    found: list[list[str]] = []
    end = None
    for key in keys:
        window = PARTITIONS.time_window_for_partition_key(key)
        if window.start == end:
            found[-1].append(key)
        else:
            found.append([key])
        end = window.end
    return found


def report(instance: dg.DagsterInstance, settings: Settings) -> list[str]:
    """Tell Dagster of archives that the asset did not make (retention does, and people do): keys of what was another one by then."""
    folder = ArchiveFolder.of(settings)
    names: dict[str, list[str]] = {}
    for name in folder.names():
        if _is_shown(low := partitions.low_of(name)):
            names.setdefault(_key(low), []).append(name)
    known = instance.event_log_storage.get_latest_tags_by_partition(
        metrics_archive.key, dg.DagsterEventType.ASSET_MATERIALIZATION, [DATA_VERSION_TAG]
    )
    told = []
    for key, there in names.items():
        with suppress(PipelineError):  # a damaged one: the check says so
            event = materialization(key, [manifest.read(folder.path / name) for name in there], folder.path)
            if (event.tags or {}) != known.get(key):
                instance.report_runless_asset_event(event)
                told.append(key)
    return told


DEFINITIONS = dg.Definitions(
    assets=[metrics_archive], asset_checks=[archive_complete], jobs=[archive_job], schedules=[archive_schedule]
)
