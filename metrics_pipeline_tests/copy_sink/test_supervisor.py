"""The supervisor with workers that only report: replaced when they end, summed up, told to stop."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from metrics_pipeline.copy_sink import supervisor
from metrics_pipeline.copy_sink.counts import LATENCY_BUCKETS, WorkerCounts, WorkerReport
from metrics_pipeline.copy_sink.failpoint import PLACES, Failpoints
from metrics_pipeline.copy_sink.progress import Moment, Step
from metrics_pipeline.copy_sink.sessions import Session
from metrics_pipeline.copy_sink.supervisor import Supervisor
from metrics_pipeline.errors import BusyError, SettingError
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.patience import deadline


def busy(name: str, pipe: Connection) -> None:
    """A worker that has stored 100 rows and waits to be told to stop."""
    del name
    report = WorkerReport("running", "", WorkerCounts(polled=110, rows=100, tombstones=3), {4: 7})
    report.counts.rejected["bad_value"] += 7
    report.counts.batches["copy"] += 2
    report.counts.observe(0.02)
    pipe.send(report)
    try:
        pipe.recv()
    except EOFError:
        return
    report.counts.rows += 5
    pipe.send(report)


def stuck(name: str, pipe: Connection) -> None:
    """A worker that cannot write."""
    del name
    pipe.send(WorkerReport("waiting", "PostgreSQL is away", waiting_seconds=99.0))
    try:
        pipe.recv()
    except EOFError:
        return


def silent(name: str, pipe: Connection) -> None:
    """A worker that reports once, inside a transaction, and does not even notice that it is to end."""
    del name
    pipe.send(WorkerReport("running", moment=Moment(Step("writer", 0.1), Step("COPY", 0.2))))
    time.sleep(600)


def blocked(name: str, pipe: Connection) -> None:
    """A worker that reports well that it is stuck."""
    del name
    for seconds in range(600):
        pipe.send(WorkerReport("running", moment=Moment(Step("writer", seconds), Step("COMMIT", 100.0 + seconds))))
        if pipe.poll(0.1):
            return


class FakeSessions:
    """PostgreSQL's side: what the test says it is."""

    def __init__(self, _: Settings) -> None:
        self.away: str | None = None
        self.session: Session | None = None
        self.ending: list[str] = []
        self.answers = True

    def ask(self, names: list[str]) -> None:
        if self.answers:
            self.ending = [name for name in self.ending if name not in names]

    def end(self, name: str) -> None:
        self.ending.append(name)

    def ended(self, name: str) -> bool:
        return name not in self.ending

    def seen(self, name: str, *, reader: bool = False) -> Session | None:
        del name, reader
        return self.session

    def blocked(self, name: str) -> Session | None:
        return self.seen(name)

    def problem(self, seconds: float) -> str | None:
        del seconds
        return self.away


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> FakeSessions:
    """Those of the next supervisor."""
    made = FakeSessions(Settings())
    monkeypatch.setattr(supervisor, "SessionWatch", lambda _: made)
    return made


def broken(name: str, pipe: Connection) -> None:
    """A worker that ends at once."""
    del name, pipe
    raise SystemExit(3)


@contextmanager
def running(
    monkeypatch: pytest.MonkeyPatch, body: Any, workers: int = 2, stall: int = 60
) -> Iterator[tuple[Supervisor, list[bool]]]:
    monkeypatch.setattr(supervisor, "work", body)
    settings = Settings(sink_port=1).model_copy(update={"sink_port": 0, "sink_stall_seconds": stall})
    found = Supervisor(settings, workers)
    stop, ended = threading.Event(), []
    thread = threading.Thread(target=lambda: ended.append(found.run(stop)))
    thread.start()
    try:
        wait_for(lambda: found.port != 0)
        yield found, ended
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    give_up = deadline(seconds)
    while not condition():
        assert time.monotonic() < give_up, "did not come true in time"
        time.sleep(0.05)


def get(found: Supervisor, path: str) -> requests.Response:
    return requests.get(f"http://127.0.0.1:{found.port}/{path}", timeout=5)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_workers_are_summed_up_replaced_and_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch, busy) as (found, ended):
        wait_for(lambda: found.report()[0].rows == 200)
        victim = found.report()[1][0].process
        assert victim is not None
        os.kill(victim.pid or 0, signal.SIGKILL)
        # What the dead one had done still counts, and its successor's comes on top.
        wait_for(lambda: found.report()[0].rows == 300)
        assert found.restarts == 1
        assert get(found, "health").json() == {"healthy": True, "state": "running", "reason": None}
        shown = get(found, "status").json()
        assert (shown["rows"], shown["rejected"], shown["lag"], shown["restarts"]) == (300, {"bad_value": 21}, 14, 1)
        assert {worker["pid"] for worker in shown["workers"]} != {victim.pid}
        values = samples(get(found, "metrics").text)
        pids = [worker["pid"] for worker in shown["workers"]]
    assert values["metrics_sink_rows_total", ()] == 300
    assert values["metrics_sink_rejected_total", (("reason", "bad_value"),)] == 21
    assert values["metrics_sink_batches_total", (("path", "copy"),)] == 6
    assert values["metrics_sink_restarts_total", ()] == 1
    assert values["metrics_sink_latency_seconds_bucket", (("le", "0.01"),)] == 0
    assert values["metrics_sink_latency_seconds_bucket", (("le", "0.025"),)] == 3
    assert values["metrics_sink_latency_seconds_count", ()] == 3
    assert values["metrics_sink_workers", (("state", "running"),)] == 2
    assert ended == [True]
    assert found.report()[0].rows == 310  # the last word of each is heard
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_a_worker_that_cannot_write_makes_it_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch, stuck, workers=1) as (found, _):
        wait_for(lambda: get(found, "health").status_code == 503)
        assert "cannot go on for 99 s: PostgreSQL is away" in get(found, "health").json()["reason"]


