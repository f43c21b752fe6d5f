"""How the table is laid out that a benchmark stores into."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal

from psycopg import sql

from metrics_pipeline import partitions, postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.postgres import MIGRATIONS
from metrics_pipeline.settings import PartitionWidth, Settings

Layout = Literal["plain", "partitioned", "staging"]
"""One heap; partitions by time; or partitions that rows are moved into, out of a table without an index."""
TableLayout = Literal["plain", "partitioned"]

WIDTH: Final[PartitionWidth] = "hour"
"""Of the partitions that a growing table has."""
PARTITIONED: Final = "20261127000013_partitions.sql"
"""The migration that makes partitions: its way back makes one heap."""


def prepare(settings: Settings, layout: Layout) -> None:
    """Lay out the empty table of a stack that was just migrated.

    Raises:
        ServiceError: PostgreSQL refused.
    """
    if layout == "plain":
        down = (MIGRATIONS / PARTITIONED).read_text("utf-8").partition("-- migrate:down")[2]
        with postgres.connect(settings, "metrics_owner") as connection, partitions.errors():
            connection.execute(down.encode())
        return
    partitions.make(settings)
    if layout == "staging":
        with postgres.connect(settings, "metrics_owner") as connection, partitions.errors():
            connection.execute(postgres.query("bench_staging").encode())


def begin_at(settings: Settings, begin: datetime) -> None:
    """Give an empty table partitions of an hour from `begin` until some time ahead of now, and no others.

    Raises:
        ServiceError: there is a reading, or PostgreSQL refused.
    """
    hours = settings.model_copy(update={"metrics_partition": WIDTH})
    first = begin.replace(minute=0, second=0, microsecond=0)
    with postgres.connect(settings, "metrics_owner") as connection, partitions.errors():
        if connection.execute("SELECT EXISTS (SELECT FROM metrics)").fetchone() != (False,):
            raise ServiceError("the partitions of a table with readings stay as they are")
        for partition in partitions.listed(connection):
            name = sql.Identifier(partition.name)
            connection.execute(sql.SQL("ALTER TABLE metrics DETACH PARTITION {}").format(name))
            if partition.name not in (partitions.FIRST, partitions.LAST):
                connection.execute(sql.SQL("DROP TABLE {}").format(name))
        partitions.attach(connection, partitions.FIRST, sql.SQL("MINVALUE"), sql.Literal(first))
        partitions.attach(connection, partitions.LAST, sql.Literal(first), sql.SQL("MAXVALUE"))
    partitions.make(hours)


def described(connection: postgres.Connection, layout: Layout, width: PartitionWidth) -> dict[str, Any]:
    """The layout as one JSON object: its name, how many partitions there are, and for how much time each is."""
    if layout == "plain":
        return {"name": layout, "partitions": 0, "width": None}
    return {"name": layout, "partitions": len(partitions.listed(connection)), "width": width}


def filled(connection: postgres.Connection, layout: Layout) -> list[dict[str, Any]]:
    """The partitions that hold readings, in order of time, with about how many; there are none of a table that is one heap.

    Args:
        connection: of the superuser, autocommit.
        layout: of the table.
    """
    if layout == "plain":
        return []
    connection.execute("ANALYZE metrics")
    return [partition.document() for partition in partitions.listed(connection) if partition.rows]
