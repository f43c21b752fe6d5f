"""The wire format: what is written, what is refused and why, and that every generated file agrees with the model."""

from __future__ import annotations

import json
import re
import struct
from datetime import UTC, datetime, timedelta, timezone
from enum import IntEnum
from math import inf, nan
from typing import Any
from uuid import UUID

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from metrics_pipeline import metric
from metrics_pipeline.errors import RecordError
from metrics_pipeline.metric import MAX_TAG_BYTES, MAX_TAGS, REASONS, Metric, MetricName, Reading, decode, encode
from metrics_pipeline.settings import ROOT

DEVICE = "0f8fad5b-d9cb-469f-a165-70867728950e"
KEY: dict[str, Any] = {"device_id": DEVICE, "published_at": "2026-11-22T16:00:00.123456Z", "metric_name": 10}
VALUE: dict[str, Any] = {**KEY, "value": 45.2, "tags": ["site:a", "floor:2"]}
READING = Reading(UUID(DEVICE), datetime(2026, 11, 22, 16, 0, 0, 123456, UTC), 10, 45.2, ["site:a", "floor:2"])


def compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def both(**changes: Any) -> tuple[bytes, bytes]:
    """Key and value with fields changed in both; None is a JSON null."""
    return (
        compact({name: changes.get(name, KEY[name]) for name in KEY}),
        compact({**VALUE, **changes}),
    )


def reason_of(key: bytes | None, value: bytes | None) -> str:
    with pytest.raises(RecordError) as refused:
        decode(key, value)
    assert refused.value.reason in REASONS
    return refused.value.reason


def test_the_frozen_wire() -> None:
    assert encode(READING) == (compact(KEY), compact(VALUE))
    assert decode(compact(KEY), compact(VALUE)) == READING


# A character is at most four bytes of UTF-8.
tags_strategy = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=MAX_TAG_BYTES // 4), max_size=MAX_TAGS
)
# A day of room at both ends, for the offset.
times = st.datetimes(
    datetime(1, 1, 2),  # noqa: DTZ001
    datetime(9999, 12, 30),  # noqa: DTZ001
    timezones=st.one_of(
        st.just(UTC), st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
    ),
)
readings = st.builds(
    Reading,
    device_id=st.uuids(),
    published_at=times,
    metric_name=st.sampled_from([int(name) for name in MetricName]),
    value=st.floats(allow_nan=False, allow_infinity=False),
    tags=tags_strategy,
)


@given(readings)
def test_what_is_written_is_read_back_bit_for_bit(reading: Reading) -> None:
    key, value = encode(reading)
    back = decode(key, value)
    assert back == reading
    assert struct.pack(">d", back.value) == struct.pack(">d", reading.value)  # -0.0 too
    assert back.published_at.tzinfo is UTC
    assert encode(back) == (key, value)  # equal keys have equal bytes, hence one partition


@given(readings)
def test_what_is_written_fits_the_published_schemas_and_the_model(reading: Reading) -> None:
    key, value = encode(reading)
    jsonschema.validate(json.loads(key), metric.json_schema_key())
    jsonschema.validate(json.loads(value), metric.json_schema_value())
    model = Metric(
        device_id=reading.device_id,
        published_at=reading.published_at,
        metric_name=MetricName(reading.metric_name),
        value=reading.value,
        tags=reading.tags,
    )
    assert model.reading() == reading
    assert json.loads(model.model_dump_json()) == json.loads(value)
    assert set(json.loads(key)) == set(metric.MetricKey.model_fields)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_noise_is_refused_with_a_known_reason(key: bytes, value: bytes) -> None:
    assert reason_of(key, value) in {"bad_json", "missing_field"}


