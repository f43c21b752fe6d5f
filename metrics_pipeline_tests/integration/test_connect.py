"""The connector in a real Kafka Connect, and its repair. A connector, a topic and a table of their own are broken here."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from metrics_pipeline import kafka, metric
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.metric import Reading
from metrics_pipeline.settings import CONNECTOR, DEAD_LETTER_TOPIC, Settings
from metrics_pipeline.sinks import connector, repair
from metrics_pipeline.sinks.connector import ConnectClient
from metrics_pipeline.sinks.repair import SinkRepair
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.fakes import until
from metrics_pipeline_tests.patience import deadline, patience

pytestmark = pytest.mark.integration

NAME = "sink-of-test-connect"
TOPIC = "metrics.of-test-connect"
TABLE = "metrics_of_test_connect"
TIMES = [datetime(2026, 11, 22, 16, tzinfo=UTC) + timedelta(microseconds=number) for number in range(100_000)]


@dataclass
class Sink:
    """A sink like the pipeline's, beside it."""

    stack: RunningStack
    settings: Settings
    file: Path

    @property
    def client(self) -> ConnectClient:
        return ConnectClient(self.settings.connect_rest)

    def change(self, **config: str) -> None:
        """Change the connector's file."""
        self.file.write_text(json.dumps(json.loads(self.file.read_text()) | config))

    def publish(self, count: int, partition: int = 0, poison: dict[int, bytes] | None = None) -> None:
        """Readings of one device, some of them replaced by other bytes."""
        producer = Producer(kafka.client_config(self.settings) | {"linger.ms": 20})
        for number in range(count):
            reading = Reading(UUID(int=partition), TIMES[number], 10, float(number), ["a", "b c"])
            key, value = metric.encode(reading)
            value = (poison or {}).get(number, value)
            producer.produce(TOPIC, key=key, value=value, partition=partition)
        assert producer.flush(patience(30)) == 0

    def rows(self) -> int:
        with self.stack.admin() as connection:
            row = connection.execute(f"SELECT count(*) FROM {TABLE}").fetchone()
        assert row is not None
        return int(row[0])

    def wait_for_rows(self, count: int, seconds: float = 60) -> None:
        give_up = deadline(seconds)
        while (found := self.rows()) != count:
            assert time.monotonic() < give_up, f"{found} rows of {count}; {self.client.state(NAME).problems}"
            time.sleep(0.2)


@pytest.fixture
def sink(stack: RunningStack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Sink]:
    for module in (connector, repair):
        monkeypatch.setattr(module, "CONNECTOR", NAME)
    monkeypatch.setattr(repair, "CONNECTOR_GROUP", f"connect-{NAME}")
    for module in (kafka, repair):
        monkeypatch.setattr(module, "TOPIC", TOPIC)
    file = tmp_path / "sink.json"
    ours = {"topics": TOPIC, "collection.name.format": TABLE, "tasks.max": "2"}
    file.write_text(json.dumps(connector.connector_config() | ours))
    monkeypatch.setattr(connector, "CONNECTOR_FILE", file)
    monkeypatch.setattr(connector, "ROOT", tmp_path)
    settings = stack.settings.model_copy(update={"topic_partitions_metrics": 2, "sink_quarantine": False})
    with stack.admin() as connection:
        connection.execute(f"CREATE TABLE {TABLE} (LIKE metrics INCLUDING ALL)")
        connection.execute(f"GRANT SELECT, INSERT, UPDATE ON {TABLE} TO metrics_writer")
    kafka.ensure_topic(settings)
    sink = Sink(stack, settings, file)
    yield sink
    sink.client.delete(NAME)
    while sink.client.state(NAME).connector != "MISSING":
        time.sleep(0.2)
    with stack.admin() as connection:
        connection.execute(f"DROP TABLE {TABLE}")
        connection.execute("DROP FUNCTION IF EXISTS sleep_of_test_connect()")
    admin = AdminClient(kafka.client_config(settings))
    for future in admin.delete_topics([TOPIC]).values():
        future.result(patience(10))
    _forget_group(admin, f"connect-{NAME}")


def _forget_group(admin: AdminClient, group: str) -> None:
    give_up = deadline(20)
    while True:
        try:
            admin.delete_consumer_groups([group])[group].result(patience(10))
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)  # its members leave one after the other
        else:
            return


def test_put_once_mended_when_changed_by_hand(sink: Sink) -> None:
    assert connector.ensure_connector(sink.settings).state == "created"
    assert connector.connector_drift(sink.settings) == []
    assert connector.ensure_connector(sink.settings).state == "unchanged"
    sink.client.put(NAME, connector.connector_config() | {"batch.size": "10"})
    assert connector.connector_drift(sink.settings)[0] == "batch.size is 10, configured 2500"
    change = connector.ensure_connector(sink.settings)
    assert (change.state, change.details) == ("changed", ["batch.size is 10, configured 2500"])
    assert connector.connector_drift(sink.settings) == []
    sink.client.delete(NAME)
    assert connector.connector_drift(sink.settings) == [f"connector {NAME} does not exist"]
    assert connector.ensure_connector(sink.settings).state == "created"


