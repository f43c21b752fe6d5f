"""Batches into PostgreSQL: offsets by compare-and-set, readings by COPY or upsert, rejects, all in one transaction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec
import numpy as np
import psycopg
from psycopg import errors as pg
from psycopg.pq import TransactionStatus

from metrics_pipeline import kafka, postgres, topic_log
from metrics_pipeline.copy_sink import copy_format
from metrics_pipeline.copy_sink.batch import Batch, BatchReject, clean
from metrics_pipeline.copy_sink.canonical import ReadingColumns
from metrics_pipeline.copy_sink.failpoint import Failpoints
from metrics_pipeline.copy_sink.sessions import APPLICATION
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.kafka import TopicLog
from metrics_pipeline.settings import TOPIC, Settings
from metrics_pipeline.topic_log import Growth

log = logging.getLogger(__name__)

LOCK_SECONDS: Final = 5
"""How long a batch waits for another worker's lock before that worker's session is looked at."""
MOST_UPSERTS: Final = 64
"""Longest run of batches that are upserted without trying COPY alone again."""
PIECE: Final = 1 << 17
"""Bytes handed to libpq at a time: of more psycopg makes pieces by itself, and copies them."""
REJECTED_BYTES: Final = 1 << 20
"""Bytes of records after which those rejected so far are sent, so that large ones are not in memory several times."""
READ_ONLY: Final = (
    "PostgreSQL has become a standby, which takes no writes: connecting again, in case that another server answers"
)
REFUSED: Final = (pg.DataError, pg.IntegrityError)
"""What PostgreSQL raises when it refuses a value, rather than could not work."""

_COLUMNS: Final = "(device_id, published_at, metric_name, value, tags)"
COPY: Final = f"COPY metrics {_COLUMNS} FROM STDIN (FORMAT binary)"
_COPY_INCOMING: Final = f"COPY incoming_metrics {_COLUMNS} FROM STDIN (FORMAT binary)"
_INCOMING: Final = (
    "CREATE TEMPORARY TABLE IF NOT EXISTS incoming_metrics "
    "(device_id uuid, published_at timestamptz, metric_name smallint, value double precision, tags text[]) "
    "ON COMMIT DELETE ROWS"
)

Path = Literal["copy", "upsert", "bisect", "none"]


class FencedError(Exception):
    """The database is further, or elsewhere, than a batch assumes: somebody else has written these partitions.

    Attributes:
        partitions: which.
    """

    def __init__(self, partitions: Iterable[int]) -> None:
        self.partitions = sorted(partitions)
        super().__init__(f"partitions {self.partitions} are not where this worker left them")


class StandbyError(Exception):
    """The COPY sink is not the active one (any more)."""


@dataclass(frozen=True, slots=True)
class Offset:
    """Where a partition stands.

    Attributes:
        log: in which log; nothing when the note is older than such notes.
        next: the offset of the first record that is not stored or rejected.
        stamp: the log's timestamp of the record before it, in milliseconds since 1970; None when it is not known.
    """

    log: str
    next: int
    stamp: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a batch that is in the database.

    Attributes:
        rows: readings stored.
        path: how.
        rejects: the records that were rejected, by the decoder or by the database.
    """

    rows: int
    path: Path
    rejects: list[BatchReject]


