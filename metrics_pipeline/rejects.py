"""The records that were rejected, by the COPY sink or by a quarantine: looked at, published again when they have become valid, and deleted when they are old."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import psycopg

from metrics_pipeline import kafka, postgres
from metrics_pipeline.errors import RecordError, ServiceError, SettingError
from metrics_pipeline.metric import decode
from metrics_pipeline.producer.endpoints import Snapshot
from metrics_pipeline.producer.publisher import Message
from metrics_pipeline.producer.run import RunReport, run_producer
from metrics_pipeline.settings import TOPIC, Settings

PAGE: Final = 100
"""Records read at a time: each of them may have a megabyte."""
MARKED_AT_ONCE: Final = 10_000
SHOWN_BYTES: Final = 2000


@dataclass(frozen=True, slots=True)
class Reject:
    """A rejected record.

    Attributes:
        partition: of the topic.
        offset: in the partition.
        reason: a code of `metric.REASONS`, or why the database refused it.
        detail: what was wrong with which field.
        rejected_at: when.
        replayed_at: when it was published again; None while it waits.
        size: bytes of the payload; None when it has none.
    """

    partition: int
    offset: int
    reason: str
    detail: str
    rejected_at: datetime
    replayed_at: datetime | None
    size: int | None

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "partition": self.partition,
            "offset": self.offset,
            "reason": self.reason,
            "detail": self.detail,
            "rejected_at": self.rejected_at.isoformat(),
            "replayed_at": self.replayed_at.isoformat() if self.replayed_at else None,
            "bytes": self.size,
        }


@dataclass(frozen=True, slots=True)
class Recent:
    """What was rejected lately: how many, by reason, and the newest ones."""

    count: int
    reasons: Mapping[str, int]
    newest: list[Reject]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rejected records: of one reason, at one place, or both; all when neither is given."""

    reason: str | None = None
    partition: int | None = None
    offset: int | None = None


@dataclass
class Replayed:
    """What a replay did.

    Attributes:
        published: records in the topic once more.
        bad: records that are no valid reading and stay, by reason.
        report: of the producer run.
    """

    published: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    report: RunReport | None = None


def newest(settings: Settings, *, reason: str | None = None, limit: int = 20, every: bool = False) -> list[Reject]:
    """The records rejected last, newest first; with `every` also those that were published again.

    Raises:
        ServiceError: PostgreSQL cannot be used, or the table is missing.
    """
    values = {"topic": TOPIC, "reason": reason, "every": every, "limit": limit}
    with _table(settings) as connection:
        return [Reject(*row) for row in connection.execute(postgres.query("rejects_list"), values)]


def by_reason(
    settings: Settings, *, reason: str | None = None, every: bool = False, since: float | None = None
) -> dict[str, int]:
    """How many records were rejected (within the last `since` seconds), by reason, the most frequent one first.

    Raises:
        ServiceError: PostgreSQL cannot be used, or the table is missing.
    """
    values = {"topic": TOPIC, "reason": reason, "every": every, "since": since}
    with _table(settings) as connection:
        return dict(connection.execute(postgres.query("rejects_by_reason"), values).fetchall())


def recent(settings: Settings, seconds: float, limit: int) -> Recent:
    """What was rejected within the last seconds, and where the newest ones stand.

    Raises:
        ServiceError: PostgreSQL cannot be used, or the table is missing.
    """
    reasons = by_reason(settings, every=True, since=seconds)
    return Recent(sum(reasons.values()), reasons, newest(settings, limit=min(limit, sum(reasons.values())), every=True))


def one(settings: Settings, partition: int, offset: int) -> tuple[Reject, bytes | None, bytes | None]:
    """A rejected record, its key and its payload; of several logs, the one that was rejected last.

    Raises:
        SettingError: there is none at this place.
        ServiceError: PostgreSQL cannot be used, or the table is missing.
    """
    values = {"topic": TOPIC, "partition": partition, "offset": offset}
    with _table(settings) as connection:
        row = connection.execute(postgres.query("rejects_show"), values, binary=True).fetchone()
    if row is None:
        raise SettingError(
            f"no record of partition {partition}, offset {offset} was rejected: see `metrics-pipeline rejects list --all`"
        )
    key, payload = row[6:]
    size = None if payload is None else len(payload)
    return Reject(row[0], row[1], row[2], row[3], row[4], row[5], size), key, payload


