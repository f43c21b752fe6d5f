"""What a benchmark stores: readings in the topic, and what the table must hold once they are drained."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from math import isqrt
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from metrics_pipeline import kafka
from metrics_pipeline.copy_sink import batch as sinking
from metrics_pipeline.copy_sink import copy_format
from metrics_pipeline.errors import RecordError, ServiceError
from metrics_pipeline.metric import connect_schema_key, connect_schema_value
from metrics_pipeline.producer.generator import Generator
from metrics_pipeline.producer.publisher import producer_config
from metrics_pipeline.settings import TOPIC, Settings
from metrics_pipeline.topic import TopicReader
from metrics_pipeline.verification.spill import RECORD, Rows, Spill, buckets_for, mixed
from metrics_pipeline.verification.topic_entries import TopicDecoder
from metrics_pipeline.verification.verify import ShowProgress

BASELINE_TOPIC: Final = "bench-baseline"
"""The same readings, each message with its schema inside."""

ROUND: Final = timedelta(milliseconds=250)
"""How far the simulated clock moves from round to round."""

WAIT_SECONDS: Final = 120.0

Pair = tuple[bytes, bytes]


# --- Into the topic ----------------------------------------------------------------------------------------------


def simulated(settings: Settings, count: int, end: datetime) -> Iterator[list[Pair]]:
    """Exactly `count` readings of the simulated fleet with unique keys, all taken before `end`."""
    now = end - ROUND * (count // settings.producer_min_metrics + 2)
    generator = Generator(settings, now)
    while count > 0:
        now += ROUND
        readings = generator.round(now)[:count]
        count -= len(readings)
        if readings:
            yield readings


class Stream:
    """The readings of a simulated fleet, so many at a time: the next ones follow where the last ones ended.

    Args:
        settings: of the fleet.
        begin: every reading is taken after it.
        round_: how far the simulated clock moves from round to round.
    """

    def __init__(self, settings: Settings, begin: datetime, round_: timedelta) -> None:
        self._generator = Generator(settings, begin)
        self.now = begin
        """The simulated time. What has not been taken yet is not older than one round."""
        self._round = round_
        self._left: list[Pair] = []

    def take(self, count: int) -> Iterator[list[Pair]]:
        """Exactly `count` readings, oldest first."""
        while count > 0:
            if not self._left:
                self.now += self._round
                self._left = self._generator.round(self.now)
            taken, self._left = self._left[:count], self._left[count:]
            count -= len(taken)
            if taken:
                yield taken


def rounds_of(settings: Settings, count: int) -> int:
    """In how many rounds `count` readings are there at the latest, whatever the sizes of the rounds turn out to be."""
    likely = int(count / mean_round(settings)) + 1
    return likely + 3 * isqrt(likely) + 10


def mean_round(settings: Settings) -> float:
    """Readings of a round."""
    return (settings.producer_min_metrics + settings.producer_max_metrics) / 2


def spoilt(rounds: Iterable[list[Pair]], every: int) -> Iterator[list[Pair]]:
    """The same readings, of which one in `every` is bad: no JSON, an unknown metric, or text for a value, in turn."""
    at = 0
    for readings in rounds:
        pairs = list(readings)
        for number in range(-at % every, len(pairs), every):
            key, value = pairs[number]
            how = (at + number) // every % 3
            if how == 0:
                value = value[:-1]
            elif how == 1:
                value = re.sub(rb'"metric_name":[0-9]+', b'"metric_name":70000', value)
            else:
                value = re.sub(rb'"value":[^,]+', b'"value":"abc"', value)
            pairs[number] = key, value
        at += len(readings)
        yield pairs


def with_schema(readings: Iterable[Pair]) -> list[Pair]:
    """The same messages as JsonConverter takes them without a schema of its own: with the schema in each."""
    return [(_KEY_HEAD + key + b"}", _VALUE_HEAD + value + b"}") for key, value in readings]


def _head(schema: Mapping[str, Any]) -> bytes:
    return f'{{"schema":{json.dumps(schema, separators=(",", ":"))},"payload":'.encode()


_KEY_HEAD: Final = _head(connect_schema_key())
_VALUE_HEAD: Final = _head(connect_schema_value())


def fill(
    settings: Settings, rounds: Iterable[list[Pair]], count: int, progress: ShowProgress, *, baseline: bool = False
) -> None:
    """Publish readings to the topic, and with `baseline` the same ones to its topic; returns when the broker has all.

    Raises:
        ServiceError: the broker refused, or holds another number of records than it was given.
    """
    topics = [TOPIC, BASELINE_TOPIC] if baseline else [TOPIC]
    before = {topic: _held(settings, topic) for topic in topics}
    producer = Producer(producer_config(settings) | {"linger.ms": 50, "queue.buffering.max.messages": 200_000})
    done = 0
    try:
        for readings in rounds:
            _hand_over(producer, TOPIC, readings)
            if baseline:
                _hand_over(producer, BASELINE_TOPIC, with_schema(readings))
            done += len(readings)
            progress("filling the topic", done, count)
        left = producer.flush(WAIT_SECONDS)
    finally:
        producer.close()
    for topic in topics:
        held = _held(settings, topic) - before[topic]
        if left or held != count:
            raise ServiceError(
                f"topic {topic} took {held:,} of {count:,} records: see `metrics-pipeline logs broker`, and whether "
                f"TOPIC_RETENTION_BYTES ({settings.topic_retention_bytes:,}) and the disk have room for them"
            )


def _hand_over(producer: Producer, topic: str, readings: list[Pair]) -> None:
    batch: list[dict[str, Any]] = [{"key": key, "value": value} for key, value in readings]
    while batch:
        if producer.produce_batch(topic, batch) == len(batch):
            break
        errors = [message.get("_error") for message in batch]
        for error in errors:
            if error is not None and error.code() != KafkaError._QUEUE_FULL:  # noqa: SLF001  # librdkafka's own codes
                raise ServiceError(f"the broker refused a message for topic {topic}: {error.str()}")
        batch = [message for message, error in zip(batch, errors, strict=True) if error is not None]
        for message in batch:
            del message["_error"]
        producer.poll(0.05)
    producer.poll(0)


def _held(settings: Settings, topic: str) -> int:
    return sum(high - low for low, high in TopicReader(settings, topic).ends().values())


def make_baseline_topic(settings: Settings) -> None:
    """A new, empty topic for the baseline, with as many partitions as the real one."""
    drop_baseline_topic(settings)
    spec = kafka.topic_spec(settings)
    topic = NewTopic(BASELINE_TOPIC, spec.partitions, spec.replication_factor, config=dict(spec.config))
    _settle(settings, lambda admin: admin.create_topics([topic]), there=True)
    kafka.await_topic(settings, BASELINE_TOPIC, spec.partitions)


def drop_baseline_topic(settings: Settings) -> None:
    """Delete the baseline's topic if there is one."""
    if TopicReader(settings, BASELINE_TOPIC).ends():
        _settle(settings, lambda admin: admin.delete_topics([BASELINE_TOPIC]), there=False)


