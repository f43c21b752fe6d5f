"""A reading on the wire: one model, and everything that must agree with it.

`Metric` is the source of the JSON of a Kafka key and value, of the JSON Schema files in `connect/schemas/`, and of the
Connect schemas that the connector gets by `schema.content`. After a change run `python -m metrics_pipeline.metric`.

`Reading` is the same record without pydantic, for the paths that see hundreds of thousands of them a second; `check`,
`encode` and `decode` enforce on it exactly what `Metric` says. Nothing is coerced anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import IntEnum
from functools import lru_cache
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PlainSerializer,
    WithJsonSchema,
)

from metrics_pipeline.errors import RecordError
from metrics_pipeline.settings import CONNECTOR, ROOT

HIGHEST_CODE: Final = 99
"""Of a metric. The COPY sink's fast road and `verify` read codes of one or two digits."""


class MetricName(IntEnum):
    """What was measured, by the code that stands in the table.

    Codes rather than a PostgreSQL enum: JDBC sinks cannot bind one. They are ten apart so that a relative of a metric
    can stand next to it. docs/add-a-metric.md says what else a new one needs.
    """

    TEMPERATURE = 0
    HUMIDITY = 10
    PRESSURE = 20
    CO2 = 30
    LIGHT = 40
    SOUND = 50

    @property
    def unit(self) -> str:
        """The unit of the value."""
        return _UNITS[self]

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which a reading is possible at all; what comes from files is measured by it, the wire is not."""
        return _BOUNDS.get(self, (-inf, inf))


_UNITS: Final = {
    MetricName.TEMPERATURE: "°C",
    MetricName.HUMIDITY: "%",
    MetricName.PRESSURE: "hPa",
    MetricName.CO2: "ppm",
    MetricName.LIGHT: "lx",
    MetricName.SOUND: "dB",
}

_BOUNDS: Final = {
    MetricName.TEMPERATURE: (-100.0, 100.0),  # the coldest air is -90 °C; a sensor without its wire says -127
    MetricName.HUMIDITY: (0.0, 100.0),
    MetricName.PRESSURE: (300.0, 1100.0),  # on the highest mountain, and above the highest ever at sea level
    MetricName.CO2: (0.0, 1_000_000.0),
    MetricName.LIGHT: (0.0, 200_000.0),  # the sun at noon is 120,000 lx
    MetricName.SOUND: (0.0, 194.0),  # the loudest that air carries
}


def _require_carried(names: Iterable[MetricName], units: Mapping[MetricName, str]) -> None:
    """Refuse, where it is declared, a code that the rest could not carry.

    Raises:
        ValueError: naming the metric.
    """
    for name in names:
        if not 0 <= name <= HIGHEST_CODE:
            raise ValueError(
                f"MetricName.{name.name} = {int(name)}: codes go from 0 to {HIGHEST_CODE}, since they are read as one or "
                "two digits: take a free one"
            )
        if name not in units:
            raise ValueError(f"MetricName.{name.name} has no unit: add it to _UNITS in metrics_pipeline/metric.py")


_require_carried(MetricName, _UNITS)

EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""Where PostgreSQL's binary times count from: src/include/datatype/timestamp.h, POSTGRES_EPOCH_JDATE."""

MAX_TAGS: Final = 64
"""Most tags of a reading."""

MAX_TAG_BYTES: Final = 256
"""Most bytes of a tag in UTF-8: with `MAX_TAGS` a record stays far below the broker's limit of 1 MB."""

REASONS: Final[dict[str, str]] = {
    "tombstone": "the value is null",
    "no_key": "the key is null",
    "bad_json": "the key or the value is not one JSON object in UTF-8",
    "missing_field": "a field is not there",
    "bad_uuid": "device_id is not a UUID of 36 characters",
    "bad_time": "published_at is not RFC 3339 with a zone, up to six decimals, within the years 1 to 9999 of UTC",
    "bad_metric": "metric_name is not a known code",
    "bad_value": "value is not a finite JSON number",
    "bad_tags": f"tags is not an array of at most {MAX_TAGS} strings of {MAX_TAG_BYTES} bytes without NUL",
    "key_mismatch": "the fields of the key differ from the same fields of the value",
}
"""Every `RecordError.reason` there is, with what it means."""

