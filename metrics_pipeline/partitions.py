"""The partitions of the table of the readings: by time, and there before they are needed.

`metrics_before` takes what lies before the first partition, `metrics_after` what lies behind the last one; the partitions in between are cut
off `metrics_after`. So a reading of any time has its place, and no partition has to be proved against a default one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import psycopg
from psycopg import sql

from metrics_pipeline import postgres, summaries
from metrics_pipeline.errors import BusyError, ServiceError
from metrics_pipeline.settings import PartitionWidth, Settings

AHEAD: Final[dict[PartitionWidth, timedelta]] = {
    "minute": timedelta(minutes=5),
    "hour": timedelta(hours=24),
    "day": timedelta(days=4),
    "month": timedelta(days=40),
}
"""How far ahead partitions are made: long enough for a night without Dagster."""
GRACE: Final[dict[PartitionWidth, timedelta]] = {
    "minute": timedelta(seconds=30),
    "hour": timedelta(minutes=30),
    "day": timedelta(hours=1),
    "month": timedelta(hours=1),
}
"""How long after its end a partition is waited with: what comes later is late."""
LOCK_MS = 500
"""How long readers and writers of the table may have to wait behind a statement that waits for them."""
STILL_SECONDS: Final = 5
"""How long a vacuum is waited for, which is ended meanwhile unless it has to be."""
PATIENCE_SECONDS = 30.0
"""How long somebody's long transaction is waited for, half a second at a time."""
FIRST: Final = "metrics_before"
LAST: Final = "metrics_after"
RESTORED: Final = "metrics_restored"
"""Where readings stand that are being restored."""
FEW_BYTES: Final = 64 * 2**20
"""So large may `metrics_before` be for a look at all of it while the table is locked."""
RESTORE_TRIES: Final = 5

Result = TypeVar("Result")

_NAMES: Final[dict[PartitionWidth, str]] = {
    "minute": "metrics_p%Y%m%d%H%M",
    "hour": "metrics_p%Y%m%d%H",
    "day": "metrics_p%Y%m%d",
    "month": "metrics_p%Y%m",
}
_SIZES: Final = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1), "day": timedelta(days=1)}
_NAMED: Final = re.compile(r"metrics_p([0-9]+)(?![^.])")
_FORMS: Final = {12: "%Y%m%d%H%M", 10: "%Y%m%d%H", 8: "%Y%m%d", 6: "%Y%m"}
"""By the number of digits."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition as it is.

    Attributes:
        name: of its table.
        low: least published_at; None: there is no bound.
        high: what every published_at is less than; None: there is no bound.
        bytes: with indexes.
        rows: about; 0 before the first analyze.
    """

    name: str
    low: datetime | None
    high: datetime | None
    bytes: int
    rows: int

    def document(self) -> dict[str, Any]:
        """The partition as one JSON object."""
        bounds = {"low": self.low, "high": self.high}
        return {**asdict(self), **{name: bound.isoformat() if bound else None for name, bound in bounds.items()}}


def listed(connection: postgres.Connection) -> list[Partition]:
    """The partitions there are, in order of time. Any role may ask."""
    return [Partition(*row) for row in connection.execute(postgres.query("partitions"))]


def every(settings: Settings) -> list[Partition]:
    """All partitions, in order of time.

    Raises:
        ServiceError: PostgreSQL is not reachable, or the schema is not there.
    """
    with postgres.connect(settings, "metrics_reader", autocommit=True) as connection, errors():
        return listed(connection)


def closed(settings: Settings, now: datetime | None = None) -> list[Partition]:
    """The partitions that get no more readings, unless these are late, in order of time; `metrics_before` is among them.

    Raises:
        ServiceError: PostgreSQL is not reachable, or the schema is not there.
    """
    edge = (now or datetime.now(UTC)) - GRACE[settings.metrics_partition]
    return [partition for partition in every(settings) if partition.high is not None and partition.high <= edge]


