"""Records of a topic by offset, and as fixed-width entries that can be compared with rows of the table."""

from __future__ import annotations

import hashlib
import struct
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import numpy as np
import numpy.typing as npt
from confluent_kafka import (
    TIMESTAMP_LOG_APPEND_TIME,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from metrics_pipeline.errors import RecordError, ServiceError
from metrics_pipeline.kafka import TIMEOUT_SECONDS, client_config, ends
from metrics_pipeline.metric import EPOCH, decode
from metrics_pipeline.postgres import Connection, query
from metrics_pipeline.settings import DEAD_LETTER_TOPIC, TOPIC, Settings
from metrics_pipeline.verification.comparison import NEVER
from metrics_pipeline.verification.spill import RECORD, Rows
from metrics_pipeline.verification.table_entries import reading

STALL_SECONDS = 60.0
"""How long the broker may send nothing before reading is given up."""

_EPOCH_MILLISECONDS: Final = int(EPOCH.timestamp() * 1000)
_TEXT_OID: Final = 25
_pack: Final = struct.Struct(">16sqhd16siqq").pack
_int32: Final = struct.Struct(">i").pack


@dataclass
class TopicReader:
    """Reads partitions of a topic between offsets, outside any consumer group.

    Attributes:
        settings: where the broker is.
        topic: what is read.
        low: the first offset there was, per partition read; it rises when retention deletes records meanwhile.
        holes: ranges of offsets between `low` and the end that hold no record; there are none without transactions.
    """

    settings: Settings
    topic: str
    low: dict[int, int] = field(default_factory=dict)
    holes: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def read(self, start: Mapping[int, int], stop: Mapping[int, int]) -> Iterator[list[Message]]:
        """Yield the records from `start` up to, but not including, `stop`, some thousands at a time.

        Raises:
            ServiceError: the broker sent an error, or nothing for a minute.
        """
        at = {partition: start[partition] for partition in start if start[partition] < stop[partition]}
        self.low = dict(start)
        if not at:
            return
        consumer = self._consumer()
        try:
            consumer.assign([TopicPartition(self.topic, partition, offset) for partition, offset in at.items()])
            heard = time.monotonic()
            while at:
                messages = consumer.consume(10_000, timeout=0.2)  # the last ones are waited for this long
                if messages:
                    heard = time.monotonic()
                elif time.monotonic() - heard > STALL_SECONDS:
                    raise ServiceError(
                        f"Kafka broker {self.settings.bootstrap_servers} sent no record of {self.topic} for "
                        f"{STALL_SECONDS:.0f} s, and partitions {sorted(at)} are not read to their end: "
                        "see `metrics-pipeline status`"
                    )
                batch = []
                for message in messages:
                    partition, offset = _place(message)
                    if partition not in at:
                        continue
                    if offset > at[partition]:
                        self._skipped(consumer, partition, at[partition], min(offset, stop[partition]))
                    if message.error() is None and offset < stop[partition]:
                        batch.append(message)
                        offset += 1
                    at[partition] = offset
                    if offset >= stop[partition]:
                        del at[partition]
                        consumer.pause([TopicPartition(self.topic, partition)])
                if batch:
                    yield batch
        except KafkaException as problem:
            raise self._refused(problem.args[0]) from problem
        finally:
            consumer.close()

    def one(self, partition: int, offset: int) -> Message | None:
        """The record at one offset; None when it is gone."""
        for batch in TopicReader(self.settings, self.topic).read({partition: offset}, {partition: offset + 1}):
            return batch[0]
        return None

    def ends(self) -> dict[int, tuple[int, int]]:
        """First offset and the offset after the last, per partition; empty when there is no such topic.

        Raises:
            ServiceError: the broker cannot be reached.
        """
        consumer = self._consumer()
        try:
            topic = consumer.list_topics(timeout=TIMEOUT_SECONDS).topics.get(self.topic)
            if topic is None or topic.error is not None:
                return {}
            return {number: ends(consumer, TopicPartition(self.topic, number)) for number in sorted(topic.partitions)}
        except KafkaException as problem:
            raise self._refused(problem.args[0]) from problem
        finally:
            consumer.close()

    def _consumer(self) -> Consumer:
        return Consumer(
            client_config(self.settings)
            | {
                # Needed by the client though it never joins: partitions are assigned by hand and nothing is committed.
                "group.id": "metrics-pipeline-verify",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "enable.partition.eof": True,
                "check.crcs": True,
                "fetch.wait.max.ms": 100,
                "max.partition.fetch.bytes": 4 * 2**20,
                "queued.max.messages.kbytes": 32 * 1024,
            }
        )

    def _skipped(self, consumer: Consumer, partition: int, first: int, after: int) -> None:
        """Note why there are no records in a range of offsets: deleted meanwhile, or never there."""
        low, _ = ends(consumer, TopicPartition(self.topic, partition))
        if low > first:
            self.low[partition] = after
        else:
            self.holes.setdefault(partition, []).append((first, after))

    def _refused(self, error: KafkaError) -> ServiceError:
        return ServiceError(
            f"reading {self.topic} from Kafka broker {self.settings.bootstrap_servers} failed: {error.str()}; "
            "see `metrics-pipeline status`"
        )


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
                    partition, offset = _place(message)
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


def dead_letters(settings: Settings) -> dict[int, npt.NDArray[np.int64]]:
    """Offsets of the topic that stand among the dead letters, per partition."""
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
            if topic == TOPIC.encode() and partition and offset:
                offsets.setdefault(int(partition), array("q")).append(int(offset))
    return _sorted(offsets)


@dataclass(frozen=True)
class Rejected:
    """Offsets of the topic that the COPY sink rejected, sorted, per partition.

    Attributes:
        every: all of them.
        waiting: those that had not been published again.
    """

    every: Mapping[int, npt.NDArray[np.int64]]
    waiting: Mapping[int, npt.NDArray[np.int64]]


def rejected(connection: Connection, before: datetime) -> Rejected:
    """What stands in `rejected_metrics`, in the connection's transaction.

    Args:
        connection: of a role that may read.
        before: a record published again before this counts as such.

    Raises:
        ServiceError: there is no such table, or PostgreSQL broke off.
    """
    every: dict[int, array[int]] = {}
    waiting: dict[int, array[int]] = {}
    with reading("rejected_metrics"), connection.cursor("rejects", binary=True) as cursor:
        cursor.itersize = 10_000
        cursor.execute(query("verify_rejects"), {"topic": TOPIC, "before": before})
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


def _place(message: Message) -> tuple[int, int]:
    """Partition and offset of a record, or of the end that a partition was read to."""
    error, partition, offset = message.error(), message.partition(), message.offset()
    if error is not None and error.name() != "_PARTITION_EOF" and not error.retriable():
        raise KafkaException(error)
    return (-1, -1) if partition is None or offset is None else (partition, offset)


def tags_digest(tags: list[str]) -> bytes:
    """The MD5 of PostgreSQL's binary form of a `text[]`: what `md5(array_send(tags))` gives."""
    if tags:
        elements = [text.encode() for text in tags]
        head = struct.pack(">iiiii", 1, 0, _TEXT_OID, len(tags), 1)
        data = head + b"".join(_int32(len(element)) + element for element in elements)
    else:
        data = struct.pack(">iii", 0, 0, _TEXT_OID)
    return hashlib.md5(data, usedforsecurity=False).digest()
