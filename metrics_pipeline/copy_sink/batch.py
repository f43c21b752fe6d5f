"""Consumed messages, decoded: what a worker hands to the store in one piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from metrics_pipeline.copy_sink.canonical import EMPTY, ReadingColumns, parse
from metrics_pipeline.copy_sink.tags import TagTable
from metrics_pipeline.errors import RecordError
from metrics_pipeline.metric import EPOCH, decode

LONGEST: Final = 1 << 16
"""Bytes of a value beyond which it is left to the strict decoder, so that it is not copied about."""
BLOCK: Final = 5000
"""Records that are taken apart at a time."""
DETAIL: Final = 500
"""Characters kept of what is wrong with a record: its payload is kept whole."""
_MICROSECOND: Final = timedelta(microseconds=1)


class ConsumedMessage(Protocol):
    """What is used of `confluent_kafka.Message`."""

    def key(self) -> bytes | None:
        """Its key, if it has one."""

    def value(self) -> bytes | None:
        """Its value; a tombstone has none."""

    def partition(self) -> int:
        """The partition it was read from."""

    def offset(self) -> int:
        """Its place there."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of a batch that comes from one partition.

    Attributes:
        partition: its number.
        epoch: which possession of the partition it was consumed under; a chunk of a former one is not written.
        start: where the partition stood before: what the database must say for the chunk to be written.
        stop: where it stands afterwards.
    """

    partition: int
    epoch: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class BatchReject:
    """A record that is not stored.

    Attributes:
        at: position of its message in the batch.
        reason: one of `metric.REASONS`, or `refused_by_database`.
        detail: what is wrong with which field.
    """

    at: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Batch:
    """Messages of several partitions, to be stored or rejected in one transaction.

    Attributes:
        chunks: by partition, what the batch moves.
        messages: all of them, in the order of consumption.
        columns: the good ones; `source` is the position in `messages`.
        tags: encoded tags by number.
        rejects: the bad ones.
        tombstones: how many messages had no value, which means nothing here.
    """

    chunks: dict[int, Chunk]
    messages: Sequence[ConsumedMessage]
    columns: ReadingColumns
    tags: Sequence[bytes]
    rejects: list[BatchReject]
    tombstones: int

    def without(self, partitions: Iterable[int]) -> Batch:
        """The same batch without what comes from these partitions."""
        gone = set(partitions)
        chunks = {number: chunk for number, chunk in self.chunks.items() if number not in gone}
        # By what is left, not by what goes: messages of partitions that went before are still among them.
        kept = np.array([message.partition() in chunks for message in self.messages], np.bool_)
        return replace(
            self,
            chunks=chunks,
            columns=self.columns.take(kept[self.columns.source]) if len(self.columns) else self.columns,
            rejects=[reject for reject in self.rejects if kept[reject.at]],
            tombstones=sum(
                bool(keep) and message.value() is None for keep, message in zip(kept, self.messages, strict=True)
            )
            if self.tombstones
            else 0,
        )


class BatchDecoder:
    """Turns messages into columns: canonical ones by `canonical.parse`, all others one by one by `metric.decode`."""

    def __init__(self) -> None:
        self._tags = TagTable()

    def decode(self, messages: Sequence[ConsumedMessage], chunks: dict[int, Chunk]) -> Batch:
        """Decode all; nothing is dropped: each message is a row, a reject or a tombstone."""
        self._tags.forget()
        keys: list[Any] = [message.key() for message in messages]
        values: list[Any] = [message.value() for message in messages]
        try:
            lengths = np.fromiter(map(len, values), np.int64, len(values))
            key_lengths = np.fromiter(map(len, keys), np.int64, len(keys))
        except TypeError:  # there is a None among them
            lengths = np.array([-1 if value is None else len(value) for value in values], np.int64)
            key_lengths = np.array([-1 if key is None else len(key) for key in keys], np.int64)
        odd = (lengths < 0) | (lengths > LONGEST) | (key_lengths < 0) | (key_lengths > LONGEST)
        if odd.any():
            # Left to the strict decoder by the message itself; here it only keeps its place.
            lengths[odd] = key_lengths[odd] = 0
            for at in np.flatnonzero(odd).tolist():
                keys[at] = values[at] = b""
        columns, others = self._canonical(keys, values, key_lengths, lengths)
        rejects: list[BatchReject] = []
        tombstones = 0
        if len(others):
            slow, rejects, tombstones = self._strict(messages, others)
            if len(slow):
                columns = ReadingColumns.joined([columns, slow])
                columns = columns.take(np.argsort(columns.source, kind="stable"))
        return Batch(chunks, messages, columns, self._tags.encoded, rejects, tombstones)

    def _canonical(
        self, keys: list[bytes], values: list[bytes], key_lengths: npt.NDArray[Any], lengths: npt.NDArray[Any]
    ) -> tuple[ReadingColumns, npt.NDArray[Any]]:
        """Blocks that stay in the processor's cache: twice as fast as all at once."""
        parts, others = [], []
        for begin in range(0, len(values), BLOCK):
            block = slice(begin, begin + BLOCK)
            part, rest = parse(keys[block], values[block], key_lengths[block], lengths[block], self._tags)
            part.source += begin
            parts.append(part)
            others.append(rest + begin)
        return ReadingColumns.joined(parts) if parts else EMPTY, np.concatenate(others) if others else np.empty(
            0, np.int64
        )

    def _strict(
        self, messages: Sequence[ConsumedMessage], which: npt.NDArray[Any]
    ) -> tuple[ReadingColumns, list[BatchReject], int]:
        good, readings, rejects, tombstones = [], [], [], 0
        for at in which.tolist():
            message = messages[at]
            try:
                readings.append(decode(message.key(), message.value()))
                good.append(at)
            except RecordError as error:
                if error.reason == "tombstone":
                    tombstones += 1
                else:
                    rejects.append(BatchReject(at, error.reason, clean(error.detail)))
        if not good:
            return EMPTY, rejects, tombstones
        columns = ReadingColumns(
            np.array(good, np.int64),
            np.frombuffer(b"".join(reading.device_id.bytes for reading in readings), np.uint8).reshape(-1, 16),
            np.array([(reading.published_at - EPOCH) // _MICROSECOND for reading in readings], np.int64),
            np.array([reading.metric_name for reading in readings], np.int16),
            np.array([reading.value for reading in readings], np.float64),
            np.array([self._tags.number_of(reading.tags) for reading in readings], np.int64),
        )
        return columns, rejects, tombstones


def clean(text: str) -> str:
    """Text that PostgreSQL can store, of bounded length: no NUL, no half of a surrogate pair."""
    return text[:DETAIL].replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
