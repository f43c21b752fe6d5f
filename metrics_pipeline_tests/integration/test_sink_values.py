"""The COPY sink on the real parts: what is valid is stored exactly as it is, whatever it is."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from metrics_pipeline import postgres
from metrics_pipeline.copy_sink.batch import BatchDecoder, Chunk
from metrics_pipeline.copy_sink.store import FencedError, Offset, StandbyError, Store
from metrics_pipeline.metric import Reading, decode, encode
from metrics_pipeline.settings import TOPIC
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.databases import own_database
from metrics_pipeline_tests.fake_sink import FakeMessage
from metrics_pipeline_tests.integration.test_sink_poison import OneWorker, one_worker, settled
from metrics_pipeline_tests.test_metric import ACCEPTED, DEVICE

pytestmark = pytest.mark.integration

START = datetime(2026, 5, 1, tzinfo=UTC)
VALUES = [
    *(0.0, -0.0, 5e-324, -5e-324, 2.2250738585072011e-308, 2.2250738585072014e-308, 1.7976931348623157e308),
    *(-1.7976931348623157e308, 0.1, 45.2, -40.0, 1e15, 9007199254740993.0, 1 / 3, 0.00000001, 9999999.99999999),
]
TIMES = [
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC),
    datetime(1999, 12, 31, 23, 59, 59, 999_999, UTC),
    datetime(2000, 1, 1, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, 1, UTC),
    datetime(2024, 2, 29, tzinfo=UTC),
]
TAGS: list[list[str]] = [
    [],
    [""],
    ["", "", ""],
    ['"quoted"', "back\\slash", "{a,b}", "NULL", " ", "'; DROP TABLE metrics; --", "%s %(x)s {0}"],
    ["é✓😀", "\u202eright to left", "a\u0301", "\x01\x1f\x7f", "\ufeff", "\ufffd", "\U0010ffff"],
    ["x" * 256],
    [f"tag {number}" for number in range(64)],
    ["😀" * 64] * 64,
]


@pytest.fixture(scope="module")
def sink(stack: RunningStack) -> Iterator[OneWorker]:
    """A real sink of one worker, active for this module."""
    with one_worker(stack) as running:
        yield running


def exactly(stack: RunningStack, readings: list[Reading]) -> None:
    """The table holds these readings, bit for bit."""
    with stack.admin() as connection:
        connection.execute("SET timezone TO 'UTC'")
        for reading in readings:
            row = connection.execute(
                "SELECT extract(epoch FROM published_at - '2000-01-01 00:00:00+00')::text, float8send(value), tags "
                "FROM metrics WHERE device_id = %s AND published_at = %s AND metric_name = %s",
                [reading.device_id, reading.published_at, reading.metric_name],
            ).fetchone()
            assert row is not None, reading
            since = (reading.published_at - datetime(2000, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
            assert int(row[0].replace(".", "")) == since, reading
            assert bytes(row[1]) == struct.pack(">d", reading.value), reading
            assert row[2] == reading.tags


def test_values_times_and_tags_are_stored_exactly(stack: RunningStack, sink: OneWorker) -> None:
    made = [Reading(uuid4(), START, 10, value, []) for value in VALUES]
    made += [Reading(uuid4(), moment, 20, 1.5, ["of:test-sink-values"]) for moment in TIMES]
    made += [Reading(uuid4(), START, 30, 2.5, tags) for tags in TAGS]
    with settled(sink) as publish:
        publish([encode(reading) for reading in made])
    exactly(stack, made)
    assert sink.rejected_since() == {}


@pytest.mark.parametrize("copies", [1, 50])
def test_every_accepted_form_is_stored_exactly(stack: RunningStack, sink: OneWorker, copies: int) -> None:
    """Alone with the others of its kind, and among good ones."""
    made, wires = [], []
    for key, value in ACCEPTED.values():
        device = str(uuid4())
        wire = tuple(
            part.replace(DEVICE.encode(), device.encode()).replace(DEVICE.upper().encode(), device.upper().encode())
            for part in (key, value)
        )
        wires.append((wire[0], wire[1]))
        made.append(decode(*wire))
        good = [Reading(uuid4(), START + timedelta(seconds=number), 10, 3.25, ["good"]) for number in range(copies - 1)]
        wires += [encode(reading) for reading in good]
        made += good
    with settled(sink) as publish:
        publish(wires)
    exactly(stack, made)


def test_duplicates_within_a_batch_across_batches_and_across_partitions(stack: RunningStack, sink: OneWorker) -> None:
    devices = [uuid4() for _ in range(50)]

    def version(number: int) -> list[Reading]:
        return [Reading(device, START, 10, float(number), [f"version {number}"]) for device in devices]

    def rounds(*numbers: int) -> list[tuple[bytes, bytes]]:
        return [encode(reading) for number in numbers for reading in version(number)]

    with settled(sink) as publish:
        publish(rounds(1, 2, 3))
    exactly(stack, version(3))
    with settled(sink) as publish:
        publish(rounds(4))
    with settled(sink) as publish:
        publish(rounds(5, 4, 6))
    exactly(stack, version(6))
    # Not where our producer would put them: the same record, twice, wherever it lies.
    with settled(sink) as publish:
        publish(rounds(7), partition=0)
        publish(rounds(7), partition=1)
        publish(rounds(7), partition=1)
    exactly(stack, version(7))
    with stack.admin() as connection:
        row = connection.execute("SELECT count(*) FROM metrics WHERE device_id = ANY (%s)", [devices]).fetchone()
    assert row == (len(devices),)
    assert sink.status()["batches"]["upsert"] > 0


def test_a_batch_that_waited_for_the_change_of_sinks_is_not_written(stack: RunningStack) -> None:
    """What its statement saw of `sink_state` is from before it waited for the locks."""
    with own_database(stack.settings) as settings, ThreadPoolExecutor(1) as pool:
        store = Store(settings, "of a test")
        with postgres.connect(settings, "metrics_owner") as owner:
            owner.execute(postgres.query("sink_activate"), {"active": "copy"})
        store.begin(0, Offset("", 0))
        message = FakeMessage(0, 0, *encode(Reading(uuid4(), START, 10, 1.0, [])))
        batch = BatchDecoder().decode([message], {0: Chunk(0, 1, 0, 1)})
        with postgres.connect(settings, "metrics_owner") as owner:
            owner.execute(postgres.query("sink_activate"), {"active": "connect"})
            owner.execute(postgres.query("sink_hand_back"), {"topic": TOPIC})
            waiting = pool.submit(store.write, batch)
            with pytest.raises(TimeoutError):
                waiting.result(1.0)
        with pytest.raises((FencedError, StandbyError)):
            waiting.result(10.0)
        with pytest.raises(StandbyError):
            store.write(batch)
        assert not store.move(0, Offset("", 0), Offset("", 1))
        assert store.offsets([0]) == {0: Offset("", 0)}
        with postgres.connect(settings, "metrics_owner") as owner:
            owner.execute(postgres.query("sink_activate"), {"active": "copy"})
        assert store.write(batch).rows == 1
        assert store.written(batch)
        store.close()


def test_afterwards_everything_is_as_the_topic_says(sink: OneWorker) -> None:
    sink.still_well()
    sink.clean()
