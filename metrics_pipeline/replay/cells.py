"""Single cells of a file of readings: exact numbers, instants, devices and tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from math import isfinite
from typing import Final
from uuid import UUID, uuid5
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from metrics_pipeline.errors import RecordError, SettingError

DEVICE_NAMESPACE: Final = UUID("87eca42d-fcfc-4e77-8282-70a42a8b3eea")
"""Namespace of the UUIDv5 that a device gets by its name. Never change it: the same name must stay the same device."""

_UNIX: Final = datetime(1970, 1, 1, tzinfo=UTC)
_is_uuid: Final = re.compile(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}").fullmatch
_is_number: Final = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII).fullmatch
_is_decimal_comma: Final = re.compile(r"[+-]?\d+,\d+", re.ASCII).fullmatch
_finer_than_micro: Final = re.compile(r"[.,]\d{6}0*[1-9]", re.ASCII).search
_pg_element: Final = re.compile(r'"((?:[^"\\]|\\.)*)"|([^",{}\\]+)', re.DOTALL)


def number(cell: object) -> float | None:
    """The double nearest to what the cell says; None when it is empty.

    Raises:
        RecordError: it is no number, or not a finite double.
    """
    if isinstance(cell, str):
        text = cell.strip()
        if not text:
            return None
        try:
            # Python also reads 1_000 and the digits of other scripts.
            value = float(text) if text.isascii() and "_" not in text else None
        except ValueError:
            value = None
        if value is None:
            hint = " (write decimals with a point)" if _is_decimal_comma(text) else ""
            raise RecordError("bad_value", f"{shown(cell)} is not a number{hint}")
    elif cell is None:
        return None
    elif isinstance(cell, bool) or not isinstance(cell, (float, int, Decimal)):
        raise RecordError("bad_value", f"{shown(cell)} is not a number")
    else:
        try:
            value = float(cell)
        except OverflowError:
            value = float("inf")
    if not isfinite(value):
        raise RecordError("bad_value", f"{shown(cell)} is not a finite double")
    return value


class Clock:
    """Reads times; those without a zone are taken in one that is given.

    A local time that does not exist (clocks put forward) is refused, and so is one that occurs twice (clocks put back).

    Attributes:
        zone: where times without a zone were taken.
        zoneless: how many such times were read.
    """

    def __init__(self, zone: str = "UTC") -> None:
        """Look up the zone.

        Raises:
            SettingError: there is no such zone.
        """
        try:
            self.zone = ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise SettingError(
                f"--tz {zone}: no such time zone; use a name of the IANA database such as UTC or Europe/Berlin"
            ) from error
        self.zoneless = 0
        self._is_utc = zone in ("UTC", "Etc/UTC")

    def instant(self, cell: object) -> datetime:
        """The instant that a cell says, in UTC.

        Text is ISO 8601 or a number; a number counts seconds, milliseconds, microseconds or nanoseconds since 1970, told
        apart by its size (seconds below 10^11, then each unit up to a thousand times that).

        Raises:
            RecordError: it is none, is finer than a microsecond, or stands for no instant or two in the zone.
        """
        try:
            if isinstance(cell, str):
                moment = self._text(cell.strip())
            elif isinstance(cell, datetime):
                moment = cell
            elif isinstance(cell, date):
                moment = datetime(cell.year, cell.month, cell.day)  # noqa: DTZ001  # its zone comes below
            elif isinstance(cell, int) and not isinstance(cell, bool):
                return _since_1970(Decimal(cell))
            elif isinstance(cell, float):
                return _since_1970(Decimal(repr(cell)))
            else:
                raise RecordError("bad_time", "is empty" if cell is None else f"{shown(cell)} is not a time")
            if moment.tzinfo is None:
                self.zoneless += 1
                moment = moment.replace(tzinfo=UTC) if self._is_utc else self._local(moment)
            return moment.astimezone(UTC)
        except (ValueError, ArithmeticError) as error:
            raise RecordError("bad_time", f"{shown(cell)} is not a time between the years 1 and 9999") from error

    def _text(self, text: str) -> datetime:
        if not text:
            raise RecordError("bad_time", "is empty")
        if _is_number(text):
            if len(text) in (8, 14):
                raise RecordError("bad_time", f"{text} may be a date or a number of seconds: write it as 2015-02-04")
            return _since_1970(Decimal(text))
        # The parser drops further digits in silence, and two readings could become one.
        if len(text) > 19 and _finer_than_micro(text):
            raise RecordError("bad_time", f"{shown(text)} is finer than a microsecond, which is all that is kept")
        return datetime.fromisoformat(text)

    def _local(self, moment: datetime) -> datetime:
        first, second = (moment.replace(tzinfo=self.zone, fold=fold) for fold in (0, 1))
        before, after = first.utcoffset(), second.utcoffset()
        if before == after or before is None or after is None:
            return first
        if before < after:
            raise RecordError("bad_time", f"{moment} does not exist in {self.zone.key}: clocks were put forward")
        raise RecordError(
            "bad_time",
            f"{moment} occurs twice in {self.zone.key}, where clocks were put back: write it with its offset "
            f"({first.isoformat(' ')} or {second.isoformat(' ')})",
        )


def _since_1970(count: Decimal) -> datetime:
    micro = count / 1000
    for limit, scale in ((10**11, 1_000_000), (10**14, 1000), (10**17, 1)):
        if abs(count) < limit:
            micro = count * scale
            break
    if micro != micro.to_integral_value():
        raise RecordError("bad_time", f"{count} is finer than a microsecond, which is all that is kept")
    return _UNIX + timedelta(microseconds=int(micro))


def device_id(cell: object) -> UUID:
    """The device's UUID: as it stands, or the UUIDv5 of its name.

    Raises:
        RecordError: the cell is empty or cannot be a name.
    """
    if isinstance(cell, str):
        return _device_of(cell.strip())
    if isinstance(cell, bytes) and len(cell) == 16:
        return UUID(bytes=cell)
    if isinstance(cell, int) and not isinstance(cell, bool):
        return _device_of(str(cell))
    raise RecordError("bad_uuid", "is empty" if cell is None else f"{shown(cell)} is neither a UUID nor a name")


def _device_of(name: str) -> UUID:
    if not name:
        raise RecordError("bad_uuid", "is empty")
    if _is_uuid(name):
        return UUID(name)
    try:
        return uuid5(DEVICE_NAMESPACE, name)
    except UnicodeEncodeError as error:
        raise RecordError("bad_uuid", f"{shown(name)} is not UTF-8") from error


def tags(cell: object) -> list[str]:
    """Tags from a list, a JSON array or PostgreSQL's text of a `text[]`; an empty cell has none.

    Raises:
        RecordError: it is none of these.
    """
    if cell is None:
        return []
    if isinstance(cell, (list, tuple)):
        return list(cell)
    if isinstance(cell, str):
        text = cell.strip()
        if not text:
            return []
        if text[0] == "[":
            try:
                return msgspec.json.decode(text, type=list[str])
            except (msgspec.DecodeError, UnicodeEncodeError):
                pass
        elif (elements := _pg_array(text)) is not None:
            return elements
    raise RecordError("bad_tags", f'{shown(cell)} is not a list of tags: write ["a","b"] or {{a,b}}')


def _pg_array(text: str) -> list[str] | None:
    if text[0] != "{" or text[-1] != "}" or len(text) < 2:
        return None
    elements, at, end = [], 1, len(text) - 1
    while at < end:
        element = _pg_element.match(text, at, end)
        if element is None:
            return None
        if element[2] is not None and element[2].strip().upper() == "NULL":
            return None
        elements.append(
            re.sub(r"\\(.)", r"\1", element[1], flags=re.DOTALL) if element[2] is None else element[2].strip()
        )
        at = element.end()
        if at < end:
            if text[at] != "," or at + 1 == end:
                return None
            at += 1
    return elements


def shown(cell: object) -> str:
    """A cell for a message: quoted, at most 60 characters, printable anywhere."""
    text = ascii(cell) if isinstance(cell, str) and not cell.isprintable() else repr(cell)
    return text if len(text) <= 60 else text[:57] + "…" + text[0]


def names(columns: Sequence[str]) -> str:
    """Column names for a message."""
    listed = [shown(name) if not name.isprintable() or name != name.strip() else name for name in columns if name]
    return ", ".join(listed[:30]) + (f" and {len(listed) - 30} more" if len(listed) > 30 else "") or "none"
