"""From a block of a file to readings, column by column, and to the messages that are published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import polars as pl

from metrics_pipeline.errors import RecordError, SettingError
from metrics_pipeline.metric import check_tags
from metrics_pipeline.replay.cells import MISSING, Numbers, device_id, numbers, tags
from metrics_pipeline.replay.files import Block
from metrics_pipeline.replay.meaning import Meaning, MetricColumn, combined
from metrics_pipeline.replay.units import conversion, known_unit

NO_READING: Final = "no_reading"
"""`RecordError.reason` of a line in which no metric has a value."""

IMPLAUSIBLE: Final = "implausible"
"""`RecordError.reason` of a value outside `MetricName.bounds`."""

_NAMES_COUNTED: Final = 1000
_to_json: Final = msgspec.json.Encoder().encode


@dataclass
class Devices:
    """Devices that were met, and the names by which they were.

    Attributes:
        names: UUID by name of those that are named rather than numbered, the first thousand.
    """

    names: dict[str, str] = field(default_factory=dict)
    _known: dict[object, str | RecordError] = field(default_factory=dict)

    def of(self, cell: object) -> str | RecordError:
        """The device's UUID as text, or why there is none."""
        found = self._known.get(cell)
        if found is None:
            try:
                found = self.note(cell)
            except RecordError as error:
                found = error
            if len(self._known) >= 1 << 16:
                self._known.clear()
            self._known[cell] = found
        return found

    def note(self, cell: object) -> str:
        """The same, for a device that must be one.

        Raises:
            RecordError: it is empty or cannot be a name.
        """
        if isinstance(cell, str) and cell.strip().casefold() in ("nan", "null", "none", "<na>"):
            raise RecordError("bad_uuid", "is empty")
        device = device_id(cell)
        name = str(cell).strip()
        if len(self.names) < 1000 and device.version == 5 and name.lower() != str(device):
            self.names[name] = str(device)
        return str(device)


@dataclass
class Outcome:
    """What came out of a block.

    Attributes:
        frame: its readings: `line`, `device`, `time` (microseconds since 1970), `metric`, `value`, `tags` (JSON).
        bad: number and reason of each record that gave none because something in it is wrong.
        records: how many were looked at.
        filtered: how many `where` left out.
        empty: cells of a metric without a value.
        other_names: in a long file: what was left out, by what its column of names says.
    """

    frame: pl.DataFrame
    bad: list[tuple[int, RecordError]]
    records: int
    filtered: int
    empty: int
    other_names: Counter[str]