def test_a_worker_that_ends_again_and_again_is_started_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch, broken, workers=1) as (found, ended):
        wait_for(lambda: get(found, "health").status_code == 503)
        assert "times in a row" in get(found, "health").json()["reason"]
        (slot,) = found.report()[1]
        assert slot.due - slot.began > 0.5
        assert not ended


def test_a_worker_that_does_not_answer_is_named_killed_and_replaced(
    monkeypatch: pytest.MonkeyPatch, sessions: FakeSessions
) -> None:
    monkeypatch.setattr(supervisor, "END_SECONDS", 1.0)
    sessions.answers = False
    with running(monkeypatch, silent, workers=1, stall=1) as (found, _):
        wait_for(lambda: found.stalls["COPY"] == 1)
        (slot,) = found.report()[1]
        # Its sessions first: what it holds in PostgreSQL would hold up its successor.
        wait_for(lambda: "PostgreSQL does not answer yet" in str(get(found, "health").json()["reason"]))
        assert (slot.process, found.restarts) == (None, 1)
        sessions.answers = True
        wait_for(lambda: slot.process is not None)
        wait_for(lambda: "the last that it told of: COPY" in str(get(found, "health").json()["reason"]))
        assert get(found, "health").status_code == 503
        assert get(found, "health").json()["state"] == "stuck"
        # It stored nothing either: the next one gets twice the time.
        assert "it is replaced after 2 s" in slot.problem
        assert get(found, "status").json()["stalls"] == {"COPY": 2}
        assert samples(get(found, "metrics").text)["metrics_sink_stalls_total", (("step", "COPY"),)] >= 2


@pytest.mark.parametrize(
    ("away", "session", "said"),
    [
        ("connection refused", None, "PostgreSQL does not answer either (connection refused)"),
        ("", None, "stuck in COMMIT"),
        (
            None,
            Session(7, "active", "Lock/relation", ("pid 8 (psql, role me)",)),
            "a lock that pid 8 (psql, role me) holds",
        ),
    ],
)
def test_a_worker_is_not_replaced_where_that_cannot_help(
    monkeypatch: pytest.MonkeyPatch, sessions: FakeSessions, away: str | None, session: Session | None, said: str
) -> None:
    sessions.away, sessions.session = away, session
    with running(monkeypatch, blocked, workers=1, stall=1) as (found, _):
        wait_for(lambda: said in str(get(found, "health").json()["reason"]))
        (worker,) = get(found, "status").json()["workers"]
        assert (worker["state"], said in worker["problem"]) == ("stuck", True)
        time.sleep(1)
        assert found.restarts == 0
        # When PostgreSQL is there again, and nobody else is to blame, it is.
        sessions.away, sessions.session = None, Session(7, "active", "Client/ClientRead")
        wait_for(lambda: found.restarts == 1)
        assert found.stalls["COMMIT"] >= 1


def test_a_taken_port_is_named() -> None:
    first = Supervisor(Settings().model_copy(update={"sink_port": 0}), 1)
    first._server.start()
    try:
        second = Supervisor(Settings().model_copy(update={"sink_port": first.port}), 1)
        with pytest.raises(BusyError, match=rf"port {first.port} is taken by another program: .*SINK_PORT"):
            second.run(threading.Event())
    finally:
        first._server.stop()


def test_counts_add_up_and_travel() -> None:
    one, two = WorkerCounts(rows=3, latency_sum=1.0), WorkerCounts(rows=4, fenced=1)
    one.observe(LATENCY_BUCKETS[-1] + 1)
    two.retries["40P01"] += 2
    one.add(pickle.loads(pickle.dumps(two)))
    assert (one.rows, one.fenced, one.retries["40P01"]) == (7, 1, 2)
    assert one.latency[-1] == 1
    assert sum(one.latency) == 1


@pytest.mark.parametrize("text", ["nowhere=0.5", "polled", "polled=often"])
def test_a_wrong_failpoint_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="METRICS_SINK_FAILPOINTS"):
        Failpoints(text)


def test_failpoints_tell_where_a_batch_is() -> None:
    told: list[str] = []
    points = Failpoints("", at=told.append)
    points.begin("lock")
    for name in PLACES:
        points.reach(name)
    assert told == ["lock", "decode", "lock", "COPY", "COPY", "COPY", "COMMIT", "wait"]


def test_failpoints_do_nothing_unasked() -> None:
    for name in PLACES:
        Failpoints("").reach(name)
        Failpoints(f"{name}=0").reach(name)
