"""Verify finds what is changed behind the pipeline's back, and nothing else.

The stack is shared with other tests, so each test compares with what was found before it, and puts back what it changed.
"""

from __future__ import annotations

import json
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import confluent_kafka
import numpy as np
import pytest
import requests
from confluent_kafka.admin import AdminClient, NewTopic

from metrics_pipeline import kafka, postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.metric import EPOCH, Reading, encode
from metrics_pipeline.partitioner import partition
from metrics_pipeline.producer.run import RunReport as RunReport
from metrics_pipeline.producer.run import run_producer
from metrics_pipeline.settings import CONNECTOR, TOPIC, Settings
from metrics_pipeline.topic import TopicReader
from metrics_pipeline.verification.claims import OffsetRanges
from metrics_pipeline.verification.spill import KEY, ROW
from metrics_pipeline.verification.table_entries import read_rows, take_snapshot
from metrics_pipeline.verification.topic_entries import tags_digest
from metrics_pipeline.verification.verify import VerifyReport, verify
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.patience import patience

pytestmark = pytest.mark.integration

START = datetime(2026, 1, 1, tzinfo=UTC)


def readings(device: uuid.UUID, number: int = 200) -> list[Reading]:
    return [
        Reading(
            device, START + timedelta(milliseconds=137 * at), 10 * (at % 6), 20 + at / 7, ["site:a", f"floor:{at % 3}"]
        )
        for at in range(number)
    ]


def publish(stack: RunningStack, published: list[Reading]) -> RunReport:
    report = run_producer(stack.settings, [[encode(reading) for reading in published]], kind="replay")
    assert report.clean, report.summary()
    assert report.acknowledged == len(published)
    return report


@pytest.fixture(scope="module")
def stored(stack: RunningStack) -> list[Reading]:
    """Readings of a device of their own that are in topic and table."""
    published = readings(uuid.uuid4())
    publish(stack, published)
    return published


@pytest.fixture
def before(stack: RunningStack, stored: list[Reading]) -> VerifyReport:
    """What verify says before the test."""
    del stored
    return verify(stack.settings)


def problems(report: VerifyReport) -> tuple[int, int, int, int, int]:
    counts = report.counts
    return counts.lost, counts.unexpected, counts.different, report.unaccounted, len(report.anomalies)


def by_command(stack: RunningStack) -> tuple[int, dict[str, Any]]:
    """Exit code and report of `metrics-pipeline verify --json`."""
    done = stack.cli("verify", "--json")
    return done.returncode, json.loads(done.stdout)


def key_of(reading: Reading) -> tuple[uuid.UUID, datetime, int]:
    return reading.device_id, reading.published_at, reading.metric_name


def named(reading: Reading) -> str:
    published_at = reading.published_at.isoformat().replace("+00:00", "Z")
    return f"device_id {reading.device_id}, published_at {published_at}, metric_name {reading.metric_name} "


def test_nothing_is_wrong_with_what_was_just_produced(stack: RunningStack, before: VerifyReport) -> None:
    published = readings(uuid.uuid4(), 5000)
    run = publish(stack, published)
    after = verify(stack.settings)

    assert problems(after) == problems(before)
    assert after.records - before.records == after.counts.compared - before.counts.compared == 5000
    assert after.acknowledged - before.acknowledged == 5000
    assert after.unclaimed == before.unclaimed
    with stack.admin() as connection:
        assert connection.execute("SELECT count(*) FROM metrics").fetchone() == (after.rows,)
    ends = {number: high for number, (_, high) in kafka.watermarks(stack.settings).items()}
    assert {number: high for number, (_, high) in after.retained.items()} == ends
    assert set(run.offsets) == set(ends)


def test_keys_stand_where_the_partitioner_says(stack: RunningStack) -> None:
    published = readings(uuid.uuid4(), 600)
    run = publish(stack, published)
    keys = {encode(reading)[0] for reading in published}
    starts = {number: ranges[0][0] for number, ranges in run.offsets.items()}
    stops = {number: ranges[-1][1] for number, ranges in run.offsets.items()}
    placed = {
        message.key(): message.partition()
        for batch in TopicReader(stack.settings, TOPIC).read(starts, stops)
        for message in batch
        if message.key() in keys
    }
    partitions = len(kafka.watermarks(stack.settings))
    assert placed == {key: partition(key, partitions) for key in keys}


