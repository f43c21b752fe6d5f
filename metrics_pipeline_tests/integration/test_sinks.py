"""Both sinks on the real parts: one takes over from the other under load, and what the COPY sink rejects is seen and replayed.

The stack is shared with other tests, so each test compares with what was found before it, and the connector is active at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
import requests
from confluent_kafka import Producer

from metrics_pipeline import kafka, metric
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.local.status import Sampler
from metrics_pipeline.metric import Reading
from metrics_pipeline.settings import CONNECTOR, TOPIC, Settings
from metrics_pipeline.sinks import active, connector, repair
from metrics_pipeline.sinks.connector import ConnectClient
from metrics_pipeline.verification.verify import VerifyReport, verify
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.patience import deadline, patience

pytestmark = pytest.mark.integration

START = datetime(2026, 2, 1, tzinfo=UTC)


def until(condition: Callable[[], object], seconds: float = 90) -> None:
    give_up = deadline(seconds)
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.2)


@contextmanager
def running(stack: RunningStack, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command of ours beside the test."""
    log = stack.settings.data_dir / "logs" / f"test-{arguments[0]}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "metrics_pipeline", *arguments],
            env=dict(stack.environment),
            cwd=stack.settings.data_dir,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        yield process
    except BaseException:
        print(log.read_text()[-5000:])  # noqa: T201  # shown by pytest when the test fails
        raise
    finally:
        process.terminate()
        try:
            process.wait(timeout=patience(60))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def workers(stack: RunningStack) -> Iterator[None]:
    """The COPY sink with two workers, standing by at first; at the end the connector is the active sink again."""
    with running(stack, "sink", "--workers", "2"):
        until(lambda: active.position(stack.settings).sessions >= 2)
        yield
        active.ensure_sink(stack.settings)
    assert connector.sink_state(stack.settings).running


@pytest.fixture
def copying(stack: RunningStack, workers: None) -> Iterator[Settings]:
    """Settings with the COPY sink active; the connector's again afterwards."""
    del workers
    settings = stack.settings.model_copy(update={"sink": "copy"})
    active.ensure_sink(settings)
    yield settings
    active.ensure_sink(stack.settings)


def provision(stack: RunningStack, sink: str) -> str:
    """The job as a person runs it; its output."""
    command = [str(Path(sys.executable).parent / "dagster"), "job", "execute"]
    done = subprocess.run(
        [*command, "-m", "metrics_pipeline.definitions", "-j", "provision"],
        cwd=stack.settings.data_dir,
        env={**stack.environment, "SINK": sink},
        capture_output=True,
        text=True,
        timeout=patience(300),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def problems(report: VerifyReport) -> tuple[int, int, int, int, int]:
    counts = report.counts
    return counts.lost, counts.unexpected, counts.different, report.unaccounted, len(report.anomalies)


def further(settings: Settings, offset: int) -> int:
    """Where the active sink is, in all partitions together, once it is further than that."""
    until(lambda: sum(active.offsets(settings).values()) > offset)
    return sum(active.offsets(settings).values())


def rows_of_the_copy_sink(settings: Settings) -> int:
    return int(requests.get(f"{settings.sink_http}/status", timeout=5).json()["rows"])


def test_one_sink_takes_over_from_the_other_under_load(stack: RunningStack, workers: None) -> None:
    del workers
    settings = stack.settings
    before = verify(settings)
    stored = {"connect": 0, "copy": 0}
    with running(
        stack,
        *("produce", "--seconds", "240"),
        *("--set", "PRODUCER_MIN_METRICS=1500", "--set", "PRODUCER_MAX_METRICS=2500"),
    ) as producer:
        until(lambda: sum(high for _, high in kafka.watermarks(settings).values()) > before.records + 10_000)
        former = 0
        for sink in ("copy", "connect", "copy", "connect"):
            provision(stack, sink)
            assert active.kind(settings) == sink
            assert active.sink_drift(settings.model_copy(update={"sink": sink})) == []
            reached = sum(active.offsets(settings).values())
            assert reached >= former, "what the other sink had stored is stored again"
            former = further(settings, reached + 20_000)
            stored[sink] += former - reached
            assert producer.poll() is None, "there was no load any more"
        producer.terminate()
        assert producer.wait(timeout=patience(60)) == 0
    after = verify(settings)
    assert problems(after) == problems(before)
    assert after.records - before.records == after.counts.compared - before.counts.compared > 80_000
    assert min(stored.values()) >= 40_000
    assert rows_of_the_copy_sink(settings) >= 40_000


def test_a_second_time_changes_nothing(stack: RunningStack, copying: Settings) -> None:
    assert active.ensure_sink(copying).state == "unchanged"
    assert active.sink_drift(copying) == []
    assert ConnectClient(copying.connect_urls).state(CONNECTOR).connector == "STOPPED"
    assert repair.SinkRepair(copying).tick().healthy
    assert active.ensure_sink(stack.settings).state == "changed"
    assert active.ensure_sink(stack.settings).state == "unchanged"
    assert active.sink_drift(stack.settings) == []


def test_sessions_that_are_cut_while_nothing_is_written_come_back(stack: RunningStack, copying: Settings) -> None:
    """The producer's sensor waits for a sink that is connected, and nothing is written without a producer."""
    until(lambda: active.lag(copying).total == 0)
    with psycopg.connect(stack.settings.admin_url(copying.metrics_database), autocommit=True) as connection:
        cut = connection.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE application_name LIKE 'metrics-pipeline sink%'"
        ).fetchone()
    assert cut is not None
    assert cut[0] >= 2
    until(lambda: active.position(copying).sessions >= 2, 15)
    assert active.sink_problem(copying) is None


