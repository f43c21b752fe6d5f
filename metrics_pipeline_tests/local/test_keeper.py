"""The keeper keeps: nothing that is only shown, noted or cut down to size ends the services."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from metrics_pipeline.data_folder import make_folder_id
from metrics_pipeline.errors import BusyError, InstallError
from metrics_pipeline.local import jars
from metrics_pipeline.local import keeper as module
from metrics_pipeline.local.budget import Budget
from metrics_pipeline.local.keeper import Keeper, leftovers, stop_running
from metrics_pipeline.local.processes import identify, mark
from metrics_pipeline.local.service import Service
from metrics_pipeline.local.stack import Stack, build
from metrics_pipeline.local.state import StackState
from metrics_pipeline.settings import Settings, SinkKind
from metrics_pipeline_tests.fakes import until


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


# --- Ending what runs, whatever is written down of it ------------------------------------------------------------

SLEEP = "import time; time.sleep(120)"
KEEPER = """
import pathlib, signal, sys, time
from metrics_pipeline.local import lock
held = lock.take(pathlib.Path(sys.argv[1]))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("ok", flush=True)
time.sleep(120)
"""

Begin = Callable[[str], psutil.Process]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a data folder whose stack has one service, `part`."""
    own = Settings(pipeline_data_dir=tmp_path)
    identity = make_folder_id(tmp_path)

    def build(_settings: Settings, **_: bool) -> Stack:
        command, environment = [sys.executable, "-c", SLEEP], mark(identity, "part")
        service = Service("part", "The part", "", command, environment, tmp_path / "part.log", lambda: None)
        return Stack(own, [service], frozenset(), Budget.of(own))

    monkeypatch.setattr(module, "build", build)
    return own


@pytest.fixture
def begin(settings: Settings) -> Iterator[Begin]:
    """Starts a part of the stack, in a session of its own."""
    made: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> psutil.Process:
        environment = mark(make_folder_id(settings.data_dir), name) | {"PATH": os.defpath}
        made.append(subprocess.Popen([sys.executable, "-c", SLEEP], env=environment, start_new_session=True))
        process = psutil.Process(made[-1].pid)
        assert until(process.environ)  # the kernel shows it a moment after the program begins
        return process

    yield start
    for child in made:
        child.kill()
        child.wait()


def ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def written(settings: Settings, content: object) -> None:
    (settings.data_dir / "stack.json").write_text(json.dumps(content))


def test_down_ends_what_runs_though_nothing_of_it_is_written_down(settings: Settings, begin: Begin) -> None:
    process, stray = begin("part"), begin("of-no-stack-any-more")
    said: list[str] = []
    assert leftovers(settings, StackState()) == [f"part (pid {process.pid})", f"of-no-stack-any-more (pid {stray.pid})"]
    assert stop_running(settings, said.append)
    assert ended(process)
    assert ended(stray)
    assert leftovers(settings, StackState()) == []
    assert f"of-no-stack-any-more (pid {stray.pid}) was left over: ending it" in said
    assert not stop_running(settings, said.append), "there is nothing left"


@pytest.mark.parametrize("started", ["created:5.0", "another-boot:1", ""])
def test_down_ends_what_runs_though_what_is_written_down_is_wrong(
    started: str, settings: Settings, begin: Begin
) -> None:
    process = begin("part")
    wrong = {"pid": process.pid, "started": started}
    written(settings, {"keeper": wrong, "children": {"part": wrong}, "fingerprints": {}, "ready": True})
    assert stop_running(settings, lambda _line: None)
    assert ended(process)


@pytest.mark.parametrize("sink", ["connect", "copy"])
@pytest.mark.parametrize("running", [False, True])
def test_down_needs_no_jars(
    running: bool, sink: SinkKind, settings: Settings, begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What could not be fetched for `up` is no reason for `down` to fail, too; nor is a cache that somebody cleared."""
    monkeypatch.setattr(module, "build", build)
    cache = tmp_path / "cache"
    own = settings.model_copy(update={"pipeline_cache_dir": cache, "sink": sink})
    monkeypatch.setattr(jars, "_download_all", _no_network)
    with pytest.raises(InstallError, match="no network"):
        build(own)
    part = begin("broker") if running else None
    assert stop_running(own, lambda _line: None) is running
    assert part is None or ended(part)
    assert not list(cache.rglob("*.jar"))


def _no_network(*_: object, **__: object) -> None:
    raise InstallError("cannot download: no network")


def test_down_leaves_another_folders_alone(settings: Settings, begin: Begin, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    theirs = subprocess.Popen([sys.executable, "-c", SLEEP], env=mark(make_folder_id(tmp_path / "other"), "part"))
    try:
        begin("part")
        assert stop_running(settings, lambda _line: None)
        assert theirs.poll() is None
    finally:
        theirs.kill()
        theirs.wait()


@pytest.mark.parametrize("note", ["right", "wrong", "none", "unsigned"])
def test_down_finds_the_keeper_by_its_note_or_by_its_lock(note: str, settings: Settings) -> None:
    command = [sys.executable, "-c", KEEPER, str(settings.data_dir), "up"]
    keeper = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == b"ok\n"
        me = identify(psutil.Process(keeper.pid))
        started = {"right": me.started, "wrong": "created:1.0"}.get(note)
        if started:
            who = {"pid": keeper.pid, "started": started}
            written(settings, {"keeper": who, "children": {}, "fingerprints": {}, "ready": True})
        if note == "unsigned":
            (settings.data_dir / "keeper.lock").write_text("")
        assert stop_running(settings, lambda _line: None)
        assert keeper.wait(5) == 0
    finally:
        keeper.kill()
        keeper.communicate()


def test_down_ends_no_other_program_that_has_the_lock_for_a_moment(settings: Settings) -> None:
    other = subprocess.Popen([sys.executable, "-c", KEEPER, str(settings.data_dir), "reset"], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ok\n"
        with pytest.raises(BusyError, match=f"running already .pid {other.pid}"):
            stop_running(settings, lambda _line: None)
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()


def test_down_says_what_goes_on_running(settings: Settings, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    process = begin("part")
    monkeypatch.setattr(Service, "stop", lambda self: None)
    monkeypatch.setattr(module, "_end_strays", lambda *_: False)
    with pytest.raises(
        BusyError, match=rf"still running, although everything was told to end: part .pid {process.pid}"
    ):
        stop_running(settings, lambda _line: None)


def test_a_service_that_was_killed_by_nobody_but_the_note_is_adopted(settings: Settings, begin: Begin) -> None:
    """`up` after a lost stack.json takes over what runs, rather than start it twice."""
    from metrics_pipeline.local.stack import _find

    process = begin("part")
    assert _find(lambda: None, make_folder_id(settings.data_dir), "part") == process
    assert _find(lambda: None, make_folder_id(settings.data_dir), "other") is None