def test_a_deleted_row_is_lost(stack: RunningStack, stored: list[Reading], before: VerifyReport) -> None:
    victim = stored[0]
    with stack.admin() as connection:
        where = "WHERE (device_id, published_at, metric_name) = (%s, %s, %s)"
        row = connection.execute(f"DELETE FROM metrics {where} RETURNING *", key_of(victim)).fetchone()
        assert row is not None
        try:
            code, report = by_command(stack)
            spoken = stack.cli("verify")
        finally:
            connection.execute("INSERT INTO metrics VALUES (%s, %s, %s, %s, %s, %s)", row)
    assert code == spoken.returncode == 1
    assert not report["clean"]
    assert report["lost"] == before.counts.lost + 1
    (line,) = (text for text in report["examples"] if named(victim) in text)
    assert line.startswith("lost: ")
    assert line.endswith(f": record {victim.value!r}, no row")
    assert line in spoken.stdout
    assert problems(verify(stack.settings)) == problems(before)


def test_a_changed_value_is_different(stack: RunningStack, stored: list[Reading], before: VerifyReport) -> None:
    victim = stored[-1]
    change = "UPDATE metrics SET value = %s WHERE (device_id, published_at, metric_name) = (%s, %s, %s)"
    with stack.admin() as connection:
        connection.execute(change, (victim.value + 2**-40, *key_of(victim)))
        try:
            code, report = by_command(stack)
        finally:
            connection.execute(change, (victim.value, *key_of(victim)))
    assert code == 1
    assert report["different"] == before.counts.different + 1
    (line,) = (text for text in report["examples"] if named(victim) in text)
    assert line.startswith("different: ")
    assert line.endswith(f": record {victim.value!r}, row {victim.value + 2**-40!r}")
    assert problems(verify(stack.settings)) == problems(before)


def test_changed_tags_are_different(stack: RunningStack, stored: list[Reading], before: VerifyReport) -> None:
    victim = stored[0]
    change = "UPDATE metrics SET tags = %s WHERE (device_id, published_at, metric_name) = (%s, %s, %s)"
    with stack.admin() as connection:
        connection.execute(change, (["floor:0", "site:a"], *key_of(victim)))
        try:
            report = verify(stack.settings)
        finally:
            connection.execute(change, (victim.tags, *key_of(victim)))
    assert not report.clean
    assert report.counts.different == before.counts.different + 1
    (line,) = (text for text in report.examples if named(victim) in text)
    assert line.endswith("; tags: record ['site:a', 'floor:0'], row ['floor:0', 'site:a']")
    assert problems(verify(stack.settings)) == problems(before)


def test_a_stray_row_is_unexpected(stack: RunningStack, before: VerifyReport) -> None:
    stray = Reading(uuid.uuid4(), START, 30, 1.5, [])
    with stack.admin() as connection:
        connection.execute("INSERT INTO metrics VALUES (%s, %s, %s, 1.5, '{}')", key_of(stray))
        try:
            code, report = by_command(stack)
        finally:
            connection.execute("DELETE FROM metrics WHERE device_id = %s", (stray.device_id,))
    assert code == 1
    assert report["unexpected"] == before.counts.unexpected + 1
    (line,) = (text for text in report["examples"] if named(stray) in text)
    assert line.startswith("unexpected: ")
    assert line.endswith(": no record, row 1.5")
    assert problems(verify(stack.settings)) == problems(before)


def test_an_upsert_of_a_newer_record_is_as_good(stack: RunningStack, before: VerifyReport) -> None:
    published = readings(uuid.uuid4())
    publish(stack, published)
    changed = [Reading(it.device_id, it.published_at, it.metric_name, it.value + 1, ["new"]) for it in published]
    publish(stack, changed)
    after = verify(stack.settings)
    assert problems(after) == problems(before)
    assert after.rows == before.rows + len(published)
    assert after.records == before.records + 2 * len(published)


