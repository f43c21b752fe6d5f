"""How the watcher is, by what it leaves in PostgreSQL: for `status`, the keeper and the exporter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from metrics_pipeline import postgres

SILENT_SECONDS: Final = 45.0
"""It gives a sign of life every ten seconds; a search in the topic may take longer."""
NO_SESSION: Final = "it is not connected to PostgreSQL: see `metrics-pipeline logs watcher`"


@dataclass(frozen=True, slots=True)
class WatcherState:
    """What it told last.

    Attributes:
        sessions: how many connections it has.
        waiting: records that it has still to look at; None before it told.
        age: seconds since then.
        to_put_right: records that Kafka Connect coerced and whose rows were not looked at yet.
    """

    sessions: int
    waiting: int | None
    age: float | None
    to_put_right: int

    @property
    def problem(self) -> str | None:
        """Why it does not watch, or None when it does."""
        if not self.sessions:
            return NO_SESSION
        if self.age is not None and self.age > SILENT_SECONDS:
            return f"it has given no sign of life for {self.age:.0f} s: see `metrics-pipeline logs watcher`"
        return None


def read_state(connection: postgres.Connection) -> WatcherState:
    """Ask PostgreSQL.

    Raises:
        psycopg.Error: the tables are not there, or PostgreSQL cannot be used.
    """
    row = connection.execute(postgres.query("watcher_state")).fetchone()
    return WatcherState(*(row or (0, None, None, 0)))
