"""Real readings out of files: a first look at all of them, which says what would be published, and then the readings."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import UUID

import msgspec
import numpy as np
import polars as pl

from metrics_pipeline.errors import RecordError, SettingError
from metrics_pipeline.metric import MetricName, Reading
from metrics_pipeline.replay.documents import BAD_LINE
from metrics_pipeline.replay.files import DataFile, open_file
from metrics_pipeline.replay.meaning import Meaning, fits, understand
from metrics_pipeline.replay.names import spoken
from metrics_pipeline.replay.readings import Devices, Outcome, Reader, messages
from metrics_pipeline.replay.recipe import Recipe, presets
from metrics_pipeline.replay.units import own_unit, suspected

BAD_LINES_LISTED: Final = 20
KEYS_REMEMBERED: Final = 1 << 24
"""Readings among which repeated keys are counted (128 MiB of hashes)."""
DEVICES_REMEMBERED: Final = 100_000

_SHOWN_READINGS: Final = 5
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_tags_of: Final = msgspec.json.Decoder(list[str]).decode


@dataclass
class MetricFigures:
    """What was read of one metric in one file.

    Attributes:
        source: the column, or the name in a long file.
        unit: of the file.
        converted: whether it is another one than the metric's.
        readings: how many.
        low: the least value, in the metric's unit.
        high: the greatest.
        total: their sum.
        first: the first five.
    """

    source: str
    unit: str
    converted: bool
    readings: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    total: float = 0.0
    first: list[float] = field(default_factory=list)

    def add(self, values: pl.Series) -> None:
        """Count some values."""
        self.readings += len(values)
        self.low = min(self.low, float(values.min()))  # type: ignore[arg-type]
        self.high = max(self.high, float(values.max()))  # type: ignore[arg-type]
        self.total += float(values.sum())
        if len(self.first) < _SHOWN_READINGS:
            self.first += values.head(_SHOWN_READINGS - len(self.first)).to_list()


@dataclass
class FileReport:
    """What a first look at one file found.

    Attributes:
        path: as it was given.
        described: kind, encoding, separator, header.
        decimal: the mark before decimals.
        time: the columns of the time, and how they are read.
        device: the device, or its column.
        metrics: figures by metric.
        lines: records that were looked at, blank ones and headers left out.
        readings: that come of them.
        filtered: records that `where` leaves out.
        empty_cells: cells of a metric without a value.
        bad_lines: records that give no reading because something in them is wrong.
        reasons: how many there are by the first thing wrong with them.
        bad_listed: the first of them, with file, number and reason.
        left_out: columns that are not looked at.
        left_out_names: in a long file: what is left out, by what its column of names says.
        notes: what a person should know.
        zone: where times without a zone are taken.
        zoneless: how many times have none.
        finer: how many times were finer than a microsecond.
        since: the first instant, in microseconds since 1970.
        until: the last one.
        fitting: presets that are made for such files.
        device_ids: UUIDs of the devices, the first 100,000.
    """

    path: str
    described: str = ""
    decimal: str = "."
    time: str = ""
    device: str = ""
    metrics: dict[MetricName, MetricFigures] = field(default_factory=dict)
    lines: int = 0
    readings: int = 0
    filtered: int = 0
    empty_cells: int = 0
    bad_lines: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    bad_listed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    left_out_names: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    zone: str = "UTC"
    zoneless: int = 0
    finer: int = 0
    since: int | None = None
    until: int | None = None
    fitting: list[str] = field(default_factory=list)
    device_ids: set[str] = field(default_factory=set)

    def text(self) -> list[str]:
        """What was understood, for people: one line a fact."""
        lines = [
            self.path,
            f"  is           {self.described}, decimals with {self.decimal!r}",
            f"  time         {self.time}",
        ]
        lines.append(f"  device       {self.device}")
        for metric, figures in self.metrics.items():
            way = f"{figures.unit} → {metric.unit}" if figures.converted else f"in {metric.unit}"
            what = f"  {metric.name.lower():<12} {figures.source}, {way}: {figures.readings:,} readings"
            if figures.readings:
                what += f" from {figures.low:.10g} to {figures.high:.10g}: {', '.join(f'{value:.10g}' for value in figures.first)}"
                what += ", …" if figures.readings > len(figures.first) else ""
            lines.append(what)
        if self.left_out:
            lines.append(f"  left out     {_some(self.left_out)}")
        if self.left_out_names:
            named = [
                f"{name or '(empty)'} ({count:,})"
                for name, count in sorted(self.left_out_names.items(), key=lambda one: (-one[1], one[0]))
            ]
            lines.append(f"  left out     records of {_some(named)}")
        if self.filtered:
            lines.append(f"  left out     {self.filtered:,} records by --where")
        lines += [f"  note         {note}" for note in self.notes]
        if self.fitting:
            lines.append(f"  note         it looks as --recipe {' or '.join(self.fitting)} has it")
        if self.bad_lines:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons.most_common())
            lines.append(f"  bad          {self.bad_lines:,} of {self.lines:,} records: {reasons}")
            lines += [f"               {text}" for text in self.bad_listed[:5]]
        span = f", {_instant(self.since)} to {_instant(self.until)}" if self.since is not None else ""
        lines.append(f"  gives        {self.readings:,} readings{span}")
        return lines


@dataclass
class ReplayReport:
    """What is in the files.

    Attributes:
        files: each of them.
        repeated_keys: readings whose device, metric and time were there before; the last one stays in the table.
        repeated_complete: False when there were more readings than can be remembered, so only the first were looked at.
        devices: UUID by name of each device that is named rather than numbered, the first thousand.
    """

    files: list[FileReport] = field(default_factory=list)
    repeated_keys: int = 0
    repeated_complete: bool = True
    devices: dict[str, str] = field(default_factory=dict)

    @property
    def lines(self) -> int:
        """Records that were looked at."""
        return sum(file.lines for file in self.files)

    @property
    def readings(self) -> int:
        """That come of them."""
        return sum(file.readings for file in self.files)

    @property
    def empty_cells(self) -> int:
        """Cells of a metric without a value."""
        return sum(file.empty_cells for file in self.files)

    @property
    def bad_lines(self) -> int:
        """Records that give no reading because something in them is wrong."""
        return sum(file.bad_lines for file in self.files)

    @property
    def reasons(self) -> dict[str, int]:
        """How many bad lines there are by the first thing wrong with them."""
        return dict(sum((file.reasons for file in self.files), Counter()))

    @property
    def bad_listed(self) -> list[str]:
        """The first bad lines."""
        return [text for file in self.files for text in file.bad_listed][:BAD_LINES_LISTED]

    @property
    def ignored(self) -> list[str]:
        """Columns that are not looked at."""
        return [*dict.fromkeys(name for file in self.files for name in file.left_out)]

    @property
    def zoneless(self) -> int:
        """Times without a zone."""
        return sum(file.zoneless for file in self.files)

    @property
    def zone(self) -> str:
        """Where they were taken."""
        return ", ".join(dict.fromkeys(file.zone for file in self.files if file.zoneless)) or "UTC"

    def summary(self) -> list[str]:
        """What was understood of each file, for people."""
        return [line for file in self.files for line in file.text()]

    def text(self) -> list[str]:
        """The report for people, one line a fact; nothing of what did not occur."""
        files = f"{len(self.files)} files" if len(self.files) != 1 else self.files[0].path
        text = [f"{self.readings:,} readings from {self.lines:,} lines of {files}"]
        if self.zoneless:
            text.append(f"{self.zoneless:,} times name no zone and were taken in {self.zone}")
        if finer := sum(file.finer for file in self.files):
            text.append(f"{finer:,} times are finer than a microsecond: what is finer was cut off")
        if self.ignored:
            text.append(f"columns ignored: {_some(self.ignored)}")
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


def _some(listed: Sequence[str]) -> str:
    return ", ".join(listed[:30]) + (f" and {len(listed) - 30:,} more" if len(listed) > 30 else "")


def _instant(micros: int | None) -> str:
    return "" if micros is None else (_EPOCH + timedelta(microseconds=micros)).isoformat(" ").replace("+00:00", " UTC")


class Replay:
    """Files that are understood; `look` reads all of them, and iterating gives their readings in batches.

    Attributes:
        total_bytes: size of all files.
        report: what `look` found so far.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        recipe: Recipe,
        *,
        batch_size: int = 1000,
        skip_bad: bool = False,
        allow_implausible: bool = False,
    ) -> None:
        """Understand the files.

        Args:
            files: in the order in which to read them.
            recipe: what they mean, as far as they do not say so themselves.
            batch_size: most readings in a batch.
            skip_bad: whether bad records are left out rather than refused.
            allow_implausible: whether values outside `MetricName.bounds` are readings.

        Raises:
            SettingError: something is missing or ambiguous; says what, and which option answers.
        """
        self.total_bytes = sum(file.size for file in files)
        self.report = ReplayReport()
        self._recipe = recipe
        self._batch_size = batch_size
        self._skip_bad = skip_bad
        self._allow_implausible = allow_implausible
        self._files = [(file, self._sample(file)) for file in files]
        self._meanings = [understand(file, sample, recipe) for file, sample in self._files]
        self._devices = Devices(self.report.devices)
        if recipe.device.name is not None:
            self._devices.note(recipe.device.name)
        self._keys = array("Q")
        self._looked = False
        self._published = False

    @staticmethod
    def _sample(file: DataFile) -> pl.DataFrame:
        blocks = file.blocks()
        try:
            for block in blocks:
                if block.frame.height:
                    return block.frame
        finally:
            blocks.close()  # type: ignore[attr-defined]  # it is a generator
        return pl.DataFrame({name: [] for name in file.columns}, schema=dict.fromkeys(file.columns, pl.String))

    @property
    def bytes_read(self) -> int:
        """How much of `total_bytes` is done."""
        return self.total_bytes if self._published else sum(file.bytes_read for file, _ in self._files)

    def recipes(self) -> list[Recipe]:
        """What each file means, as a recipe that leaves nothing open."""
        return [meaning.recipe for meaning in self._meanings]

    def look(self, on_progress: Callable[[], bool] = lambda: False) -> ReplayReport:
        """Read everything and say what would come of it; `bad_lines` and `readings` of the report are complete then.

        Args:
            on_progress: called after each block; returns whether to stop looking.

        Raises:
            SettingError: a file cannot be read to its end, or its values rather speak another unit than the one assumed.
        """
        if self._looked:
            return self.report
        self._stop = on_progress
        for at, (file, sample) in enumerate(self._files):
            columns, more_names = set(file.columns), set[str]()
            while True:
                found, unseen, strange = self._look_at(file, self._meanings[at])
                strange = {name for name in strange if spoken(name).metric is not None} - more_names
                if not unseen - columns and not strange:
                    break
                # Later records have further fields, or speak of further metrics: they may change what is meant.
                columns |= unseen
                more_names |= strange
                file.columns = (*file.columns, *sorted(unseen - set(file.columns)))
                before = self._meanings[at]
                self._meanings[at] = understand(file, sample, self._recipe, more_names)
                if (before.time, before.device_column, before.metrics, before.tags) == (
                    self._meanings[at].time, self._meanings[at].device_column, self._meanings[at].metrics, self._meanings[at].tags
                ):  # fmt: skip
                    found.left_out = list(self._meanings[at].left_out)
                    break
            self.report.files.append(found)
            self._doubt(found, self._meanings[at])
        keys = np.sort(np.frombuffer(self._keys, np.uint64))
        self.report.repeated_keys = int((keys[1:] == keys[:-1]).sum())
        self._keys = array("Q")
        self._looked = True
        return self.report

    def _look_at(self, file: DataFile, meaning: Meaning) -> tuple[FileReport, set[str], set[str]]:
        report = FileReport(str(file.path), file.described, meaning.decimal)
        report.time = f"{' and '.join(meaning.time)}: {meaning.clock_words}"
        report.device = (
            f"column {meaning.device_column}"
            if meaning.device is None
            else f"{self._recipe.device.name} ({meaning.device})"
        )
        report.left_out = list(meaning.left_out)
        report.notes = list(meaning.notes)
        if not self._recipe.fits:
            report.fitting = [name for name, preset in presets().items() if fits(preset, file.columns)]
        report.zone = meaning.recipe.time.zone or "UTC"
        for one in meaning.metrics:
            figures = report.metrics.get(one.metric)
            if figures is None:
                unit = one.conversion.unit if one.unit_column is None else f"what {one.unit_column} says"
                report.metrics[one.metric] = MetricFigures(
                    one.source, unit, one.conversion.changes or one.unit_column is not None
                )
            else:
                figures.source += f", {one.source}"
                figures.unit += f", {one.conversion.unit}"
                figures.converted |= one.conversion.changes
        unseen: set[str] = set()
        clock = meaning.clock
        clock.zoneless = clock.finer = 0
        keys = len(self._keys)
        for outcome, columns in self._outcomes(file, meaning, report):
            unseen.update(columns)
            report.lines += outcome.records
            report.filtered += outcome.filtered
            report.empty_cells += outcome.empty
            if len(report.left_out_names) < 1000:
                report.left_out_names += outcome.other_names
            report.readings += outcome.frame.height
            self._note_bad(file, report, outcome.bad)
            if outcome.frame.height:
                self._count(report, outcome.frame)
            if self._stop():
                break
        report.zoneless, report.finer = clock.zoneless, clock.finer
        known = set(file.columns)
        if unseen - known:
            del self._keys[keys:]
        return report, unseen, set(report.left_out_names)

    def _outcomes(
        self, file: DataFile, meaning: Meaning, report: FileReport | None
    ) -> Iterator[tuple[Outcome, list[str]]]:
        """What comes of each block; where a file breaks off is a bad line when these are to be skipped."""
        reader = Reader(meaning, self._devices, allow_implausible=self._allow_implausible)
        last = 0
        try:
            for block in file.blocks():
                last = max([last, *block.numbers.tail(1).to_list(), *(one.number for one in block.bad[-1:])])
                yield reader.read(block), block.frame.columns
        except SettingError as error:
            if not self._skip_bad or not last:
                raise
            if report is not None:
                self._note_bad(file, report, [(last + 1, RecordError(BAD_LINE, str(error)))])

    def _count(self, report: FileReport, frame: pl.DataFrame) -> None:
        since, until = frame["time"].min(), frame["time"].max()
        report.since = since if report.since is None else min(report.since, since)  # type: ignore[assignment,type-var]
        report.until = until if report.until is None else max(report.until, until)  # type: ignore[assignment,type-var]
        if len(report.device_ids) < DEVICES_REMEMBERED:
            report.device_ids.update(frame["device"].unique())
        for (code,), values in frame.select("metric", "value").partition_by("metric", as_dict=True).items():
            report.metrics[MetricName(code)].add(values["value"])
        if len(self._keys) < KEYS_REMEMBERED:
            hashes = frame.select(pl.struct("device", "time", "metric").hash()).to_series()
            self._keys.frombytes(hashes.to_numpy().astype(np.uint64).tobytes())
        else:
            self.report.repeated_complete = False

    @staticmethod
    def _note_bad(file: DataFile, report: FileReport, bad: Sequence[tuple[int, RecordError]]) -> None:
        report.bad_lines += len(bad)
        for number, error in bad:
            report.reasons[error.reason] += 1
            if len(report.bad_listed) < BAD_LINES_LISTED:
                report.bad_listed.append(f"{file.place(number)}: {error.reason}: {error.detail}")

    @staticmethod
    def _doubt(report: FileReport, meaning: Meaning) -> None:
        """Ask for a unit that nothing names, when the values of the whole file rather speak another one."""
        for one in meaning.metrics:
            figures = report.metrics[one.metric]
            if one.unit_said or one.unit_column is not None or not figures.readings:
                continue
            units = suspected(one.metric, figures.low, figures.total / figures.readings, figures.high)
            if units:
                word = one.metric.name.lower()
                options = " or ".join(f"--unit {word}={unit}" for unit in [*units, own_unit(one.metric)])
                raise SettingError(
                    f"{report.path}: {one.source} has values from {figures.low:g} to {figures.high:g}, which would be unusual in "
                    f"{one.metric.unit} and not in {' or '.join(units)}: say {options}"
                )

    def refuse(self) -> None:
        """Refuse, after a look, what must not be published.

        Raises:
            RecordError: a record is bad, and bad ones are not to be skipped; or there is no reading at all.
        """
        report = self.look()
        if report.bad_lines and not self._skip_bad:
            place, reason, detail = _parts(report.bad_listed[0])
            more = f"; bad lines: {report.bad_lines:,} in all" if report.bad_lines > 1 else ""
            raise RecordError(
                reason,
                f"{place}: {detail}; correct it, or leave bad lines out with --on-error skip{more}; nothing was published",
            )
        if not report.readings:
            first = f": {report.bad_listed[0]}" if report.bad_listed else ""
            raise RecordError(
                "no_reading", f"{', '.join(file.path for file in report.files)}: there is no reading in it{first}"
            )

    def __iter__(self) -> Iterator[list[Reading]]:
        """Batches of valid readings.

        Raises:
            RecordError: see `refuse`.
            SettingError: a file cannot be read to its end.
        """
        for frame in self._frames():
            batch = [
                Reading(UUID(device), _EPOCH + timedelta(microseconds=time), code, value, _tags_of(labels))
                for device, time, code, value, labels in frame.select(
                    "device", "time", "metric", "value", "tags"
                ).iter_rows()
            ]
            for at in range(0, len(batch), self._batch_size):
                yield batch[at : at + self._batch_size]

    def messages(self) -> Iterator[list[tuple[bytes, bytes]]]:
        """The same as keys and values for the broker.

        Raises:
            RecordError: as iterating does.
            SettingError: as iterating does.
        """
        for frame in self._frames():
            for at in range(0, frame.height, self._batch_size):
                yield messages(frame.slice(at, self._batch_size))

    def _frames(self) -> Iterator[pl.DataFrame]:
        self.refuse()
        for (file, _), meaning in zip(self._files, self._meanings, strict=True):
            for outcome, _ in self._outcomes(file, meaning, None):
                if outcome.frame.height:
                    yield outcome.frame
        self._published = True


def _parts(listed: str) -> tuple[str, str, str]:
    place, reason, detail = listed.split(": ", 2)
    return place, reason, detail


def open_replay(
    files: Sequence[Path],
    recipe: Recipe | None = None,
    *,
    batch_size: int = 10_000,
    skip_bad: bool = False,
    allow_implausible: bool = False,
) -> Replay:
    """Open files and decide what they mean, before the first reading is made.

    Args:
        files: CSV, JSON and Parquet, in any mixture.
        recipe: what they mean, as far as they do not say so themselves.
        batch_size: most readings in a batch.
        skip_bad: whether bad records are left out rather than refused.
        allow_implausible: whether values outside `MetricName.bounds` are readings.

    Raises:
        SettingError: a file cannot be read, or something is missing or ambiguous; says what to give.
    """
    if not files:
        raise SettingError("replay needs at least one file: metrics-pipeline replay FILE…")
    recipe = recipe or Recipe()
    opened = [open_file(path, recipe.form()) for path in files]
    return Replay(opened, recipe, batch_size=batch_size, skip_bad=skip_bad, allow_implausible=allow_implausible)
