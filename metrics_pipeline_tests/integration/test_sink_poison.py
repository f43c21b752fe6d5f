"""The COPY sink on the real parts: every poison record, alone and among ten thousand good ones, and none of them stops it.

The stack is shared with other tests: what was found before is compared with, and the connector is the active sink at the end.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
import requests
from confluent_kafka import Producer

from metrics_pipeline import kafka
from metrics_pipeline.metric import MAX_TAGS, Reading, decode, encode
from metrics_pipeline.settings import TOPIC, Settings
from metrics_pipeline.sinks import active, connector
from metrics_pipeline.verification.verify import VerifyReport, verify
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.integration.test_sinks import problems, running, until
from metrics_pipeline_tests.patience import deadline, patience
from metrics_pipeline_tests.test_metric import KEY, REFUSED, VALUE, compact, without

pytestmark = pytest.mark.integration

START = datetime(2026, 6, 1, tzinfo=UTC)
APART_SECONDS = 0.13
"""Longer than a fetch waits for more: what is so far apart is written in batches of its own."""
GOOD = 10_000
"""Good records around each bad one."""

Wire = tuple[bytes | None, bytes | None]
Place = tuple[int, int]

LARGE: dict[str, tuple[str, bytes | None, bytes | None]] = {
    # The rest of what section 2.4 of the plan names, too large or too odd for the unit tests.
    "ten thousand tags": ("bad_tags", compact(KEY), compact({**VALUE, "tags": ["x"] * 10_000})),
    "a tag of nearly a megabyte": ("bad_tags", compact(KEY), compact({**VALUE, "tags": ["x" * 900_000]})),
    "a message of nearly a megabyte": ("bad_json", compact(KEY), b"x" * 950_000),
    "one tag too many": ("bad_tags", compact(KEY), compact({**VALUE, "tags": ["x"] * (MAX_TAGS + 1)})),
    "a device name of 64 kB": ("bad_uuid", compact(KEY), compact({**VALUE, "device_id": "x" * 65_536})),
    "SQL for a device": ("bad_uuid", compact(KEY), compact({**VALUE, "device_id": "'; DROP TABLE metrics; --"})),
    "deep nesting for tags": (
        "bad_tags",
        compact(KEY),
        without(VALUE, "tags")[:-1] + b',"tags":' + b"[" * 20_000 + b"}",
    ),
    "a Connect envelope": ("missing_field", compact(KEY), compact({"schema": {"type": "struct"}, "payload": VALUE})),
    "minus infinity": ("bad_json", compact(KEY), compact(VALUE).replace(b"45.2", b"-Infinity")),
    "the key of another record": ("key_mismatch", encode(Reading(UUID(int=9), START, 10, 1.0, []))[0], compact(VALUE)),
}
POISON = REFUSED | LARGE


@dataclass
class OneWorker:
    """A running sink."""

    stack: RunningStack
    settings: Settings
    before: VerifyReport
    seen: set[Place] = field(default_factory=set)

    def status(self) -> dict[str, Any]:
        return dict(requests.get(f"{self.settings.sink_http}/status", timeout=5).json())

    def still_well(self) -> None:
        """Never down, never replaced."""
        answer = requests.get(f"{self.settings.sink_http}/health", timeout=5)
        assert answer.status_code == 200, answer.text
        until(lambda: self.status()["lag"] == 0)
        assert self.status()["restarts"] == 0

    def rejected(self) -> dict[Place, tuple[str, str, bytes | None, bytes | None]]:
        with self.stack.admin() as connection:
            rows = connection.execute(
                'SELECT partition, "offset", reason, detail, key, payload FROM rejected_metrics WHERE topic = %s',
                [TOPIC],
            ).fetchall()
        return {(row[0], row[1]): (row[2], row[3], row[4], row[5]) for row in rows}

    def rejected_since(self) -> dict[Place, tuple[str, str, bytes | None, bytes | None]]:
        """What was rejected since this was asked for the last time."""
        found = self.rejected()
        new = {place: what for place, what in found.items() if place not in self.seen}
        self.seen |= set(found)
        return new

    def clean(self) -> None:
        """Nothing lost, unexpected, different or unaccounted for since the sink began."""
        after = verify(self.settings, strict=False)
        assert problems(after) == problems(self.before), after.lines()


@contextmanager
def one_worker(stack: RunningStack) -> Iterator[OneWorker]:
    """`metrics-pipeline sink --workers 1`, active while it runs; the connector afterwards."""
    settings = stack.settings.model_copy(update={"sink": "copy"})
    before = verify(stack.settings)
    # Small batches: what is published by itself is mostly written by itself.
    quick = replace(stack, environment={**stack.environment, "SINK_FLUSH_MS": "20"})
    with running(quick, "sink", "--workers", "1"):
        until(lambda: active.position(settings).sessions >= 1)
        active.ensure_sink(settings)
        try:
            sink = OneWorker(stack, settings, before)
            sink.rejected_since()
            yield sink
        finally:
            active.ensure_sink(stack.settings)
    assert connector.sink_state(stack.settings).running


@contextmanager
def settled(sink: OneWorker) -> Iterator[Callable[..., list[Place]]]:
    """Publishes, and waits at the end until everything is stored or rejected; the sink must be well all the time."""
    producer = Producer(kafka.client_config(sink.settings) | {"linger.ms": 5, "message.max.bytes": 1_000_000})

    def publish(wires: Sequence[Wire], partition: int = -1) -> list[Place]:
        places: dict[int, Place] = {}

        def delivered(at: int) -> Callable[[Any, Any], None]:
            def note(error: Any, message: Any) -> None:
                assert error is None
                places[at] = message.partition(), message.offset()

            return note

        for at, (key, value) in enumerate(wires):
            producer.produce(TOPIC, key=key, value=value, partition=partition, on_delivery=delivered(at))
            producer.poll(0)
        assert producer.flush(patience(60)) == 0
        return [places[at] for at in range(len(wires))]

    yield publish
    give_up = deadline(90)
    ends = {number: high for number, (_, high) in kafka.watermarks(sink.settings).items()}
    while any(active.offsets(sink.settings).get(number, -1) < high for number, high in ends.items() if high):
        assert requests.get(f"{sink.settings.sink_http}/health", timeout=5).status_code == 200
        assert time.monotonic() < give_up, sink.status()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def sink(stack: RunningStack) -> Iterator[OneWorker]:
    """A real sink of one worker, active for this module."""
    with one_worker(stack) as found:
        yield found


def good(count: int, device: UUID | None = None) -> list[Wire]:
    owner = device or uuid4()
    return [
        encode(Reading(owner, START + timedelta(microseconds=number), 10, float(number), ["good"]))
        for number in range(count)
    ]


def rows_of(stack: RunningStack, device: UUID) -> int:
    with stack.admin() as connection:
        row = connection.execute(
            "SELECT count(*) FROM metrics WHERE device_id = %s AND tags = '{good}' "
            "AND value = extract(microseconds FROM published_at)",
            [device],
        ).fetchone()
    assert row is not None
    return int(row[0])


def rejected_as_expected(sink: OneWorker, wires: dict[str, Place]) -> None:
    """Each with its coordinates, reason and payload; nothing else."""
    expected = {place: name for name, place in wires.items() if POISON[name][0] != "tombstone"}
    found = sink.rejected_since()
    assert found.keys() == expected.keys()
    for place, (reason, detail, key, payload) in found.items():
        name = expected[place]
        assert (reason, key, payload) == POISON[name], name
        assert detail


def counts(sink: OneWorker) -> tuple[Counter[str], int, int]:
    until(lambda: sink.status()["lag"] == 0)
    time.sleep(1.2)  # a worker reports twice a second
    status = sink.status()
    return Counter(status["rejected"]), status["tombstones"], status["rows"]


def test_each_poison_record_alone(sink: OneWorker) -> None:
    reasons, tombstones, _ = counts(sink)
    wires: dict[str, Place] = {}
    with settled(sink) as publish:
        for name, (_, key, value) in POISON.items():
            (wires[name],) = publish([(key, value)], partition=len(wires) % 6)
            time.sleep(APART_SECONDS)
    rejected_as_expected(sink, wires)
    after, skipped, _ = counts(sink)
    expected = Counter(reason for reason, _, _ in POISON.values() if reason != "tombstone")
    assert after - reasons == expected
    assert skipped - tombstones == sum(reason == "tombstone" for reason, _, _ in POISON.values())
    sink.still_well()


def test_poison_records_one_in_ten_thousand(stack: RunningStack, sink: OneWorker) -> None:
    chosen = [
        "bad uuid in the key only",
        "NUL in a tag",
        "invalid UTF-8 in a tag",
        "tombstone",
        "value as text",
        "null key",
    ]
    wires: list[Wire] = []
    at: dict[str, int] = {}
    devices = []
    for name in chosen:
        devices.append(uuid4())
        around = good(GOOD, devices[-1])
        at[name] = len(wires) + GOOD // 3
        wires += [*around[: GOOD // 3], POISON[name][1:], *around[GOOD // 3 :]]
    with settled(sink) as publish:
        places = publish(wires)
    rejected_as_expected(sink, {name: places[position] for name, position in at.items()})
    assert [rows_of(stack, device) for device in devices] == [GOOD] * len(devices)
    sink.still_well()


def test_every_poison_record_among_good_ones_of_one_batch(stack: RunningStack, sink: OneWorker) -> None:
    device = uuid4()
    around = good(GOOD, device)
    step = GOOD // (len(POISON) + 1)
    wires: list[Wire] = []
    at: dict[str, int] = {}
    for number, (name, (_, key, value)) in enumerate(POISON.items()):
        wires += around[number * step : (number + 1) * step]
        at[name] = len(wires)
        wires.append((key, value))
    wires += around[len(POISON) * step :]
    with settled(sink) as publish:
        places = publish(wires)
    rejected_as_expected(sink, {name: places[position] for name, position in at.items()})
    assert rows_of(stack, device) == GOOD
    sink.still_well()


def test_what_the_database_refuses_is_bisected_and_rejected(stack: RunningStack, sink: OneWorker) -> None:
    device, keys = uuid4(), good(3000)
    refused = [encode(Reading(device, START + timedelta(seconds=number), 10, 12345.5, [])) for number in range(3)]
    # A good reading whose key a refused one of the same batch has, too.
    key, value = encode(Reading(device, START, 10, 7.25, ["former"]))
    wires: list[Wire] = [*keys[:1000], (key, value), refused[0], *keys[1000:2000], refused[1], *keys[2000:], refused[2]]
    reasons, _, _ = counts(sink)
    with stack.admin() as connection:
        connection.execute("ALTER TABLE metrics ADD CONSTRAINT of_test_sink_poison CHECK (value <> 12345.5) NOT VALID")
        try:
            with settled(sink) as publish:
                places = publish(wires, partition=2)
        finally:
            connection.execute("ALTER TABLE metrics DROP CONSTRAINT of_test_sink_poison")
        found = sink.rejected_since()
        expected = [place for place, wire in zip(places, wires, strict=True) if wire in refused]
        assert sorted(found) == sorted(expected)
        assert {what[0] for what in found.values()} == {"refused_by_database"}
        assert all("of_test_sink_poison" in what[1] for what in found.values())
        assert {what[3] for what in found.values()} == {wire[1] for wire in refused}
        rows = connection.execute("SELECT value, tags FROM metrics WHERE device_id = %s", [device]).fetchall()
        assert rows == [(7.25, ["former"])]
    owner = decode(*keys[0]).device_id
    assert rows_of(stack, owner) == len(keys)
    after, _, _ = counts(sink)
    assert after - reasons == {"refused_by_database": 3}
    sink.still_well()


def test_afterwards_the_topic_and_the_table_agree(stack: RunningStack, sink: OneWorker) -> None:
    sink.still_well()
    sink.clean()
    document = json.loads(stack.cli("verify", "--json").stdout)
    assert document["lost"] == sink.before.counts.lost
    assert document["unaccounted"] == sink.before.unaccounted
