"""A recipe: what a file means, as far as it does not say so itself. Options, files and presets are all recipes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from metrics_pipeline.errors import SettingError
from metrics_pipeline.replay.layout import TextForm
from metrics_pipeline.replay.names import METRICS
from metrics_pipeline.replay.times import Order, Unit
from metrics_pipeline.settings import workplace

PRESETS: Final = resources.files("metrics_pipeline.replay") / "presets"


def _listed(value: object) -> object:
    return [value] if isinstance(value, (str, int, float)) else value


def _texts(value: object) -> object:
    value = _listed(value)
    return [str(item) for item in value] if isinstance(value, list) else value


Texts = Annotated[list[str], BeforeValidator(_texts)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FilePart(_Part):
    """How the file is taken apart, when it is not found rightly by itself."""

    encoding: str | None = Field(None, description="of the text, such as `cp1252`")
    separator: str | None = Field(None, description="one character, `tab` or `blanks`")
    header: int | None = Field(None, ge=0, description="the line with the names; 0 when there is none")
    decimal: str | None = Field(None, pattern=r"^[.,]$", description="the mark before decimals, `.` or `,`")
    records: str | None = Field(None, description="where in a JSON document the records stand, such as `data.rows`")


class TimePart(_Part):
    """The time of a record."""

    columns: Texts = Field([], max_length=2, description="one column, or the one of the day and the one of the time")
    formats: Texts = Field([], description="as Python's `strptime` has them; the first that fits counts")
    unit: Unit | None = Field(
        None,
        description="of numbers: `s`, `ms`, `us`, `ns` since 1970, `excel`, or `date` for 20240201 and 202402011000",
    )
    order: Order | None = Field(None, description="of day, month and year in 01/02/2024: `dmy`, `mdy` or `ymd`")
    zone: str | None = Field(None, description="of times that name none: `Europe/Berlin`, `+01:00`; default UTC")
    ignore_offset: bool | None = Field(None, description="`true`: all times are in `zone`, whatever zone they name")


class DevicePart(_Part):
    """The device of a record: one for all, or a column."""

    name: str | None = Field(None, description="a UUID, or a name")
    column: str | None = Field(None, description="the column that holds the device")

    @model_validator(mode="after")
    def _one_of_both(self) -> DevicePart:
        if self.name is not None and self.column is not None:
            raise ValueError("name and column exclude each other: give one")
        return self


class LongPart(_Part):
    """One reading a record: a column names the metric, another one holds the value."""

    names: str | None = Field(None, description="the column that says what was measured")
    values: str | None = Field(None, description="the column with the value")
    units: str | None = Field(None, description="the column with the unit")


def _metric(value: object) -> object:
    if not isinstance(value, str) or value.strip().casefold() not in METRICS:
        raise ValueError(f"no metric has that name; there are {', '.join(METRICS)}")
    return value.strip().casefold()


class MetricPart(_Part):
    """One metric: the column that holds it, or what the column of names says of it."""

    metric: Annotated[str, BeforeValidator(_metric)] = Field(description=f"one of {', '.join(METRICS)}")
    column: str | None = Field(None, description="the column with its values")
    name: str | None = Field(None, description="in a long file: what `long.names` says")
    unit: str | None = Field(
        None, description="of the values, such as `degF`; default: what the header says, else the metric's"
    )
    unit_column: str | None = Field(None, description="the column that says the unit, record by record")
    scale: float | None = Field(None, description="what to multiply the values by, before the unit counts")
    missing: Texts = Field([], description="values that mean none, such as `-200`")
    where: dict[str, Texts] = Field({}, description="only records in which a column holds one of these")

    @model_validator(mode="after")
    def _one_of_both(self) -> MetricPart:
        if (self.column is None) == (self.name is None):
            raise ValueError("give either column or name")
        return self

    @property
    def source(self) -> str:
        """The column, or the name in a long file."""
        return self.column if self.column is not None else self.name or ""


class Recipe(_Part):
    """What a file means. What is not said is taken from the file, where it is beyond doubt, and asked for where it is not."""

    description: str = Field("", description="what it is for")
    fits: Texts = Field([], description="columns by which a file that it is for is known")
    file: FilePart = Field(default_factory=FilePart)
    time: TimePart = Field(default_factory=TimePart)
    device: DevicePart = Field(default_factory=DevicePart)
    long: LongPart = Field(default_factory=LongPart)
    metrics: list[MetricPart] = Field([], description="each metric that the file does not name itself")
    units: dict[str, str] = Field({}, description="unit by metric or column")
    scales: dict[str, float] = Field({}, description="factor by metric or column")
    missing: Texts = Field([], description="values that mean none, whatever the column")
    where: dict[str, Texts] = Field({}, description="only records in which a column holds one of these")
    leave_out: Texts = Field([], description="columns, or names in a long file, that are not looked at")
    automatic: bool = Field(True, description="`false`: only what stands in `metrics`, none that are found by name")
    select: str | None = Field(
        None, description="SQL over the file, which is the table `input`; its result is replayed"
    )

    def over(self, base: Recipe) -> Recipe:
        """This recipe, and what it does not say as `base` says it."""
        ours, theirs = self.model_dump(exclude_unset=True), base.model_dump(exclude_unset=True)
        merged: dict[str, Any] = theirs | ours
        for part in ("file", "time", "long"):
            said = {key: value for key, value in ours.get(part, {}).items() if value is not None and value != []}
            merged[part] = theirs.get(part, {}) | said
        for part in ("units", "scales", "where"):
            merged[part] = theirs.get(part, {}) | ours.get(part, {})
        for part in ("missing", "leave_out"):
            merged[part] = [*theirs.get(part, []), *ours.get(part, [])]
        own = {one.source for one in self.metrics} | set(self.leave_out)
        merged["metrics"] = [one.model_dump(exclude_unset=True) for one in base.metrics if one.source not in own] + [
            one.model_dump(exclude_unset=True) for one in self.metrics
        ]
        if not any(value is not None for value in ours.get("device", {}).values()):
            merged["device"] = theirs.get("device", {})
        return Recipe.model_validate(merged)

    def form(self) -> TextForm:
        """How text is to be taken apart."""
        return TextForm(self.file.encoding, self.file.separator, self.file.header, self.file.records)


def parse_pairs(option: str, texts: Iterable[str], form: str) -> dict[str, str]:
    """Left and right of each `LEFT=RIGHT`.

    Raises:
        SettingError: a text is not of that form, or a left side stands there twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        left, equals, right = text.rpartition("=")
        if not equals or not left or not right.strip():
            raise SettingError(f"{option} {text}: write it as {form}")
        if left in pairs:
            raise SettingError(f"{option} {text}: {left} stands there twice")
        pairs[left] = right.strip()
    return pairs


