"""Single cells of a file of readings: exact numbers, devices and tags."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple
from uuid import UUID, uuid5

import msgspec
import polars as pl

from metrics_pipeline.errors import RecordError
from metrics_pipeline.replay.units import known_unit

DEVICE_NAMESPACE: Final = UUID("87eca42d-fcfc-4e77-8282-70a42a8b3eea")
"""Namespace of the UUIDv5 that a device gets by its name. Never change it: the same name must stay the same device."""

_MISSING: Final = """nan na n/a #n/a #na <na> null none nil nul missing unavailable unknown undefined invalid error #nv #value!
#div/0! - -- --- ---- . ? \\n n.a. k.a. n.v. fehlt leer"""
MISSING: Final = frozenset(_MISSING.split()) | {""}
"""What a cell without a value says, in small letters."""

_is_uuid: Final = re.compile(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}").fullmatch
_pg_element: Final = re.compile(r'"((?:[^"\\]|\\.)*)"|([^",{}\\]+)', re.DOTALL)
_with_comma: Final = re.compile(r"[+-]?\d*,(\d+)", re.ASCII).fullmatch
_with_point: Final = re.compile(r"[+-]?\d*\.(\d+)([eE][+-]?\d+)?", re.ASCII).fullmatch
_measured: Final = re.compile(
    r"([+-]?(?:\d[\d.,]*|[.,]\d+)(?:[eE][+-]?\d+)?)\s*([^\d\s].*)?", re.ASCII | re.DOTALL
).fullmatch
_grouped: Final = {
    ".": re.compile(r"[+-]?\d{1,3}(,\d{3})+\.\d+", re.ASCII).fullmatch,
    ",": re.compile(r"[+-]?\d{1,3}(\.\d{3})+,\d+", re.ASCII).fullmatch,
}


class Numbers(NamedTuple):
    """The numbers of a column.

    Attributes:
        values: null where there is none.
        units: by place, where a cell names its unit.
        errors: by place.
    """

    values: pl.Series
    units: dict[int, str]
    errors: dict[int, RecordError]


def numbers(cells: pl.Series, decimal: str = ".", missing: Collection[str] = ()) -> Numbers:
    """The doubles nearest to what the cells of a column say.

    Args:
        cells: text or numbers.
        decimal: the mark before decimals, a point or a comma.
        missing: what cells without a value say besides `MISSING`, such as -200.
    """
    errors: dict[int, RecordError] = {}
    units: dict[int, str] = {}
    said = {text.strip().casefold() for text in missing}
    if cells.dtype.is_numeric():
        values = cells.cast(pl.Float64).fill_nan(None)
        rest = values.is_infinite().fill_null(value=False)
        texts = None
    elif cells.dtype == pl.String:
        text = cells.str.strip_chars(" \t\r\n\xa0")
        if decimal == ",":
            text = pl.select(
                pl.when(~text.str.contains(r"\.|^[+-]?0\d")).then(text.str.replace(",", ".", literal=True))
            ).to_series()
        values = text.cast(pl.Float64, strict=False)
        texts = cells
        rest = values.is_null() | ~values.is_finite().fill_null(value=False)
    else:
        values = pl.Series([None] * len(cells), dtype=pl.Float64)
        texts, rest = cells.cast(pl.String, strict=False), cells.is_not_null()
    if rest.any():
        places = rest.arg_true()
        known: dict[object, tuple[float | None, str] | RecordError] = {}
        found: list[float | None] = []
        for place, cell in zip(
            places.to_list(), (cells if texts is None else texts).gather(places).to_list(), strict=True
        ):
            value = known.get(cell)
            if value is None:
                try:
                    value = number(cell, decimal, said)
                except RecordError as error:
                    value = error
                if len(known) < 1 << 16:
                    known[cell] = value
            if isinstance(value, RecordError):
                errors[place] = value
                found.append(None)
            else:
                found.append(value[0])
                if value[1]:
                    units[place] = value[1]
        values = values.scatter(places, pl.Series(found, dtype=pl.Float64))
    for text_of_one in said:
        try:
            one = float(text_of_one.replace(",", "."))
        except ValueError:
            continue
        values = pl.select(pl.when(values != one).then(values)).to_series()
    return Numbers(values, units, errors)


def number(cell: object, decimal: str = ".", missing: Collection[str] = ()) -> tuple[float | None, str]:
    """The double nearest to what a cell says, None when it says that there is none; and the unit that it names.

    Raises:
        RecordError: it is no number, or not a finite double.
    """
    if cell is None:
        return None, ""
    text = str(cell).strip(" \t\r\n\xa0\"'").replace("\u2212", "-")
    if text.casefold() in MISSING or text.casefold() in missing:
        return None, ""
    measured = _measured(re.sub(r"(?<=\d)[\xa0\u202f\u2009'](?=\d{3})", "", text))
    unit = known_unit(measured[2]) if measured and measured[2] else ""
    if measured is None or unit is None:
        raise RecordError("bad_value", f"{shown(cell)} is not {'a finite double' if _infinite(text) else 'a number'}")
    digits = measured[1]
    if re.match(r"[+-]?0\d+,", digits):
        raise RecordError(
            "bad_value", f"{shown(cell)} may be a number and a code behind it: take it apart with --select"
        )
    other = "," if decimal == "." else "."
    if _grouped[decimal](digits):
        digits = digits.replace(other, "")
    elif other in digits and (decimal == "." or re.fullmatch(r"[+-]?\d{1,3}(\.\d{3})+", digits)):
        raise RecordError(
            "bad_value",
            f"{shown(cell)} is not a number with decimals behind a {'point' if decimal == '.' else 'comma'}: say --decimal",
        )
    try:
        value = float(digits.replace(",", "."))
    except ValueError as error:
        raise RecordError("bad_value", f"{shown(cell)} is not a number") from error
    if value in (float("inf"), float("-inf")):
        raise RecordError("bad_value", f"{shown(cell)} is not a finite double")
    return value, unit


def _infinite(text: str) -> bool:
    return text.casefold().lstrip("+-") in ("inf", "infinity")


def decimal_mark(texts: Iterable[str]) -> str | None:
    """The mark before decimals in numbers written as text; None when `1,013` and its like may be either."""
    comma = point = unsure = 0
    for text in texts:
        if (match := _with_comma(text)) and not re.match(r"[+-]?0\d", text):
            if len(match[1]) == 3 and not text.lstrip("+-").startswith(("0", ",")):
                unsure += 1
            else:
                comma += 1
        elif _with_point(text):
            point += 1
    if comma or point:
        return "," if comma > point else "."
    return None if unsure else "."


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
    if isinstance(cell, float) and cell.is_integer():  # a whole number in a column in which some are missing
        return _device_of(str(int(cell)))
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
        elif text[0] != "{" and not any(mark in text for mark in ",;|"):
            return [text]
    raise RecordError(
        "bad_tags", f'{shown(cell)} is not a list of tags: write ["a","b"] or {{a,b}}, or say --leave-out'
    )


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
