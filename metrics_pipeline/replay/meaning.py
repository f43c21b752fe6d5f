"""What the columns of one file mean: said by a recipe, found where it is beyond doubt, and asked for where it is not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar
from uuid import UUID

import polars as pl

from metrics_pipeline.errors import RecordError, SettingError
from metrics_pipeline.metric import MetricName
from metrics_pipeline.replay import names as words
from metrics_pipeline.replay.cells import MISSING, decimal_mark, device_id, names, numbers, shown
from metrics_pipeline.replay.files import DataFile
from metrics_pipeline.replay.names import METRICS, Spoken, spoken
from metrics_pipeline.replay.recipe import DevicePart, FilePart, LongPart, MetricPart, Recipe, TimePart
from metrics_pipeline.replay.times import ORDERS, UNITS, Clock, HeaderTime, find_zone, names_zone, orders_of, units_of
from metrics_pipeline.replay.units import Conversion, conversion, known_unit, own_unit, suspected
from metrics_pipeline.replay.units import fits as fits_metric

Said = TypeVar("Said")
TAGS_COLUMN: Final = "tags"
_UNIT_COLUMNS: Final = {"tempunit": "temperature", "temperatureunit": "temperature", "pressureunit": "pressure",
                        "pressunit": "pressure", "humidityunit": "humidity"}  # fmt: skip


@dataclass(frozen=True)
class MetricColumn:
    """Where the values of one metric stand, and what is done to them.

    Attributes:
        metric: what they are.
        column: where they stand.
        name: what the column of names says of them, in a long file; None in a wide one.
        conversion: from their unit into the metric's.
        unit_said: whether anything names their unit.
        unit_column: where the unit stands, record by record.
        scale: what they are multiplied by first.
        missing: what stands for no value.
        where: what other columns must hold.
    """

    metric: MetricName
    column: str
    name: str | None
    conversion: Conversion
    unit_said: bool
    unit_column: str | None = None
    scale: float = 1.0
    missing: tuple[str, ...] = ()
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The column, or the name in a long file."""
        return self.column if self.name is None else self.name


@dataclass(frozen=True)
class Meaning:
    """What the columns of a file mean.

    Attributes:
        time: one column, or the one of the day and the one of the time.
        clock: reads them.
        clock_words: how, in words.
        device: of all records; None when `device_column` says it.
        device_column: where it stands.
        tags: the column with tags.
        names: in a long file: the column that says what was measured.
        metrics: what is measured.
        decimal: the mark before decimals.
        where: what columns must hold.
        left_out: columns that are not looked at.
        notes: what a person should know.
        recipe: the same as a recipe that leaves nothing open.
    """

    time: tuple[str, ...]
    clock: Clock
    clock_words: str
    device: UUID | None
    device_column: str | None
    tags: str | None
    names: str | None
    metrics: tuple[MetricColumn, ...]
    decimal: str
    where: Mapping[str, Sequence[str]]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    recipe: Recipe


def understand(file: DataFile, sample: pl.DataFrame, recipe: Recipe, more_names: Collection[str] = ()) -> Meaning:
    """Decide what each column means.

    Args:
        file: its columns and what it says about them.
        sample: its first records.
        recipe: what was said.
        more_names: in a long file: what its column of names says beyond the sample.

    Raises:
        SettingError: something is missing or ambiguous; says what, and which option answers.
    """
    return _Understanding(file, sample, recipe, more_names).meaning()