def parse_mapping(texts: Iterable[str]) -> list[MetricPart]:
    """A metric out of each `COLUMN=metric`.

    Raises:
        SettingError: a text is not of that form, or names a metric there is none of.
    """
    found = []
    for column, metric in parse_pairs("--map", texts, f"COLUMN=metric, with one of {', '.join(METRICS)}").items():
        if metric.casefold() not in METRICS:
            raise SettingError(f"--map {column}={metric}: no metric has that name; there are {', '.join(METRICS)}")
        found.append(MetricPart(metric=metric, column=column))
    return found


def preset_names() -> list[str]:
    """The presets there are."""
    return sorted(item.name.removesuffix(".toml") for item in PRESETS.iterdir() if item.name.endswith(".toml"))


def presets() -> dict[str, Recipe]:
    """Each preset by its name."""
    return {name: find_recipe(name) for name in preset_names()}


def find_recipe(name: str, where: str = "") -> Recipe:
    """A preset by its name, or the recipe in a file.

    Args:
        name: of the preset, or path of the file.
        where: what an error begins with; default: the option.

    Raises:
        SettingError: there is none, or it is not as a recipe must be; names the key.
    """
    where = where or f"--recipe {name}"
    try:
        if name in preset_names():
            text = (PRESETS / f"{name}.toml").read_text("utf-8")
        else:
            text = Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SettingError(
            f"{where}: {reason}; it is the path of a file, or one of {', '.join(preset_names())}"
        ) from error
    return read_recipe(text, where)


def named_recipe(setting: str, name: str) -> Recipe:
    """A preset, or the recipe in a file, whose path counts from the workplace; what fits by itself for an empty name.

    Raises:
        SettingError: there is none, or it is not as a recipe must be.
    """
    if not name:
        return Recipe()
    where = f"{setting}={name}"
    return find_recipe(name, where) if name in preset_names() else find_recipe(str(workplace() / name), where)


def read_recipe(text: str, where: str) -> Recipe:
    """A recipe out of TOML.

    Raises:
        SettingError: it is not as a recipe must be; names the key.
    """
    try:
        return checked_recipe(tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"{where}: is not TOML: {error}") from error


def checked_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """A recipe out of nested values, such as those of a run's configuration.

    Raises:
        SettingError: it is not as a recipe must be; names the key.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        said = []
        for one in error.errors():
            key = ".".join(str(part) for part in one["loc"]) or "recipe"
            if one["type"] == "extra_forbidden":
                model = _model_at(one["loc"])
                said.append(f"{key} is no key; there are {', '.join(model.model_fields)}")
            else:
                said.append(f"{key}: {one['msg'].removeprefix('Value error, ')}")
        raise SettingError(f"{where}: {'; '.join(said)}") from error


def _model_at(path: tuple[int | str, ...]) -> type[BaseModel]:
    parts: dict[object, type[BaseModel]] = {
        "file": FilePart, "time": TimePart, "device": DevicePart, "long": LongPart, "metrics": MetricPart
    }  # fmt: skip
    return parts.get(path[0], Recipe) if len(path) > 1 else Recipe


def written(recipe: Recipe) -> str:
    """A recipe as TOML: what it says, and nothing else."""
    values = _said(recipe.model_dump(exclude_defaults=True))
    tables = ("file", "time", "device", "long", "units", "scales", "where")
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if key not in (*tables, "metrics")]
    for name in tables:
        if values.get(name):
            lines += ["", f"[{name}]", *(f"{_key(key)} = {_toml(value)}" for key, value in values[name].items())]
    for metric in values.get("metrics", []):
        lines += ["", "[[metrics]]", *(f"{_key(key)} = {_toml(value)}" for key, value in metric.items())]
    return "\n".join(lines).strip("\n") + "\n"


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value != [] and value != {}}


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _toml(key)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)
