"""Fixed-width records and rows on disk, split by key, so that more of them can be compared than fit in memory.

Numbers are big-endian and times are microseconds since 2000-01-01 UTC, as PostgreSQL's binary COPY sends them.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from metrics_pipeline.errors import InstallError

Rows: TypeAlias = npt.NDArray[np.void]
"""A structured array of one of the types below."""

KEY = np.dtype([("device_id", "V16"), ("published_at", ">i8"), ("metric_name", ">i2")])
"""The primary key; 26 bytes without gaps, so that equal keys are equal bytes."""

RECORD = np.dtype(
    [("key", KEY), ("value", ">u8"), ("tags", "V16"), ("partition", ">i4"), ("offset", ">i8"), ("timestamp", ">i8")]
)
"""A record of the topic: `value` is the double's bits, `tags` a digest, `timestamp` when it reached the broker."""

ROW = np.dtype([("key", KEY), ("value", ">u8"), ("tags", "V16"), ("created_at", ">i8")])
"""A row of the table, in the same terms."""

_WORDS = np.dtype([("high", "<u8"), ("low", "<u8"), ("time", "<u8"), ("metric", "<u2")])

_FACTORS: Final = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))
"""Odd, and without a pattern in their bits, so that words of a key do not cancel each other: the golden ratio as a fraction of
2^64 (as SplitMix64 has it), and the second and third prime of xxHash64 (https://xxhash.com, specification)."""


def buckets_for(count: int, size: int = 200_000) -> int:
    """How many buckets (a power of two) keep each near `size` entries when `count` are expected."""
    return 1 << max(0, (max(count, 1) - 1) // size).bit_length()


def bucket_of(keys: Rows, buckets: int) -> npt.NDArray[np.intp]:
    """The bucket of each key: the same for equal keys, evenly spread for others."""
    words = np.ascontiguousarray(keys).view(_WORDS)
    together = words["high"].copy()
    for word, factor in zip(("low", "time", "metric"), _FACTORS, strict=True):
        together ^= words[word].astype(np.uint64) * factor
    return (mixed(together) & np.uint64(buckets - 1)).astype(np.intp)


def mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Each word with its bits spread over all of it: equal ones stay equal, and no two others become so.

    The finalizer of SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014),
    https://doi.org/10.1145/2660193.2660195, figure 14, with the constants of David Stafford's thirteenth variant.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Spill:
    """Entries of one type in an unnamed file, read back by bucket; nothing stays behind, however the process ends.

    Args:
        folder: where the file is made.
        dtype: `RECORD` or `ROW`, or another type with a `key`.
        buckets: a power of two; two spills of the same number agree on the bucket of a key.
        chunk: entries gathered before they are written.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], buckets: int, chunk: int = 100_000) -> None:
        self.buckets = buckets
        self.count = 0
        self._dtype = dtype
        self._chunk = chunk
        self._waiting: list[Rows] = []
        self._waiting_count = 0
        self._starts: list[int] = []
        self._edges: list[npt.NDArray[np.int64]] = []
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # closed by close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()

    def append(self, entries: Rows) -> None:
        """Add entries.

        Raises:
            InstallError: the disk is full.
        """
        if not len(entries):
            return
        self._waiting.append(entries)
        self._waiting_count += len(entries)
        self.count += len(entries)
        if self._waiting_count >= self._chunk:
            self._write()

    def bucket(self, number: int) -> Rows:
        """All entries of one bucket, in the order in which they were added."""
        self._write()
        parts = []
        size = self._dtype.itemsize
        for start, edges in zip(self._starts, self._edges, strict=True):
            first, last = int(edges[number]), int(edges[number + 1])
            if last > first:
                self._file.seek(start + first * size)
                parts.append(self._file.read((last - first) * size))
        return np.frombuffer(b"".join(parts), self._dtype)

    def chunks(self) -> Iterator[Rows]:
        """All entries, some at a time."""
        self._write()
        for start, edges in zip(self._starts, self._edges, strict=True):
            self._file.seek(start)
            yield np.frombuffer(self._file.read(int(edges[-1]) * self._dtype.itemsize), self._dtype)

    def _write(self) -> None:
        if not self._waiting:
            return
        # Without the type numpy would turn the numbers into the machine's byte order.
        entries = np.concatenate(self._waiting, dtype=self._dtype)
        self._waiting, self._waiting_count = [], 0
        homes = bucket_of(entries["key"], self.buckets)
        order = np.argsort(homes, kind="stable")
        edges = np.searchsorted(homes[order], np.arange(self.buckets + 1)).astype(np.int64)
        start = self._starts[-1] + int(self._edges[-1][-1]) * self._dtype.itemsize if self._starts else 0
        rest = memoryview(entries[order].tobytes())
        self._file.seek(start)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InstallError(
                f"{self._folder}: no space left to compare topic and table (it takes about 130 bytes a record): "
                "free some, or set PIPELINE_DATA_DIR to a larger disk"
            ) from error
        self._starts.append(start)
        self._edges.append(edges)
