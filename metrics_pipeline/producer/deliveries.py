"""Delivery reports, counted: what the broker acknowledged and where, what failed, and what nobody can know."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from confluent_kafka import KafkaError

Ranges = list[tuple[int, int]]
"""Offsets as ranges; the upper ends are excluded."""

NO_PARTITION: Final = -1
"""Where messages are counted that never got a partition."""

REFUSED: Final = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
        KafkaError.INVALID_REQUIRED_ACKS,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.UNSUPPORTED_FOR_MESSAGE_FORMAT,
        KafkaError.POLICY_VIOLATION,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001  # librdkafka's own codes have this prefix
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001  # librdkafka's own codes have this prefix
        KafkaError._INVALID_ARG,  # noqa: SLF001  # librdkafka's own codes have this prefix
    }
)
"""Errors after which the message is certainly not in the topic; after any other it may be."""

STOPPING: Final = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001  # librdkafka's own codes have this prefix
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001  # librdkafka's own codes have this prefix
        KafkaError._FATAL,  # noqa: SLF001  # librdkafka's own codes have this prefix
    }
)
"""Errors that every message to come would meet as well."""

PURGED_FROM_QUEUE: Final = KafkaError._PURGE_QUEUE  # noqa: SLF001  # librdkafka's own codes have this prefix


class DeliveredMessage(Protocol):
    """What a delivery report says about its message; confluent_kafka's `Message` has more."""

    def partition(self) -> int | None:
        """The partition it went to, if that is known."""

    def offset(self) -> int | None:
        """Its place there, if that is known."""

    def key(self) -> bytes | None:
        """Its key, if it has one."""


@dataclass(frozen=True, slots=True)
class DeliveryCounts:
    """What became of the messages of one partition.

    Attributes:
        acknowledged: in the topic, at the offsets of `ranges`.
        failed: certainly not in the topic.
        unknown: sent, but never answered.
        ranges: acknowledged offsets in the order of their reports; all but the last are final.
    """

    acknowledged: int = 0
    failed: int = 0
    unknown: int = 0
    ranges: Ranges = field(default_factory=list)


Tally = Mapping[int, DeliveryCounts]
"""Counts by partition; `NO_PARTITION` holds messages that never got one."""


class _Partition:
    """One partition's reports: finished ranges, and the one that grows."""

    __slots__ = ("acknowledged_before", "end", "failed", "finished", "start", "unknown")

    def __init__(self) -> None:
        self.finished: Ranges = []
        self.acknowledged_before = 0
        self.start = self.end = 0
        self.failed = self.unknown = 0

    def counts(self) -> DeliveryCounts:
        start, end = self.start, self.end
        return DeliveryCounts(
            acknowledged=self.acknowledged_before + end - start,
            failed=self.failed,
            unknown=self.unknown,
            ranges=[*self.finished, (start, end)] if end > start else list(self.finished),
        )


class Deliveries:
    """Counts delivery reports; `report` is the callback of the Kafka client.

    One thread reports and hands over, any other may read. `on_sample` gets an acknowledged key and the monotonic time of
    its report whenever `sample` was called before.
    """

    def __init__(
        self, on_sample: Callable[[bytes, float], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.handed_over = 0
        """Messages given to the client."""
        self.reported = 0
        """Messages of these whose end is known."""
        self.connection_was_lost = False
        """Whether a queued message may have been sent before: set by the owner of the client."""
        self.refusal: KafkaError | None = None
        """The first error of `STOPPING`."""
        self.first_error: str | None = None
        self._partitions: dict[int, _Partition] = {}
        self._lock = threading.Lock()
        self._on_sample = on_sample
        self._clock = clock
        self._wants_sample = False

    @property
    def in_flight(self) -> int:
        """Messages given to the client whose end is not known yet."""
        return self.handed_over - self.reported

    def sample(self) -> None:
        """Hand the next acknowledged key to `on_sample`."""
        self._wants_sample = self._on_sample is not None

    def report(self, error: KafkaError | None, message: DeliveredMessage) -> None:
        """Count one delivery report."""
        self.reported += 1
        if error is None:
            number, offset = message.partition(), message.offset()
            place = self._partitions.get(number)  # type: ignore[arg-type]  # None is not found either
            if place is not None and offset == place.end:
                place.end += 1
            elif number is None or offset is None:
                # The broker knows a retried message and has forgotten where it is: nothing could check the claim.
                self._count(number, unknown=1)
                return
            else:
                self._begin(number, offset)
            if self._wants_sample and self._on_sample is not None:
                self._wants_sample = False
                if key := message.key():
                    self._on_sample(key, self._clock())
        else:
            self._fail(error, message.partition())

    def refuse(self, count: int, error: KafkaError | None = None) -> None:
        """Count messages that never left this process: the client did not take them, or there was no time left."""
        if error is not None:
            self._remember(error)
        self._count(None, failed=count)

    def abandon(self) -> None:
        """Count what is still in flight as unknown, because nobody will wait for it."""
        if left := self.in_flight:
            self.reported += left
            self._count(None, unknown=left)

    def tally(self) -> dict[int, DeliveryCounts]:
        """The counts of each partition, consistent in itself."""
        with self._lock:
            return {number: place.counts() for number, place in sorted(self._partitions.items())}

    @property
    def acknowledged(self) -> int:
        """Messages that the broker acknowledged."""
        with self._lock:
            return sum(p.acknowledged_before + p.end - p.start for p in self._partitions.values())

    def _begin(self, number: int, offset: int) -> None:
        """A gap: another producer's message lies between, or this is the first report of the partition."""
        with self._lock:
            place = self._partitions.setdefault(number, _Partition())
            if place.end > place.start:
                place.finished.append((place.start, place.end))
                place.acknowledged_before += place.end - place.start
            place.start, place.end = offset, offset + 1

    def _fail(self, error: KafkaError, number: int | None) -> None:
        code = error.code()
        never_sent = code in REFUSED or (code == PURGED_FROM_QUEUE and not self.connection_was_lost)
        self._remember(error)
        self._count(number, failed=int(never_sent), unknown=int(not never_sent))

    def _remember(self, error: KafkaError) -> None:
        if self.first_error is None:
            self.first_error = f"{error.name()}: {error.str()}"
        if self.refusal is None and error.code() in STOPPING:
            self.refusal = error

    def _count(self, number: int | None, *, failed: int = 0, unknown: int = 0) -> None:
        with self._lock:
            place = self._partitions.setdefault(NO_PARTITION if number is None else number, _Partition())
            place.failed += failed
            place.unknown += unknown


def merged(ranges: Ranges) -> Ranges:
    """The same offsets in ascending order, in as few ranges as there can be."""
    result: Ranges = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result