def test_status_and_lag_are_those_of_the_active_sink(stack: RunningStack, copying: Settings) -> None:
    with closing(Sampler(stack.settings)) as sampler:
        until(lambda: active.lag(copying).total == 0 and sampler.sample()["sink"]["state"] == "running")
        sample = sampler.sample()
        assert sample["sink"] == {
            "kind": "copy",
            "healthy": True,
            "state": "running",
            "url": copying.sink_http,
            "workers": 2,
        }
        assert (sample["connect"]["healthy"], sample["connect"]["state"], sample["lag"]) == (True, "not used", 0)
        active.ensure_sink(stack.settings)
        sample = sampler.sample()
        assert (sample["sink"]["kind"], sample["sink"]["workers"]) == ("connect", 6)
        assert sample["connect"]["connector"] == sample["sink"]["state"] == "RUNNING"


def test_without_a_worker_the_connector_stays(stack: RunningStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions are counted by PostgreSQL, and none of them is the sink's."""
    monkeypatch.setattr(active, "WORKERS_SECONDS", 0.0)
    monkeypatch.setattr(active, "position", lambda _settings: active.Position())
    with pytest.raises(ServiceError, match="no process of the COPY sink is connected"):
        active.ensure_sink(stack.settings.model_copy(update={"sink": "copy"}))
    assert connector.sink_state(stack.settings).running


# --- Rejected records --------------------------------------------------------------------------------------------


def encoded(number: float, tag: str = "of:test-sinks") -> tuple[bytes, bytes]:
    return metric.encode(Reading(uuid4(), START + timedelta(microseconds=1), 10, number, [tag]))


def publish(settings: Settings, *messages: tuple[bytes | None, bytes | None]) -> list[tuple[int, int]]:
    """Where the messages of somebody else stand."""
    places: list[tuple[int, int]] = []
    producer = Producer(kafka.client_config(settings))
    for key, value in messages:
        producer.produce(
            TOPIC, key=key, value=value, on_delivery=lambda _, m: places.append((m.partition() or 0, m.offset() or 0))
        )
        assert producer.flush(patience(30)) == 0
    return places


def listed(stack: RunningStack, *arguments: str) -> dict[tuple[int, int], str]:
    document = json.loads(stack.cli("rejects", "list", "--limit", "1000", "--json", *arguments, check=True).stdout)
    assert sum(document["by_reason"].values()) == len(document["rejects"])
    return {(one["partition"], one["offset"]): one["reason"] for one in document["rejects"]}


def test_bad_records_are_accounted_for_listed_and_shown(stack: RunningStack, copying: Settings) -> None:
    before = verify(copying)
    key, value = encoded(1.5, "a \x1b[31mred\x1b[0m tag ✓")
    bad = value.replace(b'"value":1.5', b'"value":"1.5"')
    assert bad != value
    places = publish(copying, (key, bad), (None, value), (key, b"\x00\xff not JSON"), (key, None), (key, value))
    after = verify(copying)
    assert problems(after) == problems(before)
    assert after.counts.compared == before.counts.compared + 1
    assert after.tombstones == before.tombstones + 1
    expected = dict(zip(places[:3], ("bad_value", "no_key", "bad_json"), strict=True))
    assert {place: reason for place, reason in listed(stack).items() if place in places} == expected
    assert set(listed(stack, "--reason", "no_key").values()) == {"no_key"}
    shown = stack.cli("rejects", "show", *map(str, places[0]), check=True).stdout
    assert "bad_value" in shown
    assert "\x1b" not in shown
    assert "✓" in shown
    raw = subprocess.run(
        [sys.executable, "-m", "metrics_pipeline", "rejects", "show", *map(str, places[2]), "--raw"],
        env=dict(stack.environment),
        capture_output=True,
        check=True,
    )
    assert raw.stdout == b"\x00\xff not JSON"
    missing = stack.cli("rejects", "show", "0", "999999999")
    assert missing.returncode == 2
    assert "no record of partition 0, offset 999999999 was rejected" in missing.stderr
    # None of them is a reading by now either.
    done = stack.cli("rejects", "replay", "--partition", str(places[1][0]), "--offset", str(places[1][1]), check=True)
    assert done.stdout.splitlines() == ["0 published again", "1 stay: no_key"]
    assert listed(stack)[places[1]] == "no_key"


def test_what_is_missing_from_the_rejects_is_unaccounted_for(stack: RunningStack, copying: Settings) -> None:
    before = verify(copying)
    (place,) = publish(copying, (encoded(1.0)[0], b"{"))
    assert verify(copying).unaccounted == before.unaccounted
    with stack.admin() as connection:
        where = 'WHERE (partition, "offset") = (%s, %s)'
        row = connection.execute(f"DELETE FROM rejected_metrics {where} RETURNING *", place).fetchone()
        assert row is not None
        found = verify(copying)
        connection.execute("INSERT INTO rejected_metrics VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)", row)
    assert found.unaccounted == before.unaccounted + 1
    assert any("neither among the dead letters nor among the rejects" in line for line in found.examples)


def test_what_the_database_refused_is_rejected_and_stored_by_a_replay(stack: RunningStack, copying: Settings) -> None:
    before = verify(copying)
    waiting = len(listed(stack))
    device = UUID(json.loads(encoded(0.0)[0])["device_id"])
    messages = [
        metric.encode(Reading(device, START + timedelta(seconds=number), 10, 4000.0 + number, []))
        for number in range(300)
    ]
    with stack.admin() as connection:
        connection.execute(
            "ALTER TABLE metrics ADD CONSTRAINT of_test_sinks CHECK (value NOT IN (4007, 4242)) NOT VALID"
        )
        try:
            publish(copying, *messages)
            until(lambda: active.lag(copying).total == 0)
        finally:
            connection.execute("ALTER TABLE metrics DROP CONSTRAINT of_test_sinks")
    between = verify(copying)
    assert problems(between) == problems(before)
    assert between.counts.rejected == before.counts.rejected + 2
    assert rows_of(stack, device) == 298
    done = stack.cli("rejects", "replay", "--reason", "refused_by_database", check=True)
    assert done.stdout.splitlines()[0] == "2 published again"
    after = verify(copying)
    assert problems(after) == problems(before)
    assert after.counts.rejected == before.counts.rejected
    assert rows_of(stack, device) == 300
    assert len(listed(stack)) == waiting
    assert len(listed(stack, "--all")) >= waiting + 2
    assert stack.cli("rejects", "replay", "--all", check=True).stdout.splitlines()[0] == "0 published again"


def rows_of(stack: RunningStack, device: UUID) -> int:
    with stack.admin() as connection:
        row = connection.execute("SELECT count(*) FROM metrics WHERE device_id = %s", [device]).fetchone()
    assert row is not None
    return int(row[0])


def test_purge_keeps_what_the_topic_still_holds(stack: RunningStack, copying: Settings) -> None:
    (place,) = publish(copying, (encoded(1.0)[0], b"[]"))
    until(lambda: place in listed(stack))
    with stack.admin() as connection:
        connection.execute(
            'INSERT INTO rejected_metrics (topic, partition, "offset", reason, detail, rejected_at) '
            "VALUES (%s, 0, 0, 'bad_json', 'of an older topic', '2020-01-01')",
            ["metrics.old"],
        )
        try:
            done = stack.cli("rejects", "purge", "--before", "2100-01-01", check=True)
            assert done.stdout.startswith("0 deleted, ")
            assert place in listed(stack)
        finally:
            connection.execute("DELETE FROM rejected_metrics WHERE topic = 'metrics.old'")


def test_the_readers_role_sees_whose_sessions_there_are(stack: RunningStack) -> None:
    name = "metrics-pipeline sink of a test"
    before = active.position(stack.settings).sessions
    with psycopg.connect(stack.settings.role_url("metrics_writer"), application_name=name):
        assert active.position(stack.settings).sessions == before + 1
