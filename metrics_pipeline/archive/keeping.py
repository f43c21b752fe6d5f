"""An archive is made of a partition, and proved against it, before anything else may happen to the partition."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import psycopg

from metrics_pipeline import partitions, postgres
from metrics_pipeline.archive import checking, manifest, parquet, table
from metrics_pipeline.archive.checking import ShowProgress, nobody
from metrics_pipeline.archive.folder import ArchiveFolder, checksum
from metrics_pipeline.archive.manifest import ArchivedFile, Manifest
from metrics_pipeline.copy_sink.failpoint import Failpoints
from metrics_pipeline.errors import ServiceError, SettingError
from metrics_pipeline.partitions import Partition
from metrics_pipeline.settings import PartitionWidth, Settings

log = logging.getLogger(__name__)

FAILPOINTS: Final = "METRICS_ARCHIVE_FAILPOINTS"
"""As those of the COPY sink."""
PLACES: Final = ("watched", "writing", "written", "proved", "described", "moved", "published", "noted")
"""In the order in which an archive passes them."""


LATE: Final[dict[PartitionWidth, timedelta]] = {
    "minute": timedelta(minutes=2),
    "hour": timedelta(hours=1),
    "day": timedelta(hours=6),
    "month": timedelta(days=2),
}
"""How long after a partition was closed its archive may take."""


@dataclass(frozen=True, slots=True)
class Kept:
    """An archive of a partition.

    Attributes:
        archive: its manifest.
        made: whether it was made now; otherwise it was there.
    """

    archive: Manifest
    made: bool


def keep(settings: Settings, partition: Partition, progress: ShowProgress = nobody) -> Kept:
    """See to it that a partition has an archive that is whole: the one that it has, read again, or a new one.

    Raises:
        SettingError: METRICS_ARCHIVE is not set, or cannot be written.
        ServiceError: PostgreSQL is not reachable, or the archive cannot be made.
    """
    return _keep(settings, partition, progress, again=False)


def make(settings: Settings, partition: Partition, progress: ShowProgress = nobody) -> Kept:
    """Archive a partition, again where it has an archive already.

    Raises:
        SettingError: as `keep`.
        ServiceError: as `keep`.
    """
    return _keep(settings, partition, progress, again=True)


def keeper(settings: Settings) -> Callable[[Partition], None] | None:
    """What `retention.drop` has to call before it drops a partition; None when METRICS_ARCHIVE is not set."""
    if settings.archive_path is None:
        return None

    def kept(partition: Partition) -> None:
        keep(settings, partition)

    return kept


def require_whole(connection: postgres.Connection, partition: Partition) -> None:
    """Refuse to go on when the archive of a partition is not all that the transaction sees of it.

    It takes no time: what has changed a partition since it was archived is noted by those who do it. The transaction has to hold a
    lock of the partition that keeps writers away, SHARE at least, and to be READ COMMITTED.

    Raises:
        ServiceError: with the reason.
    """
    with table.errors(f"what is noted of {partition.name} cannot be read"):
        found = table.state(connection, partition.name)
    if found is None:
        raise ServiceError(f"there is no partition {partition.name}")
    problem = found.problem
    if problem is None:
        path = Path(found.folder or "") / (found.name or "")
        problem = next(iter(_unlike(path, found.manifest)), None)
    if problem:
        raise ServiceError(f"{partition.name}: {problem}: run `metrics-pipeline archive make {partition.name}`")


def _unlike(path: Path, sha256: str | None) -> Iterator[str]:
    """Why what lies in a folder is not the archive that was noted; its files are looked at, not read."""
    try:
        if checksum(path / manifest.FILE) != sha256:
            yield f"{path / manifest.FILE} is another one"
        for file in manifest.read(path).files:
            if (path / file.name).stat().st_size != file.bytes:
                yield f"{path / file.name} is not as it was"
    except OSError as error:
        yield f"{error.filename} cannot be read: {error.strerror}"
    except ServiceError as error:
        yield str(error)


def due(settings: Settings, now: datetime | None = None) -> list[Partition]:
    """The closed partitions that have no archive yet, in order of time.

    `metrics_before` is not among them, since it is never over: it is archived when it goes. Nor are those to which readings came after
    they were archived: they are archived again before they go, or when that is asked for.

    Raises:
        SettingError: METRICS_ARCHIVE is not set.
        ServiceError: PostgreSQL is not reachable.
    """
    folder = ArchiveFolder.of(settings)
    closed = [partition for partition in partitions.closed(settings, now) if partition.low is not None]
    there = set(folder.names())
    with postgres.connect(settings, "metrics_reader", autocommit=True) as connection, table.errors("the catalogue"):
        return [
            partition
            for partition in closed
            if not (
                (found := table.state(connection, partition.name))
                and found.name in there
                and found.folder == str(folder.path)
            )
        ]


def first(settings: Settings, now: datetime | None = None) -> datetime:
    """The bound that all partitions lie behind, those of the table and those of which there is an archive, except `metrics_before`.

    Raises:
        SettingError: METRICS_ARCHIVE is not set, or cannot be read.
        ServiceError: PostgreSQL is not reachable.
    """
    lows = [low for name in ArchiveFolder.of(settings).names() if (low := partitions.low_of(name))]
    try:
        lows += [one.low for one in partitions.every(settings) if one.low is not None]
    except ServiceError as error:
        if not isinstance(error.__cause__, psycopg.errors.UndefinedTable):
            raise
    # Where there is none yet, the first one will be that of now.
    return partitions.bound_before(settings.metrics_partition, min([*lows, now or datetime.now(UTC)]))


def behind(settings: Settings, now: datetime | None = None) -> list[str]:
    """What is wrong with the archive, one line each: partitions that should have one by now, and what shows without reading them.

    Raises:
        SettingError: METRICS_ARCHIVE cannot be read.
        ServiceError: PostgreSQL is not reachable.
    """
    if settings.archive_path is None:
        return []
    folder = ArchiveFolder.of(settings)
    differences = [problem] if (problem := folder.problem()) else []
    if late := due(settings, (now or datetime.now(UTC)) - LATE[settings.metrics_partition]):
        differences.append(
            f"{len(late)} closed partitions have no archive yet, {late[0].name} first: see what the runs of the job `archive` say"
        )
    return differences + [str(damage) for damage in checking.glance(folder)]


def archived(settings: Settings, low: datetime, high: datetime) -> list[Manifest]:
    """Archive each closed partition that begins within a stretch of time, again where it has an archive already.

    Of partitions that have gone, the archives are read and compared with their manifests.

    Raises:
        SettingError: METRICS_ARCHIVE is not set, or there is nothing of that time.
        ServiceError: PostgreSQL is not reachable, or an archive is damaged or cannot be made.
    """
    folder = ArchiveFolder.of(settings)
    closed = [one for one in partitions.closed(settings) if one.low is not None and low <= one.low < high]
    if closed:
        return [make(settings, partition).archive for partition in closed]
    gone = [one for one in folder.manifests() if one.low is not None and low <= one.low < high]
    if not gone:
        raise SettingError(
            f"no closed partition begins within {low:%Y-%m-%d %H:%M} and {high:%Y-%m-%d %H:%M} UTC, and there is no archive of that "
            "time: archive partitions that are over"
        )
    for damage in checking.verify(folder, [one.name for one in gone]):
        raise ServiceError(str(damage))
    return gone


def named(settings: Settings, names: Sequence[str]) -> list[Partition]:
    """The partitions of these names.

    Raises:
        SettingError: there is none of a name, or it has no end.
        ServiceError: PostgreSQL is not reachable.
    """
    with postgres.connect(settings, "metrics_reader", autocommit=True) as connection, table.errors("the catalogue"):
        there = {partition.name: partition for partition in partitions.listed(connection)}
    for name in names:
        if name not in there:
            raise SettingError(f"{name}: there is no such partition; there are {', '.join(there) or 'none'}")
        if there[name].high is None:
            raise SettingError(f"{name}: it takes the readings of the time to come, so it cannot be archived")
    return [there[name] for name in names]


def _keep(settings: Settings, partition: Partition, progress: ShowProgress, *, again: bool) -> Kept:
    folder = ArchiveFolder.of(settings)
    points = Failpoints(variable=FAILPOINTS, places=PLACES)
    with (
        _disk(folder),
        folder.locked(),
        postgres.connect(settings, "metrics_owner", autocommit=True) as connection,
    ):
        with table.errors(f"{partition.name} cannot be watched"):
            noted = table.state(connection, partition.name)
            if not again and (found := _whole(folder, noted, progress)):
                return Kept(found, made=False)
            table.watch(connection, partition.name)
            points.reach("watched")
        maker = _Maker(folder, connection, partition, points, progress)
        # One that something was added to since is not worth adding up.
        archive, source = (None, None) if again or (noted and noted.changes) else maker.adopted()
        made = archive is None
        if archive is None or source is None:
            with folder.making(partition.name) as making:
                archive, source = maker.made(making, noted)
                folder.publish(archive, points.reach)
            points.reach("published")
        with table.errors("that it is archived cannot be noted"):
            table.note(connection, source, archive.name, str(folder.path), archive.sha256)
        points.reach("noted")
        return Kept(archive, made=made)


@contextmanager
def _disk(folder: ArchiveFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ServiceError(
            f"METRICS_ARCHIVE={folder.path}: {error.filename or 'it'} cannot be written: {error.strerror}: "
            "make room there, then try again"
        ) from error


def _whole(folder: ArchiveFolder, noted: table.State | None, progress: ShowProgress) -> Manifest | None:
    """The archive that is noted of a partition, when nothing has changed and its files can be read."""
    if noted is None or noted.problem or noted.name is None or noted.folder != str(folder.path):
        return None
    progress(f"reading {noted.name}", 0, 0)
    path = folder.path / noted.name
    if found := list(_unlike(path, noted.manifest)) or checking.problems(path):
        log.warning("%s: it is made again", "; ".join(found))
        return None
    return manifest.read(path)


def _is_noted(path: Path, noted: table.State) -> bool:
    """Whether the archive in a folder is the one that is noted, or what is left of it."""
    try:
        return manifest.read(path).sha256 == noted.manifest
    except ServiceError:
        return True


class _Maker:
    """Reads a partition and writes its archive; the folder is locked and changes are noted by then."""

    def __init__(
        self,
        folder: ArchiveFolder,
        connection: postgres.Connection,
        partition: Partition,
        points: Failpoints,
        progress: ShowProgress,
    ) -> None:
        self._folder = folder
        self._connection = connection
        self._partition = partition
        self._points = points
        self._progress = progress

    def _likewise(self) -> list[Manifest]:
        """The archives of a partition of this name and these bounds."""
        wanted = (self._partition.name, self._partition.low, self._partition.high)
        return [one for one in self._folder.manifests() if (one.partition, one.low, one.high) == wanted]

    def adopted(self) -> tuple[Manifest, table.Source] | tuple[None, None]:
        """An archive that was not noted and is all of the partition: of a run that was killed, or one that was brought back."""
        if not (likewise := self._likewise()):
            return None, None
        name = self._partition.name
        with table.snapshot(self._connection, name) as source:
            self._progress(f"adding up {name}", 0, 0)
            sums = table.sums(self._connection, name)
        for archive in likewise:
            if archive.sums == sums and not checking.problems(self._folder.path / archive.name):
                return archive, source
        return None, None

    def made(self, making: Path, noted: table.State | None) -> tuple[Manifest, table.Source]:
        """An archive that was written, read again, and compared with the table; it has not got its name yet."""
        name = self._partition.name
        with table.snapshot(self._connection, name) as source:
            paths = self._written(making, source)
            self._points.reach("written")
            self._progress(f"adding up {name}", 0, 0)
            sums = table.sums(self._connection, name)
        self._progress(f"reading {name}", 0, 0)
        found, *span = parquet.sums(paths)
        if different := found.differences(sums):
            raise ServiceError(
                f"{making}: what was written differs from {name} in {', '.join(different)}: nothing was kept of it; "
                "look at the disk and at the memory of this machine, then try again"
            )
        self._points.reach("proved")
        archive = Manifest(
            name=self._name(paths, source, noted),
            partition=name,
            low=self._partition.low,
            high=self._partition.high,
            first=span[0],
            last=span[1],
            source=source.source,
            sums=sums,
            files=tuple(ArchivedFile(path.name, path.stat().st_size, checksum(path)) for path in paths),
            created_at=datetime.now(UTC),
        )
        return archive, source

    def _written(self, making: Path, source: table.Source) -> list[Path]:
        name = self._partition.name
        known = table.metrics(self._connection)

        def told(rows: int) -> None:
            self._progress(f"archiving {name}", rows, max(source.rows, rows))
            self._points.reach("writing")

        return parquet.write(making, table.frames(self._connection, name, known), known, told=told)

    def _name(self, paths: Sequence[Path], source: table.Source, noted: table.State | None) -> str:
        """That of the archive which the new one replaces: the one that is noted of the table, or one whose keys it all has; otherwise a free one.

        What was dropped from the table stands nowhere but in its archive, so no other one is ever replaced: the table of its name
        may be another one by now, or the database may have been set back to a time before.
        """
        root, name = self._folder.path, self._partition.name
        if noted and noted.name and noted.folder == str(root) and _is_noted(root / noted.name, noted):
            return noted.name
        for archive in self._folder.manifests():
            alike = (archive.low, archive.high) == (self._partition.low, self._partition.high)
            related = archive.partition == name and (alike or archive.source == source.source)
            if related and self._contains(paths, archive):
                return archive.name
        names, number = set(self._folder.names()), 1
        while name in names:
            number += 1
            name = f"{self._partition.name}.{number}"
        return name

    def _contains(self, paths: Sequence[Path], archive: Manifest) -> bool:
        try:
            return parquet.contains(paths, self._folder.files(archive))
        except ServiceError:  # it is damaged, and may still be mended
            return False
