"""Producer runs on the real broker and the real PostgreSQL."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import requests

from metrics_pipeline import kafka, postgres
from metrics_pipeline.errors import BusyError, ServiceError
from metrics_pipeline.producer import latency, publisher
from metrics_pipeline.producer.ledger import LOCK_KEY
from metrics_pipeline.producer.run import Producer, RunReport, simulated
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.fakes import until
from metrics_pipeline_tests.patience import patience

pytestmark = pytest.mark.integration


def small(stack: RunningStack, **changes: Any) -> Settings:
    """About 2,000 messages a second for three seconds."""
    names = {
        "producer_min_metrics": 200,
        "producer_max_metrics": 300,
        "producer_publish_interval": 125,
        "producer_run_seconds": 3,
        "disk_free_limit_gb": 0,
    }
    return stack.settings.model_copy(update=names | changes)


@contextmanager
def running(producer: Producer) -> Iterator[list[BaseException]]:
    """A run in a thread; its error, if any, in the list."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            producer.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield errors
    finally:
        producer.stop.set()
        thread.join(patience(60))
        assert not thread.is_alive()


def ledger_rows(stack: RunningStack, run_id: UUID) -> dict[int, dict[str, Any]]:
    with stack.admin() as connection, connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        rows = cursor.execute("SELECT * FROM producer_runs WHERE run_id = %s", [run_id]).fetchall()
    return {row["partition"]: row for row in rows}


def claims(row: dict[str, Any]) -> list[tuple[int, int]]:
    return [(piece.lower, piece.upper) for piece in row["offsets"]]


def check(stack: RunningStack, report: RunReport) -> None:
    """The ledger says what the report says, and every claim lies in the topic."""
    rows = ledger_rows(stack, report.run_id)
    for what in ("acknowledged", "failed", "unknown"):
        assert sum(row[what] for row in rows.values()) == getattr(report, what)
    assert {row["state"] for row in rows.values()} == {report.state}
    assert {number: claims(row) for number, row in rows.items() if claims(row)} == report.offsets
    assert sum(end - start for ranges in report.offsets.values() for start, end in ranges) == report.acknowledged
    ends = {number: high for number, (_, high) in kafka.watermarks(stack.settings).items()}
    assert all(ranges[-1][1] <= ends[number] for number, ranges in report.offsets.items())


def row_count(stack: RunningStack) -> int:
    with stack.admin() as connection:
        row = connection.execute("SELECT count(*) FROM metrics").fetchone()
    assert row is not None
    return int(row[0])


def test_a_run_from_the_fleet_to_the_table(stack: RunningStack) -> None:
    before = {number: high for number, (_, high) in kafka.watermarks(stack.settings).items()}
    stored = row_count(stack)
    settings = small(stack, producer_run_seconds=5)
    producer = Producer(settings)
    with running(producer) as errors:
        assert until(lambda: producer.snapshot().acknowledged > 0, 20)
        assert requests.get(f"{settings.producer_http}/health", timeout=5).status_code == 200
        status = requests.get(f"{settings.producer_http}/status", timeout=5).json()
        assert status["state"] == "running"
        assert until(lambda: producer.snapshot().latency_seconds.p50 is not None, 20)
        assert until(lambda: producer.report.state == "finished", 20)
    assert errors == []
    assert producer.report.clean
    check(stack, producer.report)
    after = {number: high for number, (_, high) in kafka.watermarks(stack.settings).items()}
    assert producer.report.offsets == {number: [(before[number], after[number])] for number in after}
    # Unique keys: as many rows as messages.
    assert until(lambda: row_count(stack) - stored == producer.report.acknowledged, 60)


def test_one_simulated_run_at_a_time_and_replays_beside_it(stack: RunningStack) -> None:
    settings = small(stack, producer_run_seconds=60)
    first = Producer(settings)
    with running(first) as errors:
        assert until(lambda: first.snapshot().acknowledged > 0, 20)
        second = Producer(settings)
        with pytest.raises(
            BusyError, match=rf"another producer is running \(producer run {first.run_id}, connected since"
        ):
            second.run()
        assert ledger_rows(stack, second.run_id) == {}
        rounds = [messages for _, messages in zip(range(20), nonempty(settings), strict=False)]
        replay = Producer(small(stack, producer_seed=77), rounds, kind="replay", messages_per_second=5000)
        report = replay.run()
        assert report.acknowledged == sum(map(len, rounds))
    assert errors == []
    assert first.report.state == "stopped"
    check(stack, first.report)
    check(stack, report)
    for number, ranges in report.offsets.items():
        taken = {offset for start, end in ranges for offset in range(start, end)}
        others = {offset for start, end in first.report.offsets[number] for offset in range(start, end)}
        assert not taken & others
    assert any(len(ranges) > 1 for ranges in first.report.offsets.values())  # they did run side by side


