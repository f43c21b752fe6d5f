"""What is stored and how fast: summaries as assets with plots, checks against limits, and the purge of old runs."""

from datetime import UTC, datetime, timedelta
from typing import Final

import dagster as dg

from metrics_pipeline import postgres, rejects, summaries
from metrics_pipeline.defs import chart
from metrics_pipeline.defs.production import producing
from metrics_pipeline.defs.provisioning import (
    metrics,
    metrics_schema,
    metrics_sink_connector,
    metrics_topic,
    when_provisioned,
)
from metrics_pipeline.defs.resources import ACTIVE, OWNERS, Pipeline, plain_errors
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.producer import ledger
from metrics_pipeline.settings import Settings
from metrics_pipeline.sinks import active, quarantine
from metrics_pipeline.sinks.watch import ProgressWatch

GROUP = "monitoring"
THROUGHPUT_SECONDS: Final = 60
DEVICES_SHOWN: Final = 100
"""In the table; a fleet may have very many."""
BARS: Final = 10
REJECTS_SECONDS: Final = 600
"""Two rounds of the check's schedule, so that no record slips between them."""
REJECTS_NAMED: Final = 5
PURGED_AT_ONCE: Final = 2000

_MINUTE_COLUMNS = dg.TableSchema(
    columns=[
        dg.TableColumn("minute", "timestamptz", "begin of the minute, by created_at"),
        dg.TableColumn("rows", "bigint", "readings stored in it"),
    ]
)
_DEVICE_COLUMNS = dg.TableSchema(
    columns=[
        dg.TableColumn("device_id", "uuid"),
        dg.TableColumn("rows", "bigint", "readings of the device"),
        dg.TableColumn("first_seen", "timestamptz", "least published_at"),
        dg.TableColumn("last_seen", "timestamptz", "greatest published_at"),
    ]
)


@dg.asset(
    group_name=GROUP,
    kinds={"postgres", "sql"},
    owners=OWNERS,
    deps=[metrics],
    metadata={"dagster/column_schema": _MINUTE_COLUMNS, "dagster/table_name": "public.ingestion_rate"},
)
def ingestion_rate(pipeline: Pipeline) -> dg.MaterializeResult[None]:
    """Inserts per minute over the last ten minutes, by created_at, the current minute included."""
    with plain_errors():
        rate = summaries.ingestion_rate(pipeline.load())
    shown = [(f"{minute.minute.astimezone(UTC):%H:%M}", minute.rows) for minute in rate.minutes]
    return dg.MaterializeResult(
        metadata={
            "rows_per_second": float(rate.rows_per_second),
            "rows_last_10_minutes": rate.rows_last_10_minutes,
            "rows": rate.rows,
            "newest": str(rate.newest.astimezone(UTC)) if rate.newest else "none",
            "chart": dg.MetadataValue.md(chart.image("readings stored per minute (UTC)", shown)),
            "minutes": dg.MetadataValue.table(
                [
                    dg.TableRecord({"minute": str(minute.minute.astimezone(UTC)), "rows": minute.rows})
                    for minute in rate.minutes
                ],
                schema=_MINUTE_COLUMNS,
            ),
        }
    )


@dg.asset(
    group_name=GROUP,
    kinds={"postgres", "sql"},
    owners=OWNERS,
    deps=[metrics],
    metadata={"dagster/column_schema": _DEVICE_COLUMNS, "dagster/table_name": "public.device_summary"},
)
def device_summary(pipeline: Pipeline) -> dg.MaterializeResult[None]:
    """Per device: readings, first and last seen; per metric its count, least, mean and greatest value."""
    with plain_errors():
        summary = summaries.device_summary(pipeline.load(), limit=DEVICES_SHOWN)
    shown = [(str(device.device_id)[:8], device.rows) for device in summary.first[:BARS]]
    records = [
        dg.TableRecord(
            {
                "device_id": str(device.device_id),
                "first_seen": str(device.first_seen.astimezone(UTC)),
                "last_seen": str(device.last_seen.astimezone(UTC)),
                "metric": metric.metric_name,
                "rows": metric.rows,
                "min": metric.min,
                "mean": metric.mean,
                "max": metric.max,
            }
        )
        for device in summary.first
        for metric in device.metrics
    ]
    return dg.MaterializeResult(
        metadata={
            "devices": summary.devices,
            "rows": summary.rows,
            "chart": dg.MetadataValue.md(chart.image(f"readings of the {len(shown)} busiest devices", shown)),
            **({"busiest_devices": dg.MetadataValue.table(records)} if records else {}),
        }
    )


