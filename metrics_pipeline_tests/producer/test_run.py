"""A whole producer run, with Kafka and PostgreSQL in memory: its report, its ledger, its HTTP side, and how it ends."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
import requests
from confluent_kafka import KafkaError

from metrics_pipeline.errors import BusyError, InstallError, RecordError, ServiceError
from metrics_pipeline.producer import guards, ledger, publisher
from metrics_pipeline.producer import run as producer
from metrics_pipeline.producer.deliveries import NO_PARTITION
from metrics_pipeline.producer.endpoints import Snapshot
from metrics_pipeline.producer.latency import LatencyProbe
from metrics_pipeline.producer.ledger import RunLedger, Source
from metrics_pipeline.producer.publisher import Message
from metrics_pipeline.producer.run import Producer, RunReport, run_producer
from metrics_pipeline.settings import ProducerSettings, Settings
from metrics_pipeline_tests.fakes import FakeClock, FakePostgres, FakeTopic, until


class Interrupted(BaseException):
    """What Dagster raises in the main thread."""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "WRITE_SECONDS", 0.02)
    monkeypatch.setattr(guards, "LAG_SECONDS", 0.02)
    monkeypatch.setattr(ledger, "AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(producer, "PROGRESS_SECONDS", 0.1)
    monkeypatch.setattr(producer, "LEDGER_SECONDS", 0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class World:
    """A topic and a database in memory, and runs against them."""

    def __init__(self) -> None:
        self.topic = FakeTopic()
        self.server = FakePostgres()
        self.port = free_port()

    def options(self, settings: Settings, kind: Source, run_id: UUID) -> dict[str, Any]:
        """Kafka and PostgreSQL in memory."""
        return {
            "make_client": self.topic.client,
            "ledger": RunLedger(settings, run_id, kind, connect=self.server.connect),
            "probe": LatencyProbe(settings, connect=self.server.connect),
        }

    def producer(
        self, source: Iterable[list[Message]] | None = None, kind: Source = "simulated", **options: Any
    ) -> Producer:
        defaults = {"producer_min_metrics": 50, "producer_max_metrics": 60, "producer_publish_interval": 10}
        names = {name: options.pop(name) for name in list(options) if name in Settings.model_fields}
        settings = Settings(**{"producer_port": self.port, "disk_free_limit_gb": 0, **defaults, **names})
        run_id = uuid4()
        return Producer(
            settings,
            source,
            kind=kind,
            run_id=run_id,
            **self.options(settings, kind, run_id),
            **options,
        )

    def simulated(self, clock: FakeClock, **options: Any) -> Producer:
        """A run of the simulated fleet by a clock that goes on only while the run waits."""
        self.topic.clock, self.topic.sleep = clock, clock.sleep
        made = self.producer(clock=clock, **options)
        begin = datetime(2026, 11, 22, 16, tzinfo=UTC)
        made._publisher._source = producer.simulated(made._settings, lambda: begin + timedelta(seconds=clock.passed))
        return made

    @contextmanager
    def running(self, **options: Any) -> Iterator[Producer]:
        """A run in a thread of its own, stopped at the end."""
        made = self.producer(**options)
        thread = threading.Thread(target=made.run)
        thread.start()
        try:
            yield made
        finally:
            made.stop.set()
            thread.join(20)
            assert not thread.is_alive()

    def get(self, path: str) -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=5)

    def rows(self, run_id: UUID) -> dict[int, dict[str, Any]]:
        return {number: row for (run, number), row in self.server.rows.items() if run == run_id}

    def check(self, report: RunReport) -> None:
        """The report, the ledger and the topic say the same, whatever happened."""
        rows = self.rows(report.run_id)
        for what in ("acknowledged", "failed", "unknown"):
            assert sum(row[what] for row in rows.values()) == getattr(report, what)
        assert {row["state"] for row in rows.values()} == {report.state}
        written = {number: row["offsets"] for number, row in rows.items() if row["offsets"]}
        assert written == {
            number: {offset for start, end in ranges for offset in range(start, end)}
            for number, ranges in report.offsets.items()
        }
        assert report.acknowledged == sum(len(offsets) for offsets in written.values())
        for number, offsets in written.items():
            assert offsets <= set(range(len(self.topic.log[number])))
        assert self.server.holder is None
        assert all(session.closed for session in self.server.sessions)
        assert all(client.closed for client in self.topic.clients)


@pytest.fixture
def world() -> World:
    return World()


def messages(count: int, first: int = 0) -> list[Message]:
    found = []
    for n in range(first, first + count):
        key = json.dumps({"device_id": str(UUID(int=n)), "published_at": "2026-11-22T16:00:00Z", "metric_name": 0})
        found.append((key.encode(), b"value"))
    return found


# --- How a run ends ----------------------------------------------------------------------------------------------


def test_a_simulated_run_ends_after_its_time_and_everything_is_written_down(world: World) -> None:
    clock = FakeClock()
    made = world.simulated(clock, producer_run_seconds=7, producer_publish_interval=100)
    report = made.run()
    assert 7 <= clock.passed <= 7.1
    assert report.seconds == clock.passed
    assert report is made.report
    assert report.clean
    assert report.state == "finished"
    assert 70 * 50 <= report.acknowledged == len(world.topic.stored) <= 71 * 60
    assert len(set(world.topic.stored)) == report.acknowledged
    world.check(report)
    assert "finished after" in report.summary()
    assert f"{report.acknowledged:,} acknowledged" in report.summary()


def test_a_replay_ends_with_its_source_and_leaves_port_and_lock_alone(world: World) -> None:
    world.server.holder = "the simulated producer"
    made = world.producer([messages(500), messages(100, 500)], "replay")
    report = made.run()
    assert (report.source, report.state, report.acknowledged, report.clean) == ("replay", "finished", 600, True)
    assert world.server.holder == "the simulated producer"
    world.server.holder = None
    world.check(report)
    assert {row["source"] for row in world.rows(report.run_id).values()} == {"replay"}


def test_a_stop_ends_it_clean(world: World) -> None:
    with world.running() as made:
        assert until(lambda: len(world.topic.stored) > 300)
    assert made.report.state == "stopped"
    assert made.report.clean
    world.check(made.report)


def test_unacknowledged_messages_are_not_clean(world: World) -> None:
    world.topic.errors = {messages(10)[3][0]: KafkaError(KafkaError._MSG_TIMED_OUT, "timed out")}
    report = world.producer([messages(10)], "replay").run()
    assert (report.acknowledged, report.unknown, report.clean) == (9, 1, False)
    assert "1 unknown; first error _MSG_TIMED_OUT: timed out" in report.summary()
    world.check(report)


def test_a_ledger_that_cannot_be_written_is_not_clean(world: World) -> None:
    def source() -> Iterator[list[Message]]:
        yield messages(10)
        world.server.down = True

    report = world.producer(source(), "replay").run()
    assert (report.acknowledged, report.failed, report.unknown) == (10, 0, 0)
    assert not report.clean
    assert "the ledger lacks these counts: PostgreSQL at fake cannot be reached" in report.summary()


def test_postgres_may_restart_under_a_run(world: World) -> None:
    with world.running() as made:
        assert until(lambda: len(world.topic.stored) > 200)
        world.server.restart()
        world.server.down = True
        before = len(world.topic.stored)
        assert until(lambda: len(world.topic.stored) > before + 500)  # publishing goes on
        world.server.down = False
        assert until(lambda: world.server.holder is not None)
    assert made.report.clean
    world.check(made.report)


def test_another_producer_is_refused_before_anything_is_published(world: World) -> None:
    world.server.holder = "producer run 1"
    made = world.producer()
    with pytest.raises(BusyError, match="another producer is running"):
        made.run()
    assert made.report.state == "failed"
    assert world.topic.clients == []
    assert world.rows(made.run_id) == {}


def test_losing_the_lock_ends_the_run_with_the_reason(world: World) -> None:
    made = world.producer()
    thread_error: list[BaseException] = []

    def run() -> None:
        try:
            made.run()
        except BusyError as error:
            thread_error.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert until(lambda: len(world.topic.stored) > 100)
    world.server.restart()
    world.server.holder = "somebody else"
    thread.join(10)
    assert len(thread_error) == 1
    world.server.holder = None
    assert made.report.state == "failed"
    world.check(made.report)


def test_a_busy_port_gives_the_lock_back(world: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", world.port))
        taken.listen()
        with pytest.raises(BusyError, match="PRODUCER_PORT"):
            world.producer().run()
    assert world.server.holder is None
    assert world.topic.clients == []


def test_a_broker_that_never_answers_ends_the_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "START_SECONDS", 0.2)
    world.topic.reachable = False
    made = world.producer()
    with pytest.raises(ServiceError, match="KAFKA_PORT"):
        made.run()
    world.check(made.report)
    assert world.rows(made.run_id)[NO_PARTITION]["state"] == "failed"


def test_an_error_says_what_was_acknowledged_before_it(world: World) -> None:
    def source() -> Iterator[list[Message]]:
        yield messages(10)
        raise RecordError("bad_value", "a.csv:12: 'x' is not a number")

    settings, run_id = Settings(disk_free_limit_gb=0), uuid4()
    options = world.options(settings, "replay", run_id)
    with pytest.raises(RecordError, match=r"bad_value: a\.csv:12: 'x' is not a number \(run .*: 10 acknowledged"):
        run_producer(settings, source(), kind="replay", run_id=run_id, lag=lambda: 0, topic=None, **options)
    world.topic.partitions = 0
    with pytest.raises(ServiceError, match=r"does not exist.*provision`$"):
        run_producer(
            settings, [], kind="replay", lag=lambda: 0, topic=None, **world.options(settings, "replay", run_id)
        )


# --- Interrupts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "state"), [(Interrupted, "stopped"), (KeyboardInterrupt, "stopped"), (OSError, "failed")]
)
def test_what_is_raised_in_the_callers_thread_ends_the_run_in_order(
    world: World, error: type[BaseException], state: str
) -> None:
    def progress(snapshot: Snapshot) -> None:
        if snapshot.acknowledged:
            raise error

    world.topic.latency = 0.05
    made = world.producer(on_progress=progress)
    with pytest.raises(error):
        made.run()
    assert made.report.state == state
    assert made.report.clean
    assert made.report.acknowledged > 0
    world.check(made.report)


def test_an_interrupt_at_any_instruction_loses_no_report(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that raises, as Dagster's does, at random moments of many runs, and again while they end."""
    # In a callback of the garbage collector Python drops what a handler raises; the next signal comes soon.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)

    def handler(_number: int, _frame: Any) -> None:
        raise Interrupted

    chance = random.Random(7)
    former = signal.signal(signal.SIGALRM, handler)
    world.topic.latency = 0.001
    try:
        for _ in range(15):
            made = world.producer(producer_publish_interval=0)
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.005, 0.15), 0.06)
            try:
                with pytest.raises(Interrupted):
                    made.run()
            except Interrupted:  # a second one, on the way out of `run`
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for thread in threading.enumerate():
                if thread.name == "producer":
                    thread.join(10)
            if world.rows(made.run_id):  # else it came before the run had begun
                assert made.report.clean
                world.check(made.report)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert world.topic.stored