class Store:
    """One worker's session with PostgreSQL.

    Every method may raise `psycopg.Error` or `PipelineError` (not reachable, refused); after that the next call begins with a new
    session if the old one is broken, and nothing of the failed call is in the database, or all of it: `written` tells which.

    Args:
        settings: where PostgreSQL is.
        name: of the worker, for `pg_stat_activity`.
        failpoints: for tests.
    """

    def __init__(self, settings: Settings, name: str = "", failpoints: Failpoints | None = None) -> None:
        self._settings = settings
        self._name = f"{APPLICATION} {name}".strip()
        self._failpoints = failpoints or Failpoints("")
        self._rows = RowWriter(self._failpoints)
        self._connection: postgres.Connection | None = None
        self._upserts_left = 0
        self._upserts_next = 1

    def active(self) -> bool:
        """Whether the COPY sink is the one that stores.

        Raises:
            StandbyServerError: the server has become one that takes no writes.
        """
        session = self._session()
        row = session.execute("SELECT active = 'copy', pg_is_in_recovery() FROM sink_state").fetchone()
        session.commit()
        if row and row[1]:
            self.close()
            raise postgres.StandbyServerError(READ_ONLY)
        return bool(row and row[0])

    def offsets(self, partitions: Iterable[int]) -> dict[int, Offset]:
        """Where each partition stands, and in which log; those never written are left out."""
        session = self._session()
        rows = session.execute(
            "SELECT partition, next_offset, log_id, last_timestamp FROM sink_offsets WHERE topic = %s AND partition = ANY (%s)",
            [TOPIC, list(partitions)],
        ).fetchall()
        session.commit()
        return {partition: Offset(log, offset, stamp) for partition, offset, log, stamp in rows}

    def begin(self, partition: int, offset: Offset) -> None:
        """Note where a partition that was never written begins; a note that is there already stays."""
        session = self._session()
        session.execute(
            "INSERT INTO sink_offsets (topic, partition, log_id, next_offset) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
            [TOPIC, partition, offset.log, offset.next],
        )
        session.commit()

    def move(self, partition: int, expected: Offset, offset: Offset) -> bool:
        """Move a partition whose records exist no more, or stand in another log; False when it was not where expected, or another sink is active."""
        session = self._session()
        moved = session.execute(
            postgres.query("sink_move"),
            {
                "topic": TOPIC,
                "partition": partition,
                "expected_log": expected.log,
                "expected": expected.next,
                "log_id": offset.log,
                "offset": offset.next,
            },
        ).rowcount
        session.commit()
        return moved == 1

    def connector_log(self) -> str:
        """Which log the offsets that the connector committed are of; nothing when that was never noted."""
        session = self._session()
        row = session.execute("SELECT connector_log FROM sink_state").fetchone()
        session.commit()
        return str(row[0]) if row else ""

    def note(self, log: TopicLog) -> str | None:
        """Note the log that the topic's name stands for; what is new about it, or None."""
        return topic_log.note(self._session(), log, self._settings.topic_refresh_seconds)

    def settle_growth(self, log: TopicLog, sweep: Callable[[Growth, TopicLog, dict[int, int]], None]) -> str | None:
        """Go on with the growth of partitions that is the next to be settled; what was done about it, or None.

        Args:
            log: which the topic's name stands for.
            sweep: begins to settle one that moved keys between old partitions; the third argument is where the partitions begin.
        """
        session = self._session()
        try:
            growth = topic_log.oldest_growth(session, log)
            session.commit()
            if growth is None:
                return None
            if not growth.passed:
                topic_log.measure(session, self._settings, growth)
                return None
            low = {number: first for number, (first, _) in kafka.watermarks(self._settings).items()}
            at = self.offsets(growth.passed)
            if not growth.reached({number: place.next for number, place in at.items() if place.log == log.id}, low):
                return None
            if growth.mixed:
                sweep(growth, log, low)
                return None
            if not topic_log.settle(session, growth) or not set_back(session, growth, log, low):
                return None
            session.commit()
        finally:
            if not session.closed:
                session.rollback()
        return f"{growth}: partitions {sorted(growth.added)} are read again, so that the newest value of each key is stored last"

    def last_settled(self) -> int:
        """The growth that was settled last; another number than before means that offsets were set back."""
        session = self._session()
        row = session.execute(postgres.query("topic_growth_last_settled"), {"topic": TOPIC}).fetchone()
        session.commit()
        return int(row[0]) if row else 0

    def write(self, batch: Batch) -> Written:
        """Store and reject what the batch holds and move the offsets, or do nothing at all.

        Raises:
            FencedError: some partitions are not where the batch begins.
            StandbyError: another sink is the active one.
            psycopg.Error: PostgreSQL refused, or the session broke. When it broke at the end the outcome is open: see `written`.
        """
        session = self._session()
        try:
            try:
                return self._write(session, batch, upsert=self._upserts_left > 0)
            except REFUSED as error:
                session.rollback()
                if isinstance(error, pg.UniqueViolation):
                    # A replay has duplicates in every batch: after each failure COPY alone rests twice as long.
                    self._upserts_left = self._upserts_next
                    self._upserts_next = min(self._upserts_next * 2, MOST_UPSERTS)
                return self._write(session, batch, upsert=True)
        except pg.LockNotAvailable:
            session.rollback()
            self._end_stalled(session)
            raise
        except pg.ReadOnlySqlTransaction:
            # By its address another server may answer by now, which can be written.
            self.close()
            raise
        except BaseException:
            with suppress(psycopg.Error):
                session.rollback()
            raise

    def written(self, batch: Batch) -> bool:
        """Whether a batch whose COMMIT was never answered is in the database."""
        at = self.offsets(batch.chunks)
        return all(at.get(chunk.partition) == Offset(chunk.log, chunk.stop) for chunk in batch.chunks.values())

    def close(self) -> None:
        """End the session."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _session(self) -> postgres.Connection:
        if self._connection is None or self._connection.closed:
            self._failpoints.begin("connect")
            self._connection = postgres.connect(
                self._settings,
                "metrics_writer",
                application_name=self._name,
                keepalives_idle=10,
                keepalives_interval=5,
                keepalives_count=3,
                tcp_user_timeout=30_000,
                options=f"-c lock_timeout={LOCK_SECONDS}s",
            )
        elif self._connection.info.transaction_status == TransactionStatus.INERROR:
            # A question that failed (there is no schema yet, say) must not fail every later one.
            self._connection.rollback()
        return self._connection

    def _write(self, session: postgres.Connection, batch: Batch, *, upsert: bool) -> Written:
        self._failpoints.begin("lock")
        self._lock(session, batch)
        self._failpoints.reach("locked")
        self._advance(session, batch)
        self._failpoints.reach("advanced")
        written = self._rows.write(session, batch, upsert=upsert)
        self._failpoints.reach("committing")
        session.commit()
        self._failpoints.reach("committed")
        if written.path == "copy":
            self._upserts_next = 1
        elif self._upserts_left:
            self._upserts_left -= 1
        return written

    def _lock(self, session: postgres.Connection, batch: Batch) -> None:
        rows = session.execute(
            postgres.query("sink_lock").encode(), {"topic": TOPIC, "partitions": list(batch.chunks)}
        ).fetchall()
        if not all(active for *_, active in rows):
            raise StandbyError
        at = {partition: Offset(log, offset) for partition, offset, log, _ in rows}
        wrong = [
            chunk.partition
            for chunk in batch.chunks.values()
            if at.get(chunk.partition) != Offset(chunk.log, chunk.start)
        ]
        if wrong:
            raise FencedError(wrong)

    def _advance(self, session: postgres.Connection, batch: Batch) -> None:
        chunks = list(batch.chunks.values())
        moved = session.execute(
            postgres.query("sink_advance").encode(),
            {
                "topic": TOPIC,
                "partitions": [chunk.partition for chunk in chunks],
                "logs": [chunk.log for chunk in chunks],
                "starts": [chunk.start for chunk in chunks],
                "stops": [chunk.stop for chunk in chunks],
                "stamps": [chunk.stamp for chunk in chunks],
            },
        ).rowcount
        if moved != len(chunks):
            raise FencedError(batch.chunks)

    def _end_stalled(self, session: postgres.Connection) -> None:
        row = session.execute(postgres.query("sink_end_stalled").encode(), {"seconds": LOCK_SECONDS}).fetchone()
        session.commit()
        if row and row[0]:
            log.warning("ended %s session(s) of stalled workers that held a lock", row[0])


def set_back(session: postgres.Connection, growth: Growth, log: TopicLog, low: Mapping[int, int]) -> bool:
    """Let the COPY sink read the partitions of a growth again, in the session's transaction; False when it is not its turn."""
    rows = session.execute(postgres.query("sink_hand_back"), {"topic": TOPIC}).fetchall()
    # Asked once the rows are locked: who changes the sink locks them, too.
    active = session.execute("SELECT active = 'copy' FROM sink_state").fetchone()
    if active != (True,) or not growth.reached({n: next_ for n, next_, of in rows if of == log.id}, low):
        return False
    values = {
        "topic": TOPIC,
        "log_id": log.id,
        "partitions": list(growth.added),
        "offsets": [max(begin, low.get(number, 0)) for number, begin in growth.added.items()],
    }
    session.execute(postgres.query("sink_set_back"), values)
    return True


