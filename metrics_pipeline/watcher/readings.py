"""The last good reading of some keys, looked for in the topic from its end backwards."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import numpy as np
import numpy.typing as npt
from confluent_kafka import Consumer, KafkaException, TopicPartition

from metrics_pipeline import kafka
from metrics_pipeline.copy_sink.batch import BatchDecoder
from metrics_pipeline.copy_sink.canonical import ReadingColumns
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.metric import EPOCH, Reading, decode
from metrics_pipeline.settings import CONNECTOR_GROUP, TOPIC, Settings

FIRST_WINDOW: Final = 50_000
"""Records of each partition that are read first; then twice as many before them, and so on."""
LARGEST_WINDOW: Final = 1_000_000
AT_ONCE: Final = 5000
STALL_SECONDS: Final = 20.0
"""How long the broker may send nothing before a search is given up."""

_MICROSECOND: Final = timedelta(microseconds=1)
_MIX: Final = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)

log = logging.getLogger(__name__)

Key = tuple[UUID, datetime, int]


@dataclass(frozen=True, slots=True)
class Found:
    """A good reading and where it stands."""

    partition: int
    offset: int
    timestamp: int
    reading: Reading


def consumer_config(settings: Settings) -> dict[str, object]:
    """A consumer that is no member of any group: it is told what to read, and asks how far the connector is."""
    return kafka.client_config(settings) | {
        "group.id": CONNECTOR_GROUP,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        "socket.timeout.ms": int(kafka.TIMEOUT_SECONDS * 1000),
        "check.crcs": True,
        "queued.max.messages.kbytes": 16 << 10,
    }


class ReadingSearch:
    """Looks for the last readings of some keys; holds a connection until `close`.

    Args:
        settings: where the broker is.
        keys: device, time and metric.
    """

    def __init__(self, settings: Settings, keys: Iterable[Key]) -> None:
        self._settings = settings
        self._wanted = {(key[0].bytes, (key[1] - EPOCH) // _MICROSECOND, key[2]): key for key in keys}
        self._hashes = _hashes(*_columns(self._wanted))
        self._decoder = BatchDecoder()
        self._ends: dict[int, int] = {}
        self.found: dict[Key, Found] = {}
        self._consumer = Consumer(
            consumer_config(settings) | {"enable.partition.eof": True, "fetch.wait.max.ms": 50, "fetch.min.bytes": 1}
        )

    def close(self) -> None:
        """Let the connection go."""
        self._consumer.close()

    def steps(self, bound: Mapping[int, int]) -> Iterator[None]:
        """Read backwards until each key is found or nothing is left, then what came meanwhile; some thousand records a step.

        Args:
            bound: per partition an offset before which none of the keys can stand; the first one retained without it.

        Raises:
            ServiceError: the broker cannot be used.
        """
        marks = self._marks()
        self._ends = {number: high for number, (_, high) in marks.items()}
        low = {number: max(first, bound.get(number, first)) for number, (first, _) in marks.items()}
        stop, window = dict(self._ends), FIRST_WINDOW
        while len(self.found) < len(self._wanted) and any(stop[number] > low[number] for number in stop):
            start = {number: max(low[number], stop[number] - window) for number in stop}
            yield from self._read(start, stop)
            stop, window = start, min(2 * window, LARGEST_WINDOW)
        while True:
            ends = {number: high for number, (_, high) in self._marks().items()}
            start = {number: self._ends.get(number, 0) for number in ends}
            yield from self._read(start, ends)
            self._ends = ends
            if sum(ends.values()) - sum(start.values()) < FIRST_WINDOW:
                return

    def catch_up(self, most: int) -> bool:
        """Read what came since; False, and nothing read, when that is more than `most` records.

        Raises:
            ServiceError: the broker cannot be used.
        """
        ends = {number: high for number, (_, high) in self._marks().items()}
        start = {number: self._ends.get(number, 0) for number in ends}
        if sum(ends.values()) - sum(start.values()) > most:
            return False
        for _ in self._read(start, ends):
            pass
        self._ends = ends
        return True

    def _marks(self) -> dict[int, tuple[int, int]]:
        try:
            topic = self._consumer.list_topics(TOPIC, timeout=kafka.TIMEOUT_SECONDS).topics[TOPIC]
            return {
                number: kafka.ends(self._consumer, TopicPartition(TOPIC, number)) for number in sorted(topic.partitions)
            }
        except KafkaException as error:
            raise self._refused(error) from error

    def _read(self, start: Mapping[int, int], stop: Mapping[int, int]) -> Iterator[None]:
        for messages in self._messages(start, stop):
            columns = self._decoder.decode(messages, {}).columns
            for at in self._candidates(columns):
                message = messages[int(columns.source[at])]
                identity = (
                    columns.device_id[at].tobytes(),
                    int(columns.published_at[at]),
                    int(columns.metric_name[at]),
                )
                key = self._wanted.get(identity)
                if key is None:
                    continue
                found = Found(
                    message.partition(),
                    message.offset(),
                    message.timestamp()[1],
                    decode(message.key(), message.value()),
                )
                before = self.found.get(key)
                # Between partitions there is no order but the broker's clock.
                if before is None or (found.timestamp, found.offset) > (before.timestamp, before.offset):
                    self.found[key] = found
            yield

    def _candidates(self, columns: ReadingColumns) -> list[int]:
        if not len(columns):
            return []
        hashes = _hashes(columns.device_id, columns.published_at, columns.metric_name)
        which: list[int] = np.flatnonzero(np.isin(hashes, self._hashes)).tolist()
        return which

    def _messages(self, start: Mapping[int, int], stop: Mapping[int, int]) -> Iterator[list[Any]]:
        left = {number: stop[number] for number in start if start[number] < stop[number]}
        if not left:
            return
        heard = time.monotonic()
        try:
            self._consumer.assign([TopicPartition(TOPIC, number, start[number]) for number in left])
            while left:
                batch = []
                messages = self._consumer.consume(AT_ONCE, 0.1)
                if messages:
                    heard = time.monotonic()
                elif time.monotonic() - heard > STALL_SECONDS:
                    raise ServiceError(f"Kafka broker {self._settings.bootstrap_servers} sends nothing of {TOPIC}")
                for message in messages:
                    number, offset = message.partition(), message.offset()
                    error = message.error()
                    if error is not None and error.name() != "_PARTITION_EOF":
                        log.debug("%s", error)  # one that lasts ends in silence, which is bounded
                        continue
                    if number is None or offset is None or number not in left:
                        continue
                    if error is None and offset < left[number]:
                        batch.append(message)
                        offset += 1
                    if offset >= left[number]:
                        del left[number]
                        self._consumer.pause([TopicPartition(TOPIC, number)])
                if batch:
                    yield batch
        except KafkaException as error:
            raise self._refused(error) from error
        finally:
            self._consumer.unassign()

    def _refused(self, error: KafkaException) -> ServiceError:
        return ServiceError(
            f"Kafka broker {self._settings.bootstrap_servers} cannot be used: {error.args[0].str()}: "
            "see `metrics-pipeline status`"
        )


def _columns(
    wanted: Iterable[tuple[bytes, int, int]],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int16]]:
    identities = list(wanted)
    return (
        np.frombuffer(b"".join(identity[0] for identity in identities), np.uint8).reshape(-1, 16),
        np.array([identity[1] for identity in identities], np.int64),
        np.array([identity[2] for identity in identities], np.int16),
    )


def _hashes(
    device_id: npt.NDArray[np.uint8], published_at: npt.NDArray[np.int64], metric_name: npt.NDArray[np.int16]
) -> npt.NDArray[np.uint64]:
    """A number for each key, equal for equal ones."""
    words = np.ascontiguousarray(device_id).view(np.uint64)
    with np.errstate(over="ignore"):
        mixed: npt.NDArray[np.uint64] = words[:, 0] * _MIX[0]
        mixed ^= words[:, 1] * _MIX[1]
        mixed ^= published_at.astype(np.uint64) * _MIX[2]
        mixed ^= metric_name.astype(np.uint64)
    return mixed
