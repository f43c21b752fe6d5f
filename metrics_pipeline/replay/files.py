"""Files of readings, line by line: CSV with and without quirks, NDJSON, Parquet; the first two also compressed by gzip."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

import msgspec
import polars as pl

from metrics_pipeline.errors import RecordError, SettingError

BAD_LINE: Final = "bad_line"
"""`RecordError.reason` of a line that does not fit its file, before it is looked at as a reading."""

MAX_LINE: Final = 2**20
"""Longest line, in characters: a longer one means that this is another kind of file."""

SAMPLE_LINES: Final = 1000
"""Lines of NDJSON that are looked at for the names of the columns."""

_SAMPLE_BYTES: Final = 1 << 16
_DELIMITERS: Final = ",;\t|"
_CSV = (".csv", ".tsv", ".txt")
_NDJSON = (".ndjson", ".jsonl", ".json")
_PARQUET = (".parquet", ".pq")


class Line(NamedTuple):
    """A line (a row, in Parquet) with its cells; all lines with the same columns share one tuple of them."""

    number: int
    columns: tuple[str, ...]
    cells: Sequence[object]


class BadLine(NamedTuple):
    """A line that cannot be taken apart into cells."""

    number: int
    error: RecordError


class DataFile(ABC):
    """One file of readings.

    Attributes:
        path: as it was given.
        size: in bytes.
        bytes_read: how much of it is done.
        columns: names in the header, or in the first lines; an unnamed one is an empty string.
    """

    unit: ClassVar[str] = ""
    """What stands before the number of a line in messages."""

    uniform: ClassVar[bool] = True
    """Whether every line has all the columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.bytes_read = 0
        self.columns: tuple[str, ...] = ()

    def place(self, number: int) -> str:
        """A line for messages."""
        return f"{self.path}:{self.unit}{number}"

    @abstractmethod
    def lines(self) -> Iterator[Line | BadLine]:
        """Every line but the header and blank ones.

        Raises:
            SettingError: the file cannot be read to its end.
        """


