"""What the exporter serves of the real parts, against what they say themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psycopg
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from metrics_pipeline import kafka
from metrics_pipeline.exporter import Exporter
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.settings import CONNECTOR_GROUP, Settings
from metrics_pipeline_tests.conftest import RunningStack

pytestmark = pytest.mark.integration

Samples = dict[tuple[str, ...], float]

ALWAYS = {
    "metrics_pipeline_up",
    "metrics_pipeline_rows",
    "metrics_pipeline_rejected_rows",
    "metrics_pipeline_table_bytes",
    "metrics_pipeline_postgres_xact_commit_total",
    "metrics_pipeline_postgres_tup_inserted_total",
    "metrics_pipeline_postgres_tup_updated_total",
    "metrics_pipeline_postgres_deadlocks_total",
    "metrics_pipeline_postgres_wal_bytes_total",
    "metrics_pipeline_postgres_checkpoints_total",
    "metrics_pipeline_postgres_connections",
    "metrics_pipeline_brokers",
    "metrics_pipeline_partitions_under_replicated",
    "metrics_pipeline_lag",
    "metrics_pipeline_sink_task",
}


@pytest.fixture(scope="module")
def exporter(stack: RunningStack) -> Iterator[Exporter]:
    code = "from dagster import DagsterInstance; DagsterInstance.get()"  # makes Dagster's tables
    subprocess.run([sys.executable, "-c", code], env=dict(stack.environment), check=True, capture_output=True)
    server = Exporter(stack.settings.model_copy(update={"exporter_port": free_ports(1)[0]}))
    server.start()
    yield server
    server.stop()


def scrape(exporter: Exporter, *, anew: bool = True) -> Samples:
    """Samples by name and the values of their labels, these in the order of their names."""
    if anew:
        exporter.metrics._until = 0.0
    answer = requests.get(f"http://127.0.0.1:{exporter.port}/metrics", timeout=30)
    answer.raise_for_status()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def heartbeat(settings: Settings, age: str) -> None:
    """One daemon that gave its last sign of life so long ago; what Dagster itself keeps in the column is UTC."""
    with psycopg.connect(settings.dagster_postgres_url, autocommit=True) as connection:
        connection.execute("DELETE FROM daemon_heartbeats")
        connection.execute(
            "INSERT INTO daemon_heartbeats (daemon_type, daemon_id, timestamp, body) "
            "VALUES ('SENSOR', 'x', now() AT TIME ZONE 'UTC' - %s::interval, '')",
            [age],
        )


def test_every_promised_metric_is_there_and_no_password(exporter: Exporter, stack: RunningStack) -> None:
    found = scrape(exporter)
    assert {name for name, *_ in found} >= ALWAYS
    for part in ("postgres", "broker", "connect", "sink"):
        assert found["metrics_pipeline_up", part] == 1, exporter.metrics.problems()
    text = requests.get(f"http://127.0.0.1:{exporter.port}/metrics", timeout=30).text
    for name in Settings.group("secrets"):
        assert getattr(stack.settings, name).get_secret_value() not in text


def test_figures_are_those_of_the_parts(exporter: Exporter, stack: RunningStack) -> None:
    before = scrape(exporter)
    produced = stack.cli("produce", "--seconds", "2")
    assert produced.returncode == 0, produced.stderr
    verified = stack.cli("verify", "--json")  # waits for the sink
    assert verified.returncode == 0, verified.stderr
    found = scrape(exporter)
    with stack.admin() as connection:
        rows = (connection.execute("SELECT count(*) FROM metrics").fetchone() or (0,))[0]
        size = connection.execute(
            "SELECT sum(pg_table_size(relid)), sum(pg_indexes_size(relid)) FROM pg_partition_tree('metrics')"
        ).fetchone()
    assert found["metrics_pipeline_rows",] == rows > before["metrics_pipeline_rows",]
    assert (
        found["metrics_pipeline_table_bytes", "heap", "metrics"],
        found["metrics_pipeline_table_bytes", "index", "metrics"],
    ) == size
    lag = kafka.consumer_lag(stack.settings)
    shown = {int(labels[1]): value for (name, *labels), value in found.items() if name == "metrics_pipeline_lag"}
    assert shown == lag.per_partition
    assert {labels[0] for name, *labels in found if name == "metrics_pipeline_lag"} == {CONNECTOR_GROUP}
    for counter in ("tup_inserted", "xact_commit", "wal_bytes"):
        name = f"metrics_pipeline_postgres_{counter}_total"
        assert found[name,] > before[name,]
    running = [labels for (name, *labels), value in found.items() if name == "metrics_pipeline_sink_task" and value]
    assert sorted(running) == [["RUNNING", str(task)] for task in range(6)]
    assert found["metrics_pipeline_brokers",] == 1
    assert found["metrics_pipeline_partitions_under_replicated",] == 0
    assert found["metrics_pipeline_up", "producer"] == 1, "it reported a moment ago"


def test_dagsters_runs_and_its_daemons_silence(exporter: Exporter, stack: RunningStack) -> None:
    heartbeat(stack.settings, "5 seconds")
    with psycopg.connect(stack.settings.dagster_postgres_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO runs (run_id, pipeline_name, status, run_body) VALUES ('exporter-1', 'exporter_test', 'SUCCESS', '{}'), "
            "('exporter-2', 'exporter_test', 'SUCCESS', '{}'), ('exporter-3', 'exporter_test', 'FAILURE', '{}')"
        )
        try:
            found = scrape(exporter)
        finally:
            connection.execute("DELETE FROM runs WHERE pipeline_name = 'exporter_test'")
    assert found["metrics_pipeline_up", "dagster"] == 1
    assert found["metrics_pipeline_dagster_runs", "exporter_test", "SUCCESS"] == 2
    assert found["metrics_pipeline_dagster_runs", "exporter_test", "FAILURE"] == 1
    heartbeat(stack.settings, "1 hour")
    assert scrape(exporter)["metrics_pipeline_up", "dagster"] == 0
    assert "no sign of life for 3600 s" in exporter.metrics.problems()["dagster"]


def test_many_scrapes_cost_one_question(exporter: Exporter, stack: RunningStack) -> None:
    first = scrape(exporter)
    stack.cli("sql", "SELECT 1", check=True)
    assert scrape(exporter, anew=False) == first


def test_it_only_reads(exporter: Exporter, stack: RunningStack) -> None:
    scrape(exporter)
    with stack.admin() as connection:
        roles = {
            row[0]
            for row in connection.execute(
                "SELECT usename FROM pg_stat_activity WHERE application_name = 'metrics-pipeline exporter'"
            )
        }
    assert roles == {"metrics_reader"}


def test_a_database_that_is_away_costs_its_figures_only(exporter: Exporter, stack: RunningStack) -> None:
    (nobody,) = free_ports(1)
    elsewhere = stack.settings.model_copy(update={"postgres_port": nobody, "exporter_port": free_ports(1)[0]})
    server = Exporter(elsewhere)
    server.start()
    try:
        found = scrape(server)
    finally:
        server.stop()
    up = {labels[0]: value for (name, *labels), value in found.items() if name == "metrics_pipeline_up"}
    assert up == {"postgres": 0, "producer": 0, "broker": 1, "connect": 1, "sink": 0, "watcher": 0, "dagster": 0}
    assert ("metrics_pipeline_lag", CONNECTOR_GROUP, "0") in found
    assert ("metrics_pipeline_rows",) not in found
