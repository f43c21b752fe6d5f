"""Readings in Parquet: written by polars, row group by row group, and read again by DuckDB, which shares nothing with it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import duckdb
import polars as pl
from polars.exceptions import PolarsError
from polars.io.plugins import register_io_source

from metrics_pipeline import postgres
from metrics_pipeline.archive.folder import sync
from metrics_pipeline.archive.manifest import SCHEMA_VERSION, Sums
from metrics_pipeline.errors import ServiceError

FILE_ROWS: Final = 10_000_000
"""After how many readings another file is begun; they take 100 to 500 MB."""
GROUP_ROWS: Final = 250_000
"""Of a row group: what is held in memory at a time, here and by readers."""

_UTC: Final = pl.Datetime("us", "UTC")
_COLUMNS: Final[dict[str, pl.DataType | type[pl.DataType]]] = {
    "device_id": pl.String,
    "published_at": _UTC,
    "metric_name": pl.Int16,
    "metric": pl.String,
    "value": pl.Float64,
    "unit": pl.String,
    "tags": pl.List(pl.String),
    "created_at": _UTC,
}
SCHEMA: Final = pl.Schema(_COLUMNS)
"""Of the files."""

_MEANT: Final = {
    "device_id": "the device, a UUID in lower case",
    "published_at": "when it measured, microseconds in UTC",
    "metric_name": "what: a code",
    "metric": "what: the code's name",
    "value": "in `unit`",
    "unit": "of the value",
    "tags": "free labels, in order",
    "created_at": "when it was first stored, microseconds in UTC",
}
_READER_SETTINGS: Final[dict[str, Any]] = {
    "threads": 2,
    "memory_limit": "1GB",
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}


@dataclass(frozen=True, slots=True)
class Metrics:
    """Names and units of the metrics, by code."""

    names: Mapping[int, str]
    units: Mapping[int, str]

    def document(self) -> dict[str, dict[str, str]]:
        """As JSON has it."""
        return {str(code): {"name": self.names[code], "unit": self.units[code]} for code in sorted(self.names)}


def write(
    folder: Path,
    frames: Iterator[pl.DataFrame],
    metrics: Metrics,
    *,
    file_rows: int = FILE_ROWS,
    told: Callable[[int], None] = lambda _rows: None,
) -> list[Path]:
    """Write readings to as many files as they need, one at least, and wait until they are on the disk.

    Args:
        folder: where the files go.
        frames: of `SCHEMA`, in the order of the keys.
        metrics: what the codes mean.
        file_rows: after how many readings another file is begun.
        told: how many there are so far.

    Raises:
        ServiceError: they cannot be written.
    """
    kept = {
        "metrics_pipeline.schema_version": str(SCHEMA_VERSION),
        "metrics_pipeline.columns": json.dumps(_MEANT),
        "metrics_pipeline.metrics": json.dumps(metrics.document(), ensure_ascii=False),
    }
    paths: list[Path] = []
    frame: pl.DataFrame | None = next(frames, pl.DataFrame(schema=SCHEMA))
    done = 0

    def of_one_file(*_: object) -> Iterator[pl.DataFrame]:
        nonlocal frame, done
        rows = 0
        while frame is not None and rows < file_rows:
            yield frame
            rows, done = rows + len(frame), done + len(frame)
            told(done)
            frame = next(frames, None)

    while frame is not None:
        path = folder / f"part-{len(paths):05}.parquet"
        try:
            register_io_source(of_one_file, schema=SCHEMA).sink_parquet(
                path, compression="zstd", row_group_size=GROUP_ROWS, metadata=kept
            )
            sync(path)
        except (OSError, PolarsError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else postgres.one_line(error)
            raise ServiceError(f"{path} cannot be written: {reason}: make room there, then try again") from error
        paths.append(path)
    sync(folder)
    return paths


def sums(paths: Sequence[Path]) -> tuple[Sums, datetime | None, datetime | None]:
    """What the readings in files add up to, and the first and the last published_at.

    Raises:
        ServiceError: they cannot be read, or are not of `SCHEMA`.
    """
    with _reader(paths) as connection:
        row = connection.execute(postgres.query("archive_file_sums"), {"files": list(map(str, paths))}).fetchone()
    *numbers, first, last = row or ()
    return Sums(*map(int, numbers)), _moment(first), _moment(last)


def _moment(micros: int | None) -> datetime | None:
    return None if micros is None else datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)


def contains(paths: Sequence[Path], former: Sequence[Path]) -> bool:
    """Whether every key in former files stands in these, too.

    Raises:
        ServiceError: as `sums`.
    """
    files = {"files": list(map(str, paths)), "former": list(map(str, former))}
    with _reader(paths) as connection:
        return connection.execute(postgres.query("archive_absent"), files).fetchone() == (0,)


def metrics_of(paths: Sequence[Path]) -> Metrics:
    """The names and units that stand beside the codes.

    Raises:
        ServiceError: as `sums`, or a code has two of them.
    """
    with _reader(paths) as connection:
        statement = "SELECT DISTINCT metric_name, metric, unit FROM read_parquet($files)"
        rows = connection.execute(statement, {"files": list(map(str, paths))}).fetchall()
    if len({row[0] for row in rows}) < len(rows):
        raise ServiceError(f"{paths[0].parent}: a metric has two names or units")
    return Metrics({row[0]: row[1] for row in rows}, {row[0]: row[2] for row in rows})


@contextmanager
def _reader(paths: Sequence[Path]) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(config=_READER_SETTINGS | {"temp_directory": tempfile.gettempdir()}) as connection:
        try:
            yield connection
        except duckdb.Error as error:
            raise ServiceError(f"{paths[0].parent}: DuckDB cannot read it: {postgres.one_line(error)}") from error


def read(path: Path, rows: int) -> Iterator[pl.DataFrame]:
    """The readings of a file, as many at a time.

    Raises:
        ServiceError: it cannot be read.
    """
    at = 0
    try:
        lazy = pl.scan_parquet(path, glob=False)
        while len(frame := lazy.slice(at, rows).collect()):
            yield frame
            at += len(frame)
    except (OSError, PolarsError) as error:
        raise ServiceError(f"{path} cannot be read: {postgres.one_line(error)}") from error
