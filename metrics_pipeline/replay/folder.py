"""A folder into which people put files: which are new, which are under way, and where they go in the end.

A file is noted, by its name and the hash of its content, before any of its readings is published, and moved when all of them
are acknowledged. The note says what the file was taken to mean and, when it is over, where it goes: whoever comes after a process
that was killed goes on there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Final

import msgspec

from metrics_pipeline.errors import BusyError, SettingError

DONE: Final = "done"
FAILED: Final = "failed"
NOTES: Final = ".under-way"
"""Where the notes stand, and the lock."""
REPORT: Final = ".report.json"
"""What is added to a file's name for its report."""
UNFINISHED: Final = (".part", ".tmp")
"""Ends of names of files that are still being written."""
FILES_REMEMBERED: Final = 10_000
LOCK_SECONDS: Final = 5.0
"""How long to wait for the lock: whoever only looks whether it is held has it for a moment."""

_COMPRESSED: Final = {".gz", ".zst", ".xz", ".bz2", ".zip"}


class Note(msgspec.Struct, kw_only=True):
    """A file that is under way.

    Attributes:
        name: of the file.
        sha256: of its content.
        size: in bytes.
        recipe: what it was taken to mean when it was begun: another recipe later does not make another meaning of it.
        skip_bad: whether its bad lines are left out.
        allow_implausible: whether its values may be impossible ones.
        begun: when, in UTC.
        attempts: how often it was begun, by processes that did not say how it ended.
        place: where it goes, relative to the folder; nothing until it is over.
        report: what became of it, when it is over.
    """

    name: str
    sha256: str
    size: int
    recipe: dict[str, Any]
    skip_bad: bool
    allow_implausible: bool
    begun: str
    attempts: int = 0
    place: str = ""
    report: dict[str, Any] = {}


@dataclass
class Look:
    """What stands in the folder.

    Attributes:
        ready: names of files that have stood still since the last look, oldest first.
        waiting: how many have not, or not yet.
        problems: a line for each thing that cannot be replayed.
        under_way: how many notes there are.
        seen: size and time of change of each file, for the next look.
    """

    ready: list[str] = field(default_factory=list)
    waiting: int = 0
    problems: list[str] = field(default_factory=list)
    under_way: int = 0
    seen: dict[str, list[int]] = field(default_factory=dict)


