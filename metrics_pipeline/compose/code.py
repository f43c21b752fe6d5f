"""The code server of a container: the embedded stack's command, with an end that lets the producer flush.

An engine stops a container by one SIGTERM to its first process. Dagster's code server would then wait for its runs, which go
on until the engine kills them all. So the runs are told first, and the server when they have ended.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

import psutil

from metrics_pipeline.local import dagster
from metrics_pipeline.settings import Settings

RUNS_SECONDS: Final = 45.0
"""How long runs may take to end: PRODUCER_FLUSH_SECONDS and the run's last words, within the service's grace period."""
SERVER_SECONDS: Final = 10.0
"""How long the server itself may take, without runs."""
_RUN = "multiprocessing.spawn"
"""In the command line of a run's process, which Dagster starts by Python's multiprocessing."""


def run(settings: Settings) -> int:
    """Serve the definitions until a signal, then end the runs, then the server; its exit code."""
    program, *arguments = dagster.code_command(settings, settings.listen_host)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server = subprocess.Popen([str(Path(sys.executable).parent / program), *arguments])
    while server.poll() is None and not stop.wait(0.2):
        pass
    if server.poll() is None:
        end_runs(psutil.Process(server.pid), RUNS_SECONDS)
        server.terminate()
        try:
            server.wait(SERVER_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
    return server.wait() if not stop.is_set() else 0


def end_runs(server: psutil.Process, seconds: float) -> None:
    """Ask each run of the server to end, and wait until they have."""
    deadline = time.monotonic() + seconds
    told: set[int] = set()
    while time.monotonic() < deadline:
        # Again and again: a run may just have been launched.
        runs = [child for child in server.children(recursive=True) if _is_run(child)]
        if not runs:
            return
        for child in runs:
            if child.pid not in told:
                told.add(child.pid)
                child.terminate()
        time.sleep(0.1)


def _is_run(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and any(_RUN in word for word in process.cmdline())
    except psutil.Error:
        return False
