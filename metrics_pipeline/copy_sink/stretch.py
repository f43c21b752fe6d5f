"""Stretches of the topic, read outside any group and decoded strictly: what waits for the connector, and what has moved.

Not by what `verify` reads with: a record that this left out would be left out there, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from confluent_kafka import Consumer, KafkaException, TopicPartition

from metrics_pipeline import kafka
from metrics_pipeline.copy_sink.batch import Batch, BatchDecoder, Chunk
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import TOPIC, Settings

BATCH_RECORDS: Final = 50_000
BATCH_BYTES: Final = 16 << 20
READ_AT_ONCE: Final = 5000
SILENCE_SECONDS: Final = 20.0
"""How long the broker may send nothing."""

Place = tuple[int, int]
"""The first offset of a stretch, and the one behind it."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a quarantine did with a partition.

    Attributes:
        partition: its number.
        first: the first offset taken.
        next: the offset behind the last one.
        stored: records that became rows.
        rejected: records that stand in `rejected_metrics`.
    """

    partition: int
    first: int
    next: int
    stored: int
    rejected: int

    def __str__(self) -> str:
        return (
            f"partition {self.partition}, offsets {self.first} to {self.next - 1}: "
            f"{self.stored:,} stored, {self.rejected:,} rejected"
        )


def batches(
    settings: Settings,
    places: Mapping[int, Place],
    log: str,
    most: int | None = None,
    keep: Callable[[list[Any]], list[Any]] = lambda messages: messages,
) -> Iterator[Batch]:
    """The records at these places, by partition; the chunks of a partition follow each other without a gap, unless some are left out.

    Args:
        settings: where the broker is.
        places: what is read.
        log: which log that is.
        most: records of each partition that are read at most.
        keep: which messages, of some that came together, are not left out.

    Raises:
        ServiceError: the broker sends an error, or nothing for a while.
    """
    start = {number: first for number, (first, _) in places.items()}
    stop = {number: end if most is None else min(end, first + most) for number, (first, end) in places.items()}
    decoder, at, waiting, size = BatchDecoder(), dict(start), list[Any](), 0

    def batch() -> Batch:
        last = {message.partition(): message.offset() + 1 for message in waiting}
        chunks = {number: Chunk(number, 0, at[number], behind, log) for number, behind in last.items()}
        at.update(last)
        return decoder.decode(waiting, chunks)

    for consumed in _records(settings, start, stop):
        messages = keep(consumed)
        waiting += messages
        size += sum(len(message.value() or b"") + len(message.key() or b"") for message in messages)
        if len(waiting) >= BATCH_RECORDS or size >= BATCH_BYTES:
            yield batch()
            waiting, size = [], 0
    if waiting:
        yield batch()


def _records(settings: Settings, start: Mapping[int, int], stop: Mapping[int, int]) -> Iterator[list[Any]]:
    left = {number: offset for number, offset in stop.items() if start[number] < offset}
    if not left:
        return
    consumer = Consumer(
        kafka.client_config(settings)
        | {
            # Needed by the client, though it joins no group and commits nothing.
            "group.id": "metrics-pipeline-quarantine",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 100,
            "queued.max.messages.kbytes": 16 << 10,
        }
    )
    try:
        consumer.assign([TopicPartition(TOPIC, number, start[number]) for number in left])
        heard = time.monotonic()
        while left:
            messages: list[Any] = consumer.consume(READ_AT_ONCE, timeout=0.2)
            if messages:
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENCE_SECONDS:
                raise ServiceError(
                    f"Kafka broker {settings.bootstrap_servers} sent no record of {TOPIC} for {SILENCE_SECONDS:.0f} s: "
                    "see `metrics-pipeline status`"
                )
            good = [message for message in messages if _is_wanted(message, left)]
            if good:
                yield good
            # The others' records are what is asked for from now on.
            consumer.pause([TopicPartition(TOPIC, number) for number in start.keys() - left.keys()])
    except KafkaException as error:
        raise ServiceError(
            f"reading {TOPIC} from Kafka broker {settings.bootstrap_servers} failed: {error.args[0].str()}: "
            "see `metrics-pipeline status`"
        ) from error
    finally:
        consumer.close()


def _is_wanted(message: Any, left: dict[int, int]) -> bool:
    """Whether it is a record of a stretch; a partition that has come to its end is struck off.

    Raises:
        KafkaException: it is an error of the broker.
    """
    number, error = message.partition(), message.error()
    if error is not None:
        if error.name() == "_PARTITION_EOF":
            left.pop(number, None)  # what lies behind the last record is none
        elif not error.retriable():
            raise KafkaException(error)
        return False
    if number not in left:
        return False
    inside = bool(message.offset() < left[number])
    if message.offset() + 1 >= left[number]:
        del left[number]
    return inside
