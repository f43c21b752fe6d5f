"""How a CSV file is laid out, found in its first lines: separator, what stands above the header, header, row of units."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from metrics_pipeline.errors import SettingError
from metrics_pipeline.replay.units import known_unit

BLANKS: Final = " "
"""The separator of a file whose cells stand apart by any number of blanks."""

_SEPARATORS: Final = (",", ";", "\t", "|")
_is_number: Final = re.compile(r"[+-]?(\d+([.,]\d*)*|[.,]\d+)([eE][+-]?\d+)?\s*(%|°?[CF])?", re.ASCII).fullmatch
_is_time: Final = re.compile(
    r"\D{0,5}\d{1,4}[-./]\d{1,2}[-./]\d{1,4}.*|\d{4}-?W\d\d.*|\d{8}T\d+.*|\d{1,2}[:.]\d\d([:.]\d\d)?.*"
    r"|(\w{3},? )?(\d{1,2} )?[A-Z][a-z]{2} +\d+.*|\d{1,2}-[A-Za-z]{3}-\d+.*"
).fullmatch
_MISSING: Final = frozenset(
    ["", "nan", "na", "n/a", "null", "none", "-", "--", "---", "unavailable", "unknown", "#n/a", "#nv", "<na>", "\\n"]
)
_is_uuid: Final = re.compile(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}").fullmatch
_separator_line: Final = re.compile(r'\ufeff?"?sep=(.)"?\s*').fullmatch
_LOGGER_MARKS: Final = ("TOA5", "TOACI1", "TOB1", "TOB3")


@dataclass(frozen=True)
class TextForm:
    """How text is to be taken apart, as far as it was said.

    Attributes:
        encoding: of the text.
        separator: between two cells; `blanks` for any number of blanks.
        header: the line with the names; 0 when there is none.
        records: where in a JSON document the records stand, such as `data.rows`.
    """

    encoding: str | None = None
    separator: str | None = None
    header: int | None = None
    records: str | None = None


@dataclass(frozen=True)
class Layout:
    """Of one CSV file.

    Attributes:
        separator: between two cells.
        columns: their names, each once; one without a name has its number.
        unnamed: those of them that the file does not name.
        width: cells of a record.
        cells: which of them belong to `columns`.
        begin: number of the first line after the header.
        header: the header as its cells stand, for finding it again; empty when there is none.
        header_line: where it stands; 0 when there is none.
        units: by column, as a row below the header says them.
        comments: whether lines with `#` are left out.
    """

    separator: str
    columns: tuple[str, ...]
    unnamed: frozenset[str]
    width: int
    cells: slice
    begin: int
    header: tuple[str, ...]
    header_line: int
    units: dict[str, str] = field(default_factory=dict)
    comments: bool = False

    def split(self, line: str) -> list[str]:
        """The cells of a line without quotes that span lines."""
        if self.separator == BLANKS:
            return line.split()
        return next(csv.reader([line], delimiter=self.separator, skipinitialspace=True), [])


def is_comment(line: str) -> bool:
    """Whether a line of CSV says something about the file: `#` at its begin, but for a column that is named so."""
    if line.startswith("#"):
        return line[1:2] not in (*_SEPARATORS, "")
    return line.startswith(('"#group"', '"#datatype"', '"#default"'))


def is_data(cell: str) -> bool:
    """Whether a cell is a number, a time or a UUID rather than a name."""
    text = cell.strip()
    return bool(_is_number(text) or _is_time(text) or _is_uuid(text))


def find_layout(lines: Sequence[str], form: TextForm, where: str) -> Layout:
    """Look at the first lines of a file.

    Args:
        lines: with or without their ends.
        form: what was said.
        where: the file, for messages.

    Raises:
        SettingError: what was said about it does not fit.
    """
    separators = list(_SEPARATORS)
    begin = 0
    if said := _separator_line(lines[0]):
        separators, begin = [said[1]], 1
    if form.separator is not None:
        separators = [{"blanks": BLANKS, "tab": "\t", "\\t": "\t"}.get(form.separator, form.separator)]
        if len(separators[0]) != 1:
            raise SettingError(f"--separator {form.separator}: give one character, tab, or blanks")
    if begin < len(lines) and any(
        lines[begin].lstrip('"').startswith(mark + end) for mark in _LOGGER_MARKS for end in ('"', ",")
    ):
        begin += 1
    comments = any(map(is_comment, lines))
    found = []
    for separator in separators:
        records = _records(lines, separator, begin)
        if separator != BLANKS and not any(len(cells) > 1 for _, cells in records):
            continue
        found.append(_judge(separator, records))
    if not found or (form.separator is None and not said and not max(found)[0] and max(found)[1] * 2 < max(found)[2]):
        blank = _records(lines, BLANKS, begin)
        if any(len(cells) > 1 for _, cells in blank):
            found.append(_judge(BLANKS, blank))
    if not found:
        records = _records(lines, separators[0], begin)
        found.append(_judge(separators[0], records))
    _, _, _, width, separator = max(found)
    records = _records(lines, separator, begin)
    layout = _with_header(records, separator, width, form, where, comments=comments)
    if comments and layout.header_line == 0 and form.header is None:
        above = [(at, line) for at, line in enumerate(lines, 1) if is_comment(line) and at <= layout.begin]
        for at, line in reversed(above):
            cells = layout.split(line.lstrip("#").strip())
            if len(cells) == layout.width and not any(is_data(cell) for cell in cells):
                return _named(separator, cells, width, slice(None), layout.begin, at, {}, comments=True)
    return layout


def _records(lines: Sequence[str], separator: str, begin: int) -> list[tuple[int, list[str]]]:
    """Number and cells of each line that is neither blank nor a comment."""
    kept = [(at, line) for at, line in enumerate(lines, 1) if at > begin and not is_comment(line)]
    if separator == BLANKS:
        return [(at, line.split()) for at, line in kept if line.strip()]
    reader = csv.reader((line for _, line in kept), delimiter=separator, skipinitialspace=True)
    records: list[tuple[int, list[str]]] = []
    taken = 0
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                records.append((kept[taken][0], cells))
            taken = reader.line_num
    except csv.Error:
        pass
    return records


def _judge(separator: str, records: list[tuple[int, list[str]]]) -> tuple[bool, int, int, int, str]:
    """How well a separator divides the lines: whether names stand above data, lines of one width, lines, that width."""
    widths = Counter(len(cells) for _, cells in records if len(cells) > 1)
    if not widths:
        return (False, 0, len(records), 1, separator)
    # Among as frequent ones the width of the data, which stand below.
    last = {len(cells): at for at, (_, cells) in enumerate(records)}
    width = max(widths, key=lambda width: (widths[width], last[width]))
    data = next((at for at, (_, cells) in enumerate(records) if len(cells) == width and any(map(is_data, cells))), None)
    headed = data is not None and any(
        len(cells) in (width - 1, width, width + 1) and not any(map(is_data, cells)) for _, cells in records[:data]
    )
    if data is None:
        headed = len(records[0][1]) == width
    return (headed, widths[width], len(records), width, separator)


def _with_header(
    records: list[tuple[int, list[str]]], separator: str, width: int, form: TextForm, where: str, *, comments: bool
) -> Layout:
    if form.header:
        at = next((at for at, (number, _) in enumerate(records) if number >= form.header), None)
        if at is None or records[at][0] != form.header:
            raise SettingError(f"--header {form.header}: {where} has no record in that line")
        above, data = [records[at]], at + 1
        rest = [at for at in range(data, len(records)) if any(map(is_data, records[at][1]))]
        above += records[data : rest[0]] if rest and rest[0] - data <= 2 else []
        data += len(above) - 1
    else:
        data = next(
            (at for at, (_, cells) in enumerate(records) if len(cells) == width and any(map(is_data, cells))),
            len(records),
        )
        above = []
        first = data
        while first and len(records[first - 1][1]) > 1 and any(map(is_data, records[first - 1][1])):
            first -= 1  # lines of another width, which are bad
        for record in reversed(records[:first]):
            if len(record[1]) not in (width - 1, width, width + 1) or any(map(is_data, record[1])):
                break
            above.insert(0, record)
        if form.header == 0:
            above = []
        if data == len(records) and form.header is None and records:
            above, data = records[:1], 1
    if not above:
        first = records[data][0] if data < len(records) else 1
        names = [str(at) for at in range(1, width + 1)]
        return _named(separator, names, width, slice(None), first, 0, {}, comments=comments)
    # Of several rows of names right above the data the first one names; others say units, or what was averaged.
    if len(above) > 1 and not any(known_unit(cell) for _, cells in above[1:] for cell in cells):
        above = above[-1:]
    number, header = above[0]
    begin = records[data][0] if data < len(records) else number + 1
    begin = min(begin, above[-1][0] + 1) if len(above) > 1 else number + 1
    below = [cells for _, cells in records[data:] if len(cells) == width] or [[""] * width]
    cells = slice(None)
    if len(header) == width - 1:
        cells = slice(None, -1) if not any(row[-1].strip() for row in below) else slice(1, None)
    elif len(header) == width + 1:
        if header[-1].strip():
            raise SettingError(
                f"{where}: its header has {len(header)} names, its lines have {width} cells: say --header"
            )
        header = header[:-1]
    units: dict[int, str] = {}
    for _, row in above[1:]:
        for at, cell in enumerate(row):
            if at < len(header) and known_unit(cell):
                units.setdefault(at, cell.strip())
    return _named(separator, header, width, cells, begin, number, units, comments=comments)


def _named(
    separator: str,
    header: Sequence[str],
    width: int,
    cells: slice,
    begin: int,
    line: int,
    units: dict[int, str],
    *,
    comments: bool,
) -> Layout:
    columns: list[str] = []
    unnamed = set()
    for at, cell in enumerate(header, 1):
        name = cell.strip() or str(at)
        if not cell.strip():
            unnamed.add(name)
        times = 2
        unique = name
        while unique in columns:
            unique = f"{name} ({times})"
            times += 1
        columns.append(unique)
    return Layout(
        separator,
        tuple(columns),
        frozenset(unnamed),
        width,
        cells,
        begin,
        tuple(cell.strip() for cell in header) if line else (),
        line,
        {columns[at]: unit for at, unit in units.items()},
        comments=comments,
    )
