"""Records of a topic by offset, and as fixed-width entries that can be compared with rows of the table."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import numpy as np
import numpy.typing as npt
from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, Message

from metrics_pipeline.errors import RecordError
from metrics_pipeline.metric import EPOCH, decode
from metrics_pipeline.postgres import Connection, query
from metrics_pipeline.settings import DEAD_LETTER_TOPIC, TOPIC, Settings
from metrics_pipeline.topic import TopicReader, place_of
from metrics_pipeline.verification.comparison import NEVER
from metrics_pipeline.verification.spill import RECORD, Rows
from metrics_pipeline.verification.table_entries import reading

_EPOCH_MILLISECONDS: Final = int(EPOCH.timestamp() * 1000)
_TEXT_OID: Final = 25
_pack: Final = struct.Struct(">16sqhd16siqq").pack
_int32: Final = struct.Struct(">i").pack


@dataclass
class TopicDecoder:
    """Turns messages into `spill.RECORD` entries and counts what is none.

    Attributes:
        tombstones: messages without a value, which the sinks skip.
        undecodable: offsets of messages that are not the wire format, per partition.
        reasons: how many there are of each reason.
    """

    tombstones: int = 0
    undecodable: dict[int, array[int]] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    _digests: dict[tuple[str, ...], bytes] = field(default_factory=dict)

    def entries(self, messages: Iterable[Message]) -> Rows:
        """The valid messages, in their order."""
        packed = []
        for message in messages:
            try:
                record = decode(message.key(), message.value())
            except RecordError as error:
                if error.reason == "tombstone":
                    self.tombstones += 1
                else:
                    partition, offset = place_of(message)
                    self.undecodable.setdefault(partition, array("q")).append(offset)
                    self.reasons[error.reason] = self.reasons.get(error.reason, 0) + 1
                continue
            kind, milliseconds = message.timestamp()
            since = record.published_at - EPOCH
            packed.append(
                _pack(
                    record.device_id.bytes,
                    (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds,
                    record.metric_name,
                    record.value,
                    self._digest(record.tags),
                    message.partition(),
                    message.offset(),
                    # A producer's clock says nothing about when the record arrived.
                    (milliseconds - _EPOCH_MILLISECONDS) * 1000 if kind == TIMESTAMP_LOG_APPEND_TIME else NEVER,
                )
            )
        return np.frombuffer(b"".join(packed), RECORD)

    def _digest(self, tags: list[str]) -> bytes:
        known = tuple(tags)
        digest = self._digests.get(known)
        if digest is None:
            if len(self._digests) >= 100_000:
                self._digests.clear()
            digest = self._digests[known] = tags_digest(tags)
        return digest


def dead_letters(settings: Settings, since: datetime | None = None) -> dict[int, npt.NDArray[np.int64]]:
    """Offsets of the topic that stand among the dead letters, per partition.

    Args:
        settings: where the broker is.
        since: those from before this time are of a former log.
    """
    begin = since.timestamp() * 1000 if since else 0.0
    reader = TopicReader(settings, DEAD_LETTER_TOPIC)
    ends = reader.ends()
    offsets: dict[int, array[int]] = {}
    for messages in reader.read(
        {partition: low for partition, (low, _) in ends.items()},
        {partition: high for partition, (_, high) in ends.items()},
    ):
        for message in messages:
            headers = dict(message.headers() or [])
            topic, partition, offset = (
                headers.get(f"__connect.errors.{name}") for name in ("topic", "partition", "offset")
            )
            # What Connect did not write says nothing about a record of ours.
            if topic == TOPIC.encode() and partition and offset and message.timestamp()[1] >= begin:
                offsets.setdefault(int(partition), array("q")).append(int(offset))
    return _sorted(offsets)


@dataclass(frozen=True)
class Rejected:
    """Offsets of the topic that were rejected, sorted, per partition.

    Attributes:
        every: all of them.
        waiting: those that had not been published again.
    """

    every: Mapping[int, npt.NDArray[np.int64]]
    waiting: Mapping[int, npt.NDArray[np.int64]]


def rejected(connection: Connection, log: str, before: datetime) -> Rejected:
    """What stands in `rejected_metrics` of one log, in the connection's transaction.

    Args:
        connection: of a role that may read.
        log: the log that is read.
        before: a record published again before this counts as such.

    Raises:
        ServiceError: there is no such table, or PostgreSQL broke off.
    """
    every: dict[int, array[int]] = {}
    waiting: dict[int, array[int]] = {}
    with reading("rejected_metrics"), connection.cursor("rejects", binary=True) as cursor:
        cursor.itersize = 10_000
        cursor.execute(query("verify_rejects"), {"topic": TOPIC, "log_id": log, "before": before})
        for partition, offset, replayed in cursor:
            every.setdefault(partition, array("q")).append(offset)
            if not replayed:
                waiting.setdefault(partition, array("q")).append(offset)
    return Rejected(_sorted(every), _sorted(waiting))


def _sorted(offsets: Mapping[int, array[int]]) -> dict[int, npt.NDArray[np.int64]]:
    return {partition: np.unique(np.frombuffer(numbers, np.int64)) for partition, numbers in offsets.items()}


def together(*parts: Mapping[int, npt.NDArray[np.int64]]) -> dict[int, npt.NDArray[np.int64]]:
    """Sorted offsets per partition that stand in any of the parts."""
    partitions = sorted({partition for part in parts for partition in part})
    none = np.empty(0, np.int64)
    return {number: np.unique(np.concatenate([part.get(number, none) for part in parts])) for number in partitions}


def tags_digest(tags: list[str]) -> bytes:
    """The MD5 of PostgreSQL's binary form of a `text[]`: what `md5(array_send(tags))` gives."""
    if tags:
        elements = [text.encode() for text in tags]
        head = struct.pack(">iiiii", 1, 0, _TEXT_OID, len(tags), 1)
        data = head + b"".join(_int32(len(element)) + element for element in elements)
    else:
        data = struct.pack(">iii", 0, 0, _TEXT_OID)
    return hashlib.md5(data, usedforsecurity=False).digest()
