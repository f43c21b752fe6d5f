"""The COPY sink brought to a standstill: each time it must say within its patience who is stuck where, and go on afterwards."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, Final

import psutil
import psycopg
import requests

from metrics_pipeline_tests.chaos.processes import Load, Sink, VoidError, until
from metrics_pipeline_tests.chaos.proxy import Proxy
from metrics_pipeline_tests.chaos.scenarios import Outcome, progress, stopped_inside_a_transaction
from metrics_pipeline_tests.chaos.stack import Place
from metrics_pipeline_tests.patience import patience

PATIENCE: Final = 5
"""SINK_STALL_SECONDS of these sinks."""
SLACK: Final = 3.0
"""A look a second, reports twice a second, and the machine's own business."""
RATE: Final = 2000
WATCHED_SECONDS: Final = 8.0
"""How long it is watched that nobody is replaced where that would not help: longer than the patience."""


def sessions(place: Place) -> list[tuple[Any, ...]]:
    """The sink's sessions: pid, name, state, what each waits for, and whose locks."""
    with psycopg.connect(place.settings.admin_url(place.settings.metrics_database), autocommit=True) as connection:
        return connection.execute(
            "SELECT pid, application_name, state, wait_event_type, wait_event, pg_blocking_pids(pid) FROM pg_stat_activity "
            "WHERE application_name LIKE 'metrics-pipeline sink%' ORDER BY pid"
        ).fetchall()


class Standstill:
    """A sink at work, what it says while it does not get ahead, and how it goes on."""

    def __init__(self, place: Place, sink: Sink, load: Load, outcome: Outcome) -> None:
        self.place, self.sink, self.load, self.outcome = place, sink, load, outcome

    def health(self) -> tuple[int, str]:
        """What `/health` answers."""
        answer = requests.get(f"{self.sink.http}/health", timeout=10)
        return answer.status_code, str(answer.json()["reason"])

    def named(self, what: str, *words: str, within: float = PATIENCE + SLACK) -> str:
        """Wait until it is named; the whole of what is said."""
        said = ""

        def is_named() -> bool:
            nonlocal said
            status, said = self.health()
            return status == requests.codes.service_unavailable and all(word in said for word in words)

        try:
            seconds = until(is_named, within + 20, f"{what} is named by {words}")
        except VoidError as error:
            raise VoidError(f"{error}; it says: {said}; sessions: {sessions(self.place)}") from None
        self.outcome.facts[what] = f"named after {seconds:.1f} s: {said}"
        self.outcome.require(seconds <= within, f"{what} was named after {seconds:.1f} s only")
        return said

    def goes_on(self, bound: float = 45) -> None:
        """Wait until readings are stored again, everywhere, and all is well."""
        self.load.check()
        at = self.place.offsets()

        def everywhere() -> bool:
            now = self.place.offsets()
            return all(now[number] > offset for number, offset in at.items())

        until(everywhere, bound, "readings of all partitions are stored again")
        until(lambda: self.health()[0] == requests.codes.ok, bound, "it is healthy again")

    def status(self) -> dict[str, Any]:
        """What `/status` answers."""
        return self.sink.status()

    def replaced(self, before: int, bound: float = 20) -> None:
        """Wait until another worker was replaced."""
        until(lambda: self.status()["restarts"] > before, bound, "the worker is replaced")


@contextmanager
def working(place: Place, outcome: Outcome, **variables: str) -> Iterator[Standstill]:
    """A sink of two workers under load, of little patience."""
    variables.setdefault("SINK_STALL_SECONDS", str(PATIENCE))
    with Load(place, RATE) as load, Sink(place, 2, session_ms=6000, **variables).ready() as sink:
        until(
            lambda: all(one["partitions"] for one in sink.status()["workers"]),
            patience(60),
            "both workers have partitions",
        )
        progress(place, 30)
        yield Standstill(place, sink, load, outcome)
        load.check()
        load.end()
        outcome.settle(place, sink)


def stopped_worker(found: Standstill) -> None:
    """A worker is stopped while it holds a transaction."""
    before = found.status()["restarts"]
    victim, number = stopped_inside_a_transaction(found.place, found.sink)
    name = found.status()["workers"][number]["name"]
    found.named("a stopped worker", name, "does not answer", "the last that it told of")
    found.replaced(before)
    until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, 5, "the stopped one is gone")
    found.goes_on()


def held_lock(found: Standstill, statement: str = "LOCK TABLE metrics IN ACCESS EXCLUSIVE MODE") -> None:
    """Somebody else holds a lock and does nothing; no worker is to blame."""
    before = found.status()["restarts"]
    with psycopg.connect(
        found.place.settings.admin_url(found.place.settings.metrics_database), application_name="a person"
    ) as connection:
        connection.execute(statement.encode())
        pid = connection.info.backend_pid
        found.named(f"a lock ({statement.split()[0]})", f"pid {pid} (a person", "holds")
        time.sleep(WATCHED_SECONDS)
        found.outcome.require(found.status()["restarts"] == before, "a worker was replaced for a lock of somebody else")
        found.outcome.require(found.health()[0] != requests.codes.ok, "it is healthy although nothing is stored")
    found.goes_on()


