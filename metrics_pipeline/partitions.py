"""The partitions of the table of the readings: by time, and there before they are needed.

`metrics_before` takes what lies before the first partition, `metrics_after` what lies behind the last one; the partitions in between are cut
off `metrics_after`. So a reading of any time has its place, and no partition has to be proved against a default one.

Clocks that are far ahead fill `metrics_after`. A large one is not cut, since all of it would have to be looked at under a lock. It is split:
copied into partitions where its readings lie, with wide ones for the time in between, while it is read and written; they take its place.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

import psycopg
from psycopg import sql

from metrics_pipeline import postgres, summaries
from metrics_pipeline.errors import BusyError, ServiceError
from metrics_pipeline.settings import PartitionWidth, Settings

log = logging.getLogger(__name__)

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
"""So large may a partition be for a look at all of it while the table is locked."""
FEW_ROWS: Final = 10_000
"""So many readings are moved while the table is locked."""
FEW_CHANGES: Final = 2_000
"""So many readings are copied while the table is locked, at first: each costs two look-ups."""
PIECES_AHEAD: Final = 6
"""So many partitions are made where readings come in that are far ahead."""
MOST_PIECES: Final = 24
"""Into more partitions than so many none is split: one is made for a longer time instead."""
SPLIT: Final = "metrics_split"
"""Where a partition's readings are copied to that is being split."""

LAST_BOUND: Final = datetime(9999, 12, 1, tzinfo=UTC)
"""What is later stays in `metrics_after`: the year 10000 has no name."""
SPLIT_TRIES: Final = 3
SPLIT_ROUNDS: Final = 40
"""How often what was changed meanwhile is copied after it."""
RESTORE_TRIES: Final = 5

Result = TypeVar("Result")
Piece: TypeAlias = tuple[str, datetime, datetime | None]
"""Name and bounds of a partition to be made."""

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
_GAP: Final = "metrics_gap_"
_WIDE: Final = "metrics_wide_"
_MOMENT: Final = "%Y%m%d%H%M%S"
_SPLIT_TRIGGER: Final = "metrics_8_note_split_change"
_SPLIT_LAST: Final = "metrics_split_after"
_NAMES_OF_LAST: Final = (
    f"ALTER TABLE {_SPLIT_LAST} RENAME TO {LAST}",
    *(
        f"ALTER INDEX IF EXISTS {_SPLIT_LAST}_{index} RENAME TO {LAST}_{index}"
        for index in ("pkey", "created_at_idx", "published_at_idx")
    ),
    f"COMMENT ON TABLE {LAST} IS 'Readings behind the partitions of metrics: the next partitions are cut off it.'",
)


class _LargeError(Exception):
    """There is too much in a partition to be moved under a lock; nothing was changed."""