ACCEPTED = {
    "upper-case uuid": both(device_id=DEVICE.upper()),
    "uuid in another case in the key": (compact({**KEY, "device_id": DEVICE.upper()}), compact(VALUE)),
    "integer literal": both(value=45),
    "exponent": both(value=1e300),
    "no decimals": both(published_at="2026-11-22T16:00:00Z"),
    "one decimal": both(published_at="2026-11-22T16:00:00.1Z"),
    "offset": both(published_at="2026-11-22T18:00:00.123456+02:00"),
    "another offset in the key": (
        compact({**KEY, "published_at": "2026-11-22T18:00:00.123456+02:00"}),
        compact(VALUE),
    ),
    "year 1": both(published_at="0001-01-01T00:00:00Z"),
    "year 9999": both(published_at="9999-12-31T23:59:59.999999Z"),
    "extra fields": (compact({**KEY, "x": 1}), compact({**VALUE, "x": [{"y": None}]})),
    "another order": (compact(dict(reversed(KEY.items()))), compact(dict(reversed(VALUE.items())))),
    "white space": (json.dumps(KEY, indent=1).encode(), json.dumps(VALUE, indent=1).encode()),
    "no tags": both(tags=[]),
    "an empty tag": both(tags=[""]),
    "escaped surrogate pair": (compact(KEY), json.dumps({**VALUE, "tags": ["😀"]}).encode()),
    "most tags": both(tags=["😀" * (MAX_TAG_BYTES // 4)] * MAX_TAGS),
}


@pytest.mark.parametrize("wire", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(wire: tuple[bytes, bytes]) -> None:
    reading = decode(*wire)
    assert reading.device_id == READING.device_id
    for part, schema in zip(wire, (metric.json_schema_key(), metric.json_schema_value()), strict=True):
        jsonschema.validate(json.loads(part), schema)


def value_with(old: str, new: str) -> bytes:
    text = compact(VALUE).decode()
    assert old in text
    return text.replace(old, new).encode("utf-8", "surrogateescape")


def without(document: dict[str, Any], field: str) -> bytes:
    return compact({name: value for name, value in document.items() if name != field})


REFUSED: dict[str, tuple[str, bytes | None, bytes | None]] = {
    "tombstone": ("tombstone", compact(KEY), None),
    "tombstone without key": ("tombstone", None, None),
    "null key": ("no_key", None, compact(VALUE)),
    "empty value": ("bad_json", compact(KEY), b""),
    "empty key": ("bad_json", b"", compact(VALUE)),
    "not JSON": ("bad_json", compact(KEY), b"temperature=20"),
    "cut off": ("bad_json", compact(KEY), compact(VALUE)[:-1]),
    "something after it": ("bad_json", compact(KEY), compact(VALUE) + b"{}"),
    "JSON null": ("bad_json", compact(KEY), b"null"),
    "array": ("bad_json", compact(KEY), b"[]"),
    "byte order mark": ("bad_json", compact(KEY), b"\xef\xbb\xbf" + compact(VALUE)),
    "invalid UTF-8 in a tag": ("bad_json", compact(KEY), value_with("site:a", "\udcff")),
    "invalid UTF-8 in an unknown field": ("bad_json", compact(KEY), value_with('"value"', '"x":"\udcff","value"')),
    "invalid UTF-8 in the key": ("bad_json", compact({**KEY, "x": "?"}).replace(b"?", b"\xff"), compact(VALUE)),
    "NaN token": ("bad_json", compact(KEY), value_with("45.2", "NaN")),
    "Infinity token": ("bad_json", compact(KEY), value_with("45.2", "Infinity")),
    "leading zero": ("bad_json", compact(KEY), value_with("45.2", "045.2")),
    "lone surrogate": ("bad_json", compact(KEY), value_with("site:a", "\\ud800")),
    "surrogates in the wrong order": ("bad_json", compact(KEY), value_with("site:a", "\\udc00\\ud800")),
    "nested too deep": ("bad_json", compact(KEY), value_with('"value"', '"x":' + "[" * 9999 + "]" * 9999 + ',"value"')),
    "no device in the value": ("missing_field", compact(KEY), without(VALUE, "device_id")),
    "no tags in the value": ("missing_field", compact(KEY), without(VALUE, "tags")),
    "no metric in the key": ("missing_field", without(KEY, "metric_name"), compact(VALUE)),
    "uuid without dashes": ("bad_uuid", *both(device_id=DEVICE.replace("-", ""))),
    "uuid in braces": ("bad_uuid", *both(device_id=f"{{{DEVICE}}}")),
    "36 spaces": ("bad_uuid", *both(device_id=" " * 36)),
    "uuid with other dashes": ("bad_uuid", *both(device_id="0f8fad5bd-9cb-469f-a165-70867728950e")),
    "uuid as a number": ("bad_uuid", *both(device_id=7)),
    "uuid null": ("bad_uuid", *both(device_id=None)),
    "no zone": ("bad_time", *both(published_at="2026-11-22T16:00:00")),
    "seven decimals": ("bad_time", *both(published_at="2026-11-22T16:00:00.1234567Z")),
    "comma": ("bad_time", *both(published_at="2026-11-22T16:00:00,5Z")),
    "space": ("bad_time", *both(published_at="2026-11-22 16:00:00Z")),
    "lower case": ("bad_time", *both(published_at="2026-11-22t16:00:00z")),
    "no seconds": ("bad_time", *both(published_at="2026-11-22T16:00Z")),
    "basic format": ("bad_time", *both(published_at="20261122T160000Z")),
    "week date": ("bad_time", *both(published_at="2026-W47-7T16:00:00Z")),
    "offset without colon": ("bad_time", *both(published_at="2026-11-22T16:00:00+0200")),
    "offset of a day": ("bad_time", *both(published_at="2026-11-22T16:00:00+24:00")),
    "29 February": ("bad_time", *both(published_at="2026-02-29T16:00:00Z")),
    "leap second": ("bad_time", *both(published_at="2026-12-31T23:59:60Z")),
    "hour 24": ("bad_time", *both(published_at="2026-12-31T24:00:00Z")),
    "year 0": ("bad_time", *both(published_at="0000-01-01T00:00:00Z")),
    "year 0 in UTC": ("bad_time", *both(published_at="0001-01-01T00:00:00+02:00")),
    "year 10000 in UTC": ("bad_time", *both(published_at="9999-12-31T23:00:00-02:00")),
    "year 294277": ("bad_time", *both(published_at="294277-01-01T00:00:00Z")),
    "line feed after it": ("bad_time", *both(published_at="2026-11-22T16:00:00Z\n")),
    "digits of another script": ("bad_time", *both(published_at="٢٠٢٦-11-22T16:00:00Z")),
    "seconds since 1970": ("bad_time", *both(published_at=1763827200)),
    "unknown code": ("bad_metric", *both(metric_name=7)),
    "code beyond int16": ("bad_metric", *both(metric_name=70000)),
    "code beyond int64": ("bad_metric", *both(metric_name=10**30)),
    "code as text": ("bad_metric", *both(metric_name="10")),
    "code as a float": ("bad_metric", *both(metric_name=10.0)),
    "code as a boolean": ("bad_metric", *both(metric_name=False)),
    "value as text": ("bad_value", *both(value="45.2")),
    "value as a boolean": ("bad_value", *both(value=True)),
    "value null": ("bad_value", *both(value=None)),
    "value beyond a double": ("bad_value", compact(KEY), value_with("45.2", "1e400")),
    "integer beyond a double": ("bad_value", compact(KEY), value_with("45.2", "9" * 400)),
    "tags null": ("bad_tags", *both(tags=None)),
    "tags as text": ("bad_tags", *both(tags="site:a")),
    "a number among the tags": ("bad_tags", *both(tags=["site:a", 1])),
    "null among the tags": ("bad_tags", *both(tags=[None])),
    "NUL in a tag": ("bad_tags", *both(tags=["a\0"])),
    "too many tags": ("bad_tags", *both(tags=[""] * (MAX_TAGS + 1))),
    "tag too long": ("bad_tags", *both(tags=["x" * (MAX_TAG_BYTES + 1)])),
    "tag too long in bytes": ("bad_tags", *both(tags=["é" * (MAX_TAG_BYTES // 2 + 1)])),
    "another device in the key": ("key_mismatch", compact({**KEY, "device_id": str(UUID(int=1))}), compact(VALUE)),
    "another time in the key": (
        "key_mismatch",
        compact({**KEY, "published_at": "2026-11-22T16:00:00.123457Z"}),
        compact(VALUE),
    ),
    "another metric in the key": ("key_mismatch", compact({**KEY, "metric_name": 20}), compact(VALUE)),
    "bad uuid in the key only": ("bad_uuid", compact({**KEY, "device_id": "room-1"}), compact(VALUE)),
}


@pytest.mark.parametrize(("reason", "key", "value"), REFUSED.values(), ids=REFUSED)
def test_refused(reason: str, key: bytes | None, value: bytes | None) -> None:
    assert reason_of(key, value) == reason


def test_every_reason_is_tested() -> None:
    assert {reason for reason, _, _ in REFUSED.values()} == set(REASONS)


UNPUBLISHABLE: dict[str, tuple[str, str, Any]] = {
    "unknown code": ("bad_metric", "metric_name", 7),
    "code as text": ("bad_metric", "metric_name", "10"),
    "code as a boolean": ("bad_metric", "metric_name", False),
    "NaN": ("bad_value", "value", nan),
    "infinity": ("bad_value", "value", -inf),
    "integer beyond a double": ("bad_value", "value", 10**400),
    "value as text": ("bad_value", "value", "45.2"),
    "value as a boolean": ("bad_value", "value", True),
    "naive time": ("bad_time", "published_at", datetime(2026, 11, 22, 16)),  # noqa: DTZ001
    "time as text": ("bad_time", "published_at", "2026-11-22T16:00:00Z"),
    "year 0 in UTC": ("bad_time", "published_at", datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1)))),
    "NUL in a tag": ("bad_tags", "tags", ["a\0"]),
    "lone surrogate": ("bad_tags", "tags", ["\ud800"]),
    "tag too long": ("bad_tags", "tags", ["é" * 129]),
    "too many tags": ("bad_tags", "tags", ["a"] * 65),
    "a number among the tags": ("bad_tags", "tags", [1]),
    "tags as text": ("bad_tags", "tags", "site:a"),
    "uuid as text": ("bad_uuid", "device_id", DEVICE),
}


@pytest.mark.parametrize(("reason", "field", "bad"), UNPUBLISHABLE.values(), ids=UNPUBLISHABLE)
def test_refused_before_it_is_published(reason: str, field: str, bad: Any) -> None:
    fields = {name: getattr(READING, name) for name in Reading.__struct_fields__} | {field: bad}
    with pytest.raises(RecordError, match=rf"^{reason}: {field}: ") as refused:
        encode(Reading(**fields))
    assert "\n" not in str(refused.value)
    with pytest.raises(ValidationError, match=field):
        Metric(**fields)


def test_an_unknown_code_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RecordError, match="0 temperature, 10 humidity, 20 pressure, 30 co2, 40 light, 50 sound"):
        encode(Reading(READING.device_id, READING.published_at, 7, 1.0, []))


def test_the_codes_and_units() -> None:
    assert {name.name.lower(): name.value for name in MetricName} == {
        "temperature": 0,
        "humidity": 10,
        "pressure": 20,
        "co2": 30,
        "light": 40,
        "sound": 50,
    }
    assert all(name.unit for name in MetricName)


@pytest.mark.parametrize("path", metric.generated_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_generated_files_are_fresh(path: Any) -> None:
    assert path.read_text(encoding="utf-8") == metric.generated_files()[path], (
        "stale: run `python -m metrics_pipeline.metric`"
    )


def test_a_stale_file_is_seen_and_only_our_entries_of_the_connector_are_rewritten(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric, "ROOT", tmp_path)
    connector = tmp_path / "connect" / "metrics-postgres-sink.json"
    connector.parent.mkdir()
    connector.write_text('{"tasks.max": "6", "key.converter.schema.content": "old"}')
    metric.main()
    config = json.loads(connector.read_text())
    assert config["tasks.max"] == "6"
    assert json.loads(config["key.converter.schema.content"]) == metric.connect_schema_key()
    assert json.loads(config["value.converter.schema.content"]) == metric.connect_schema_value()
    laid_out = json.dumps(config, indent=7)  # its owner may lay it out as he likes
    connector.write_text(laid_out)
    metric.main()
    assert connector.read_text() == laid_out


def test_connect_schemas() -> None:
    key = [
        {"field": "device_id", "type": "string", "name": "io.debezium.data.Uuid", "optional": False},
        {"field": "published_at", "type": "string", "name": "io.debezium.time.ZonedTimestamp", "optional": False},
        {"field": "metric_name", "type": "int16", "optional": False},
    ]
    value = [
        *key,
        {"field": "value", "type": "double", "optional": False},
        {"field": "tags", "type": "array", "items": {"type": "string", "optional": False}, "optional": False},
    ]
    assert metric.connect_schema_key() == {"type": "struct", "optional": False, "fields": key}
    assert metric.connect_schema_value() == {"type": "struct", "optional": False, "fields": value}


def test_published_schemas_refuse_what_the_decoder_refuses() -> None:
    """JSON Schema cannot say everything (days of a month, bytes of a tag); what it says must agree."""
    beyond_json_schema = {
        "29 February", "leap second", "hour 24", "year 0", "year 0 in UTC", "year 10000 in UTC", "offset of a day",
        "tag too long in bytes", "line feed after it",
        "code as a float",  # JSON Schema has one kind of number
    }  # fmt: skip
    for name, (reason, _, value) in REFUSED.items():
        if value is None or reason in ("bad_json", "key_mismatch", "no_key") or re.search("key|beyond a double", name):
            continue
        accepted = jsonschema.Draft202012Validator(metric.json_schema_value()).is_valid(json.loads(value))
        assert accepted == (name in beyond_json_schema), name


@pytest.mark.parametrize("code", [-1, 100, 32_768])
def test_a_code_that_cannot_be_carried_is_refused_where_it_is_declared(code: int) -> None:
    names: Any = IntEnum("names", {"WIND": code})
    units: Any = {names.WIND: "m/s"}
    with pytest.raises(ValueError, match=rf"MetricName\.WIND = {code}: codes go from 0 to 99"):
        metric._require_carried(names, units)


def test_a_metric_without_a_unit_is_refused_where_it_is_declared() -> None:
    names: Any = IntEnum("names", {"WIND": 60})
    with pytest.raises(ValueError, match="WIND has no unit"):
        metric._require_carried(names, {})
