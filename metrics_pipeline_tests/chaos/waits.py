"""How long the statements of a sink wait for a lock, and who keeps them waiting."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

import psycopg

from metrics_pipeline_tests.chaos.stack import Place

LONGEST: Final = 1.0
"""Seconds that a statement of a sink may wait. PostgreSQL's own log tells of each wait that lasts so long (`deadlock_timeout`)."""
EVERY: Final = 0.03
OURS: Final = "chaos of its own"
"""What sessions of the tests are called that store as a sink does."""

_WAITING: Final = """
SELECT
    l.pid, a.query_start, coalesce(l.waitstart, clock_timestamp()),
    extract(epoch FROM clock_timestamp() - coalesce(l.waitstart, clock_timestamp()))::float8,
    l.mode || ' of ' || coalesce(l.relation::regclass::text, l.locktype),
    (
        SELECT string_agg(b.application_name || ': ' || left(b.query, 90), ' | ')
        FROM pg_stat_activity AS b
        WHERE b.pid = ANY (pg_blocking_pids(l.pid))
    )
FROM pg_locks AS l
JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE NOT l.granted AND a.usename = 'metrics_writer' AND a.application_name <> %s
"""
_LOGGED: Final = re.compile(
    rb"metrics_writer@\S+ (?!"
    + OURS.encode()
    + rb").*process \d+ (?:still waiting for|acquired) (.*) after ([\d.]+) ms"
)


class Waits:
    """Watches the sessions of the sinks, from the begin of its block to its end.

    Attributes:
        longest: seconds that one statement waited for locks, all in all, as far as it was seen; it is looked often.
        what: which lock that was, and who had it.
        seen: statements that waited for at least a tenth of a second.
        gap: the longest time in which the COPY sink committed nothing.
        looks: how often it was looked.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._log = place.logs / "postgres.log"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="waits", daemon=True)
        self._statements: dict[tuple[int, Any], dict[Any, float]] = {}
        self._problem: BaseException | None = None
        self.longest, self.gap = 0.0, 0.0
        self.what = ""
        self.looks = 0

    def __enter__(self) -> Self:
        with self._connection() as connection:
            connection.execute("ALTER SYSTEM SET log_lock_waits = on")
            connection.execute("SELECT pg_reload_conf()")
        self._begin = self._log.stat().st_size
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(60)

    @property
    def seen(self) -> int:
        """How many statements waited for at least a tenth of a second."""
        return sum(sum(waits.values()) >= 0.1 for waits in self._statements.values())

    def logged(self) -> list[str]:
        """Waits of a second and more, by PostgreSQL's log."""
        with self._log.open("rb") as file:
            file.seek(self._begin)
            return [
                f"{float(found[2]) / 1000:.1f} s for {found[1].decode()}"
                for line in file
                if (found := _LOGGED.search(line)) and float(found[2]) >= LONGEST * 1000
            ]

    def facts(self, *, commits: bool) -> Mapping[str, Any]:
        """Figures for people.

        Args:
            commits: with the time between two commits of the COPY sink.
        """
        if self._problem is not None:
            raise self._problem
        facts = {
            "longest wait of a sink's statement, s": round(self.longest, 2),
            "that was": self.what,
            "statements that waited 0.1 s": self.seen,
            "looks at the locks": self.looks,
        }
        return facts | ({"longest time between commits, s": round(self.gap, 2)} if commits else {})

    def _connection(self) -> psycopg.Connection[tuple[Any, ...]]:
        settings = self._place.settings
        return psycopg.connect(settings.admin_url(settings.metrics_database), autocommit=True)

    def _run(self) -> None:
        try:
            with self._connection() as connection:
                stored, since = self._stored(connection), time.monotonic()
                while not self._stop.wait(EVERY):
                    for row in connection.execute(_WAITING, [OURS]).fetchall():
                        self._note(*row)
                    self.looks += 1
                    now = self._stored(connection)
                    if now != stored:
                        self.gap = max(self.gap, time.monotonic() - since)
                        stored, since = now, time.monotonic()
        except psycopg.Error as error:
            self._problem = error

    def _stored(self, connection: psycopg.Connection[tuple[Any, ...]]) -> Any:
        return connection.execute("SELECT sum(next_offset) FROM sink_offsets").fetchone()

    def _note(self, pid: int, query_start: Any, since: Any, seconds: float, lock: str, blockers: str | None) -> None:
        waits = self._statements.setdefault((pid, query_start), {})
        waits[since] = max(waits.get(since, 0.0), seconds)
        if (total := sum(waits.values())) > self.longest:
            self.longest, self.what = total, f"{lock}, behind {blockers or 'somebody who has gone'}"