class _ChangedError(Exception):
    """What is being split was changed in between; nothing was changed here."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition as it is.

    Attributes:
        name: of its table.
        low: least published_at; None: there is no bound.
        high: what every published_at is less than; None: there is no bound.
        bytes: with indexes.
        rows: about.
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


def due(
    settings: Settings, last: datetime, now: datetime, end: datetime | None = None
) -> list[tuple[str, datetime, datetime]]:
    """Name and bounds of the partitions to be made when the last one ends at `last`, in order; none goes beyond `end`.

    A partition after a change of width may be shorter than the others, since it begins where the last one ends.
    """
    width = settings.metrics_partition
    wanted: list[tuple[str, datetime, datetime]] = []
    while last < now + AHEAD[width] and (end is None or last < end):
        high = bound_after(width, last) if end is None else min(bound_after(width, last), end)
        wanted.append((last.astimezone(UTC).strftime(_NAMES[width]), last, high))
        last = high
    return wanted


def pieces(
    width: PartitionWidth,
    partition: Partition,
    wanted: list[tuple[str, datetime, datetime]],
    dense: list[datetime],
    span: tuple[datetime, datetime] | None,
) -> list[Piece]:
    """Into what a partition is split: name and bounds, in order and without a gap; the last one of `metrics_after` has no end.

    Args:
        width: how much time a partition is for.
        partition: which one is split.
        wanted: what begins at its low bound, as `due` tells.
        dense: begins of the stretches of that width that hold many readings, in order.
        span: where the readings are when no stretch holds many: begin of the first one's stretch, and the last one, outliers left out.
    """
    found: list[Piece] = list(wanted)
    at, end = (wanted[-1][2] if wanted else partition.low), partition.high
    if at is None:
        return []
    rest = [(low, bound_after(width, low)) for low in dense]
    if rest and end is None:
        # Who stores there goes on.
        for _ in range(PIECES_AHEAD):
            if rest[-1][1] < LAST_BOUND:
                rest.append((rest[-1][1], bound_after(width, rest[-1][1])))
    elif not rest and span:
        rest = [(span[0], bound_after(width, span[1]))]
    rest = [(max(low, at), high if end is None else min(high, end)) for low, high in rest]
    rest = [(low, high) for low, high in rest if low < high]
    if len(rest) > MOST_PIECES:
        rest = _joined(rest)
    if len(rest) > MOST_PIECES:
        rest = [(rest[0][0], rest[-1][1])]
    for low, high in rest:
        if at < low:
            found.append((f"{_GAP}{at.astimezone(UTC):{_MOMENT}}", at, low))
        form = _NAMES[width] if bound_after(width, low) >= high else f"{_WIDE}{_MOMENT}"
        found.append((low.astimezone(UTC).strftime(form), low, high))
        at = high
    if end is None:
        found.append((LAST, at, None))
    elif at < end:
        found.append((f"{_GAP}{at.astimezone(UTC):{_MOMENT}}", at, end))
    return found


def _joined(stretches: list[tuple[datetime, datetime]]) -> list[tuple[datetime, datetime]]:
    """Stretches of time of which those that touch are one."""
    joined = stretches[:1]
    for low, high in stretches[1:]:
        if joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined


def missing(settings: Settings, now: datetime | None = None) -> list[str]:
    """What is wrong with the partitions: half of the time ahead is not there, or readings lie behind the last one.

    Raises:
        ServiceError: PostgreSQL is not reachable, or the schema is not there.
    """
    now = now or datetime.now(UTC)
    with postgres.connect(settings, "metrics_reader", autocommit=True) as connection, errors():
        open_ones = _open(listed(connection), now)
        if not open_ones or (end := open_ones[0].low) is None:
            return ["the table metrics has no partitions: run `metrics-pipeline migrate up`"]
        name = open_ones[0].name
        statement = sql.SQL("SELECT EXISTS (SELECT FROM {} WHERE published_at < %s)").format(sql.Identifier(name))
        (waiting,) = connection.execute(statement, [now]).fetchone() or (False,)
    differences = []
    if end < now + AHEAD[settings.metrics_partition] / 2:
        differences.append(f"the last partition ends at {end:%Y-%m-%d %H:%M} UTC: run the job `partitions`")
    if waiting:
        differences.append(f"readings of the present are stored in {name}, which is for those of the future")
    return differences


def make(
    settings: Settings, now: datetime | None = None, *, report: Callable[[str], None] = lambda _name: None
) -> list[str]:
    """Make the partitions that the next readings will need, and return their names; those that are there stay as they are.

    Nobody waits for more than half a second: when the table is in use by somebody for longer, it is tried again. What is to become
    partitions and holds many readings already is copied beforehand, while it is read and written.

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
        _require_last(connection)
        if _watched(connection) or _is_table(connection, SPLIT):
            _give_up_splits(connection)
        for partition in _open(listed(connection), now):
            made += _provide(settings, connection, partition, now)
    for name in made:
        report(name)
    return made


