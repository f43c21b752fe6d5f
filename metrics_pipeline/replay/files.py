"""Files of readings as blocks of columns, each record with the place where it stands.

polars reads Parquet, and those blocks of CSV in which a line is a record and has no quotes. What it cannot say, as DuckDB
cannot either, is at which line a record stands once a quoted cell may hold a line end; and after a quote that is never closed
both take the rest of the file for one cell, or drop lines in silence. Such blocks go through Python's `csv`, line by line.
JSON goes through msgspec, object by object, for the same reason: each bad one is named, and costs nobody else.
"""

from __future__ import annotations

import csv
import io
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import msgspec
import polars as pl

from metrics_pipeline.errors import RecordError, SettingError
from metrics_pipeline.replay.documents import BAD_LINE, Record, elements, exploded, flat, only_table, parsed, records_of
from metrics_pipeline.replay.layout import BLANKS, Layout, TextForm, find_layout, is_comment, is_data
from metrics_pipeline.replay.text import Source

MAX_LINE: Final = 2**20
"""Longest line, in characters: a longer one means that this is another kind of file."""

BLOCK_ROWS: Final = 20_000
MAX_DOCUMENT: Final = 2**29
"""Largest JSON document that is no array, in characters: it is held in memory as a whole."""

_SAMPLE_LINES: Final = 1000
_BLOCK_TEXT: Final = 1 << 21
_JSON = (".ndjson", ".jsonl", ".json", ".geojson")
_PARQUET = (".parquet", ".pq")
_CSV = (".csv", ".tsv", ".txt", ".dat", ".tab")


class BadRecord(NamedTuple):
    """A record that cannot be taken apart into cells."""

    number: int
    error: RecordError


class Block(NamedTuple):
    """Some records.

    Attributes:
        numbers: of each record: its line, or its row in Parquet.
        frame: their cells by column: text, numbers, or times.
        bad: those that do not fit.
    """

    numbers: pl.Series
    frame: pl.DataFrame
    bad: list[BadRecord]