def restore(
    settings: Settings, name: str, low: datetime, high: datetime, fill: Callable[[postgres.Connection, str], None]
) -> None:
    """Bring readings back into the table: as a partition where there is none at that time, otherwise into those that are there.

    Args:
        settings: which database.
        name: of the partition to be made.
        low: least published_at.
        high: what every published_at is less than.
        fill: copies the readings, with created_at, into the table that it is told.

    Raises:
        ServiceError: PostgreSQL is not reachable, a reading is of another time, or its key is there with another value.
    """
    with (
        postgres.connect(settings, "metrics_owner", autocommit=True) as connection,
        errors(),
        alone(connection),
        connection.transaction(),
    ):
        connection.execute(sql.SQL("CREATE TABLE {} (LIKE metrics INCLUDING ALL)").format(sql.Identifier(RESTORED)))
        fill(connection, RESTORED)
        _prove(connection, low, high)
        connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(RESTORED)))
        for _ in range(RESTORE_TRIES):
            places = _bring_back(connection, name, low, high)
            if places:
                break
        else:
            raise ServiceError("readings of the time that is restored keep coming: try again")
        connection.execute(
            "INSERT INTO restored_partitions (partition) SELECT unnest(%s::text[]) "
            "ON CONFLICT (partition) DO UPDATE SET restored_at = excluded.restored_at",
            [places],
        )


def _prove(connection: postgres.Connection, low: datetime, high: datetime) -> None:
    """See that all readings to be restored are of their time; nobody has to look at them again when they are attached."""
    check = sql.SQL("ALTER TABLE {} ADD CONSTRAINT metrics_bound CHECK (published_at >= {} AND published_at < {})")
    try:
        connection.execute(check.format(sql.Identifier(RESTORED), sql.Literal(low), sql.Literal(high)))
    except psycopg.errors.CheckViolation as error:
        raise ServiceError(
            f"partitions: not all readings to be restored are from {low} to {high}: give the bounds that they have"
        ) from error


def _bring_back(connection: postgres.Connection, name: str, low: datetime, high: datetime) -> list[str]:
    """Make a partition of the restored readings, or add them to those that are there; where they are now.

    Nowhere, when readings came to their place meanwhile: then it has to be tried again.
    """
    first, *others = listed(connection)
    taken = connection.execute("SELECT to_regclass(quote_ident(%s)) IS NOT NULL", [name]).fetchone() == (True,)
    (size,) = connection.execute("SELECT pg_relation_size(%s::text::regclass)", [FIRST]).fetchone() or (0,)
    if first.high is None or high > first.high or taken or size > FEW_BYTES:
        _merge(connection)
        return [
            one.name for one in (first, *others) if (not one.low or one.low < high) and (not one.high or low < one.high)
        ]
    placed = False
    with connection.transaction():
        placed = _place(connection, name, low, high, first.high)
        if not placed:
            raise psycopg.Rollback
    return [name] if placed else []


