"""The comparison of topic and table against a naive oracle, and the parts it is made of."""

from __future__ import annotations

import hashlib
import random
import struct
import tempfile
import tracemalloc
import uuid
from array import array
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metrics_pipeline.errors import InstallError
from metrics_pipeline.metric import EPOCH, Reading, encode
from metrics_pipeline.partitioner import murmur2, partition, partitions_of
from metrics_pipeline.verification.claims import Claim, anomalies, unclaimed
from metrics_pipeline.verification.comparison import Bounds, Comparison, ComparisonCounts, KeyFinding
from metrics_pipeline.verification.spill import KEY, RECORD, ROW, Rows, Spill, bucket_of, buckets_for
from metrics_pipeline.verification.topic_entries import TopicDecoder, tags_digest, together
from metrics_pipeline.verification.verify import VerifyReport, unaccounted

DEVICES = [uuid.UUID(int=number << 64 | 7) for number in range(4)]
START = datetime(2026, 11, 22, 16, tzinfo=UTC)


@dataclass(frozen=True)
class Key:
    device: int = 0
    time: int = 0
    metric: int = 10

    def entry(self) -> tuple[bytes, int, int]:
        moment = START + timedelta(microseconds=self.time) - EPOCH
        return DEVICES[self.device].bytes, moment // timedelta(microseconds=1), self.metric

    def home(self, partitions: int) -> int:
        published_at = START + timedelta(microseconds=self.time)
        return partition(encode(Reading(DEVICES[self.device], published_at, self.metric, 0.0, []))[0], partitions)


@dataclass(frozen=True)
class Record:
    key: Key
    value: float
    partition: int
    offset: int
    tags: tuple[str, ...] = ("a",)
    arrived: int = 0

    def entry(self) -> tuple[Any, ...]:
        digest = tags_digest(list(self.tags))
        return self.key.entry(), bits(self.value), digest, self.partition, self.offset, self.arrived


@dataclass(frozen=True)
class Row:
    key: Key
    value: float
    tags: tuple[str, ...] = ("a",)
    created: int = 0

    def entry(self) -> tuple[Any, ...]:
        return self.key.entry(), bits(self.value), tags_digest(list(self.tags)), self.created


def bits(value: float) -> int:
    return int.from_bytes(struct.pack(">d", value), "big")


def entries(things: Iterable[Record | Row], dtype: np.dtype[Any]) -> Rows:
    return np.array([thing.entry() for thing in things], dtype)


def compare(
    folder: Path, records: Iterable[Record], rows: Iterable[Row], bounds: Bounds, buckets: int = 4
) -> tuple[ComparisonCounts, list[KeyFinding]]:
    with (
        Spill(folder, RECORD, buckets, chunk=3) as left,
        Spill(folder, ROW, buckets, chunk=2) as right,
        Comparison(bounds, folder) as comparison,
    ):
        for record in records:
            left.append(entries([record], RECORD))
        right.append(entries(rows, ROW))
        for bucket in range(buckets):
            comparison.bucket(left.bucket(bucket), right.bucket(bucket))
        return comparison.finish(), comparison.findings


def whole(end: int = 100, partitions: int = 2) -> Bounds:
    return Bounds(dict.fromkeys(range(partitions), 0), dict.fromkeys(range(partitions), end))


A, B = Key(0), Key(1)


# --- The cases one by one ----------------------------------------------------------------------------------------