class _Understanding:
    def __init__(self, file: DataFile, sample: pl.DataFrame, recipe: Recipe, more_names: Collection[str]) -> None:
        self.columns = list(file.columns)
        self.sample = sample.head(20_000)
        self.recipe = recipe
        self.more_names = more_names
        self.file = file
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.left_out_said = set(recipe.leave_out)
        self.answered: set[str] = set()
        texts = [text for name in self.columns if self._kind(name) == pl.String for text in self._texts(name, 300)]
        mark = recipe.file.decimal or decimal_mark(texts)
        self.decimal_unsure = mark is None
        self.decimal = mark or "."

    # --- Looking at the sample ---

    def _kind(self, name: str) -> pl.DataType | None:
        return self.sample.schema.get(name)

    def _texts(self, name: str, limit: int = 20_000) -> list[str]:
        """What the cells of a column say, without those that say nothing."""
        if name not in self.sample.columns:
            return []
        cells = self.sample[name].head(limit)
        if cells.dtype == pl.Float64:
            return [f"{value:.9f}".rstrip("0").rstrip(".") for value in cells.drop_nulls().drop_nans().to_list()]
        if isinstance(cells.dtype, (pl.List, pl.Binary)):
            return []
        texts = (text.strip() for text in cells.cast(pl.String).drop_nulls().to_list())
        return [text for text in texts if text.casefold() not in MISSING]

    def _named(self, column: str, option: str) -> str | None:
        """A column the user named: exactly, or but for its case when only one is meant."""
        if column in self.columns:
            return column
        for same in (
            [name for name in self.columns if name.casefold() == column.casefold()],
            [name for name in self.columns if name.rsplit(".", 1)[-1].casefold() == column.casefold()],
        ):
            if len(same) == 1:
                return same[0]
        self.problems.append(f"{option} {column}: {'no' if not same else 'more than one'} such column")
        return None

    # --- The parts ---

    def meaning(self) -> Meaning:
        recipe = self.recipe
        where = {self._named(name, "--where") or name: values for name, values in recipe.where.items()}
        device, device_column = self._device()
        long = self._long()
        taken = {device_column, *long[:3], *self.left_out_said} - {None}
        time = self._time({name for name in taken if name is not None})
        tags = next((name for name in self.columns if words.base(name) == TAGS_COLUMN), None)
        mapped = {one.column for one in recipe.metrics}
        if tags in taken or tags in mapped:
            tags = None
        used = {*(name for name in taken if name), *time, *([tags] if tags else [])}
        metrics = self._of_names(long, device_column) if long[0] and long[1] else self._of_columns(used)
        if self.decimal_unsure and metrics and any(self._kind(one.column) == pl.String for one in metrics):
            self.problems.append(
                "numbers such as 1,013 may have a decimal comma or not: say --decimal , or --decimal ."
            )
        for option, keys in (("--unit", recipe.units), ("--scale", recipe.scales)):
            self.problems += [
                f"{option} {key}: it is neither a metric nor a column that is one"
                for key in keys
                if key not in self.answered and key.casefold() not in METRICS
            ]
        clock, clock_words = self._clock(time)
        if self.problems:
            raise SettingError(self._asked())
        used |= {one.column for one in metrics} | {one.unit_column for one in metrics if one.unit_column}
        left_out = tuple(name for name in self.columns if name not in used and name not in self.file.unnamed)
        self._note_left_out([name for name in left_out if name not in self.left_out_said], metrics)
        meant = Meaning(
            tuple(time), clock, clock_words, device, device_column, tags, long[0] if long[1] else None, tuple(metrics),
            self.decimal, where, left_out, tuple(self.notes), Recipe(),
        )  # fmt: skip
        return Meaning(**{**meant.__dict__, "recipe": self._plan(meant, long)})

    def _asked(self) -> str:
        from metrics_pipeline.replay.recipe import presets

        text = f"{self.file.path}: {'; '.join(dict.fromkeys(self.problems))}; the columns are {names(self.columns)}"
        if self.columns == [str(at) for at in range(1, len(self.columns) + 1)] and self.sample.height:
            first = ", ".join(f"{name}: {cell}" for name, cell in zip(self.columns, self.sample.row(0), strict=True))
            text += f"; it has no header, so they are numbered, and the first record is {first}"
        if not self.recipe.fits:
            fitting = [name for name, preset in presets().items() if fits(preset, self.columns)]
            if fitting:
                text += f"; it looks as --recipe {' or '.join(fitting)} has it"
        return text

    def _device(self) -> tuple[UUID | None, str | None]:
        part = self.recipe.device
        if part.name is not None:
            try:
                return device_id(part.name), None
            except RecordError as error:
                self.problems.append(f"--device: {error.detail}; give a UUID or a name")
                return None, None
        if part.column is not None:
            return None, self._named(part.column, "--device-column")
        found = [name for name in self.columns if words.is_device(name) and name not in self.left_out_said]
        if len(found) == 1:
            return None, found[0]
        if found:
            what = f"{names(found)} may each be the device"
        else:
            perhaps = [name for name in self.columns if words.may_be_device(name)]
            what = "none is named device or device_id" + (f" ({names(perhaps)} may be it)" if perhaps else "")
        self.problems.append(f"{what}: give --device NAME or --device-column COLUMN")
        return None, None

    def _long(self) -> tuple[str | None, str | None, str | None]:
        """The columns of names, values and units of a long file; nothing when it is a wide one."""
        part = self.recipe.long
        nothing = None, None, None
        if part.names is not None or part.values is not None:
            name = self._named(part.names, "--names") if part.names else self._only(words.LONG_NAMES, "--names")
            value = self._named(part.values, "--values") if part.values else self._only(words.LONG_VALUES, "--values")
            unit = self._named(part.units, "--units-column") if part.units else None
        else:
            mapped = {one.column for one in self.recipe.metrics if one.column is not None}
            values = [name for name in self._values() if name not in self.left_out_said]
            namings = [name for name in words.one_of(self.columns, words.LONG_NAMES) if name not in self.left_out_said]
            wide = [name for name in self.columns if spoken(name).metric is not None and name not in self.left_out_said]
            if len(values) != 1 or not namings or wide:
                return nothing
            exact = [name for name in namings if words.base(name) == "metricname"] or [
                name for name in namings if any(spoken(text).metric is not None for text in set(self._texts(name)))
            ]
            if self._one_metric_said(values[0], mapped, exact or namings):
                return nothing
            chosen = exact if len(exact) == 1 else namings
            if len(chosen) != 1:
                self.problems.append(
                    f"{names(chosen)} may each say what {values[0]} is: say which with --names COLUMN --values {values[0]}"
                )
                return None, None, None
            name, value, unit = chosen[0], values[0], None
        if name and value and unit is None:
            units = words.one_of(self.columns, words.LONG_UNITS)
            unit = units[0] if len(units) == 1 else None
        return name, value, unit

    def _one_metric_said(self, value: str, mapped: Collection[str | None], namings: Sequence[str]) -> bool:
        """Whether the user said that a column of values is one metric; refused when another column says otherwise."""
        if value not in mapped:
            return False
        for name in namings:
            filtered = name in self.recipe.where or any(name in one.where for one in self.recipe.metrics)
            found = sorted(set(self._texts(name)))
            if len(found) > 1 and not filtered:
                self.problems.append(
                    f"--map {value}: {name} says that {value} is {names(found[:5])}, which is not one metric: map these "
                    f"names (--map {found[0]}=METRIC), or choose lines with --where {name}={found[0]}"
                )
        return True

    def _values(self) -> list[str]:
        """The columns that may hold the values of a long file: those named so most plainly."""
        found = words.one_of(self.columns, words.LONG_VALUES)
        for plain in ("value", "state"):
            if any(words.base(name) == plain for name in found):
                return [name for name in found if words.base(name) == plain]
        return found

    def _only(self, bases: frozenset[str], option: str) -> str | None:
        found = self._values() if bases is words.LONG_VALUES else words.one_of(self.columns, bases)
        if len(found) != 1:
            self.problems.append(f"say {option} COLUMN, too")
            return None
        return found[0]

    def _time(self, taken: Collection[str]) -> list[str]:
        said = self.recipe.time.columns
        if said:
            return [column for name in said if (column := self._named(name, "--time"))]
        mapped = {one.column for one in self.recipe.metrics}
        free = [name for name in self.columns if name not in taken and name not in mapped]
        found = [name for name in free if words.is_time(name)]
        found = [name for name in found if words.is_plainly_time(name)] or found
        typed = [name for name in free if isinstance(self._kind(name), (pl.Datetime, pl.Date))]
        if len(found) == 2 and (pair := self._day_and_time(found)):
            return pair
        if len(found) > 1 and len(both := [name for name in found if name in typed]) == 1:
            return both
        found = found or (typed if len(typed) == 1 else [])
        if len(found) == 1:
            return self._with_time_of_day(found[0], [name for name in free if name not in found])
        if found:
            self.problems.append(f"{names(found)} may each be the time: say which with --time COLUMN")
            return []
        perhaps = [name for name in free if self._kind(name) == pl.String and self._all_times(name)]
        hint = f" ({names(perhaps)} looks like one)" if perhaps else ""
        self.problems.append(f"none is named as a time{hint}: say which with --time COLUMN")
        return []

    def _day_and_time(self, found: Sequence[str]) -> list[str] | None:
        """A column of days and one of times of day, in this order."""

        def days(name: str) -> bool:
            texts = self._texts(name, 100)
            return bool(texts) and all(":" not in text and len(text) <= 11 and not text.count(" ") for text in texts)

        def times(name: str) -> bool:
            texts = self._texts(name, 100)
            return bool(texts) and all(
                text[:1].isdigit() and len(text.split(":")[0].split(".")[0]) <= 2 for text in texts
            )

        for one, other in (found, found[::-1]):
            if days(one) and times(other) and not times(one):
                return [one, other]
        return None

    def _with_time_of_day(self, day: str, others: Sequence[str]) -> list[str]:
        """A column of times; when it has days only, the one with the times of day as well."""
        texts = self._texts(day, 1000)
        if self._kind(day) == pl.Date:
            only_days = True
        else:
            only_days = self._kind(day) == pl.String and bool(texts) and all(map(_is_day, texts))
        if not only_days:
            return [day]
        clocks = [
            name
            for name in others
            if spoken(name).metric is None
            and (cells := self._texts(name, 1000))
            and all(_is_time_of_day(text) for text in cells)
        ]
        if len(clocks) == 1:
            return [day, clocks[0]]
        hours = [name for name in others if words.base(name) in words.TIMES_OF_DAY]
        if clocks or hours or len(set(texts)) < len(texts):
            hint = f" ({names(clocks or hours)}?)" if clocks or hours else ""
            self.problems.append(
                f"{day} has days only: say where the time of day stands{hint} with --time {_quoted(day)} --time COLUMN, or "
                f"--time {_quoted(day)} alone for midnight"
            )
        return [day]

    def _all_times(self, name: str) -> bool:
        texts = self._texts(name, 20)
        clock = Clock(order="dmy")

        def reads(text: str) -> bool:
            try:
                clock.micro(text)
            except RecordError:
                return False
            return not text.replace(".", "").isdigit()

        return bool(texts) and all(reads(text) for text in texts)

    def _clock(self, columns: Sequence[str]) -> tuple[Clock, str]:
        part = self.recipe.time
        zone = part.zone
        if zone is not None:
            try:
                find_zone(zone)
            except SettingError as error:
                self.problems.append(str(error))
                return Clock(), ""
        if not columns:
            return Clock(), ""
        header = HeaderTime.of(columns)
        named = " and ".join(columns)
        typed = len(columns) == 1 and isinstance(self._kind(columns[0]), (pl.Datetime, pl.Date))
        texts = [] if typed else self._time_texts(columns)
        zoned = any(names_zone(text) for text in texts[:1000])
        if (
            vague := header.vague or (header.zone if header.zone not in (None, "UTC") else None)
        ) and not part.ignore_offset:
            if zoned and (zone is None or zone not in ("UTC", "Etc/UTC")):
                self.problems.append(
                    f"{named} names the zone {vague}, and its cells another one ({texts[0]}): say --tz UTC when the cells are "
                    f"right, or --tz ZONE --ignore-offset when the name is"
                )
            elif not zoned and zone is None and header.vague:
                self.problems.append(
                    f"{named} names the zone {vague}, which may be several: say --tz ZONE, such as Europe/Berlin or -07:00"
                )
        zone = zone or header.zone or "UTC"
        unit: str | None = part.unit
        any_year = unit is not None
        if not typed and not part.formats and unit is None:
            unit = words.time_unit(columns[0]) if len(columns) == 1 else None
            any_year = unit is not None
            fitting = units_of(texts)
            if unit is None and fitting is not None:
                if len(fitting) == 1:
                    unit = next(iter(fitting))
                else:
                    number = next(text for text in texts if text[:1] in "+-0123456789")
                    why = (
                        f"may be {' or '.join(sorted(fitting))}"
                        if fitting
                        else "is no count since 1970 between 1980 and 2100"
                    )
                    self.problems.append(f"{named}: {number} {why}: say --time-unit {'|'.join(UNITS)}")
        order: str | None = part.order or header.order
        if not typed and not part.formats and order is None:
            orders = orders_of(texts)
            if orders is not None and len(orders) == 1:
                order = next(iter(orders))
            elif orders is not None:
                shown_orders = " or ".join(one for one in ORDERS if one in (orders or ORDERS))
                date = next(text for text in texts if orders_of([text]) is not None)
                self.problems.append(f"{named}: {date} may be several days: say --date-order {shown_orders}")
        if self.problems:
            return Clock(), ""
        made = {"unit": unit, "order": order, "formats": part.formats, "ignore_offset": bool(part.ignore_offset)}
        clock = Clock(zone, any_year=any_year, **made)  # type: ignore[arg-type]
        if texts:
            self._try(Clock(zone, any_year=any_year, **made), named, texts[:1000])  # type: ignore[arg-type]
        how = []
        if unit and not typed:
            how.append({"s": "seconds since 1970", "ms": "milliseconds since 1970", "us": "microseconds since 1970",
                        "ns": "nanoseconds since 1970", "excel": "Excel's days", "date": "dates as numbers"}[unit])  # fmt: skip
        how += part.formats
        if order:
            how.append(f"dates as {order}")
        if not how:
            how.append("times as such" if typed else "text" + (f" such as {texts[0]}" if texts else ""))
        if (not unit or unit in ("excel", "date")) and not zoned:
            how.append(f"in {zone} where they name no zone")
        self.zone, self.unit, self.order = zone, unit, order
        return clock, ", ".join(how)

    def _time_texts(self, columns: Sequence[str]) -> list[str]:
        if len(columns) == 1:
            return self._texts(columns[0])
        return [
            text for text in combined(self.sample, columns).to_list() if text and text.strip().casefold() not in MISSING
        ]

    def _try(self, clock: Clock, named: str, texts: Sequence[str]) -> None:
        first: RecordError | None = None
        for text in texts:
            try:
                clock.micro(text)
            except RecordError as error:
                first = first or error
            else:
                return
        if first is not None:
            self.problems.append(f"{named}: {first.detail}")

    # --- Metrics ---

    def _of_columns(self, used: Collection[str]) -> list[MetricColumn]:
        found: list[MetricColumn] = []
        said = set()
        for part in self.recipe.metrics:
            if part.column is None:
                self.problems.append(
                    f"--map {part.name}={part.metric}: the file has no column of names; say --names COLUMN"
                )
                continue
            column = self._named(part.column, "--map")
            if column is None:
                continue
            said.add(column)
            if (made := self._metric(column, part, spoken(column), self._texts(column))) is not None:
                found.append(made)
        metrics_said = {one.metric for one in found}
        if self.recipe.automatic:
            for column in self.columns:
                speaks = spoken(column)
                if column in used or column in said or speaks.metric is None or speaks.metric in metrics_said:
                    continue
                if column in self.left_out_said or not self._holds_numbers(column):
                    continue
                made = self._metric(
                    column, MetricPart(metric=speaks.metric.name.lower(), column=column), speaks, self._texts(column)
                )
                if made is not None:
                    found.append(made)
        for metric in {one.metric for one in found}:
            same = [one for one in found if one.metric is metric]
            if len(same) > 1 and not all(one.where for one in same) and not self._take_turns(same, said):
                listed = names([one.column for one in same])
                self.problems.append(
                    f"{listed} are the same metric, {metric.name.lower()}: say which with --map COLUMN={metric.name.lower()}, or "
                    "leave the others out with --leave-out COLUMN"
                )
        if not found and not any("--map" in text or "unit" in text or "--names" in text for text in self.problems):
            self.problems.append(self._no_metric(used))
        order = {name: at for at, name in enumerate(self.columns)}
        return sorted(found, key=lambda one: order[one.column])

    def _take_turns(self, same: Sequence[MetricColumn], said: Collection[str]) -> bool:
        """Whether columns that the user said to be one metric have their values in different records."""
        if not all(one.column in said and one.column in self.sample.columns for one in same):
            return False
        filled = [numbers(self.sample[one.column], self.decimal, one.missing).values.is_not_null() for one in same]
        return not any((one & other).any() for at, one in enumerate(filled) for other in filled[:at])

    def _no_metric(self, used: Collection[str]) -> str:
        free = [name for name in self.columns if name not in used and name not in self.file.unnamed]
        values = [name for name in self._values() if name in free]
        like = [name for name in free if words.looks_like_a_metric(name)]
        text = f"no column is named as a metric ({', '.join(METRICS)}): say which is what with --map COLUMN=metric"
        if values:
            text += (
                f"; when another column says what {values[0]} is: --names COLUMN --values {values[0]}; when all of it is one "
                f"metric: --map {values[0]}=METRIC --unit METRIC=UNIT"
            )
        elif lists := [name for name in free if any(cell.startswith("[{") for cell in self._texts(name, 20))]:
            text += f", or with --records {lists[0]}, which holds lists of records"
        elif like:
            text += f" (look at {names(like)})"
        return text

    def _holds_numbers(self, column: str) -> bool:
        """Whether a column that is named as a metric holds numbers at all; says it when not."""
        if column not in self.sample.columns:
            return True
        read = numbers(self.sample[column].head(1000), self.decimal, self.recipe.missing)
        if len(read.errors) and read.values.null_count() == len(read.values):
            other = self._texts(column, 1000)
            if all(text.casefold() in ("true", "false", "on", "off", "yes", "no") for text in other):
                self.notes.append(f"{column} is left out: it holds {names(sorted(set(other))[:3])}, no numbers")
                return False
        return True

    def _of_names(
        self, long: tuple[str | None, str | None, str | None], device_column: str | None
    ) -> list[MetricColumn]:
        naming, value, unit_column = long
        if naming is None or value is None:
            return []
        cells = (
            self.sample[naming].cast(pl.String).str.strip_chars() if naming in self.sample.columns else pl.Series([""])
        )
        present = dict.fromkeys([*cells.drop_nulls().unique(maintain_order=True).to_list(), *self.more_names])
        found = []
        said = {}
        for part in self.recipe.metrics:
            name = part.source
            same = (
                name if name in present else next((one for one in present if one.casefold() == name.casefold()), name)
            )
            said[same] = part
            if same not in present:
                self.notes.append(f"{naming} nowhere says {same}" if present else "")
        for name in present:
            told = said.get(name)
            speaks = spoken(name)
            if told is None:
                code = words.METRICS.get(name.casefold())
                if (
                    code is None
                    and words.base(naming) == "metricname"
                    and name.isdigit()
                    and int(name) in METRICS.values()
                ):
                    speaks = Spoken(MetricName(int(name)))
                if not self.recipe.automatic or speaks.metric is None or name in self.left_out_said:
                    continue
                if speaks.metric.name.lower() in {one.metric for one in said.values()} and not device_column:
                    continue
                told = MetricPart(metric=speaks.metric.name.lower(), name=name)
            texts = (
                self.sample.filter(cells == name)[value].cast(pl.String).drop_nulls().to_list()
                if value in self.sample.columns and len(cells) == self.sample.height
                else []
            )
            made = self._metric(value, told, speaks, texts, name=name, unit_column=unit_column)
            if made is not None:
                found.append(made)
        if device_column is None:
            for metric in {one.metric for one in found}:
                same_metric = [one.source for one in found if one.metric is metric]
                if len(same_metric) > 1 and len({one.casefold() for one in same_metric}) > 1:
                    self.problems.append(
                        f"{names(same_metric)} are the same metric, {metric.name.lower()}: leave one out with --leave-out NAME, or "
                        f"say where the device stands with --device-column, such as {naming}"
                    )
        self.notes = [note for note in self.notes if note]
        if not found and not any("--unit" in text for text in self.problems):
            listed = names(list(present)[:20])
            self.problems.append(
                f"{naming} names no metric ({', '.join(METRICS)}) but {listed}: say which is what with --map NAME=metric"
            )
        return found

    def _metric(
        self,
        column: str,
        part: MetricPart,
        speaks: Spoken,
        texts: Sequence[str],
        *,
        name: str | None = None,
        unit_column: str | None = None,
    ) -> MetricColumn | None:
        metric = MetricName(METRICS[part.metric])
        word = metric.name.lower()
        source = column if name is None else name
        recipe = self.recipe
        said = part.unit or self._said_of(recipe.units, source) or self._said_of(recipe.units, word)
        scale = part.scale or self._said_of(recipe.scales, source) or self._said_of(recipe.scales, word) or 1.0
        unit = said
        if part.unit_column is not None:
            unit_column = self._named(part.unit_column, "unit_column")
        elif name is None:
            unit_column = next((one for one in self.columns if _UNIT_COLUMNS.get(words.base(one)) == word), None)
        if unit_column is None and name is None and speaks.unit is None and said is None:
            unit_column = self._unit_beside(metric)
        if said is not None:
            unit_column = None if part.unit_column is None else unit_column
        elif self.file.units.get(column) and name is None:
            unit = self.file.units[column]
            if speaks.unit and known_unit(unit) != speaks.unit:
                self.problems.append(f"{column} names {speaks.unit}, the row below it {unit}: say --unit {word}=UNIT")
        elif speaks.unit is not None or speaks.strange is not None:
            unit = speaks.unit
            if (unit is None or not fits_metric(unit, metric)) and unit_column is None:
                speaks = Spoken(speaks.metric, None, speaks.strange or unit)
                self.problems.append(
                    f"{source} speaks of {speaks.strange!r}: say --unit {word}=UNIT, or --leave-out {_quoted(source)}"
                )
                return None
        where = {self._named(key, "where") or key: list(values) for key, values in part.where.items()}
        missing = (*recipe.missing, *part.missing)
        try:
            way = conversion(unit or own_unit(metric), metric)
        except SettingError as error:
            self.problems.append(
                f"--unit {word}={unit}: {error}" if said else f"{source}: {error}: say --unit {word}=UNIT"
            )
            return None
        made = MetricColumn(metric, column, name, way, unit is not None, unit_column, scale, missing, where)
        if not made.unit_said and unit_column is None:
            self._suspect(made, texts)
        return made

    def _said_of(self, said: Mapping[str, Said], name: str) -> Said | None:
        """What was said of a column or a metric, whatever the case of its name."""
        found = [key for key in said if key == name] or [key for key in said if key.casefold() == name.casefold()]
        self.answered.update(found[:1])
        return said[found[0]] if found else None

    def _unit_beside(self, metric: MetricName) -> str | None:
        """A column of units that are all of this metric."""
        found = words.one_of(self.columns, words.LONG_UNITS)
        if len(found) != 1:
            return None
        texts = {known_unit(text) for text in self._texts(found[0], 1000)}
        return found[0] if texts and all(text is not None and fits_metric(text, metric) for text in texts) else None

    def _suspect(self, made: MetricColumn, texts: Sequence[str]) -> None:
        """Ask for the unit of values that would be unusual in the metric's own, and usual in another one."""
        if not texts:
            return
        read = numbers(pl.Series(list(texts[:20_000]), dtype=pl.String), self.decimal, made.missing)
        if read.units:
            return
        values = (read.values * made.scale).drop_nulls()
        if values.is_empty():
            return
        word = made.metric.name.lower()
        low, middle, high = (float(figure) for figure in (values.min(), values.median(), values.max()))  # type: ignore[arg-type]
        if made.metric is MetricName.LIGHT and set(values.unique().to_list()) <= {0.0, 1.0} and len(values) > 1:
            self.problems.append(
                f"{made.source} holds only 0 and 1, as a switch does: say --unit light=lx, or --leave-out {_quoted(made.source)}"
            )
        units = suspected(made.metric, low, middle, high)
        if units:
            options = " or ".join(f"--unit {word}={unit}" for unit in [*units, own_unit(made.metric)])
            self.problems.append(
                f"{made.source} has values from {low:g} to {high:g}, which would be unusual in {made.metric.unit} and not in "
                f"{' or '.join(units)}: say {options}"
            )

    def _note_left_out(self, left_out: Iterable[str], metrics: Sequence[MetricColumn]) -> None:
        there = {one.metric for one in metrics}
        for name in left_out:
            speaks = spoken(name)
            noted = any(note.startswith(f"{name} is") for note in self.notes)
            if words.looks_like_a_metric(name) and speaks.metric not in there and not noted:
                self.notes.append(f"{name} is left out; if it is one of the metrics, say --map {_quoted(name)}=METRIC")
        for one in metrics:
            if not one.unit_said and one.unit_column is None:
                self.notes.append(f"nothing names the unit of {one.source}: taken as {one.metric.unit}")

    def _plan(self, meant: Meaning, long: tuple[str | None, str | None, str | None]) -> Recipe:
        recipe = self.recipe
        layout = getattr(self.file, "layout", None)
        text = getattr(self.file, "encoding", None)
        return Recipe(
            description=recipe.description,
            file=FilePart(
                encoding=text, separator={" ": "blanks", "\t": "tab"}.get(layout.separator, layout.separator) if layout else None,
                header=layout.header_line if layout else None, decimal=self.decimal if text else None,
                records=recipe.file.records,
            ),
            time=TimePart(
                columns=list(meant.time), formats=recipe.time.formats, unit=self.unit, order=self.order, zone=self.zone,
                ignore_offset=recipe.time.ignore_offset,
            ),
            device=recipe.device if recipe.device.name else DevicePart(column=meant.device_column),
            long=LongPart(names=long[0], values=long[1], units=long[2]) if meant.names else LongPart(),
            metrics=[
                MetricPart(
                    metric=one.metric.name.lower(), column=None if one.name is not None else one.column, name=one.name,
                    unit=one.conversion.unit if one.unit_column is None else None, unit_column=one.unit_column if one.name is None else None,
                    scale=one.scale if one.scale != 1 else None, missing=[*dict.fromkeys(one.missing)], where=dict(one.where),
                )
                for one in meant.metrics
            ],
            where=recipe.where, leave_out=[*dict.fromkeys([*recipe.leave_out, *meant.left_out])], automatic=False,
            select=recipe.select,
        )  # fmt: skip


