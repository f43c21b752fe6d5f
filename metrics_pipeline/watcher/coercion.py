"""What Kafka Connect makes of a record that is not the wire format.

Its JsonConverter refuses little: it asks Jackson's tree for a double, an int or a text, and whatever cannot give one gives 0, 0 or
null (org.apache.kafka.connect.json.JsonConverter, TO_CONNECT_CONVERTERS). Only null in a required field, and what is no JSON object, is
an error, and goes to the dead letters. Debezium then takes the row's key from the record's key and the rest from its value, and
PostgreSQL refuses what its types and constraints do.

Where it is hard to tell whether Connect takes a text, it is assumed that it does: what comes out is only compared with rows.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal, InvalidOperation
from math import isfinite
from typing import Any, Final
from uuid import UUID

from metrics_pipeline.metric import MetricName

LONGEST_NUMBER: Final = 1000
"""Characters of a number that Jackson reads: StreamReadConstraints.DEFAULT_MAX_NUM_LEN."""

NESTED: Final = 1000
"""How deep arrays and objects may be nested: StreamReadConstraints.DEFAULT_MAX_DEPTH."""

_CODES: Final = frozenset(int(name) for name in MetricName)
_STRING_OR_ZEROS: Final = re.compile(r'("(?:[^"\\]|\\.)*")|(?<![0-9.eE+])(-?)0+(?=[0-9])', re.DOTALL)
_TIME: Final = re.compile(
    # DateTimeFormatter.ISO_OFFSET_DATE_TIME: seconds and the minutes of the offset may be missing, case does not matter.
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{0,9}))?)?"
    r"(Z|([+-])([0-9]{1,2})(?::?([0-9]{2})(?::?([0-9]{2}))?)?)",
    re.IGNORECASE,
)
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class CoercedRow:
    """The row that Connect makes of a record.

    Attributes:
        device_id: out of the record's key, like the next two.
        published_at: aware, to the microsecond.
        metric_name: a known code.
        value: finite.
        tags: in order.
    """

    device_id: UUID
    published_at: datetime
    metric_name: int
    value: float
    tags: list[str]

    def __str__(self) -> str:
        tags = repr(self.tags)
        return f"value {self.value!r}, tags {tags if len(tags) <= 80 else tags[:80] + '…'}"


def coerced_row(key: bytes | None, value: bytes | None) -> CoercedRow | None:
    """What Kafka Connect stores of a record; None when it stores nothing: a dead letter, or what fails the task."""
    if key is None or value is None:
        return None
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(limit + NESTED)
        identity, record = _tree(key), _tree(value)
        for field in ("device_id", "published_at"):
            if not isinstance(identity[field], str) or not isinstance(record[field], str):
                return None  # null is refused in a required field, and so is what has no text
        if record["metric_name"] is None:
            return None
        code, number, tags = _int16(identity["metric_name"]), _double(record["value"]), _texts(record["tags"])
        if code not in _CODES or not isfinite(number):
            return None  # the table's constraints
        return CoercedRow(_uuid(identity["device_id"]), _time(identity["published_at"]), code, number, tags)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, InvalidOperation):
        return None
    finally:
        sys.setrecursionlimit(limit)  # on which it depends what the strict decoder refuses


class _Float(str):
    """The text of a number with a point or an exponent: what it gives depends on what it is asked for."""

    __slots__ = ()


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _integer(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError("too long")
    return int(text)


_decoder: Final = json.JSONDecoder(parse_float=_Float, parse_int=_integer, parse_constant=_no_number)


def _tree(data: bytes) -> dict[str, Any]:
    """The object that Jackson reads: in any of JSON's encodings, with leading zeros, and whatever follows it is left unread."""
    text = data.decode(json.detect_encoding(data), "replace").lstrip(" \t\r\n")
    try:
        document, _ = _decoder.raw_decode(text)
    except ValueError:
        document, _ = _decoder.raw_decode(_STRING_OR_ZEROS.sub(r"\1\2", text))
    if not isinstance(document, dict):
        raise TypeError("Structs should be encoded as JSON objects")
    return document


def _int16(node: Any) -> int:
    """`(short) node.intValue()`: the low 16 bits of a number, 0 of anything else."""
    if node is None:
        raise TypeError("null for a required field")
    if isinstance(node, _Float):
        number = Decimal(node)
        # From 10**64 on the low bits are zero; below 1 nothing is left.
        whole = int(number) if -1 <= number.adjusted() < LONGEST_NUMBER else 0
    else:
        whole = node if isinstance(node, int) and not isinstance(node, bool) else 0
    return (whole + 0x8000) % 0x10000 - 0x8000


def _double(node: Any) -> float:
    """`node.doubleValue()`: 0 of what is no number. A Java number has no -0."""
    if node is None:
        raise TypeError("null for a required field")
    if isinstance(node, _Float):
        return float(node) + 0.0
    return float(node) if isinstance(node, int) and not isinstance(node, bool) else 0.0


def _texts(node: Any) -> list[str]:
    """The members of an array or the values of an object, all of them texts; nothing of anything else."""
    if node is None:
        raise TypeError("null for a required field")
    members = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    texts = []
    for text in members:
        if not isinstance(text, str) or isinstance(text, _Float) or "\0" in text:
            raise TypeError("null for a required member, or NUL, which PostgreSQL refuses")
        texts.append(_SURROGATE.sub("?", text))  # what Java writes for half of a surrogate pair
    return texts


def _uuid(text: str) -> UUID:
    """`cast(? as uuid)`: dashes may be missing, braces may stand around it."""
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    digits = text.replace("-", "")
    if not re.fullmatch(r"[0-9a-fA-F]{32}", digits):
        raise ValueError("no uuid")
    return UUID(digits)


def _time(text: str) -> datetime:
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError("no time")
    year, month, day, hour, minute = map(int, match.group(1, 2, 3, 4, 5))
    nanoseconds = int((match[7] or "").ljust(9, "0"))
    offset = timedelta(0)
    if match[9]:
        hours, minutes, seconds = (int(part or 0) for part in match.group(10, 11, 12))
        offset = timedelta(hours=hours, minutes=minutes, seconds=seconds) * (-1 if match[9] == "-" else 1)
    moment = datetime(year, month, day, hour, minute, int(match[6] or 0), tzinfo=timezone(offset))
    # The JDBC driver rounds to microseconds, the half up.
    return moment.astimezone(UTC) + timedelta(microseconds=(nanoseconds + 500) // 1000)