class RowWriter:
    """What a batch becomes within a transaction of somebody else's, who notes in it how far the records are by then.

    Args:
        failpoints: for tests.
    """

    statement = COPY

    def __init__(self, failpoints: Failpoints | None = None) -> None:
        self._failpoints = failpoints or Failpoints("")

    def write(self, session: postgres.Connection, batch: Batch, *, upsert: bool) -> Written:
        """Store the readings and keep the rejects; the transaction stays open.

        Args:
            session: with its transaction.
            batch: what was decoded.
            upsert: whether readings may be there already. Records that the database refuses become rejects then; without it,
                they are raised like any other error.

        Raises:
            psycopg.Error: PostgreSQL could not work, or (without `upsert`) refused. The transaction has to be rolled back.
        """
        rejects, path = batch.rejects, self._path(batch, upsert=upsert)
        if path == "copy":
            self._copy(session, self.statement, batch.columns, batch.tags)
        elif path == "upsert":
            refused = self._upsert(session, batch)
            if refused is not None:
                path, rejects = "bisect", rejects + refused
        self._failpoints.reach("copied")
        self._reject(session, batch, rejects)
        return Written(len(batch.columns) - (len(rejects) - len(batch.rejects)), path, rejects)

    @staticmethod
    def _path(batch: Batch, *, upsert: bool) -> Path:
        if not len(batch.columns):
            return "none"
        return "upsert" if upsert else "copy"

    def _copy(
        self, session: postgres.Connection, statement: str, columns: ReadingColumns, tags: Sequence[bytes]
    ) -> None:
        with session.cursor() as cursor, cursor.copy(statement.encode()) as copy:
            for rows in copy_format.copy_rows(columns, tags):
                piece = memoryview(rows)
                for at in range(0, len(piece), PIECE):
                    copy.write(piece[at : at + PIECE])
                self._failpoints.reach("copying")

    def _upsert(self, session: postgres.Connection, batch: Batch) -> list[BatchReject] | None:
        """Store over what is there; None when the database took all of it, else what it refused."""
        session.execute(_INCOMING.encode())
        columns = latest(batch.columns)
        try:
            with session.transaction():
                self._stage(session, columns, batch.tags)
        except REFUSED:
            refused = rejects = self._bisect(session, columns, batch.tags)
            left = batch.columns
            # A reading that was refused had taken the place of former ones of its key, which are as good as any.
            while rejects and len(columns) < len(left):
                left = left.take(~np.isin(left.source, [reject.at for reject in rejects]))
                columns = latest(left)
                rejects = self._bisect(session, columns, batch.tags)
                refused = refused + rejects
            return refused
        return None

    def _stage(self, session: postgres.Connection, columns: ReadingColumns, tags: Sequence[bytes]) -> None:
        self._copy(session, _COPY_INCOMING, columns, tags)
        session.execute(postgres.query("sink_upsert").encode())

    def _bisect(
        self, session: postgres.Connection, columns: ReadingColumns, tags: Sequence[bytes]
    ) -> list[BatchReject]:
        """Store halves, and their halves, until only the refused readings are left."""
        refused: list[BatchReject] = []
        waiting = [columns]
        while waiting:
            part = waiting.pop()
            try:
                with session.transaction():
                    self._stage(session, part, tags)
                    session.execute(b"DELETE FROM incoming_metrics")
            except REFUSED as error:
                if len(part) == 1:
                    detail = clean(postgres.one_line(error))
                    refused.append(BatchReject(int(part.source[0]), "refused_by_database", detail))
                else:
                    half = len(part) // 2
                    waiting += [part.take(np.arange(half, len(part))), part.take(np.arange(half))]
        return refused

    def _reject(self, session: postgres.Connection, batch: Batch, rejects: list[BatchReject]) -> None:
        if not rejects:
            return
        # By place: one statement cannot keep the same record twice.
        waiting: dict[tuple[int, int], dict[str, Any]] = {}
        size = 0
        for reject in rejects:
            message = batch.messages[reject.at]
            partition, offset, key, payload = message.partition(), message.offset(), message.key(), message.value()
            waiting[partition, offset] = {
                "log_id": batch.chunks[partition].log,
                "partition": partition,
                "offset": offset,
                "reason": reject.reason,
                "detail": reject.detail,
                "key": key,
                "payload": payload,
            }
            size += len(key or b"") + len(payload or b"")
            if size > REJECTED_BYTES:
                self._keep(session, waiting.values())
                waiting, size = {}, 0
        if waiting:
            self._keep(session, waiting.values())

    @staticmethod
    def _keep(session: postgres.Connection, records: Iterable[dict[str, Any]]) -> None:
        # Bytes become base64.
        text = msgspec.json.encode(list(records)).decode()
        session.execute(postgres.query("sink_reject").encode(), {"topic": TOPIC, "records": text})


def latest(columns: ReadingColumns) -> ReadingColumns:
    """Of readings with equal keys only the last, in order of key."""
    if not len(columns):
        return columns
    device = columns.device_id.view(">u8").reshape(-1, 2)
    order = np.lexsort((np.arange(len(columns)), columns.metric_name, columns.published_at, device[:, 1], device[:, 0]))
    last = np.ones(len(order), np.bool_)
    later, former = order[1:], order[:-1]
    last[:-1] = (
        (columns.metric_name[later] != columns.metric_name[former])
        | (columns.published_at[later] != columns.published_at[former])
        | (device[later] != device[former]).any(axis=1)
    )
    return columns.take(order[last])


def reason_of(error: BaseException) -> str:
    """One line for people and for a counter's label."""
    if isinstance(error, PipelineError):
        return str(error)
    if isinstance(error, psycopg.Error):
        return postgres.one_line(error)
    return f"{type(error).__name__}: {error}"


def kind_of(error: BaseException) -> str:
    """A short label: the SQLSTATE if there is one."""
    if isinstance(error, psycopg.Error):
        return error.sqlstate or "connection"
    return "connection" if isinstance(error, PipelineError) else type(error).__name__
