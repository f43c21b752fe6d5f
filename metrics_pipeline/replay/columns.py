"""What the columns of a file of readings mean: found by name, or said by the user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from metrics_pipeline.errors import RecordError, SettingError
from metrics_pipeline.metric import MetricName
from metrics_pipeline.replay.cells import names, shown

TIME_NAMES: Final = ("date", "time", "timestamp", "published_at", "datetime", "ts")
DEVICE_NAMES: Final = ("device", "device_id")
METRIC_COLUMN, VALUE_COLUMN, TAGS_COLUMN = "metric_name", "value", "tags"
"""The columns of the long form, one reading a line, as the table `metrics` has them."""

METRICS: Final = {name.name.lower(): int(name) for name in MetricName}
_CODES: Final = frozenset(METRICS.values())
_METRIC_TEXTS: Final = METRICS | {str(code): code for code in METRICS.values()}


@dataclass(frozen=True)
class ReplayOptions:
    """How files are to be read.

    Attributes:
        mapping: metric by column, for columns that are not named as their metric is.
        device: device of all readings; a name that is no UUID stands for the UUIDv5 of that name.
        device_column: column that holds the device; default: one named `device` or `device_id`.
        time_column: column that holds the time; default: the one named `date`, `time`, `timestamp`, `published_at`,
            `datetime` or `ts`.
        tz: zone of times that name none.
        skip_bad: count and list bad lines instead of stopping at the first.
    """

    mapping: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    device_column: str | None = None
    time_column: str | None = None
    tz: str = "UTC"
    skip_bad: bool = False


def parse_mapping(texts: Iterable[str]) -> dict[str, str]:
    """Column and metric out of each `COLUMN=metric`.

    Raises:
        SettingError: a text is not of that form, or names a metric there is none of.
    """
    mapping = {}
    for text in texts:
        column, equals, metric = text.rpartition("=")
        if not equals or not column:
            raise SettingError(f"--map {text}: write it as COLUMN=metric, with one of {', '.join(METRICS)}")
        if column in mapping:
            raise SettingError(f"--map {text}: column {column} is mapped twice")
        mapping[column] = metric
        _code(column, metric)
    return mapping


@dataclass(frozen=True)
class LinePlaces:
    """Where in a line its cells are; -1 where there is none.

    Attributes:
        time: of the time.
        device: of the device.
        tags: of the tags.
        metric: of the metric's name or code, in the long form.
        value: of its value, in the long form.
        metrics: place, column and code of each metric that has a column of its own.
        ignored: columns that mean nothing here.
    """

    time: int
    device: int
    tags: int
    metric: int
    value: int
    metrics: tuple[tuple[int, str, int], ...]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class FileColumns:
    """The columns that matter in one file, by name; `find` makes it."""

    time: str
    device: str | None
    metric: str | None
    value: str | None
    mapping: Mapping[str, int]

    @classmethod
    def find(cls, columns: Sequence[str], options: ReplayOptions, where: str, *, uniform: bool = True) -> FileColumns:
        """Decide what each column means.

        Args:
            columns: names in the file's header, or in its first lines.
            options: what the user said.
            where: the file, for messages.
            uniform: whether every line has all the columns.

        Raises:
            SettingError: time, device or metrics are missing, or there are two for one; names the columns there are.
        """
        there = f"the columns of {where} are {names(columns)}"
        mapping = {}
        for column, metric in options.mapping.items():
            mapping[_named(column, columns, "--map", there)] = _code(column, metric)
        if options.time_column is not None:
            time = _named(options.time_column, columns, "--time", there)
        else:
            candidates = [name for name in columns if name.casefold() in TIME_NAMES]
            if len(candidates) != 1:
                what = f"{names(candidates)} may each be the time" if candidates else "none is named as a time"
                raise SettingError(f"{what}: say which with --time COLUMN; {there}")
            time = candidates[0]
        if options.device is not None and options.device_column is not None:
            raise SettingError("--device and --device-column exclude each other: give one")
        device = None
        if options.device_column is not None:
            device = _named(options.device_column, columns, "--device-column", there)
        elif options.device is None:
            candidates = [name for name in columns if name.casefold() in DEVICE_NAMES]
            if len(candidates) != 1:
                what = (
                    f"{names(candidates)} may each be the device" if candidates else "none is named device or device_id"
                )
                raise SettingError(f"{what}: give --device NAME or --device-column COLUMN; {there}")
            device = candidates[0]
        folded = {name.casefold(): name for name in columns}
        long = not mapping and METRIC_COLUMN in folded and VALUE_COLUMN in folded
        result = cls(
            time,
            device,
            folded[METRIC_COLUMN] if long else None,
            folded[VALUE_COLUMN] if long else None,
            mapping,
        )
        try:
            places = result.places(columns, uniform=uniform)
        except RecordError as error:
            raise SettingError(f"{where}: {error.detail}") from error
        if not long and not places.metrics:
            raise SettingError(
                f"{where}: no column is named as a metric ({', '.join(METRICS)}): say which is what with "
                f"--map COLUMN=metric; the columns are {names(columns)}"
            )
        return result

    def places(self, columns: Sequence[str], *, uniform: bool = True) -> LinePlaces:
        """Where the cells stand in lines with these columns, which may differ from line to line in NDJSON.

        Args:
            columns: in their order.
            uniform: False when they are those of several lines together, which may name one metric in several ways.

        Raises:
            RecordError: a column that every line needs is missing, or stands there twice.
        """
        time = self._place(self.time, columns)
        device = self._place(self.device, columns) if self.device is not None else -1
        metric = self._place(self.metric, columns) if self.metric is not None else -1
        value = self._place(self.value, columns) if self.value is not None else -1
        tags = next((at for at, name in enumerate(columns) if name.casefold() == TAGS_COLUMN), -1)
        if tags >= 0 and columns[tags] in self.mapping:
            tags = -1
        used = {time, device, metric, value, tags}
        metrics: dict[int, tuple[int, str, int]] = {}
        if self.metric is None:
            mapped = set(self.mapping.values())
            for at, name in enumerate(columns):
                code = self.mapping.get(name)
                if code is None and at not in used:
                    code = METRICS.get(name.casefold())
                    code = None if code in mapped else code
                if code is None:
                    continue
                if code in metrics and uniform:
                    raise RecordError("bad_metric", f"columns {names([metrics[code][1], name])} are the same metric")
                metrics[code] = (at, name, code)
                used.add(at)
        ignored = tuple(name for at, name in enumerate(columns) if at not in used and name)
        return LinePlaces(time, device, tags, metric, value, tuple(metrics.values()), ignored)

    @staticmethod
    def _place(column: str, columns: Sequence[str]) -> int:
        positions = [at for at, name in enumerate(columns) if name == column]
        if len(positions) != 1:
            what = "is missing" if not positions else "stands there twice"
            raise RecordError("missing_field", f"{column} {what}; there are {names(columns)}")
        return positions[0]


def metric_code(cell: object) -> int:
    """The code of a metric that a cell names, or holds as it stands.

    Raises:
        RecordError: there is no such metric.
    """
    code: object = cell
    if isinstance(cell, str):
        code = _METRIC_TEXTS.get(cell.strip().casefold())
    if not isinstance(code, int) or isinstance(code, bool) or code not in _CODES:
        known = ", ".join(f"{name} ({code})" for name, code in METRICS.items())
        raise RecordError("bad_metric", f"{shown(cell)} is no metric: there are {known}")
    return code


def _code(column: str, metric: str) -> int:
    code = METRICS.get(metric.strip().casefold())
    if code is None:
        raise SettingError(f"--map {column}={metric}: no metric has that name; there are {', '.join(METRICS)}")
    return code


def _named(column: str, columns: Sequence[str], option: str, there: str) -> str:
    """A column the user named: exactly, or but for its case when only one is meant."""
    if column in columns:
        return column
    candidates = [name for name in columns if name.casefold() == column.casefold()]
    if len(candidates) != 1:
        raise SettingError(f"{option} {column}: {'no' if not candidates else 'more than one'} such column; {there}")
    return candidates[0]
