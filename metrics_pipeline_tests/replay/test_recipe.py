"""Recipes: options, files and presets say the same in the same words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from metrics_pipeline.cli import app
from metrics_pipeline.errors import SettingError
from metrics_pipeline.metric import MetricName
from metrics_pipeline.replay.recipe import (
    DevicePart,
    FilePart,
    LongPart,
    MetricPart,
    Recipe,
    TimePart,
    find_recipe,
    preset_names,
    presets,
    read_recipe,
    written,
)
from metrics_pipeline.replay.source import open_replay
from metrics_pipeline.replay.units import own_unit
from metrics_pipeline_tests.documents import page

PAGE = page("replay").read_text("utf-8")


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_a_recipe_that_says_what_it_is_for(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.description
    assert recipe.fits
    assert read_recipe(written(recipe), name) == recipe
    assert f"`{name}`" in PAGE
    assert re.search(rf"^{name} +{re.escape(recipe.description)}$", listed(), re.MULTILINE)


def listed() -> str:
    return CliRunner().invoke(app, ["replay", "--recipe", "list"]).stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tims]", "tims is no key; there are description, fits, file, time, "),
        ("[time]\ncolum = 'x'", "time.colum is no key; there are columns, formats, unit, order, zone, ignore_offset"),
        (
            "[[metrics]]\nmetric = 'co2'\ncolum = 'x'",
            "metrics.0.colum is no key; there are metric, column, name, unit, ",
        ),
        (
            "[[metrics]]\nmetric = 'odour'\ncolumn = 'x'",
            "metrics.0.metric: no metric has that name; there are temperature",
        ),
        ("[[metrics]]\nmetric = 'co2'", "metrics.0: give either column or name"),
        ("[time]\nunit = 'h'", "time.unit: Input should be 's', 'ms'"),
        ("[device]\nname = 'x'\ncolumn = 'y'", "device: name and column exclude each other"),
        ("x", "is not TOML"),
    ],
)
def test_what_is_no_recipe_is_refused_by_its_key(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        read_recipe(text, "--recipe x.toml")


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(SettingError, match=r"--recipe none: No such file .* aranet, campbell-toa5, home-assistant"):
        find_recipe("none")


@given(st.text(), st.text(min_size=1), st.lists(st.text()), st.floats(allow_nan=False, allow_infinity=False))
def test_whatever_a_recipe_says_is_written_and_read_back(one: str, column: str, texts: list[str], scale: float) -> None:
    recipe = Recipe(
        description=one,
        leave_out=texts,
        where={column: texts or [one]},
        units={column: one},
        device=DevicePart(name=one),
        metrics=[MetricPart(metric="co2", column=column, scale=scale, missing=texts)],
    )
    assert read_recipe(written(recipe), "x") == recipe


def test_options_stand_before_a_recipe() -> None:
    base = read_recipe(
        "missing = ['-1']\n[time]\nzone = 'UTC'\ncolumns = ['a']\n[device]\nname = 'x'\n"
        "[[metrics]]\nmetric = 'co2'\ncolumn = 'b'\n[[metrics]]\nmetric = 'light'\ncolumn = 'c'\n",
        "x",
    )
    said = read_recipe(
        "missing = ['-2']\n[time]\nzone = 'Europe/Berlin'\n[device]\ncolumn = 'y'\n[[metrics]]\nmetric = 'sound'\ncolumn = 'b'\n",
        "x",
    )
    merged = said.over(base)
    assert (merged.time.zone, merged.time.columns) == ("Europe/Berlin", ["a"])
    assert (merged.device.name, merged.device.column) == (None, "y")
    assert [(one.column, one.metric) for one in merged.metrics] == [("c", "light"), ("b", "sound")]
    assert merged.missing == ["-1", "-2"]


def test_the_page_has_the_bounds_and_every_key() -> None:
    for metric in MetricName:
        least, most = metric.bounds
        row = f"| {metric.name.lower()} | {metric.unit} | {least:.0f} | {most:.0f} |"
        assert row in PAGE
        assert own_unit(metric)
    for model in (Recipe, FilePart, TimePart, DevicePart, LongPart, MetricPart):
        for key in model.model_fields:
            assert f"`{key}`" in PAGE or f"[{key}]" in PAGE, key
    assert all(f"`{name}`" in PAGE for name in presets())


def test_the_recipe_on_the_page_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    recipe = read_recipe(text, "the page")
    path = tmp_path / "office.csv"
    path.write_bytes("Datum;Uhrzeit;Temp (°F);Akku\n01.02.2024;10:00;70,5;3\n01.02.2024;10:10;70,6;3\n01.02.2024;10:20;-999;3\n"
                     .encode("cp1252"))  # fmt: skip
    replay = open_replay([path], recipe, skip_bad=True)
    shown, *_ = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert "\n".join(replay.look().summary()).replace(str(path), "office.csv") == shown.strip()