def _open(found: list[Partition], now: datetime) -> list[Partition]:
    """What partitions are cut off, in order of time: what is behind the last one, and what lies before readings that are far ahead."""
    return [
        one
        for one in found
        if one.low and (one.high is None or one.high > now) and one.name.startswith((LAST, _GAP, _WIDE))
    ]


def _provide(settings: Settings, connection: postgres.Connection, partition: Partition, now: datetime) -> list[str]:
    if partition.low is None:
        return []
    wanted = due(settings, partition.low, now, partition.high)
    # One that was made for a longer time stays, however large, until partitions of its time are wanted.
    small = partition.name.startswith(_WIDE) or _bytes(connection, partition.name) <= FEW_BYTES
    if not wanted and small:
        return []
    if small and _few(connection, partition.name, wanted[-1][2]):
        with suppress(_LargeError):
            return patiently(connection, lambda: _cut(settings, connection, partition.name, now))
    return _split(settings, connection, partition.name, now)


def _bytes(connection: postgres.Connection, name: str) -> int:
    (size,) = connection.execute("SELECT pg_relation_size(quote_ident(%s)::regclass)", [name]).fetchone() or (0,)
    return int(size)


def _few(connection: postgres.Connection, name: str, end: datetime) -> bool:
    """Whether a partition is small, and has only few readings before an instant."""
    if _bytes(connection, name) > FEW_BYTES:
        return False
    few = sql.SQL("SELECT count(*) FROM (SELECT FROM {} WHERE published_at < %s LIMIT {})")
    statement = few.format(sql.Identifier(name), sql.Literal(FEW_ROWS + 1))
    (rows,) = connection.execute(statement, [end]).fetchone() or (0,)
    return bool(rows <= FEW_ROWS)


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
def alone(connection: postgres.Connection, what: str = "retention") -> Iterator[None]:
    """One at a time drops or restores partitions, or does something else; this ends with the connection at the latest.

    Raises:
        BusyError: somebody else does, and not only for a moment.
    """
    lock = f"(hashtext('metrics-pipeline {what}'), hashtext(current_schema()))"
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


def _require_last(connection: postgres.Connection) -> None:
    partitions = listed(connection)
    if not partitions or partitions[-1].name != LAST or partitions[-1].low is None:
        raise ServiceError("the table metrics has no partitions: run `metrics-pipeline migrate up`")


def _is_table(connection: postgres.Connection, name: str) -> bool:
    return connection.execute("SELECT to_regclass(quote_ident(%s)) IS NOT NULL", [name]).fetchone() == (True,)


def _wanted(
    settings: Settings, connection: postgres.Connection, name: str, now: datetime
) -> tuple[Partition, list[tuple[str, datetime, datetime]]] | None:
    """A partition as it is now, and what is to be cut off it; None: it is not there any more."""
    for one in listed(connection):
        if one.name == name and one.low:
            return one, due(settings, one.low, now, one.high)
    return None


def _create(connection: postgres.Connection, name: str, low: datetime) -> str:
    """Make a table that is to be a partition; its name, which is another one when that is taken."""
    others = [f"{name}_{number}" for number in range(2, 100)]
    if not name.startswith((_GAP, _WIDE)):
        others.insert(0, f"{low.astimezone(UTC):{_NAMES['minute']}}")
    for free in (name, *others):
        if not _is_table(connection, free):
            connection.execute(sql.SQL("CREATE TABLE {} (LIKE metrics INCLUDING ALL)").format(sql.Identifier(free)))
            return free
    raise ServiceError(f"partitions: there are tables named {name} that are no partitions: rename them")


