"""Whether the archives are as they were made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metrics_pipeline.archive import manifest, parquet
from metrics_pipeline.archive.folder import ArchiveFolder, checksum
from metrics_pipeline.archive.manifest import Manifest
from metrics_pipeline.errors import ServiceError, SettingError

ShowProgress = Callable[[str, int, int], None]
"""What is done, how far it is, and of how much; 0 when that is not known."""


def nobody(_what: str, _done: int, _total: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with an archive.

    Attributes:
        archive: its name.
        problem: the file, and what is wrong with it.
    """

    archive: str
    problem: str

    def __str__(self) -> str:
        return (
            f"{self.problem}: bring {self.archive} back from a copy of the archive, or, while the table has it, archive it again "
            f"with `metrics-pipeline archive make {self.archive}`"
        )

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"archive": self.archive, "problem": self.problem}


def verify(folder: ArchiveFolder, names: Sequence[str] = (), progress: ShowProgress = nobody) -> list[Damage]:
    """Read archives, all of them by default, and say what is wrong with them.

    Raises:
        SettingError: there is none of a name, or the folder cannot be read.
    """
    there = folder.names()
    if unknown := [name for name in names if name not in there]:
        raise SettingError(f"{', '.join(unknown)}: there is no such archive in {folder.path}")
    chosen = list(names) or there
    damages = []
    for at, name in enumerate(chosen):
        progress(name, at, len(chosen))
        damages += [Damage(name, problem) for problem in problems(folder.path / name)]
    progress("done", len(chosen), len(chosen))
    return damages


def problems(path: Path) -> list[str]:
    """What is wrong with one archive."""
    try:
        archive = manifest.read(path)
    except ServiceError as error:
        return [str(error)]
    return list(file_problems(path, archive)) or list(_content_problems(path, archive))


def glance(folder: ArchiveFolder) -> list[Damage]:
    """What is wrong with the archives as far as it shows without reading them: manifests, and sizes of files.

    Raises:
        SettingError: the folder cannot be read.
    """
    return [Damage(name, problem) for name in folder.names() for problem in _seen(folder.path / name)]


def _seen(path: Path) -> list[str]:
    try:
        archive = manifest.read(path)
    except ServiceError as error:
        return [str(error)]
    return list(file_problems(path, archive, read=False))


def file_problems(path: Path, archive: Manifest, *, read: bool = True) -> Iterator[str]:
    """What is wrong with its files as such; `read` says whether each byte is looked at."""
    named = {file.name for file in archive.files}
    for file in archive.files:
        place = path / file.name
        try:
            size = place.stat().st_size
            if size != file.bytes:
                yield f"{place}: it has {size:,} bytes instead of {file.bytes:,}"
            elif read and checksum(place) != file.sha256:
                yield f"{place}: its bytes have changed: the SHA-256 is not that of the manifest"
        except OSError as error:
            yield f"{place}: it cannot be read: {error.strerror}"
    for place in sorted(path.glob("*.parquet")):
        if place.name not in named:
            yield f"{place}: it does not belong there"


def _content_problems(path: Path, archive: Manifest) -> Iterator[str]:
    """What the readings in its files say against the manifest."""
    try:
        sums, first, last = parquet.sums([path / file.name for file in archive.files])
    except ServiceError as error:
        yield str(error)
        return
    if different := sums.differences(archive.sums):
        yield f"{path / manifest.FILE}: the readings differ from it in {', '.join(different)}"
    elif (first, last) != (archive.first, archive.last):
        yield f"{path / manifest.FILE}: the readings are of another time"