_CODES: Final = frozenset(int(name) for name in MetricName)
_FIELD_REASON: Final = {
    "device_id": "bad_uuid",
    "published_at": "bad_time",
    "metric_name": "bad_metric",
    "value": "bad_value",
    "tags": "bad_tags",
}
_TIME_PATTERN: Final = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})$"
)
_UUID_PATTERN: Final = r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"
_is_time: Final = re.compile(_TIME_PATTERN.removesuffix("$") + r"\Z").match


class Reading(msgspec.Struct, gc=False):
    """One measured value: what `Metric` says, without the cost of a pydantic model.

    Attributes:
        device_id: the device.
        published_at: when it measured, aware; `decode` gives UTC.
        metric_name: what it measured, one of the codes of `MetricName`.
        value: the result, finite, in `MetricName.unit`.
        tags: free labels, in order.
    """

    device_id: UUID
    published_at: datetime
    metric_name: int
    value: float
    tags: list[str]


# --- The model ---------------------------------------------------------------------------------------------------


def _known_code(code: object) -> MetricName:
    if isinstance(code, bool) or not isinstance(code, int) or code not in _CODES:
        raise ValueError(_unknown_code(code))
    return MetricName(code)


_KNOWN_CODES: Final = ", ".join(f"{name.value} {name.name.lower()}" for name in MetricName)


def _unknown_code(code: object) -> str:
    return f"{code!r} is not a metric code ({_KNOWN_CODES})"


def _time_problem(moment: datetime) -> str | None:
    if moment.utcoffset() is None:
        return f"{moment.isoformat()} has no time zone"
    try:
        moment.astimezone(UTC)
    except OverflowError:
        return f"{moment.isoformat()} is outside the years 1 to 9999 of UTC"
    return None


def _within_years(moment: datetime) -> datetime:
    if problem := _time_problem(moment):
        raise ValueError(problem)
    return moment.astimezone(UTC)


def _tag_problem(tag: str) -> str | None:
    if "\0" in tag:
        return f"{tag[:40]!r} holds a NUL character, which PostgreSQL cannot store"
    # 64 characters are at most 256 bytes: most tags end here.
    if len(tag) * 4 > MAX_TAG_BYTES or not tag.isascii():
        try:
            size = len(tag.encode())
        except UnicodeEncodeError:
            return f"{tag[:40]!r} holds half of a surrogate pair"
        if size > MAX_TAG_BYTES:
            return f"{tag[:40]!r}… is {size} bytes long, the limit is {MAX_TAG_BYTES}"
    return None


def _storable(tag: str) -> str:
    if problem := _tag_problem(tag):
        raise ValueError(problem)
    return tag