def _cut(settings: Settings, connection: postgres.Connection, name: str, now: datetime) -> list[str]:
    """Cut partitions off a small one, in a transaction that holds the table for changes of the catalogue and for few readings.

    Raises:
        _LargeError: there is much in it by now.
    """
    connection.execute("SET LOCAL statement_timeout = '5min'")
    # As a tick does, in this order.
    connection.execute("LOCK TABLE summary_state IN EXCLUSIVE MODE")
    found = _wanted(settings, connection, name, now)
    if not found or not found[1]:
        return []
    source, wanted = found
    made = [(_create(connection, one, low), low, high) for one, low, high in wanted]
    end = wanted[-1][2]
    # Nobody truncates a partition from here on, which would not be noticed.
    connection.execute("LOCK TABLE metrics IN ACCESS SHARE MODE")
    still(connection, name)
    take(connection, name)
    if not _few(connection, name, end):
        raise _LargeError
    known = summaries.known(connection)
    connection.execute(sql.SQL("ALTER TABLE metrics DETACH PARTITION {}").format(sql.Identifier(name)))
    for one, low, high in made:
        # Readings that were stored ahead of their time.
        _move(connection, name, one, low, high)
        attach(connection, one, sql.Literal(low), sql.Literal(high))
    if source.high == end:
        connection.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier(name)))
    else:
        attach(connection, name, sql.Literal(end), _end(source.high))
    if known:
        connection.execute("UPDATE summary_state SET source = metrics_source()")
    return [one for one, _, _ in made]


def _end(high: datetime | None) -> sql.Composable:
    return sql.SQL("MAXVALUE") if high is None else sql.Literal(high)


def _split(settings: Settings, connection: postgres.Connection, name: str, now: datetime) -> list[str]:
    """Put partitions in the place of a large one; the names of the new ones, none when somebody else is doing so."""
    try:
        with alone(connection, "split"):
            try:
                for _ in range(SPLIT_TRIES):
                    _clear(connection)
                    with suppress(_ChangedError):
                        return _Splitting(settings, connection, name).done(now)
            finally:
                with suppress(psycopg.Error):
                    _clear(connection)
    except BusyError:
        log.info("%s is being split by somebody else", name)
        return []
    raise ServiceError(f"partitions: {name} was changed while it was split: nothing was done, and it is tried again")


def _give_up_splits(connection: postgres.Connection) -> None:
    """Clear away what an interrupted split left."""
    with suppress(BusyError), alone(connection, "split"):
        _clear(connection)


def _watched(connection: postgres.Connection) -> list[str]:
    """Tables whose changes are noted for a split."""
    statement = (
        "SELECT c.relname FROM pg_trigger AS t INNER JOIN pg_class AS c ON c.oid = t.tgrelid "
        "INNER JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE t.tgname = %s AND n.nspname = current_schema()"
    )
    return [name for (name,) in connection.execute(statement, [_SPLIT_TRIGGER])]


def _clear(connection: postgres.Connection) -> None:
    def drop(table: str) -> None:
        still(connection, table)
        statement = sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(_SPLIT_TRIGGER), sql.Identifier(table))
        connection.execute(statement)

    for table in _watched(connection):
        patiently(connection, partial(drop, table))
    # With its partitions.
    connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(SPLIT)))
    connection.execute("DELETE FROM split_changes")


