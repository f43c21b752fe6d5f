"""A partition in PostgreSQL: read in the order of its keys, added up, watched for changes, and filled again."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import numpy as np
import numpy.typing as npt
import polars as pl
import psycopg
from psycopg import sql

from metrics_pipeline import partitions, postgres
from metrics_pipeline.archive.manifest import Sums
from metrics_pipeline.archive.parquet import SCHEMA, Metrics
from metrics_pipeline.errors import ServiceError

BLOCK_ROWS: Final = 50_000
TRIGGER: Final = "metrics_9_note_change"

_BEGIN: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_END: Final = b"\xff\xff"
_WIDTHS: Final = (
    ("device_id", "V16"),
    ("published_at", ">i8"),
    ("metric_name", ">i2"),
    ("value", ">f8"),
    ("created_at", ">i8"),
)
_ROW: Final = np.dtype(
    [
        ("fields", ">i2"),
        *((field, kind) for name, width in _WIDTHS for field, kind in ((f"{name}_size", ">i4"), (name, width))),
        ("tags_size", ">i4"),
    ]
)
"""A row of `archive_rows.sql` as binary COPY sends it, up to its tags."""
_TO_2000: Final = 946_684_800_000_000
"""Microseconds from 1970, where Parquet counts from, to 2000, where PostgreSQL does."""
_TEXT_OID: Final = 25
_COLUMNS: Final = "device_id, published_at, metric_name, value, created_at, tags"


@dataclass(frozen=True, slots=True)
class Source:
    """A partition as a snapshot shows it.

    Attributes:
        source: cluster, database and table, by number.
        relation: number of the table.
        filenode: of its file.
        rows: about how many it has.
        changes: transactions that the snapshot contains, and that were noted as changes.
    """

    source: str
    relation: int
    filenode: int
    rows: int
    changes: list[str]


@dataclass(frozen=True, slots=True)
class State:
    """What is noted of a partition's archive.

    Attributes:
        name: of the archive; None: there is none.
        folder: METRICS_ARCHIVE when it was made.
        manifest: SHA-256 of its manifest.
        same_file: whether the table has the same file as then.
        watched: whether changes are noted.
        changes: transactions that have changed it since.
    """

    name: str | None
    folder: str | None
    manifest: str | None
    same_file: bool
    watched: bool
    changes: int

    @property
    def problem(self) -> str | None:
        """Why the archive is not all of the partition, or None."""
        if self.name is None:
            return "it has no archive"
        if not self.same_file or not self.watched:
            return "it was written anew, or changes were not noted"
        return f"{self.changes} transactions have changed it since it was archived" if self.changes else None


@contextmanager
def errors(what: str) -> Iterator[None]:
    """Turn PostgreSQL's errors into one that says what was done.

    Raises:
        ServiceError: for any of them.
    """
    try:
        yield
    except psycopg.errors.UndefinedTable as error:
        raise ServiceError(f"archive: {postgres.one_line(error)}: run `metrics-pipeline migrate up`") from error
    except psycopg.Error as error:
        raise ServiceError(
            f"archive: {what}: {postgres.one_line(error)}: look at the PostgreSQL log, then try again"
        ) from error


def _query(name: str, partition: str) -> sql.Composed:
    return sql.SQL(postgres.query(name)).format(partition=sql.Identifier(partition))


def state(connection: postgres.Connection, partition: str) -> State | None:
    """What is noted of a partition's archive; None when there is no such table."""
    row = connection.execute(postgres.query("archive_state").encode(), {"partition": partition}).fetchone()
    return None if row is None else State(*row)


def watch(connection: postgres.Connection, partition: str) -> None:
    """From now on, every transaction that changes the partition is noted. Its writers wait for half a second at most.

    Raises:
        ServiceError: somebody writes there all the time.
    """
    table = sql.Identifier(partition)
    deadline = time.monotonic() + partitions.PATIENCE_SECONDS
    while not ((found := state(connection, partition)) and found.watched):
        try:
            with connection.transaction():
                connection.execute(f"SET LOCAL lock_timeout = {partitions.LOCK_MS}")
                name = sql.Identifier(TRIGGER)
                connection.execute(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(table))
                connection.execute(
                    sql.SQL(
                        "CREATE OR REPLACE TRIGGER {} AFTER INSERT OR UPDATE OR DELETE ON {} "
                        "FOR EACH ROW EXECUTE FUNCTION note_archive_change()"
                    ).format(name, table)
                )
                connection.execute(sql.SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(table, name))
        except psycopg.errors.LockNotAvailable as error:
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"archive: somebody has kept the table {partition} for too long: see `metrics-pipeline sql` on "
                    "pg_stat_activity, then try again"
                ) from error
            time.sleep(partitions.LOCK_MS / 1000)


