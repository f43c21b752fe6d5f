"""The clock of a measurement, the same for every path into the table.

It runs from the first commit to the last one, and counts the rows of the transactions that began after the first commit:
what was under way then, and the start of processes and tasks before it, neither costs a path time nor is a gift to it. All of
this is read from the table afterwards (`created_at` is the begin of a row's transaction), so nothing is polled for it.

Where that leaves less than half of the rows, because there are too few for more than a batch or two of each worker, or where
PostgreSQL keeps no commit times, the clock runs from the begin of the first transaction to the end and counts all rows.

CPU time is read twice: when the first page of rows appears in the table, and when all rows are seen to be stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from metrics_pipeline import postgres
from metrics_pipeline.bench import cpu, table
from metrics_pipeline.bench.paths import DrainPath
from metrics_pipeline.bench.place import Place
from metrics_pipeline.bench.table import Stored
from metrics_pipeline.errors import ServiceError

START_SECONDS: Final = 120.0
STALL_SECONDS: Final = 120.0
GLANCE_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True)
class Timed:
    """What a path took.

    Attributes:
        rows: that were stored.
        counted: of these, by the clock of this module.
        seconds: in which it counted them.
        cpu: microseconds of CPU a row by part of the pipeline.
        transactions: that stored the rows.
        steady: whether the clock ran from the first commit; else from the begin of the first transaction.
        by_commit_times: whether it ended with the last commit; else it is when all rows were seen to be stored, which is up
            to two seconds later for a connector.
    """

    rows: int
    counted: int
    seconds: float
    cpu: dict[str, float]
    transactions: int
    steady: bool
    by_commit_times: bool

    @property
    def rows_per_second(self) -> float:
        """Stored rows a second."""
        return self.counted / self.seconds

    @classmethod
    def of(cls, stored: Stored, seen: datetime, costs: dict[str, float]) -> Timed:
        """What the table and the meter tell.

        Args:
            stored: of the table.
            seen: when all rows were seen to be stored.
            costs: CPU microseconds a row by part.
        """
        end = stored.last_committed or seen
        begin, counted = stored.first_committed, stored.rows_after_first or 0
        steady = begin is not None and 2 * counted >= stored.rows
        if begin is None or not steady:
            begin, counted = stored.first_began, stored.rows
        return cls(
            rows=stored.rows,
            counted=counted,
            seconds=max((end - begin).total_seconds(), 1e-6),
            cpu=costs,
            transactions=stored.transactions,
            steady=steady,
            by_commit_times=stored.last_committed is not None,
        )


def time_path(
    place: Place,
    connection: postgres.Connection,
    path: DrainPath,
    target: int,
    progress: Callable[[int], None],
) -> Timed:
    """Let a path store what the topic holds beyond what the table does, and end it.

    Args:
        place: where it runs.
        connection: of the superuser, autocommit, to the database of the readings.
        path: not started yet.
        target: the sum of the offsets that it is to reach.
        progress: told how far it is, as a sum of offsets.

    Raises:
        ServiceError: it does not begin, does not advance, or has failed.
    """
    try:
        since = table.clock(connection)
        size = table.pages(connection)
        path.start()
        meter = cpu.CpuMeter({**place.processes, **path.processes()})
        _await_first_page(connection, path, size)
        before = meter.read()
        _await_target(path, target, progress)
        seen, after = table.clock(connection), meter.read()
    finally:
        path.stop()
    stored = table.stored(connection, since)
    return Timed.of(stored, seen, cpu.per_row(before, after, stored.rows))


def _await_first_page(connection: postgres.Connection, path: DrainPath, size: int) -> None:
    begin = look = time.monotonic()
    while table.pages(connection) == size:
        now = time.monotonic()
        if now - begin > START_SECONDS:
            raise ServiceError(f"{path.name}: nothing was stored within {START_SECONDS:.0f} s")
        if now - look > 1:
            look = now
            path.passed()  # raises when it has failed
        time.sleep(GLANCE_SECONDS)


def _await_target(path: DrainPath, target: int, progress: Callable[[int], None]) -> None:
    best, since = -1, time.monotonic()
    while (passed := path.passed()) < target:
        progress(passed)
        now = time.monotonic()
        if passed > best:
            best, since = passed, now
        elif now - since > STALL_SECONDS:
            raise ServiceError(f"{path.name}: no progress for {STALL_SECONDS:.0f} s, {target - passed:,} records left")
        time.sleep(path.interval)
    progress(passed)