def test_connect_gives_references_and_no_secret(stack: RunningStack) -> None:
    config = ConnectClient(stack.settings.connect_rest).config(CONNECTOR)
    assert config is not None
    assert config["connection.password"] == "${env:SINK_PG_PASSWORD}"
    assert stack.settings.metrics_writer_password.get_secret_value() not in json.dumps(config)


def test_every_setting_of_the_file_is_one_that_connect_uses(sink: Sink) -> None:
    """A `consumer.override.` outside the worker's allow list, say, would be refused."""
    connector.ensure_connector(sink.settings)
    log = (sink.settings.data_dir / "logs" / "connect.log").read_text()
    assert "max.poll.records = 5000" in log
    assert "fetch.min.bytes = 1048576" in log


@pytest.mark.parametrize(
    "changed",
    [{"connection.url": "jdbc:postgresql://127.0.0.1:1/metrics"}, {"connection.password": "${env:SINK_PG_USER}"}],
)
def test_a_connector_that_cannot_start_is_an_error_with_its_cause(sink: Sink, changed: dict[str, str]) -> None:
    sink.change(**changed)
    with pytest.raises(ServiceError, match=r"are FAILED: the sink cannot connect to PostgreSQL.*logs connect"):
        connector.ensure_connector(sink.settings)


@pytest.mark.parametrize("setting", ["tasks.max", "consumer.override.sasl.jaas.config"])
def test_a_file_that_connect_refuses_is_an_error_with_its_reason(sink: Sink, setting: str) -> None:
    """The second one because the worker lets connectors tune how they poll, and nothing else."""
    sink.change(**{setting: "nonsense"})
    with pytest.raises(ServiceError, match=r"refused PUT .*\(400\).*: mend sink\.json") as refused:
        connector.ensure_connector(sink.settings)
    assert setting.removeprefix("consumer.override.") in str(refused.value)


def test_rows_are_typed_and_undecodable_records_are_dead_letters(sink: Sink) -> None:
    connector.ensure_connector(sink.settings)
    before = _ends(sink.settings, DEAD_LETTER_TOPIC)
    sink.publish(20, poison={5: b"{broken", 7: b'{"device_id": "x"}'})
    sink.wait_for_rows(18)
    with sink.stack.admin() as connection:
        rows = connection.execute(
            f"SELECT device_id, published_at, metric_name, value, tags FROM {TABLE} ORDER BY published_at LIMIT 2"
        ).fetchall()
    assert rows == [(UUID(int=0), TIMES[number], 10, float(number), ["a", "b c"]) for number in range(2)]
    assert _ends(sink.settings, DEAD_LETTER_TOPIC) - before == 2


def test_sessions_that_postgresql_ends_are_repaired_and_nothing_is_lost(sink: Sink) -> None:
    connector.ensure_connector(sink.settings)
    repairer = SinkRepair(sink.settings, due=lambda _: None)
    assert repairer.tick().healthy
    sink.publish(60_000, partition=0)
    ended = 0
    while not ended:
        with sink.stack.admin() as connection:
            found = connection.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE state = 'active' AND query LIKE %s",
                [f"INSERT INTO%{TABLE}%"],
            ).fetchone()
        ended = found[0] if found else 0
    give_up = deadline(90)
    actions = []
    while sink.rows() != 60_000:
        assert time.monotonic() < give_up, repairer.tick().message
        actions += [event.action for event in repairer.tick().events]
        time.sleep(0.2)
    assert "restart failed tasks" in actions
    assert "give up" not in actions


SLEEP = """CREATE OR REPLACE FUNCTION sleep_of_test_connect() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_sleep({}); RETURN NULL; END $$"""


@contextmanager
def stopped_backend(sink: Sink) -> Iterator[psutil.Process]:
    """PostgreSQL's process of a task, stopped in a statement, where it holds nothing of the server's memory that others wait for: asleep."""
    asleep = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query LIKE %s"
    with sink.stack.admin() as connection:
        connection.execute(SLEEP.format(600))
        connection.execute(
            f"CREATE TRIGGER sleep BEFORE INSERT ON {TABLE} FOR EACH STATEMENT EXECUTE FUNCTION sleep_of_test_connect()"
        )
        sink.publish(60_000, partition=0)
        found: list[tuple[Any, ...]] = []

        def met() -> bool:
            found[:] = connection.execute(asleep, [f"INSERT INTO%{TABLE}%"]).fetchall()
            return bool(found)

        assert until(met, 30), "no INSERT was met"
        backend = psutil.Process(found[0][0])
        backend.suspend()
        connection.execute(SLEEP.format(0))
    try:
        yield backend
    finally:
        backend.resume()


