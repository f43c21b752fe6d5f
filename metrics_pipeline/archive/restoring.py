"""Readings come back out of an archive, as they were to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Final

import polars as pl

from metrics_pipeline import partitions, postgres
from metrics_pipeline.archive import checking, manifest, parquet, table
from metrics_pipeline.archive.checking import Damage, ShowProgress, nobody
from metrics_pipeline.archive.folder import ArchiveFolder
from metrics_pipeline.archive.manifest import Manifest
from metrics_pipeline.errors import ServiceError, SettingError
from metrics_pipeline.settings import Settings

BEGIN: Final = datetime(1, 1, 1, tzinfo=UTC)
"""No reading is of an earlier time."""


def named(settings: Settings, name: str) -> Manifest | None:
    """The archive of this name; None when there is none.

    Raises:
        SettingError: METRICS_ARCHIVE is not set.
        ServiceError: its manifest is damaged.
    """
    folder = ArchiveFolder.of(settings)
    return manifest.read(folder.path / name) if name in folder.names() else None


def between(settings: Settings, low: datetime, high: datetime) -> list[Manifest]:
    """The archives that hold readings of a stretch of time.

    Raises:
        SettingError: METRICS_ARCHIVE is not set, the stretch has no length, or there is no archive of that time.
    """
    if low >= high:
        raise SettingError(f"FROM {low.isoformat()} is not before TO {high.isoformat()}")
    found = [one for one in ArchiveFolder.of(settings).manifests() if one.covers(low, high)]
    if not found:
        raise SettingError(f"no archive holds readings from {low.isoformat()} to {high.isoformat()}")
    return sorted(found, key=lambda one: (one.low or BEGIN, one.created_at))


def restore(settings: Settings, archive: Manifest, progress: ShowProgress = nobody) -> None:
    """Bring the readings of an archive back into the table, all or none.

    Raises:
        ServiceError: the archive is damaged, PostgreSQL is not reachable, or a key is there with another value.
    """
    folder = ArchiveFolder.of(settings)
    progress(f"reading {archive.name}", 0, 0)
    for problem in checking.problems(folder.path / archive.name):
        raise ServiceError(f"nothing was restored: {Damage(archive.name, problem)}")
    high = archive.high
    if high is None:
        raise ServiceError(f"{archive.name}: it has no end")
    fill = filler(folder, archive, progress)
    partitions.restore(settings, archive.partition, archive.low or BEGIN, high, fill)


def filler(
    folder: ArchiveFolder, archive: Manifest, progress: ShowProgress = nobody
) -> Callable[[postgres.Connection, str], None]:
    """What copies an archive into a table, and compares the two in the same transaction."""

    def readings() -> Iterator[pl.DataFrame]:
        done = 0
        for path in folder.files(archive):
            for frame in parquet.read(path, table.BLOCK_ROWS):
                yield frame
                done += len(frame)
                progress(f"restoring {archive.name}", done, archive.sums.rows)

    def fill(connection: postgres.Connection, name: str) -> None:
        with table.errors(f"{archive.name} cannot be restored"):
            table.fill(connection, name, readings())
            progress(f"adding up {archive.name}", 0, 0)
            different = table.sums(connection, name).differences(archive.sums)
        if different:
            raise ServiceError(
                f"nothing was restored: {name} would differ from {archive.name} in {', '.join(different)}"
            )

    return fill
