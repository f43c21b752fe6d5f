"""PostgreSQL's side of the connector: transactions that hang, who holds the lock that they wait for, and their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from metrics_pipeline import postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import Settings

APPLICATION: Final = "metrics-sink"
"""The name of the connector's sessions: `ApplicationName` in its URL."""
ANSWER_SECONDS: Final = 5


@dataclass(frozen=True, slots=True)
class HangingSession:
    """A transaction of the connector that does not end.

    Attributes:
        pid: of its backend.
        seconds: since it began.
        state: `active`, `idle in transaction` and so on.
        waits_for: kind and name of the event; empty when it waits for nothing.
        holders: who holds the lock that it waits for, other than the connector itself.
    """

    pid: int
    seconds: float
    state: str = "active"
    waits_for: str = ""
    holders: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.holders:
            return f"PostgreSQL's session {self.pid} waits for a lock that {' and '.join(self.holders)} holds"
        waits = f", waits for {self.waits_for}" if self.waits_for else ""
        return f"PostgreSQL's session {self.pid} is {self.state} in a transaction for {self.seconds:.0f} s{waits}"


def hanging_sessions(settings: Settings, seconds: float) -> list[HangingSession]:
    """The connector's transactions that have been open for longer than that, the oldest first.

    Raises:
        ServiceError: PostgreSQL cannot be asked.
    """
    rows = _ask(settings, "connect_hanging", seconds=seconds)
    return [HangingSession(pid, age, str(state), waits, tuple(holders)) for pid, age, state, waits, holders in rows]


def end_sessions(settings: Settings, pids: Sequence[int]) -> int:
    """End these sessions of the connector; how many there still were.

    Raises:
        ServiceError: PostgreSQL cannot be asked.
    """
    return int(_ask(settings, "connect_end", pids=list(pids))[0][0])


def _ask(settings: Settings, query: str, **values: Any) -> list[tuple[Any, ...]]:
    with (
        postgres.connect(settings, "metrics_writer", autocommit=True, connect_timeout=ANSWER_SECONDS) as connection,
        postgres.impatient(connection, ANSWER_SECONDS),
    ):
        try:
            asked = {"application": APPLICATION, **values}
            return connection.execute(postgres.query(query).encode(), asked).fetchall()
        except psycopg.Error as error:
            raise ServiceError(
                f"PostgreSQL does not tell of the connector's sessions: {postgres.one_line(error)}"
            ) from error