class ReplayFolder:
    """The folder REPLAY_FOLDER.

    Attributes:
        path: of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self) -> None:
        """See that files can be moved in it.

        Raises:
            SettingError: the folder is not there, or is not writable.
        """
        if not self.path.is_dir():
            what = "is no folder" if self.path.exists() else "does not exist"
            raise SettingError(f"REPLAY_FOLDER={self.path}: it {what}; make it, or correct the setting")
        for place in (self.path, *(self.path / name for name in (DONE, FAILED, NOTES))):
            if place.exists() and not os.access(place, os.R_OK | os.W_OK | os.X_OK):
                raise SettingError(
                    f"REPLAY_FOLDER={self.path}: files cannot be moved, since {place} is not writable; "
                    "give the account of the pipeline the right to write there"
                )

    def prepare(self) -> None:
        """Make the folders in it that are not there yet.

        Raises:
            SettingError: see `check`; or they cannot be made.
        """
        self.check()
        for name in (DONE, FAILED, NOTES):
            try:
                (self.path / name).mkdir(exist_ok=True)
            except OSError as error:
                raise SettingError(f"REPLAY_FOLDER={self.path}: {name} cannot be made: {_reason(error)}") from error

    def look(self, seen: Mapping[str, list[int]]) -> Look:
        """What stands in the folder by now.

        Args:
            seen: what the last look saw.

        Raises:
            SettingError: see `check`.
        """
        self.check()
        found = Look(under_way=len(list((self.path / NOTES).glob("*.json"))))
        order: list[tuple[int, str]] = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                if not _counts(entry.name):
                    continue
                try:
                    state = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(state.st_mode):
                        continue
                    _refuse_strange(entry.name, state)
                    identity = [state.st_size, state.st_mtime_ns]
                    if len(found.seen) < FILES_REMEMBERED:
                        found.seen[entry.name] = identity
                    with open(entry.path, "rb"):  # noqa: PTH123  # `scandir` gives text
                        pass
                    if seen.get(entry.name) == identity:
                        order.append((state.st_mtime_ns, entry.name))
                    else:
                        found.waiting += 1
                except FileNotFoundError:
                    continue
                except OSError as error:
                    found.problems.append(f"{_shown(entry.name)} cannot be read: {_reason(error)}")
                except SettingError as error:
                    found.problems.append(str(error))
        found.ready = [name for _, name in sorted(order)]
        found.problems.sort()
        return found

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only one that replays this folder, until the end or the process's.

        Raises:
            BusyError: somebody else does.
        """
        with (self.path / NOTES / "lock").open("a") as file:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise BusyError(f"another run replays {self.path}: let it end, or terminate it") from error
                    time.sleep(0.1)
            yield

    def locked(self) -> bool:
        """Whether somebody replays this folder at this moment."""
        try:
            with (self.path / NOTES / "lock").open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def notes(self) -> list[Note]:
        """Files that are under way, or were when somebody was killed.

        Raises:
            SettingError: a note cannot be read.
        """
        found = []
        for path in sorted((self.path / NOTES).glob("*.json")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Note))
            except (OSError, msgspec.DecodeError) as error:
                raise SettingError(
                    f"{path}: the note cannot be read: {error}; delete it, and its file begins anew"
                ) from error
        return sorted(found, key=lambda note: (note.begun, note.name))

    def write(self, note: Note) -> None:
        """Keep a note, so that it survives this machine."""
        _write(self._note_path(note), msgspec.json.encode(note))

    def drop(self, note: Note) -> None:
        """Forget a note."""
        self._note_path(note).unlink(missing_ok=True)

    def free_place(self, folder: str, note: Note) -> str:
        """A name in `done` or `failed` that no file has: that of the file, or the same with a number."""
        first, end = _parted(note.name)
        number = 1
        while True:
            place = f"{folder}/{note.name if number == 1 else f'{first}-{number}{end}'}"
            if not os.path.lexists(self.path / place) and self._may_report(place, note):
                return place
            number += 1

    def finish(self, note: Note) -> Path:
        """Write the report of a file that is over, move it, and forget its note; any step may have been done before.

        Returns:
            Where the file is.

        Raises:
            SettingError: it cannot be moved.
        """
        source = self.path / note.name
        try:
            there = source.is_file() and sha256(source) == note.sha256
            if there and os.path.lexists(self.path / note.place):
                note.place = self.free_place(note.place.partition("/")[0], note)
                self.write(note)
            target = self.path / note.place
            report = msgspec.json.format(msgspec.json.encode(note.report), indent=1)
            _write(target.with_name(target.name + REPORT), report + b"\n")
            if there:
                source.rename(target)
        except OSError as error:
            raise SettingError(
                f"{self.path / note.place}: {note.name} is over and cannot be moved there: {_reason(error)}"
            ) from error
        self.drop(note)
        return target

    def _may_report(self, place: str, note: Note) -> bool:
        """Whether no report stands there, or one of the same content: then the file was moved back, to be tried again."""
        path = self.path / f"{place}{REPORT}"
        if not os.path.lexists(path):
            return True
        with suppress(OSError, msgspec.DecodeError, AttributeError):
            return bool(msgspec.json.decode(path.read_bytes()).get("sha256") == note.sha256)
        return False

    def _note_path(self, note: Note) -> Path:
        key = hashlib.sha256(f"{note.name}\0{note.sha256}".encode()).hexdigest()[:32]
        return self.path / NOTES / f"{key}.json"


def sha256(path: Path) -> str:
    """Of the content of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _counts(name: str) -> bool:
    """Whether a name is one of a file that is to be replayed."""
    return not name.startswith(".") and not name.casefold().endswith((*UNFINISHED, REPORT))


def _refuse_strange(name: str, state: os.stat_result) -> None:
    if stat.S_ISLNK(state.st_mode):
        raise SettingError(f"{_shown(name)} is a link: put the file itself there")
    if not stat.S_ISREG(state.st_mode):
        raise SettingError(f"{_shown(name)} is no file")
    if not name.isprintable():
        raise SettingError(f"{_shown(name)}: its name has characters that cannot be shown: rename it")
    if len(name.encode()) > 200:
        raise SettingError(f"{_shown(name)}: its name is too long for a report beside it: at most 200 bytes")


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _parted(name: str) -> tuple[str, str]:
    """A name without its end, and the end: `.csv`, or `.csv.gz`."""
    path = PurePath(name)
    ends = path.suffixes[-2:] if path.suffix.casefold() in _COMPRESSED else path.suffixes[-1:]
    end = "".join(ends)
    return name.removesuffix(end), end


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _write(path: Path, content: bytes) -> None:
    """Write all of a file or nothing of it, and have it on disk."""
    half = path.with_name(f".{path.name[:100]}.half")
    with half.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
