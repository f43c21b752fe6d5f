"""`up --detach`: everything the keeper says is shown, its end is explained, and the watch has an end."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from metrics_pipeline.errors import PipelineError
from metrics_pipeline.local import background
from metrics_pipeline.local.background import LogFollower
from metrics_pipeline.settings import Settings

READY = """
import os, time
from pathlib import Path
import psutil
from metrics_pipeline.local.processes import identify
from metrics_pipeline.local.state import StackState
state = StackState(keeper=identify(psutil.Process()))
state.ready = True
state.write(Path({folder!r}))
print("up", flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, sys, time
def end(*_):
    print("stopping everything in order", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
print("begun", flush=True)
time.sleep(60)
"""


# The keeper is meant to outlive its parent.
pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "POLL_SECONDS", 0.01)


def said_by(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """Start this code in the keeper's place."""
    monkeypatch.setattr(background, "COMMAND", (sys.executable, "-c", code))
    background.start(Settings(pipeline_data_dir=tmp_path), [], said.append)


def test_it_ends_when_the_keeper_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    before = set(psutil.Process().children())
    said_by(READY.format(folder=str(tmp_path)), tmp_path, monkeypatch, said)
    (keeper,) = set(psutil.Process().children()) - before
    keeper.kill()
    keeper.wait()
    assert f"Running in the background (pid {keeper.pid}, " in said[-1]


def test_a_keeper_that_ends_is_explained_and_all_that_it_said_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    code = "import sys\nfor n in range(1000): print('line', n)\nsys.exit('error: port 5432 is in use')"
    with pytest.raises(
        PipelineError, match=r"^the pipeline did not start: port 5432 is in use \(log: .*keeper\.log\)$"
    ):
        said_by(code, tmp_path, monkeypatch, said)
    assert said == [*(f"line {n}" for n in range(1000)), "error: port 5432 is in use"]


def test_the_watch_has_an_end_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "START_SECONDS", 0.1)
    before = set(psutil.Process().children())
    with pytest.raises(PipelineError, match=r"is not up after 0 s and goes on starting.*`metrics-pipeline down`"):
        said_by(STUBBORN, tmp_path, monkeypatch, [])
    (keeper,) = set(psutil.Process().children()) - before
    assert keeper.is_running()
    keeper.kill()
    keeper.wait()


def test_ctrl_c_stops_what_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def press() -> None:
        while "begun" not in said:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    before = set(psutil.Process().children())
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        said_by(STUBBORN, tmp_path, monkeypatch, said)
    assert set(psutil.Process().children()) == before
    assert said == ["begun", "stopping everything in order"]


def test_a_line_that_is_not_finished_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntw")
    follower = LogFollower(path)
    assert follower.lines() == ["one"]
    with path.open("ab") as file:
        file.write(b"o\n\n")
    assert follower.lines() == ["two", ""]
    assert follower.last == "two"
    assert follower.lines() == []