def nonempty(settings: Settings) -> Iterator[list[publisher.Message]]:
    for messages in simulated(settings.model_copy(update={"producer_seed": 77})):
        if messages:
            yield messages
        time.sleep(0.01)


def terminate_sessions(stack: RunningStack, run_id: UUID) -> None:
    with stack.admin() as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
            [f"producer run {run_id}"],
        )


def test_a_lost_session_costs_nothing_and_the_lock_is_taken_again(stack: RunningStack) -> None:
    producer = Producer(small(stack, producer_run_seconds=60))
    with running(producer) as errors:
        assert until(lambda: producer.snapshot().acknowledged > 0, 20)
        terminate_sessions(stack, producer.run_id)
        before = producer.snapshot().acknowledged
        assert until(lambda: producer.snapshot().acknowledged > before + 3000, 20)
        with pytest.raises(BusyError):
            Producer(small(stack)).run()
    assert errors == []
    assert producer.report.clean
    check(stack, producer.report)


def test_a_lock_that_somebody_else_took_meanwhile_ends_the_run(stack: RunningStack) -> None:
    producer = Producer(small(stack, producer_run_seconds=60))
    with running(producer) as errors, stack.admin() as thief:
        assert until(lambda: producer.snapshot().acknowledged > 0, 20)
        terminate_sessions(stack, producer.run_id)
        assert until(lambda: thief.execute("SELECT pg_try_advisory_lock(%s)", [LOCK_KEY]).fetchone() == (True,), 0.9)
        assert until(lambda: producer.report.acknowledged > 0, 20)
    assert len(errors) == 1
    assert isinstance(errors[0], BusyError)
    assert producer.report.state == "failed"
    assert producer.report.unknown == 0
    check(stack, producer.report)


def child(stack: RunningStack, run_id: UUID) -> subprocess.Popen[bytes]:
    """A producer in a process of its own, with the fleet of the settings."""
    code = (
        "import sys, uuid\n"
        "from metrics_pipeline.producer.run import Producer\n"
        "from metrics_pipeline.settings import Settings\n"
        "Producer(Settings.load(disk_free_limit_gb=0), run_id=uuid.UUID(sys.argv[1])).run()\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(run_id)], env=dict(stack.environment))


def test_a_killed_run_leaves_its_claims_and_frees_the_lock(stack: RunningStack) -> None:
    run_id = uuid4()
    process = child(stack, run_id)
    try:
        assert until(lambda: any(row["acknowledged"] for row in ledger_rows(stack, run_id).values()), 40)
        time.sleep(1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    rows = ledger_rows(stack, run_id)
    assert {row["state"] for row in rows.values()} == {"running"}
    marks = kafka.watermarks(stack.settings)
    for number, row in rows.items():
        assert sum(end - start for start, end in claims(row)) == row["acknowledged"]
        assert all(end <= marks[number][1] for _, end in claims(row))
    report = Producer(small(stack, producer_run_seconds=1)).run()
    assert report.clean
    assert {row["state"] for row in ledger_rows(stack, run_id).values()} == {"failed"}


def test_an_unreachable_broker_is_named(stack: RunningStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "START_SECONDS", 3.0)
    producer = Producer(small(stack, kafka_url="127.0.0.1:1"))
    begun = time.monotonic()
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:1 cannot be reached \(Connection refused\): .*KAFKA_URL"):
        producer.run()
    assert time.monotonic() - begun < 15
    check(stack, producer.report)


def test_a_wrong_password_is_named(stack: RunningStack) -> None:
    wrong = type(stack.settings.metrics_producer_password)("wrong")
    with pytest.raises(ServiceError, match="METRICS_PRODUCER_PASSWORD"):
        Producer(small(stack, metrics_producer_password=wrong)).run()


def test_the_probe_never_scans_the_table(stack: RunningStack) -> None:
    with postgres.connect(
        stack.settings, "metrics_producer", autocommit=True, prepare_threshold=None, options=latency._SESSION
    ) as connection:
        keys = {
            "devices": [str(UUID(int=n)) for n in range(60)],
            "times": ["2026-11-22T16:00:00Z"] * 60,
            "metrics": [0] * 60,
        }
        plan = connection.execute("EXPLAIN " + postgres.query("visible_keys"), keys).fetchall()
    scans = [row[0] for row in plan if " on metrics_" in row[0]]
    assert scans
    assert [scan for scan in scans if not re.search(r"Index (Only )?Scan using metrics_", scan)] == []
