"""Retention: partitions whose readings are old, or more than there is room for, are dropped whole.

A partition leaves the table in one transaction, together with what the summaries have of it; then it is a table by itself, which is noted
in `detached_partitions`, and is dropped. How the summaries stay exact is told in `sql/migrations/20261127000020_retention.sql`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg
from psycopg import sql

from metrics_pipeline import partitions, postgres, summaries
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.partitions import FIRST, GRACE, Partition
from metrics_pipeline.settings import PartitionWidth, Settings

log = logging.getLogger(__name__)

RESTORED_DAYS: Final = 7
"""So long retention leaves a partition alone that old readings were brought back into."""
SLACK: Final[dict[PartitionWidth, timedelta]] = {
    "minute": timedelta(minutes=2),
    "hour": timedelta(minutes=30),
    "day": timedelta(hours=1),
    "month": timedelta(hours=1),
}
"""How much later than it could, retention may do its work."""
SLACK_OF_SIZE: Final = 1.1
"""How much larger the table may be meanwhile."""
TRIES: Final = 4
"""How often a partition is tried to which readings come while it is kept."""
MOST_LEFT: Final = 5_000
"""So many readings that came while a partition was kept may stay in the table when it goes."""
MARK: Final = "Detached from metrics by retention: number "

_TRIGGER: Final = "metrics_9_note_late_change"


@dataclass(frozen=True, slots=True)
class Dropped:
    """What went with a partition.

    Attributes:
        rows: readings.
        bytes: with indexes.
    """

    rows: int
    bytes: int


class _AgainError(Exception):
    """Something came in between; nothing was changed."""


class _MiscountedError(_AgainError):
    """The count of the partition has to be made again."""


def expired(settings: Settings, now: datetime | None = None) -> list[Partition]:
    """The partitions that METRICS_RETENTION and METRICS_RETENTION_SIZE have no room for, oldest first; only closed ones.

    Raises:
        ServiceError: PostgreSQL is not reachable, or the schema is not there.
    """
    return _expired(settings, now or datetime.now(UTC), settings.retention_bytes)


def _expired(settings: Settings, now: datetime, room: float | None) -> list[Partition]:
    edge = None if settings.retention_age is None else now - settings.retention_age
    if edge is None and room is None:
        return []
    with postgres.connect(settings, "metrics_reader", autocommit=True) as connection, partitions.errors():
        found = partitions.listed(connection)
        held = {
            name
            for name, at in connection.execute("SELECT partition, restored_at FROM restored_partitions")
            if at > now - timedelta(days=RESTORED_DAYS)
        }
        size = sum(partition.bytes for partition in found)
        gone: list[Partition] = []
        in_a_row = True
        for partition in found:
            if partition.high is None or partition.high > now - GRACE[settings.metrics_partition]:
                break
            if not (edge is not None and partition.high <= edge) and not (room is not None and size > room):
                break
            if partition.name in held:
                in_a_row = False
            # An empty one goes only where its time becomes part of `metrics_before`.
            elif (in_a_row and partition.name != FIRST) or not _empty(connection, partition.name):
                gone.append(partition)
                size -= partition.bytes
    return gone


def _empty(connection: postgres.Connection, name: str) -> bool:
    statement = sql.SQL("SELECT NOT EXISTS (SELECT FROM {})").format(sql.Identifier(name))
    return connection.execute(statement).fetchone() == (True,)


def behind(settings: Settings, now: datetime | None = None) -> list[str]:
    """What retention should have done by now, one line each.

    Raises:
        ServiceError: PostgreSQL is not reachable, or the schema is not there.
    """
    now = now or datetime.now(UTC)
    slack = SLACK[settings.metrics_partition]
    room = settings.retention_bytes
    late = _expired(settings, now - slack, None if room is None else room * SLACK_OF_SIZE)
    differences = []
    if late:
        differences.append(
            f"{len(late)} partitions should be gone, {late[0].name} first: run the job `partitions`, and see why it fails"
        )
    with postgres.connect(settings, "metrics_reader", autocommit=True) as connection, partitions.errors():
        for number, name, at, there, ours in _detached(connection):
            if there and not ours:
                differences.append(
                    f"metrics_detached_{number} is not the table that {name} was detached as, and is left alone: rename it"
                )
            elif at < now - slack:
                differences.append(f"metrics_detached_{number}, which {name} was detached as, could not be dropped yet")
    return differences


def run(
    settings: Settings,
    now: datetime | None = None,
    *,
    keep: Callable[[Partition], None] | None = None,
    report: Callable[[Partition, Dropped], None] = lambda _partition, _dropped: None,
) -> list[tuple[Partition, Dropped]]:
    """Drop what has expired, oldest first, and what an interrupted run left detached.

    Args:
        settings: how long and how much is kept.
        now: the time.
        keep: as for `drop`.
        report: told each partition when it is gone.

    Raises:
        ServiceError: as `drop` does; what was dropped before stays dropped.
        BusyError: partitions are being dropped or restored already.
    """
    with postgres.connect(settings, "metrics_owner", autocommit=True) as connection, partitions.errors():
        if _detached(connection):
            with partitions.alone(connection):
                _drop_detached(connection)
    gone = []
    for partition in expired(settings, now):
        dropped = drop(settings, partition, keep)
        report(partition, dropped)
        gone.append((partition, dropped))
    return gone


def drop(settings: Settings, partition: Partition, keep: Callable[[Partition], None] | None = None) -> Dropped:
    """Drop a partition with its readings, and take them off the summaries.

    Nobody who stores or reads waits for as long as a second. A reading of that time that comes later is stored in `metrics_before`.

    Args:
        settings: which database.
        partition: which; one that has no end cannot go.
        keep: called before anything is dropped, while the partition can still be read under its name, by sessions of the callee's own.
            When it raises, nothing is dropped. Readings that came to the partition after it began, or got other values, stay in the
            table, in `metrics_before`; when others went, it is called again.

    Raises:
        ServiceError: PostgreSQL is not reachable, the partition is not there any more, or somebody kept the table for too long.
        BusyError: partitions are being dropped or restored already.
    """
    if partition.high is None:
        raise ServiceError(f"partitions: {partition.name} has no end: only what has one can be dropped")
    with (
        postgres.connect(settings, "metrics_owner", autocommit=True) as connection,
        partitions.errors(),
        partitions.alone(connection),
    ):
        for at in range(TRIES):
            try:
                dropped = _try(settings, connection, partition, partition.high, keep, last=at + 1 == TRIES)
            except _AgainError as again:
                log.info("%s: %s: once more", partition.name, again)
                if isinstance(again, _MiscountedError):
                    _forget(connection, partition.name)
                continue
            _drop_detached(connection)
            return dropped
    raise ServiceError(
        f"partitions: readings keep coming to {partition.name} or going of it while it is put by: it was not dropped, and is tried again"
    )


def _try(
    settings: Settings,
    connection: postgres.Connection,
    partition: Partition,
    high: datetime,
    keep: Callable[[Partition], None] | None,
    *,
    last: bool,
) -> Dropped:
    name = partition.name
    found = partitions.listed(connection)
    at = next((at for at, one in enumerate(found) if one.name == name), None)
    if at is None or (found[at].low, found[at].high) != (partition.low, high):
        raise ServiceError(f"partitions: {name} is not the partition any more that it was: list them again")
    before = found[at - 1].name if at and found[at - 1].name == FIRST else None
    whole = _is_slots(partition.low) and _is_slots(high)
    _watch(connection, name)
    if whole:
        _count(connection, name)
    if before and partition.low:
        _prove(connection, before, partition.low)
    seen = _snapshot(connection, "pg_current_snapshot()")
    if keep:
        keep(partition)
    # So that little is left to do while the table is locked.
    summaries.ingestion_rate(settings)
    with connection.transaction():
        connection.execute("LOCK TABLE summary_state IN EXCLUSIVE MODE")
        connection.execute(f"SET LOCAL lock_timeout = '{partitions.STILL_SECONDS}s'")
        known = summaries.known(connection)
        rows: int
        if whole:
            counted = _snapshot(connection, "(SELECT snapshot FROM summary_state)")
            rows, known = _take_off(connection, partition.low, high, name, known=known, last=last)
        else:
            counted = _snapshot(connection, "pg_current_snapshot()")
            rows = connection.execute(_named("retention_log_rows", name)).rowcount
        size = connection.execute("SELECT pg_total_relation_size(%s::text::regclass)", [name]).fetchone() or (0,)
        place = None if before else "metrics_next"
        if place:
            _do(connection, "CREATE TABLE {} (LIKE metrics INCLUDING ALL)", place)
        number = connection.execute(
            "INSERT INTO detached_partitions (partition, low, high, rows, bytes) VALUES (%s, %s, %s, %s, %s) RETURNING number",
            [name, partition.low, high, rows, size[0]],
        ).fetchone() or (0,)
        # Nobody truncates a partition from here on, which would not be noticed.
        connection.execute("LOCK TABLE metrics IN ACCESS SHARE MODE")
        if known and not summaries.known(connection):
            raise _AgainError("the table was changed")
        touched = [one for one in (name, before) if one]
        partitions.still(connection, *touched)
        partitions.take(connection, *touched)
        left = _left(connection, name, seen, counted) if keep else []
        if whole:
            # What came since the last tick was not counted, and what it replaced is gone already.
            connection.execute(
                "DELETE FROM summary_changes WHERE published_at >= coalesce(%s::timestamptz, '-infinity') AND published_at < %s",
                [partition.low, high],
            )
        _detach(connection, partition, high, number[0], before, place)
        if left:
            _leave(connection, f"metrics_detached_{number[0]}", left)
            rows -= sum(counted_rows for *_, counted_rows in left)
            connection.execute("UPDATE detached_partitions SET rows = %s WHERE number = %s", [rows, number[0]])
        _forget(connection, name, "restored_partitions")
        connection.execute("UPDATE retention_state SET retained_from = greatest(retained_from, %s)", [high])
        if known:
            connection.execute("UPDATE summary_state SET source = metrics_source()")
    return Dropped(rows, size[0])


def _is_slots(bound: datetime | None) -> bool:
    """Whether no slot of the summaries lies on both sides of a bound."""
    return bound is None or bound.timestamp() % 3600 == 0


def _watch(connection: postgres.Connection, name: str) -> None:
    """From now on it is noted what comes to a partition and what goes of it."""

    def make() -> None:
        partitions.still(connection, name)
        _forget(connection, name)
        _do(
            connection,
            f"CREATE TRIGGER {_TRIGGER} AFTER INSERT OR UPDATE OR DELETE ON {{}} "
            "FOR EACH ROW EXECUTE FUNCTION note_late_change()",
            name,
        )
        _do(connection, f"ALTER TABLE {{}} ENABLE ALWAYS TRIGGER {_TRIGGER}", name)

    statement = "SELECT FROM pg_trigger WHERE tgrelid = %s::text::regclass AND tgname = %s"
    if connection.execute(statement, [name, _TRIGGER]).fetchone() is None:
        partitions.patiently(connection, make)


def _count(connection: postgres.Connection, name: str) -> None:
    """Count a partition by minutes of created_at, unless that was done: it is read whole, and nobody waits."""
    same_file, _, _ = _counted(connection, name)
    counted = connection.execute(
        "SELECT EXISTS (SELECT FROM partition_minutes WHERE partition = %s)", [name]
    ).fetchone()
    if same_file and counted == (True,):
        return
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        # What was noted before this snapshot is contained in the count.
        _forget(connection, name)
        connection.execute(_named("retention_count", name))


def _forget(connection: postgres.Connection, name: str, *tables: str) -> None:
    """Forget what was noted of a partition."""
    for table in ("partition_minutes", "late_changes", *tables):
        connection.execute(sql.SQL("DELETE FROM {} WHERE partition = %s").format(sql.Identifier(table)), [name])


def _counted(connection: postgres.Connection, name: str) -> tuple[bool, bool, int]:
    row = connection.execute(postgres.query("retention_counted"), {"partition": name}).fetchone()
    return (bool(row[0]), bool(row[1]), int(row[2])) if row else (True, True, 0)


def _snapshot(connection: postgres.Connection, which: str) -> str:
    (snapshot,) = connection.execute(f"SELECT {which}::text".encode()).fetchone() or (None,)
    return str(snapshot or "1:1:")


def _left(connection: postgres.Connection, name: str, seen: str, counted: str) -> list[tuple[Any, ...]]:
    """The readings that came to a locked partition since a snapshot, or changed: their keys, and how many of each another one shows.

    Raises:
        _AgainError: others went, or there are many.
    """
    values = {"partition": name, "seen": seen, "counted": counted, "most": MOST_LEFT + 1}
    came = connection.execute(postgres.query("retention_came"), values).fetchall()
    if len(came) > MOST_LEFT or any(more < 0 for *_, more, _ in came):
        raise _AgainError("readings went, or many came, while it was put by")
    return [(*key, 1 - since) for *key, _, since in came]


def _leave(connection: postgres.Connection, gone: str, left: list[tuple[Any, ...]]) -> None:
    """Store readings of a table that was detached once more; the summaries are told of each as a new one, by its created_at.

    Raises:
        _AgainError: one of them has gone again.
    """
    move = sql.SQL(postgres.query("retention_move")).format(table=sql.Identifier(gone))
    if connection.execute(move, [[one[column] for one in left] for column in range(3)]).rowcount != len(left):
        raise _AgainError("readings went while it was put by")


def _prove(connection: postgres.Connection, before: str, high: datetime) -> None:
    """See that all readings of the partition before are older, so that nobody has to look when it is given another bound."""
    if _empty(connection, before):
        return

    def note() -> None:
        partitions.still(connection, before)
        _do(connection, "ALTER TABLE {} DROP CONSTRAINT IF EXISTS metrics_bound", before)
        check = "ALTER TABLE {} ADD CONSTRAINT metrics_bound CHECK (published_at < {}) NOT VALID"
        connection.execute(sql.SQL(check).format(sql.Identifier(before), sql.Literal(high)))

    partitions.patiently(connection, note)
    _do(connection, "ALTER TABLE {} VALIDATE CONSTRAINT metrics_bound", before)


def _take_off(
    connection: postgres.Connection, low: datetime | None, high: datetime, name: str, *, known: bool, last: bool
) -> tuple[int, bool]:
    """Take a partition off the summaries; how many readings it has, and whether the summaries are known to be right then."""
    same_file, contained, rows = _counted(connection, name)
    if not known:  # the next tick counts all that is left
        return rows, False
    if not contained:
        raise _AgainError("the summaries are older than its count")
    if same_file:
        with connection.transaction():
            by_slots, by_minutes = summaries.take_off(connection, name, low, high)
            if by_slots != by_minutes:
                raise psycopg.Rollback
        if by_slots == by_minutes:
            return by_slots, True
    if not last:
        raise _MiscountedError("its count is not that of the summaries")
    log.warning("%s: its readings are not those that the summaries have of it: all will be counted again", name)
    connection.execute("UPDATE summary_state SET source = NULL")
    return rows, False


def _detach(
    connection: postgres.Connection,
    partition: Partition,
    high: datetime,
    number: int,
    before: str | None,
    place: str | None,
) -> None:
    name, gone = partition.name, f"metrics_detached_{number}"
    _do(connection, "ALTER TABLE metrics DETACH PARTITION {}", name)
    _do(connection, "ALTER TABLE {} RENAME TO {}", name, gone)
    connection.execute(
        sql.SQL("COMMENT ON TABLE {} IS {}").format(sql.Identifier(gone), sql.Literal(f"{MARK}{number}"))
    )
    low = sql.SQL("MINVALUE") if partition.low is None else sql.Literal(partition.low)
    if before:
        _do(connection, "ALTER TABLE metrics DETACH PARTITION {}", before)
        partitions.attach(connection, before, sql.SQL("MINVALUE"), sql.Literal(high))
        _do(connection, "ALTER TABLE {} DROP CONSTRAINT IF EXISTS metrics_bound", before)
    elif place:
        _do(connection, "ALTER TABLE {} RENAME TO {}", place, name)
        partitions.attach(connection, name, low, sql.Literal(high))
    if name == FIRST:
        # The way back to a table without partitions knows them by name.
        for index in ("pkey", "created_at_idx"):
            _do(connection, "ALTER INDEX IF EXISTS {} RENAME TO {}", f"{name}_{index}", f"{gone}_{index}")
            _do(connection, "ALTER INDEX IF EXISTS {} RENAME TO {}", f"{place}_{index}", f"{name}_{index}")
        _do(connection, "COMMENT ON TABLE {} IS 'Readings before the partitions of metrics.'", name)


def _detached(connection: postgres.Connection) -> list[tuple[int, str, datetime, bool, bool]]:
    return connection.execute(postgres.query("retention_detached"), {"mark": MARK}).fetchall()


def _drop_detached(connection: postgres.Connection) -> None:
    """Drop the tables that were detached; whoever reads one of them by its name keeps it until the next time."""
    for number, name, _, there, ours in _detached(connection):
        if there and not ours:
            log.warning("metrics_detached_%d is not the table that %s was detached as: left alone", number, name)
            continue
        try:
            with connection.transaction():
                connection.execute(f"SET LOCAL lock_timeout = '{partitions.STILL_SECONDS}s'")
                if there:
                    _do(connection, "DROP TABLE {}", f"metrics_detached_{number}")
                connection.execute("UPDATE detached_partitions SET dropped_at = now() WHERE number = %s", [number])
        except psycopg.errors.LockNotAvailable:
            log.warning("metrics_detached_%d is being read: it is dropped the next time", number)


def _named(query: str, table: str) -> sql.Composed:
    return sql.SQL(postgres.query(query)).format(table=sql.Identifier(table), name=sql.Literal(table))


def _do(connection: postgres.Connection, statement: str, *names: str) -> None:
    connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))
