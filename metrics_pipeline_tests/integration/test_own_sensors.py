"""The programs of docs/own-sensors.md, each as a process of its own as it is printed, on the real stack and by both sinks.

The stack is shared with other tests, so what `verify` says is compared with what it said before.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from iotcore import Broker
from paho.mqtt.enums import CallbackAPIVersion

from metrics_pipeline import kafka
from metrics_pipeline.local import jars
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.metric import MetricName, Reading, decode
from metrics_pipeline.partitioner import partition
from metrics_pipeline.replay.cells import device_id
from metrics_pipeline.settings import TOPIC
from metrics_pipeline.topic import TopicReader
from metrics_pipeline.verification.verify import VerifyReport, verify
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.documents import fences, listings, page
from metrics_pipeline_tests.integration.test_sink_poison import one_worker
from metrics_pipeline_tests.patience import deadline, patience
from metrics_pipeline_tests.test_own_sensors import fast_share

pytestmark = pytest.mark.integration

PAGE = page("own-sensors")
PROGRAMS = listings(PAGE)
START = datetime(2026, 7, 1, tzinfo=UTC)


@dataclass
class Place:
    """Where the programs run.

    Attributes:
        stack: with the broker they publish to.
        folder: holds them.
        before: what verify said before.
        marks: where the topic ended then.
    """

    stack: RunningStack
    folder: Path
    before: VerifyReport
    marks: dict[int, int] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {**self.stack.environment, "KAFKA_URL": self.stack.settings.bootstrap_servers}

    def write(self, name: str) -> Path:
        file = self.folder / name
        file.write_text(PROGRAMS[name], "utf-8")
        return file

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=patience(120),
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def arrived(self) -> int:
        """How many records the topic has more than before."""
        return sum(high for _, high in kafka.watermarks(self.stack.settings).values()) - sum(self.marks.values())

    def published(self) -> dict[tuple[bytes, bytes], int]:
        """What came into the topic since, with its partition; what came twice is here once."""
        stop = {number: high for number, (_, high) in kafka.watermarks(self.stack.settings).items()}
        return {
            (message.key() or b"", message.value() or b""): message.partition() or 0
            for batch in TopicReader(self.stack.settings, TOPIC).read(self.marks, stop)
            for message in batch
        }

    def stored(self, expected: Sequence[Reading] | int, unclaimed: bool = True) -> list[Reading]:
        """Everything published is what was expected, on the fast road, where it belongs, in the table, and clean; the readings."""
        after = verify(self.stack.settings)
        counts = after.counts
        published = self.published()
        share = fast_share([*published])
        print(share)  # noqa: T201  # the share, for whoever runs it with -s
        assert share == f"{len(published)} of {len(published)} on the fast road"
        assert all(partition(key, len(self.marks)) == number for (key, _), number in published.items())
        found = sorted((decode(*wire) for wire in published), key=key_of)
        if isinstance(expected, int):
            assert len({key_of(reading) for reading in found}) == expected
        else:
            assert found == sorted(expected, key=key_of)
        assert self.rows(found) == found

        before = self.before
        assert (counts.lost, counts.unexpected, counts.different) == (
            before.counts.lost,
            before.counts.unexpected,
            before.counts.different,
        )
        assert after.clean >= before.clean, after.lines()
        assert after.rows == before.rows + len(found)
        new = after.records - before.records
        assert new >= len(found)
        assert after.unclaimed == before.unclaimed + new * unclaimed
        assert after.acknowledged == before.acknowledged + new * (not unclaimed)
        return found

    def rows(self, readings: Sequence[Reading]) -> list[Reading]:
        """Every row of the devices that these are of."""
        with self.stack.admin() as connection:
            connection.execute("SET timezone TO 'UTC'")
            rows = connection.execute(
                "SELECT device_id, published_at, metric_name, value, tags FROM metrics WHERE device_id = ANY(%s) "
                "AND published_at >= %s",
                [list({reading.device_id for reading in readings}), min(reading.published_at for reading in readings)],
            ).fetchall()
        return sorted((Reading(row[0], row[1].astimezone(UTC), *row[2:]) for row in rows), key=key_of)


def key_of(reading: Reading) -> tuple[Any, ...]:
    return reading.device_id, reading.published_at, reading.metric_name


@pytest.fixture(scope="module", params=["connect", "copy"])
def sink(request: pytest.FixtureRequest, stack: RunningStack) -> Iterator[str]:
    """The active sink while its tests run."""
    if request.param == "copy":
        with one_worker(stack):
            yield "copy"
    else:
        yield "connect"


@pytest.fixture
def place(sink: str, stack: RunningStack, tmp_path: Path) -> Place:
    before = verify(stack.settings)
    marks = {number: high for number, (_, high) in kafka.watermarks(stack.settings).items()}
    return Place(stack, tmp_path, before, marks)


def test_the_program_with_the_package(place: Place) -> None:
    place.run(sys.executable, str(place.write("sensor.py")))
    found = place.stored(2)
    assert {reading.device_id for reading in found} == {device_id("greenhouse")}
    assert {(reading.metric_name, reading.value) for reading in found} == {(0, 21.5), (10, 48.0)}
    assert {tuple(reading.tags) for reading in found} == {("site:garden",)}


def test_the_program_without_it_and_what_verify_says(place: Place) -> None:
    place.run(sys.executable, str(place.write("plain.py")))
    found = place.stored(100)
    assert {reading.device_id for reading in found} == {device_id("cellar")}
    assert [reading.value for reading in found] == [400 + number / 8 for number in range(100)]
    assert {(reading.metric_name, *reading.tags) for reading in found} == {(30, "site:house", "floor:-1")}

    told = place.stack.cli("verify")
    assert told.returncode == (0 if place.before.clean else 1), told.stdout
    if place.before.clean:
        (block,) = fences(PAGE, "text")
        assert set(shapes(block)) <= set(shapes(told.stdout)), told.stdout


def shapes(text: str) -> list[str]:
    """Lines with every number but 0 replaced."""
    return [re.sub(r"\b[1-9][\d,.]*|\b0\.\d+", "N", line) for line in text.splitlines()]


def test_the_java_program(place: Place) -> None:
    java = shutil.which("java")
    modules = (
        subprocess.run([java, "--list-modules"], capture_output=True, text=True, check=True).stdout if java else ""
    )
    if java is None or "jdk.compiler" not in modules:
        pytest.skip("no Java with a compiler: the one that comes with the package has none")
    brought = jars.fetch(place.stack.settings, ["kafka"], quiet=True)["kafka"]
    needed = [str(jar) for jar in brought if re.match(r"(kafka-clients|slf4j-api)-", jar.name)]
    assert len(needed) == 2
    place.run(java, "-cp", ":".join(needed), str(place.write("Sensor.java")))
    found = place.stored(100)
    assert [reading.value for reading in found] == [30 + number / 4 for number in range(100)]
    assert {(reading.metric_name, *reading.tags) for reading in found} == {(50, "site:roof")}


def test_the_run_in_the_ledger(place: Place) -> None:
    told = place.run(sys.executable, str(place.write("run.py")))
    (run,) = re.findall(r"^run (\S+) finished after .*: 10 acknowledged ", told)
    found = place.stored(10, unclaimed=False)
    assert [reading.value for reading in found] == [40 + number / 2 for number in range(10)]
    with place.stack.admin() as connection:
        rows = connection.execute(
            "SELECT DISTINCT source, state, sum(acknowledged) OVER () FROM producer_runs WHERE run_id = %s", [run]
        ).fetchall()
    assert rows == [("barn", "finished", 10)]


# --- The bridge --------------------------------------------------------------------------------------------------


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    give_up = deadline(seconds)
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


@contextmanager
def bridge(place: Place, port: int, log: Path) -> Iterator[subprocess.Popen[str]]:
    """The bridge once it forwards."""
    command = [sys.executable, str(place.write("bridge.py")), "127.0.0.1", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=place.folder, env=place.environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )
    try:
        until(lambda: "forwarding" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.kill()
        process.wait()


def send(port: int, messages: Sequence[tuple[str, bytes]]) -> None:
    """Publish by MQTT with QoS 1, and return when the MQTT broker has them all."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        for sent in [client.publish(topic, payload, qos=1) for topic, payload in messages]:
            sent.wait_for_publish(30)
    finally:
        client.disconnect()
        client.loop_stop()