CASES: dict[str, tuple[list[Record], list[Row], Bounds, ComparisonCounts]] = {
    "equal": ([Record(A, 1.5, 0, 0)], [Row(A, 1.5)], whole(), ComparisonCounts(compared=1)),
    "nothing at all": ([], [], whole(), ComparisonCounts()),
    "lost": ([Record(A, 1.5, 0, 0), Record(B, 1.0, 0, 1)], [Row(B, 1.0)], whole(), ComparisonCounts(compared=1, lost=1)),
    "unexpected": ([Record(A, 1.5, 0, 0)], [Row(A, 1.5), Row(B, 1.0)], whole(), ComparisonCounts(compared=1, unexpected=1)),
    "another value": ([Record(A, 1.5, 0, 0)], [Row(A, 1.25)], whole(), ComparisonCounts(compared=1, different=1)),
    "the last bit": ([Record(A, 0.1, 0, 0)], [Row(A, 0.1 + 2**-56)], whole(), ComparisonCounts(compared=1, different=1)),
    "other tags": ([Record(A, 1.5, 0, 0)], [Row(A, 1.5, ("b",))], whole(), ComparisonCounts(compared=1, different=1)),
    "tags in another order": (
        [Record(A, 1.5, 0, 0, ("a", "b"))], [Row(A, 1.5, ("b", "a"))], whole(), ComparisonCounts(compared=1, different=1)
    ),
    "no tags": ([Record(A, 1.5, 0, 0, ())], [Row(A, 1.5, ())], whole(), ComparisonCounts(compared=1)),
    "the last offset wins": (
        [Record(A, 1.0, 0, 0), Record(A, 2.0, 0, 1)], [Row(A, 2.0)], whole(), ComparisonCounts(compared=1)
    ),
    "an earlier offset won": (
        [Record(A, 1.0, 0, 0), Record(A, 2.0, 0, 1)], [Row(A, 1.0)], whole(), ComparisonCounts(compared=1, different=1)
    ),
    "one key in two partitions": (
        [Record(A, 1.0, 0, 5), Record(A, 2.0, 1, 1)], [Row(A, 1.0)], whole(), ComparisonCounts(compared=1)
    ),
    "not yet written": ([Record(A, 1.0, 0, 100)], [], whole(), ComparisonCounts()),
    "written early": ([Record(A, 1.0, 0, 100)], [Row(A, 1.0)], whole(), ComparisonCounts(compared=1)),
    "old value, newer record on its way": (
        [Record(A, 1.0, 0, 0), Record(A, 2.0, 0, 100)], [Row(A, 1.0)], whole(), ComparisonCounts(compared=1)
    ),
    "newer value already there": (
        [Record(A, 1.0, 0, 0), Record(A, 2.0, 0, 100), Record(A, 3.0, 0, 101)],
        [Row(A, 2.0)], whole(), ComparisonCounts(compared=1),
    ),
    "neither the old nor the newer value": (
        [Record(A, 1.0, 0, 0), Record(A, 2.0, 0, 100)], [Row(A, 3.0)], whole(), ComparisonCounts(compared=1, different=1)
    ),
    "only a newer record, another value": (
        [Record(A, 2.0, 0, 100)], [Row(A, 3.0)], whole(), ComparisonCounts(compared=1, different=1)
    ),
    "sign of zero lost": ([Record(A, -0.0, 0, 0)], [Row(A, 0.0)], whole(), ComparisonCounts(compared=1, signless_zero=1)),
    "sign of zero kept": ([Record(A, -0.0, 0, 0)], [Row(A, -0.0)], whole(), ComparisonCounts(compared=1)),
    "sign of a number lost": ([Record(A, -5e-324, 0, 0)], [Row(A, 5e-324)], whole(), ComparisonCounts(compared=1, different=1)),
    "sign of zero lost and other tags": (
        [Record(A, -0.0, 0, 0)], [Row(A, 0.0, ())], whole(), ComparisonCounts(compared=1, different=1)
    ),
    "among the dead letters": (
        [Record(A, 1.0, 0, 3)], [], replace(whole(), rejected={0: np.array([1, 3])}), ComparisonCounts(rejected=1)
    ),
    "a dead letter after a stored one": (
        [Record(A, 1.0, 0, 0), Record(A, 2.0, 0, 3)],
        [Row(A, 1.0)], replace(whole(), rejected={0: np.array([3])}), ComparisonCounts(compared=1, rejected=1),
    ),
    "a dead letter of another partition": (
        [Record(A, 1.0, 0, 3)], [], replace(whole(), rejected={1: np.array([3])}), ComparisonCounts(lost=1)
    ),
    "deleted meanwhile": (
        [Record(A, 1.0, 0, 9)], [Row(A, 1.0, created=5)], replace(whole(), low={0: 10, 1: 0}), ComparisonCounts(unverifiable=1)
    ),
    "a newer record of a key whose older one is deleted": (
        [Record(A, 2.0, 0, 100)], [Row(A, 1.0)], replace(whole(), low={0: 10, 1: 0}), ComparisonCounts(compared=1, unverifiable=1)
    ),
    "different though some are deleted": (
        [Record(A, 2.0, 0, 99)], [Row(A, 1.0)], replace(whole(), low={0: 10, 1: 0}), ComparisonCounts(compared=1, different=1)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("records", "rows", "bounds", "counts"), CASES.values(), ids=CASES.keys())
def test_cases(
    tmp_path: Path, records: list[Record], rows: list[Row], bounds: Bounds, counts: ComparisonCounts
) -> None:
    assert compare(tmp_path, records, rows, bounds)[0] == counts


def test_findings_name_key_place_and_both_values(tmp_path: Path) -> None:
    c = Key(2, 1, 0)
    _, findings = compare(
        tmp_path,
        [Record(A, 1.0, 0, 3), Record(A, 1.5, 0, 4), Record(B, 2.0, 1, 7), Record(B, 3.0, 1, 120)],
        [Row(B, 2.5, ("x",)), Row(c, 9.0)],
        whole(),
        buckets=1,
    )
    lost, different, unexpected = sorted(findings, key=lambda it: ["lost", "different", "unexpected"].index(it.kind))
    assert lost == KeyFinding("lost", DEVICES[0], "2026-11-22T16:00:00Z", 10, 0, 4, 1.5, None)
    assert different == KeyFinding(
        "different", DEVICES[1], "2026-11-22T16:00:00Z", 10, 1, 7, 2.0, 2.5, tags_differ=True
    )
    assert unexpected == KeyFinding(
        "unexpected", DEVICES[2], "2026-11-22T16:00:00.000001Z", 0, c.home(2), None, None, 9.0
    )


def test_ten_of_each_kind_are_named(tmp_path: Path) -> None:
    lost = [Record(Key(0, at), 1.0, 0, at) for at in range(15)]
    stray = [Row(Key(1, at), 1.0) for at in range(15)]
    counts, findings = compare(tmp_path, lost, stray, whole())
    assert (counts.lost, counts.unexpected) == (15, 15)
    assert sorted(it.kind for it in findings) == ["lost"] * 10 + ["unexpected"] * 10


# --- Retention ---------------------------------------------------------------------------------------------------


def keys_at(home: int, count: int, partitions: int = 2) -> list[Key]:
    return list(islice((key for at in range(10_000) if (key := Key(0, at, 30)).home(partitions) == home), count))


def test_rows_older_than_the_first_insertion_retained_cannot_be_verified(tmp_path: Path) -> None:
    old, before, stray, first, second = keys_at(0, 5)
    (other,) = keys_at(1, 1)
    records = [
        Record(old, 1.0, 0, 10, arrived=500),  # its row was inserted by a record that is gone
        Record(first, 1.0, 0, 11, arrived=700),
        Record(second, 1.0, 0, 12, arrived=800),
    ]
    rows = [
        Row(old, 1.0, created=100),
        Row(first, 1.0, created=750),
        Row(second, 1.0, created=850),
        Row(before, 5.0, created=750),
        Row(stray, 5.0, created=751),
        Row(other, 5.0, created=9999),  # nothing is retained in its partition that could tell
    ]
    counts, findings = compare(tmp_path, records, rows, Bounds({0: 10, 1: 0}, {0: 100, 1: 0}))
    assert counts == ComparisonCounts(compared=3, unexpected=1, unverifiable=2)
    assert [(it.kind, it.row_value, it.published_at) for it in findings] == [
        ("unexpected", 5.0, f"{START + timedelta(microseconds=stray.time):%Y-%m-%dT%H:%M:%S.%fZ}")
    ]


def test_what_was_dropped_from_the_table_is_expired_and_not_lost(tmp_path: Path) -> None:
    """By the time of the reading: the same record a microsecond later is lost; one that was brought back is compared."""
    edge = Key(0, 100).entry()[1]
    records = [
        Record(Key(0, 99), 1.0, 0, 1),
        Record(Key(0, 99), 2.0, 0, 5),  # once more: still one key
        Record(Key(0, 100), 1.0, 0, 2),
        Record(Key(0, 98), 1.0, 0, 3),
        Record(Key(0, 97), 1.0, 0, 4),
        Record(Key(0, 96), 1.0, 0, 200),  # not read by the sink yet
    ]
    rows = [Row(Key(0, 98), 1.0), Row(Key(0, 97), 3.0)]
    bounds = replace(whole(), retained_from=edge)
    counts, findings = compare(tmp_path, records, rows, bounds)
    assert counts == ComparisonCounts(compared=2, lost=1, expired=1, different=1)
    assert {(it.kind, it.offset) for it in findings} == {("lost", 2), ("different", 4)}
    assert compare(tmp_path, records, rows, whole())[0].expired == 0


def test_what_expired_has_a_line_of_its_own() -> None:
    report = VerifyReport(counts=ComparisonCounts(expired=1234))
    assert report.clean
    assert "1,234 records of a time that has been dropped from the table (expired)" in report.lines()
    assert report.document()["expired"] == 1234


def moved_key(before: int, after: int) -> Key:
    """One that has another home among more partitions."""
    return next(key for key in (Key(0, time) for time in range(1000)) if key.home(before) != key.home(after))


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_after_a_growth_the_record_at_the_key_s_present_home_counts(tmp_path: Path, value: float) -> None:
    key = moved_key(2, 4)
    records = [Record(key, 1.0, key.home(2), 9), Record(key, 2.0, key.home(4), 0)]
    bounds = whole(partitions=4)
    counts, _ = compare(tmp_path, records, [Row(key, value)], replace(bounds, counts=(2, 4)))
    assert (counts.compared, counts.different) == (1, int(value == 1.0))
    counts, _ = compare(tmp_path, records, [Row(key, value)], bounds)
    assert counts.different == 0, "it never grew: whoever chose the partitions knows which is newer"


def test_a_record_at_no_home_of_its_key_may_explain_the_row_after_a_growth(tmp_path: Path) -> None:
    key = moved_key(2, 4)
    elsewhere = next(number for number in range(4) if number not in (key.home(2), key.home(4)))
    records = [Record(key, 1.0, elsewhere, 0), Record(key, 2.0, key.home(4), 0)]
    for value in (1.0, 2.0):
        counts, _ = compare(tmp_path, records, [Row(key, value)], replace(whole(partitions=4), counts=(2, 4)))
        assert counts.different == 0


def test_rows_of_a_former_log_cannot_be_verified(tmp_path: Path) -> None:
    old, new = [Row(key, 1.0, created=10) for key in keys_at(0, 3)], keys_at(0, 4)[3]
    late = Row(keys_at(0, 5)[4], 1.0, created=30)
    records, rows = [Record(new, 1.0, 0, 0, arrived=20)], [*old, Row(new, 1.0, created=21), late]
    counts, _ = compare(tmp_path, records, rows, replace(whole(), former=True))
    assert (counts.unverifiable, counts.unexpected, counts.compared) == (3, 1, 1)
    counts, _ = compare(tmp_path, records, rows, whole())
    assert counts.unexpected == 4


def test_a_clock_of_the_producer_tells_nothing_about_insertions(tmp_path: Path) -> None:
    first, stray = keys_at(0, 2)
    never = np.iinfo(np.int64).max
    records = [Record(first, 1.0, 0, 11, arrived=never)]
    rows = [Row(first, 1.0, created=750), Row(stray, 5.0, created=800)]
    counts, _ = compare(tmp_path, records, rows, Bounds({0: 10, 1: 0}, {0: 100, 1: 0}))
    assert counts == ComparisonCounts(compared=1, unverifiable=1)


# --- Against a naive oracle --------------------------------------------------------------------------------------

VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.0])
KEYS = st.builds(Key, st.integers(0, 1), st.integers(0, 2), st.sampled_from([0, 10]))
TAGS = st.sampled_from([(), ("a",), ("b", "c")])


