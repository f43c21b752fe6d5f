"""The topic's name stands for another log, or its partitions grow: both sinks store all of the present one, the newest value stays.

Services of their own: what was stored before is of logs that are gone, which nothing can verify any more.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from confluent_kafka.admin import AdminClient, NewPartitions

from metrics_pipeline import kafka, postgres, topic_log
from metrics_pipeline.errors import DriftError, PipelineError
from metrics_pipeline.local import account, environment
from metrics_pipeline.local.stack import Stack, build
from metrics_pipeline.metric import Reading, encode
from metrics_pipeline.partitioner import partition
from metrics_pipeline.producer.run import run_producer
from metrics_pipeline.settings import TOPIC, Settings
from metrics_pipeline.sinks import active, repair
from metrics_pipeline.verification.verify import VerifyReport, verify
from metrics_pipeline_tests.patience import deadline, patience

pytestmark = pytest.mark.integration

START = datetime(2026, 3, 1, tzinfo=UTC)
REFRESH_SECONDS = 3
SINKS = pytest.mark.parametrize("sink", ["connect", "copy"])


def until(condition: Callable[[], object], seconds: float = 90, shown: Callable[[], object] = lambda: "") -> None:
    give_up = deadline(seconds)
    while not condition():
        assert time.monotonic() < give_up, shown()
        time.sleep(0.1)


@dataclass
class Place:
    """PostgreSQL, broker and Connect, the COPY sink when it is asked for, and the repair as the keeper runs it."""

    settings: Settings
    services: Stack
    variables: dict[str, str]
    events: list[repair.Restart] = field(default_factory=list)
    copying: subprocess.Popen[bytes] | None = None

    def choose(self, sink: str) -> Settings:
        """Let a sink be the active one, and run."""
        self.run(sink)
        settings = self.settings.model_copy(update={"sink": sink})
        active.ensure_sink(settings)
        return settings

    def run(self, sink: str) -> None:
        """Start a sink's processes, if they do not run."""
        if sink == "connect":
            connect = self.services.service("connect")
            if not connect.alive():
                connect.start()
                connect.wait_until_healthy()
        elif self.copying is None:
            with (self.settings.data_dir / "logs" / "test-sink.log").open("ab") as log:
                self.copying = subprocess.Popen(
                    [sys.executable, "-m", "metrics_pipeline", "sink", "--workers", "2"],
                    env=self.variables,
                    cwd=self.settings.data_dir,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )

    def halt(self, sink: str) -> None:
        """End a sink's processes."""
        if sink == "connect":
            self.services.service("connect").stop()
        elif self.copying is not None:
            self.copying.terminate()
            self.copying.wait(patience(60))
            self.copying = None

    def repair(self, stop: threading.Event) -> None:
        """What the keeper does every three seconds."""
        repairer = repair.SinkRepair(self.settings)
        while not stop.wait(0.5):
            tick = repairer.tick()
            self.events += tick.events
            repair.record(self.settings, tick.events, "test")

    def publish(self, readings: list[Reading]) -> None:
        """Have readings acknowledged, by a run of ours."""
        report = run_producer(self.settings, [[encode(reading) for reading in readings]], kind="replay", lag=lambda: 0)
        assert report.clean, report.summary()
        assert report.acknowledged == len(readings)

    def await_stored(self) -> None:
        """Until the active sink has stored all that the topic holds."""

        def stored() -> bool:
            with suppress(PipelineError):  # the topic or its leaders may be on their way
                return active.lag(self.settings).total == 0
            return False

        until(stored, shown=self.words)

    def words(self) -> str:
        """Where the sink is, and the end of what the COPY sink and the repair wrote."""
        settings = self.settings
        log = settings.data_dir / "logs" / "test-sink.log"
        said = log.read_text()[-4000:] if log.exists() else ""
        return (
            f"{active.position(settings)}, {kafka.topic_log(settings)}, {active.lag(settings)}, {self.events}\n{said}"
        )

    def is_noted(self) -> bool:
        """Whether the database knows the log that the topic's name stands for now."""
        with postgres.connect(self.settings, "metrics_reader") as connection:
            return topic_log.present(connection) == kafka.topic_log(self.settings).id

    def await_settled(self) -> None:
        """Until all growths are settled, and what was read again is stored."""

        def settled() -> bool:
            with postgres.connect(self.settings, "metrics_reader") as connection:
                return connection.execute(
                    "SELECT count(*) > 0 AND bool_and(settled_at IS NOT NULL) FROM topic_growths WHERE log_id = %s",
                    [kafka.topic_log(self.settings).id],
                ).fetchone() == (True,)

        until(settled)
        self.await_stored()

    def values(self, device: UUID) -> dict[datetime, float]:
        """What is stored of a device."""
        with postgres.connect(self.settings, "metrics_reader") as connection:
            return dict(
                connection.execute("SELECT published_at, value FROM metrics WHERE device_id = %s", [device]).fetchall()
            )


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="metrics-pipeline-identity-")).resolve()
    own = environment.isolated(folder) | {"PIPELINE_MEMORY_GB": "4", "TOPIC_REFRESH_SECONDS": str(REFRESH_SECONDS)}
    stop = threading.Event()
    with environment.replaced(own):
        environment.write_secrets()
        settings = Settings.load()
        services = build(settings, with_dagster=False, quiet=True)
    try:
        with environment.replaced(own):
            services.start(lambda _line: None, provision=False)
            postgres.migrate(settings)
            kafka.ensure_topic(settings)
            place = Place(settings, services, dict(environment.for_python(settings)))
        repairer = threading.Thread(target=place.repair, args=[stop])
        repairer.start()
        yield place
        stop.set()
        repairer.join(patience(60))
        place.halt("copy")
    finally:
        stop.set()
        services.stop(lambda _line: None)
        shutil.rmtree(account.postgres_home(settings.data_dir, account.unprivileged()), ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def readings(number: int, value: float = 1.0, device: UUID | None = None) -> list[Reading]:
    device = device or uuid4()
    return [
        Reading(device, START + timedelta(milliseconds=at), 10, value, ["of:test-identity"]) for at in range(number)
    ]


def expected(published: list[Reading]) -> dict[datetime, float]:
    return {reading.published_at: reading.value for reading in published}


def make_anew(settings: Settings) -> None:
    """The topic is deleted and made again."""
    former = kafka.topic_log(settings).id
    admin = AdminClient(kafka.client_config(settings))
    for future in admin.delete_topics([TOPIC]).values():
        future.result(patience(10))

    def made() -> bool:
        with suppress(PipelineError):
            kafka.ensure_topic(settings)
            return kafka.topic_log(settings).id != former
        return False

    until(made, 30)


def all_is_there(report: VerifyReport, published: list[Reading]) -> None:
    assert report.clean, report.lines()
    assert (report.records, report.counts.compared) == (len(published), len(published))
    assert (report.unclaimed, report.growing) == (0, [])


@SINKS
def test_a_topic_made_anew_while_the_sink_is_down(place: Place, sink: str) -> None:
    settings = place.choose(sink)
    make_anew(settings)
    former = readings(3_000)
    place.publish(former)
    place.await_stored()
    gone = kafka.topic_log(settings).id
    place.halt(sink)
    make_anew(settings)
    published = readings(8_000)
    place.publish(published)
    assert active.lag(settings).total == len(published), "offsets of the former log were taken for this one's"
    place.run(sink)
    place.await_stored()
    report = verify(settings)
    assert place.values(published[0].device_id) == expected(published)
    all_is_there(report, published)
    assert report.former[gone] == len(former)
    assert report.counts.unverifiable >= len(former), "rows of the former log are called unexpected"
    assert active.sink_drift(settings) == []


@SINKS
def test_a_topic_made_anew_while_the_sink_runs(place: Place, sink: str) -> None:
    settings = place.choose(sink)
    make_anew(settings)
    place.publish(readings(3_000))
    place.await_stored()
    del place.events[:]
    make_anew(settings)
    published = readings(8_000)
    place.publish(published)
    place.await_stored()
    assert place.values(published[0].device_id) == expected(published)
    all_is_there(verify(settings), published)
    log = kafka.topic_log(settings).id
    until(lambda: [event for event in place.events if f"is another one: log {log}, before " in event.reason], 30)
    noted = [json.loads(line) for line in (settings.data_dir / "repairs.jsonl").read_text().splitlines()]
    assert [one for one in noted if log in one["reason"]]


@SINKS
def test_another_cluster_under_the_same_address(place: Place, sink: str) -> None:
    settings = place.choose(sink)
    make_anew(settings)
    place.publish(readings(3_000))
    place.await_stored()
    broker = place.services.service("broker")
    place.halt("connect")  # it keeps its own configuration in the cluster, and knows it by its id
    broker.stop()
    shutil.rmtree(settings.data_dir / "kafka")
    broker.start()
    broker.wait_until_healthy()
    kafka.ensure_topic(settings)
    published = readings(8_000)
    place.publish(published)
    if sink == "connect":
        place.choose(sink)
    place.await_stored()
    assert place.values(published[0].device_id) == expected(published)
    all_is_there(verify(settings), published)
    place.run("connect")


@pytest.mark.parametrize(
    ("sink", "meanwhile"),
    [
        ("copy", "runs"),
        pytest.param("copy", "is down", marks=pytest.mark.long),
        pytest.param("connect", "runs", marks=pytest.mark.long),
    ],
)
def test_a_cluster_that_is_restored_from_a_snapshot(place: Place, sink: str, meanwhile: str) -> None:
    """It has its id, the topic its id, and the offsets are taken by other records before the sink comes back."""
    settings = place.choose(sink)
    make_anew(settings)
    place.publish(readings(3_000))
    place.await_stored()
    broker, kept = place.services.service("broker"), settings.data_dir / "snapshot"
    broker.stop()
    shutil.copytree(settings.data_dir / "kafka", kept, dirs_exist_ok=True)
    broker.start()
    broker.wait_until_healthy()
    log = kafka.topic_log(settings).id
    place.publish(readings(4_000))
    place.await_stored()
    if meanwhile == "is down":
        place.halt(sink)
    broker.stop()
    shutil.rmtree(settings.data_dir / "kafka")
    kept.rename(settings.data_dir / "kafka")
    broker.start()
    broker.wait_until_healthy()
    assert kafka.topic_log(settings).id == log
    published = readings(12_000)
    place.publish(published)
    place.run(sink)
    until(lambda: place.values(published[0].device_id) == expected(published), shown=place.words)
    place.await_stored()
    report = verify(settings)
    # What the snapshot does not have was acknowledged all the same: that is no fault of the sink, and is told.
    assert (report.records, report.counts.lost, report.counts.different) == (15_000, 0, 0)
    assert report.counts.unexpected == 4_000
    assert any("both acknowledged offsets" in line for line in report.lines())


@pytest.mark.parametrize(
    ("sink", "count"),
    [("connect", 12), ("copy", 12), ("copy", 8), pytest.param("connect", 8, marks=pytest.mark.long)],
)
def test_partitions_that_grow_while_the_sink_lags(place: Place, sink: str, count: int) -> None:
    """In the partition that a key had the older value waits behind many records; in its new one the newer value is the first.

    Eight is no multiple of six: `provision` refuses it, somebody else did it, and keys move between old partitions, too.
    """
    settings = place.choose(sink)
    make_anew(settings)
    place.halt(sink)
    # Also while no sink runs: otherwise nobody could tell later how many partitions there were.
    until(place.is_noted, 30)
    filler, device = readings(60_000), uuid4()
    place.publish(filler)
    place.publish(readings(2_000, 1.0, device))
    more = settings.model_copy(update={"topic_partitions_metrics": count})
    if count % 6:
        with pytest.raises(DriftError, match="multiple only"):
            kafka.ensure_topic(more, grow=True)
        admin = AdminClient(kafka.client_config(settings))
        admin.create_partitions([NewPartitions(TOPIC, count)])[TOPIC].result(patience(10))
        until(lambda: kafka.topic_log(settings).partitions == count, 30)
    else:
        assert f"partitions: 6 → {count}" in kafka.ensure_topic(more, grow=True).details
    newest = readings(2_000, 2.0, device)
    place.publish(newest)
    homes = [(partition(encode(one)[0], 6), partition(encode(one)[0], count)) for one in newest]
    assert len([new for old, new in homes if new != old and new >= 6]) > 300
    assert (len([new for old, new in homes if new != old and new < 6]) > 300) is bool(count % 6)
    place.run(sink)
    place.await_stored()
    place.await_settled()
    assert place.values(device) == expected(newest)
    report = verify(settings)
    assert report.clean, report.lines()
    assert report.counts.compared == len(filler) + len(newest)
    assert report.growing == []
