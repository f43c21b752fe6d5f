"""Consumed messages, decoded: what a worker hands to the store in one piece."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any, Final, Protocol, overload

import numpy as np
import numpy.typing as npt

from metrics_pipeline.copy_sink.canonical import EMPTY, PADDING, ReadingColumns, key_of, padded, parse
from metrics_pipeline.copy_sink.tags import TagTable
from metrics_pipeline.errors import RecordError
from metrics_pipeline.metric import EPOCH, decode

LONGEST: Final = 1 << 16
"""Bytes of a value beyond which it is left to the strict decoder, so that it is not copied about."""
BLOCK: Final = 5000
"""Records that are taken apart at a time: so many that they stay in the processor's cache, which is twice as fast as all at once."""
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
        log: which log these offsets are of: what the database must say, too.
        stamp: the log's timestamp of the last record, in milliseconds since 1970; None when it has none.
    """

    partition: int
    epoch: int
    start: int
    stop: int
    log: str = ""
    stamp: int | None = None


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


@dataclass(frozen=True, slots=True)
class KeptMessage:
    """What is kept of a message that was let go."""

    number: int
    at: int
    key_bytes: bytes | None
    value_bytes: bytes | None

    def key(self) -> bytes | None:
        """Its key, if it had one."""
        return self.key_bytes

    def value(self) -> bytes | None:
        """Its value, if it had one."""
        return self.value_bytes

    def partition(self) -> int:
        """The partition it was read from."""
        return self.number

    def offset(self) -> int:
        """Its place there."""
        return self.at


@dataclass(frozen=True, slots=True)
class Run:
    """Messages of one partition that came one after another.

    Attributes:
        partition: their own.
        begin: position of the first one among all.
        offsets: of each.
    """

    partition: int
    begin: int
    offsets: Sequence[int]


@dataclass(frozen=True, slots=True)
class Part:
    """Messages that came at once, decoded: what is kept of them when they are let go.

    A message object costs ten times the memory of its row, and to have many of them alive costs time as well. So only the
    text of the canonical ones is kept, in one piece, in case that PostgreSQL refuses one; of all others key and value.

    Attributes:
        count: how many messages.
        runs: where they come from.
        columns: the good ones; `source` is the position in the part.
        rejects: the bad ones.
        tombstones: positions of those that had no value, which means nothing here.
        text: the values of the canonical ones, one after another.
        ends: where each value ends in it.
        others: key and value of the others.
    """

    count: int
    runs: Sequence[Run]
    columns: ReadingColumns
    rejects: Sequence[BatchReject]
    tombstones: Sequence[int]
    text: bytes
    ends: npt.NDArray[Any]
    others: Mapping[int, tuple[bytes | None, bytes | None]]

    def message(self, at: int) -> KeptMessage:
        """The message at a position."""
        run = self.runs[bisect_right(self.runs, at, key=lambda run: run.begin) - 1]
        if at in self.others:
            key, value = self.others[at]
        else:
            value = self.text[int(self.ends[at - 1]) if at else PADDING : int(self.ends[at])]
            key = key_of(value)
        return KeptMessage(run.partition, run.offsets[at - run.begin], key, value)

    def partitions(self) -> npt.NDArray[Any]:
        """The partition of each message."""
        return np.repeat(
            np.array([run.partition for run in self.runs], np.int64), [len(run.offsets) for run in self.runs]
        )

    def without(self, gone: Iterable[int]) -> Part:
        """The same part, in which no row, reject or tombstone comes from these partitions."""
        kept = ~np.isin(self.partitions(), list(gone))
        return replace(
            self,
            columns=self.columns.take(kept[self.columns.source]),
            rejects=[reject for reject in self.rejects if kept[reject.at]],
            tombstones=[at for at in self.tombstones if kept[at]],
        )


class KeptMessages(Sequence[ConsumedMessage]):
    """The messages of several parts, made again when they are asked for."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._begins = list(accumulate((part.count for part in parts), initial=0))

    def __len__(self) -> int:
        return self._begins[-1]

    @property
    def begins(self) -> Sequence[int]:
        """Position of the first message of each part."""
        return self._begins[:-1]

    @overload
    def __getitem__(self, at: int) -> ConsumedMessage: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[ConsumedMessage]: ...

    def __getitem__(self, at: int | slice) -> ConsumedMessage | Sequence[ConsumedMessage]:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        number = bisect_right(self._begins, at) - 1
        return self._parts[number].message(at - self._begins[number])

    def partitions(self) -> npt.NDArray[Any]:
        """The partition of each message."""
        return np.concatenate([np.empty(0, np.int64), *(part.partitions() for part in self._parts)])

    def offsets(self) -> npt.NDArray[Any]:
        """The offset of each message."""
        runs = [np.asarray(run.offsets, np.int64) for part in self._parts for run in part.runs]
        return np.concatenate([np.empty(0, np.int64), *runs])


