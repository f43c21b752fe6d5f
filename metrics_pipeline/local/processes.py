"""Processes of this machine: known again for good, found by what they were started for, and asked what they listen on.

A pid alone may have been given to another process since, and a time of the wall clock moves when the clock is set. On Linux a process
is known by the machine's boot and its start in ticks since then, which nobody can move.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from metrics_pipeline.data_folder import VARIABLE

_PROC = Path("/proc")
_CREATED = "created:"


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process for good.

    Attributes:
        pid: its number.
        started: `BOOT:TICKS`, or `created:SECONDS` of the wall clock where there is nothing better.
    """

    pid: int
    started: str

    @classmethod
    def parse(cls, written: dict[str, Any]) -> ProcessId:
        """As it was written down; versions before this one wrote a time of the wall clock.

        Raises:
            KeyError: it is something else.
        """
        started = written["started"] if "started" in written else f"{_CREATED}{float(written['created'])}"
        return cls(int(written["pid"]), str(started))

    def find(self) -> psutil.Process | None:
        """The process, if it still runs."""
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(self.pid)
            if self._is(process) and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def _is(self, process: psutil.Process) -> bool:
        if self.started.startswith(_CREATED):
            return abs(process.create_time() - float(self.started.removeprefix(_CREATED))) < 1
        return _started(process) == self.started


def identify(process: psutil.Process) -> ProcessId:
    """What to write down to find the process again.

    Raises:
        psutil.Error: it has ended.
    """
    return ProcessId(process.pid, _started(process))


def _started(process: psutil.Process) -> str:
    boot = _boot()
    if not boot:
        return f"{_CREATED}{process.create_time()}"
    try:
        # The second field is the program's name in brackets, in which anything may stand.
        fields = (_PROC / str(process.pid) / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError as error:
        raise psutil.NoSuchProcess(process.pid) from error
    return f"{boot}:{fields[19]}"  # the 22nd of all


@cache
def _boot() -> str:
    """The id of this boot of this machine; empty where there is none."""
    with contextlib.suppress(OSError):
        if sys.platform == "linux":
            return (_PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
    return ""


def mark(identity: str, part: str) -> dict[str, str]:
    """What a process gets into its environment, for `marked` to find it by.

    Args:
        identity: the data folder's id.
        part: the name of the service.
    """
    return {VARIABLE: f"{identity}/{part}"}


def marked(identity: str) -> Iterator[tuple[psutil.Process, str]]:
    """Every process that was started for a data folder, and the part that it belongs to; never this one, nor those above it.

    What this user may not look into is passed over.
    """
    if not identity:
        return
    ours = {os.getpid(), *(parent.pid for parent in _parents())}
    for pid in psutil.pids():
        if pid in ours:
            continue
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            whose, _, part = _variable(process).partition("/")
            if whose == identity and process.status() != psutil.STATUS_ZOMBIE:
                yield process, part


def _parents() -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process().parents()
    return []


def _variable(process: psutil.Process) -> str:
    if sys.platform != "linux":
        return str(process.environ().get(VARIABLE, ""))
    # Not by psutil, which decodes all of it: this is asked of every process of the machine.
    beginning = f"{VARIABLE}=".encode()
    for entry in (_PROC / str(process.pid) / "environ").read_bytes().split(b"\0"):
        if entry.startswith(beginning):
            return entry.removeprefix(beginning).decode(errors="replace")
    return ""


def certain(written: ProcessId, folder: Path) -> ProcessId:
    """A process as a former version wrote it down, by a clock that may have been set since, in a way that stays true.

    Args:
        written: what it wrote down; what is certain already comes back as it is.
        folder: the data folder. A process of that number that has it on its command line or in its environment is the one.
    """
    if not written.started.startswith(_CREATED) or not _boot():
        return written
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(written.pid)
        told = process.environ().get("PIPELINE_DATA_DIR") == str(folder)
        if written.find() is not None or told or f"{folder}/" in " ".join(process.cmdline()):
            return identify(process)
    return written


def listens(process: psutil.Process, port: int) -> bool | None:
    """Whether a process or one of its children listens on a port of this machine; None when this user may not know."""
    unknown = False
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            try:
                connections = one.net_connections("tcp")
            except psutil.AccessDenied:
                unknown = True
                continue
            except psutil.NoSuchProcess:
                continue
            if any(c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port for c in connections):
                return True
    return None if unknown else False