class _Splitting:
    """A large partition is copied into several ones while it is read and written, and they take its place.

    What is changed in it meanwhile is noted by a trigger that only this partition has then, and copied afterwards; the last of it, which is
    little, while the table is locked.
    """

    def __init__(self, settings: Settings, connection: postgres.Connection, name: str) -> None:
        self._settings = settings
        self._connection = connection
        self._name = name
        self._file: tuple[Any, ...] | None = None
        self._pieces: list[Piece] = []
        self._most = FEW_CHANGES

    def done(self, now: datetime) -> list[str]:
        """Split it; the names of the new partitions.

        Raises:
            _ChangedError: it was truncated, written anew, or is not a partition any more.
        """
        found = _wanted(self._settings, self._connection, self._name, now)
        if found is None:
            return []
        source, wanted = found
        self._file = self._identity()
        patiently(self._connection, self._watch)
        if not self._copy(source, wanted):
            ((name, _, _),) = self._pieces
            if name.startswith(_WIDE):
                patiently(self._connection, partial(self._rename, name))
            return []
        for _ in range(SPLIT_ROUNDS):
            while self._follow() > FEW_CHANGES:
                pass
            # So that few of its readings are not in the summaries yet.
            summaries.ingestion_rate(self._settings)
            with suppress(_LargeError):
                patiently(self._connection, self._exchange)
                return [name for name, _, _ in self._pieces if name not in (LAST, _SPLIT_LAST)]
        raise _ChangedError

    def _identity(self) -> tuple[Any, ...] | None:
        """Which table it is, with which file and bounds."""
        return self._connection.execute(
            "SELECT oid, pg_relation_filenode(oid), pg_get_expr(relpartbound, oid) FROM pg_class "
            "WHERE oid = to_regclass(quote_ident(%s)) AND relispartition",
            [self._name],
        ).fetchone()

    def _watch(self) -> None:
        still(self._connection, self._name)
        names = [sql.Identifier(name) for name in (_SPLIT_TRIGGER, self._name)]
        trigger = (
            "CREATE OR REPLACE TRIGGER {} AFTER INSERT OR UPDATE OR DELETE ON {} "
            "FOR EACH ROW EXECUTE FUNCTION note_split_change()"
        )
        self._connection.execute(sql.SQL(trigger).format(*names))
        self._connection.execute(sql.SQL("ALTER TABLE {1} ENABLE ALWAYS TRIGGER {0}").format(*names))

    def _copy(self, source: Partition, wanted: list[tuple[str, datetime, datetime]]) -> bool:
        """Copy what there is into tables that are no partitions of `metrics` yet; False: it would be the same again."""
        connection, width = self._connection, self._settings.metrics_partition
        with connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            connection.execute("SET LOCAL statement_timeout = 0")
            connection.execute("SET LOCAL jit = off")
            values = {"width": width, "few": FEW_ROWS, "end": LAST_BOUND}
            table = sql.Identifier(self._name)
            dense = [low for (low,) in connection.execute(_of("split_dense", table), values)]
            span = connection.execute(_of("split_span", table), values).fetchone() or (None, None)
            wished = pieces(width, source, wanted, dense, None if None in span else span)
            self._pieces = wished
            if not wanted and len(wished) == 1:
                return False
            copy = sql.Identifier(SPLIT)
            connection.execute(
                sql.SQL("CREATE TABLE {} (LIKE metrics INCLUDING ALL) PARTITION BY RANGE (published_at)").format(copy)
            )
            self._pieces = []
            for wish, low, high in wished:
                name = _create(connection, _SPLIT_LAST if wish == LAST else wish, low)
                self._pieces.append((name, low, high))
                piece = sql.Identifier(name)
                # Nobody has to look at it when it becomes a partition.
                bound = sql.SQL("published_at >= {}").format(sql.Literal(low))
                if high is not None:
                    bound += sql.SQL(" AND published_at < {}").format(sql.Literal(high))
                connection.execute(
                    sql.SQL("ALTER TABLE {} ADD CONSTRAINT metrics_bound CHECK ({})").format(piece, bound)
                )
                connection.execute(
                    sql.SQL("ALTER TABLE {} ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})").format(
                        copy, piece, sql.Literal(low), _end(high)
                    )
                )
                if wish.startswith((LAST, _GAP, _WIDE)):
                    connection.execute(sql.SQL("CREATE INDEX ON {} (published_at)").format(piece))
            connection.execute(sql.SQL("INSERT INTO {} SELECT * FROM {}").format(copy, table))
        for name, _, _ in self._pieces:
            connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(name)))
        return True

    def _rename(self, name: str) -> None:
        """One whose readings lie everywhere is one for a longer time: it is left alone from now on, until its time comes."""
        still(self._connection, self._name)
        statement = sql.SQL("ALTER TABLE {} RENAME TO {}")
        self._connection.execute(statement.format(sql.Identifier(self._name), sql.Identifier(name)))

    def _follow(self, *, known: bool = False) -> int:
        """Copy what was changed since; how many keys are that?

        Args:
            known: the summaries have to look at all of them, by key. Their log and the copies have to be of the same transaction, so that
                it can be told later which versions were never counted.
        """
        connection, copy = self._connection, sql.Identifier(SPLIT)
        with connection.transaction():
            connection.execute("CREATE TEMPORARY TABLE IF NOT EXISTS split_noted (LIKE split_changes) ON COMMIT DROP")
            connection.execute("DELETE FROM split_noted")
            rows = connection.execute(
                "WITH gone AS (DELETE FROM split_changes RETURNING *) INSERT INTO split_noted SELECT DISTINCT * FROM gone"
            ).rowcount
            # Each is looked up by its key, in the partition of its time.
            ways = ("enable_hashjoin", "enable_mergejoin", "enable_seqscan")
            connection.execute("; ".join(f"SET LOCAL {way} = off" for way in ways))
            for query in ("split_forget", "split_follow"):
                statement = sql.SQL(postgres.query(query)).format(copy=copy, table=sql.Identifier(self._name))
                connection.execute(statement)
            connection.execute("; ".join(f"SET LOCAL {way} = on" for way in ways))
            if known:
                connection.execute(
                    "INSERT INTO summary_changes (device_id, published_at, metric_name) SELECT * FROM split_noted"
                )
        return rows

    def _exchange(self) -> None:
        """Put the new partitions in the place of the old one, in a transaction.

        Raises:
            _LargeError: much was changed since.
            _ChangedError: the old one is not what was copied.
        """
        connection, old = self._connection, sql.Identifier(self._name)
        connection.execute("LOCK TABLE summary_state IN EXCLUSIVE MODE")
        known = summaries.known(connection)
        self._follow()
        # Nobody truncates a partition from here on, which would not be noticed.
        connection.execute("LOCK TABLE metrics IN ACCESS SHARE MODE")
        still(connection, self._name)
        take(connection, self._name)
        if self._identity() != self._file or (known and not summaries.known(connection)):
            raise _ChangedError
        low, high = self._pieces[0][1], self._pieces[-1][2]
        self._refuse_many()
        if known:
            summaries.note_pending(connection, self._name, low, high)
            self._refuse_many()
        self._follow(known=known)
        statements: list[sql.Composable] = [
            sql.SQL("ALTER TABLE metrics DETACH PARTITION {}").format(old),
            sql.SQL("DROP TABLE {}").format(old),
        ]
        for name, low, high in self._pieces:
            names = [sql.Identifier(name), sql.Identifier(SPLIT)]
            statements += [
                sql.SQL("ALTER TABLE {1} DETACH PARTITION {0}").format(*names),
                sql.SQL("ALTER TABLE metrics ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})").format(
                    names[0], sql.Literal(low), _end(high)
                ),
                sql.SQL("ALTER TABLE {} DROP CONSTRAINT metrics_bound").format(names[0]),
            ]
            if name == _SPLIT_LAST:
                statements += [sql.SQL(statement) for statement in _NAMES_OF_LAST]
        statements.append(sql.SQL("DROP TABLE {}").format(sql.Identifier(SPLIT)))
        if known:
            statements.append(sql.SQL("UPDATE summary_state SET source = metrics_source()"))
        # All at once: everybody waits for it.
        connection.execute(sql.SQL("; ").join(statements))

    def _refuse_many(self) -> None:
        statement = "SELECT FROM split_changes OFFSET %s LIMIT 1"
        if self._connection.execute(statement, [self._most]).fetchone() is not None:
            # Where very much is stored all the time, everybody has to wait a little longer.
            self._most = min(self._most * 5 // 4, FEW_ROWS)
            raise _LargeError


def _of(query: str, table: sql.Identifier) -> sql.Composed:
    return sql.SQL(postgres.query(query)).format(table=table)


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