def _place(connection: postgres.Connection, name: str, low: datetime, high: datetime, end: datetime) -> bool:
    """Make a partition of the restored readings out of the time of `metrics_before`, which ends at `end`.

    False when something came in between: then all of it has to be undone.
    """
    connection.execute("LOCK TABLE summary_state IN EXCLUSIVE MODE")
    known = summaries.known(connection)
    _refuse_others(connection, FIRST)
    same = sql.SQL("{} AS r JOIN {} AS m USING (device_id, published_at, metric_name)").format(
        sql.Identifier(RESTORED), sql.Identifier(FIRST)
    )
    # A reading that is there already stays as it is.
    connection.execute(
        sql.SQL("DELETE FROM {} WHERE ctid IN (SELECT r.ctid FROM {})").format(sql.Identifier(RESTORED), same)
    )
    if known:
        summaries.add(connection, RESTORED)
    pieces = [(RESTORED, low, high)]
    if high < end:
        gap = f"metrics_gap_{high.astimezone(UTC):%Y%m%d%H%M%S}"
        pieces.append((gap, high, end))
        connection.execute(sql.SQL("CREATE TABLE {} (LIKE metrics INCLUDING ALL)").format(sql.Identifier(gap)))
    connection.execute("LOCK TABLE metrics IN ACCESS SHARE MODE")
    still(connection, FIRST)
    take(connection, FIRST)
    if known and not summaries.known(connection):
        return False
    # The few readings of this partition are looked up one by one among those restored.
    connection.execute("SET LOCAL enable_hashjoin = off")
    connection.execute("SET LOCAL enable_mergejoin = off")
    if connection.execute(sql.SQL("SELECT EXISTS (SELECT FROM {})").format(same)).fetchone() == (True,):
        return False
    connection.execute(sql.SQL("ALTER TABLE metrics DETACH PARTITION {}").format(sql.Identifier(FIRST)))
    for table, since, until in pieces:
        _move(connection, FIRST, table, since, until)
        attach(connection, table, sql.Literal(since), sql.Literal(until))
    attach(connection, FIRST, sql.SQL("MINVALUE"), sql.Literal(low))
    connection.execute(sql.SQL("ALTER TABLE {} DROP CONSTRAINT metrics_bound").format(sql.Identifier(RESTORED)))
    rename = sql.SQL("ALTER TABLE {} RENAME TO {}")
    connection.execute(rename.format(sql.Identifier(RESTORED), sql.Identifier(name)))
    if known:
        connection.execute("UPDATE summary_state SET source = metrics_source()")
    return True


def _merge(connection: postgres.Connection) -> None:
    """Add the restored readings to the partitions that are there, one by one: the triggers tell the summaries."""
    connection.execute(
        sql.SQL(
            "INSERT INTO metrics SELECT * FROM {} ORDER BY device_id, published_at, metric_name ON CONFLICT DO NOTHING"
        ).format(sql.Identifier(RESTORED))
    )
    _refuse_others(connection, "metrics")
    connection.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier(RESTORED)))


def _refuse_others(connection: postgres.Connection, table: str) -> None:
    found = connection.execute(
        sql.SQL(postgres.query("restore_conflict")).format(
            restored=sql.Identifier(RESTORED), table=sql.Identifier(table)
        )
    ).fetchone()
    if found:
        raise ServiceError(
            f"partitions: nothing was restored: the table has another value or other tags for device {found[0]}, "
            f"{found[1].isoformat()}, metric {found[2]}: delete the readings that are to be replaced, then try again"
        )


def bound_before(width: PartitionWidth, at: datetime) -> datetime:
    """The last bound between partitions up to an instant, in UTC."""
    at = at.astimezone(UTC)
    if width == "month":
        return at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    size = _SIZES[width]
    zero = datetime(2000, 1, 1, tzinfo=UTC)
    return zero + (at - zero) // size * size


def bound_after(width: PartitionWidth, at: datetime) -> datetime:
    """The first bound between partitions after an instant, in UTC."""
    before = bound_before(width, at)
    return (before + timedelta(days=31)).replace(day=1) if width == "month" else before + _SIZES[width]


def low_of(name: str) -> datetime | None:
    """What the name of a partition, or of its archive, says of when it begins, in UTC; None when it says nothing."""
    found = _NAMED.match(name)
    if not found or len(found[1]) not in _FORMS:
        return None
    try:
        return datetime.strptime(f"{found[1]}Z", f"{_FORMS[len(found[1])]}%z")
    except ValueError:
        return None


def due(settings: Settings, last: datetime, now: datetime) -> list[tuple[str, datetime, datetime]]:
    """Name and bounds of the partitions to be made when the last one ends at `last`, in order.

    A partition after a change of width may be shorter than the others, since it begins where the last one ends.
    """
    width = settings.metrics_partition
    wanted: list[tuple[str, datetime, datetime]] = []
    while last < now + AHEAD[width]:
        high = bound_after(width, last)
        wanted.append((last.astimezone(UTC).strftime(_NAMES[width]), last, high))
        last = high
    return wanted