def test_the_bridge_from_mqtt_loses_nothing_when_it_is_killed(place: Place, sink: str) -> None:
    zone = timezone(timedelta(hours=1))
    expected, messages = [], []
    for number in range(4800):
        name, metric = f"{sink}-{number % 4}", [*MetricName][number % len(MetricName)]
        at, value = START + timedelta(milliseconds=250 * number), round(20 + number / 7, 3)
        payload = json.dumps({"at": at.astimezone(zone).isoformat(), "value": value}).encode()
        messages.append((f"sensors/{name}/{metric.name.lower()}", payload))
        expected.append(Reading(device_id(name), at, int(metric), value, [f"sensor:{name}"]))
    (port,) = free_ports(1)
    logs = [place.folder / name for name in ("first.log", "second.log")]
    with Broker(port=port, listen="127.0.0.1"), ThreadPoolExecutor(1) as sensors:
        with bridge(place, port, logs[0]) as first:
            sending = sensors.submit(send, port, [*messages[:40], ("sensors/hall/mood", b"fine"), *messages[40:4000]])
            until(lambda: place.arrived() or first.poll() is not None)
            assert first.poll() is None, logs[0].read_text()
            first.kill()
            first.wait()
        sending.result(patience(60))
        forwarded = place.arrived()
        print(f"{forwarded} of 4000 forwarded when it was killed")  # noqa: T201  # for whoever runs it with -s
        assert forwarded < 4000
        # While no bridge runs, the MQTT broker keeps what comes.
        send(port, messages[4000:])
        with bridge(place, port, logs[1]) as second:
            until(lambda: len(place.published()) >= len(expected) or second.poll() is not None)
            assert second.poll() is None, logs[1].read_text()
    assert "refused sensors/hall/mood: " in "".join(log.read_text() for log in logs)
    place.stored(expected)