@dataclass
class Oracle:
    """The rules, said as plainly as possible, one key at a time."""

    records: list[Record]
    rows: list[Row]
    end: int
    rejected: set[tuple[int, int]]
    counts: ComparisonCounts = field(default_factory=ComparisonCounts)

    def run(self) -> ComparisonCounts:
        stored = {row.key: row for row in self.rows}
        for key in {record.key for record in self.records} | set(stored):
            self.key([record for record in self.records if record.key == key], stored.get(key))
        return self.counts

    def key(self, records: list[Record], row: Row | None) -> None:
        rejected = [it for it in records if (it.partition, it.offset) in self.rejected]
        self.counts.rejected += len(rejected)
        required = [it for it in records if it.offset < self.end and it not in rejected]
        last = {it.partition: it for it in sorted(required, key=lambda it: it.offset)}
        allowed = [*last.values(), *(it for it in records if it not in required)]
        if row is None:
            self.counts.lost += bool(required)
            return
        if not records:
            self.counts.unexpected += 1
            return
        self.counts.compared += 1
        if any((bits(it.value), it.tags) == (bits(row.value), row.tags) for it in allowed):
            return
        if bits(row.value) == 0 and any((bits(it.value), it.tags) == (bits(-0.0), row.tags) for it in allowed):
            self.counts.signless_zero += 1
        else:
            self.counts.different += 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), end=st.integers(0, 6), buckets=st.sampled_from([1, 2, 8]))