_is_day: Final = re.compile(r"\d{4}([-/.]?)\d{1,2}\1\d{1,2}|\d{1,2}[-/. ][\w]{1,9}[-/. ]\d{2,4}").fullmatch
_is_time_of_day: Final = re.compile(
    r"(\d{1,2}[:h]\d{2}(:\d{2}([.,]\d+)?)?|\d{1,2}\.\d{2}\.\d{2})\s*([AaPp]\.?[Mm]\.?)?"
).fullmatch


def combined(frame: pl.DataFrame, columns: Sequence[str]) -> pl.Series:
    """A day and a time of day as one text."""
    day, time = (frame[name].cast(pl.String).str.strip_chars() for name in columns)
    clock = time.str.replace(r"^(\d{1,2})[.](\d{2})(?:[.](\d{2}))?$", "$1:$2:$3").str.strip_chars_end(":")
    both = pl.select(pl.when((day != "") & (clock != "")).then(day + pl.lit(" ") + clock)).to_series()
    return both.alias("time")


def fits(preset: Recipe, columns: Iterable[str]) -> bool:
    """Whether a file with these columns is one that a preset is for."""
    there = {name.casefold() for name in columns} | {name.rsplit(".", 1)[-1].casefold() for name in columns}
    return bool(preset.fits) and all(name.casefold() in there for name in preset.fits)


def _quoted(name: str) -> str:
    return name if name.isidentifier() else shown(name)
