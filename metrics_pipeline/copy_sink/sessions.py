"""PostgreSQL's side of the workers: what their sessions wait for, and their end. Asked by a thread that may be kept waiting."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from metrics_pipeline import postgres
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.settings import Settings

log = logging.getLogger(__name__)

APPLICATION: Final = "metrics-pipeline sink"
"""What `pg_stat_activity` shows of a worker; its name follows."""
ASK_SECONDS: Final = 1.0
"""How often PostgreSQL is asked at most."""
CONNECT_SECONDS: Final = 3
ANSWER_SECONDS: Final = 5.0
"""How long PostgreSQL may take for an answer until the line is hung up."""
FRESH_SECONDS: Final = 3.0
"""How long what was seen of a session stands."""
LATELY_SECONDS: Final = 15.0
"""How long who held a lock stands: a lock is waited for in pieces of a few seconds, with pauses between them."""


@dataclass(frozen=True, slots=True)
class Session:
    """A worker's session, as PostgreSQL shows it.

    Attributes:
        pid: of its backend.
        state: `active`, `idle in transaction` and so on.
        waits_for: kind and name of the event; empty when it waits for nothing.
        holders: who holds the lock that it waits for.
    """

    pid: int
    state: str
    waits_for: str = ""
    holders: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.holders:
            return f"PostgreSQL's session {self.pid} waits for a lock that {' and '.join(self.holders)} holds"
        waits = f", waits for {self.waits_for}" if self.waits_for else ""
        return f"PostgreSQL's session {self.pid} is {self.state}{waits}"


class SessionWatch:
    """Asks PostgreSQL about the workers when something is wrong with one of them, and ends what dead ones left.

    Nothing here waits: an answer is there, or not yet.

    Args:
        settings: where PostgreSQL is.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._thread: threading.Thread | None = None
        self._seen: dict[str, tuple[float, Session]] = {}
        self._blocked: dict[str, tuple[float, Session]] = {}
        self._to_end: set[str] = set()
        self._asked = -ASK_SECONDS
        self._answered: float | None = None
        self._problem = ""

    def ask(self, names: Sequence[str]) -> None:
        """Ask about these workers, unless a question is under way."""
        under_way = self._thread is not None and self._thread.is_alive()
        if not under_way and time.monotonic() - self._asked > ASK_SECONDS:
            self._asked = time.monotonic()
            self._thread = threading.Thread(target=self._ask, args=(list(names),), name="sessions", daemon=True)
            self._thread.start()

    def end(self, name: str) -> None:
        """End the sessions of a worker whose process is gone, with the next question."""
        self._to_end.add(name)

    def ended(self, name: str) -> bool:
        """Whether that has been done."""
        return name not in self._to_end

    def seen(self, name: str, *, reader: bool = False) -> Session | None:
        """The writer's or the reader's session of a worker, as it was a moment ago."""
        when, session = self._seen.get(applications(name)[reader], (0.0, None))
        return session if time.monotonic() - when < FRESH_SECONDS else None

    def blocked(self, name: str) -> Session | None:
        """The session of a worker that waited lately for a lock that somebody held."""
        found = [self._blocked[one] for one in applications(name) if one in self._blocked]
        when, session = max(found, key=lambda one: one[0], default=(0.0, None))
        return session if time.monotonic() - when < LATELY_SECONDS else None

    def problem(self, seconds: float) -> str | None:
        """Why PostgreSQL did not answer; empty when it was not asked within these seconds, None when it answered."""
        if self._problem:
            return self._problem
        return None if self._answered is not None and time.monotonic() - self._answered < seconds else ""

    def _ask(self, names: list[str]) -> None:
        ending = sorted(self._to_end)
        try:
            rows = self._rows(names, ending)
        except psycopg.Error as error:
            self._problem = postgres.one_line(error)
            return
        except PipelineError as error:
            self._problem = str(error)
            return
        now = time.monotonic()
        self._to_end.difference_update(ending)
        self._problem, self._answered = "", now
        for application, pid, state, waits_for, holders in rows:
            found = Session(pid, str(state), waits_for, tuple(holders))
            self._seen[application] = now, found
            if holders:
                self._blocked[application] = now, found

    def _rows(self, names: list[str], ending: list[str]) -> list[tuple[Any, ...]]:
        with (
            postgres.connect(
                self._settings,
                "metrics_writer",
                autocommit=True,
                connect_timeout=CONNECT_SECONDS,
                application_name="metrics-pipeline supervisor",
            ) as connection,
            postgres.impatient(connection, ANSWER_SECONDS),
        ):
            if ending:
                row = connection.execute(postgres.query("sink_end_sessions").encode(), _names(ending)).fetchone()
                log.warning("ended %s session(s) of %s", row and row[0], ", ".join(ending))
            return connection.execute(postgres.query("sink_sessions").encode(), _names(names)).fetchall()


def _names(workers: Sequence[str]) -> dict[str, list[str]]:
    return {"names": [application for name in workers for application in applications(name)]}


def applications(name: str) -> list[str]:
    """The names by which PostgreSQL knows the sessions of a worker: the writer's and the reader's."""
    return [f"{APPLICATION} {name}", f"{APPLICATION} {name} places"]
