"""The folder of the archive: a folder for each archive, whole from the moment that it has its name."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import file_digest
from pathlib import Path
from typing import Final

from metrics_pipeline.archive import manifest
from metrics_pipeline.archive.manifest import Manifest
from metrics_pipeline.errors import BusyError, ServiceError, SettingError
from metrics_pipeline.settings import Settings

LOCK: Final = ".lock"
MAKING: Final = ".making-"
"""What stands before the name of an archive that is being made."""
FORMER: Final = ".former-"
"""What stands before the name of one while another one takes its place."""
PATIENCE_SECONDS: Final = 3600.0
"""How long another program that writes there is waited for."""


class ArchiveFolder:
    """METRICS_ARCHIVE. Only who holds its lock changes anything in it; readers need none.

    Attributes:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, settings: Settings) -> ArchiveFolder:
        """That of the settings.

        Raises:
            SettingError: there is none.
        """
        if settings.archive_path is None:
            raise SettingError("METRICS_ARCHIVE is not set: name a folder for the archive")
        return cls(settings.archive_path)

    def problem(self) -> str | None:
        """Why nothing can be written there, or None; the folder need not be there yet."""
        there = next(place for place in (self.path, *self.path.parents) if place.exists())
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            return None
        return f"METRICS_ARCHIVE={self.path}: {there} cannot be written by this user"

    def names(self) -> list[str]:
        """The archives there are, whole or damaged.

        Raises:
            SettingError: the folder cannot be read.
        """
        try:
            entries = sorted(self.path.iterdir()) if self.path.exists() else []
        except OSError as error:
            raise SettingError(f"METRICS_ARCHIVE={self.path}: it cannot be read: {error.strerror}") from error
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]

    def manifests(self) -> list[Manifest]:
        """Those of the archives that have a good one, in the order of their names."""
        found = []
        for name in self.names():
            with suppress(ServiceError):
                found.append(manifest.read(self.path / name))
        return found

    def files(self, archive: Manifest) -> list[Path]:
        """Paths of an archive's Parquet files, in the order of the keys."""
        return [self.path / archive.name / file.name for file in archive.files]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from changing the folder. What a program left that was killed while it did is put right first.

        Raises:
            SettingError: the folder cannot be written.
            BusyError: another program has held it for an hour.
        """
        try:
            if not self.path.exists():
                self.path.mkdir(parents=True, exist_ok=True)
                sync(self.path.parent)
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SettingError(
                f"METRICS_ARCHIVE={self.path}: it cannot be written: {error.strerror}: name a folder of this user's"
            ) from error
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not _try_lock(lock):
                if time.monotonic() > deadline:
                    raise BusyError(f"METRICS_ARCHIVE={self.path}: another program writes there: try again later")
                time.sleep(0.2)
            self._put_right()
            yield
        finally:
            os.close(lock)

    def _put_right(self) -> None:
        for path in self.path.glob(f"{FORMER}*"):
            final = self.path / path.name.removeprefix(FORMER)
            if final.exists():
                shutil.rmtree(path)
            else:
                path.rename(final)
        for path in self.path.glob(f"{MAKING}*"):
            shutil.rmtree(path)
        sync(self.path)

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """An empty folder in which the archive of a partition is made; when that fails, it goes."""
        path = self.path / f"{MAKING}{name}"
        path.mkdir()
        try:
            yield path
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise

    def publish(self, archive: Manifest, reach: Callable[[str], object] = lambda _place: None) -> None:
        """Give an archive that was made its manifest and its name, in place of a former one of that name.

        Args:
            archive: what was made.
            reach: told of each place at which it could break off.
        """
        making, final = self.path / f"{MAKING}{archive.partition}", self.path / archive.name
        temporary = making / f".{manifest.FILE}"
        temporary.write_text(archive.text(), "utf-8")
        sync(temporary)
        temporary.rename(making / manifest.FILE)
        sync(making)
        reach("described")
        former = self.path / f"{FORMER}{archive.name}"
        if final.exists():
            final.rename(former)
            reach("moved")
        making.rename(final)
        sync(self.path)
        if former.exists():
            shutil.rmtree(former)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