class TextFile(DataFile):
    """A file of lines of text."""

    def _texts(self) -> Iterator[str]:
        """The lines as they stand, each with its end; bytes that are not UTF-8 as lone surrogates."""
        number = 0
        raw = io.FileIO(self.path)
        buffered = io.BufferedReader(raw, 1 << 18)
        data = gzip.GzipFile(fileobj=buffered) if self.path.suffix.casefold() == ".gz" else buffered
        try:
            with io.TextIOWrapper(data, "utf-8-sig", errors="surrogateescape", newline="") as text:
                while line := text.readline(MAX_LINE):
                    number += 1
                    if len(line) == MAX_LINE and line[-1] not in "\r\n":
                        raise SettingError(f"{self.place(number)}: longer than {MAX_LINE} characters, is it text?")
                    if number % 1000 == 0:
                        self.bytes_read = raw.tell()
                    yield line
        except (OSError, EOFError, zlib.error) as error:
            raise SettingError(f"{self.path}: cannot be read beyond line {number}: {error}") from error
        finally:
            raw.close()
        self.bytes_read = self.size

    def _sample(self) -> list[str]:
        """The first whole lines.

        Raises:
            SettingError: there are none.
        """
        texts, size = [], 0
        reading = self._texts()
        for text in reading:
            texts.append(text)
            size += len(text)
            if size >= _SAMPLE_BYTES or len(texts) >= SAMPLE_LINES:
                break
        reading.close()  # type: ignore[attr-defined]  # it is a generator
        self.bytes_read = 0
        if not any(text.strip() for text in texts):
            raise SettingError(f"{self.path}: is empty")
        if texts[0].startswith(("\udcff\udcfe", "\udcfe\udcff")):
            raise SettingError(f"{self.path}: is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
        return texts


class CsvFile(TextFile):
    """Values separated by commas, semicolons, tabs or bars, below one line of column names.

    A first column that the header does not name (a row number) is recognized and left out, and so is an empty last one (a
    delimiter at the end of each line).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        sample = self._sample()
        self.delimiter = max(_DELIMITERS, key=lambda delimiter: _fit(sample, delimiter))
        header, *rows = _parsed(sample, self.delimiter)
        self.columns = tuple(name.strip() for name in header)
        widths = Counter(map(len, rows[:100]))
        self._width = len(header)
        self._cells = slice(None)
        if widths and widths.most_common(1)[0][0] == len(header) + 1:
            self._width += 1
            wide = [row for row in rows[:100] if len(row) == self._width]
            self._cells = slice(None, -1) if not any(row[-1].strip() for row in wide) else slice(1, None)

    def lines(self) -> Iterator[Line | BadLine]:
        """Every line but the header and blank ones; a quoted cell may hold line ends.

        Raises:
            SettingError: the file cannot be read to its end.
        """
        source = _Lines(self._texts())
        reader = csv.reader(source, delimiter=self.delimiter, skipinitialspace=True, strict=True)
        headed = False
        while True:
            first = source.begin()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadLine(first, RecordError(BAD_LINE, f"its quotes do not match: {error}"))
                source.give_back()
                continue
            if not any(cell.strip() for cell in cells):
                continue
            if not headed:
                headed = True
            elif len(cells) == self._width:
                yield Line(first, self.columns, cells[self._cells])
            else:
                detail = f"has {len(cells)} fields, the other lines have {self._width}"
                yield BadLine(first, RecordError(BAD_LINE, detail))
                source.give_back()


class _Lines:
    """Lines for `csv.reader`, which can be given back when a stray quote made it take too many.

    Attributes:
        taken: what it took for the record at hand.
    """

    def __init__(self, texts: Iterator[str]) -> None:
        self.taken: list[str] = []
        self._texts = texts
        self._again: deque[str] = deque()
        self._number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        text = self._again.popleft() if self._again else next(self._texts)
        self._number += 1
        self.taken.append(text)
        return text

    def begin(self) -> int:
        """Begin a record; returns the number of its first line."""
        self.taken.clear()
        return self._number + 1

    def give_back(self) -> None:
        """Take all lines but the first of the record once more."""
        self._again.extendleft(reversed(self.taken[1:]))
        self._number -= len(self.taken) - 1


def _parsed(sample: list[str], delimiter: str) -> list[list[str]]:
    try:
        rows = list(csv.reader(sample, delimiter=delimiter, skipinitialspace=True))
    except csv.Error:
        return [[]]
    return [row for row in rows if any(cell.strip() for cell in row)] or [[]]


def _fit(sample: list[str], delimiter: str) -> tuple[bool, int, int]:
    """How well a delimiter divides the lines as it divides the header."""
    header, *rows = _parsed(sample, delimiter)
    return len(header) > 1, sum(len(row) - len(header) in (0, 1) for row in rows[:100]), len(header)


class NdjsonFile(TextFile):
    """One JSON object a line; the lines need not have the same fields."""

    uniform = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        sample = self._sample()
        if sample[0].lstrip().startswith("["):
            raise SettingError(f"{path}: is a JSON array; write one object a line: jq -c '.[]' {path}")
        names: dict[str, None] = {}
        for text in sample:
            parsed = _object(text)
            if isinstance(parsed, dict):
                names |= dict.fromkeys(parsed)
        if not names:
            raise SettingError(f"{path}: no JSON object in its first {len(sample)} lines; there must be one a line")
        self.columns = tuple(names)

    def lines(self) -> Iterator[Line | BadLine]:
        """Every line that is not blank.

        Raises:
            SettingError: the file cannot be read to its end.
        """
        known: dict[tuple[str, ...], tuple[str, ...]] = {}
        for number, text in enumerate(self._texts(), 1):
            parsed = _object(text)
            if isinstance(parsed, RecordError):
                if text.strip():
                    yield BadLine(number, parsed)
                continue
            columns = tuple(parsed)
            if len(known) > 1000:
                known.clear()
            yield Line(number, known.setdefault(columns, columns), tuple(parsed.values()))


def _object(text: str) -> dict[str, object] | RecordError:
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        return RecordError(BAD_LINE, f"is not a JSON object: {error}")


class ParquetFile(DataFile):
    """A Parquet file, some thousand rows at a time."""

    unit = "row "
    _rows: ClassVar[int] = 20_000

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._frame = pl.scan_parquet(path, glob=False)
            schema = self._frame.collect_schema()
            self._count = int(self._frame.select(pl.len()).collect().item())
        except (pl.exceptions.PolarsError, OSError) as error:
            raise SettingError(f"{path}: is not a Parquet file that can be read: {error}") from error
        self.columns = tuple(schema)
        # Python's datetime has no nanoseconds, and polars would drop them.
        fine = [name for name, kind in schema.items() if isinstance(kind, pl.Datetime) and kind.time_unit == "ns"]
        self._frame = self._frame.with_columns(pl.col(name).dt.to_string("iso:strict") for name in fine)

    def lines(self) -> Iterator[Line | BadLine]:
        """Every row; its number counts from 1.

        Raises:
            SettingError: the file cannot be read to its end.
        """
        numbers = itertools.count(1)
        done = 0
        try:
            for frame in self._frame.collect_batches(chunk_size=self._rows, maintain_order=True):
                for cells in frame.iter_rows():
                    yield Line(next(numbers), self.columns, cells)
                done += frame.height
                self.bytes_read = self.size * done // max(self._count, 1)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise SettingError(f"{self.path}: cannot be read beyond row {done}: {error}") from error
        self.bytes_read = self.size


def open_file(path: Path) -> DataFile:
    """Open a file as its name says, or its first bytes when the name says nothing.

    Raises:
        SettingError: it does not exist, cannot be read, is empty, or is of another kind.
    """
    try:
        if not path.is_file():
            raise SettingError(f"{path}: {'is no regular file' if path.exists() else 'there is no such file'}")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {error.strerror}") from error
    suffixes = [suffix.casefold() for suffix in path.suffixes]
    suffix = next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")
    if head.startswith(b"PAR1") or suffix in _PARQUET:
        return ParquetFile(path)
    if suffix in _NDJSON:
        return NdjsonFile(path)
    if suffix != ".csv" and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return NdjsonFile(path)
    if suffix in _CSV or b"\0" not in head:
        return CsvFile(path)
    raise SettingError(f"{path}: is neither CSV, NDJSON nor Parquet by its name or its first bytes")
