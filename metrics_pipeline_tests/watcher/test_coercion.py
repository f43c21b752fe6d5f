"""What Kafka Connect makes of bad records; `integration/test_watcher.py` holds a real one to it, kind by kind."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics_pipeline.metric import Reading, check, decode, encode
from metrics_pipeline.watcher.coercion import CoercedRow, coerced_row
from metrics_pipeline_tests.test_metric import REFUSED, readings, reason_of
from metrics_pipeline_tests.watcher.coerced import COERCED, compact, key_of, row_of, value_of

DEVICE = UUID("0f8fad5b-d9cb-469f-a165-70867728950e")

NOT_STORED = {
    "tombstone",
    "tombstone without key",
    "null key",
    "empty value",
    "empty key",
    "not JSON",
    "cut off",
    "JSON null",
    "array",
    "NaN token",
    "Infinity token",
    "nested too deep",
    "no device in the value",
    "no tags in the value",
    "no metric in the key",
    "36 spaces",
    "uuid as a number",
    "uuid null",
    "no zone",
    "comma",
    "space",
    "basic format",
    "week date",
    "offset of a day",
    "29 February",
    "leap second",
    "hour 24",
    "year 0",
    "year 0 in UTC",
    "year 10000 in UTC",
    "year 294277",
    "line feed after it",
    "digits of another script",
    "seconds since 1970",
    "unknown code",
    "code beyond int16",
    "value null",
    "value beyond a double",
    "integer beyond a double",
    "tags null",
    "a number among the tags",
    "null among the tags",
    "NUL in a tag",
    "bad uuid in the key only",
}
"""Of the records that are refused: those of which Connect stores nothing. Of the rest it does, or it may."""


@pytest.mark.parametrize("name", COERCED)
def test_each_kind(name: str) -> None:
    bad = COERCED[name](DEVICE)
    assert reason_of(*bad.wire) == bad.reason
    assert coerced_row(*bad.wire) == bad.row


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_stored(name: str) -> None:
    _, key, value = REFUSED[name]
    assert (coerced_row(key, value) is None) == (name in NOT_STORED)


@given(readings)
def test_a_good_reading_is_what_it_is(reading: Reading) -> None:
    """As Connect stores it: a Java number has no -0."""
    moment = reading.published_at
    key, value = encode(reading)
    assert coerced_row(key, value) == CoercedRow(
        reading.device_id, decode(key, value).published_at, reading.metric_name, reading.value, reading.tags
    )
    assert moment == decode(key, value).published_at


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_noise_makes_no_row(key: bytes, value: bytes) -> None:
    assert coerced_row(key, value) is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from(["device_id", "published_at", "metric_name", "value", "tags"]),
    st.booleans(),
)
def test_any_field_gives_a_row_that_could_be_stored_or_none(content: object, field: str, both: bool) -> None:
    row = coerced_row(
        compact(key_of(DEVICE, **({field: content} if both else {}))), compact(value_of(DEVICE, **{field: content}))
    )
    if row is not None:  # what could be a reading is one; its tags may be longer than the wire allows
        check(Reading(row.device_id, row.published_at, row.metric_name, row.value, []))
        assert not any("\0" in tag for tag in row.tags)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (b"10.0", 10),
        (b"1e1", 10),
        (b"0.00000001e9", 10),
        (b"1e400", 0),
        (b"1e99", 0),
        (b"1e-400", 0),
        (b"-0.5", 0),
        (b"65546", 10),
        (b"65546.9", 10),
        (b"-65526", 10),
        (b"36893488147419103242", 10),
    ],
)
def test_a_code_is_the_low_sixteen_bits(number: bytes, code: int) -> None:
    key, value = (
        compact(document).replace(b'"@"', number)
        for document in (key_of(DEVICE, metric_name="@"), value_of(DEVICE, metric_name="@"))
    )
    assert coerced_row(key, value) == row_of(DEVICE, metric_name=code)


def test_a_number_too_long_is_refused_by_jackson() -> None:
    key = compact(key_of(DEVICE))
    assert coerced_row(key, compact(value_of(DEVICE)).replace(b"45.2", b"1" * 1001)) is None


def test_the_row_of_long_tags_is_short_for_people() -> None:
    assert len(str(row_of(DEVICE, tags=["x" * 100_000]))) < 120