@pytest.mark.usefixtures("before")  # verify waits until the sink has stored what is in the topic
def test_the_table_is_read_as_it_was_when_the_snapshot_was_taken(stack: RunningStack, stored: list[Reading]) -> None:
    changed = stored[0]
    key = (changed.device_id.bytes, (changed.published_at - EPOCH) // timedelta(microseconds=1), changed.metric_name)
    update = "UPDATE metrics SET value = %s WHERE (device_id, published_at, metric_name) = (%s, %s, %s)"
    with stack.admin() as admin, postgres.connect(stack.settings, "metrics_reader") as connection:
        estimate, _ = take_snapshot(connection)
        # By the same snapshot: the sink may still be storing what an earlier test published.
        (rows,) = connection.execute("SELECT count(*) FROM metrics").fetchone() or (0,)
        admin.execute(update, (7.5, *key_of(changed)))
        stray = uuid.uuid4()
        admin.execute("INSERT INTO metrics VALUES (%s, now(), 10, 1.5, '{}')", (stray,))
        try:
            found = np.concatenate([*read_rows(connection)], dtype=ROW)
        finally:
            admin.execute(update, (changed.value, *key_of(changed)))
            admin.execute("DELETE FROM metrics WHERE device_id = %s", (stray,))
    assert len(found) == rows
    assert not (found["key"]["device_id"] == np.void(stray.bytes)).any()
    assert 0.2 * rows < estimate < 5 * rows + 1000
    (row,) = found[found["key"] == np.array(key, KEY)]
    assert int(row["value"]) == int.from_bytes(struct.pack(">d", changed.value), "big")
    assert bytes(row["tags"]) == tags_digest(changed.tags)


@pytest.mark.parametrize(
    ("acknowledged", "ranges", "reason"),
    [
        (1, lambda end: [(end + 1000, end + 1001)], "was acknowledged 1 offsets of partition 0 up to"),
        (3, lambda end: [(end - 1, end)], "counted 3 acknowledgements in partition 0, at 1 offsets"),
        (1, lambda end: [(end - 1, end)], "were both acknowledged offsets"),
    ],
    ids=["beyond the end", "miscounted", "claimed twice"],
)
def test_a_ledger_that_contradicts_the_topic_is_reported(
    stack: RunningStack, before: VerifyReport, acknowledged: int, ranges: Any, reason: str
) -> None:
    run_id = uuid.uuid4()
    claimed: OffsetRanges = ranges(kafka.watermarks(stack.settings)[0][1])
    with stack.admin() as connection:
        connection.execute(
            "INSERT INTO producer_runs VALUES (%s, 0, 'replay', 'finished', %s, 0, 0, %s::int8multirange, now(), now())",
            (run_id, acknowledged, "{" + ",".join(f"[{start},{end})" for start, end in claimed) + "}"),
        )
        try:
            code, report = by_command(stack)
        finally:
            connection.execute("DELETE FROM producer_runs WHERE run_id = %s", (run_id,))
    assert code == 1
    assert [line for line in report["anomalies"] if str(run_id) in line and reason in line]
    assert problems(verify(stack.settings)) == problems(before)


def test_it_works_while_producer_and_sink_run(stack: RunningStack, before: VerifyReport) -> None:
    ends = sum(high for _, high in kafka.watermarks(stack.settings).values())
    stop = threading.Event()
    device = uuid.uuid4()

    def endless() -> Iterator[list[tuple[bytes, bytes]]]:
        # Every key comes three times, each time with another value.
        for at in count(step=100):
            yield [
                encode(Reading(device, START + timedelta(microseconds=(at + piece) // 3), 30, float(at + piece), []))
                for piece in range(100)
            ]

    ended: list[RunReport] = []
    run = threading.Thread(
        target=lambda: ended.append(
            run_producer(stack.settings, endless(), kind="replay", stop=stop, messages_per_second=3000)
        )
    )
    run.start()
    try:
        while run.is_alive() and sum(high for _, high in kafka.watermarks(stack.settings).values()) == ends:
            time.sleep(0.05)
        during = [verify(stack.settings), verify(stack.settings)]
    finally:
        stop.set()
        run.join()
    assert ended[0].clean
    assert [problems(report) for report in during] == [problems(before)] * 2
    # What was acknowledged just before the ends were read is written down a second later.
    assert [report.unclaimed for report in during] == [before.unclaimed] * 2
    assert before.records < during[0].records < during[1].records <= before.records + ended[0].acknowledged
    assert problems(verify(stack.settings)) == problems(before)


def test_a_broken_record_is_accounted_for_by_its_dead_letter(
    stack: RunningStack, stored: list[Reading], before: VerifyReport
) -> None:
    key, _ = encode(stored[0])
    client = confluent_kafka.Producer(kafka.client_config(stack.settings))
    client.produce(TOPIC, key=key, value=b'{"device_id":')
    client.produce(TOPIC, key=key, value=None)
    assert client.flush(patience(20)) == 0
    after = verify(stack.settings)
    assert problems(after) == problems(before)
    assert sum(after.undecodable.values()) == sum(before.undecodable.values()) + 1
    assert after.tombstones == before.tombstones + 1
    assert after.unclaimed == before.unclaimed + 2


def test_the_sign_of_zero_counts_only_when_asked(stack: RunningStack, before: VerifyReport) -> None:
    publish(stack, [Reading(uuid.uuid4(), START, 0, -0.0, [])])
    after = verify(stack.settings)
    assert problems(after) == problems(before)
    assert after.counts.signless_zero == before.counts.signless_zero + 1
    assert not verify(stack.settings, strict=True).clean


def test_a_sink_that_does_not_advance_is_said(stack: RunningStack) -> None:
    connector = f"{stack.settings.connect_rest}/connectors/{CONNECTOR}"
    verify(stack.settings)
    requests.put(f"{connector}/pause", timeout=10).raise_for_status()
    try:
        publish(stack, readings(uuid.uuid4(), 10))
        with pytest.raises(ServiceError, match=r"has not advanced for 3 s and is .* behind: .*metrics-pipeline status"):
            verify(stack.settings, timeout=3)
    finally:
        requests.put(f"{connector}/resume", timeout=10).raise_for_status()
    verify(stack.settings)


# --- The reader, on topics of its own ----------------------------------------------------------------------------


@pytest.fixture
def topic(stack: RunningStack) -> Iterator[tuple[Settings, str]]:
    name = f"test-{uuid.uuid4()}"
    admin = AdminClient(kafka.client_config(stack.settings))
    for future in admin.create_topics([NewTopic(name, 2, 1)]).values():
        future.result()
    client = confluent_kafka.Producer(kafka.client_config(stack.settings))
    for at in range(100):
        client.produce(name, value=b"%d" % at, partition=0)
    assert client.flush(patience(20)) == 0
    yield stack.settings, name
    for future in admin.delete_topics([name]).values():
        future.result()


def delete_before(settings: Settings, topic: str, offset: int) -> None:
    admin = AdminClient(kafka.client_config(settings))
    for future in admin.delete_records([confluent_kafka.TopicPartition(topic, 0, offset)]).values():
        future.result()


def test_the_reader_reads_exactly_what_it_is_asked_for(topic: tuple[Settings, str]) -> None:
    reader = TopicReader(*topic)
    assert reader.ends() == {0: (0, 100), 1: (0, 0)}
    batches = reader.read({0: 10, 1: 0}, {0: 90, 1: 0})
    assert [(it.offset(), it.value()) for batch in batches for it in batch] == [
        (at, b"%d" % at) for at in range(10, 90)
    ]
    assert reader.low == {0: 10, 1: 0}
    assert reader.holes == {}
    message = reader.one(0, 42)
    assert message is not None
    assert message.value() == b"42"


def test_the_reader_sees_what_retention_deletes_meanwhile(topic: tuple[Settings, str]) -> None:
    reader = TopicReader(*topic)
    delete_before(*topic, 30)
    assert reader.ends()[0] == (30, 100)
    # As if those had been deleted between a look at the ends and the reading.
    offsets = [it.offset() for batch in reader.read({0: 10, 1: 0}, {0: 100, 1: 0}) for it in batch]
    assert offsets == [*range(30, 100)]
    assert reader.low == {0: 30, 1: 0}
    assert reader.holes == {}
    assert reader.one(0, 29) is None


def test_the_reader_ends_when_everything_is_deleted(topic: tuple[Settings, str]) -> None:
    reader = TopicReader(*topic)
    delete_before(*topic, 100)
    assert [*reader.read({0: 0, 1: 0}, {0: 100, 1: 0})] == []
    assert reader.low == {0: 100, 1: 0}


def test_the_reader_knows_a_topic_that_is_not_there(stack: RunningStack) -> None:
    assert TopicReader(stack.settings, "no-such-topic").ends() == {}
