"""The bytes of COPY are those that psycopg would send, and of equal keys the last one is kept."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.adapt import PyFormat, Transformer
from psycopg.types.numeric import Float8, Int2

from metrics_pipeline.copy_sink import copy_format, tags
from metrics_pipeline.copy_sink.batch import BatchDecoder
from metrics_pipeline.copy_sink.canonical import EMPTY, ReadingColumns
from metrics_pipeline.copy_sink.store import latest
from metrics_pipeline.metric import EPOCH, MetricName, Reading, check_tags, encode
from metrics_pipeline_tests.fake_sink import FakeMessage, copied
from metrics_pipeline_tests.test_metric import readings, tags_strategy

Row = tuple[bytes, ...]


def columns_of(made: Sequence[Reading]) -> tuple[ReadingColumns, Sequence[bytes]]:
    batch = BatchDecoder().decode([FakeMessage(0, at, *encode(reading)) for at, reading in enumerate(made)], {})
    assert len(batch.columns) == len(made)
    return batch.columns, batch.tags


def by_psycopg(reading: Reading) -> Row:
    """The row's fields as psycopg's own binary dumpers write them."""
    transformer = Transformer()
    fields = [
        reading.device_id,
        reading.published_at.astimezone(UTC),
        Int2(reading.metric_name),
        Float8(reading.value),
        list(reading.tags),
    ]
    return tuple(
        bytes(field) for field in transformer.dump_sequence(fields, [PyFormat.BINARY] * 5) if field is not None
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(readings, max_size=20))
def test_the_bytes_are_those_of_psycopg(made: list[Reading]) -> None:
    # An empty list has no type of its own for psycopg: what PostgreSQL sends for an empty text[] stands for it.
    expected = [
        by_psycopg(reading) if reading.tags else (*by_psycopg(reading)[:4], struct.pack(">iii", 0, 0, 25))
        for reading in made
    ]
    assert sorted(copied(b"".join(copy_format.copy_rows(*columns_of(made))))) == sorted(expected)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.sampled_from(["", "a", "bb", "é✓", "x" * 256, '"\\']), max_size=4), max_size=40))
def test_any_mix_of_tag_lengths_is_taken_apart_again(labels: list[list[str]]) -> None:
    made = [Reading(UUID(int=at), EPOCH, 10, float(at), entry) for at, entry in enumerate(labels)]
    columns, encoded = columns_of(made)
    chosen = columns.take(np.arange(len(columns))[::2])
    for part, those in ((columns, made), (chosen, made[::2])):
        data = b"".join(copy_format.copy_rows(part, encoded))
        assert sorted(row[0] + row[4] for row in copied(data)) == [
            r.device_id.bytes + tags.encode_tags(r.tags) for r in those
        ]


def test_no_rows_are_a_header_and_an_end() -> None:
    assert b"".join(copy_format.copy_rows(EMPTY, [])) == copy_format.BEGIN + copy_format.END
    assert b"PGCOPY\n\xff\r\n\x00" + struct.pack(">ii", 0, 0) == copy_format.BEGIN


def test_one_row_byte_for_byte() -> None:
    reading = Reading(UUID(int=1), EPOCH - timedelta(microseconds=1), 50, -0.0, ["é", ""])
    (_, row, _) = copy_format.copy_rows(*columns_of([reading]))
    assert row == (
        struct.pack(">h", 5)
        + struct.pack(">i", 16)
        + bytes(15)
        + b"\1"
        + struct.pack(">iq", 8, -1)
        + struct.pack(">ih", 2, 50)
        + struct.pack(">i", 8)
        + b"\x80"
        + bytes(7)
        + struct.pack(">i", 30)
        + struct.pack(">iiiii", 1, 0, 25, 2, 1)
        + struct.pack(">i", 2)
        + "é".encode()
        + struct.pack(">i", 0)
    )


@given(tags_strategy)
@settings(deadline=None, max_examples=60)
def test_tags_are_encoded_as_psycopg_does(labels: list[str]) -> None:
    check_tags(labels)
    encoded = tags.encode_tags(labels)
    if labels:
        (field,) = Transformer().dump_sequence([labels], [PyFormat.BINARY])
        assert field is not None
        assert encoded == bytes(field)
    else:
        assert encoded == struct.pack(">iii", 0, 0, 25)


moments = st.sampled_from(
    [EPOCH, EPOCH - timedelta(days=400_000), EPOCH + timedelta(microseconds=1), EPOCH.max.replace(tzinfo=UTC)]
)
devices = st.sampled_from([UUID(int=number) for number in (0, 1, 1 << 64, (1 << 128) - 1, 1 << 63, 1 << 127)])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(devices, moments, st.sampled_from([0, 10, 50])), max_size=40))
def test_of_equal_keys_the_last_is_kept_in_order_of_key(keys: list[tuple[UUID, datetime, int]]) -> None:
    columns, _ = columns_of([Reading(*key, float(at), []) for at, key in enumerate(keys)])
    kept = latest(columns)
    expected = {key: at for at, key in enumerate(keys)}
    assert kept.source.tolist() == [expected[key] for key in sorted(expected, key=lambda key: (key[0].bytes, *key[1:]))]
    assert kept.value.tolist() == [float(at) for at in kept.source.tolist()]


@pytest.mark.parametrize("code", list(MetricName))
def test_codes_and_their_order(code: MetricName) -> None:
    columns, _ = columns_of([Reading(UUID(int=1), EPOCH, int(code), 1.0, [])])
    assert latest(columns).metric_name.tolist() == [int(code)]
    assert len(latest(EMPTY)) == 0