def _time_text(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


class MetricKey(BaseModel):
    """The primary key of the table and the key of the Kafka message."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    device_id: Annotated[
        UUID,
        WithJsonSchema({"type": "string", "format": "uuid", "pattern": _UUID_PATTERN}),
        Field(description="the device"),
    ]
    published_at: Annotated[
        AwareDatetime,
        AfterValidator(_within_years),
        PlainSerializer(_time_text, when_used="json"),
        WithJsonSchema({"type": "string", "format": "date-time", "pattern": _TIME_PATTERN}),
        Field(description="when it measured: RFC 3339 with a zone and up to six decimals; written in UTC"),
    ]
    metric_name: Annotated[
        MetricName,
        BeforeValidator(_known_code),
        WithJsonSchema({"type": "integer", "enum": sorted(_CODES)}),
        Field(
            description="what it measured: " + ", ".join(f"{n.value} {n.name.lower()} in {n.unit}" for n in MetricName)
        ),
    ]


Tag = Annotated[
    str,
    AfterValidator(_storable),
    WithJsonSchema({"type": "string", "maxLength": MAX_TAG_BYTES, "pattern": "^[^\\u0000]*$"}),
]


class Metric(MetricKey):
    """A reading as it is published: strict, so nothing is turned into something else in silence.

    Raises:
        pydantic.ValidationError: naming each field that is not what the wire format says.
    """

    value: Annotated[FiniteFloat, Field(description="the result, finite")]
    tags: Annotated[
        list[Tag],
        Field(max_length=MAX_TAGS, description=f"free labels, each at most {MAX_TAG_BYTES} bytes of UTF-8 without NUL"),
    ]

    def reading(self) -> Reading:
        """The same record in the form that `encode` takes."""
        return Reading(self.device_id, self.published_at, int(self.metric_name), self.value, list(self.tags))


# --- The wire ----------------------------------------------------------------------------------------------------


class _Key(msgspec.Struct, gc=False):
    device_id: UUID
    published_at: datetime
    metric_name: int


class _KeyText(msgspec.Struct, gc=False):
    device_id: str
    published_at: str
    metric_name: int


class _ValueText(msgspec.Struct, gc=False):
    device_id: str
    published_at: str
    metric_name: int
    value: float
    tags: list[str]


_to_json: Final = msgspec.json.Encoder().encode
_key_of: Final = msgspec.json.Decoder(_KeyText).decode
_value_of: Final = msgspec.json.Decoder(_ValueText).decode


def check(reading: Reading) -> None:
    """Refuse what the sinks or PostgreSQL could not store as it is.

    Raises:
        RecordError: naming the field, its value and the reason.
    """
    if not isinstance(reading.device_id, UUID):
        raise RecordError("bad_uuid", f"device_id: {reading.device_id!r} is not a UUID")
    if not isinstance(reading.published_at, datetime):
        raise RecordError("bad_time", f"published_at: {reading.published_at!r} is not a datetime")
    if reading.published_at.tzinfo is not UTC and (problem := _time_problem(reading.published_at)):
        raise RecordError("bad_time", f"published_at: {problem}")
    code = reading.metric_name
    if isinstance(code, bool) or not isinstance(code, int) or code not in _CODES:
        raise RecordError("bad_metric", f"metric_name: {_unknown_code(code)}")
    value = reading.value
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        raise RecordError("bad_value", f"value: {value!r} is not a number")
    try:
        finite = isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise RecordError("bad_value", f"value: {value!r} is not finite")
    if not isinstance(reading.tags, list):
        raise RecordError("bad_tags", f"tags: {reading.tags!r} is not a list")
    check_tags(reading.tags)


def check_tags(tags: list[str]) -> None:
    """Refuse tags that could not be stored as they are.

    Raises:
        RecordError: `bad_tags`, naming the first of them.
    """
    if len(tags) > MAX_TAGS:
        raise RecordError("bad_tags", f"tags: there are {len(tags)}, the limit is {MAX_TAGS}")
    for tag in tags:
        if not isinstance(tag, str):
            raise RecordError("bad_tags", f"tags: {tag!r} is not a string")
        if problem := _tag_problem(tag):
            raise RecordError("bad_tags", f"tags: {problem}")


def encode(reading: Reading) -> tuple[bytes, bytes]:
    """The key and the value of the Kafka message; equal readings give equal bytes, so equal keys share a partition.

    Raises:
        RecordError: see `check`.
    """
    check(reading)
    moment = reading.published_at
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    key = _to_json(_Key(reading.device_id, moment, int(reading.metric_name)))
    return key, b'%b,"value":%b,"tags":%b}' % (key[:-1], _to_json(float(reading.value)), _to_json(reading.tags))


def decode(key: bytes | None, value: bytes | None) -> Reading:
    """Read a Kafka message, refusing everything that is not exactly the wire format.

    Unknown fields are ignored, an upper-case UUID and an offset other than Z are accepted; an integer literal is a
    valid double.

    Raises:
        RecordError: its `reason` is one of `REASONS`.
    """
    if value is None:
        raise RecordError("tombstone", "value: null")
    if key is None:
        raise RecordError("no_key", "key: null")
    try:
        if not value.isascii():
            value.decode()  # msgspec skips over unknown fields without a look at their bytes
        record = _value_of(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal("value", error) from error
    try:
        if not key.isascii():
            key.decode()
        identity = _key_of(key)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal("key", error) from error

    code = record.metric_name
    if code not in _CODES:
        raise RecordError("bad_metric", f"metric_name: {_unknown_code(code)}")
    device_id = _uuid(record.device_id)
    published_at = _time(record.published_at)
    if (
        identity.metric_name != code
        or (identity.device_id != record.device_id and _uuid(identity.device_id) != device_id)
        or (identity.published_at != record.published_at and _time(identity.published_at) != published_at)
    ):
        raise RecordError("key_mismatch", f"key {identity} differs from the value's {record}")
    check_tags(record.tags)
    return Reading(device_id, published_at, code, record.value, record.tags)


@lru_cache(maxsize=1 << 16)
def _uuid(text: str) -> UUID:
    # msgspec takes 32 digits without dashes too.
    if len(text) == 36:
        try:
            return msgspec.convert(text, UUID)
        except msgspec.ValidationError:
            pass
    raise RecordError("bad_uuid", f"device_id: {text[:80]!r} is not a UUID")


def _time(text: str) -> datetime:
    # The standard parser takes many more forms, and drops a seventh decimal in silence.
    if _is_time(text):
        try:
            moment = datetime.fromisoformat(text)
            return moment if moment.tzinfo is UTC else moment.astimezone(UTC)
        except (ValueError, OverflowError):
            pass
    raise RecordError("bad_time", f"published_at: {text[:80]!r}: {REASONS['bad_time']}")


_FIELD_OF_ERROR: Final = re.compile(r"`\$\.(\w+)|field `(\w+)`")


def _refusal(part: str, error: Exception) -> RecordError:
    match = _FIELD_OF_ERROR.search(str(error)) if isinstance(error, msgspec.ValidationError) else None
    if not match:
        return RecordError("bad_json", f"{part}: {error}")
    field = match[1] or match[2]
    return RecordError("missing_field" if match[2] else _FIELD_REASON[field], f"{part}: {field}: {error}")


# --- What is generated from the model ----------------------------------------------------------------------------

_CONNECT_TYPES: Final[dict[str, dict[str, Any]]] = {
    # Debezium's names make the sink bind uuid and timestamptz; everything else knows them as plain strings.
    "device_id": {"type": "string", "name": "io.debezium.data.Uuid"},
    "published_at": {"type": "string", "name": "io.debezium.time.ZonedTimestamp"},
}
_CONNECT_OF_JSON: Final[dict[str, dict[str, Any]]] = {
    "integer": {"type": "int16"},
    "number": {"type": "double"},
    "array": {"type": "array", "items": {"type": "string", "optional": False}},
}


def json_schema_key() -> dict[str, Any]:
    """JSON Schema (2020-12) of a Kafka key."""
    return _json_schema(MetricKey, "The key of a message in the topic `metrics`.")


def json_schema_value() -> dict[str, Any]:
    """JSON Schema (2020-12) of a Kafka value."""
    return _json_schema(Metric, "The value of a message in the topic `metrics`.")


def _json_schema(model: type[MetricKey], description: str) -> dict[str, Any]:
    schema = model.model_json_schema()
    for field in schema["properties"].values():
        field.pop("title", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "description": description,
        "additionalProperties": True,
    }


def connect_schema_key() -> dict[str, Any]:
    """Connect's schema of a key, for `key.converter.schema.content`."""
    return _connect_schema(json_schema_key())


def connect_schema_value() -> dict[str, Any]:
    """Connect's schema of a value, for `value.converter.schema.content`."""
    return _connect_schema(json_schema_value())


def _connect_schema(schema: dict[str, Any]) -> dict[str, Any]:
    fields = [
        {"field": name, **(_CONNECT_TYPES.get(name) or _CONNECT_OF_JSON[field["type"]]), "optional": False}
        for name, field in schema["properties"].items()
    ]
    return {"type": "struct", "optional": False, "fields": fields}


def generated_files() -> dict[Path, str]:
    """Every file that is written from the model, with the text it should have.

    The connector's file is ours only in its two `schema.content` entries, and left as it is while these are right.
    """
    files = {
        ROOT / "connect" / "schemas" / "metric-key.json": _pretty(json_schema_key()),
        ROOT / "connect" / "schemas" / "metric-value.json": _pretty(json_schema_value()),
    }
    connector = ROOT / "connect" / f"{CONNECTOR}.json"
    if connector.exists():
        text = connector.read_text(encoding="utf-8")
        config = json.loads(text)
        wanted = {
            "key.converter.schema.content": _compact(connect_schema_key()),
            "value.converter.schema.content": _compact(connect_schema_value()),
        }
        files[connector] = text if wanted.items() <= config.items() else _pretty({**config, **wanted})
    return files


def _pretty(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _compact(document: dict[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"))


def main() -> None:
    """Rewrite the generated files that are stale."""
    for path, text in generated_files().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
