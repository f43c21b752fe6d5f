"""Files of a folder, one after the other: published, told of, and moved, whoever was killed at whatever step before."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal

from polars.exceptions import PanicException

from metrics_pipeline.errors import PipelineError, RecordError, ServiceError, SettingError
from metrics_pipeline.producer.run import RunReport
from metrics_pipeline.replay.folder import DONE, FAILED, Note, ReplayFolder, sha256
from metrics_pipeline.replay.publishing import prepared, publish
from metrics_pipeline.replay.recipe import Recipe, checked_recipe, written
from metrics_pipeline.replay.source import ReplayReport
from metrics_pipeline.settings import Settings

ATTEMPTS: Final = 5
"""How often a file may be the one at which a process died before it is taken for the reason."""

GONE: Final = "its content was replaced, or it was taken away, after it was begun: some of its readings may be stored"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

log = logging.getLogger(__name__)

State = Literal["done", "failed", "left"]


@dataclass(frozen=True)
class Result:
    """What became of a file.

    Attributes:
        name: of the file.
        state: `done`, `failed`, or `left` where it stood, to be looked at again.
        document: its report, as it stands beside the file; see `document`.
        error: why it is not done.
    """

    name: str
    state: State
    document: dict[str, Any]
    error: str = ""


class FileError(PipelineError):
    """The fault is a file's, or its recipe's.

    Attributes:
        document: the report of it.
    """

    def __init__(self, said: str, document: dict[str, Any]) -> None:
        super().__init__(said)
        self.document = document


def replay_one(
    settings: Settings,
    path: Path,
    recipe: Recipe,
    *,
    skip_bad: bool = False,
    allow_implausible: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """One file, published: its report, as `document` has it.

    Args:
        settings: everything that can be set.
        path: the file.
        recipe: what it means.
        skip_bad: whether bad records are left out rather than refused.
        allow_implausible: whether values that are not possible are published.
        options: those of `run_producer`.

    Raises:
        FileError: the file cannot be read, something in it is missing or ambiguous, or it has bad lines.
        PipelineError: not all was acknowledged, or what ended the run.
    """
    begun = time.monotonic()
    found: ReplayReport | None = None
    meant, publishing = recipe, False
    try:
        with prepared(settings, [path], recipe, skip_bad=skip_bad, allow_implausible=allow_implausible) as source:
            found = source.report
            source.look()
            meant = recipe if recipe.select else source.recipes()[0]
            source.refuse()
            publishing = True
            report = publish(settings, source, **options)
    except (Exception, PanicException) as error:
        if isinstance(error, (SettingError, RecordError)):
            said = str(error)
        elif publishing or isinstance(error, PipelineError):
            raise
        else:
            # Whatever a library stumbles over while it reads: one file must not keep all others waiting for ever.
            log.exception("%s", path)
            said = f"{path}: cannot be read: {type(error).__name__}: {error}"
        raise FileError(said, document(found, meant, None, time.monotonic() - begun, said)) from error
    if report.state != "finished" or not report.clean:
        raise ServiceError(f"{path.name}: not all of it was acknowledged: {report.summary()}")
    return document(found, meant, report, time.monotonic() - begun)


def document(
    found: ReplayReport | None, recipe: Recipe, report: RunReport | None, seconds: float, error: str = ""
) -> dict[str, Any]:
    """The report of a file: what was understood, figures, bad lines, and the run that published it."""
    told: dict[str, Any] = {"error": error} if error else {}
    if found is not None:
        sinces = [file.since for file in found.files if file.since is not None]
        untils = [file.until for file in found.files if file.until is not None]
        told |= {
            "readings": found.readings,
            "devices": len(set().union(*(file.device_ids for file in found.files))),
            "from": _instant(min(sinces)) if sinces else None,
            "to": _instant(max(untils)) if untils else None,
            "lines": found.lines,
            "bad_lines": found.bad_lines,
            "bad_lines_by_reason": found.reasons,
            "bad_lines_listed": found.bad_listed,
            "empty_cells": found.empty_cells,
            "repeated_keys": found.repeated_keys,
            "understood": found.summary(),
        }
    told |= {"seconds": round(seconds, 3), "recipe": written(recipe)}
    if report is not None:
        told |= {"run_id": str(report.run_id), "acknowledged": report.acknowledged}
    return told


class Intake:
    """Replays files of a folder, and brings to its end what somebody else began."""

    def __init__(
        self,
        settings: Settings,
        folder: ReplayFolder,
        recipe: Recipe,
        *,
        skip_bad: bool = False,
        allow_implausible: bool = False,
        told: Callable[[Result], None] = lambda _result: None,
        **options: Any,
    ) -> None:
        """Prepare.

        Args:
            settings: everything that can be set.
            folder: where the files are.
            recipe: what they mean, but for those that were begun with another one.
            skip_bad: whether bad records are left out rather than refused.
            allow_implausible: whether values that are not possible are published.
            told: called with what became of each file, before it is moved; once more when a process died in between.
            options: those of `run_producer`.
        """
        self._settings = settings
        self._folder = folder
        self._recipe = recipe
        self._skip_bad = skip_bad
        self._allow_implausible = allow_implausible
        self._told = told
        self._options = options

    def run(self, names: Sequence[str], seconds: float = float("inf")) -> list[Result]:
        """Replay these files, in this order; each is moved before the next one begins.

        Args:
            names: files in the folder; one that is not there any more is passed over.
            seconds: after which no further file is begun.

        Raises:
            BusyError: another run replays this folder.
            SettingError: the folder cannot be used, or a file cannot be moved.
            PipelineError: what ended a run; the file stays where it is, noted, and so do those after it.
        """
        self._folder.prepare()
        deadline = time.monotonic() + seconds
        with self._folder.lock():
            results = list(self._recovered())
            for name in names:
                if time.monotonic() > deadline:
                    break
                if result := self._replay(name):
                    results.append(result)
        return results

    def _recovered(self) -> Iterator[Result]:
        """Move what was over, and tell of files that were begun and are gone, or have another content now."""
        for note in self._folder.notes():
            if note.place:
                yield self._end(note)
                continue
            path = self._folder.path / note.name
            try:
                there = path.is_file() and sha256(path) == note.sha256
            except OSError as error:
                log.warning("%s: %s", path, error)
                continue
            if not there:
                note.place = self._folder.free_place(FAILED, note)
                note.report = self._heading(note, FAILED) | {"error": GONE}
                self._folder.write(note)
                yield self._end(note)

    def _replay(self, name: str) -> Result | None:
        path = self._folder.path / name
        try:
            before = path.stat()
            digest = sha256(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            return Result(name, "left", {}, f"{name} cannot be read: {error.strerror}")
        note = self._note(name, digest, before.st_size)
        note.attempts += 1
        self._folder.write(note)
        try:
            state, report = self._published(path, note)
        except BaseException:
            # It was told to end, or a service is away: not the file's fault.
            note.attempts = 0
            self._folder.write(note)
            raise
        after = path.stat() if path.is_file() else None
        if after is None or (after.st_size, after.st_mtime_ns, after.st_ino) != (
            before.st_size,
            before.st_mtime_ns,
            before.st_ino,
        ):
            # What it has by now is another content: it is looked at again as such.
            self._folder.drop(note)
            return Result(name, "left", report, f"{name} was changed while it was read: it is replayed again")
        note.place = self._folder.free_place(DONE if state == "done" else FAILED, note)
        note.report = self._heading(note, state) | report
        self._folder.write(note)
        return self._end(note)

    def _note(self, name: str, digest: str, size: int) -> Note:
        """The note of a file that was begun before, else a new one."""
        for note in self._folder.notes():
            if (note.name, note.sha256) == (name, digest):
                return note
        return Note(
            name=name,
            sha256=digest,
            size=size,
            recipe=self._recipe.model_dump(exclude_unset=True),
            skip_bad=self._skip_bad,
            allow_implausible=self._allow_implausible,
            begun=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _published(self, path: Path, note: Note) -> tuple[State, dict[str, Any]]:
        if note.attempts > ATTEMPTS:
            return "failed", {"error": f"a process died at it {ATTEMPTS} times, perhaps for want of memory"}
        try:
            return "done", replay_one(
                self._settings,
                path,
                checked_recipe(note.recipe, f"recipe of {note.name}"),
                skip_bad=note.skip_bad,
                allow_implausible=note.allow_implausible,
                **self._options,
            )
        except FileError as error:
            return "failed", error.document

    def _end(self, note: Note) -> Result:
        state: State = "done" if note.place.startswith(f"{DONE}/") else "failed"
        result = Result(note.name, state, note.report, note.report.get("error", ""))
        self._told(result)
        self._folder.finish(note)
        return result

    def _heading(self, note: Note, state: str) -> dict[str, Any]:
        return {"file": note.name, "state": state, "sha256": note.sha256, "size": note.size, "begun": note.begun}


def _instant(micros: int) -> str:
    return (_EPOCH + timedelta(microseconds=micros)).isoformat()
