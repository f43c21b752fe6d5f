"""Readings for tests of the archive, as PostgreSQL has them, and what they add up to, computed once more and otherwise."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import md5
from uuid import UUID

import polars as pl
from hypothesis import strategies as st

from metrics_pipeline.archive import table
from metrics_pipeline.archive.manifest import Sums
from metrics_pipeline.archive.parquet import Metrics
from metrics_pipeline.metric import EPOCH, MAX_TAG_BYTES, MetricName

METRICS = Metrics({int(name): name.name.lower() for name in MetricName}, {int(name): name.unit for name in MetricName})
MICRO = timedelta(microseconds=1)
TEXT_OID = 25


@dataclass(frozen=True, order=True)
class Stored:
    """A row of `metrics`."""

    device_id: UUID
    published_at: datetime
    metric_name: int
    value: float
    tags: tuple[str | None, ...]
    created_at: datetime

    def key(self) -> tuple[UUID, datetime, int]:
        return self.device_id, self.published_at, self.metric_name

    def row(self) -> bytes:
        """As binary COPY has it, in the order of `archive_rows.sql`."""
        fields = [
            self.device_id.bytes,
            struct.pack(">q", micros(self.published_at)),
            struct.pack(">h", self.metric_name),
            struct.pack(">d", self.value),
            struct.pack(">q", micros(self.created_at)),
            array(self.tags),
        ]
        return struct.pack(">h", 6) + b"".join(struct.pack(">i", len(field)) + field for field in fields)


def micros(moment: datetime) -> int:
    return (moment - EPOCH) // MICRO


def array(tags: Sequence[str | None]) -> bytes:
    if not tags:
        return struct.pack(">iii", 0, 0, TEXT_OID)
    begin = struct.pack(">iiiii", 1, None in tags, TEXT_OID, len(tags), 1)
    texts = [None if tag is None else tag.encode() for tag in tags]
    return begin + b"".join(
        struct.pack(">i", -1) if text is None else struct.pack(">i", len(text)) + text for text in texts
    )


def sums(rows: Sequence[Stored]) -> Sums:
    """By Python's hashlib, row by row."""

    def of(*parts: str) -> int:
        return int(md5("".join(parts).encode(), usedforsecurity=False).hexdigest()[:15], 16)

    totals = [0, 0, 0, 0]
    for row in rows:
        key = f"{row.device_id}{struct.pack('>q', micros(row.published_at)).hex()}{row.metric_name}"
        others = (
            "",
            struct.pack(">d", row.value).hex(),
            array(row.tags).hex(),
            struct.pack(">q", micros(row.created_at)).hex(),
        )
        totals = [total + of(key, other) for total, other in zip(totals, others, strict=True)]
    return Sums(len(rows), *totals)


FIRST, LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


def times(last: datetime = LAST) -> st.SearchStrategy[datetime]:
    """Times from the year 1 on, all of them alike, and a few near the ends and where the clocks count from."""
    known = [moment for moment in (FIRST, EPOCH - MICRO, EPOCH, datetime(1970, 1, 1, tzinfo=UTC)) if moment <= last]
    every = st.integers(0, (last - FIRST) // MICRO).map(lambda number: FIRST + number * MICRO)
    return every | st.sampled_from([*known, last])


VALUES = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=True) | st.sampled_from(
    [0.0, -0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1]
)
TAGS = st.lists(
    st.none()
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])).filter(
        lambda tag: len(tag.encode()) <= MAX_TAG_BYTES
    ),
    max_size=5,
).map(tuple)
"""A sink stores no NULL among tags, and the table takes one."""


def rows(published: st.SearchStrategy[datetime] | None = None) -> st.SearchStrategy[list[Stored]]:
    """Rows with different keys, in the order of these."""
    row = st.builds(
        Stored,
        device_id=st.integers(0, 3).map(lambda number: UUID(int=number)) | st.uuids(),
        published_at=times() if published is None else published,
        metric_name=st.sampled_from(sorted(int(name) for name in MetricName)),
        value=VALUES,
        tags=TAGS,
        created_at=times(),
    )
    return st.lists(row, max_size=30, unique_by=Stored.key).map(lambda found: sorted(found, key=Stored.key))


def simple(count: int, begin: datetime) -> list[Stored]:
    """Rows of three devices, in the order of their keys, from a time on."""
    found = [
        Stored(
            UUID(int=number % 3 + 1),
            begin + timedelta(milliseconds=number),
            number % 6 * 10,
            number / 7,
            ("site:ä", f"floor:{number % 4}") if number % 5 else (),
            begin + timedelta(seconds=number),
        )
        for number in range(count)
    ]
    return sorted(found, key=Stored.key)


def frames(found: Sequence[Stored], size: int = 1000) -> Iterator[pl.DataFrame]:
    """As `table.frames` gives them."""
    for at in range(0, len(found), size):
        yield table.frame_of([row.row() for row in found[at : at + size]], METRICS)