def silent_broker(found: Standstill) -> None:
    """The broker takes what it is asked and answers nothing."""
    before = found.status()["restarts"]
    service = found.place.services.service("broker")
    assert service.process is not None
    service.process.suspend()
    try:
        found.named("a silent broker", "Kafka broker", "does not answer")
        time.sleep(WATCHED_SECONDS)
        found.outcome.require(found.status()["restarts"] == before, "a worker was replaced for a broker that is silent")
    finally:
        service.process.resume()
    found.goes_on(90)


def stopped_backend(found: Standstill) -> None:
    """PostgreSQL's process of a worker is stopped while a batch is written."""
    before = found.status()["restarts"]
    backend = _stopped_backend(found)
    try:
        found.named("a stopped session of PostgreSQL", "stuck in CO", f"PostgreSQL's session {backend.pid} is active")
        found.replaced(before)
        # What it holds cannot be had from it; that is said, and the successor waits.
        found.named("what it holds", f"pid {backend.pid} (metrics-pipeline sink", "holds", within=30)
        again = found.status()["restarts"]
        time.sleep(WATCHED_SECONDS)
        found.outcome.require(found.status()["restarts"] == again, "a successor was replaced for what it waits for")
    finally:
        with suppress(psutil.NoSuchProcess):
            backend.resume()
    found.goes_on()


def _stopped_backend(found: Standstill, seconds: float = 60) -> psutil.Process:
    """Stop a worker's backend inside its transaction, so that the worker waits for it."""
    deadline = time.monotonic() + seconds
    writing = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'metrics-pipeline sink%' AND backend_xid IS NOT NULL"
    settings = found.place.settings
    with psycopg.connect(settings.admin_url(settings.metrics_database), autocommit=True) as connection:
        while time.monotonic() < deadline:
            for (pid,) in connection.execute(writing).fetchall():
                backend = psutil.Process(pid)
                backend.suspend()
                with suppress(VoidError):
                    until(lambda: _stuck(found), 2, "its worker waits for it")
                    # One that was stopped with a latch of the server's memory holds up sessions of whom no lock tells.
                    if not any(waits == "LWLock" for *_, waits, _, _ in sessions(found.place)):
                        return backend
                backend.resume()
            time.sleep(random.uniform(0.002, 0.05))
    raise VoidError(f"no session was stopped inside its transaction in {seconds:.0f} s")


def _stuck(found: Standstill) -> bool:
    """Whether a worker is in a step of a transaction for more than a second."""
    steps = [one["step"].split(" for ") for one in found.status()["workers"]]
    return any(name in ("COPY", "COMMIT") and int(seconds.split()[0]) >= 1 for name, seconds in steps)


def swallowed(place: Place, outcome: Outcome) -> None:
    """A line on which nothing comes back after COMMIT, and that does not break either."""
    with (
        closing(Proxy(place.settings.postgres_port, chance=0.0)) as proxy,
        working(place, outcome, POSTGRES_PORT=str(proxy.port)) as found,
    ):
        before = found.status()["restarts"]
        proxy.swallow_next()  # and cuts none any more
        until(lambda: proxy.swallowing, 20, "a line swallows")
        found.named("a line that swallows", "stuck in COMMIT")
        found.replaced(before)
        found.goes_on()


def stalls(place: Place, times: int = 1) -> Outcome:
    """Everything that can stand still, one after another.

    Args:
        place: where.
        times: how often each of them.
    """
    outcome = Outcome()
    steps: list[Callable[[Standstill], None]] = [
        stopped_worker,
        held_lock,
        lambda found: held_lock(found, "SELECT FROM sink_offsets FOR UPDATE"),
        stopped_backend,
        silent_broker,
    ]
    for _ in range(times):
        with working(place, outcome) as found:
            for step in steps:
                step(found)
            outcome.facts["stalls"] = found.status()["stalls"]
            outcome.facts["workers replaced"] = found.status()["restarts"]
        swallowed(place, outcome)
    return outcome


def silent_end(place: Place) -> Outcome:
    """The sink ends although the broker does not answer: nothing of a client waits for ever."""
    outcome = Outcome()
    with Sink(place).ready() as sink:
        service = place.services.service("broker")
        assert service.process is not None
        service.process.suspend()
        try:
            began = time.monotonic()
            sink.process.send_signal(signal.SIGTERM)
            until(lambda: not sink.alive(), 60, "the sink ends")
            outcome.facts["seconds to end"] = round(time.monotonic() - began, 1)
            outcome.require(sink.process.returncode == 0, f"it ended with exit code {sink.process.returncode}")
        finally:
            service.process.resume()
    return outcome