class DataFile(ABC):
    """One file of readings.

    Attributes:
        path: as it was given.
        size: in bytes.
        columns: names of the columns, as far as they are known.
        unnamed: those of them that the file does not name: they are numbered.
        units: by column, where the file says them beside the names.
        described: what kind of file it is, in words.
        broken: what the file says when it breaks off before its end; the records before it are good.
    """

    unit: ClassVar[str] = ""
    """What stands before the number of a record in messages."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.columns: tuple[str, ...] = ()
        self.unnamed: frozenset[str] = frozenset()
        self.units: Mapping[str, str] = {}
        self.described = ""

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """How much of `size` is done."""

    def place(self, number: int) -> str:
        """A record for messages."""
        return f"{self.path}:{self.unit}{number}"

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """Every record but the header and blank ones.

        Raises:
            SettingError: the file cannot be read to its end.
        """


class TextFile(DataFile):
    """A file of text, compressed or not."""

    def __init__(self, source: Source, form: TextForm) -> None:
        super().__init__(source.path, source.size)
        self._source = source
        self._form = form
        self.encoding = form.encoding or source.encoding()
        try:
            "".encode(self.encoding)
        except LookupError as error:
            raise SettingError(f"--encoding {self.encoding}: there is no such encoding; try utf-8 or cp1252") from error
        self._packed = f", compressed by {source.compression}" if source.compression else ""

    @property
    def bytes_read(self) -> int:
        """How much of `size` is done."""
        return self._source.position

    @contextmanager
    def _text(self) -> Iterator[io.TextIOWrapper]:
        with self._source.open() as opened:
            text = io.TextIOWrapper(opened, self.encoding, errors="replace", newline=None)
            try:
                yield text
            finally:
                text.detach()

    @contextmanager
    def _breaks(self, number: list[int]) -> Iterator[None]:
        """Say where a file breaks off, after all that it holds."""
        yield
        if (error := self._source.error) is not None:
            raise SettingError(f"{self.path}: cannot be read beyond line {number[0]}: {error}") from error

    def _sample(self) -> list[str]:
        """The first lines.

        Raises:
            SettingError: there are none.
        """
        lines: list[str] = []
        number = [0]
        with self._text() as text:
            size = 0
            while len(lines) < _SAMPLE_LINES and size < 1 << 18 and (line := text.readline(MAX_LINE)):
                number[0] += 1
                if len(line) == MAX_LINE and line[-1] != "\n":
                    if line.lstrip()[:1] in "[{":
                        lines.append(line)
                        break
                    raise SettingError(f"{self.place(number[0])}: longer than {MAX_LINE} characters, is it text?")
                size += len(line)
                lines.append(line.rstrip("\n"))
        self._source.position = 0
        if not any(line.strip() for line in lines):
            raise SettingError(f"{self.path}: is empty")
        return lines


class CsvFile(TextFile):
    """Cells apart by a separator, below one line of names; what stands above it is left out."""

    def __init__(self, source: Source, form: TextForm) -> None:
        super().__init__(source, form)
        self.layout: Layout = find_layout(self._sample(), form, str(source.path))
        self.columns, self.unnamed, self.units = self.layout.columns, self.layout.unnamed, self.layout.units
        separator = {"\t": "tabs", BLANKS: "blanks"}.get(self.layout.separator, repr(self.layout.separator))
        header = (
            f"header in line {self.layout.header_line}"
            if self.layout.header_line
            else "no header: columns are numbered"
        )
        self.described = f"CSV, {self.encoding}{self._packed}, separated by {separator}, {header}"

    def blocks(self) -> Iterator[Block]:
        """Every record but the header and blank ones; a quoted cell may hold line ends.

        Raises:
            SettingError: the file cannot be read to its end.
        """
        at = [0]
        with self._breaks(at), self._text() as text:
            for _ in range(self.layout.begin - 1):
                text.readline()
            at[0] = self.layout.begin - 1
            lines = _Lines(text, at[0])
            while chunk := text.read(_BLOCK_TEXT):
                chunk += text.readline(MAX_LINE)
                if self._source.error is not None and chunk[-1] != "\n":
                    # The line in which a file breaks off may be a part of what it was.
                    chunk = chunk[: chunk.rfind("\n") + 1]
                    if not chunk:
                        break
                texts = chunk.split("\n")
                if texts[-1] == "":
                    texts.pop()
                if len(chunk) > _BLOCK_TEXT + MAX_LINE - 2 or max(map(len, texts), default=0) >= MAX_LINE:
                    raise SettingError(f"{self.place(at[0] + 1)}: longer than {MAX_LINE} characters, is it text?")
                block = self._clean(chunk, texts, at[0]) or self._careful(lines, texts, at[0])
                at[0] = lines.number = max(lines.number, at[0] + len(texts))
                yield block

    def _clean(self, chunk: str, texts: list[str], before: int) -> Block | None:
        """A block in which each line is a record with all its cells; None when it is not."""
        layout = self.layout
        width = layout.width
        if (
            layout.separator == BLANKS
            or '"' in chunk
            or "\0" in chunk
            or "\n\n" in chunk
            or chunk[0] == "\n"
            or (layout.comments and "#" in chunk)
            or chunk.count(layout.separator) != len(texts) * (width - 1)
            or (layout.header and max(layout.header, key=len) in chunk)
        ):
            return None
        try:
            frame = pl.read_csv(
                chunk.encode(),
                has_header=False,
                new_columns=[str(at) for at in range(width)],
                separator=layout.separator,
                quote_char=None,
                infer_schema=False,
                empty_string_is_null=False,
                extra_columns="raise",
            )
        except (pl.exceptions.PolarsError, UnicodeEncodeError):
            return None
        if frame.height != len(texts) or frame.width != width:
            return None
        frame = frame.select(frame.columns[layout.cells])
        frame.columns = list(layout.columns)
        numbers = pl.Series("line", range(before + 1, before + 1 + frame.height), pl.Int64)
        blank = frame.select(pl.all_horizontal(pl.all().str.strip_chars() == "")).to_series()
        if blank.any():
            frame, numbers = frame.filter(~blank), numbers.filter(~blank)
        return Block(numbers, frame, [])

    def _careful(self, lines: _Lines, texts: list[str], before: int) -> Block:
        """A block, record by record; the last one may take further lines."""
        layout = self.layout
        lines.refill(texts, before)
        numbers: list[int] = []
        rows: list[list[str]] = []
        bad: list[BadRecord] = []
        reader = None if layout.separator == BLANKS else _reader(lines, layout.separator)
        while lines.pending():
            first = lines.begin()
            line = lines.first()
            if not line.strip() or (layout.comments and is_comment(line)):
                next(lines)
                continue
            if "\0" in line:
                next(lines)
                bad.append(BadRecord(first, RecordError(BAD_LINE, "holds NUL bytes, as a power cut leaves them")))
                continue
            try:
                cells = next(lines).split() if reader is None else next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                bad.append(BadRecord(first, RecordError(BAD_LINE, f"its quotes do not match: {error}")))
                lines.give_back()
                reader = _reader(lines, layout.separator)
                continue
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) == layout.width:
                if layout.header and self._is_header(cells):
                    continue
                rows.append(cells)
                numbers.append(first)
            elif layout.header and tuple(cell.strip() for cell in cells) == layout.header:
                continue
            else:
                detail = f"has {len(cells)} fields, the other lines have {layout.width}"
                bad.append(BadRecord(first, RecordError(BAD_LINE, detail)))
                if lines.give_back():
                    reader = None if reader is None else _reader(lines, layout.separator)
        frame = pl.DataFrame(
            rows, schema={str(at): pl.String for at in range(layout.width)}, orient="row"
        )  # fmt: skip
        frame = frame.select(frame.columns[layout.cells])
        frame.columns = list(layout.columns)
        return Block(pl.Series("line", numbers, pl.Int64), frame, bad)

    def _is_header(self, cells: list[str]) -> bool:
        """Whether a record is the header once more.

        Raises:
            SettingError: it is one of other columns, so what follows would be taken for what it is not.
        """
        names = tuple(cell.strip() for cell in cells)
        header = self.layout.header
        if names == header:
            return True
        if len(header) == len(names) and set(names) == set(header) and not any(map(is_data, names)):
            raise SettingError(f"{self.path}: a second header has its columns in another order: split the file there")
        return False


class _Lines:
    """Lines for `csv.reader`, which can be given back when a stray quote made it take too many.

    Attributes:
        number: of the line that was taken last.
    """

    def __init__(self, text: io.TextIOWrapper, number: int) -> None:
        self.number = number
        self._text = text
        self._ready: deque[str] = deque()
        self._taken: list[str] = []

    def refill(self, texts: Iterable[str], before: int) -> None:
        """Take these lines next, of which the first follows the line `before`."""
        self._ready = deque(texts)
        self.number = before

    def pending(self) -> bool:
        """Whether there are lines that were filled in."""
        return bool(self._ready)

    def first(self) -> str:
        """The line that comes next."""
        return self._ready[0]

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._ready:
            text = self._ready.popleft()
        else:
            text = self._text.readline(MAX_LINE)
            if not text:
                raise StopIteration
            text = text.rstrip("\n")
        self.number += 1
        self._taken.append(text)
        return text + "\n"

    def begin(self) -> int:
        """Begin a record; returns the number of its first line."""
        self._taken.clear()
        return self.number + 1

    def give_back(self) -> bool:
        """Take all lines but the first of the record once more; whether there are any."""
        again = self._taken[1:]
        self._ready.extendleft(reversed(again))
        self.number -= len(again)
        return bool(again)


def _reader(lines: Iterable[str], separator: str) -> Iterator[list[str]]:
    return csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)


class JsonFile(TextFile):
    """JSON objects: one a line, in an array, or in a table within a document. They need not have the same fields."""

    def __init__(self, source: Source, form: TextForm) -> None:
        super().__init__(source, form)
        sample = self._sample()
        first = next(line for line in sample if line.strip()).lstrip()
        self._document: list[Record] | None = None
        self._array = False
        kind = "JSON, one object a line"
        if first.startswith("["):
            self._array = self._plain_array()
            kind = "a JSON array"
        if (first.startswith("[") and not self._array) or not any(_is_object(line) for line in sample):
            self._document, self.units = self._whole()
            kind = "a JSON document"
        elif (
            not self._array
            and form.records is None
            and sum(1 for line in sample if line.strip()) == 1
            and (table := only_table(parsed(first))) is not None
        ):
            self._document, self.units, kind = table.rows, table.units, "a JSON document"
        if self._array or self._document is not None:
            self.unit = "record "  # type: ignore[misc]
        self.described = f"{kind}, {self.encoding}{self._packed}"
        names: dict[str, None] = {}
        for block in itertools.islice(self.blocks(), 1):
            names = dict.fromkeys(block.frame.columns)
        self._source.position = 0
        if not names:
            raise SettingError(f"{self.path}: no JSON object in its first {len(sample)} lines")
        self.columns = tuple(names)

    def _plain_array(self) -> bool:
        """Whether an array holds objects."""
        with self._breaks([1]), self._text() as text:
            head = text.read(1 << 16).lstrip("\ufeff \t\r\n")
        return head[1:].lstrip().startswith("{") and self._form.records is None

    def _whole(self) -> tuple[list[Record], Mapping[str, str]]:
        with self._breaks([0]), self._text() as text:
            content = text.read(MAX_DOCUMENT + 1)
        if len(content) > MAX_DOCUMENT:
            raise SettingError(
                f"{self.path}: is a JSON document of more than {MAX_DOCUMENT >> 20} MiB: write one object a line"
            )
        try:
            document = parsed(content.lstrip("\ufeff"))
        except RecordError as error:
            raise SettingError(
                f"{self.path}: no JSON object in any of its lines, and as a whole it {error.detail}"
            ) from error
        table = records_of(document, self._form.records, str(self.path))
        return table.rows, table.units

    def blocks(self) -> Iterator[Block]:
        """Every record.

        Raises:
            SettingError: the file cannot be read to its end.
        """
        at = [0]
        with self._breaks(at):
            numbers: list[int] = []
            records: list[Record] = []
            bad: list[BadRecord] = []
            for number, record in self._records():
                at[0] = number
                if isinstance(record, RecordError):
                    bad.append(BadRecord(number, record))
                else:
                    for one in [record] if self._document is not None else exploded(record, self._form.records):
                        numbers.append(number)
                        records.append(flat(one))
                if len(records) + len(bad) >= BLOCK_ROWS:
                    yield Block(pl.Series("line", numbers, pl.Int64), _frame(records), bad)
                    numbers, records, bad = [], [], []
            yield Block(pl.Series("line", numbers, pl.Int64), _frame(records), bad)

    def _records(self) -> Iterator[tuple[int, Record | RecordError]]:
        if self._document is not None:
            for number, record in enumerate(self._document, 1):
                yield number, record if isinstance(record, dict) else RecordError(BAD_LINE, "is not a JSON object")
            self._source.position = self.size
            return
        with self._text() as text:
            if self._array:
                number = 0
                try:
                    for number, item in enumerate(elements(iter(lambda: text.read(1 << 18), "")), 1):
                        yield number, item if isinstance(item, dict) else RecordError(BAD_LINE, "is not a JSON object")
                except RecordError as error:
                    yield number + 1, error
                return
            for number, line in enumerate(iter(lambda: text.readline(MAX_LINE * 16), ""), 1):
                stripped = line.strip("\ufeff \t\r\n\0")
                if not stripped:
                    if "\0" in line:
                        yield number, RecordError(BAD_LINE, "holds NUL bytes, as a power cut leaves them")
                    continue
                try:
                    found = parsed(stripped)
                except RecordError as error:
                    yield number, error
                    continue
                yield number, found if isinstance(found, dict) else RecordError(BAD_LINE, "is not a JSON object")


def _is_object(line: str) -> bool:
    try:
        return isinstance(parsed(line.strip("\ufeff \t\r\n")), dict)
    except RecordError:
        return False


def _frame(records: Sequence[Record]) -> pl.DataFrame:
    """Records by columns; a field that a record does not have is null in it."""
    first = tuple(records[0]) if records else ()
    if all(tuple(record) == first for record in records):
        columns = dict(zip(first, zip(*(record.values() for record in records), strict=True), strict=True))
    else:
        names = dict.fromkeys(name for record in records for name in record)
        columns = {name: tuple(record.get(name) for record in records) for name in names}
    return pl.DataFrame([_series(name, cells) for name, cells in columns.items()])


def _series(name: str, cells: tuple[Any, ...]) -> pl.Series:
    """A column of JSON: numbers as such when all are of one kind, and all else as text that says the same."""
    kinds = set(map(type, cells)) - {type(None)}
    try:
        if kinds == {float}:
            return pl.Series(name, cells, pl.Float64)
        if kinds == {int}:
            return pl.Series(name, cells, pl.Int64)
        if kinds <= {str}:
            return pl.Series(name, cells, pl.String)
    except (OverflowError, TypeError, UnicodeEncodeError):
        pass
    return pl.Series(name, [None if cell is None else _as_text(cell) for cell in cells], pl.String)


def _as_text(cell: object) -> str:
    if isinstance(cell, str):
        return cell.encode("utf-8", "replace").decode()
    if isinstance(cell, float):
        return repr(cell)
    return msgspec.json.encode(cell).decode() if not isinstance(cell, int) or isinstance(cell, bool) else str(cell)


class ParquetFile(DataFile):
    """A Parquet file, some thousand rows at a time; structs become columns such as `reading.temperature`."""

    unit = "row "

    def __init__(self, path: Path, size: int, shown: Path | None = None) -> None:
        super().__init__(shown or path, size)
        self._done = 0
        try:
            self._frame = pl.scan_parquet(path, glob=False)
            schema = self._frame.collect_schema()
            self._count = int(self._frame.select(pl.len()).collect().item())
        except (pl.exceptions.PolarsError, OSError) as error:
            raise SettingError(f"{path}: is not a Parquet file that can be read: {error}") from error
        expressions = [expression for name, kind in schema.items() for expression in _leaves(pl.col(name), name, kind)]
        self._frame = self._frame.select(expressions)
        self.columns = tuple(self._frame.collect_schema().names())
        self.described = "Parquet"

    @property
    def bytes_read(self) -> int:
        """How much of `size` is done."""
        return self.size * self._done // max(self._count, 1) if self._count else self.size

    def blocks(self) -> Iterator[Block]:
        """Every row; its number counts from 1.

        Raises:
            SettingError: the file cannot be read to its end.
        """
        self._done = 0
        try:
            for frame in self._frame.collect_batches(chunk_size=BLOCK_ROWS, maintain_order=True):
                numbers = pl.Series("line", range(self._done + 1, self._done + 1 + frame.height), pl.Int64)
                yield Block(numbers, frame, [])
                self._done += frame.height
        except (pl.exceptions.PolarsError, OSError) as error:
            raise SettingError(f"{self.path}: cannot be read beyond row {self._done}: {error}") from error


def _leaves(column: pl.Expr, name: str, kind: pl.DataType) -> Iterator[pl.Expr]:
    """A column as text, numbers or times, without loss; each field of a struct for itself."""
    if isinstance(kind, pl.Struct):
        for field in kind.fields:
            yield from _leaves(column.struct.field(field.name), f"{name}.{field.name}", field.dtype)  # type: ignore[arg-type]
        return
    if isinstance(kind, (pl.Datetime, pl.Date, pl.String, pl.Float64, pl.Int64, pl.Binary)):
        yield column.alias(name)
    elif kind.is_float():
        yield column.cast(pl.Float64).alias(name)
    elif kind.is_integer() and kind not in (pl.UInt64, pl.Int128):
        yield column.cast(pl.Int64).alias(name)
    elif isinstance(kind, (pl.List, pl.Array)):
        if kind.inner == pl.String:
            yield column.cast(pl.List(pl.String)).alias(name)
        else:
            yield pl.lit(None, pl.String).alias(name)
    elif isinstance(kind, (pl.Object, pl.Null)):
        yield pl.lit(None, pl.String).alias(name)
    else:
        yield column.cast(pl.String).alias(name)


def open_file(path: Path, form: TextForm | None = None) -> DataFile:
    """Open a file as its first bytes say, or its name when they say nothing.

    Raises:
        SettingError: it does not exist, cannot be read, is empty, or is of another kind.
    """
    form = form or TextForm()
    source = Source(path)
    head = source.head(4096)
    suffix = Path(source.name).suffix.casefold()
    if head.startswith(b"PAR1") or (suffix in _PARQUET and not source.compression):
        if source.compression:
            raise SettingError(f"{path}: is Parquet within {source.compression}: unpack it, and replay what is in it")
        return ParquetFile(path, source.size)
    if head.startswith((b"ARROW1", b"Obj\x01", b"ORC", b"SQLite format 3")):
        raise SettingError(f"{path}: is neither CSV, JSON nor Parquet: write it as one of these")
    start = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")[:1]
    if suffix in _JSON or (suffix != ".csv" and start in (b"{", b"[") and form.separator is None):
        return JsonFile(source, form)
    if (
        suffix in _CSV
        or b"\0" not in head
        or head[:2] in (b"\xff\xfe", b"\xfe\xff")
        or source.encoding().startswith("utf-16")
    ):
        return CsvFile(source, form)
    raise SettingError(f"{path}: is neither CSV, NDJSON nor Parquet by its name or its first bytes")
