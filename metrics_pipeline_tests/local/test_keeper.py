"""The keeper keeps: nothing that is only shown, noted or cut down to size ends the services."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from metrics_pipeline.local import keeper as module
from metrics_pipeline.local.budget import Budget
from metrics_pipeline.local.keeper import Keeper
from metrics_pipeline.local.service import Service
from metrics_pipeline.local.stack import Stack
from metrics_pipeline.settings import Settings


class FakeService(Service):
    """Runs when it was started; `ends` lets it end."""

    runs = True
    starts = 0

    def alive(self) -> bool:
        return self.runs

    def find(self) -> None:
        return None

    def exit_code(self) -> int | None:
        return 1

    def start(self) -> None:
        self.runs, self.starts = True, self.starts + 1

    def rotate_log(self) -> None:
        """Nothing to do."""

    def kill(self, process: psutil.Process) -> None:
        assert process is self.process
        self.runs = False


class FakeRepair:
    """A sink that needs none."""

    def __init__(self, settings: Settings) -> None:
        """Nothing to look at."""

    def tick(self) -> None:
        raise ConnectionError("no sink here")


def made(tmp_path: Path, report: Callable[[str], None] = lambda _line: None) -> tuple[Keeper, FakeService]:
    settings = Settings(pipeline_data_dir=tmp_path)
    service = FakeService("part", "The part", "", [], {}, tmp_path / "part.log", lambda: None)
    keeper = Keeper(settings, report)
    keeper.stack = Stack(settings, [service], frozenset(), Budget.of(settings))
    return keeper, service


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK", 0.001)
    monkeypatch.setattr(module, "SinkRepair", FakeRepair)


def run(keeper: Keeper, ticks: int, show: Callable[[], None] = lambda: None) -> int:
    """Let it keep for some ticks, each of which shows something; how many there were."""
    shown = 0

    def counted() -> None:
        nonlocal shown
        shown += 1
        if shown == ticks:
            keeper.request_stop()
        show()

    keeper.run(counted)
    return shown


def test_a_display_that_fails_ends_nothing_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def show() -> None:
        raise KeyError("workers")

    keeper, service = made(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert run(keeper, 5, show) == 5
    assert service.alive()
    assert [record.message for record in caplog.records if "show" in record.message] == [
        "cannot show how it runs; the services go on"
    ]


def test_a_terminal_that_is_gone_keeps_no_service_from_coming_back(tmp_path: Path) -> None:
    def gone(_line: str) -> None:
        raise BrokenPipeError

    keeper, service = made(tmp_path, gone)
    service.runs = False
    run(keeper, 3)
    assert service.starts == 1


@pytest.mark.parametrize(
    ("answers", "killed"),
    [
        (["no answer on 127.0.0.1:1"], True),
        ([None, "no answer on 127.0.0.1:1"], True),
        # One that answers now and then is only slow.
        (["no answer on 127.0.0.1:1", "no answer on 127.0.0.1:1", None], False),
        (None, False),
    ],
)
def test_a_service_that_does_not_answer_is_killed_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str | None] | None, killed: bool
) -> None:
    monkeypatch.setattr(module, "ASK_SECONDS", 0.001)
    told: list[str] = []
    keeper, service = made(tmp_path, told.append)
    keeper._settings = keeper.settings.model_copy(update={"sink_stall_seconds": 0.05})
    service.start_seconds, service.process, asked = 0.05, psutil.Process(), 0
    # The first silence of the second process is a long one: it is only starting.
    if answers is not None:

        def answer() -> str | None:
            nonlocal asked
            asked += 1
            if service.starts:
                return None
            return answers[min(asked - 1, len(answers) - 1)] if killed else answers[asked % len(answers)]

        service.answers = answer
    run(keeper, 300)
    assert service.starts == int(killed)
    lines = [line for line in told if "does not answer" in line]
    assert len(lines) == int(killed)
    if killed:
        assert "The part does not answer for 0 s (no answer on 127.0.0.1:1): killing it" in lines[0]


def test_a_service_that_starts_is_given_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASK_SECONDS", 0.001)
    keeper, service = made(tmp_path)
    keeper._settings = keeper.settings.model_copy(update={"sink_stall_seconds": 0.01})
    service.start_seconds, service.process, service.answers = 60.0, psutil.Process(), lambda: "no answer yet"
    run(keeper, 100)
    assert service.starts == 0


def test_a_state_that_cannot_be_noted_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk must not take down what still runs on it."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Keeper, "_note", full)
    monkeypatch.setattr(FakeService, "rotate_log", full)
    keeper, service = made(tmp_path)
    service.runs = False
    assert run(keeper, 5) == 5
    assert service.starts == 1