@contextmanager
def snapshot(connection: postgres.Connection, partition: str) -> Iterator[Source]:
    """A transaction that shows the partition as it is now, however long it lasts.

    Raises:
        ServiceError: there is no such table, or PostgreSQL broke off.
    """
    with errors(f"the table {partition} cannot be read"), connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        connection.execute("SET LOCAL statement_timeout = 0")
        # A sort of a day's readings; no more than that at a time.
        connection.execute("SET LOCAL work_mem = '64MB'")
        row = connection.execute(postgres.query("archive_source").encode(), {"partition": partition}).fetchone()
        if row is None:
            raise ServiceError(
                f"there is no partition {partition}: `metrics-pipeline archive list` shows what there is"
            )
        yield Source(*row)


def sums(connection: postgres.Connection, table: str) -> Sums:
    """What the readings of a table add up to."""
    row = connection.execute(_query("archive_sums", table)).fetchone() or ()
    return Sums(*map(int, row))


def metrics(connection: postgres.Connection) -> Metrics:
    """Names and units of the metrics."""
    rows = connection.execute("SELECT code, name, unit FROM metric_names").fetchall()
    return Metrics({code: name for code, name, _ in rows}, {code: unit for code, _, unit in rows})


def frames(connection: postgres.Connection, partition: str, known: Metrics) -> Iterator[pl.DataFrame]:
    """The readings of a partition in the order of their keys, some thousands at a time.

    Raises:
        ServiceError: PostgreSQL broke off, or a reading is of a form that Parquet does not have.
    """
    statement = sql.SQL("COPY ({}) TO STDOUT (FORMAT binary)").format(_query("archive_rows", partition))
    with (
        errors(f"the table {partition} cannot be read"),
        connection.cursor() as cursor,
        cursor.copy(statement) as copy,
    ):
        waiting: list[bytes] = []
        header = True
        for piece in copy:
            row = bytes(piece)
            if header:
                row, header = row.removeprefix(_BEGIN), False
            if row and row != _END:
                waiting.append(row)
            if len(waiting) == BLOCK_ROWS:
                yield frame_of(waiting, known)
                waiting = []
        if waiting:
            yield frame_of(waiting, known)


def frame_of(rows: Sequence[bytes], known: Metrics) -> pl.DataFrame:
    """Rows of a binary COPY of `archive_rows.sql` by columns.

    Raises:
        ServiceError: they are of another form.
    """
    width = _ROW.itemsize
    fixed = np.frombuffer(b"".join([row[:width] for row in rows]), _ROW)
    places: dict[bytes, int] = {}
    tags = [places.setdefault(row[width:], len(places)) for row in rows]
    sizes = np.fromiter(map(len, rows), np.int64, len(rows)) - width
    if len(fixed) != len(rows) or not (
        (fixed["fields"] == len(_WIDTHS) + 1).all()
        and all((fixed[f"{name}_size"] == fixed.dtype[name].itemsize).all() for name, _ in _WIDTHS)
        and (fixed["tags_size"] == sizes).all()
    ):
        raise ServiceError("the table metrics is not as the migrations make it: `metrics-pipeline migrate status`")
    devices, runs = _runs(fixed["device_id"])
    codes = fixed["metric_name"].astype(np.int16)
    names = pl.Series([str(UUID(bytes=device)) for device in devices], dtype=pl.String)
    lists = pl.Series([_tags(data) for data in places], dtype=pl.List(pl.String))
    code = pl.Series(codes)
    return pl.DataFrame(
        {
            "device_id": names.gather(np.repeat(np.arange(len(devices), dtype=np.uint32), runs)),
            "published_at": _times(fixed["published_at"]),
            "metric_name": code,
            "metric": code.replace_strict(dict(known.names), default=None, return_dtype=pl.String),
            "value": fixed["value"].astype(np.float64),
            "unit": code.replace_strict(dict(known.units), default=None, return_dtype=pl.String),
            "tags": lists.gather(np.array(tags, np.uint32)),
            "created_at": _times(fixed["created_at"]),
        },
        schema=SCHEMA,
    )