def _recent(settings: Settings, seconds: float) -> tuple[int, float | None]:
    """Readings stored within the last seconds, and the age of the newest of them."""
    # By the index on created_at, in one process: what is looked at must not grow with the table, nor take the sink's cores.
    planner = "-c enable_seqscan=off -c max_parallel_workers_per_gather=0"
    with postgres.connect(settings, "metrics_reader", autocommit=True, options=planner) as connection:
        row = connection.execute(postgres.query("recent_rows"), {"seconds": seconds}).fetchone()
    return (row[0], row[1]) if row else (0, None)


def _broken(error: PipelineError) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False, description=str(error))


@dg.asset_check(asset=metrics.key)
def throughput(context: dg.AssetCheckExecutionContext, pipeline: Pipeline) -> dg.AssetCheckResult:
    """Readings stored per second over the last minute reach THROUGHPUT_FLOOR while a producer is meant to run."""
    try:
        settings = pipeline.load()
        running = producing(context.instance, settings)
        rate = _recent(settings, THROUGHPUT_SECONDS)[0] / THROUGHPUT_SECONDS
    except PipelineError as error:
        return _broken(error)
    floor = settings.throughput_floor
    text = f"{rate:,.1f} rows/s over the last minute"
    if running is None:
        passed, text = True, f"{text}; no producer is meant to run"
    elif running < THROUGHPUT_SECONDS and rate < floor:
        passed, text = True, f"{text}; the producer was started {running:.0f} s ago"
    else:
        passed = rate >= floor and rate > 0
        text = text if passed else f"{text}, THROUGHPUT_FLOOR is {floor:g}, although a producer is meant to run"
    return dg.AssetCheckResult(
        passed=passed,
        severity=dg.AssetCheckSeverity.WARN if rate else dg.AssetCheckSeverity.ERROR,
        description=text,
        metadata={"rows_per_second": rate, "floor": floor, "producing": running is not None},
    )


@dg.asset_check(asset=metrics.key)
def consumer_lag(pipeline: Pipeline) -> dg.AssetCheckResult:
    """Records that the sink has still to read stay within LAG_LIMIT, and it gets ahead with them."""
    try:
        settings = pipeline.load()
        lag = active.lag(settings)
        resting = ProgressWatch(settings).wait() if lag.total else None
    except PipelineError as error:
        return _broken(error)
    within = lag.total <= settings.lag_limit
    return dg.AssetCheckResult(
        passed=within and resting is None,
        description=f"{lag.total:,} records"
        + ("" if within else f", LAG_LIMIT is {settings.lag_limit:,}")
        + ("" if resting is None else f"; {resting}"),
        metadata={
            "lag": lag.total,
            "limit": settings.lag_limit,
            "by_partition": dg.MetadataValue.json({str(number): count for number, count in lag.per_partition.items()}),
        },
    )


@dg.asset_check(asset=metrics.key)
def freshness(context: dg.AssetCheckExecutionContext, pipeline: Pipeline) -> dg.AssetCheckResult:
    """The newest reading was stored within FRESHNESS_LIMIT_SECONDS while a producer is meant to run."""
    try:
        settings = pipeline.load()
        limit = settings.freshness_limit_seconds
        running = producing(context.instance, settings)
        age = _recent(settings, limit)[1]
    except PipelineError as error:
        return _broken(error)
    text = f"nothing was stored for {limit} s" if age is None else f"the newest reading was stored {age:.1f} s ago"
    if running is None:
        text += "; no producer is meant to run"
    elif running < limit and age is None:
        text += f"; the producer was started {running:.0f} s ago"
    return dg.AssetCheckResult(
        passed=age is not None or running is None or running < limit,
        description=text,
        metadata={"limit_seconds": limit, **({} if age is None else {"age_seconds": age})},
    )


