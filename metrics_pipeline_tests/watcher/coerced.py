"""Records that are no readings and that Kafka Connect stores all the same: each kind, with the row that it makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from metrics_pipeline.metric import MAX_TAG_BYTES, MAX_TAGS, Reading, encode
from metrics_pipeline.watcher.coercion import CoercedRow

WHEN: Final = datetime(2026, 11, 22, 16, 0, 0, 123456, UTC)


@dataclass(frozen=True)
class Bad:
    """One bad record.

    Attributes:
        reason: why it is no reading.
        wire: its key and its value.
        row: what Connect makes of it.
    """

    reason: str
    wire: tuple[bytes, bytes]
    row: CoercedRow

    def good(self, value: float, tags: list[str]) -> tuple[bytes, bytes]:
        """A reading of the key of the row."""
        row = self.row
        return encode(Reading(row.device_id, row.published_at, row.metric_name, value, tags))


def compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def key_of(device: UUID, **changes: Any) -> dict[str, Any]:
    return {"device_id": str(device), "published_at": "2026-11-22T16:00:00.123456Z", "metric_name": 10, **changes}


def value_of(device: UUID, **changes: Any) -> dict[str, Any]:
    return {**key_of(device), "value": 45.2, "tags": ["site:a", "floor:2"], **changes}


def row_of(device: UUID, **changes: Any) -> CoercedRow:
    fields: dict[str, Any] = {
        "device_id": device,
        "published_at": WHEN,
        "metric_name": 10,
        "value": 45.2,
        "tags": ["site:a", "floor:2"],
    }
    return CoercedRow(**{**fields, **changes})


def _value(reason: str, becomes: dict[str, Any], **changes: Any) -> Callable[[UUID], Bad]:
    """Fields of the value alone."""
    return lambda device: Bad(
        reason, (compact(key_of(device)), compact(value_of(device, **changes))), row_of(device, **becomes)
    )


def _both(reason: str, becomes: dict[str, Any], **changes: Any) -> Callable[[UUID], Bad]:
    """Fields that key and value have in common."""
    return lambda device: Bad(
        reason, (compact(key_of(device, **changes)), compact(value_of(device, **changes))), row_of(device, **becomes)
    )


def _key(reason: str, becomes: dict[str, Any], **changes: Any) -> Callable[[UUID], Bad]:
    return lambda device: Bad(
        reason, (compact(key_of(device, **changes)), compact(value_of(device))), row_of(device, **becomes)
    )


def _text(reason: str, becomes: dict[str, Any], change: Callable[[bytes], bytes]) -> Callable[[UUID], Bad]:
    """Bytes of the value."""
    return lambda device: Bad(
        reason, (compact(key_of(device)), change(compact(value_of(device)))), row_of(device, **becomes)
    )


COERCED: Final[dict[str, Callable[[UUID], Bad]]] = {
    "value as text": _value("bad_value", {"value": 0.0}, value="abc"),
    "value as a number in text": _value("bad_value", {"value": 0.0}, value="45.2"),
    "value as a boolean": _value("bad_value", {"value": 0.0}, value=True),
    "value as an array": _value("bad_value", {"value": 0.0}, value=[1.5]),
    "value as an object": _value("bad_value", {"value": 0.0}, value={"value": 1.5}),
    "tags as text": _value("bad_tags", {"tags": []}, tags="site:a"),
    "tags as a number": _value("bad_tags", {"tags": []}, tags=7),
    "tags as a boolean": _value("bad_tags", {"tags": []}, tags=True),
    "tags as an object": _value("bad_tags", {"tags": ["a", "2"]}, tags={"site": "a", "floor": "2"}),
    "too many tags": _value("bad_tags", {"tags": ["x"] * (MAX_TAGS + 1)}, tags=["x"] * (MAX_TAGS + 1)),
    "a tag too long": _value("bad_tags", {"tags": ["x" * (MAX_TAG_BYTES + 1)]}, tags=["x" * (MAX_TAG_BYTES + 1)]),
    "code beyond int16": _both("bad_metric", {}, metric_name=65546),
    "code far beyond int64": _both("bad_metric", {}, metric_name=2**80 + 20 - 10),
    "code below int16": _both("bad_metric", {}, metric_name=10 - 65536),
    "code as text": _both("bad_metric", {"metric_name": 0}, metric_name="10"),
    "code as a float": _both("bad_metric", {}, metric_name=10.75),
    "code as a boolean": _both("bad_metric", {"metric_name": 0}, metric_name=True),
    "code as an object": _both("bad_metric", {"metric_name": 0}, metric_name={}),
    "another code in the value": _value("key_mismatch", {}, metric_name=20),
    "an unknown code in the value": _value("bad_metric", {}, metric_name=7),
    "another device in the value": _value("key_mismatch", {}, device_id=str(UUID(int=5))),
    "no device in the value": _value("bad_uuid", {}, device_id="room-1"),
    "another time in the value": _value("key_mismatch", {}, published_at="2026-11-22T17:00:00Z"),
    "no time in the value": _value("bad_time", {}, published_at="yesterday"),
    "uuid without dashes": lambda device: _both("bad_uuid", {}, device_id=device.hex)(device),
    "uuid in braces": lambda device: _both("bad_uuid", {}, device_id=f"{{{device}}}")(device),
    "uuid without dashes in the key": lambda device: _key("bad_uuid", {}, device_id=device.hex)(device),
    "time without seconds": _both(
        "bad_time", {"published_at": WHEN.replace(second=0, microsecond=0)}, published_at="2026-11-22T16:00Z"
    ),
    "time in lower case": _both("bad_time", {}, published_at="2026-11-22t16:00:00.123456z"),
    "time with seven decimals, down": _both("bad_time", {}, published_at="2026-11-22T16:00:00.1234564Z"),
    "time with seven decimals, up": _both("bad_time", {}, published_at="2026-11-22T16:00:00.1234555Z"),
    "time with an offset of hours": _both("bad_time", {}, published_at="2026-11-22T18:00:00.123456+02"),
    "time with an offset of seconds": _both("bad_time", {}, published_at="2026-11-22T18:00:01.123456+02:00:01"),
    "leading zero": _text("bad_json", {}, lambda value: value.replace(b"45.2", b"0045.2")),
    "something after it": _text("bad_json", {}, lambda value: value + b"{}"),
    "byte order mark": _text("bad_json", {}, lambda value: b"\xef\xbb\xbf" + value),
    "UTF-16": _text("bad_json", {}, lambda value: value.decode().encode("utf-16")),
    "lone surrogate": _text("bad_json", {"tags": ["?", "floor:2"]}, lambda value: value.replace(b"site:a", b"\\ud800")),
}
