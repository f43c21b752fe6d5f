"""CPU time by part of the pipeline, counted so that processes which end meanwhile are not forgotten."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping

import psutil

Seconds = dict[str, float]
"""CPU seconds, user and system, by part."""


class CpuMeter:
    """Reads the CPU time of processes with all their descendants.

    A descendant that ended was waited for by its parent, whose counters then hold its time: sums of two moments can be
    subtracted. What a process used whose parent had ended before it is lost.
    """

    def __init__(self, parts: Mapping[str, psutil.Process]) -> None:
        """Prepare.

        Args:
            parts: the process at the top of each part.
        """
        self._parts = dict(parts)

    def add(self, name: str, process: psutil.Process) -> None:
        """Count one more part from now on."""
        self._parts[name] = process

    def read(self) -> Seconds:
        """CPU seconds used so far by each part that still runs, and by this process as `bench`."""
        seconds = {"bench": time.process_time()}
        for name, process in self._parts.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                seconds[name] = family_seconds(process)
        return seconds


def family_seconds(process: psutil.Process) -> float:
    """CPU seconds of a process, of its descendants, and of those of them that were waited for.

    Raises:
        psutil.NoSuchProcess: it ended.
    """
    total = _seconds(process)
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += _seconds(child)
    return total


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def per_row(before: Seconds, after: Seconds, rows: int) -> dict[str, float]:
    """Microseconds of CPU a row by part, for the parts known at both moments, and `total`."""
    used = {name: (after[name] - before[name]) * 1e6 / rows for name in before.keys() & after.keys()}
    return dict(sorted(used.items())) | {"total": sum(used.values())}
