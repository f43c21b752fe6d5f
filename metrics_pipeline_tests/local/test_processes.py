"""Processes are known by boot and ticks, found by their mark, and asked what they listen on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from metrics_pipeline.local import processes
from metrics_pipeline.local.processes import ProcessId, identify, listens, mark, marked
from metrics_pipeline_tests.fakes import until

SLEEP = "import time; print(flush=True); time.sleep(60)"
LISTEN = (
    "import socket, time; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); "
    "print(s.getsockname()[1], flush=True); time.sleep(60)"
)


@contextmanager
def running(code: str = SLEEP, **variables: str) -> Iterator[tuple[psutil.Process, str]]:
    """A process, and the line that it said once it was there."""
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, env={"PATH": os.defpath} | variables, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield psutil.Process(child.pid), child.stdout.readline().strip()
    finally:
        child.kill()
        child.communicate()


def test_a_clock_that_is_set_does_not_hide_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as (process, _):
        note = identify(process)
        # What psutil tells of a start is the wall clock's time of the boot and the ticks since.
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: 5.0)
        assert note.find() == psutil.Process(process.pid)


def test_another_boot_or_another_start_is_another_process() -> None:
    me = identify(psutil.Process())
    boot, _, ticks = me.started.rpartition(":")
    assert me.find() is not None
    assert ProcessId(me.pid, f"another:{ticks}").find() is None
    assert ProcessId(me.pid, f"{boot}:{int(ticks) + 1}").find() is None


def test_where_there_is_no_boot_id_the_time_of_its_start_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_boot", lambda: "")
    me = identify(psutil.Process())
    assert me.started.startswith("created:")
    assert me.find() is not None
    assert ProcessId(me.pid, f"created:{psutil.Process().create_time() - 5}").find() is None


def test_what_was_written_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ProcessId.parse({"pid": 3, "started": "boot:5"}) == ProcessId(3, "boot:5")
    assert ProcessId.parse({"pid": 3, "created": 5.25}) == ProcessId(3, "created:5.25")


def test_a_zombie_is_not_running() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    note = identify(psutil.Process(child.pid))
    assert until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert note.find() is None
    child.wait()


def test_a_process_is_found_by_what_it_was_started_for_and_so_are_its_children() -> None:
    family = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"
    with running(**mark("one", "broker")) as (broker, _), running(**mark("two", "broker")), running():
        assert list(marked("one")) == [(broker, "broker")]
        assert list(marked("three")) == []
        assert list(marked("")) == []
        with running(family, **mark("one", "sink")) as (sink, _):
            assert until(lambda: len(sink.children()) == 1)
            found = {(process.pid, part) for process, part in marked("one")}
            assert found == {(broker.pid, "broker"), (sink.pid, "sink"), (sink.children()[0].pid, "sink")}
            for child in sink.children():
                child.kill()


def test_a_process_that_asks_does_not_find_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_variable", lambda process: "one/part")
    assert os.getpid() not in {process.pid for process, _ in marked("one")}
    assert os.getppid() not in {process.pid for process, _ in marked("one")}


def test_who_listens_is_known() -> None:
    with running(LISTEN) as (process, port), running() as (other, _):
        assert listens(process, int(port)) is True
        assert listens(process, int(port) + 1) is False
        assert listens(other, int(port)) is False
        assert listens(psutil.Process(), int(port)) is True  # a child of this one
        process.kill()
        process.wait()
        assert listens(process, int(port)) is False


def test_looking_through_all_processes_is_quick() -> None:
    began = time.monotonic()
    list(marked("nobody"))
    assert time.monotonic() - began < 5


def test_the_system_says_as_it_is_asked_where_ticks_stand(tmp_path: Path) -> None:
    """A program's name may hold brackets and spaces, which stand before the fields."""
    odd = tmp_path / "a ) b (1 2"
    odd.symlink_to(Path(sys.executable).resolve())
    child = subprocess.Popen([str(odd), "-c", "import time; time.sleep(60)"])
    try:
        assert until(lambda: psutil.Process(child.pid).name() != Path(sys.executable).name)
        assert identify(psutil.Process(child.pid)).find() is not None
        assert identify(psutil.Process(child.pid)).started.rpartition(":")[2].isdigit()
    finally:
        child.kill()
        child.wait()
