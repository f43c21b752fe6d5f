"""Real readings out of files, in the order of their lines.

A line gives one reading per metric that has a column (the wide form), or one in all when it has the columns `metric_name`
and `value` (the long form: what the table and the wire look like). An empty cell gives none. A line that is wrong in any
cell that matters gives none at all: it is named with its file, number and reason.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

import numpy as np

from metrics_pipeline.errors import PipelineError, RecordError, SettingError
from metrics_pipeline.metric import Reading, check, encode
from metrics_pipeline.replay.cells import Clock, device_id, number, tags
from metrics_pipeline.replay.columns import FileColumns, LinePlaces, ReplayOptions, metric_code
from metrics_pipeline.replay.files import BadLine, DataFile, Line, open_file

BAD_LINES_LISTED: Final = 20
DEVICES_LISTED: Final = 1000
KEYS_REMEMBERED: Final = 1 << 24
"""Readings among which repeated keys are counted (128 MiB of hashes)."""


@dataclass
class ReplayReport:
    """What was in the files.

    Attributes:
        files: that were read, as they were given.
        lines: lines that were looked at (rows, in Parquet), blank ones and headers left out.
        readings: that were made of them.
        empty_cells: cells of a metric without a value.
        bad_lines: lines that gave no reading because something in them is wrong.
        reasons: how many bad lines there are by the first thing wrong with them.
        bad_listed: the first of them, with file, number and reason.
        repeated_keys: readings whose device, metric and time were there before; the last one stays in the table.
        repeated_complete: False when there were more readings than can be remembered, so only the first were looked at.
        ignored: columns that mean nothing here.
        zone: where times without a zone were taken.
        zoneless: how many times had none.
        devices: UUID by name of each device that is named rather than numbered, the first thousand.
    """

    files: list[str] = field(default_factory=list)
    lines: int = 0
    readings: int = 0
    empty_cells: int = 0
    bad_lines: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    bad_listed: list[str] = field(default_factory=list)
    repeated_keys: int = 0
    repeated_complete: bool = True
    ignored: list[str] = field(default_factory=list)
    zone: str = "UTC"
    zoneless: int = 0
    devices: dict[str, str] = field(default_factory=dict)

    def text(self) -> list[str]:
        """The report for people, one line a fact; nothing of what did not occur."""
        files = f"{len(self.files)} files" if len(self.files) != 1 else self.files[0]
        text = [f"{self.readings:,} readings from {self.lines:,} lines of {files}"]
        if self.zoneless:
            text.append(f"{self.zoneless:,} times name no zone and were taken in {self.zone}")
        if self.ignored:
            text.append(f"columns ignored: {', '.join(self.ignored)}")
        text += [f"device {name} is {uuid}" for name, uuid in list(self.devices.items())[:10]]
        if len(self.devices) > 10:
            text.append(f"and {len(self.devices) - 10:,} more devices by name")
        if self.empty_cells:
            text.append(f"{self.empty_cells:,} empty cells gave no reading")
        if self.repeated_keys:
            among = "" if self.repeated_complete else f" among the first {KEYS_REMEMBERED:,}"
            text.append(f"{self.repeated_keys:,} readings{among} repeat a device, metric and time: the last one stays")
        text += self.bad_listed
        if self.bad_lines:
            more = self.bad_lines - len(self.bad_listed)
            text.append(f"bad lines skipped: {self.bad_lines:,}" + (f", {more:,} of them not listed" if more else ""))
        return text


class Replay:
    """Files that are ready to be read; iterating gives batches of readings, once.

    Attributes:
        total_bytes: size of all files.
        report: what was found so far.
    """

    def __init__(self, files: Sequence[DataFile], options: ReplayOptions, batch_size: int) -> None:
        self.total_bytes = sum(file.size for file in files)
        self.report = ReplayReport(zone=options.tz)
        self._options = options
        self._batch_size = batch_size
        self._clock = Clock(options.tz)
        self._files = [
            (file, FileColumns.find(file.columns, options, str(file.path), uniform=file.uniform)) for file in files
        ]
        self._devices: dict[str, UUID] = {}
        self._device: UUID | None = None
        if options.device is not None:
            try:
                self._device = self._device_id(options.device)
            except RecordError as error:
                raise SettingError(f"--device: {error.detail}; give a UUID or a name") from error
        self._keys = array("q")
        for file, columns in self._files:
            self._note_ignored(columns.places(file.columns, uniform=file.uniform))

    @property
    def bytes_read(self) -> int:
        """How much of `total_bytes` is done."""
        return sum(file.bytes_read for file, _ in self._files)

    def __iter__(self) -> Iterator[list[Reading]]:
        """Batches of valid readings; when a bad line ends the replay, all readings before it come first.

        Raises:
            RecordError: a line is bad, and bad lines are not to be skipped.
            SettingError: a file cannot be read to its end.
        """
        batch: list[Reading] = []
        failure: PipelineError | None = None
        try:
            for readings in self._readings():
                batch += readings
                while len(batch) >= self._batch_size:
                    yield batch[: self._batch_size]
                    del batch[: self._batch_size]
        except PipelineError as error:
            failure = error
        if batch:
            yield batch
        if failure is not None:
            raise failure

    def messages(self) -> Iterator[list[tuple[bytes, bytes]]]:
        """The same as keys and values for the broker.

        Raises:
            RecordError: as iterating does.
            SettingError: as iterating does.
        """
        for batch in self:
            yield [encode(reading) for reading in batch]

    def _readings(self) -> Iterator[list[Reading]]:
        """The readings of each line."""
        try:
            for file, columns in self._files:
                self.report.files.append(str(file.path))
                known: dict[tuple[str, ...], LinePlaces] = {}
                for line in file.lines():
                    self.report.lines += 1
                    try:
                        if isinstance(line, BadLine):
                            raise line.error
                        places = known.get(line.columns)
                        if places is None:
                            if len(known) > 1000:
                                known.clear()
                            places = known[line.columns] = columns.places(line.columns)
                            self._note_ignored(places)
                        readings = self._of_line(line, places, columns)
                    except RecordError as error:
                        self._note_bad(file.place(line.number), error)
                        continue
                    self.report.readings += len(readings)
                    self._remember(readings)
                    yield readings
        finally:
            self.report.zoneless = self._clock.zoneless
            self._count_repeated()

    def _of_line(self, line: Line, places: LinePlaces, columns: FileColumns) -> list[Reading]:
        cells, column = line.cells, columns.time
        labels: list[str] = []
        try:
            moment = self._clock.instant(cells[places.time])
            if self._device is None:
                column = columns.device or ""
                device = self._device_id(cells[places.device])
            else:
                device = self._device
            if places.tags >= 0:
                column = line.columns[places.tags]
                labels = tags(cells[places.tags])
            metrics = places.metrics
            if columns.metric is not None:
                column = columns.metric
                metrics = ((places.value, columns.value or "", metric_code(cells[places.metric])),)
            readings = []
            for at, name, code in metrics:
                column = name
                value = number(cells[at])
                if value is not None:
                    readings.append(Reading(device, moment, code, value, labels))
        except RecordError as error:
            raise RecordError(error.reason, f"{column}: {error.detail}") from error
        self.report.empty_cells += len(metrics) - len(readings)
        for reading in readings:
            check(reading)
        return readings

    def _device_id(self, cell: object) -> UUID:
        known = self._devices.get(cell) if isinstance(cell, str) else None
        if known is None:
            known = device_id(cell)
            name = str(cell).strip()
            if len(self.report.devices) < DEVICES_LISTED and known.version == 5 and name.lower() != str(known):
                self.report.devices[name] = str(known)
            if isinstance(cell, str):
                if len(self._devices) >= 1 << 16:
                    self._devices.clear()
                self._devices[cell] = known
        return known

    def _note_bad(self, place: str, error: RecordError) -> None:
        if not self._options.skip_bad:
            raise RecordError(
                error.reason, f"{place}: {error.detail}; correct it, or leave bad lines out with --on-error skip"
            ) from error
        self.report.bad_lines += 1
        self.report.reasons[error.reason] = self.report.reasons.get(error.reason, 0) + 1
        if len(self.report.bad_listed) < BAD_LINES_LISTED:
            self.report.bad_listed.append(f"{place}: {error.reason}: {error.detail}")

    def _note_ignored(self, places: LinePlaces) -> None:
        self.report.ignored += [name for name in places.ignored if name not in self.report.ignored]

    def _remember(self, readings: list[Reading]) -> None:
        if len(self._keys) < KEYS_REMEMBERED:
            self._keys.extend(hash((it.device_id, it.published_at, it.metric_name)) for it in readings)
        else:
            self.report.repeated_complete = False

    def _count_repeated(self) -> None:
        keys = np.sort(np.frombuffer(self._keys, np.int64))
        self.report.repeated_keys = int((keys[1:] == keys[:-1]).sum())


def open_replay(files: Sequence[Path], options: ReplayOptions, batch_size: int = 1000) -> Replay:
    """Open files and decide what their columns mean, before the first reading is made.

    Args:
        files: CSV, NDJSON and Parquet, in any mixture.
        options: how to read them.
        batch_size: most readings in a batch.

    Raises:
        SettingError: a file cannot be read, or time, device or metrics are not found in it; says what to give.
    """
    if not files:
        raise SettingError("replay needs at least one file: metrics-pipeline replay FILE…")
    return Replay([open_file(path) for path in files], options, batch_size)