def _settle(settings: Settings, ask: Callable[[AdminClient], Mapping[str, Any]], *, there: bool) -> None:
    admin = AdminClient(kafka.client_config(settings))
    try:
        for future in ask(admin).values():
            future.result()
        for _ in range(200):
            if (BASELINE_TOPIC in admin.list_topics(timeout=kafka.TIMEOUT_SECONDS).topics) == there:
                return
            admin.poll(0.1)
    except KafkaException as problem:
        raise ServiceError(f"topic {BASELINE_TOPIC}: the broker refused: {problem.args[0].str()}") from problem
    raise ServiceError(f"topic {BASELINE_TOPIC}: the broker did not {'make' if there else 'delete'} it in time")


def empty_topic(settings: Settings) -> dict[int, int]:
    """Delete every record of the topic, and return the offset of the next one by partition.

    Raises:
        ServiceError: the broker refused.
    """
    ends = {partition: high for partition, (_, high) in kafka.watermarks(settings).items()}
    delete_before(settings, ends)
    return ends


def delete_before(settings: Settings, offsets: Mapping[int, int]) -> None:
    """Delete the records of the topic before these offsets; the broker gives their disk back within two minutes.

    Raises:
        ServiceError: the broker refused.
    """
    admin = AdminClient(kafka.client_config(settings))
    try:
        places = [TopicPartition(TOPIC, partition, offset) for partition, offset in offsets.items()]
        for future in admin.delete_records(places).values():
            future.result()
    except KafkaException as problem:
        raise ServiceError(f"topic {TOPIC} cannot be emptied: {problem.args[0].str()}") from problem


# --- What the table must hold ------------------------------------------------------------------------------------


def checksum(entries: Rows) -> int:
    """A number that depends on every key, value and tags digest of `spill` entries, but not on their order.

    Checksums of parts add up, modulo 2^64, to that of the whole.
    """
    sums = np.zeros(len(entries), np.uint64)
    for words in _words(entries):
        sums = mixed(sums ^ words)
    return int(sums.sum(dtype=np.uint64))