@dg.asset_check(asset=metrics.key, name="rejects")
def recent_rejects(pipeline: Pipeline) -> dg.AssetCheckResult:
    """No record was rejected within the last ten minutes; the newest ones are named, and what stopped the connector."""
    try:
        settings = pipeline.load()
        recent = rejects.recent(settings, REJECTS_SECONDS, REJECTS_NAMED)
        taken = quarantine.recent(settings, REJECTS_SECONDS)
    except PipelineError as error:
        return _broken(error)
    named = "; ".join(f"partition {one.partition}, offset {one.offset}: {one.reason}" for one in recent.newest)
    return dg.AssetCheckResult(
        passed=not recent.count and not taken.count,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{recent.count:,} within {REJECTS_SECONDS // 60} minutes"
        + (f"; {named}" if named else "")
        + (f"; {taken}" if taken.count else ""),
        metadata={
            "rejects": recent.count,
            "by_reason": dg.MetadataValue.json(recent.reasons),
            "quarantines": taken.count,
            "newest": dg.MetadataValue.json([f"{one.partition}:{one.offset} {one.reason}" for one in recent.newest]),
        },
    )


summaries_job = dg.define_asset_job(
    "summaries",
    selection=[ingestion_rate, device_summary],
    executor_def=dg.in_process_executor,
    description="Both summaries, brought up to date.",
)

check_throughput = dg.define_asset_job(
    "check_throughput",
    selection=dg.AssetSelection.checks(throughput, consumer_lag, freshness, recent_rejects),
    executor_def=dg.in_process_executor,
    description="Throughput, lag, freshness and rejects against their limits. It observes, it puts no load on anything.",
)


@dg.op
def purge_runs(context: dg.OpExecutionContext, pipeline: Pipeline) -> None:
    """Delete runs older than RUN_RETENTION_HOURS with their logs, except those that say that the pipeline is provisioned."""
    with plain_errors():
        settings = pipeline.load()
    instance = context.instance
    provisioned = instance.get_asset_records([metrics_schema.key, metrics_topic.key, metrics_sink_connector.key])
    kept = {record.asset_entry.last_run_id for record in provisioned}
    before = datetime.now(UTC) - timedelta(hours=settings.run_retention_hours)
    old = instance.get_run_records(dg.RunsFilter(created_before=before), limit=PURGED_AT_ONCE, ascending=True)
    gone = [
        record.dagster_run.run_id
        for record in old
        if record.dagster_run.run_id not in kept and record.dagster_run.status not in ACTIVE
    ]
    for run_id in gone:
        instance.delete_run(run_id)
        instance.compute_log_manager.delete_logs(prefix=[run_id])
    with postgres.connect_dagster(settings) as connection:
        # Dagster deletes these neither with their run nor by age.
        connection.execute(postgres.query("purge_check_history"), {"hours": settings.run_retention_hours})
    context.log.info(f"deleted {len(gone)} runs from before {before:%Y-%m-%d %H:%M} UTC")


@dg.op
def purge_ledger(context: dg.OpExecutionContext, pipeline: Pipeline) -> None:
    """Delete producer runs of which the topic holds nothing any more, so that the ledger does not grow for ever."""
    with plain_errors():
        context.log.info(f"deleted {ledger.purge(pipeline.load())} rows of producer runs")


@dg.job(executor_def=dg.in_process_executor)
def housekeeping() -> None:
    """Keep Dagster's history and the producers' ledger within RUN_RETENTION_HOURS, so that they do not fill the disk."""
    purge_runs()
    purge_ledger()


ingestion_rate_schedule = when_provisioned(
    "ingestion_rate_schedule", summaries_job, "* * * * *", "Every minute.", [ingestion_rate.key]
)
# Not in the same minutes: a run is a process that takes seconds of a core to start.
device_summary_schedule = when_provisioned(
    "device_summary_schedule", summaries_job, "1-59/5 * * * *", "Every five minutes.", [device_summary.key]
)
check_throughput_schedule = when_provisioned(
    "check_throughput_schedule", check_throughput, "3-59/5 * * * *", "Every five minutes."
)
housekeeping_schedule = dg.ScheduleDefinition(
    name="housekeeping_schedule",
    job=housekeeping,
    cron_schedule="17 * * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
)


DEFINITIONS = dg.Definitions(
    assets=[ingestion_rate, device_summary],
    asset_checks=[throughput, consumer_lag, freshness, recent_rejects],
    jobs=[summaries_job, check_throughput, housekeeping],
    schedules=[ingestion_rate_schedule, device_summary_schedule, check_throughput_schedule, housekeeping_schedule],
)
