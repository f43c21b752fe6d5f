"""Summaries of the stored readings: kept by adding what changed, equal at every tick to a count over all readings.

How it stays exact is told in `sql/migrations/20261122000002_summaries.sql`, how it stays cheap with a large fleet in
`sql/migrations/20261127000010_device_summaries.sql`; the same figures counted the plain way are `sql/queries/*_plain.sql`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from metrics_pipeline.errors import ServiceError
from metrics_pipeline.postgres import Connection, connect, one_line, query
from metrics_pipeline.settings import Settings

log = logging.getLogger(__name__)

FOLD_FACTOR: Final = 8
"""A fold waits for so many entries a row that the last one changed."""
FEWEST_PENDING = 20_000
"""With fewer entries a fold is not worth its statements."""
MOST_KEPT = 0.5
"""Of the entries that a fold waits for: when no more are left once those of the same device, metric and slot are one, they wait on."""
MOST_PENDING = 3_000_000
"""With more, whoever reads the summaries by device would wait for seconds."""
PACK_ENTRIES: Final = 4_096
"""About so many entries become one row."""
BULK_ENTRIES: Final = 50_000
"""From here on each is not looked up by itself: the planner does not know how many there are in arrays."""
SETTLED_AFTER = timedelta(hours=6)
"""A slot is over when it began so long ago; readings that come later cost a second look-up."""

_TABLES = ("ingestion_minutes", "device_slots", "device_metric_totals", "device_deltas")
_OTHER_WAYS = ("enable_nestloop", "enable_mergejoin", "enable_sort", "enable_seqscan")


@dataclass(frozen=True)
class Minute:
    """Readings stored in one minute, by created_at."""

    minute: datetime
    rows: int


@dataclass(frozen=True)
class IngestionRate:
    """Inserts over the last ten minutes.

    Attributes:
        minutes: oldest first, the current (unfinished) one last, minutes without inserts included.
        rows_last_10_minutes: their sum.
        rows_per_second: mean over the last finished minute.
        newest: when the newest reading was stored; None in an empty table.
        rows: all readings there are.
    """

    minutes: list[Minute]
    rows_last_10_minutes: int
    rows_per_second: float
    newest: datetime | None
    rows: int


@dataclass(frozen=True)
class MetricSummary:
    """Readings of one metric of one device."""

    metric_name: str
    rows: int
    min: float
    mean: float
    max: float


@dataclass(frozen=True)
class DeviceSummary:
    """Readings of one device; first and last seen are published_at."""

    device_id: UUID
    rows: int
    first_seen: datetime
    last_seen: datetime
    metrics: list[MetricSummary]


@dataclass(frozen=True)
class DeviceSummaries:
    """All devices together, and those with the most readings one by one."""

    devices: int
    rows: int
    first: list[DeviceSummary]


def ingestion_rate(settings: Settings) -> IngestionRate:
    """Bring the summaries up to date, write the table `ingestion_rate`, and return what it holds.

    Raises:
        ServiceError: PostgreSQL is not reachable, or refused.
    """
    with connect(settings, "metrics_summarizer", autocommit=True) as conn, _errors():
        _refresh_index(conn)
        with _tick(conn):
            since = _value(conn, "SELECT max(created_at) FROM summary_inserts")
            rows = _absorb(conn)
            conn.execute(query("ingestion_rate_refresh"))
            stored = conn.execute("SELECT minute, rows FROM ingestion_rate ORDER BY minute")
            minutes = [Minute(minute, count) for minute, count in stored]
            newest = _newest(conn, since)
    return IngestionRate(
        minutes=minutes,
        rows_last_10_minutes=sum(minute.rows for minute in minutes),
        rows_per_second=minutes[-2].rows / 60,
        newest=newest,
        rows=rows,
    )


def device_summary(settings: Settings, *, limit: int = 100) -> DeviceSummaries:
    """Bring `device_summary` and `device_metric_summary` up to date, and return the devices with most readings.

    Args:
        settings: where PostgreSQL is.
        limit: how many devices to return one by one.

    Raises:
        ServiceError: PostgreSQL is not reachable, or refused.
    """
    with connect(settings, "metrics_summarizer", autocommit=True) as conn, _errors():
        _refresh_index(conn)
        with _tick(conn):
            rows = _absorb(conn)
            metric_rows = conn.execute(query("device_metrics"), {"limit": limit}).fetchall()
    first = []
    for (_, device_id, count, first_seen, last_seen), metrics in groupby(metric_rows, key=lambda row: row[:5]):
        first.append(
            DeviceSummary(device_id, count, first_seen, last_seen, [MetricSummary(*metric[5:]) for metric in metrics])
        )
    return DeviceSummaries(devices=metric_rows[0][0] if metric_rows else 0, rows=rows, first=first)


def _newest(conn: Connection, since: datetime | None) -> datetime | None:
    """When the newest reading was stored, by a tick that has absorbed what statements logged until `since`."""
    # A minute may have millions of readings; the last statement seldom stored none.
    for begin in dict.fromkeys((since, None)):
        newest: datetime | None
        (newest,) = _run(conn, "newest", since=begin).fetchone() or (None,)
        if newest is not None:
            break
    return newest


def row_count(conn: Connection) -> int:
    """Exactly how many readings there are; costs what came since the last tick. Any role that reads may ask."""
    with conn.transaction(), _fixed_plan(conn):
        count: int | None = _value(conn, query("row_count"))
    if count is None:
        count = _value(conn, "SELECT count(*) FROM metrics")
    return count


@contextmanager
def _tick(conn: Connection) -> Iterator[None]:
    """A transaction that sees one state of the readings, while no other tick runs and no TRUNCATE begins."""
    if conn.info.transaction_status != TransactionStatus.IDLE:
        raise ValueError("a tick needs a connection without an open transaction")
    with conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        # Before the first query, which takes the snapshot: it has to contain what the last tick wrote.
        conn.execute("LOCK TABLE summary_state IN EXCLUSIVE MODE")
        conn.execute("LOCK TABLE metrics IN ACCESS SHARE MODE")
        _begin(conn)
        yield


def _begin(conn: Connection) -> None:
    # Ticks leave the other cores to the sink, and are too short for compiled plans.
    conn.execute("SET LOCAL max_parallel_workers_per_gather = 0")
    conn.execute("SET LOCAL jit = off")
    conn.execute("SET LOCAL work_mem = '64MB'")


def known(conn: Connection) -> bool:
    """Whether the summaries are of the readings that there are, so that changes can be added to them and taken off."""
    return bool(_value(conn, "SELECT source IS NOT DISTINCT FROM metrics_source() FROM summary_state"))


def take_off(conn: Connection, partition: str, low: datetime | None, high: datetime) -> tuple[int, int]:
    """Take a partition's readings off, in a transaction that holds `summary_state`; bounds of slots are bounds of it.

    Readings that came or went since the last tick are left to the next one, which has to find nothing of them in
    `summary_changes`: whoever detaches the partition deletes that.

    Returns:
        How many readings that were by their slots, and by the minutes in which they were stored: something is wrong when they differ.
    """
    _begin(conn)
    conn.execute(query("absorb_begin"))
    (pending,) = _row(conn, "SELECT pending FROM summary_state")
    if pending:
        folded = _fold(conn, _gather(conn), fresh=False)
        conn.execute("UPDATE summary_state SET pending = 0, folded = greatest(%s, 1)", [folded])
    # How many slots that are, the planner seldom knows.
    conn.execute("SET LOCAL enable_nestloop = off")
    (rows,) = _run(conn, "retire_slots", low=low, high=high).fetchone() or (0,)
    _run(conn, "mend_device_metric_totals")
    conn.execute("SET LOCAL enable_nestloop = on")
    (stored,) = _run(conn, "retire_minutes", partition=partition).fetchone() or (0,)
    conn.execute("UPDATE summary_state SET rows = rows - %s", [rows])
    return rows, stored


def add(conn: Connection, table: str) -> int:
    """Add the readings of a table that becomes a partition, in a transaction that holds `summary_state`; how many are that?

    Those whose keys changed since the last tick are left to the next one, which counts what stands under them by then.
    """
    _begin(conn)
    conn.execute(query("absorb_begin"))
    unlogged = sql.SQL(query("unlogged_readings")).format(table=sql.Identifier(table))
    _absorb_table(conn, sql.SQL("({}) AS readings").format(unlogged))
    _absorb_changes(conn)
    _run(conn, "merge_ingestion_minutes")
    (rows,) = _row(conn, "SELECT coalesce(sum(rows), 0)::bigint FROM summary_minutes")
    conn.execute("UPDATE summary_state SET rows = rows + %s", [rows])
    return int(rows)


def note_pending(conn: Connection, table: str, low: datetime, high: datetime | None) -> None:
    """Note in `split_changes` what the summaries do not know yet of a partition, in a transaction that holds `summary_state` and it."""
    with _fixed_plan(conn):
        statement = sql.SQL(query("split_pending")).format(table=sql.Identifier(table))
        conn.execute(statement, {"low": low, "high": high}, prepare=False)


def _absorb_table(conn: Connection, readings: sql.Composable) -> None:
    conn.execute(sql.SQL(query("absorb_table")).format(readings=readings))


def _absorb(conn: Connection) -> int:
    conn.execute(query("absorb_begin"))
    if known(conn):
        spans = conn.execute(query("absorb_spans")).fetchall()
        (folded,) = _row(conn, "SELECT folded FROM summary_state")
        mask = _mask(folded)
        entries = 0
        with _fixed_plan(conn):
            for low, high in spans:
                (packed,) = _run(conn, "absorb_inserted", low=low, high=high, mask=mask).fetchone() or (0,)
                entries += packed
            _run(conn, "absorb_changed")
            _run(conn, "absorb_removed")
        conn.execute("UPDATE summary_state SET pending = pending + %s", [entries])
    else:
        log.warning("counting all readings again: the table was truncated, rewritten or restored since the last tick")
        for table in _TABLES:
            conn.execute(f"DELETE FROM {table}")  # noqa: S608  # a constant
        conn.execute("UPDATE summary_state SET rows = 0, pending = 0, folded = 0, settled_before = DEFAULT")
        _absorb_table(conn, sql.SQL("metrics"))
    _absorb_changes(conn)
    _run(conn, "merge_ingestion_minutes")
    rows: int = _value(conn, query("absorb_end"))
    return rows


def _absorb_changes(conn: Connection) -> None:
    """Bring what is in `summary_delta` into the summaries, and what was put by when there is much of it."""
    changes, removed = _row(conn, "SELECT count(*), coalesce(bool_or(removed), false) FROM summary_delta")
    pending, folded = _row(conn, "SELECT pending, folded FROM summary_state")
    if changes:
        # Its size decides how the merges find their rows.
        conn.execute("ANALYZE summary_delta")
        _run(conn, "absorb_minutes")
    most = min(max(FOLD_FACTOR * folded, FEWEST_PENDING), MOST_PENDING)
    if not changes and pending <= most:
        return
    gathered = _gather(conn) if pending else 0
    if removed and pending:
        # What goes may have come with what was put by, so this is folded in before.
        _fold(conn, gathered, fresh=False)
        _fold(conn, changes, fresh=True)
    elif changes:
        folded = _fold(conn, gathered + changes, fresh=True)
    elif gathered <= most * MOST_KEPT:
        # Slots cost ten times as much as entries, so they wait until the hours are others.
        _run(conn, "pack_pending", mask=_mask(gathered))
        conn.execute("UPDATE summary_state SET pending = %s", [gathered])
        return
    else:
        folded = _fold(conn, gathered, fresh=False)
    conn.execute("UPDATE summary_state SET pending = 0, folded = greatest(%s, 1)", [folded])
    _settle(conn)


def _mask(entries: int) -> int:
    """What of a device's hash says in which row its entries are, so that a row has about `PACK_ENTRIES`."""
    return int((1 << (entries // PACK_ENTRIES).bit_length()) - 1)


def _gather(conn: Connection) -> int:
    """Take what was put by out of `device_deltas`, those of the same device, metric and slot as one; how many are left?"""
    entries = conn.execute(query("absorb_pending")).rowcount
    conn.execute("ANALYZE summary_pending")
    conn.execute("DELETE FROM device_deltas")
    return entries


def _fold(conn: Connection, entries: int, *, fresh: bool) -> int:
    """Bring what was gathered into the slots and the totals; how many slots that changed.

    Args:
        conn: within a tick.
        entries: how many there are.
        fresh: those of this tick (`summary_delta`), too.
    """
    changed: int
    if fresh:
        if entries > BULK_ENTRIES:
            conn.execute("SET LOCAL enable_nestloop = off")
        low, high = _run(conn, "absorb_hours").fetchone() or (None, None)
        (changed,) = _run(conn, "merge_device_slots", low=low, high=high).fetchone() or (0,)
        conn.execute("SET LOCAL enable_nestloop = on")
        _run(conn, "mend_device_slots")
    else:
        changed = _run(conn, "add_device_slots").rowcount
    _run(conn, "merge_device_metric_totals", fresh=fresh)
    _run(conn, "mend_device_metric_totals")
    conn.execute("DELETE FROM summary_pending")
    return changed


def _settle(conn: Connection) -> None:
    """Bring the slots that are over by now into the totals."""
    before, settled_before = _row(
        conn,
        "SELECT date_bin('1 hour', now() - %s::interval, '2000-01-01 00:00:00+00'), settled_before FROM summary_state",
        SETTLED_AFTER,
    )
    if before > settled_before:
        _run(conn, "settle_slots", before=before)
        conn.execute("UPDATE summary_state SET settled_before = %s", [before])


@contextmanager
def _fixed_plan(conn: Connection) -> Iterator[None]:
    """Find readings by the index on created_at, and join them by hash.

    The logs, and the readings stored since the last analyze, are more than the planner knows of: as it sees fit, joins cost
    the square of the log, and a new table is read whole.
    """
    for way in _OTHER_WAYS:
        conn.execute(f"SET LOCAL {way} = off")
    yield
    for way in _OTHER_WAYS:
        conn.execute(f"SET LOCAL {way} = on")


def _run(conn: Connection, name: str, **parameters: Any) -> psycopg.Cursor[tuple[Any, ...]]:
    # Never prepared: a plan for any span would not be the plan for this one.
    return conn.execute(query(name), parameters, prepare=False)


def _value(conn: Connection, statement: str) -> Any:
    row = conn.execute(statement).fetchone()
    return row[0] if row else None


def _row(conn: Connection, statement: str, *values: Any) -> tuple[Any, ...]:
    """The one row that there is."""
    row = conn.execute(statement, values).fetchone()
    if row is None:
        raise ServiceError(
            "summaries: the table summary_state is empty: run `metrics-pipeline migrate up` on a new database"
        )
    return row


def _refresh_index(conn: Connection) -> None:
    """Page ranges that the index does not know yet are read whole by every tick until it does."""
    if _value(conn, "SELECT refresh_created_at_index()") is None:
        log.debug("left the index on created_at to the vacuum that is at work")


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except psycopg.errors.UndefinedTable as error:
        raise ServiceError(f"summaries: {one_line(error)}: run `metrics-pipeline migrate up`") from error
    except psycopg.Error as error:
        raise ServiceError(f"summaries: {one_line(error)}: look at the PostgreSQL log, then try again") from error