def test_all_kafka_work_is_done_outside_of_the_callers_thread(world: World) -> None:
    world.producer([messages(10)], "replay").run()
    assert threading.get_ident() not in world.topic.clients[0].threads


def test_signal_handlers_are_left_alone(world: World) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen = []

    def look(_: Snapshot) -> None:
        seen.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
        made.stop.set()

    made = world.producer(on_progress=look)
    made.run()
    assert seen
    assert all(found == handlers for found in seen)


def test_a_signal_as_the_thread_starts_leaves_none_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handler runs in the very call that holds signals back."""

    mask = signal.pthread_sigmask

    def blocks(how: int, signals: Iterable[int]) -> set[int]:
        before = mask(how, signals)
        if how == signal.SIG_BLOCK and signals:
            raise Interrupted
        return before

    before = mask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(signal, "pthread_sigmask", blocks)
    try:
        with pytest.raises(Interrupted):
            producer._start_undisturbed(threading.Thread())
        assert mask(signal.SIG_BLOCK, ()) == before
    finally:
        mask(signal.SIG_SETMASK, before)


def test_progress_is_told_again_and_again(world: World) -> None:
    seen: list[Snapshot] = []

    def progress(snapshot: Snapshot) -> None:
        seen.append(snapshot)
        if len(seen) == 4:
            made.stop.set()

    made = world.producer(on_progress=progress)
    made.run()
    assert len(seen) >= 4
    assert all(later.seconds - former.seconds > 0.08 for former, later in itertools.pairwise(seen))
    assert seen[0].state in ("starting", "running")
    assert seen[0].acknowledged < seen[-1].acknowledged


# --- Settings that are seen from outside ------------------------------------------------------------------------


@pytest.mark.parametrize(("metrics", "devices"), [((5, 5), (1, 1)), ((30, 40), (3, 4)), ((250, 250), (7, 7))])
def test_metrics_and_devices_of_a_round(world: World, metrics: tuple[int, int], devices: tuple[int, int]) -> None:
    names: dict[str, Any] = {
        "producer_min_metrics": metrics[0],
        "producer_max_metrics": metrics[1],
        "producer_min_devices": devices[0],
        "producer_max_devices": devices[1],
        "kafka_batch_size": 250,  # a round is one batch
        "producer_run_seconds": 1,
        "producer_publish_interval": 20,
    }
    report = world.simulated(FakeClock(), **names).run()
    batches = world.topic.clients[0].batches
    assert sum(batches) == report.acknowledged
    assert metrics[0] <= min(batches) <= max(batches) <= metrics[1]
    seen = {json.loads(key)["device_id"] for key in world.topic.stored}
    assert devices[0] <= len(seen) <= 50
    instants: dict[str, set[str]] = {}
    for key in world.topic.stored:
        instants.setdefault(json.loads(key)["published_at"], set()).add(json.loads(key)["device_id"])
    assert all(len(found) == 1 for found in instants.values())


def test_publish_interval_paces_a_simulated_run(world: World) -> None:
    clock = FakeClock()
    world.simulated(clock, producer_publish_interval=200, producer_run_seconds=1).run()
    times = [moment - clock.begun for moment in world.topic.clients[0].times]
    assert times[:5] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=0.01)
    assert len(times) <= 6


def test_seed_and_fleet_size_reach_the_fleet(world: World) -> None:
    world.simulated(
        FakeClock(),
        producer_seed=5,
        producer_fleet_size=2,
        producer_min_devices=1,
        producer_max_devices=2,
        producer_run_seconds=1,
    ).run()
    from metrics_pipeline.producer.generator import Fleet

    seen = {json.loads(key)["device_id"] for key in world.topic.stored}
    assert seen == {str(device.device_id) for device in Fleet(2, 5).devices}


def test_stall_seconds_decide_when_health_is_503(world: World) -> None:
    clock = FakeClock()
    with world.running(producer_stall_seconds=30, clock=clock) as made:
        assert until(lambda: made.snapshot().acknowledged)
        assert world.get("/health").status_code == 200
        world.topic.answering = False
        clock.sleep(1)  # another round is due
        assert until(lambda: made.snapshot().in_flight)
        clock.sleep(29)
        assert world.get("/health").status_code == 200
        clock.sleep(2)
        assert world.get("/health").status_code == 503
        assert "no acknowledgement" in world.get("/health").json()["reason"]
        world.topic.answering = True
        assert until(lambda: world.get("/health").status_code == 200)


def test_a_broker_that_never_answered_is_503_too(world: World) -> None:
    world.topic.reachable = False
    clock = FakeClock()
    with world.running(producer_stall_seconds=10, clock=clock):
        assert until(lambda: world.topic.clients)
        assert until(lambda: world.get("/health").status_code == 200)
        clock.sleep(11)
        assert world.get("/health").status_code == 503
        assert world.get("/status").json()["state"] == "starting"


def test_max_lag_pauses_the_run_which_stays_healthy_and_says_so(world: World) -> None:
    lag, clock = 0, FakeClock()
    with world.running(producer_max_lag=1000, producer_stall_seconds=30, lag=lambda: lag, clock=clock) as made:
        assert until(lambda: world.topic.stored)
        lag = 1000
        assert until(lambda: world.get("/status").json()["state"] == "paused")
        assert until(lambda: made.snapshot().in_flight == 0)
        before = len(world.topic.stored)
        clock.sleep(60)
        (client,) = world.topic.clients
        polls = client.polls
        assert until(lambda: client.polls > polls + 2)  # it has seen that another round would be due
        assert len(world.topic.stored) == before
        health = world.get("/health")
        assert health.status_code == 200
        assert "PRODUCER_MAX_LAG is 1,000" in health.json()["paused"]
        lag = 999
        assert until(lambda: world.get("/status").json()["paused"] is None)
        clock.sleep(1)
        assert until(lambda: len(world.topic.stored) > before)


def test_disk_free_limit_stops_a_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [100.0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0] * 2**30))

    def progress(_: Snapshot) -> None:
        free[0] = 4.9

    made = world.producer(disk_free_limit_gb=5, on_progress=progress)
    with pytest.raises(InstallError, match=r"4\.9 GiB are free .*DISK_FREE_LIMIT_GB=5"):
        made.run()
    assert made.report.state == "failed"
    assert made.report.acknowledged > 0
    assert made.report.unknown == 0
    world.check(made.report)
    with pytest.raises(InstallError):
        world.producer(disk_free_limit_gb=5).run()


def test_status_and_metrics_tell_of_the_run(world: World) -> None:
    with world.running() as made:
        assert until(lambda: made.snapshot().latency_seconds.p50 is not None)
        status = world.get("/status").json()
        assert status["run_id"] == str(made.run_id)
        assert status["state"] == "running"
        assert status["acknowledged"] > 0
        assert status["acknowledged_per_second"] > 0
        assert 0 <= status["latency_seconds"]["p50"] < 5
        assert 'metrics_producer_messages_total{outcome="acknowledged"}' in world.get("/metrics").text
    with pytest.raises(requests.ConnectionError):
        world.get("/health")


def test_a_replay_answers_only_when_asked_to(world: World) -> None:
    def unending() -> Iterator[list[Message]]:
        yield messages(1)
        while True:
            yield []

    with world.running(source=unending(), kind="replay"):
        assert until(lambda: world.topic.stored)
        with pytest.raises(requests.ConnectionError):
            world.get("/health")
    with world.running(source=unending(), kind="replay", serve=True):
        assert until(lambda: len(world.topic.clients) == 2)
        assert world.get("/health").status_code == 200


SETTING_TESTS = {
    "producer_queue_concurrency": "test_publisher: in flight",
    "kafka_batch_size": "test_publisher: in flight, batch size",
    "kafka_max_in_flight": "test_publisher: client settings",
    "producer_compression": "test_publisher: client settings",
    "producer_flush_seconds": "test_publisher: flush",
    "producer_publish_interval": "here, test_publisher: interval",
    "producer_min_metrics": "here, test_generator",
    "producer_max_metrics": "here, test_generator",
    "producer_min_devices": "here, test_generator",
    "producer_max_devices": "here, test_generator",
    "producer_fleet_size": "here, test_generator",
    "producer_seed": "here, test_generator",
    "producer_run_seconds": "here",
    "producer_stall_seconds": "here, test_health",
    "producer_max_lag": "here, test_guards",
}


def test_every_setting_of_the_producer_has_its_test() -> None:
    assert set(SETTING_TESTS) == set(ProducerSettings.model_fields)


@pytest.mark.parametrize("step", [timedelta(hours=-1), timedelta(hours=1)], ids=["back", "forward"])
def test_a_clock_that_is_set_neither_keeps_the_producer_waiting_nor_moves_its_readings(
    step: timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself a generator waits until the clock is where it was."""
    shift = timedelta()

    class Machine(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # of the class that it replaces
            return datetime.now(tz) + shift

    monkeypatch.setattr(producer, "datetime", Machine)
    rounds = producer.simulated(Settings(producer_min_metrics=6, producer_max_metrics=6, producer_max_devices=3))
    before = [next(rounds) for _ in range(3)]
    shift = step
    after: list[Message] = []

    def came() -> bool:
        after.extend(next(rounds))
        return bool(after)

    assert until(came), "it waits for the clock"
    keys = [json.loads(key) for batch in [*before, after] for key, _ in batch]
    moments = [datetime.fromisoformat(key["published_at"]) for key in keys]
    assert max(moments) - min(moments) < timedelta(minutes=1)
