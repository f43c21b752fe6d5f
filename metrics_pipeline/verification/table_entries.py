"""The table as fixed-width entries that can be compared with records of the topic, out of one snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import numpy as np
import psycopg

from metrics_pipeline import postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.verification.spill import ROW, Rows

_HEADER_BYTES = 19
_COPIED = np.dtype(
    [
        ("fields", ">i2"),
        ("device_id_size", ">i4"),
        ("device_id", "V16"),
        ("published_at_size", ">i4"),
        ("published_at", ">i8"),
        ("metric_name_size", ">i4"),
        ("metric_name", ">i2"),
        ("value_size", ">i4"),
        ("value", ">u8"),
        ("tags_size", ">i4"),
        ("tags", "V16"),
        ("created_at_size", ">i4"),
        ("created_at", ">i8"),
    ]
)
"""A row of `verify_rows.sql` as binary COPY sends it."""


def take_snapshot(connection: postgres.Connection) -> tuple[int, int | None]:
    """Begin a transaction that shows the table as it is now, however long it lasts.

    Returns:
        About how many rows the table has: as many as its size allows, by the planner's idea of a row's size. And from which
        published_at on nothing has been dropped, in microseconds since 2000; None when nothing ever was.

    Raises:
        ServiceError: there is no such table, or PostgreSQL broke off.
    """
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with reading("metrics"):
        connection.execute("SET LOCAL statement_timeout = 0")
        # Before the snapshot: a partition that goes in between would be missing, and not known to have expired.
        connection.execute("LOCK TABLE metrics IN ACCESS SHARE MODE")
        estimate, retained_from = connection.execute(postgres.query("verify_size").encode()).fetchone() or (0, None)
    return int(estimate), retained_from


@contextmanager
def reading(table: str) -> Iterator[None]:
    """Turn PostgreSQL's errors into one that says what was read.

    Raises:
        ServiceError: for any of them.
    """
    try:
        yield
    except psycopg.Error as error:
        reason = str(error).partition("\n")[0]
        raise ServiceError(
            f"the table {table} cannot be read: {reason}; see `metrics-pipeline status` and `metrics-pipeline migrate status`"
        ) from error


def read_rows(connection: postgres.Connection, before: datetime | None = None) -> Iterator[Rows]:
    """The table as `spill.ROW` entries, some thousands at a time, in the connection's transaction: all of it, or what was published before.

    Raises:
        ServiceError: PostgreSQL broke off, or the table is not of the shape that the migrations give it.
    """
    some = f"WHERE published_at < '{before.astimezone(UTC).isoformat()}'" if before else ""
    statement = f"COPY (\n{postgres.query('verify_rows')}\n{some}\n) TO STDOUT (FORMAT binary)"
    with reading("metrics"), connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
        waiting, size, skip = [], 0, _HEADER_BYTES
        for data in copy:
            waiting.append(bytes(data))
            size += len(waiting[-1])
            if size >= 4 * 2**20:
                whole = b"".join(waiting)
                count = (len(whole) - skip) // _COPIED.itemsize
                yield _rows(np.frombuffer(whole, _COPIED, count, skip))
                waiting = [whole[skip + count * _COPIED.itemsize :]]
                size, skip = len(waiting[0]), 0
        whole = b"".join(waiting)
        yield _rows(np.frombuffer(whole, _COPIED, (len(whole) - skip) // _COPIED.itemsize, skip))


def _rows(copied: Rows) -> Rows:
    names = ("device_id", "published_at", "metric_name", "value", "tags", "created_at")
    widths = {name: _COPIED[name].itemsize for name in names}
    if not all((copied[f"{name}_size"] == width).all() for name, width in widths.items()):
        raise ServiceError("the table metrics is not as the migrations make it: `metrics-pipeline migrate status`")
    rows = np.empty(len(copied), ROW)
    for name in names[:3]:
        rows["key"][name] = copied[name]
    for name in names[3:]:
        rows[name] = copied[name]
    return rows
