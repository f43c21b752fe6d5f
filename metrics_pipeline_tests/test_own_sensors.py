"""The programs of docs/own-sensors.md without a broker: what they write takes the fast road, and what goes wrong is said."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import confluent_kafka
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics_pipeline.copy_sink import canonical
from metrics_pipeline.copy_sink.tags import TagTable
from metrics_pipeline.metric import MetricName, Reading, decode, encode
from metrics_pipeline.replay.cells import DEVICE_NAMESPACE, device_id
from metrics_pipeline_tests.documents import fences, listings, page, table
from metrics_pipeline_tests.test_metric import tags_strategy

PAGE = page("own-sensors")
PROGRAMS = listings(PAGE)
Wire = tuple[bytes, bytes]


def fast_share(wires: Sequence[Wire]) -> str:
    """How many of the records the COPY sink's decoder takes by its fast road."""
    keys, values = [key for key, _ in wires], [value for _, value in wires]
    key_lengths, lengths = (np.array([*map(len, texts)], np.int64) for texts in (keys, values))
    columns, _ = canonical.parse(canonical.padded(keys), canonical.padded(values), key_lengths, lengths, TagTable())
    return f"{len(columns)} of {len(wires)} on the fast road"


class Recorder:
    """Stands for Kafka's client: keeps what is published, and acknowledges it when it is asked."""

    def __init__(self, error: object = None, left: int = 0) -> None:
        self.config: dict[str, Any] = {}
        self.wires: list[Wire] = []
        self.error = error
        self.left = left
        self.waiting: list[Callable[[Any, Any], None]] = []

    def __call__(self, config: dict[str, Any]) -> Recorder:
        self.config = config
        return self

    def produce(self, topic: str, *, key: bytes, value: bytes, on_delivery: Callable[[Any, Any], None]) -> None:
        assert topic == "metrics"
        self.wires.append((key, value))
        self.waiting.append(on_delivery)

    def poll(self, timeout: float) -> None:
        waiting, self.waiting = self.waiting, []
        for told in waiting:
            told(self.error, None)

    def flush(self, timeout: float) -> int:
        self.poll(timeout)
        return self.left