def test_the_comparison_agrees_with_the_oracle(tmp_path: Path, data: st.DataObject, end: int, buckets: int) -> None:
    places = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), unique=True, max_size=12))
    records = [Record(data.draw(KEYS), data.draw(VALUES), *place, data.draw(TAGS)) for place in places]
    stored = data.draw(st.lists(KEYS, unique=True))
    rows = [Row(key, data.draw(VALUES), data.draw(TAGS)) for key in stored]
    rejected = set(data.draw(st.lists(st.sampled_from(places)))) if places else set()
    bounds = replace(
        whole(end), rejected={home: np.array(sorted(o for p, o in rejected if p == home), np.int64) for home in (0, 1)}
    )
    random.Random(0).shuffle(records)
    assert compare(tmp_path, records, rows, bounds, buckets)[0] == Oracle(records, rows, end, rejected).run()


# --- Spill -------------------------------------------------------------------------------------------------------


def test_a_spill_gives_every_entry_back_in_its_bucket(tmp_path: Path) -> None:
    rnd = random.Random(1)
    rows = [Row(Key(rnd.randrange(4), rnd.randrange(10**6), 30), rnd.random(), created=at) for at in range(1000)]
    with Spill(tmp_path, ROW, 16, chunk=150) as spill:
        for start in range(0, 1000, 70):
            spill.append(entries(rows[start : start + 70], ROW))
        buckets = [spill.bucket(number) for number in range(16)]
        chunks = np.concatenate([*spill.chunks()], dtype=ROW)
    for number, bucket in enumerate(buckets):
        assert (bucket_of(bucket["key"], 16) == number).all()
        assert (np.diff(bucket["created_at"].astype(int)) > 0).all()
    assert sorted(np.concatenate(buckets, dtype=ROW).tolist()) == sorted(entries(rows, ROW).tolist())
    assert sorted(chunks.tolist()) == sorted(entries(rows, ROW).tolist())
    assert min(map(len, buckets)) > 20
    assert not [*tmp_path.iterdir()]


