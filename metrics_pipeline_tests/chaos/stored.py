"""The readings of the table and of its archives, as DuckDB sees them: it shares nothing with PostgreSQL, polars and the archive's own reader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import duckdb

from metrics_pipeline import postgres
from metrics_pipeline.archive.folder import ArchiveFolder
from metrics_pipeline.archive.manifest import Manifest
from metrics_pipeline.settings import Settings

_COLUMNS: Final = "device_id, epoch_us(published_at) AS published_at, metric_name, value, to_json(tags)::VARCHAR AS tags, epoch_us(created_at) AS created_at"
_KEY: Final = "device_id, published_at, metric_name"


class Stored:
    """Readings of the table."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection

    def _one(self, statement: str) -> int:
        row = self._connection.execute(statement).fetchone()
        return int(row[0]) if row else 0

    def _view(self, files: list[Path]) -> str:
        names = ", ".join(f"'{path}'" for path in files)
        return f"(SELECT {_COLUMNS} FROM read_parquet([{names}]))"

    def only_in(self, files: list[Path], table: str = "stored") -> int:
        """Readings of an archive that the table has not got, to the last bit."""
        return self._one(f"SELECT count(*) FROM (FROM {self._view(files)} EXCEPT ALL FROM {table})")

    def differing(self, files: list[Path], archive: Manifest) -> int:
        """Readings that only one of them has, within the archive's bounds."""
        micros = "epoch_us(TIMESTAMPTZ '{}')".format
        low = micros(archive.low.isoformat()) if archive.low else "-9223372036854775808"
        high = micros(archive.high.isoformat()) if archive.high else "9223372036854775807"
        own = f"(SELECT * FROM stored WHERE published_at >= {low} AND published_at < {high})"
        other = self._one(f"SELECT count(*) FROM (FROM {own} EXCEPT ALL FROM {self._view(files)})")
        return self.only_in(files, own) + other

    def keys_only_in(self, files: list[Path]) -> int:
        """Keys of archives that the table has not got."""
        if not files:
            return 0
        return self._one(
            f"SELECT count(*) FROM (SELECT DISTINCT {_KEY} FROM {self._view(files)}) AS a ANTI JOIN stored USING ({_KEY})"
        )


@contextmanager
def stored(settings: Settings, where: str, *values: Any) -> Iterator[Stored]:
    path = settings.data_dir / f"readings-{uuid4()}.csv"
    statement = f"""COPY (
        SELECT device_id, (extract(epoch FROM published_at) * 1000000)::bigint, metric_name, value, array_to_json(tags),
            (extract(epoch FROM created_at) * 1000000)::bigint
        FROM metrics WHERE {where}
    ) TO STDOUT (FORMAT csv)"""
    try:
        with (
            postgres.connect(settings, "metrics_reader") as connection,
            connection.cursor() as cursor,
            cursor.copy(statement.encode(), values) as copy,
            path.open("wb") as file,
        ):
            for block in copy:
                file.write(block)
        columns = "{'device_id': 'VARCHAR', 'published_at': 'BIGINT', 'metric_name': 'SMALLINT', 'value': 'DOUBLE', 'tags': 'VARCHAR', 'created_at': 'BIGINT'}"
        limits: dict[str, Any] = {"memory_limit": "1GB", "threads": 2, "temp_directory": str(settings.data_dir)}
        with duckdb.connect(config=limits) as connection_to_duck:
            kept = path.with_suffix(".parquet")
            connection_to_duck.execute(
                f"COPY (FROM read_csv('{path}', header = false, columns = {columns})) TO '{kept}' (FORMAT parquet)"
            )
            connection_to_duck.execute(f"CREATE VIEW stored AS FROM read_parquet('{kept}')")
            yield Stored(connection_to_duck)
    finally:
        path.unlink(missing_ok=True)
        path.with_suffix(".parquet").unlink(missing_ok=True)


def files(settings: Settings, archive: Manifest | None) -> list[Path]:
    return ArchiveFolder.of(settings).files(archive) if archive else []
