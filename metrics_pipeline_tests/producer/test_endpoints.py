"""`/health`, `/status` and `/metrics`, over real HTTP."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from uuid import UUID

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from metrics_pipeline.errors import BusyError
from metrics_pipeline.producer.endpoints import HealthServer, ProducerMetrics, Snapshot
from metrics_pipeline.producer.latency import Latency

NOW = Snapshot(
    run_id=UUID(int=7),
    state="running",
    seconds=12.5,
    acknowledged=100,
    failed=2,
    unknown=3,
    in_flight=40,
    acknowledged_per_second=19.5,
    latency_seconds=Latency(0.25, None),
    paused=None,
    stalled_seconds=0.0,
)


class Run:
    """Something that has a snapshot."""

    def __init__(self) -> None:
        self.now = NOW
        self.metrics = ProducerMetrics(lambda: self.now)
        self.server = HealthServer(0, lambda: self.now, self.metrics.registry, stall_seconds=15)

    def get(self, path: str) -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.server.port}{path}", timeout=5)


@pytest.fixture
def run() -> Iterator[Run]:
    made = Run()
    made.server.start()
    yield made
    made.server.stop()


def test_healthy(run: Run) -> None:
    answer = run.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"healthy": True, "state": "running", "paused": None, "reason": None}


@pytest.mark.parametrize(("seconds", "status"), [(15.0, 200), (15.1, 503)])
def test_a_broker_that_owes_an_answer_for_too_long_is_503(run: Run, seconds: float, status: int) -> None:
    run.now = replace(NOW, stalled_seconds=seconds)
    answer = run.get("/health")
    assert answer.status_code == status
    assert answer.json()["reason"] == (None if status == 200 else "no acknowledgement from the broker for 15 s")


def test_paused_is_healthy_and_says_so(run: Run) -> None:
    run.now = replace(NOW, state="paused", paused="consumer lag is 9 records")
    answer = run.get("/health")
    assert answer.status_code == 200
    assert answer.json()["paused"] == "consumer lag is 9 records"


def test_status(run: Run) -> None:
    assert run.get("/status").json() == {
        "run_id": str(UUID(int=7)),
        "state": "running",
        "seconds": 12.5,
        "acknowledged": 100,
        "failed": 2,
        "unknown": 3,
        "in_flight": 40,
        "acknowledged_per_second": 19.5,
        "latency_seconds": {"p50": 0.25, "p99": None},
        "paused": None,
        "stalled_seconds": 0.0,
    }


def test_metrics_are_prometheus_metrics(run: Run) -> None:
    run.metrics.latency.observe(0.3)
    answer = run.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["metrics_producer_messages_total", "acknowledged"] == 100
    assert samples["metrics_producer_messages_total", "failed"] == 2
    assert samples["metrics_producer_messages_total", "unknown"] == 3
    assert samples["metrics_producer_in_flight",] == 40
    assert samples["metrics_producer_paused",] == 0
    assert samples["metrics_producer_latency_seconds_bucket", "0.25"] == 0
    assert samples["metrics_producer_latency_seconds_bucket", "0.5"] == 1


def test_two_runs_in_one_process_do_not_share_metrics(run: Run) -> None:
    run.metrics.latency.observe(1)
    other = ProducerMetrics(lambda: NOW)
    assert other.registry.get_sample_value("metrics_producer_latency_seconds_count") == 0


def test_a_busy_port_is_named_with_the_setting_that_moves_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = HealthServer(port, lambda: NOW, ProducerMetrics(lambda: NOW).registry, 15)
        with pytest.raises(BusyError, match=rf"port {port} is taken by another program: .* PRODUCER_PORT"):
            server.start()
        server.stop()


def test_the_port_is_free_again_after_a_stop(run: Run) -> None:
    run.get("/health")
    run.server.stop()
    again = HealthServer(run.server.port, lambda: NOW, run.metrics.registry, 15)
    again.start()
    assert run.get("/health").status_code == 200
    again.stop()


def test_signal_handlers_are_left_alone() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    made = Run()
    made.server.start()
    made.get("/health")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    made.server.stop()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_it_listens_on_loopback_only(run: Run) -> None:
    listeners = [
        c.laddr.ip
        for c in psutil.Process().net_connections("tcp")
        if c.laddr.port == run.server.port and c.status == "LISTEN"
    ]
    assert listeners == ["127.0.0.1"]
