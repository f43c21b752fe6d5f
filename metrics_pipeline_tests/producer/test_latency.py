"""The latency probe against a PostgreSQL in memory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from metrics_pipeline.producer import latency
from metrics_pipeline.producer.latency import Latency, LatencyProbe
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.fakes import FakePostgres, until

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
def watching(server: FakePostgres, observed: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[LatencyProbe]:
    monkeypatch.setattr(latency, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(latency, "RETRY_SECONDS", 0.01)
    made = LatencyProbe(Settings(), observed.append, connect=server.connect)
    made.start()
    yield made
    made.stop()
    assert all(session.closed for session in server.sessions)


def see(server: FakePostgres, *devices: str) -> None:
    assert server.visible is not None
    server.visible.update((device, TIME, 10) for device in devices)


def test_it_measures_from_the_acknowledgement_to_the_first_select_that_sees_the_key(
    server: FakePostgres, observed: list[float], watching: LatencyProbe
) -> None:
    watching.offer(key("a"), time.monotonic() - 2)
    watching.offer(key("b"), time.monotonic() - 1)
    assert until(lambda: server.sessions)
    assert watching.latency() == Latency(None, None)
    see(server, "b")
    assert until(lambda: len(observed) == 1)
    see(server, "a")
    assert until(lambda: len(observed) == 2)
    assert observed[0] == pytest.approx(1, abs=0.5)
    assert observed[1] == pytest.approx(2, abs=0.5)
    measured = watching.latency()
    assert (measured.p50, measured.p99) == (observed[0], observed[1])


def test_quantiles(server: FakePostgres, observed: list[float], watching: LatencyProbe) -> None:
    devices = [str(n) for n in range(200)]
    see(server, *devices)
    now = time.monotonic()
    for n, device in enumerate(devices):
        watching.offer(key(device), now - 10 * (n + 1))
        assert until(lambda: len(observed) > n)  # noqa: B023  # called before the loop goes on
    measured = watching.latency()
    assert measured.p50 == pytest.approx(1000, abs=9)
    assert measured.p99 == pytest.approx(1980, abs=9)


def test_only_the_last_minute_counts(
    server: FakePostgres, observed: list[float], watching: LatencyProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(server, "a")
    watching.offer(key("a"), time.monotonic())
    assert until(lambda: observed)
    assert watching.latency().p50 is not None
    monkeypatch.setattr(latency, "WINDOW_SECONDS", 0.0)
    assert watching.latency() == Latency(None, None)


def test_a_sink_that_stands_still_does_not_look_fast(server: FakePostgres, watching: LatencyProbe) -> None:
    watching.offer(key("a"), time.monotonic() - 30)
    assert until(lambda: watching.latency().p50 is not None)
    assert watching.latency().p99 == pytest.approx(30, abs=1)


def test_few_are_watched_at_once(server: FakePostgres, observed: list[float], watching: LatencyProbe) -> None:
    devices = [str(n) for n in range(500)]
    for device in devices:
        watching.offer(key(device), time.monotonic())
    see(server, *devices)
    assert until(lambda: len(observed) == latency.MOST_WAITING)
    time.sleep(0.05)
    assert len(observed) == latency.MOST_WAITING
    watching.offer(key("0"), time.monotonic())  # and there is room again
    assert until(lambda: len(observed) == latency.MOST_WAITING + 1)


def test_errors_of_postgres_cost_samples_only(
    server: FakePostgres, observed: list[float], watching: LatencyProbe
) -> None:
    watching.offer(key("a"), time.monotonic())
    assert until(lambda: server.sessions)
    server.restart()
    server.down = True
    time.sleep(0.05)
    see(server, "a", "b")
    server.down = False

    def measured() -> bool:
        watching.offer(key("b"), time.monotonic())
        return bool(observed)

    assert until(measured)
    assert len(server.sessions) > 1