@dataclass(frozen=True)
class Batch:
    """Messages of several partitions, to be stored or rejected in one transaction.

    Attributes:
        chunks: by partition, what the batch moves.
        messages: all of them, in the order of consumption.
        columns: the good ones; `source` is the position in `messages`.
        tags: encoded tags by number.
        rejects: the bad ones.
        empty: positions of those that had no value, which means nothing here.
        stamps: the broker's timestamps of some messages, in milliseconds.
    """

    chunks: dict[int, Chunk]
    messages: Sequence[ConsumedMessage]
    columns: ReadingColumns
    tags: Sequence[bytes]
    rejects: list[BatchReject]
    empty: Sequence[int] = ()
    stamps: Sequence[int] = ()

    @classmethod
    def of(cls, parts: Sequence[Part], chunks: dict[int, Chunk], tags: Sequence[bytes]) -> Batch:
        """Parts after one another."""
        messages = KeptMessages(parts)
        placed = list(zip(messages.begins, parts, strict=True))
        columns = [replace(part.columns, source=part.columns.source + begin) for begin, part in placed]
        return cls(
            chunks,
            messages,
            ReadingColumns.joined(columns) if columns else EMPTY,
            tags,
            [
                BatchReject(begin + reject.at, reject.reason, reject.detail)
                for begin, part in placed
                for reject in part.rejects
            ],
            [at + begin for begin, part in placed for at in part.tombstones],
        )

    @property
    def tombstones(self) -> int:
        """How many messages had no value."""
        return len(self.empty)

    def without(self, partitions: Iterable[int]) -> Batch:
        """The same batch without what comes from these partitions."""
        gone = set(partitions)
        chunks = {number: chunk for number, chunk in self.chunks.items() if number not in gone}
        # By what is left, not by what goes: messages of partitions that went before are still among them.
        return self._of(chunks, np.isin(_partitions(self.messages), list(chunks)))

    def halves(self) -> tuple[Batch, Batch] | None:
        """The same in two batches, the second of which continues where the first ends; None when there is nothing to divide."""
        numbers = sorted(self.chunks)
        if len(numbers) > 1:
            middle = len(numbers) // 2
            return self.without(numbers[middle:]), self.without(numbers[:middle])
        (chunk,) = self.chunks.values()
        offsets = _offsets(self.messages)
        ours = np.unique(offsets[_partitions(self.messages) == chunk.partition])
        ours = ours[(ours >= chunk.start) & (ours < chunk.stop)]
        if len(ours) < 2:
            return None
        at = int(ours[len(ours) // 2])
        # Of the first one's last record no timestamp is kept.
        first = self._of({chunk.partition: replace(chunk, stop=at, stamp=None)}, offsets < at)
        return replace(first, stamps=()), self._of({chunk.partition: replace(chunk, start=at)}, offsets >= at)

    def _of(self, chunks: dict[int, Chunk], kept: npt.NDArray[Any]) -> Batch:
        """What these chunks are of, and of it the messages that are kept."""
        return replace(
            self,
            chunks=chunks,
            columns=self.columns.take(kept[self.columns.source]),
            rejects=[reject for reject in self.rejects if kept[reject.at]],
            empty=[at for at in self.empty if kept[at]],
        )


def _offsets(messages: Sequence[ConsumedMessage]) -> npt.NDArray[Any]:
    if isinstance(messages, KeptMessages):
        return messages.offsets()
    return np.array([message.offset() for message in messages], np.int64)


def _partitions(messages: Sequence[ConsumedMessage]) -> npt.NDArray[Any]:
    if isinstance(messages, KeptMessages):
        return messages.partitions()
    return np.array([message.partition() for message in messages], np.int64)


def column(messages: Sequence[ConsumedMessage], name: str) -> Iterator[Any]:
    """What a method of the messages, which are all of one class, answers for each: in half the time of a comprehension."""
    return map(getattr(type(messages[0]), name), messages) if messages else iter(())


def runs_of(messages: Sequence[ConsumedMessage]) -> list[Run]:
    """Where messages come from."""
    numbers = np.fromiter(column(messages, "partition"), np.int64, len(messages))
    begins = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]
    runs = []
    for begin, end in pairwise(begins):
        first, last = messages[begin].offset(), messages[end - 1].offset()
        offsets: Sequence[int] = range(first, last + 1)
        if len(offsets) != end - begin:  # the topic has gaps, or gave some twice
            offsets = [message.offset() for message in messages[begin:end]]
        runs.append(Run(int(numbers[begin]), begin, offsets))
    return runs


class BatchDecoder:
    """Turns messages into columns: canonical ones by `canonical.parse`, all others one by one by `metric.decode`."""

    def __init__(self) -> None:
        self._tags = TagTable()

    @property
    def tags(self) -> Sequence[bytes]:
        """Encoded tags by number, of all parts since `forget`."""
        return self._tags.encoded

    def forget(self) -> None:
        """Before the first part of a batch: forget the tags seen so far when they are too many."""
        self._tags.forget()

    def decode(self, messages: Sequence[ConsumedMessage], chunks: dict[int, Chunk]) -> Batch:
        """Decode all; nothing is dropped: each message is a row, a reject or a tombstone."""
        self.forget()
        parts = [self.part(messages[at : at + BLOCK]) for at in range(0, len(messages), BLOCK)]
        return replace(Batch.of(parts, chunks, self.tags), messages=messages)

    def part(self, messages: Sequence[ConsumedMessage], runs: Sequence[Run] | None = None) -> Part:
        """Decode some messages, at most a few thousand; the same holds.

        Args:
            messages: not none.
            runs: where they come from, when that is known.
        """
        keys, values = list(column(messages, "key")), list(column(messages, "value"))
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
        text = padded(values)
        columns, which = parse(padded(keys), text, key_lengths, lengths, self._tags)
        others = {at: (messages[at].key(), messages[at].value()) for at in which.tolist()}
        rejects: list[BatchReject] = []
        tombstones: list[int] = []
        if others:
            slow, rejects, tombstones = self._strict(others)
            if len(slow):
                columns = ReadingColumns.joined([columns, slow])
                columns = columns.take(np.argsort(columns.source, kind="stable"))
        return Part(
            len(messages),
            runs_of(messages) if runs is None else runs,
            columns,
            rejects,
            tombstones,
            text,
            PADDING + np.cumsum(lengths),
            others,
        )

    def _strict(
        self, others: Mapping[int, tuple[bytes | None, bytes | None]]
    ) -> tuple[ReadingColumns, list[BatchReject], list[int]]:
        good, readings, rejects, tombstones = [], [], [], []
        for at, (key, value) in others.items():
            try:
                readings.append(decode(key, value))
                good.append(at)
            except RecordError as error:
                if error.reason == "tombstone":
                    tombstones.append(at)
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