def _runs(devices: npt.NDArray[Any]) -> tuple[list[bytes], npt.NDArray[np.int64]]:
    """Devices as they follow each other, and how many rows each has."""
    words = np.ascontiguousarray(devices).view(np.uint64).reshape(-1, 2)
    begins = np.flatnonzero(np.concatenate([[True], (words[1:] != words[:-1]).any(axis=1)]))
    return [devices[at].tobytes() for at in begins], np.diff(np.append(begins, len(devices)))


def _times(micros: npt.NDArray[Any]) -> pl.Series:
    return pl.Series(micros.astype(np.int64) + _TO_2000).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")


def _tags(data: bytes) -> list[str | None]:
    """A text[] out of PostgreSQL's binary format.

    Raises:
        ServiceError: it has several dimensions, or does not begin at 1.
    """
    dimensions, _, _ = struct.unpack_from(">iii", data)
    if dimensions == 0:
        return []
    length, begin = struct.unpack_from(">ii", data, 12)
    if dimensions > 1 or begin != 1:
        raise ServiceError(
            "a reading has tags that a list cannot hold, an array of several dimensions or one that does not begin at 1: "
            "no sink stores such, so correct them by UPDATE metrics"
        )
    at, tags = 20, []
    for _ in range(length):
        (size,) = struct.unpack_from(">i", data, at)
        at += 4
        tags.append(None if size < 0 else data[at : at + size].decode())
        at += max(size, 0)
    return tags


def _encoded(tags: Sequence[str | None]) -> bytes:
    """As `array_send` has it."""
    if not tags:
        return struct.pack(">iii", 0, 0, _TEXT_OID)
    texts = [None if tag is None else tag.encode() for tag in tags]
    head = struct.pack(">iiiii", 1, int(None in texts), _TEXT_OID, len(texts), 1)
    return head + b"".join(
        b"\xff\xff\xff\xff" if text is None else struct.pack(">i", len(text)) + text for text in texts
    )


def fill(connection: postgres.Connection, table: str, readings: Iterator[pl.DataFrame]) -> None:
    """Copy readings into a table, with the time at which each was first stored."""
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(sql.Identifier(table), sql.SQL(_COLUMNS))
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        copy.write(_BEGIN)
        for frame in readings:
            copy.write(copied(frame))
        copy.write(_END)


def copied(frame: pl.DataFrame) -> bytes:
    """Readings as rows of a binary COPY."""
    rows = np.empty(len(frame), _ROW)
    rows["fields"] = len(_WIDTHS) + 1
    for name, _ in _WIDTHS:
        rows[f"{name}_size"] = rows.dtype[name].itemsize
    runs = frame["device_id"].rle().struct.unnest()
    devices = np.frombuffer(b"".join(UUID(device).bytes for device in runs["value"]), "V16")
    rows["device_id"] = np.repeat(devices, runs["len"].to_numpy())
    rows["metric_name"] = frame["metric_name"].to_numpy()
    rows["value"] = frame["value"].to_numpy()
    for name in ("published_at", "created_at"):
        rows[name] = frame[name].to_physical().to_numpy() - _TO_2000
    known: dict[tuple[str | None, ...], bytes] = {}
    tags = []
    for labels in frame["tags"].to_list():
        key = tuple(labels)
        if key not in known:
            known[key] = _encoded(key)
        tags.append(known[key])
    rows["tags_size"] = np.fromiter(map(len, tags), np.int64, len(tags))
    data, width = rows.tobytes(), _ROW.itemsize
    return b"".join([part for at, text in enumerate(tags) for part in (data[at * width : (at + 1) * width], text)])


def note(connection: postgres.Connection, source: Source, name: str, folder: str, manifest: str) -> None:
    """Note that a partition, as a snapshot showed it, is archived."""
    connection.execute(
        postgres.query("archive_note").encode(),
        {
            "relation": source.relation,
            "filenode": source.filenode,
            "changes": source.changes,
            "name": name,
            "folder": folder,
            "manifest": manifest,
        },
    )