def missing(settings: Settings, now: datetime | None = None) -> list[str]:
    """What is wrong with the partitions: half of the time ahead is not there, or readings lie behind the last one.

    Raises:
        ServiceError: PostgreSQL is not reachable, or the schema is not there.
    """
    now = now or datetime.now(UTC)
    with postgres.connect(settings, "metrics_reader", autocommit=True) as connection, errors():
        partitions = listed(connection)
        statement = sql.SQL("SELECT EXISTS (SELECT FROM {} WHERE published_at < %s)").format(sql.Identifier(LAST))
        (waiting,) = connection.execute(statement, [now]).fetchone() or (False,)
    differences = []
    if not partitions or partitions[-1].low is None:
        return ["the table metrics has no partitions: run `metrics-pipeline migrate up`"]
    if partitions[-1].low < now + AHEAD[settings.metrics_partition] / 2:
        differences.append(
            f"the last partition ends at {partitions[-1].low:%Y-%m-%d %H:%M} UTC: run the job `partitions`"
        )
    if waiting:
        differences.append(f"readings of the present are stored in {LAST}, which is for those of the future")
    return differences


def make(
    settings: Settings, now: datetime | None = None, *, report: Callable[[str], None] = lambda _name: None
) -> list[str]:
    """Make the partitions that the next readings will need, and return their names; those that are there stay as they are.

    Nobody waits for more than half a second: when the table is in use by somebody for longer, it is tried again.

    Args:
        settings: which width.
        now: the time; partitions are made ahead of it.
        report: told each name.

    Raises:
        ServiceError: PostgreSQL is not reachable, the schema is not there, or somebody kept the table for too long.
    """
    now = now or datetime.now(UTC)
    made: list[str] = []
    with postgres.connect(settings, "metrics_owner", autocommit=True) as connection, errors():
        last = _last(connection)
        wanted = due(settings, last, now)
        if not wanted:
            return []
        made = patiently(connection, lambda: _cut(connection, wanted))
    for name in made:
        report(name)
    return made


