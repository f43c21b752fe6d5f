"""Records of a topic between offsets, read outside any consumer group."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from metrics_pipeline.errors import ServiceError
from metrics_pipeline.kafka import TIMEOUT_SECONDS, client_config, ends
from metrics_pipeline.settings import Settings

STALL_SECONDS = 60.0
"""How long the broker may send nothing before reading is given up."""


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
                    partition, offset = place_of(message)
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


def place_of(message: Message) -> tuple[int, int]:
    """Partition and offset of a record, or of the end that a partition was read to.

    Raises:
        KafkaException: the message is an error of the broker.
    """
    error, partition, offset = message.error(), message.partition(), message.offset()
    if error is not None and error.name() != "_PARTITION_EOF" and not error.retriable():
        raise KafkaException(error)
    return (-1, -1) if partition is None or offset is None else (partition, offset)