def test_tasks_that_run_and_do_not_move_are_restarted_with_their_sessions(sink: Sink) -> None:
    """PostgreSQL's process of a task is stopped within a put: Connect goes on to say RUNNING."""
    connector.ensure_connector(sink.settings)
    with stopped_backend(sink) as backend:
        # Its patience begins now, so that the transaction is older than that.
        repairer = SinkRepair(sink.settings.model_copy(update={"sink_stall_seconds": 5}), due=lambda _: None)
        began, actions = time.monotonic(), []
        while "restart all" not in actions:
            tick = repairer.tick()
            actions += [event.action for event in tick.events]
            assert time.monotonic() < began + 30, tick.message
            time.sleep(0.2)
        assert time.monotonic() < began + 12
        assert actions == ["restart all"]
        assert f"PostgreSQL's session {backend.pid} is active in a transaction" in tick.message
        assert "topic metrics.of-test-connect, partition 0" in tick.message
        assert not repairer.tick().healthy, "a restart is no progress"
    # It was told to end, which it does as soon as it can.
    give_up = deadline(90)
    while sink.rows() != 60_000:
        repairer.tick()
        assert time.monotonic() < give_up, f"{sink.rows()} rows; {repairer.tick().message}"
        time.sleep(0.2)
    assert not psutil.pid_exists(backend.pid)


def test_a_lock_of_somebody_else_is_named_and_no_task_restarted(sink: Sink) -> None:
    connector.ensure_connector(sink.settings)
    repairer = SinkRepair(sink.settings.model_copy(update={"sink_stall_seconds": 5}), due=lambda _: None)
    assert repairer.tick().healthy
    with sink.stack.admin() as person:
        person.execute("SET application_name = 'a person'")
        person.execute("BEGIN")
        person.execute(f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE")
        sink.publish(100)
        began, named = time.monotonic(), f"a lock that pid {person.info.backend_pid} (a person, role postgres) holds"
        while named not in (tick := repairer.tick()).message:
            assert (time.monotonic() < began + 30, tick.events) == (True, []), tick.message
            time.sleep(0.2)
        assert (time.monotonic() < began + 12, tick.healthy, tick.events) == (True, False, [])
        person.execute("ROLLBACK")
    sink.wait_for_rows(100)
    give_up = deadline(10)
    while not repairer.tick().healthy:
        assert time.monotonic() < give_up
        time.sleep(0.2)


def test_a_record_that_cannot_be_stored_is_named_and_can_be_skipped(sink: Sink) -> None:
    """PostgreSQL has no NUL in text; the converter lets it through, so it is no dead letter. Nothing is quarantined here."""
    connector.ensure_connector(sink.settings)
    repairer = SinkRepair(sink.settings, due=lambda _: None, jitter=lambda: 0.1)
    key, value = metric.encode(Reading(UUID(int=1), TIMES[500], 10, 1.0, ["x"]))
    sink.publish(10, partition=0)
    sink.publish(500, partition=1)
    sink.wait_for_rows(510)
    producer = Producer(kafka.client_config(sink.settings))
    producer.produce(TOPIC, key=key, value=value.replace(b'"x"', b'"\\u0000"'), partition=1)
    assert producer.flush(patience(30)) == 0
    give_up = deadline(120)
    while "stopped trying" not in (said := repairer.tick().message):
        assert time.monotonic() < give_up, said
        time.sleep(0.2)
    assert f"at topic {TOPIC}, partition 1, offset 500: " in said
    assert 'invalid byte sequence for encoding "UTF8": 0x00' in said
    # What a quarantine does, by Connect's own REST API (KIP-875).
    url = f"{sink.settings.connect_rest}/connectors/{NAME}"
    _call("PUT", f"{url}/stop")
    time.sleep(2)
    offset = {"partition": {"kafka_topic": TOPIC, "kafka_partition": 1}, "offset": {"kafka_offset": 501}}
    _call("PATCH", f"{url}/offsets", {"offsets": [offset]})
    assert "not touched" in repairer.tick().message
    assert connector.ensure_connector(sink.settings).state == "changed"
    sink.publish(20, partition=0)
    sink.wait_for_rows(520)
    assert repairer.tick().healthy


def _call(method: str, url: str, body: Any = None) -> None:
    import requests

    for _ in range(40):
        answer = requests.request(method, url, json=body, timeout=30)
        if answer.ok:
            return
        time.sleep(0.2)
    answer.raise_for_status()


def _ends(settings: Settings, topic: str) -> int:
    consumer = Consumer(kafka.client_config(settings) | {"group.id": "test-connect"})
    try:
        metadata = consumer.list_topics(timeout=10).topics
        if topic not in metadata:
            return 0
        return sum(
            consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)[1]
            for number in metadata[topic].partitions
        )
    finally:
        consumer.close()
