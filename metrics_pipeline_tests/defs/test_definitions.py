"""What Dagster is given, as a picture: a change of the graph, a job, a sensor or a schedule has to show here."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import dagster as dg
import pytest

from metrics_pipeline.definitions import defs
from metrics_pipeline.settings import ROOT, ProducerSettings

ASSETS = """
metrics_schema          provisioning  postgres,sql
metrics_partitions      provisioning  postgres,table  <- metrics_schema
retained_readings       provisioning  postgres,table  <- metrics_partitions
metrics_topic           provisioning  kafka           <- metrics_partitions
metrics_sink_connector  provisioning  kafka,postgres  <- metrics_topic
metrics                 readings      postgres,table  <- metrics_sink_connector
metrics_archive         readings      file,parquet    <- metrics
replayed_files          readings      file,kafka      <- metrics_topic
device_summary          monitoring    postgres,sql    <- metrics
ingestion_rate          monitoring    postgres,sql    <- metrics
"""

CHECKS = """
metrics:consumer_lag
metrics:freshness
metrics:rejects
metrics:throughput
metrics:archive_complete
metrics_partitions:partitions_ahead
retained_readings:retention_on_time
metrics_schema:schema_at_head                   blocking
metrics_sink_connector:connector_as_configured  blocking
metrics_topic:topic_as_configured               blocking
"""

JOBS = """
archive             metrics_archive
check_provisioning  metrics_partitions_partitions_ahead metrics_schema_schema_at_head metrics_sink_connector_connector_as_configured metrics_topic_topic_as_configured retained_readings_retention_on_time
check_throughput    metrics_consumer_lag metrics_freshness metrics_rejects metrics_throughput
housekeeping        purge_ledger purge_runs
partitions          metrics_archive_complete metrics_partitions metrics_partitions_partitions_ahead retained_readings retained_readings_retention_on_time
produce_metrics     publish
provision           metrics_partitions metrics_partitions_partitions_ahead metrics_schema metrics_schema_schema_at_head metrics_sink_connector metrics_sink_connector_connector_as_configured metrics_topic metrics_topic_topic_as_configured
replay_files        replay
summaries           device_summary ingestion_rate
"""

SCHEDULES = """
archive_schedule             5-59/10 * * * *  UTC  RUNNING  archive
check_provisioning_schedule  * * * * *    UTC  RUNNING  check_provisioning
check_throughput_schedule    3-59/5 * * * *  UTC  RUNNING  check_throughput
device_summary_schedule      1-59/5 * * * *  UTC  RUNNING  summaries
housekeeping_schedule        17 * * * *   UTC  RUNNING  housekeeping
ingestion_rate_schedule      * * * * *    UTC  RUNNING  summaries
partitions_schedule          */10 * * * *  UTC  RUNNING  partitions
"""

SENSORS = """
producer_sensor       5 s   RUNNING  produce_metrics
replay_folder_sensor  10 s  RUNNING  replay_files
sink_repair_sensor    5 s   RUNNING  -
"""


@pytest.fixture(scope="module")
def graph() -> Any:
    return defs.resolve_asset_graph()


def table(text: str) -> set[tuple[str, ...]]:
    return {tuple(line.split()) for line in text.strip().splitlines()}


def test_definitions_load() -> None:
    dg.Definitions.validate_loadable(defs)


def test_entry_point_is_short() -> None:
    assert len((ROOT / "metrics_pipeline" / "definitions.py").read_text().splitlines()) < 15


def test_assets(graph: Any) -> None:
    found = set()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        parents = sorted(parent.to_user_string() for parent in node.parent_keys)
        row = [key.to_user_string(), node.group_name, ",".join(sorted(node.kinds))]
        found.add((*row, "<-", *parents) if parents else tuple(row))
        assert node.owners == ["team:metrics"], key
        assert node.description, key
    assert found == table(ASSETS)


def test_only_the_readings_are_not_dagsters_to_make(graph: Any) -> None:
    assert graph.external_asset_keys == {dg.AssetKey("metrics"), dg.AssetKey("replayed_files")}


def test_provisioning_comes_in_order(graph: Any) -> None:
    names = [key.to_user_string() for level in graph.toposorted_asset_keys_by_level for key in level]
    readings = ["metrics_schema", "metrics_partitions", "metrics_topic", "metrics_sink_connector", "metrics"]
    assert [name for name in names if name in readings] == readings


def test_checks(graph: Any) -> None:
    found = set()
    for key in graph.asset_check_keys:
        node = graph.get(key)
        assert node.description, key
        found.add((key.to_user_string(), "blocking") if node.blocking else (key.to_user_string(),))
    assert found == table(CHECKS)


def test_stored_tables_show_their_columns(graph: Any) -> None:
    for name in ("metrics", "ingestion_rate", "device_summary"):
        metadata = graph.get(dg.AssetKey(name)).metadata
        assert metadata["dagster/table_name"] == f"public.{name}"
        assert metadata["dagster/column_schema"].columns


def test_jobs() -> None:
    jobs = [defs.resolve_job_def(name) for name, *_ in table(JOBS)]
    assert {(job.name, *sorted(node.name for node in job.nodes)) for job in jobs} == table(JOBS)
    for job in jobs:
        assert job.executor_def is dg.in_process_executor, job.name
        assert job.description, job.name
    named = {job.name for job in defs.resolve_all_job_defs() if not job.name.startswith("__")}
    assert named == {job.name for job in jobs}


def publish_op() -> Any:
    (node,) = defs.resolve_job_def("produce_metrics").nodes
    return node


def test_the_producer_is_never_retried() -> None:
    """Dagster would answer a termination with a retry."""
    assert publish_op().retry_policy is None
    assert publish_op().definition.retry_policy is None


def test_schedules() -> None:
    found = {
        (
            schedule.name,
            *str(schedule.cron_schedule).split(),
            schedule.execution_timezone,
            schedule.default_status.value,
            schedule.job_name,
        )
        for schedule in map(defs.resolve_schedule_def, [name for name, *_ in table(SCHEDULES)])
    }
    assert found == table(SCHEDULES)
    assert {schedule.name for schedule in defs.schedules or []} == {row[0] for row in found}


def test_sensors() -> None:
    found = set()
    for sensor in defs.sensors or []:
        jobs = [target.job_name for target in sensor.targets] or ["-"]
        found.add((sensor.name, str(sensor.minimum_interval_seconds), "s", sensor.default_status.value, *jobs))
    assert found == table(SENSORS)


def test_a_producer_run_takes_every_setting_of_the_producer_and_no_other() -> None:
    fields = publish_op().definition.config_schema.config_type.fields
    assert set(fields) == set(ProducerSettings.model_fields)
    for name, field in fields.items():
        assert field.description == ProducerSettings.model_fields[name].description
        assert not field.is_required


def test_loading_reads_no_setting_and_connects_to_nothing() -> None:
    """A broken setting must be told by the run that needs it, not by a code location that does not load."""
    code = "import metrics_pipeline.definitions as d, dagster as dg; dg.Definitions.validate_loadable(d.defs)"
    environment = {**os.environ, "KAFKA_PORT": "none", "PRODUCER_MIN_METRICS": "-1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