class Reader:
    """Makes readings of the blocks of one file."""

    def __init__(self, meaning: Meaning, devices: Devices, *, allow_implausible: bool) -> None:
        self._meaning = meaning
        self._devices = devices
        self._allow_implausible = allow_implausible

    def read(self, block: Block) -> Outcome:
        """The readings of a block; a record that is wrong in any cell that matters gives none."""
        meaning = self._meaning
        bad = [(one.number, one.error) for one in block.bad]
        records = len(bad) + block.frame.height
        frame = block.frame.with_columns(
            pl.lit(None, pl.String).alias(name) for name in self._needed() if name not in block.frame.columns
        )
        frame = frame.with_columns(block.numbers.alias("\0line"))
        before = frame.height
        for column, values in meaning.where.items():
            frame = frame.filter(_holds(frame[column], values))
        filtered = before - frame.height
        other_names: Counter[str] = Counter()
        if meaning.names is not None:
            frame, other_names = self._of_known_names(frame, meaning.names)
        lines = frame["\0line"]
        if frame.is_empty():
            return Outcome(_no_readings(), bad, records, filtered, 0, other_names)
        wrong: dict[int, RecordError] = {}

        def note(column: str, errors: Mapping[int, RecordError]) -> None:
            for place, error in errors.items():
                wrong.setdefault(place, RecordError(error.reason, f"{column}: {error.detail}"))

        time = frame[meaning.time[0]] if len(meaning.time) == 1 else combined(frame, meaning.time)
        moments, errors = meaning.clock.column(time)
        note(" and ".join(meaning.time), errors)
        outside = ((moments < _FIRST) | (moments > _LAST)).fill_null(value=False)
        note(
            " and ".join(meaning.time),
            {
                place: RecordError("bad_time", "is not between the years 1 and 9999")
                for place in outside.arg_true().to_list()
            },
        )
        if meaning.device is not None:
            devices = pl.Series("device", [str(meaning.device)], pl.String).new_from_index(0, frame.height)
        else:
            devices, errors = self._by_value(frame[meaning.device_column or ""], self._devices.of)
            note(meaning.device_column or "", errors)
        labels = pl.Series("tags", ["[]"], pl.String).new_from_index(0, frame.height)
        if meaning.tags is not None:
            labels, errors = self._by_value(frame[meaning.tags], _tags_json)
            note(meaning.tags, errors)
        parts, empty = self._metrics(frame, note)
        base = pl.DataFrame(
            {"line": lines, "device": devices.alias("d"), "time": moments, "tags": labels}, strict=False
        )
        base.columns = ["line", "device", "time", "tags"]
        found = pl.concat([base.with_columns(metric=pl.lit(int(one.metric), pl.Int64), value=values, at=pl.int_range(pl.len()))
                           .filter(pl.col("value").is_not_null()) for one, values in parts]) if parts else _no_readings()  # fmt: skip
        if meaning.names is None and len({one.metric for one in meaning.metrics}) < len(meaning.metrics):
            double = found.group_by("at", "metric").len().filter(pl.col("len") > 1)
            wrong |= {
                place: RecordError("bad_metric", "two columns have a value for one metric")
                for place in double["at"].to_list()
            }
        if meaning.names is None:
            rows = set(found["at"].to_list()) if len(found) < frame.height * len(parts) else None
            if rows is not None and len(rows) < frame.height:
                applies = self._applies(frame)
                for place in range(frame.height):
                    if place not in rows and place not in wrong and applies[place]:
                        wrong[place] = RecordError(NO_READING, "no metric has a value in it")
        if wrong:
            places = pl.Series(sorted(wrong), dtype=pl.Int64)
            found = found.filter(~pl.col("at").is_in(places.implode()))
            bad += [(lines[place], wrong[place]) for place in sorted(wrong)]
            bad.sort(key=lambda one: one[0])
        found = found.sort("at", maintain_order=True).select("line", "device", "time", "metric", "value", "tags")
        return Outcome(found, bad, records, filtered, empty, other_names)

    def _needed(self) -> list[str]:
        meaning = self._meaning
        needed = [*meaning.time, meaning.device_column, meaning.tags, meaning.names, *meaning.where]
        for one in meaning.metrics:
            needed += [one.column, one.unit_column, *one.where]
        return [*dict.fromkeys(name for name in needed if name is not None)]

    def _of_known_names(self, frame: pl.DataFrame, column: str) -> tuple[pl.DataFrame, Counter[str]]:
        names = frame[column].cast(pl.String).str.strip_chars().fill_null("")
        known = names.is_in(pl.Series([one.name for one in self._meaning.metrics], dtype=pl.String).implode())
        others = names.filter(~known)
        counted = Counter(dict(others.value_counts().head(_NAMES_COUNTED).rows())) if len(others) else Counter()
        return frame.filter(known), counted

    def _applies(self, frame: pl.DataFrame) -> pl.Series:
        """Whether the conditions of any metric hold, record by record."""
        result = pl.Series([False], dtype=pl.Boolean).new_from_index(0, frame.height)
        for one in self._meaning.metrics:
            result = result | self._mask(frame, one)
        return result

    def _mask(self, frame: pl.DataFrame, one: MetricColumn) -> pl.Series:
        mask = pl.Series([True], dtype=pl.Boolean).new_from_index(0, frame.height)
        if one.name is not None and self._meaning.names is not None:
            mask = frame[self._meaning.names].cast(pl.String).str.strip_chars() == one.name
        for column, values in one.where.items():
            mask = mask & _holds(frame[column], values)
        return mask

    def _metrics(self, frame: pl.DataFrame, note: object) -> tuple[list[tuple[MetricColumn, pl.Series]], int]:
        parts = []
        empty = 0
        read: dict[tuple[str, tuple[str, ...]], Numbers] = {}
        for one in self._meaning.metrics:
            key = one.column, one.missing
            if key not in read:
                read[key] = numbers(frame[one.column], self._meaning.decimal, one.missing)
            got = read[key]
            narrowed = one.name is not None or bool(one.where)
            mask = self._mask(frame, one) if narrowed else None
            raw = got.values if mask is None else pl.select(pl.when(mask).then(got.values)).to_series()
            errors = {place: error for place, error in got.errors.items() if mask is None or mask[place]}
            there = frame.height if mask is None else int(mask.sum())
            empty += there - (len(raw) - raw.null_count()) - len(errors)
            scaled = raw * one.scale if one.scale != 1.0 else raw
            values = pl.select(one.conversion.of(pl.lit(scaled))).to_series() if one.conversion.changes else scaled
            if one.unit_column is not None:
                values, more = _by_unit(scaled, frame[one.unit_column], one, mask)
                errors |= more
            for place, unit in got.units.items():
                if (mask is None or mask[place]) and scaled[place] is not None:
                    try:
                        values[place] = _of_cell(float(scaled[place]), unit, one)
                    except RecordError as error:
                        errors[place] = error
            if not self._allow_implausible:
                errors |= _implausible(values, raw, one, errors)
            infinite = values.is_infinite().fill_null(value=False)
            errors |= {
                place: RecordError("bad_value", "is not a finite double") for place in infinite.arg_true().to_list()
            }
            note(one.column if one.name is None else f"{one.column} of {one.name}", errors)  # type: ignore[operator]
            parts.append((one, values.alias("value")))
        return parts, empty

    @staticmethod
    def _by_value(cells: pl.Series, of: object) -> tuple[pl.Series, dict[int, RecordError]]:
        """Another column out of one that holds few values."""
        if isinstance(cells.dtype, pl.List):
            found = [of(cell) for cell in cells.to_list()]  # type: ignore[operator]
        else:
            distinct = cells.unique().to_list()
            table = {cell: of(cell) for cell in distinct}  # type: ignore[operator]
            if len(distinct) * 4 < len(cells) and not any(isinstance(one, RecordError) for one in table.values()):
                if None in table:
                    return pl.Series([table[cell] for cell in cells.to_list()], dtype=pl.String), {}
                return cells.replace_strict(table, return_dtype=pl.String), {}
            found = [table[cell] for cell in cells.to_list()]
        errors = {place: one for place, one in enumerate(found) if isinstance(one, RecordError)}
        return pl.Series([None if isinstance(one, RecordError) else one for one in found], dtype=pl.String), errors