def _words(entries: Rows) -> Iterator[Any]:
    for part in (entries["key"]["device_id"], entries["tags"]):
        pairs = np.ascontiguousarray(part).view("<u8").reshape(-1, 2)
        yield from (pairs[:, 0], pairs[:, 1])
    yield entries["key"]["published_at"].astype(np.int64).view(np.uint64)
    yield entries["key"]["metric_name"].astype(np.int64).view(np.uint64)
    yield entries["value"].astype(np.uint64)


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Rows of one partition, encoded for binary COPY, in the file of a `Reference`."""

    partition: int
    start: int
    size: int
    rows: int


@dataclass
class Reference:
    """All records of the topic: to compare the table with, and encoded for binary COPY. Kept on disk until closed.

    Attributes:
        records: to compare with.
        low: first offset by partition.
        ends: offset after the last record by partition.
        count: of good records.
        bad: how many others there are, which must become rejects.
        checksum: of all good ones.
        batches: in the order of the topic; each a partition's.
    """

    records: Spill
    low: Mapping[int, int]
    ends: Mapping[int, int]
    count: int = 0
    bad: int = 0
    checksum: int = 0
    batches: list[EncodedRows] = field(default_factory=list)
    _file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.records.close()
        self._file.close()

    def data(self, batch: EncodedRows) -> bytes:
        """What COPY takes for a batch. May be called from several threads."""
        return os.pread(self._file.fileno(), batch.size, batch.start)

    def keep(self, partition: int, messages: Sequence[Any]) -> None:
        """Append a batch."""
        data = encoded(messages)
        start = self.batches[-1].start + self.batches[-1].size if self.batches else 0
        self._file.write(data)
        self._file.flush()
        self.batches.append(EncodedRows(partition, start, len(data), len(messages)))


def read_reference(
    settings: Settings,
    folder: Path,
    progress: ShowProgress,
    *,
    batch_rows: int = 0,
    start: Mapping[int, int] | None = None,
    bad: int = 0,
) -> Reference:
    """Read the topic.

    Args:
        settings: where the broker is.
        folder: where the files go, without a name, so that nothing stays behind.
        progress: told how far it is.
        batch_rows: rows of a batch; the last ones of each partition have fewer. 0 for no batches.
        start: first offset by partition; default: the first one there is.
        bad: how many records are not of the wire format on purpose; then there can be no batches.

    Raises:
        ServiceError: the broker sends no more, or other records than `bad` are not of the wire format.
    """
    marks = kafka.watermarks(settings)
    low = {partition: (start or {}).get(partition, first) for partition, (first, _) in marks.items()}
    ends = {partition: end for partition, (_, end) in marks.items()}
    total = sum(ends.values()) - sum(low.values())
    reference = Reference(Spill(folder, RECORD, buckets_for(total)), low, ends)
    reference._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, SLF001  # closed with the reference
    decoder = TopicDecoder()
    waiting: dict[int, list[Any]] = {partition: [] for partition in marks}
    for messages in TopicReader(settings, TOPIC).read(low, ends):
        entries = decoder.entries(messages)
        reference.bad += len(messages) - len(entries)
        if reference.bad > bad:
            raise ServiceError(f"topic {TOPIC} holds records that are not of the wire format: empty it first")
        reference.records.append(entries)
        reference.count += len(entries)
        reference.checksum = (reference.checksum + checksum(entries)) % 2**64
        for message in messages if batch_rows else ():
            partition = message.partition() or 0
            waiting[partition].append(message)
            if len(waiting[partition]) == batch_rows:
                reference.keep(partition, waiting[partition])
                waiting[partition].clear()
        progress("reading the topic", reference.count + reference.bad, total)
    for partition, left in waiting.items():
        if left:
            reference.keep(partition, left)
    return reference


@dataclass(frozen=True, slots=True)
class Sum:
    """How many readings, and the checksum of all of them; sums of parts add up.

    Attributes:
        count: of the readings.
        checksum: as `checksum` has it.
    """

    count: int = 0
    checksum: int = 0

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.count + other.count, (self.checksum + other.checksum) % 2**64)


def sum_of(settings: Settings, start: Mapping[int, int], stop: Mapping[int, int]) -> Sum:
    """The sum of the topic's readings between offsets, by the COPY sink's decoder, which is faster than `read_reference`.

    Raises:
        ServiceError: the broker sends no more.
        RecordError: a record is not of the wire format.
    """
    decoder, found = sinking.BatchDecoder(), Sum()
    read: Iterator[Sequence[Any]] = TopicReader(settings, TOPIC).read(start, stop)
    for messages in read:
        found += _sum_of(decoder.decode(messages, {}))
    return found


def _sum_of(batch: sinking.Batch) -> Sum:
    for reject in batch.rejects:
        raise RecordError(reject.reason, reject.detail)
    columns = batch.columns
    entries = np.zeros(len(columns), RECORD)
    entries["key"]["device_id"] = columns.device_id.view("V16")[:, 0]
    entries["key"]["published_at"] = columns.published_at
    entries["key"]["metric_name"] = columns.metric_name
    entries["value"] = columns.value.astype(np.float64).view(np.uint64)
    digests = b"".join(hashlib.md5(tags, usedforsecurity=False).digest() for tags in batch.tags)
    entries["tags"] = np.frombuffer(digests, "V16")[columns.tags]
    return Sum(len(columns), checksum(entries))


def encoded(messages: Sequence[Any]) -> bytes:
    """The data of a binary COPY of these messages' readings, as the COPY sink would send it.

    Raises:
        RecordError: one is not of the wire format.
    """
    batch = sinking.BatchDecoder().decode(messages, {})
    for reject in batch.rejects:
        raise RecordError(reject.reason, reject.detail)
    return b"".join(copy_format.copy_rows(batch.columns, batch.tags))
