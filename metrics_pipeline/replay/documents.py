"""JSON: one object a line, an array, or a document with a table in it; nested objects become columns such as `data.temp`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec

from metrics_pipeline.errors import RecordError, SettingError
from metrics_pipeline.replay.names import spoken

BAD_LINE: Final = "bad_line"
"""`RecordError.reason` of a line that does not fit its file, before it is looked at as a reading."""

Record = dict[str, Any]
_decode: Final = msgspec.json.Decoder().decode
_Refused: Final = (msgspec.DecodeError, UnicodeEncodeError, RecursionError)


class Table(NamedTuple):
    """A table in a document.

    Attributes:
        rows: its records.
        units: by column, where the document says them.
        columnar: whether it stands there by columns.
    """

    rows: list[Record]
    units: Mapping[str, str] = MappingProxyType({})
    columnar: bool = False


def parsed(text: str) -> Any:
    """What a text of JSON says; NaN and Infinity, which Python writes, are taken.

    Raises:
        RecordError: it is no JSON.
    """
    try:
        return _decode(text)
    except _Refused as error:
        try:
            if "NaN" in text or "Infinity" in text:
                return json.loads(text)
        except (ValueError, RecursionError):
            pass
        raise RecordError(BAD_LINE, f"is not JSON: {error}") from error


def flat(record: Record) -> Record:
    """A record without nested objects: their names are joined by points."""
    if not any(isinstance(value, (dict, list)) for value in record.values()):
        return record
    result: Record = {}
    stack = [iter(record.items())]
    prefixes = [""]
    while stack:
        for name, value in stack[-1]:
            full = prefixes[-1] + name
            if isinstance(value, dict) and value and len(stack) < 20:
                stack.append(iter(value.items()))
                prefixes.append(f"{full}.")
                break
            result[full] = value
        else:
            stack.pop()
            prefixes.pop()
    return result


def elements(texts: Iterator[str]) -> Iterator[Any]:
    """The elements of a JSON array, one after the other, out of pieces of its text.

    Raises:
        RecordError: it is none, or breaks off.
    """
    decoder = json.JSONDecoder()
    text, at = next(texts, ""), 0
    at = text.index("[") + 1
    while True:
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if at < len(text):
                break
            piece = next(texts, None)
            if piece is None:
                raise RecordError(BAD_LINE, "the array breaks off")
            text, at = piece, 0
        if text[at] == "]":
            return
        while True:
            try:
                element, end = decoder.raw_decode(text, at)
                # A number at the end of a piece may go on in the next one.
                if end < len(text) or isinstance(element, (dict, list)):
                    break
            except ValueError as error:
                if len(text) - at > 1 << 26:
                    raise RecordError(BAD_LINE, f"is not JSON: {error}") from error
            piece = next(texts, None)
            if piece is None:
                raise RecordError(BAD_LINE, "the array breaks off")
            text, at = text[at:] + piece, 0
        yield element
        at = end


def records_of(document: Any, path: str | None, where: str) -> Table:
    """The table in a document, and units of its columns where it says them.

    A table is a list of objects, an object of lists of one length, or `columns` with rows of `values` or `data`.

    Args:
        document: as parsed.
        path: which part of it; default: the only one that is a table.
        where: the file, for messages.

    Raises:
        SettingError: there are several, or the path leads nowhere.
    """
    tables: dict[str, Table] = {}
    _look(document, "", tables)
    if path is not None:
        if path not in tables:
            raise SettingError(
                f"--records {path}: no table stands there in {where}; there are {', '.join(tables) or 'none'}"
            )
        return tables[path]
    if not tables:
        return Table([document] if isinstance(document, dict) else [])
    if len(tables) > 1:
        listed = ", ".join(f"{name} ({len(rows)})" for name, (rows, _, _) in list(tables.items())[:10])
        raise SettingError(f"{where}: holds several tables: say which with --records PATH: {listed}")
    return next(iter(tables.values()))


def only_table(document: Any) -> Table | None:
    """The table in an object that stands alone in its line, when the object is nothing but what holds it."""
    if not isinstance(document, dict):
        return None
    tables: dict[str, Table] = {}
    _look(document, "", tables)
    if len(tables) != 1:
        return None
    path, table = next(iter(tables.items()))
    beside = {name: value for name, value in document.items() if name != path.split(".", 1)[0]}
    figures = {
        name for name, value in flat(beside).items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    if ("." in path and not table.columnar) or any(spoken(name).metric is not None for name in figures):
        return None
    return table


def exploded(record: Record, path: str | None) -> list[Record]:
    """A record, or those in a list within it, each with the plain fields that stand beside the list."""
    if path is None:
        return [record]
    beside: Record = {}
    node: Any = record
    for name in path.split("."):
        if not isinstance(node, dict):
            return []
        beside |= {key: value for key, value in node.items() if not isinstance(value, (dict, list))}
        node = node.get(name)
    items = node if isinstance(node, list) else [node]
    return [beside | item for item in items if isinstance(item, dict)]


def _look(node: Any, path: str, tables: dict[str, Table], depth: int = 0) -> None:
    if depth > 8:
        return
    if isinstance(node, list):
        if node and all(isinstance(item, list) and all(isinstance(one, dict) for one in item) for item in node):
            tables[path] = Table([one for item in node for one in item])
            return
        if node and all(isinstance(item, dict) for item in node):
            series = [rows for item in node for one in _series_in(item) if (rows := _rows(one))]
            if series:
                tables[path] = Table([row for rows in series for row in rows], columnar=True)
                return
            if not any(_rows(item) for item in node):
                tables[path] = Table(node)
                return
        for at, item in enumerate(node):
            _look(item, f"{path}.{at}" if path else str(at), tables, depth + 1)
    elif isinstance(node, dict):
        if rows := _rows(node):
            tables[path] = Table(rows, columnar=True)
            return
        for name, value in node.items():
            below = f"{path}.{name}" if path else name
            before = set(tables)
            _look(value, below, tables, depth + 1)
            for found in set(tables) - before:
                rows, units, columnar = tables[found]
                if found == below and isinstance(value, list):
                    beside = {key: one for key, one in node.items() if not isinstance(one, (dict, list))}
                    rows = [beside | row for row in rows]
                if isinstance(named := node.get(f"{name}_units"), dict) and found == below:
                    units = dict(units) | {key: unit for key, unit in named.items() if isinstance(unit, str)}
                beside_it = [other for key, other in node.items() if key != name]
                tables[found] = Table(_renamed(rows, beside_it), units, columnar=columnar)


def _series_in(item: Record) -> list[Record]:
    """The tables in an answer of InfluxDB 1, which has one a series."""
    found = item.get("series", [item] if "columns" in item else [])
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _rows(node: Record) -> list[Record]:
    """The rows of an object that is a table by columns; none when it is not."""
    names = node.get("columns")
    values = node.get("values", node.get("data"))
    if isinstance(names, list) and isinstance(values, list) and values and all(isinstance(row, list) for row in values):
        shared = node.get("tags") if isinstance(node.get("tags"), dict) else {}
        return [dict(zip(map(str, names), row, strict=False)) | (shared or {}) for row in values]
    lists = list(node.values())
    if len(lists) > 1 and all(isinstance(item, list) for item in lists):
        length = len(lists[0])
        plain = all(len(item) == length and not any(isinstance(cell, (dict, list)) for cell in item) for item in lists)
        if length and plain:
            return [dict(zip(node, row, strict=True)) for row in zip(*lists, strict=True)]
    if len(lists) > 1 and all(isinstance(item, dict) and item and not _nested(item) for item in lists):
        keys = list(lists[0])
        if all(list(item) == keys for item in lists) and all(key.isdigit() for key in keys):
            return [{name: column[key] for name, column in node.items()} for key in keys]
    return []


def _nested(item: Record) -> bool:
    return any(isinstance(value, (dict, list)) for value in item.values())


def _renamed(rows: list[Record], beside: list[Any]) -> list[Record]:
    """Rows whose columns an object beside them names, as ThingSpeak's `channel` does for `field1`."""
    names: dict[str, str] = {}
    for other in beside:
        if isinstance(other, dict):
            names |= {
                key: name for key, name in other.items() if key.startswith("field") and isinstance(name, str) and name
            }
    if not names:
        return rows
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]