_FIRST: Final = -62_135_596_800_000_000
_LAST: Final = 253_402_300_799_999_999


def _no_readings() -> pl.DataFrame:
    return pl.DataFrame(schema={
        "line": pl.Int64, "device": pl.String, "time": pl.Int64, "tags": pl.String, "metric": pl.Int64, "value": pl.Float64, "at": pl.Int64
    })  # fmt: skip


def _holds(cells: pl.Series, values: Sequence[str]) -> pl.Series:
    """Whether cells say one of these, as text or as a number."""
    result = (
        cells.cast(pl.String, strict=False).str.strip_chars().is_in(pl.Series(list(values), dtype=pl.String).implode())
    )
    if cells.dtype.is_numeric():
        figures = []
        for value in values:
            try:
                figures.append(float(value))
            except ValueError:
                continue
        result = result | cells.cast(pl.Float64).is_in(pl.Series(figures, dtype=pl.Float64).implode())
    return result.fill_null(value=False)


def _tags_json(cell: object) -> str | RecordError:
    try:
        labels = tags(cell)
        check_tags(labels)
    except RecordError as error:
        return error
    return _to_json(labels).decode()


def _by_unit(
    values: pl.Series, units: pl.Series, one: MetricColumn, mask: pl.Series | None
) -> tuple[pl.Series, dict[int, RecordError]]:
    """Values whose unit stands in another column."""
    texts = units.cast(pl.String).str.strip_chars()
    result = values
    errors: dict[int, RecordError] = {}
    for text in texts.unique().to_list():
        chosen = texts.is_null() if text is None else (texts == text).fill_null(value=False)
        if mask is not None:
            chosen = chosen & mask.fill_null(value=False)
        if text is None or text.casefold() in MISSING:
            continue
        try:
            # Of what a file says only what is known beyond doubt: pint takes nearly any text for a unit.
            way = conversion(text if known_unit(text) else f"{text} is not known", one.metric)
        except SettingError as error:
            errors |= {
                place: RecordError("bad_value", f"{error}")
                for place in (chosen & values.is_not_null()).arg_true().to_list()
            }
            continue
        result = pl.select(pl.when(chosen).then(way.of(pl.lit(values))).otherwise(result)).to_series()
    return result, errors


