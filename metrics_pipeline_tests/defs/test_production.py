"""One producer run at a time, launched again when it ends, observed, and ended well whatever happens."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import dagster as dg
import pytest

from metrics_pipeline import kafka
from metrics_pipeline.definitions import defs
from metrics_pipeline.defs import production
from metrics_pipeline.defs.resources import Pipeline
from metrics_pipeline.errors import BusyError, ServiceError
from metrics_pipeline.producer import ledger
from metrics_pipeline.producer.endpoints import Snapshot
from metrics_pipeline.producer.latency import Latency
from metrics_pipeline.producer.ledger import Holder
from metrics_pipeline.producer.run import RunReport
from metrics_pipeline.settings import CONNECTOR, Settings
from metrics_pipeline.sinks import active, connector, repair
from metrics_pipeline.sinks.active import NO_WORKER, Position
from metrics_pipeline.sinks.connector import SinkState, TaskState
from metrics_pipeline_tests.fake_connect import serving

RUNNING = SinkState("RUNNING", (TaskState(0, "RUNNING"),))


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


# --- The job -----------------------------------------------------------------------------------------------------


class FakeProducer:
    """Stands in for `Producer`: what it does is a function of the settings and of `on_progress`."""

    script: Callable[[FakeProducer], None]
    made: list[FakeProducer] = []  # noqa: RUF012  # one list for a test
    ending: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        settings: Settings,
        *,
        run_id: UUID,
        on_progress: Callable[[Snapshot], None],
        lag: Callable[[], int],
        topic: kafka.TopicWatch,
    ) -> None:
        del lag, topic
        self.settings = settings
        self.run_id = run_id
        self.on_progress = on_progress
        self.report = RunReport(run_id, "simulated", "failed")
        self.made.append(self)

    def run(self) -> RunReport:
        try:
            type(self).script(self)
        finally:
            figures: dict[str, Any] = {"state": "finished", "seconds": 2.0, "acknowledged": 100} | self.ending
            self.report = RunReport(self.run_id, "simulated", **figures)
        return self.report

    def progress(self, seconds: float = production.OBSERVE_SECONDS) -> None:
        """As if that much time had gone by."""
        FakeClock.now += seconds
        latency = Latency(p50=0.25, p99=None)
        self.on_progress(
            Snapshot(self.run_id, "running", 10.0, 90, 1, 2, 3, 45.0, latency, paused=None, stalled_seconds=0.0)
        )


class FakeClock:
    """`time` as production.py sees it; sleeping is free."""

    now = 0.0

    @classmethod
    def monotonic(cls) -> float:
        return cls.now

    @classmethod
    def sleep(cls, seconds: float) -> None:
        cls.now += seconds

    @staticmethod
    def time() -> float:
        return time.time()


@pytest.fixture
def producer(monkeypatch: pytest.MonkeyPatch) -> type[FakeProducer]:
    FakeProducer.made, FakeProducer.ending = [], {}
    FakeProducer.script = lambda _self: None
    FakeClock.now = 0.0
    monkeypatch.setattr(production, "Producer", FakeProducer)
    monkeypatch.setattr(production, "time", FakeClock)
    monkeypatch.setattr(active.LagMeter, "total", lambda _meter: 7)
    return FakeProducer


def produce(instance: dg.DagsterInstance, **config: Any) -> dg.ExecuteInProcessResult:
    job = defs.resolve_job_def("produce_metrics")
    return job.execute_in_process(
        instance=instance, raise_on_error=False, run_config={"ops": {"publish": {"config": config}}}
    )


def observations(instance: dg.DagsterInstance, run_id: str) -> list[dict[str, Any]]:
    """As they are stored."""
    found = []
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION):
        assert entry.dagster_event is not None
        observation = entry.dagster_event.asset_observation_data.asset_observation
        assert observation.asset_key == dg.AssetKey("metrics_topic")
        found.append({name: value.value for name, value in observation.metadata.items()})
    return found


def failure(result: dg.ExecuteInProcessResult) -> str:
    data = result.failure_data_for_node("publish")
    assert data is not None
    assert data.user_failure_data is not None, data.error
    return data.user_failure_data.description or ""


def test_a_run_observes_the_topic_every_ten_seconds_and_at_its_end(
    instance: dg.DagsterInstance, producer: type[FakeProducer]
) -> None:
    def script(self: FakeProducer) -> None:
        for _ in range(30):
            self.progress(1)

    producer.script = script
    result = produce(instance)
    assert result.success
    *during, last = observations(instance, result.run_id)
    assert during == 3 * [
        {
            "state": "running",
            "acknowledged": 90,
            "acknowledged_per_second": 45.0,
            "failed": 1,
            "unknown": 2,
            "latency_p50_seconds": 0.25,
            "lag": 7,
        }
    ]
    assert last == {
        "state": "finished",
        "acknowledged": 100,
        "acknowledged_per_second": 50.0,
        "failed": 0,
        "unknown": 0,
    }
    assert producer.made[0].run_id == UUID(result.run_id), "the ledger calls the run as Dagster does"


def test_config_is_the_settings_of_the_run(instance: dg.DagsterInstance, producer: type[FakeProducer]) -> None:
    assert produce(instance, producer_run_seconds=5, producer_compression="zstd", kafka_batch_size=10).success
    (made,) = producer.made
    assert (made.settings.producer_run_seconds, made.settings.producer_compression) == (5, "zstd")
    assert made.settings.kafka_batch_size == 10
    assert made.settings.producer_max_devices == 10


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"producer_min_metrics": 9000}, "PRODUCER_MIN_METRICS is 9000, above PRODUCER_MAX_METRICS (7500)"),
        ({"producer_compression": "gzip"}, "PRODUCER_COMPRESSION=gzip"),
        ({"kafka_max_in_flight": 6}, "KAFKA_MAX_IN_FLIGHT=6"),
    ],
)
def test_bad_config_is_one_line(
    instance: dg.DagsterInstance, producer: type[FakeProducer], config: dict[str, Any], says: str
) -> None:
    assert says in failure(produce(instance, **config))
    assert producer.made == []


def test_the_runs_time_limit_is_its_length_and_some_more(
    instance: dg.DagsterInstance, producer: type[FakeProducer]
) -> None:
    run = instance.get_run_by_id(produce(instance, producer_run_seconds=100, producer_flush_seconds=30).run_id)
    assert run is not None
    assert run.tags["dagster/max_runtime"] == "250"


def test_a_run_that_may_not_be_says_why_and_observes_nothing(
    instance: dg.DagsterInstance, producer: type[FakeProducer]
) -> None:
    def script(self: FakeProducer) -> None:
        raise BusyError("another producer is running")

    producer.script, producer.ending = script, {"acknowledged": 0, "state": "failed"}
    result = produce(instance)
    assert failure(result) == "another producer is running"
    assert observations(instance, result.run_id) == []


def test_a_run_that_was_not_acknowledged_in_full_fails(
    instance: dg.DagsterInstance, producer: type[FakeProducer]
) -> None:
    producer.ending = {"failed": 3}
    result = produce(instance)
    assert "3 failed" in failure(result)
    assert observations(instance, result.run_id)[-1]["failed"] == 3


def test_a_termination_goes_through_the_producer_and_cancels_the_run(
    instance: dg.DagsterInstance, producer: type[FakeProducer]
) -> None:
    """Dagster interrupts with a signal to the process; the run counts and observes before it is CANCELED."""

    def script(self: FakeProducer) -> None:
        instance.report_run_canceling(run())
        signal.raise_signal(signal.SIGINT)
        threading.Event().wait(5)

    def run() -> dg.DagsterRun:
        return instance.get_runs()[0]

    producer.script, producer.ending = script, {"state": "stopped"}
    job = defs.resolve_job_def("produce_metrics")
    with pytest.raises(dg.DagsterExecutionInterruptedError):
        job.execute_in_process(instance=instance)
    assert run().status == dg.DagsterRunStatus.CANCELED
    assert [seen["state"] for seen in observations(instance, run().run_id)] == ["stopped"]


def test_a_run_without_a_code_server_sees_by_itself_that_it_is_to_end(
    instance: dg.DagsterInstance, producer: type[FakeProducer]
) -> None:
    def script(self: FakeProducer) -> None:
        self.progress()
        instance.report_run_canceling(instance.get_runs()[0])
        self.progress()

    producer.script = script
    with pytest.raises(dg.DagsterExecutionInterruptedError):
        defs.resolve_job_def("produce_metrics").execute_in_process(instance=instance)
    assert instance.get_runs()[0].status == dg.DagsterRunStatus.CANCELED


def test_dagsters_storage_may_be_away_in_the_middle_of_a_run(
    instance: dg.DagsterInstance, producer: type[FakeProducer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(self: FakeProducer) -> None:
        self.progress()
        with monkeypatch.context() as away:
            for name in ("handle_new_event", "get_run_by_id", "report_engine_event"):
                away.setattr(dg.DagsterInstance, name, _away)
            self.progress()
            self.progress()
        self.progress()

    producer.script = script
    result = produce(instance)
    assert result.success
    assert len(observations(instance, result.run_id)) == 3


def _away(*_args: Any, **_kwargs: Any) -> None:
    raise OSError("the database system is starting up")


@pytest.mark.parametrize("seconds", [10, 1000])
def test_a_run_that_is_over_waits_for_dagsters_storage_within_a_bound(
    producer: type[FakeProducer], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    asked: list[float] = []

    class Instance:
        def get_run_by_id(self, run_id: str) -> None:
            asked.append(FakeClock.now)
            if FakeClock.now < seconds:
                raise OSError("the database system is starting up")

    class Context:
        instance = Instance()
        run_id = "r"

    with pytest.raises(ZeroDivisionError), production.storage_at_the_end(Context()):  # type: ignore[arg-type]
        raise ZeroDivisionError  # however the body ended
    assert asked[-1] == pytest.approx(min(seconds, production.STORAGE_SECONDS), abs=1)


# --- The sensor that launches it ---------------------------------------------------------------------------------


@dataclass
class World:
    """What the sensor looks at."""

    instance: dg.DagsterInstance
    lock: Holder | None = None
    sink: SinkState = RUNNING
    position: Position = field(default_factory=Position)
    not_provisioned: str | None = None
    postgres: str = ""
    cursor: str = ""
    now: float = field(default_factory=time.time)

    def holder(self, settings: Settings) -> Holder | None:
        if self.postgres:
            raise ServiceError(self.postgres)
        return self.lock

    def tick(self, seconds: float = 5) -> str:
        """What a tick does some seconds later: `launch`, or why not."""
        self.now += seconds
        resources = {"pipeline": Pipeline()}
        with dg.build_sensor_context(self.instance, cursor=self.cursor, resources=resources) as context:
            result = production.producer_sensor(context)
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor or ""
        if result.run_requests:
            (request,) = result.run_requests
            assert request.run_key is None, "Dagster would never launch the same key again"
            return "launch"
        assert result.skip_reason is not None
        return str(result.skip_reason.skip_message)

    def run(self, status: dg.DagsterRunStatus) -> dg.DagsterRun:
        job = defs.resolve_job_def("produce_metrics")
        return self.instance.create_run_for_job(job, status=status)


@pytest.fixture
def world(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    world = World(instance)
    monkeypatch.setattr(ledger, "holder", world.holder)
    monkeypatch.setattr(connector, "sink_state", lambda _settings: world.sink)
    monkeypatch.setattr(active, "position", lambda _settings: world.position)
    monkeypatch.setattr(production, "not_provisioned", lambda _instance: world.not_provisioned)

    class Clock:
        @staticmethod
        def time() -> float:
            return world.now

    monkeypatch.setattr(production, "time", Clock)
    monkeypatch.setenv("PIPELINE_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DISK_FREE_LIMIT_GB", "0")
    return world


def test_it_launches_when_nothing_speaks_against_it(world: World) -> None:
    assert world.tick() == "launch"


def test_it_waits_for_provisioning(world: World) -> None:
    world.not_provisioned = "metrics_topic not provisioned yet"
    assert world.tick() == "metrics_topic not provisioned yet"


def test_it_waits_for_the_sink(world: World) -> None:
    world.sink = SinkState("RUNNING", (TaskState(0, "FAILED", "x.Y: broken"),))
    assert world.tick() == "task 0 is FAILED: x.Y: broken"
    world.sink = SinkState("MISSING")
    assert "does not exist" in world.tick()


def test_it_waits_for_the_copy_sink_when_that_is_the_active_one(world: World) -> None:
    world.sink = SinkState("STOPPED")
    world.position = Position("copy", {}, 0)
    assert world.tick() == NO_WORKER
    world.position = Position("copy", {}, 2)
    assert world.tick() == "launch"


def test_it_says_when_the_disk_is_full(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK_FREE_LIMIT_GB", "1e9")
    assert "below DISK_FREE_LIMIT_GB" in world.tick()


def test_it_says_when_postgresql_is_away(world: World) -> None:
    world.postgres = "PostgreSQL at x cannot be reached"
    assert world.tick() == "PostgreSQL at x cannot be reached"


def test_it_says_when_a_setting_is_wrong(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_PORT", "none")
    assert world.tick().startswith("KAFKA_PORT=none")


def test_it_leaves_a_producer_alone_that_somebody_else_started(world: World) -> None:
    world.lock = Holder("producer run 1234", datetime.now(UTC))
    assert world.tick() == "a producer that Dagster did not start is running (producer run 1234)"


@pytest.mark.parametrize("status", ["NOT_STARTED", "STARTING", "STARTED", "CANCELING"])
def test_there_are_never_two_runs(world: World, status: str) -> None:
    run = world.run(dg.DagsterRunStatus[status])
    world.lock = Holder(f"producer run {run.run_id}", datetime.now(UTC)) if status == "STARTED" else None
    for _ in range(30):
        assert world.tick() == f"run {run.run_id[:8]} is {status}"


@pytest.mark.parametrize("status", ["SUCCESS", "CANCELED"])
def test_the_next_run_follows_at_once(world: World, status: str) -> None:
    world.run(dg.DagsterRunStatus[status])
    assert world.tick() == "launch"


def test_a_run_whose_process_is_gone_is_ended_and_followed(world: World) -> None:
    run = world.run(dg.DagsterRunStatus.STARTED)
    world.lock = Holder(f"producer run {uuid4()}", datetime.now(UTC))
    before = world.now
    while "its process is gone" not in (said := world.tick()):
        assert said == f"run {run.run_id[:8]} does not hold the producer's lock"
    assert production.GONE_SECONDS <= world.now - before <= production.GONE_SECONDS + 10
    ended = world.instance.get_run_by_id(run.run_id)
    assert ended is not None
    assert ended.status == dg.DagsterRunStatus.FAILURE
    world.lock = None
    assert world.tick(120) == "launch"


def test_a_clock_that_is_set_ends_no_run_and_keeps_none_that_lost_its_process(world: World) -> None:
    """One step of the clock counts for a tick, whichever way it goes."""
    run = world.run(dg.DagsterRunStatus.STARTED)
    assert "does not hold" in world.tick()
    assert "does not hold" in world.tick(86_400), "ended by a step forward"
    assert "does not hold" in world.tick(-2 * 86_400)
    ticks = 0
    while "its process is gone" not in world.tick():
        ticks += 1
        assert ticks <= production.GONE_SECONDS / 5, "kept by a step back"
    ended = world.instance.get_run_by_id(run.run_id)
    assert ended is not None
    assert ended.status == dg.DagsterRunStatus.FAILURE


def test_a_clock_that_is_set_back_does_not_keep_the_next_run_waiting(world: World) -> None:
    run = world.run(dg.DagsterRunStatus.STARTED)
    world.instance.report_run_failed(run)
    assert "the last runs failed" in world.tick(0)
    waited = 0.0
    world.now -= 86_400
    while world.tick() != "launch":
        waited += 5
        assert waited <= production.LONGEST_PAUSE_SECONDS + 5, "it waits for the clock"


@pytest.mark.parametrize(("ahead", "excused"), [(-3, True), (2, True), (3600, False), (60, False)])
def test_a_start_in_the_future_excuses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, ahead: float, excused: bool
) -> None:
    """The clock was set back: a check that lets a start just now pass would be green until the clock is there again."""
    world.lock = Holder("producer run x", datetime.fromtimestamp(world.now + ahead, UTC))
    since = production.producing(world.instance, Settings.load())
    assert since is not None
    assert (0 <= since < 60) is excused


@pytest.mark.parametrize("step", [86_400, -86_400])
def test_the_bound_of_a_run_goes_with_the_clock(
    instance: dg.DagsterInstance, producer: type[FakeProducer], monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    """Dagster ends a run by the machine's clock."""
    wall = {"shift": 0.0}
    monkeypatch.setattr(FakeClock, "time", staticmethod(lambda: FakeClock.now + wall["shift"]))

    def script(self: FakeProducer) -> None:
        self.progress()
        wall["shift"] = step
        self.progress()

    producer.script = script
    run = instance.get_run_by_id(produce(instance, producer_run_seconds=100, producer_flush_seconds=30).run_id)
    assert run is not None
    assert int(run.tags["dagster/max_runtime"]) == pytest.approx(max(1, 250 + step), abs=2)