def test_buckets_stay_small() -> None:
    assert [buckets_for(count) for count in (0, 1, 200_000, 200_001, 10_000_000)] == [1, 1, 1, 2, 64]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no device that is always full")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full.open("r+b", buffering=0))
    with Spill(tmp_path, ROW, 1, chunk=1) as spill, pytest.raises(InstallError, match=r"no space .* PIPELINE_DATA_DIR"):
        spill.append(entries([Row(A, 1.0)], ROW))


def test_memory_does_not_grow_with_what_is_compared(tmp_path: Path) -> None:
    step, steps, buckets = 20_000, 30, 32

    def part(dtype: np.dtype[Any], number: int) -> Rows:
        entries = np.zeros(step, dtype)
        entries["key"]["published_at"] = np.arange(number * step, (number + 1) * step)
        if "offset" in (dtype.names or ()):
            entries["offset"] = entries["key"]["published_at"]
        return entries

    tracemalloc.start()
    try:
        with (
            Spill(tmp_path, RECORD, buckets, step) as records,
            Spill(tmp_path, ROW, buckets, step) as rows,
            Comparison(whole(step * steps, 1), tmp_path) as comparison,
        ):
            for number in range(steps):
                records.append(part(RECORD, number))
                rows.append(part(ROW, number))
            for bucket in range(buckets):
                comparison.bucket(records.bucket(bucket), rows.bucket(bucket))
            assert comparison.finish() == ComparisonCounts(compared=step * steps)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = step * steps * (RECORD.itemsize + ROW.itemsize)
    assert peak < size / 4, f"{peak:,} bytes for {size:,}"