def _of_cell(value: float, unit: str, one: MetricColumn) -> float:
    """A value whose cell names its unit, which must not be another one than its column's."""
    if one.unit_said and known_unit(one.conversion.unit) != unit:
        raise RecordError("bad_value", f"is in {unit}, its column in {one.conversion.unit}")
    try:
        way = conversion(unit, one.metric)
    except SettingError as error:
        raise RecordError("bad_value", str(error)) from error
    return float(pl.select(way.of(pl.lit(value))).item())


def _implausible(
    values: pl.Series, raw: pl.Series, one: MetricColumn, errors: Mapping[int, RecordError]
) -> dict[int, RecordError]:
    low, high = one.metric.bounds
    outside = ((values < low) | (values > high)).fill_null(value=False)
    if not outside.any():
        return {}
    word = one.metric.name.lower()
    found = {}
    for place in outside.arg_true().to_list():
        if place not in errors:
            said = raw[place]
            found[place] = RecordError(
                IMPLAUSIBLE,
                f"{word} of {values[place]:.10g} {one.metric.unit} is not possible ({low:g} to {high:g}): say --unit {word}=UNIT "
                f"when it is another unit, --missing {said:g} when it means none, or --allow-implausible",
            )
    return found


def messages(frame: pl.DataFrame) -> list[tuple[bytes, bytes]]:
    """Keys and values for the broker, byte for byte as `metric.encode` writes them.

    Args:
        frame: readings as `Outcome` has them.
    """
    if frame.is_empty():
        return []
    moment = pl.from_epoch(pl.col("time"), time_unit="us")
    fraction = pl.col("time") % 1_000_000
    texts = _to_json(frame["value"].to_list())[1:-1].decode().split(",")
    key = pl.concat_str(
        pl.lit('{"device_id":"'),
        pl.col("device"),
        pl.lit('","published_at":"'),
        pl.when(fraction == 0)
        .then(moment.dt.strftime("%Y-%m-%dT%H:%M:%SZ"))
        .otherwise(moment.dt.strftime("%Y-%m-%dT%H:%M:%S%.6fZ")),
        pl.lit('","metric_name":'),
        pl.col("metric").cast(pl.String),
    )
    made = frame.with_columns(text=pl.Series(texts, dtype=pl.String), key=key).select(
        key=(pl.col("key") + pl.lit("}")).cast(pl.Binary),
        value=pl.concat_str(
            pl.col("key"), pl.lit(',"value":'), pl.col("text"), pl.lit(',"tags":'), pl.col("tags"), pl.lit("}")
        ).cast(pl.Binary),
    )
    return list(zip(made["key"].to_list(), made["value"].to_list(), strict=True))