def test_a_lock_that_was_lost_for_a_moment_ends_nothing(world: World) -> None:
    """PostgreSQL restarts take the lock with them; the producer takes it again."""
    run = world.run(dg.DagsterRunStatus.STARTED)
    for _ in range(20):
        world.lock = None
        assert "does not hold" in world.tick(30)
        world.lock = Holder(f"producer run {run.run_id}", datetime.now(UTC))
        assert "is STARTED" in world.tick()


def test_runs_that_fail_one_after_the_other_come_at_growing_distances(world: World) -> None:
    pauses = []
    for _ in range(6):
        run = world.run(dg.DagsterRunStatus.STARTED)
        world.instance.report_run_failed(run)
        record = world.instance.get_run_record_by_id(run.run_id)
        assert record is not None
        assert record.end_time is not None
        world.now = record.end_time
        while world.tick(1) != "launch":
            pass
        pauses.append(round(world.now - record.end_time))
    assert pauses == [5, 10, 20, 40, 60, 60]


# --- The sensor that repairs -------------------------------------------------------------------------------------


def test_the_repair_sensor_restarts_records_and_remembers(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIPELINE_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(
        repair.SinkRepair.__init__,
        "__kwdefaults__",
        {
            **repair.SinkRepair.__init__.__kwdefaults__,  # type: ignore[dict-item]
            "offsets": lambda _settings: repair.Offsets({0: 5}, {0: 1}),
            "database": lambda _settings: None,
        },
    )
    with serving() as fake:
        monkeypatch.setenv("CONNECT_URL", fake.url)
        connector.ConnectClient(fake.url).put(CONNECTOR, {})
        fake.fail(CONNECTOR, "x.Y: broken", 1)
        with dg.build_sensor_context(instance, resources={"pipeline": Pipeline()}) as context:
            result = production.sink_repair_sensor(context)
    assert isinstance(result, dg.SensorResult)
    (event,) = result.asset_events
    assert isinstance(event, dg.AssetObservation)
    assert event.asset_key == dg.AssetKey("metrics_sink_connector")
    assert event.metadata["reason"].value == "task 1 is FAILED: x.Y: broken"
    assert json.loads(result.cursor or "")["restarts"] == 1
    (line,) = (tmp_path / "repairs.jsonl").read_text().splitlines()
    assert json.loads(line)["by"] == "sensor"


@pytest.mark.usefixtures("without_backoff")
def test_the_repair_sensor_says_when_connect_is_away(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONNECT_URL", "http://127.0.0.1:1")
    with dg.build_sensor_context(instance, resources={"pipeline": Pipeline()}) as context:
        result = production.sink_repair_sensor(context)
    assert isinstance(result, dg.SensorResult)
    assert result.skip_reason is not None
    assert "cannot be reached" in str(result.skip_reason.skip_message)


# --- Is a producer meant to run? ---------------------------------------------------------------------------------


def test_producing_since(world: World) -> None:
    assert production.producing(world.instance, Settings()) is None
    world.lock = Holder("producer run x", datetime.fromtimestamp(world.now - 20, UTC))
    assert production.producing(world.instance, Settings()) == pytest.approx(20)
    run = world.run(dg.DagsterRunStatus.NOT_STARTED)
    world.instance.report_dagster_event(
        dg.DagsterEvent(dg.DagsterEventType.RUN_START.value, "produce_metrics"), run.run_id
    )
    record = world.instance.get_run_record_by_id(run.run_id)
    assert record is not None
    assert record.start_time is not None
    world.now, world.lock = record.start_time + 90, None
    assert production.producing(world.instance, Settings()) == pytest.approx(90)