def patiently(connection: postgres.Connection, change: Callable[[], Result]) -> Result:
    """Do something that takes locks, in a transaction: nobody waits behind it for more than half a second, then it is tried again.

    Raises:
        psycopg.errors.LockNotAvailable: somebody kept what it needs for as long as `PATIENCE_SECONDS`.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with connection.transaction():
                connection.execute(f"SET LOCAL lock_timeout = {LOCK_MS}")
                return change()
        except psycopg.errors.LockNotAvailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOCK_MS / 1000)


def take(connection: postgres.Connection, *partitions: str) -> None:
    """Take the table for a change of the catalogue, with some of its partitions, within a transaction that has done all else.

    Raises:
        psycopg.errors.LockNotAvailable: as `patiently` does.
    """
    tables = sql.SQL(", ").join(sql.SQL("ONLY {}").format(sql.Identifier(name)) for name in ("metrics", *partitions))

    def lock() -> None:
        # All of them together within that time, not each.
        connection.execute(f"SET LOCAL statement_timeout = {LOCK_MS}")
        try:
            connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(tables))
        except psycopg.errors.QueryCanceled as error:
            raise psycopg.errors.LockNotAvailable from error
        connection.execute("SET LOCAL statement_timeout = '5s'")

    patiently(connection, lock)


def still(connection: postgres.Connection, *partitions: str) -> None:
    """Keep vacuum off partitions, within a transaction: who waits a second for an autovacuum ends it, and nobody waits behind this."""
    tables = sql.SQL(", ").join(sql.SQL("ONLY {}").format(sql.Identifier(name)) for name in partitions)
    connection.execute(f"SET LOCAL lock_timeout = '{STILL_SECONDS}s'")
    connection.execute(sql.SQL("LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE").format(tables))
    connection.execute(f"SET LOCAL lock_timeout = {LOCK_MS}")


@contextmanager
def alone(connection: postgres.Connection) -> Iterator[None]:
    """One at a time drops or restores partitions; this ends with the connection at the latest.

    Raises:
        BusyError: somebody else does, and not only for a moment.
    """
    lock = "(hashtext('metrics-pipeline retention'), hashtext(current_schema()))"
    deadline = time.monotonic() + STILL_SECONDS
    # The session of a process that died may be there for a moment yet.
    while connection.execute(f"SELECT pg_try_advisory_lock{lock}").fetchone() != (True,):
        if time.monotonic() > deadline:
            raise BusyError("partitions are being dropped or restored at this moment: try again when that is done")
        time.sleep(0.05)
    try:
        yield
    finally:
        with suppress(psycopg.Error):
            connection.execute(f"SELECT pg_advisory_unlock{lock}")


def _last(connection: postgres.Connection) -> datetime:
    partitions = listed(connection)
    if not partitions or partitions[-1].name != LAST or partitions[-1].low is None:
        raise ServiceError("the table metrics has no partitions: run `metrics-pipeline migrate up`")
    return partitions[-1].low


def _cut(connection: postgres.Connection, wanted: list[tuple[str, datetime, datetime]]) -> list[str]:
    """Cut partitions off the last one, in a transaction that holds the table only for changes of the catalogue."""
    connection.execute("SET LOCAL statement_timeout = '5min'")
    # As a tick does, in this order.
    connection.execute("LOCK TABLE summary_state IN EXCLUSIVE MODE")
    wanted = [one for one in wanted if one[1] >= _last(connection)]
    for name, _, _ in wanted:
        connection.execute(sql.SQL("CREATE TABLE {} (LIKE metrics INCLUDING ALL)").format(sql.Identifier(name)))
    if not wanted:
        return []
    connection.execute("LOCK TABLE metrics IN ACCESS EXCLUSIVE MODE")
    known = summaries.known(connection)
    connection.execute(f"ALTER TABLE metrics DETACH PARTITION {LAST}")
    for name, low, high in wanted:
        # Readings that were stored ahead of their time.
        _move(connection, LAST, name, low, high)
        attach(connection, name, sql.Literal(low), sql.Literal(high))
    attach(connection, LAST, sql.Literal(wanted[-1][2]), sql.SQL("MAXVALUE"))
    if known:
        connection.execute("UPDATE summary_state SET source = metrics_source()")
    return [name for name, _, _ in wanted]


def _move(connection: postgres.Connection, source: str, target: str, low: datetime, high: datetime) -> None:
    """Move readings between two tables, none of which is a partition now: they get another version, which the summaries have to know."""
    places: dict[str, sql.Composable] = {"source": sql.Identifier(source), "target": sql.Identifier(target)}
    places |= {"low": sql.Literal(low), "high": sql.Literal(high)}
    connection.execute(
        sql.SQL(
            "INSERT INTO summary_changes SELECT device_id, published_at, metric_name, value, created_at, xmin "
            "FROM {source} WHERE published_at >= {low} AND published_at < {high}"
        ).format(**places)
    )
    connection.execute(
        sql.SQL(
            "WITH gone AS (DELETE FROM {source} WHERE published_at >= {low} AND published_at < {high} RETURNING *) "
            "INSERT INTO {target} SELECT * FROM gone"
        ).format(**places)
    )


def attach(connection: postgres.Connection, name: str, low: sql.Composable, high: sql.Composable) -> None:
    """Make a table a partition; nothing of it has to be looked at when a check proves its bounds."""
    statement = sql.SQL("ALTER TABLE metrics ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})")
    connection.execute(statement.format(sql.Identifier(name), low, high))


@contextmanager
def errors() -> Iterator[None]:
    """Errors of PostgreSQL as ours, one line each."""
    try:
        yield
    except psycopg.errors.LockNotAvailable as error:
        raise ServiceError(
            "partitions: somebody has kept the table metrics for too long: see `metrics-pipeline sql` on pg_stat_activity, then try again"
        ) from error
    except psycopg.errors.UndefinedTable as error:
        raise ServiceError(f"partitions: {postgres.one_line(error)}: run `metrics-pipeline migrate up`") from error
    except psycopg.Error as error:
        raise ServiceError(
            f"partitions: {postgres.one_line(error)}: look at the PostgreSQL log, then try again"
        ) from error
