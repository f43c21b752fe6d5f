"""Schema, then partitions, then topic, then sink: each brought to its configured state, each checked by name."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC
from typing import Any, Final

import dagster as dg

from metrics_pipeline import kafka, partitions, postgres, registry, retention
from metrics_pipeline.archive import keeping
from metrics_pipeline.change import Change
from metrics_pipeline.defs.resources import OWNERS, Pipeline, active_runs, plain_errors, verdict
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.partitions import Partition
from metrics_pipeline.settings import Settings
from metrics_pipeline.sinks import active, moves

GROUP = "provisioning"

COLUMNS = dg.TableSchema(
    columns=[
        dg.TableColumn("device_id", "uuid", "the device", dg.TableColumnConstraints(nullable=False)),
        dg.TableColumn("published_at", "timestamptz", "when it measured", dg.TableColumnConstraints(nullable=False)),
        dg.TableColumn(
            "metric_name", "smallint", "what: a code of metric_names", dg.TableColumnConstraints(nullable=False)
        ),
        dg.TableColumn("value", "double precision", "in the metric's unit", dg.TableColumnConstraints(nullable=False)),
        dg.TableColumn("tags", "text[]", "free labels", dg.TableColumnConstraints(nullable=False)),
        dg.TableColumn(
            "created_at", "timestamptz", "when it was first stored", dg.TableColumnConstraints(nullable=False)
        ),
    ],
    constraints=dg.TableConstraints(other=["PRIMARY KEY (device_id, published_at, metric_name)"]),
)

PARTITIONS_SHOWN: Final = 50
_PARTITION_COLUMNS = dg.TableSchema(
    columns=[
        dg.TableColumn("partition", "string"),
        dg.TableColumn("from", "string", "least published_at, UTC; empty: there is no bound"),
        dg.TableColumn("to", "string", "what every published_at is less than, UTC; empty: there is no bound"),
        dg.TableColumn("rows", "int", "about; 0 before the first analyze"),
        dg.TableColumn("bytes", "int", "with indexes"),
    ]
)


class TopicConfig(dg.Config):
    """What the topic is only given when asked."""

    grow_partitions: bool = False


def _result(change: Change) -> dg.MaterializeResult[None]:
    return dg.MaterializeResult(metadata={"state": change.state, "details": dg.MetadataValue.json(change.details)})


@dg.asset(group_name=GROUP, kinds={"postgres", "sql"}, owners=OWNERS)
def metrics_schema(pipeline: Pipeline) -> dg.MaterializeResult[None]:
    """Tables, constraints and grants in PostgreSQL at the newest migration of `sql/migrations`."""
    with plain_errors():
        settings = pipeline.load()
        before = postgres.migration_status(settings)
        applied = postgres.migrate(settings)
    if not applied:
        return _result(Change("unchanged"))
    return _result(Change("changed" if before.applied else "created", [f"applied {name}" for name in applied]))


@dg.asset_check(asset=metrics_schema, blocking=True)
def schema_at_head(pipeline: Pipeline) -> dg.AssetCheckResult:
    """The database has exactly the migrations of this version."""

    def drift(settings: Settings) -> list[str]:
        status = postgres.migration_status(settings)
        return [f"migration {name} is not applied" for name in status.pending] + [
            f"migration {version} is applied, but not among the files" for version in status.missing
        ]

    return verdict(pipeline, drift)


@dg.asset(group_name=GROUP, kinds={"postgres", "table"}, owners=OWNERS, deps=[metrics_schema])
def metrics_partitions(pipeline: Pipeline) -> dg.MaterializeResult[None]:
    """The partitions of the table of the readings, made ahead of time: METRICS_PARTITION says for how much time each is."""
    with plain_errors():
        settings = pipeline.load()
        made = partitions.make(settings)
        found = partitions.every(settings)
    result = _result(Change("changed" if made else "unchanged", [f"made {name}" for name in made]))
    newest = [_row(partition) for partition in reversed(found[-PARTITIONS_SHOWN:])]
    return dg.MaterializeResult(
        metadata={
            **(result.metadata or {}),
            "partitions": len(found),
            "bytes": sum(partition.bytes for partition in found),
            **({"newest": dg.MetadataValue.table(newest, schema=_PARTITION_COLUMNS)} if newest else {}),
        }
    )


def _row(partition: Partition) -> dg.TableRecord:
    low, high = (f"{at.astimezone(UTC):%Y-%m-%d %H:%M}" if at else "" for at in (partition.low, partition.high))
    return dg.TableRecord(
        {"partition": partition.name, "from": low, "to": high, "rows": partition.rows, "bytes": partition.bytes}
    )


@dg.asset_check(asset=metrics_partitions)
def partitions_ahead(pipeline: Pipeline) -> dg.AssetCheckResult:
    """The partitions that the next readings need are there, and no reading of the present lies behind the last one."""
    return verdict(pipeline, partitions.missing)


@dg.asset(group_name=GROUP, kinds={"postgres", "table"}, owners=OWNERS, deps=[metrics_partitions])
def retained_readings(pipeline: Pipeline) -> dg.MaterializeResult[None]:
    """Partitions that METRICS_RETENTION and METRICS_RETENTION_SIZE have no room for go, oldest first; without these settings none does."""
    with plain_errors():
        settings = pipeline.load()
        gone = retention.run(settings, keep=keeping.keeper(settings))
        details = [f"dropped {one.name}: {dropped.rows:,} readings, {dropped.bytes:,} bytes" for one, dropped in gone]
        return dg.MaterializeResult(
            metadata={
                "state": "changed" if gone else "unchanged",
                "details": dg.MetadataValue.json(details),
                "dropped_rows": sum(dropped.rows for _, dropped in gone),
                "dropped_bytes": sum(dropped.bytes for _, dropped in gone),
            }
        )


@dg.asset_check(asset=retained_readings)
def retention_on_time(pipeline: Pipeline) -> dg.AssetCheckResult:
    """What retention has no room for is gone, and nothing that was detached waits to be dropped."""
    return verdict(pipeline, retention.behind)


@dg.asset(group_name=GROUP, kinds={"kafka"}, owners=OWNERS, deps=[metrics_partitions])
def metrics_topic(config: TopicConfig, pipeline: Pipeline) -> dg.MaterializeResult[None]:
    """The topic of the readings: partitions, retention by bytes, timestamps by the broker.

    Partitions only grow, and only with `grow_partitions: true`, since keys then move to other partitions: the sink reads what
    came afterwards once more when it has stored what came before.
    """
    with plain_errors():
        settings = pipeline.load()
        # Before and after: a growth shows by the number of partitions that was noted before it.
        with suppress(ServiceError):  # there is no topic yet
            moves.note(settings)
        topic = kafka.ensure_topic(settings, grow=config.grow_partitions)
        moves.note(settings)
        return _result(topic.then(registry.ensure_schemas(settings)))


@dg.asset_check(asset=metrics_topic, blocking=True)
def topic_as_configured(pipeline: Pipeline) -> dg.AssetCheckResult:
    """Partitions, replicas and settings of the topic are those of the configuration, and so are its schemas at a registry."""
    return verdict(pipeline, lambda settings: kafka.topic_drift(settings) + registry.registry_drift(settings))


@dg.asset(group_name=GROUP, kinds={"kafka", "postgres"}, owners=OWNERS, deps=[metrics_topic])
def metrics_sink_connector(pipeline: Pipeline) -> dg.MaterializeResult[None]:
    """The sink: the one that SINK names stores the readings, from where the other one stood.

    For `connect` it is the JDBC sink in Kafka Connect, `connect/metrics-postgres-sink.json` put as it stands, all its tasks
    running. For `copy` that connector is stopped, and processes of the COPY sink (`metrics-pipeline sink`) are connected.
    """
    with plain_errors():
        return _result(active.ensure_sink(pipeline.load()))


@dg.asset_check(asset=metrics_sink_connector, blocking=True)
def connector_as_configured(pipeline: Pipeline) -> dg.AssetCheckResult:
    """The sink that SINK names is the one that stores the readings, and it runs; a connector is as its file says."""
    return verdict(pipeline, active.sink_drift)


metrics = dg.AssetSpec(
    "metrics",
    deps=[metrics_sink_connector],
    group_name="readings",
    kinds={"postgres", "table"},
    owners=OWNERS,
    description="The stored readings, each key once: filled by the sink, not by Dagster.",
    metadata={"dagster/column_schema": COLUMNS, "dagster/table_name": "public.metrics"},
)

provision = dg.define_asset_job(
    "provision",
    selection=[metrics_schema, metrics_partitions, metrics_topic, metrics_sink_connector],
    executor_def=dg.in_process_executor,
    description="Bring schema, partitions, topic and sink to their configured state, in this order. Changes nothing that is right.",
)

check_provisioning = dg.define_asset_job(
    "check_provisioning",
    selection=dg.AssetSelection.checks(
        schema_at_head, partitions_ahead, retention_on_time, topic_as_configured, connector_as_configured
    ),
    executor_def=dg.in_process_executor,
    description="See drift without mending it.",
)


partitions_job = dg.define_asset_job(
    "partitions",
    selection=dg.AssetSelection.assets(metrics_partitions, retained_readings)
    | dg.AssetSelection.checks(dg.AssetCheckKey(metrics.key, "archive_complete")),
    executor_def=dg.in_process_executor,
    description="Make the partitions of the time to come, drop those that are too old, and see what is late, archives included.",
)


def not_provisioned(instance: dg.DagsterInstance) -> str | None:
    """Why the pipeline is not ready to be used, or None once `provision` went through."""
    if active_runs(instance, provision.name):
        return "provisioning is under way"
    keys = [metrics_schema.key, metrics_topic.key, metrics_sink_connector.key]
    done = {
        record.asset_entry.asset_key
        for record in instance.get_asset_records(keys)
        if record.asset_entry.last_materialization is not None
    }
    missing = [key.to_user_string() for key in keys if key not in done]
    return f"{', '.join(missing)} not provisioned yet: run the `provision` job" if missing else None


def when_provisioned(
    name: str,
    job: Any,
    cron: str,
    description: str,
    assets: Sequence[dg.AssetKey] | None = None,
) -> dg.ScheduleDefinition:
    """A schedule that runs from the start, and skips its ticks with the reason until `provision` went through.

    Args:
        name: of the schedule.
        job: what it runs; dagster exports no type for what `define_asset_job` makes.
        cron: when, in UTC.
        description: for the UI.
        assets: those of the job to materialize; None is all of them.
    """

    @dg.schedule(
        name=name,
        job=job,
        cron_schedule=cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=description,
    )
    def tick(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        reason = not_provisioned(context.instance)
        return dg.SkipReason(reason) if reason else dg.RunRequest(asset_selection=assets)

    return tick


check_provisioning_schedule = when_provisioned(
    "check_provisioning_schedule",
    check_provisioning,
    "* * * * *",
    "Every minute, so that drift is seen red before it is mended.",
)

partitions_schedule = when_provisioned(
    "partitions_schedule", partitions_job, "*/10 * * * *", "Every ten minutes; most of the time there is nothing to do."
)


DEFINITIONS = dg.Definitions(
    assets=[metrics_schema, metrics_partitions, retained_readings, metrics_topic, metrics_sink_connector, metrics],
    asset_checks=[schema_at_head, partitions_ahead, retention_on_time, topic_as_configured, connector_as_configured],
    jobs=[provision, check_provisioning, partitions_job],
    schedules=[check_provisioning_schedule, partitions_schedule],
)