def replay(
    settings: Settings,
    selection: Selection,
    *,
    stop: threading.Event | None = None,
    on_progress: Callable[[Snapshot], None] | None = None,
    **options: Any,
) -> Replayed:
    """Publish again the rejected records that have become valid readings, and note it when all are acknowledged.

    Those that the sink refuses again are rejected at their new place.

    Args:
        settings: where PostgreSQL and the broker are.
        selection: which of those that wait.
        stop: set it to end early.
        on_progress: called about every second.
        options: further arguments of `run_producer`.

    Raises:
        PipelineError: as `run_producer` does. Nothing is noted then: another replay publishes the same records again,
            which changes no row.
    """
    result = Replayed()
    logs: list[str] = []
    partitions, offsets = array("i"), array("q")

    def source() -> Iterator[list[Message]]:
        for page in _pages(settings, selection):
            messages: list[Message] = []
            for log, partition, offset, key, payload in page:
                try:
                    decode(key, payload)
                except RecordError as error:
                    result.bad[error.reason] = result.bad.get(error.reason, 0) + 1
                    continue
                messages.append((key, payload))
                logs.append(log)
                partitions.append(partition)
                offsets.append(offset)
            if messages:
                yield messages

    result.report = run_producer(settings, source(), kind="replay", stop=stop, on_progress=on_progress, **options)
    # A run that was stopped took what it did not publish from the source, too.
    if result.report.clean and result.report.acknowledged == len(offsets):
        result.published = len(offsets)
        _mark(settings, logs, partitions, offsets)
    return result


def purge(settings: Settings, before: datetime) -> tuple[int, int]:
    """Delete rejected records from before a moment, except those whose record the topic still holds.

    While the topic holds the record, the table is what says why it is not stored: `verify` looks it up.

    Returns:
        How many were deleted, and how many of that age were kept.

    Raises:
        ServiceError: PostgreSQL or the broker cannot be used.
    """
    low = {partition: first for partition, (first, _) in kafka.watermarks(settings).items()}
    log = kafka.topic_log(settings).id
    values = {"topic": TOPIC, "log_id": log, "partitions": list(low), "lows": list(low.values()), "before": before}
    with _table(settings, "metrics_owner") as connection:
        deleted = connection.execute(postgres.query("rejects_purge"), values).rowcount
        kept = connection.execute(
            "SELECT count(*) FROM rejected_metrics WHERE topic = %s AND rejected_at < %s", [TOPIC, before]
        ).fetchone()
    return deleted, kept[0] if kept else 0


def printable(data: bytes | None, limit: int = SHOWN_BYTES) -> str:
    """Bytes of anybody as text that does nothing to a terminal: what is not printable is escaped, what is long is cut."""
    if data is None:
        return "null"
    text = data[:limit].decode("utf-8", "backslashreplace")
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
    return shown + (f"… ({len(data) - limit:,} more bytes)" if len(data) > limit else "")


def _pages(settings: Settings, selection: Selection) -> Iterator[list[tuple[Any, ...]]]:
    """What waits, some records at a time; each page is a transaction of its own, so that nothing is held up meanwhile."""
    log, partition, offset = "", -1, -1
    with _table(settings) as connection:
        (begun,) = connection.execute("SELECT clock_timestamp()").fetchone() or (None,)
        while True:
            values = {
                "topic": TOPIC,
                "log_id": log,
                "partition": partition,
                "offset": offset,
                "begun": begun,
                "reason": selection.reason,
                "only_partition": selection.partition,
                "only_offset": selection.offset,
                "limit": PAGE,
            }
            page = connection.execute(postgres.query("rejects_page"), values, binary=True).fetchall()
            if not page:
                return
            log, partition, offset = page[-1][:3]
            yield page


def _mark(settings: Settings, logs: list[str], partitions: array[int], offsets: array[int]) -> None:
    with _table(settings, "metrics_writer") as connection:
        for start in range(0, len(offsets), MARKED_AT_ONCE):
            part = slice(start, start + MARKED_AT_ONCE)
            values = {
                "topic": TOPIC,
                "logs": logs[part],
                "partitions": list(partitions[part]),
                "offsets": list(offsets[part]),
            }
            connection.execute(postgres.query("rejects_mark"), values)


@contextmanager
def _table(settings: Settings, role: Any = "metrics_reader") -> Iterator[postgres.Connection]:
    with postgres.connect(settings, role, autocommit=True) as connection:
        try:
            yield connection
        except psycopg.errors.UndefinedTable as error:
            raise ServiceError("table rejected_metrics does not exist: run `metrics-pipeline migrate up`") from error
        except psycopg.Error as error:
            raise ServiceError(
                f"the rejected records cannot be used: {postgres.one_line(error)}: see `metrics-pipeline status`"
            ) from error
