"""Files of the world: with its command line each gives what it must, and without one nothing wrong."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from typer.testing import CliRunner

from metrics_pipeline.cli import app
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.metric import MetricName, decode
from metrics_pipeline.replay import publishing
from metrics_pipeline.replay.cells import device_id
from metrics_pipeline.replay.source import Replay
from metrics_pipeline_tests.replay.cases import CASES, FOLDER, Case, Expected

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the cases are not beside this checkout")

Found = dict[tuple[object, datetime, int], float]


class _Published(Exception):  # noqa: N818  # it ends the command where the broker would come
    """What the command was about to publish."""

    def __init__(self, messages: list[tuple[bytes, bytes]]) -> None:
        super().__init__("published")
        self.readings = [decode(*message) for message in messages]


@pytest.fixture
def publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(_settings: object, source: Replay, **_options: Any) -> None:
        source.refuse()
        raise _Published([message for batch in source.messages() for message in batch])

    monkeypatch.setattr(publishing, "publish", publish)


def run(case: Case, *options: str) -> tuple[Found, str]:
    """What a command line publishes, and what it says."""
    result = CliRunner().invoke(app, ["replay", str(FOLDER / case.file), *options])
    said = result.output + (str(result.exception) if isinstance(result.exception, PipelineError) else "")
    if not isinstance(result.exception, _Published):
        assert isinstance(result.exception, PipelineError), (result.exception, said)
        return {}, said
    return {(it.device_id, it.published_at, it.metric_name): it.value for it in result.exception.readings}, said


def wanted(readings: list[Expected]) -> Found:
    return {
        (device_id(device), datetime.fromisoformat(moment), int(MetricName[metric.upper()])): value
        for device, moment, metric, value in readings
    }


def test_every_file_has_a_case() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {case.file for case in CASES}


@pytest.mark.usefixtures("publishes")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_with_its_command_line_a_file_gives_its_readings(case: Case) -> None:
    found, said = run(case, *case.options)
    expected = wanted(case.readings)
    assert found == (pytest.approx(expected, rel=1e-15) if case.near else expected), said
    assert (f"bad          {case.bad} of " in said) == bool(case.bad)


@pytest.mark.usefixtures("publishes")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_without_options_a_file_is_right_or_says_what_is_missing(case: Case) -> None:
    found, said = run(case)
    assert found == (wanted(case.readings) if case.alone else {}), said
    assert [text for text in case.asks if text not in said] == [], said
    assert case.alone or case.asks


@pytest.mark.usefixtures("publishes")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_a_plan_gives_the_same_as_the_options(case: Case, tmp_path: Any) -> None:
    planned = CliRunner().invoke(app, ["replay", str(FOLDER / case.file), *case.options, "--plan"])
    assert planned.exit_code == 0, planned.exception
    recipe = tmp_path / "own.toml"
    recipe.write_text(planned.stdout, "utf-8")
    rest = [text for text in ("--on-error", "skip", "--allow-implausible") if text in case.options]
    found, said = run(case, "--recipe", str(recipe), *rest)
    expected = wanted(case.readings)
    assert found == (pytest.approx(expected, rel=1e-15) if case.near else expected), said


@pytest.mark.usefixtures("publishes")
def test_a_tag_of_plain_text_and_what_is_left_out_are_said() -> None:
    def case(name: str) -> Case:
        return next(one for one in CASES if one.file == name)

    result = CliRunner().invoke(app, ["replay", str(FOLDER / "taglist.csv")])
    assert isinstance(result.exception, _Published)
    assert [it.tags for it in result.exception.readings] == [["roof"]]
    assert "light is left out: it holds false, true, no numbers" in run(case("c13.csv"))[1]
    assert "left out     records of P1 (1)" in run(case("c33.csv"), "--device", "x")[1]
    assert "left out     records of co (2)" in run(case("c18.csv"), *case("c18.csv").options)[1]
    assert (
        "7 times are finer than a microsecond"
        in CliRunner().invoke(app, ["replay", str(FOLDER / "c13.csv"), "--dry-run"]).stdout
    )