def executed(name: str, client: Recorder, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a program leaves."""
    monkeypatch.setattr(confluent_kafka, "Producer", client)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(PROGRAMS[name], name, "exec"), names)
    return names


def test_the_page_has_its_programs() -> None:
    assert [*PROGRAMS] == ["sensor.py", "plain.py", "bridge.py", "Sensor.java", "run.py"]
    lines = [line for line in PROGRAMS["sensor.py"].splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 15
    assert "metrics_pipeline" not in PROGRAMS["plain.py"]


def test_the_two_objects_of_the_page_take_the_fast_road() -> None:
    key, value = (block.strip().encode() for block in fences(PAGE, "json"))
    assert fast_share([(key, value)]) == "1 of 1 on the fast road"
    assert encode(decode(key, value)) == (key, value)


def test_the_codes_are_those_of_the_wire() -> None:
    text = PAGE.read_text("utf-8")
    for name in MetricName:
        assert f"| {name.value} | {name.name.lower()} | {name.unit} |\n" in text
    assert text.count(" |\n| ") > len(MetricName)
    assert f"`{DEVICE_NAMESPACE}`" in text
    assert len(table(PAGE, "## A message")) == 5


@pytest.mark.parametrize(("name", "number"), [("sensor.py", 2), ("plain.py", 100)])
def test_every_record_of_the_programs_takes_the_fast_road(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Recorder()
    monkeypatch.setattr("time.sleep", lambda _: None)
    executed(name, client, monkeypatch)
    assert (client.config["partitioner"], client.config["enable.idempotence"]) == ("murmur2_random", True)
    share = fast_share(client.wires)
    print(f"{name}: {share}")  # noqa: T201  # the share, for whoever runs it with -s
    assert share == f"{number} of {number} on the fast road"
    for key, value in client.wires:
        assert encode(decode(key, value))[0] == key


@pytest.mark.parametrize("name", ["sensor.py", "plain.py"])
def test_the_programs_fail_when_something_is_not_acknowledged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(confluent_kafka.KafkaException):
        executed(name, Recorder(error=confluent_kafka.KafkaError(3)), monkeypatch)
    with pytest.raises(SystemExit, match="not everything was acknowledged within 30 s"):
        executed(name, Recorder(left=1), monkeypatch)


zones = st.sampled_from([UTC, timezone(timedelta(hours=-9, minutes=-30))])
moments = st.datetimes(timezones=zones).filter(lambda at: 1 < at.year < 9999) | st.sampled_from(
    [datetime(2026, 11, 22, 16, tzinfo=UTC), datetime(2026, 11, 22, 16, 0, 0, 120_000, UTC)]
)
values = (
    st.floats(-1e15, 1e15).filter(lambda value: "e" not in repr(value))
    | st.integers(-(10**15), 10**15)
    | st.sampled_from([0.0, -0.0, 0.0001, 1 / 3, -40.0, 999999999999999.9])
)
"""What a sensor says; the smallest and the largest numbers have an exponent, which the page calls slower."""
names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20)
metrics = st.sampled_from(MetricName)


def test_whatever_the_plain_program_writes_takes_the_fast_road(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    message = executed("plain.py", Recorder(), monkeypatch)["message"]

    @given(st.lists(st.tuples(names, moments, metrics.map(int), values, tags_strategy), min_size=1, max_size=20))
    def every(readings: list[tuple[str, datetime, int, float, list[str]]]) -> None:
        wires: list[Wire] = [tuple(message(*reading)) for reading in readings]
        assert fast_share(wires) == f"{len(wires)} of {len(wires)} on the fast road"
        for (name, at, metric, value, tags), wire in zip(readings, wires, strict=True):
            assert decode(*wire) == Reading(device_id(name), at.astimezone(UTC), metric, float(value), tags)
            assert wire[0] == encode(decode(*wire))[0], "another partition than that of our producers"

    every()
    with pytest.raises(ValueError):
        message("cellar", datetime.now(UTC), 30, float("nan"), [])


def test_whatever_the_bridge_writes_takes_the_fast_road(monkeypatch: pytest.MonkeyPatch) -> None:
    record = executed("bridge.py", Recorder(), monkeypatch)["record"]

    @given(st.lists(st.tuples(names, moments, metrics, values), min_size=1, max_size=20))
    def every(readings: list[tuple[str, datetime, MetricName, float]]) -> None:
        wires: list[Wire] = [
            record(f"sensors/{name}/{metric.name.lower()}", json.dumps({"at": at.isoformat(), "value": value}))
            for name, at, metric, value in readings
        ]
        assert fast_share(wires) == f"{len(wires)} of {len(wires)} on the fast road"
        for (name, at, metric, value), wire in zip(readings, wires, strict=True):
            tags = [f"sensor:{name}"]
            assert decode(*wire) == Reading(device_id(name), at.astimezone(UTC), metric, float(value), tags)

    every()


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("sensors/kitchen/temperature", b"21.5"),
        ("sensors/kitchen/temperature", b"\xff"),
        ("sensors/kitchen/temperature", b'{"value":21.5}'),
        ("sensors/kitchen/temperature", b'{"at":"2026-11-22T16:00:00","value":21.5}'),
        ("sensors/kitchen/temperature", b'{"at":"2026-11-22T16:00:00Z","value":NaN}'),
        ("sensors/kitchen/temperature", b'{"at":"2026-11-22T16:00:00Z","value":"21.5"}'),
        ("sensors/kitchen/temperature", b'{"at":' * 100_000),
        ("sensors/kitchen/mood", b'{"at":"2026-11-22T16:00:00Z","value":1}'),
        ("sensors/kitchen/stove/temperature", b'{"at":"2026-11-22T16:00:00Z","value":1}'),
        ("sensors//temperature", b'{"at":"2026-11-22T16:00:00Z","value":1}'),
    ],
)
def test_the_bridge_lets_go_of_what_it_refuses(
    topic: str, payload: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client, mqtt, waiting = Recorder(), Session(), deque[Any]()
    bridge = executed("bridge.py", client, monkeypatch)
    bridge["forward"](client, waiting, Sent(topic, payload, 7))
    bridge["acknowledge"](mqtt, waiting)
    assert client.wires == []
    assert mqtt.acknowledged == [7]
    assert capsys.readouterr().err.startswith(f"refused {topic}: ")


def test_the_bridge_acknowledges_in_order_what_kafka_has(monkeypatch: pytest.MonkeyPatch) -> None:
    client, mqtt, waiting = Recorder(), Session(), deque[Any]()
    bridge = executed("bridge.py", client, monkeypatch)
    for mid in range(4):
        bridge["forward"](client, waiting, Sent(TOPIC, b"bad" if mid == 2 else PAYLOAD, mid))
    bridge["acknowledge"](mqtt, waiting)
    assert mqtt.acknowledged == []
    for told, expected in ((1, []), (0, [0, 1, 2]), (2, [0, 1, 2, 3])):
        client.waiting[told](None, None)
        bridge["acknowledge"](mqtt, waiting)
        assert mqtt.acknowledged == expected
    assert not waiting


def test_the_bridge_ends_when_kafka_does_not_take_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    client, mqtt, waiting = Recorder(error=confluent_kafka.KafkaError(3)), Session(), deque[Any]()
    bridge = executed("bridge.py", client, monkeypatch)
    bridge["forward"](client, waiting, Sent(TOPIC, PAYLOAD, 7))
    with pytest.raises(confluent_kafka.KafkaException):
        client.poll(0)
    bridge["acknowledge"](mqtt, waiting)
    assert mqtt.acknowledged == []


TOPIC, PAYLOAD = "sensors/kitchen/temperature", b'{"at":"2026-11-22T17:00:00+01:00","value":21.5}'


class Session:
    """Stands for the MQTT client."""

    def __init__(self) -> None:
        self.acknowledged: list[int] = []

    def ack(self, mid: int, qos: int) -> None:
        assert qos == 1
        self.acknowledged.append(mid)


class Sent:
    """An MQTT message."""

    def __init__(self, topic: str, payload: bytes, mid: int) -> None:
        self.topic, self.payload, self.mid, self.qos = topic, payload, mid, 1
