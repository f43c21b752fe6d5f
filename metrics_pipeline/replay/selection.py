"""SQL over a file, for what no option says: DuckDB answers it, and its result is replayed as a table of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Final

import duckdb
import polars as pl

from metrics_pipeline.errors import SettingError
from metrics_pipeline.replay.files import DataFile, ParquetFile, open_file
from metrics_pipeline.replay.recipe import Recipe

MEMORY_LIMIT: Final = "1GB"
"""Of a query; what needs more goes to temporary files."""


@contextmanager
def selected(query: str, files: Sequence[Path], recipe: Recipe, folder: Path) -> Iterator[list[DataFile]]:
    """What a query makes of each file, which is the table `input` in it.

    Columns of text that hold nothing but numbers are numbers in the query. It reaches nothing but the file: no other one,
    no network, no extension.

    Args:
        query: one SELECT.
        files: each for itself.
        recipe: how they are taken apart.
        folder: where temporary files may be.

    Raises:
        SettingError: a file cannot be read, or DuckDB refuses the query.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="select-", dir=folder) as place:
        results: list[DataFile] = []
        for number, path in enumerate(files):
            made = Path(place) / f"{number}.parquet"
            _answer(query, open_file(path, recipe.form()), path, made, Path(place))
            result = ParquetFile(made, made.stat().st_size, path)
            result.described = "what --select makes of it"
            results.append(result)
        yield results


def _answer(query: str, file: DataFile, path: Path, made: Path, place: Path) -> None:
    connection = duckdb.connect(
        config={
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "memory_limit": MEMORY_LIMIT,
            "threads": "2",
            "temp_directory": str(place / "duckdb"),
        }
    )
    try:
        connection.execute("SET TimeZone = 'UTC'")
        pieces = _pieces(file, path, place)
        connection.execute(
            "CREATE VIEW input AS SELECT * FROM read_parquet(?, union_by_name = true)".replace("?", _literal(pieces))
        )
        connection.execute(f"SET allowed_directories = [{_quote(str(place))}]")
        connection.execute(f"SET allowed_paths = {_literal(pieces)}")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        statements = connection.extract_statements(query)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise SettingError("--select: give one SELECT over the table input")
        connection.execute(f"COPY ({query.strip().rstrip(';')}) TO {_quote(str(made))} (FORMAT parquet)")
    except duckdb.Error as error:
        raise SettingError(
            f"--select: {str(error).splitlines()[0]}; the columns of input are {', '.join(file.columns)}"
        ) from error
    finally:
        connection.close()


def _pieces(file: DataFile, path: Path, place: Path) -> list[str]:
    """The records of a file as Parquet, a block each, with numbers where a column of text holds nothing else."""
    if isinstance(file, ParquetFile):
        return [str(path.resolve())]
    folder = Path(tempfile.mkdtemp(dir=place))
    kinds: dict[str, _Kind] = {}
    pieces = []
    for number, block in enumerate(file.blocks()):
        if block.bad:
            one = block.bad[0]
            raise SettingError(f"{file.place(one.number)}: {one.error.detail}; correct it: --select needs every line")
        for cells in block.frame.get_columns():
            if cells.dtype == pl.String:
                kinds[cells.name] = max(kinds.get(cells.name, _Kind.EMPTY), _kind(cells))
        pieces.append(folder / f"{number}.parquet")
        block.frame.write_parquet(pieces[-1])
    types = {_Kind.WHOLE: pl.Int64, _Kind.NUMBER: pl.Float64}
    for piece in pieces:
        frame = pl.read_parquet(piece)
        frame.with_columns(
            pl.col(name).str.strip_chars().replace("", None).cast(types[kinds[name]])
            for name in frame.columns
            if kinds.get(name) in types
        ).write_parquet(piece)
    return [str(piece) for piece in pieces]


class _Kind(IntEnum):
    """What a column of text holds; of two blocks the greater one counts."""

    EMPTY = 0
    WHOLE = 1
    NUMBER = 2
    TEXT = 3


def _kind(cells: pl.Series) -> _Kind:
    texts = cells.str.strip_chars().replace("", None).drop_nulls()
    if texts.is_empty():
        return _Kind.EMPTY
    # A zero in front belongs to a name, and so do more digits than a number holds.
    if texts.str.contains(r"^-?(0|[1-9]\d{0,18})$").all() and texts.cast(pl.Int64, strict=False).null_count() == 0:
        return _Kind.WHOLE
    if texts.str.contains(r"^[+-]?((0|[1-9]\d{0,17})(\.\d*)?|\.\d+)([eE][+-]?\d+)?$").all():
        return _Kind.NUMBER
    return _Kind.TEXT


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _literal(paths: Sequence[str]) -> str:
    return "[" + ", ".join(map(_quote, paths)) + "]"
