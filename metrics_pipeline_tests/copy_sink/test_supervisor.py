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
from metrics_pipeline.copy_sink.supervisor import Supervisor
from metrics_pipeline.errors import BusyError, SettingError
from metrics_pipeline.settings import Settings


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


def broken(name: str, pipe: Connection) -> None:
    """A worker that ends at once."""
    del name, pipe
    raise SystemExit(3)


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch, body: Any, workers: int = 2) -> Iterator[tuple[Supervisor, list[bool]]]:
    monkeypatch.setattr(supervisor, "work", body)
    found = Supervisor(Settings(sink_port=1).model_copy(update={"sink_port": 0}), workers)
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
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
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
        assert "cannot write for 99 s: PostgreSQL is away" in get(found, "health").json()["reason"]


def test_a_worker_that_ends_again_and_again_is_started_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch, broken, workers=1) as (found, ended):
        wait_for(lambda: get(found, "health").status_code == 503)
        assert "times in a row" in get(found, "health").json()["reason"]
        (slot,) = found.report()[1]
        assert slot.due - slot.began > 0.5
        assert not ended


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


def test_failpoints_do_nothing_unasked() -> None:
    for name in PLACES:
        Failpoints("").reach(name)
        Failpoints(f"{name}=0").reach(name)
