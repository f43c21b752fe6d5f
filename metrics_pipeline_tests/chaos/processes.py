"""Child processes of a scenario: the COPY sink, the repair of the connector, and the producer that loads either sink."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import requests

from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.local.service import tail
from metrics_pipeline.settings import ROOT
from metrics_pipeline_tests.chaos.stack import Place
from metrics_pipeline_tests.patience import patience

SINK: Final = "metrics_pipeline_tests.chaos.sink"
END_SECONDS: Final = 60.0


class VoidError(AssertionError):
    """The scenario did not come about, so that its result says nothing."""


def until(condition: Callable[[], object], seconds: float, what: str, interval: float = 0.1) -> float:
    """Wait for a condition; the seconds that took.

    Raises:
        VoidError: it did not come true in time.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise VoidError(f"not in {seconds:.0f} s: {what}")
        time.sleep(interval)
    return time.monotonic() - began


class Child:
    """A process that is gone when its block ends."""

    def __init__(self, place: Place, name: str, module: str, *arguments: str, **variables: str) -> None:
        self.log = place.logs / f"{name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env={**place.environment, **variables},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.alive():
            self.end()
        self.kill()

    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def end(self) -> int | None:
        """Ask it to end; its exit code, or None when it had to be killed."""
        self.process.terminate()
        try:
            return self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        """Kill it and all of its own (SIGKILL)."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def words(self) -> str:
        """The end of what it wrote."""
        return " | ".join(tail(self.log, 3))[-400:]


class Sink(Child):
    """The COPY sink: a supervisor and its workers."""

    def __init__(
        self, place: Place, workers: int = 2, *, module: str = SINK, session_ms: int | None = None, **variables: str
    ) -> None:
        self.workers = workers
        variables.setdefault("SINK_PORT", str(free_ports(1)[0]))
        self.http = f"http://127.0.0.1:{variables['SINK_PORT']}"
        if session_ms is not None:
            variables["CHAOS_SESSION_MS"] = str(session_ms)
        (place.settings.data_dir / "notes").mkdir(exist_ok=True)
        variables.setdefault("CHAOS_FOLDER", str(place.settings.data_dir / "notes"))
        super().__init__(place, "sink", module, "--workers", str(workers), **variables)

    def status(self) -> dict[str, Any]:
        """What `/status` answers."""
        answer: dict[str, Any] = requests.get(f"{self.http}/status", timeout=10).json()
        return answer

    def answers(self) -> bool:
        """Whether all of its workers consume."""
        if not self.alive():
            raise VoidError(f"the sink ended with exit code {self.process.returncode}: {self.words()}")
        with suppress(requests.RequestException):
            return [one["state"] for one in self.status()["workers"]] == ["running"] * self.workers
        return False

    def ready(self) -> Self:
        """Wait until all of its workers consume."""
        until(self.answers, patience(60), "the workers run")
        return self


class Repair(Child):
    """The repair of the connector, ticking as the keeper's does; one dies or stops at a place of a quarantine if told to."""

    def __init__(self, place: Place, name: str = "keeper", **variables: str) -> None:
        super().__init__(place, f"repair-{name}", "metrics_pipeline_tests.chaos.repairer", name, **variables)


class Load(Child):
    """A producer that publishes until it is ended."""

    def __init__(self, place: Place, rate: int, **settings: int) -> None:
        """Start it.

        Args:
            place: where.
            rate: readings a second, about.
            settings: others of the producer, by name.
        """
        # Four rounds a second, of between two thirds and four thirds of the mean.
        chosen = {"PRODUCER_MIN_METRICS": rate // 6, "PRODUCER_MAX_METRICS": rate // 3, **settings}
        changed = [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
        super().__init__(place, "producer", "metrics_pipeline", "produce", "--seconds", "86400", *changed)

    def check(self) -> None:
        """There is load.

        Raises:
            VoidError: the producer has ended.
        """
        if not self.alive():
            raise VoidError(f"the producer ended with exit code {self.process.returncode}: {self.words()}")
