"""The latency probe against a PostgreSQL in memory."""

from __future__ import annotations

import json
import time

import pytest

from metrics_pipeline.producer import latency
from metrics_pipeline.producer.latency import Latency, LatencyProbe
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.fakes import FakeClock, FakePostgres, until

TIME = "2026-11-22T16:00:00Z"


def key(device: str) -> bytes:
    return json.dumps({"device_id": device, "published_at": TIME, "metric_name": 10}).encode()


@pytest.fixture
def server() -> FakePostgres:
    return FakePostgres(visible=set())


@pytest.fixture
def observed() -> list[float]:
    return []


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def probe(server: FakePostgres, observed: list[float], clock: FakeClock) -> LatencyProbe:
    """One that looks when a test says so."""
    return LatencyProbe(Settings(), observed.append, connect=server.connect, clock=clock)


def see(server: FakePostgres, *devices: str) -> None:
    assert server.visible is not None
    server.visible.update((device, TIME, 10) for device in devices)


def test_it_measures_from_the_acknowledgement_to_the_first_select_that_sees_the_key(
    server: FakePostgres, observed: list[float], probe: LatencyProbe, clock: FakeClock
) -> None:
    probe.offer(key("a"), clock() - 2)
    probe.offer(key("b"), clock() - 1)
    probe.look()
    assert server.sessions
    assert probe.latency() == Latency(None, None)
    clock.sleep(0.5)
    see(server, "b")
    probe.look()
    assert observed == [1.5]
    clock.sleep(0.5)
    see(server, "a")
    probe.look()
    assert observed == [1.5, 3]
    assert probe.latency() == Latency(1.5, 3)


def test_quantiles(server: FakePostgres, probe: LatencyProbe, clock: FakeClock) -> None:
    devices = [str(n) for n in range(200)]
    see(server, *devices)
    for n, device in enumerate(devices):
        probe.offer(key(device), clock() - 10 * (n + 1))
        probe.look()
    assert probe.latency() == Latency(1000, 1980)


def test_only_the_last_minute_counts(server: FakePostgres, probe: LatencyProbe, clock: FakeClock) -> None:
    see(server, "a")
    probe.offer(key("a"), clock() - 1)
    probe.look()
    clock.sleep(60)
    assert probe.latency() == Latency(1, 1)
    clock.sleep(0.1)
    assert probe.latency() == Latency(None, None)


def test_a_sink_that_stands_still_does_not_look_fast(probe: LatencyProbe, clock: FakeClock) -> None:
    probe.offer(key("a"), clock())
    clock.sleep(5)
    probe.look()
    assert probe.latency() == Latency(None, None)  # it may still come in time
    clock.sleep(25)
    assert probe.latency() == Latency(30, 30)


def test_few_are_watched_at_once(
    server: FakePostgres, observed: list[float], probe: LatencyProbe, clock: FakeClock
) -> None:
    devices = [str(n) for n in range(500)]
    for device in devices:
        probe.offer(key(device), clock())
    see(server, *devices)
    probe.look()
    probe.look()
    assert len(observed) == latency.MOST_WAITING
    probe.offer(key("0"), clock())  # and there is room again
    probe.look()
    assert len(observed) == latency.MOST_WAITING + 1


def test_errors_of_postgres_cost_samples_only(
    server: FakePostgres, observed: list[float], probe: LatencyProbe, clock: FakeClock
) -> None:
    probe.offer(key("a"), clock())
    assert probe.look() == latency.POLL_SECONDS
    server.restart()
    server.down = True
    assert probe.look() == latency.RETRY_SECONDS
    see(server, "a", "b")
    server.down = False
    probe.look()
    assert observed == []
    probe.offer(key("b"), clock())
    probe.look()
    assert len(observed) == 1
    assert len(server.sessions) == 2


def test_its_thread_looks_again_and_again_and_closes_its_session(
    server: FakePostgres, observed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "POLL_SECONDS", 0.005)
    probe = LatencyProbe(Settings(), observed.append, connect=server.connect)
    probe.start()
    for number, device in enumerate("ab", 1):
        probe.offer(key(device), time.monotonic())
        see(server, device)
        assert until(lambda: len(observed) == number)  # noqa: B023  # called before the loop goes on
    probe.stop()
    assert 0 <= max(observed) < 5
    assert [session.closed for session in server.sessions] == [True]