# --- Partitions --------------------------------------------------------------------------------------------------

JAVA = {  # from Kafka's own UtilsTest
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


@pytest.mark.parametrize("data", JAVA)
def test_murmur2_is_that_of_the_java_client(data: bytes) -> None:
    assert murmur2(data) == JAVA[data] % 2**32


@given(
    st.lists(
        st.tuples(
            st.uuids(),
            st.datetimes(timezones=st.just(UTC)),
            st.sampled_from([0, 10, 50]),
            st.booleans(),
        )
    ),
    st.integers(1, 12),
)
def test_partitions_of_many_keys_are_those_of_each(
    keys: list[tuple[uuid.UUID, datetime, int, bool]], partitions: int
) -> None:
    readings = [
        Reading(device, moment.replace(microsecond=0 if whole else moment.microsecond), metric, 0.0, [])
        for device, moment, metric, whole in keys
    ]
    packed = np.array(
        [
            (it.device_id.bytes, (it.published_at - EPOCH) // timedelta(microseconds=1), it.metric_name)
            for it in readings
        ],
        KEY,
    )
    assert partitions_of(packed, partitions).tolist() == [partition(encode(it)[0], partitions) for it in readings]


# --- Records -----------------------------------------------------------------------------------------------------


class FakeMessage:
    """What the decoder uses of a message."""

    def __init__(self, key: bytes | None, value: bytes | None, offset: int, kind: int = 2) -> None:
        self._key, self._value, self._offset, self._kind = key, value, offset, kind

    def key(self) -> bytes | None:
        return self._key

    def value(self) -> bytes | None:
        return self._value

    def error(self) -> None:
        return None

    def partition(self) -> int:
        return 3

    def offset(self) -> int:
        return self._offset

    def timestamp(self) -> tuple[int, int]:
        return self._kind, 946684800001


def test_messages_become_entries_and_the_others_are_counted() -> None:
    reading = Reading(DEVICES[1], START + timedelta(microseconds=5), 30, -0.0, ["ü", ""])
    key, value = encode(reading)
    decoder = TopicDecoder()
    found = decoder.entries(
        [
            FakeMessage(key, value, 7),  # type: ignore[list-item]
            FakeMessage(key, None, 8),  # type: ignore[list-item]
            FakeMessage(key, b"{", 9),  # type: ignore[list-item]
            FakeMessage(None, value, 10),  # type: ignore[list-item]
            FakeMessage(key, value, 11, kind=1),  # type: ignore[list-item]
        ]
    )
    never = np.iinfo(np.int64).max
    expected = [
        Record(Key(1, 5, 30), -0.0, 3, 7, ("ü", ""), 1000),
        Record(Key(1, 5, 30), -0.0, 3, 11, ("ü", ""), never),
    ]
    assert found.tolist() == entries(expected, RECORD).tolist()
    assert (decoder.tombstones, decoder.undecodable) == (1, {3: array("q", [9, 10])})
    assert decoder.reasons == {"bad_json": 1, "no_key": 1}


def test_the_digest_of_tags_is_that_of_postgresqls_binary_form() -> None:
    # array_send('{}'::text[]) and array_send('{ä,""}'::text[]), as PostgreSQL 17 prints them.
    for tags, sent in {
        (): "000000000000000000000019",
        ("ä", ""): "000000010000000000000019000000020000000100000002c3a400000000",
    }.items():
        assert tags_digest(list(tags)) == hashlib.md5(bytes.fromhex(sent)).digest()


# --- Claims ------------------------------------------------------------------------------------------------------

CLAIMS: dict[str, tuple[list[Claim], dict[int, list[tuple[int, int]]], list[str]]] = {
    "none": ([], {}, []),
    "side by side": ([Claim("a", 0, 5, [(0, 3), (5, 7)]), Claim("b", 0, 2, [(3, 5)]), Claim("c", 1, 9, [(1, 10)])], {}, []),
    "nothing acknowledged": ([Claim("a", 0, 0, [])], {}, []),
    "miscounted": ([Claim("a", 0, 6, [(0, 3), (5, 7)])], {}, ["run a counted 6 acknowledgements in partition 0, at 5 offsets"]),
    "beyond the end": (
        [Claim("a", 0, 12, [(0, 4), (6, 14)])],
        {},
        ["run a was acknowledged 4 offsets of partition 0 up to 13, and the partition ends before 10"],
    ),
    "no such partition": (
        [Claim("a", 7, 1, [(0, 1)])],
        {},
        ["run a was acknowledged 1 offsets of partition 7 up to 0, and the partition ends before 0"],
    ),
    "two runs at one offset": (
        [Claim("a", 0, 6, [(0, 6)]), Claim("b", 0, 6, [(4, 10)])],
        {},
        ["runs a and b were both acknowledged offsets 4 to 5 of partition 0"],
    ),
    "one inside another": (
        [Claim("a", 0, 9, [(0, 9)]), Claim("b", 0, 2, [(1, 3)]), Claim("c", 0, 2, [(5, 7)])],
        {},
        [
            "runs a and b were both acknowledged offsets 1 to 2 of partition 0",
            "runs a and c were both acknowledged offsets 5 to 6 of partition 0",
        ],
    ),
    "no record there": (
        [Claim("a", 0, 9, [(0, 9)])],
        {0: [(7, 12)], 1: [(0, 5)]},
        ["run a was acknowledged offsets 7 to 8 of partition 0, and the topic holds no record there"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("claims", "holes", "found"), CLAIMS.values(), ids=CLAIMS.keys())
def test_claims(claims: list[Claim], holes: dict[int, list[tuple[int, int]]], found: list[str]) -> None:
    assert anomalies(claims, {0: 10, 1: 10}, holes) == found


def test_what_no_run_wrote_down_is_counted() -> None:
    claims = [Claim("a", 0, 5, [(0, 3), (5, 7)]), Claim("b", 0, 4, [(6, 10)]), Claim("c", 1, 30, [(0, 30)])]
    assert unclaimed(claims, {0: 1, 1: 0}, {0: 12, 1: 20, 2: 4}) == 2 + 2 + 4
    assert unclaimed([], {0: 3}, {0: 5}) == 2


# --- The report --------------------------------------------------------------------------------------------------


def test_only_dead_letters_and_rejects_account_for_undecodable_records() -> None:
    bounds = Bounds({0: 5, 1: 0}, {0: 20, 1: 20})
    known = together({0: np.array([7])}, {0: np.array([3, 9]), 2: np.array([7])})
    assert {partition: offsets.tolist() for partition, offsets in known.items()} == {0: [3, 7, 9], 2: [7]}
    assert unaccounted({0: array("q", [4, 6, 7, 9, 20]), 1: [7]}, bounds, known) == [(0, 6), (1, 7)]


@pytest.mark.parametrize(
    ("report", "clean"),
    [
        (VerifyReport(), True),
        (VerifyReport(counts=ComparisonCounts(lost=1)), False),
        (VerifyReport(counts=ComparisonCounts(unexpected=1)), False),
        (VerifyReport(counts=ComparisonCounts(different=1)), False),
        (VerifyReport(unaccounted=1), False),
        (VerifyReport(anomalies=["x"]), False),
        (VerifyReport(counts=ComparisonCounts(signless_zero=1)), True),
        (VerifyReport(counts=ComparisonCounts(signless_zero=1), strict=True), False),
        (
            VerifyReport(
                counts=ComparisonCounts(compared=9, unverifiable=1, rejected=1),
                undecodable={"bad_json": 1},
                tombstones=1,
            ),
            True,
        ),
    ],
    ids=lambda it: str(astuple(it)) if isinstance(it, VerifyReport) else "",
)
def test_what_is_clean(report: VerifyReport, clean: bool) -> None:
    assert report.clean is clean
    assert report.lines()[0].startswith("clean: " if clean else "NOT CLEAN: ")
    assert report.document()["clean"] is clean
