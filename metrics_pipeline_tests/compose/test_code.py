"""The code server's end: its runs first, then itself."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from metrics_pipeline.compose.code import end_runs
from metrics_pipeline.local import dagster
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.patience import deadline

SERVER = """
    import multiprocessing, signal, sys, time, pathlib

    def run(folder, seconds):
        def end(*_):
            time.sleep(seconds)  # flushes
            pathlib.Path(folder, "flushed").write_text("")
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        pathlib.Path(folder, "ready").write_text("")
        time.sleep(60)

    if __name__ == "__main__":
        context = multiprocessing.get_context("spawn")
        child = context.Process(target=run, args=(sys.argv[1], float(sys.argv[2])))
        child.start()
        child.join()
        time.sleep(60)
"""


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[psutil.Process]:
    script = tmp_path / "server.py"
    script.write_text(textwrap.dedent(SERVER))
    process = subprocess.Popen([sys.executable, script, tmp_path, str(request.param)])
    give_up = deadline(30)
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < give_up
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()
    for child in family:
        if child.is_running():
            child.kill()


@pytest.mark.parametrize("server", [0.2], indirect=True)
def test_a_run_is_told_once_and_waited_for(server: psutil.Process, tmp_path: Path) -> None:
    begun = time.monotonic()
    end_runs(server, 20)
    assert (tmp_path / "flushed").exists()
    assert 0.15 < time.monotonic() - begun < 15
    assert server.is_running()


@pytest.mark.parametrize("server", [30.0], indirect=True)
def test_a_run_that_does_not_end_is_not_waited_for_for_ever(server: psutil.Process, tmp_path: Path) -> None:
    begun = time.monotonic()
    end_runs(server, 0.3)
    assert 0.25 < time.monotonic() - begun < 10
    assert not (tmp_path / "flushed").exists()


def test_a_server_without_runs_is_not_waited_for() -> None:
    begun = time.monotonic()
    end_runs(psutil.Process(), 20)
    assert time.monotonic() - begun < 5


def test_the_server_is_the_embedded_one_on_another_address() -> None:
    settings = Settings.load()
    command = dagster.code_command(settings, "0.0.0.0")
    assert command[command.index("-p") + 1] == str(settings.dagster_code_port)
    (embedded,) = (service for service in dagster.services(settings) if service.name == "code")
    here = ["127.0.0.1" if word == "0.0.0.0" else word for word in command]
    assert embedded.command[1:] == here[1:]
