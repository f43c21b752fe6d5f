"""How much memory the processes of a scenario have at their peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from metrics_pipeline_tests.chaos import jobs
from metrics_pipeline_tests.chaos.processes import Child, Sink
from metrics_pipeline_tests.chaos.scenarios import MEMORY_LIMIT, Outcome
from metrics_pipeline_tests.chaos.stack import Place

JOB_LIMIT: Final = 1_500_000_000
"""Bytes that a process which archives may use, as `docs/archive.md` has it."""
SESSION_LIMIT: Final = 500_000_000
"""Bytes that a session of PostgreSQL may use beside the memory that all share."""


@dataclass
class Memory:
    """The most memory that each process had."""

    place: Place
    peaks: dict[str, int] = field(default_factory=dict)

    def look(self, children: Mapping[str, Child], sink: Sink | None) -> None:
        """Look at all of them."""
        pids = {name: child.process.pid for name, child in children.items()}
        if sink is not None:
            pids |= {f"worker {number}": one["pid"] for number, one in enumerate(sink.status()["workers"])}
        for name, pid in pids.items():
            self._note(name, pid, "VmHWM")
        for name in ("postgres", "connect", "broker"):
            service = self.place.services
            if name in [one.name for one in service.services]:
                process = service.service(name).process
                if process is None:
                    continue
                if name != "postgres":
                    self._note(name, process.pid, "VmHWM")
                    continue
                with_sessions = psutil.Process(process.pid).children()
                self._note("a session of PostgreSQL", [one.pid for one in with_sessions], "RssAnon")

    def _note(self, name: str, pids: int | list[int], what: str) -> None:
        for pid in [pids] if isinstance(pids, int) else pids:
            try:
                lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
            found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:")]
            self.peaks[name] = max([self.peaks.get(name, 0), *found])

    def judge(self, outcome: Outcome) -> None:
        """Note the figures, and what is too much."""
        outcome.facts["peak memory, MB"] = {name: round(peak / 1e6) for name, peak in sorted(self.peaks.items())}
        for name, peak in self.peaks.items():
            limit = (
                MEMORY_LIMIT
                if name.startswith("worker")
                else SESSION_LIMIT
                if name == "a session of PostgreSQL"
                else JOB_LIMIT
                if name in jobs.JOBS
                else None
            )
            outcome.require(limit is None or peak < limit, f"{name} used {peak / 1e6:,.0f} MB")
