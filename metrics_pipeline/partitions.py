"""The partitions of the table of the readings: by time, and there before they are needed.

`metrics_before` takes what lies before the first partition, `metrics_after` what lies behind the last one; the partitions in between are cut
off `metrics_after`. So a reading of any time has its place, and no partition has to be proved against a default one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import psycopg
from psycopg import sql

from metrics_pipeline import postgres
from metrics_pipeline.errors import ServiceError
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
PATIENCE_SECONDS = 30.0
"""How long somebody's long transaction is waited for, half a second at a time."""
FIRST: Final = "metrics_before"
LAST: Final = "metrics_after"

_NAMES: Final[dict[PartitionWidth, str]] = {
    "minute": "metrics_p%Y%m%d%H%M",
    "hour": "metrics_p%Y%m%d%H",
    "day": "metrics_p%Y%m%d",
    "month": "metrics_p%Y%m",
}


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


def listed(connection: postgres.Connection) -> list[Partition]:
    """The partitions there are, in order of time. Any role may ask."""
    return [Partition(*row) for row in connection.execute(postgres.query("partitions"))]


def closed(settings: Settings, now: datetime | None = None) -> list[Partition]:
    """The partitions that get no more readings, unless these are late, in order of time; `metrics_before` is among them.

    Raises:
        ServiceError: PostgreSQL is not reachable, or the schema is not there.
    """
    edge = (now or datetime.now(UTC)) - GRACE[settings.metrics_partition]
    with postgres.connect(settings, "metrics_reader", autocommit=True) as connection, _errors():
        return [partition for partition in listed(connection) if partition.high is not None and partition.high <= edge]


def restore(
    settings: Settings, name: str, low: datetime, high: datetime, fill: Callable[[psycopg.Connection, str], None]
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
    raise NotImplementedError


def bound_after(width: PartitionWidth, at: datetime) -> datetime:
    """The first bound between partitions after an instant, in UTC."""
    at = at.astimezone(UTC)
    if width == "month":
        month = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        return (month + timedelta(days=31)).replace(day=1)
    size = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1), "day": timedelta(days=1)}[width]
    zero = datetime(2000, 1, 1, tzinfo=UTC)
    return zero + ((at - zero) // size + 1) * size


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
    with postgres.connect(settings, "metrics_reader", autocommit=True) as connection, _errors():
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
    with postgres.connect(settings, "metrics_owner", autocommit=True) as connection, _errors():
        last = _last(connection)
        wanted = due(settings, last, now)
        if not wanted:
            return []
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with connection.transaction():
                    made = _cut(connection, wanted)
                break
            except psycopg.errors.LockNotAvailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOCK_MS / 1000)
    for name in made:
        report(name)
    return made


def _last(connection: postgres.Connection) -> datetime:
    partitions = listed(connection)
    if not partitions or partitions[-1].name != LAST or partitions[-1].low is None:
        raise ServiceError("the table metrics has no partitions: run `metrics-pipeline migrate up`")
    return partitions[-1].low


def _cut(connection: postgres.Connection, wanted: list[tuple[str, datetime, datetime]]) -> list[str]:
    """Cut partitions off the last one, in a transaction that holds the table only for changes of the catalogue."""
    connection.execute(f"SET LOCAL lock_timeout = {LOCK_MS}")
    connection.execute("SET LOCAL statement_timeout = '5min'")
    # As a tick does, in this order.
    connection.execute("LOCK TABLE summary_state IN EXCLUSIVE MODE")
    wanted = [one for one in wanted if one[1] >= _last(connection)]
    for name, _, _ in wanted:
        connection.execute(sql.SQL("CREATE TABLE {} (LIKE metrics INCLUDING ALL)").format(sql.Identifier(name)))
    if not wanted:
        return []
    connection.execute("LOCK TABLE metrics IN ACCESS EXCLUSIVE MODE")
    known = connection.execute("SELECT source = metrics_source() FROM summary_state").fetchone()
    connection.execute(f"ALTER TABLE metrics DETACH PARTITION {LAST}")
    for name, low, high in wanted:
        # Readings that were stored ahead of their time: they get another version, which the summaries have to know.
        places = {"last": sql.Identifier(LAST), "name": sql.Identifier(name), "high": sql.Literal(high)}
        connection.execute(
            sql.SQL(
                "INSERT INTO summary_changes SELECT device_id, published_at, metric_name, value, created_at, xmin "
                "FROM {last} WHERE published_at < {high}"
            ).format(**places)
        )
        connection.execute(
            sql.SQL(
                "WITH gone AS (DELETE FROM {last} WHERE published_at < {high} RETURNING *) "
                "INSERT INTO {name} SELECT * FROM gone"
            ).format(**places)
        )
        connection.execute(
            sql.SQL("ALTER TABLE metrics ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})").format(
                sql.Identifier(name), sql.Literal(low), sql.Literal(high)
            )
        )
    connection.execute(
        sql.SQL("ALTER TABLE metrics ATTACH PARTITION {} FOR VALUES FROM ({}) TO (MAXVALUE)").format(
            sql.Identifier(LAST), sql.Literal(wanted[-1][2])
        )
    )
    if known == (True,):
        connection.execute("UPDATE summary_state SET source = metrics_source()")
    return [name for name, _, _ in wanted]


@contextmanager
def _errors() -> Iterator[None]:
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
