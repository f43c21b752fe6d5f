"""Rows that Kafka Connect made of records that are no readings, put right: restored, or removed.

A row is touched only while it holds exactly what Connect made of the record, and after the sink has passed that record. It is looked at
again later: a task of Connect that lost its partitions may still have had the record in hand.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from metrics_pipeline import postgres
from metrics_pipeline.settings import TOPIC, Settings
from metrics_pipeline.watcher.coercion import CoercedRow
from metrics_pipeline.watcher.progress import SinkProgress
from metrics_pipeline.watcher.readings import Key, ReadingSearch

LOOK_AGAIN_SECONDS: Final = (20.0, 120.0)
"""After the first look at a row and after the second one."""
SEARCH_SECONDS: Final = 20.0
"""Between two searches of the topic; each takes up all rows that wait."""
SEARCH_SHARE: Final = 20
"""A search that took much CPU is followed by a rest of so many times as many seconds."""
SLICE_SECONDS: Final = 0.7
"""How long it searches until somebody else has to have a turn."""
AT_ONCE: Final = 5000
"""Rows looked at in a transaction."""
CATCH_UP: Final = 200_000
"""Records that may have come since a search, to be read while the rows are locked."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DueRow:
    """A coerced record whose row is to be looked at.

    Attributes:
        partition: of the record.
        offset: of the record.
        looks: how often it was looked at before.
        row: what Connect makes of the record.
        created_at: of the row, when it is that; else None.
    """

    partition: int
    offset: int
    looks: int
    row: CoercedRow
    created_at: datetime | None

    @property
    def key(self) -> Key:
        """Device, time and metric."""
        return self.row.device_id, self.row.published_at, self.row.metric_name


@dataclass(slots=True)
class _UnderWay:
    """A search that goes on: rows that were wrong when it began, and what it has cost."""

    wrong: Sequence[DueRow]
    search: ReadingSearch
    steps: Iterator[None]
    began: float
    cost: float = 0.0


class Mender:
    """Looks at the rows that are due.

    Args:
        settings: where the broker is.
        progress: how far the sink was when.
        clock: seconds, monotonic.
        cost: seconds of CPU that this process has used.
        search: makes a search; for tests.
    """

    def __init__(
        self,
        settings: Settings,
        progress: SinkProgress,
        clock: Callable[[], float] = time.monotonic,
        cost: Callable[[], float] = time.process_time,
        search: Callable[[Settings, list[Key]], ReadingSearch] = ReadingSearch,
    ) -> None:
        self._settings = settings
        self._progress = progress
        self._clock = clock
        self._cost = cost
        self._search = search
        self._not_before = 0.0
        self._under_way: _UnderWay | None = None

    def look(self, connection: postgres.Connection, passed: Mapping[int, int]) -> int:
        """Look at what is due, and put right what is wrong.

        Args:
            connection: of `metrics_writer`, autocommit.
            passed: per partition how far the sink is.

        Returns:
            How many rows were put right.

        Raises:
            ServiceError: the broker cannot be used; nothing was changed then.
            psycopg.Error: PostgreSQL cannot be used, or does not give a lock; likewise.
        """
        if self._under_way is not None:
            return self._go_on(connection, self._under_way)
        values = {
            "topic": TOPIC,
            "partitions": list(passed),
            "passed": list(passed.values()),
            "limit": AT_ONCE,
        }
        rows = connection.execute(postgres.query("watcher_due"), values).fetchall()
        due = [DueRow(row[0], row[1], row[2], CoercedRow(*row[3:8]), row[8]) for row in rows]
        wrong = [row for row in due if row.created_at is not None]
        if right := [row for row in due if row.created_at is None]:
            _looked(connection, right)
        if not wrong or self._clock() < self._not_before:
            return 0
        self._under_way = self._begin(wrong)
        return self._go_on(connection, self._under_way)

    def _begin(self, wrong: Sequence[DueRow]) -> _UnderWay:
        moments = [row.created_at or datetime.min.replace(tzinfo=UTC) for row in wrong]
        bound = dict(self._progress.before(min(moments)))
        for row in wrong:
            # A record and the coerced one may have come in one batch, of which Connect writes the last of a key alone.
            if row.partition in bound:
                bound[row.partition] = min(bound[row.partition], row.offset)
        search = self._search(self._settings, [row.key for row in wrong])
        return _UnderWay(wrong, search, search.steps(bound), self._clock())

    def _go_on(self, connection: postgres.Connection, under_way: _UnderWay) -> int:
        """Search a little further; at the end, put right what is still wrong."""
        spent, deadline = self._cost(), self._clock() + SLICE_SECONDS
        try:
            for _ in under_way.steps:
                if self._clock() > deadline:
                    under_way.cost += self._cost() - spent
                    return 0
            mended = self._mend(connection, under_way)
        except BaseException:
            self._end(under_way, self._cost() - spent)
            raise
        self._end(under_way, self._cost() - spent)
        return mended

    def _end(self, under_way: _UnderWay, cost: float) -> None:
        under_way.search.close()
        self._under_way = None
        self._not_before = under_way.began + max(SEARCH_SECONDS, SEARCH_SHARE * (under_way.cost + cost))

    def _mend(self, connection: postgres.Connection, under_way: _UnderWay) -> int:
        wrong, search = under_way.wrong, under_way.search
        places = {
            "topic": TOPIC,
            "partitions": [row.partition for row in wrong],
            "offsets": [row.offset for row in wrong],
        }
        with connection.transaction():
            held = set(connection.execute(postgres.query("watcher_hold"), places).fetchall())
            # What the sink stores from now on waits for these locks; what it has stored is in the topic already.
            if not search.catch_up(CATCH_UP):
                return 0
            mended = [row for row in wrong if (row.partition, row.offset) in held]
            if mended:
                self._apply(connection, mended, search)
                _looked(connection, mended)
        return len(held)

    def _apply(self, connection: postgres.Connection, wrong: Sequence[DueRow], search: ReadingSearch) -> None:
        restored = [row for row in wrong if row.key in search.found]
        removed = [row for row in wrong if row.key not in search.found]
        with connection.cursor() as cursor:
            if restored:
                readings = [search.found[row.key].reading for row in restored]
                cursor.executemany(
                    postgres.query("watcher_restore"),
                    [(reading.value, reading.tags, *row.key) for reading, row in zip(readings, restored, strict=True)],
                )
            if removed:
                cursor.execute(
                    "SELECT withdraw_coerced(%s, %s, %s)",
                    [TOPIC, [row.partition for row in removed], [row.offset for row in removed]],
                )
            outcomes = [(_outcome(row, search), TOPIC, row.partition, row.offset) for row in wrong]
            cursor.executemany(postgres.query("watcher_outcome"), outcomes)
        for outcome, _, partition, offset in outcomes:
            log.warning("partition %d, offset %d%s", partition, offset, outcome)


def _outcome(row: DueRow, search: ReadingSearch) -> str:
    """What is added to the reject: what Connect had stored, and what became of it."""
    found = search.found.get(row.key)
    again = " again" if row.looks else ""
    text = f"; Kafka Connect had stored{again} {row.row}"
    if found is None:
        return f"{text}: the row was removed"
    return f"{text}: the reading of partition {found.partition}, offset {found.offset} was put back"


def _looked(connection: postgres.Connection, rows: Sequence[DueRow]) -> None:
    values = {
        "topic": TOPIC,
        "partitions": [row.partition for row in rows],
        "offsets": [row.offset for row in rows],
        "waits": list(LOOK_AGAIN_SECONDS),
    }
    connection.execute(postgres.query("watcher_looked"), values)
