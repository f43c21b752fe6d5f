"""Records of the topic against rows of the table: what is lost, unexpected or different.

A record is *required* when it lies below the offsets that the sink had committed before the table was read, and does
not stand among the dead letters or the rejects. The row of its key must equal the last required record of a partition, or any record
that is not required (a newer one, which the sink may or may not have written by then). Where retention has deleted
records, a row without a record may come from one of those: see `Comparison.finish`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypedDict

import numpy as np
import numpy.typing as npt

from metrics_pipeline.metric import EPOCH
from metrics_pipeline.partitioner import partitions_of
from metrics_pipeline.verification.spill import KEY, Rows, Spill

NEVER = np.iinfo(np.int64).max
_SIGN = np.uint64(1 << 63)
_UNMATCHED = np.dtype([("key", KEY), ("value", ">u8"), ("created_at", ">i8")])


@dataclass(frozen=True)
class Bounds:
    """Which records of the topic count, per partition.

    Attributes:
        low: first offset that is retained.
        end: the sink had committed at least this before the table was read.
        rejected: sorted offsets that stand among the dead letters or the rejects, except those published again since.
        former: another log had the topic's name before, whose records may have left rows.
        counts: partitions that the topic had, in the order of its growths, the present number last; when it never grew,
            that one alone. Those of a growth that the sink has not settled yet are left out.
        retained_from: readings with an earlier published_at may have been dropped from the table, which is no loss; in microseconds
            since 2000.
    """

    low: Mapping[int, int]
    end: Mapping[int, int]
    rejected: Mapping[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    former: bool = False
    counts: Sequence[int] = ()
    retained_from: int | None = None

    @property
    def complete(self) -> bool:
        """Whether the topic still holds everything that was ever written to it."""
        return not self.former and not any(self.low.values())


@dataclass(frozen=True)
class KeyFinding:
    """One key that is not as it should be; what does not exist is None.

    Attributes:
        kind: what is wrong with it.
        partition: where the record is, or where one with this key would be.
        offset: of the last record with this key that the sink had to write.
        record_value: of that record.
        row_value: in the table.
        tags_differ: whether the tags are (part of) the difference.
    """

    kind: Literal["lost", "unexpected", "different", "signless_zero"]
    device_id: uuid.UUID
    published_at: str
    metric_name: int
    partition: int
    offset: int | None = None
    record_value: float | None = None
    row_value: float | None = None
    tags_differ: bool = False


@dataclass
class ComparisonCounts:
    """What the comparison found.

    Attributes:
        compared: rows held against at least one record of their key.
        lost: keys whose record had to be in the table and is not.
        expired: such keys whose time is one that has been dropped from the table.
        different: rows that equal no record that may explain them.
        signless_zero: rows that differ only in that the sink lost the sign of -0.0.
        unexpected: rows that no record explains.
        unverifiable: rows that only records already deleted by retention can explain.
        rejected: valid records that stand among the dead letters or the rejects instead.
    """

    compared: int = 0
    lost: int = 0
    expired: int = 0
    different: int = 0
    signless_zero: int = 0
    unexpected: int = 0
    unverifiable: int = 0
    rejected: int = 0


class Comparison:
    """Compares bucket by bucket; every bucket must hold all records and all rows of its keys.

    Args:
        bounds: which records count, and which are required.
        folder: where rows without a record wait on disk until all buckets are done.
        examples: findings kept of each kind.
    """

    def __init__(self, bounds: Bounds, folder: Path, examples: int = 10) -> None:
        self.counts = ComparisonCounts()
        self.findings: list[KeyFinding] = []
        self._bounds = bounds
        self._examples = examples
        self._partitions = max(bounds.end, default=-1) + 1
        self._since = np.full(self._partitions, NEVER, np.int64)
        self._unmatched = Spill(folder, _UNMATCHED, buckets=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unmatched.close()

    def bucket(self, records: Rows, rows: Rows) -> None:
        """Compare one bucket.

        Args:
            records: `spill.RECORD` entries, each offset once, in any order; those below `low` are left out of account.
            rows: `spill.ROW` entries, each key once.
        """
        low = _per_partition(self._bounds.low, self._partitions)
        records = records[records["offset"] >= low[records["partition"].astype(np.int64)]]
        groups, row_of = _grouped(records["key"], rows["key"])
        partition = records["partition"].astype(np.int64)
        offset = records["offset"].astype(np.int64)
        rejected = self._rejected(partition, offset)
        self.counts.rejected += int(rejected.sum())
        required = (offset < _per_partition(self._bounds.end, self._partitions)[partition]) & ~rejected

        # The last required record of each key and partition, beside all that are not required, may explain a row.
        order = np.lexsort((offset, partition, groups))
        order = order[required[order]]
        last = np.ones(len(order), bool)
        last[:-1] = (np.diff(groups[order]) != 0) | (np.diff(partition[order]) != 0)
        latest = self._newest(records, groups, partition, order[last])
        candidates = np.concatenate([latest, np.flatnonzero(~required)])

        group = groups[candidates]
        row = row_of[group]
        stored = row >= 0
        equal, near = np.zeros(len(candidates), bool), np.zeros(len(candidates), bool)
        theirs, ours = rows[row[stored]], records[candidates[stored]]
        same_tags = theirs["tags"] == ours["tags"]
        bits = theirs["value"].astype(np.uint64) ^ ours["value"].astype(np.uint64)
        equal[stored] = same_tags & (bits == 0)
        near[stored] = same_tags & (bits == _SIGN) & (theirs["value"] == 0)

        count = len(row_of)
        known = _any(groups, np.ones(len(groups), bool), count)
        needed = _any(group, required[candidates], count)
        explained = _any(group, equal, count)
        signless = _any(group, near, count) & ~explained
        present = row_of >= 0
        wrong = present & known & ~explained & ~signless
        if not self._bounds.complete:
            # Without a required record the row may still hold what a deleted record said.
            unsure = wrong & ~needed
            self.counts.unverifiable += int(unsure.sum())
            wrong &= ~unsure
        lost = needed & ~present
        if self._bounds.retained_from is not None:
            dropped = np.zeros(count, bool)
            dropped[groups] = records["key"]["published_at"] < self._bounds.retained_from
            self.counts.expired += int((lost & dropped).sum())
            lost &= ~dropped
        unmatched = present & ~known

        self.counts.compared += int((present & known).sum())
        self.counts.lost += int(lost.sum())
        self.counts.different += int(wrong.sum())
        self.counts.signless_zero += int(signless.sum())
        self._name("lost", lost, records, rows, candidates, group, row_of)
        self._name("different", wrong, records, rows, candidates, group, row_of)
        self._name("signless_zero", signless, records, rows, candidates, group, row_of)

        waiting = np.empty(int(unmatched.sum()), _UNMATCHED)
        for name in ("key", "value", "created_at"):
            waiting[name] = rows[name][row_of[unmatched]]
        if self._bounds.complete:
            self._sort_out(waiting)
        else:
            self._unmatched.append(waiting)
            self._note_insertions(records, rows, row_of[groups])

    def finish(self) -> ComparisonCounts:
        """Decide on the rows without a record, once all buckets are compared.

        Where retention has deleted records, a row may stem from one of them. The rows of a partition were inserted in
        the order of its offsets, so a row that was created after one which a retained record inserted cannot: it is
        unexpected. Every older one is unverifiable.
        """
        for waiting in self._unmatched.chunks():
            # In a topic that grew, a record of before may have stood in another partition than its key's present one.
            late = np.ones(len(waiting), bool)
            for count in {*self._bounds.counts, self._partitions}:
                late &= waiting["created_at"] > self._since[partitions_of(waiting["key"], count)]
            self.counts.unverifiable += int((~late).sum())
            self._sort_out(waiting[late])
        return self.counts

    def _newest(
        self,
        records: Rows,
        groups: npt.NDArray[np.int64],
        partition: npt.NDArray[np.int64],
        candidates: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """Of each key's last records in several partitions, the one that was partitioned by the latest number of them.

        A partition that is no home of the key by any of these numbers was somebody's choice: its record stays one that may
        explain the row.
        """
        if len(self._bounds.counts) < 2:
            return candidates
        keys = records["key"][candidates]
        rank = np.full(len(candidates), -1, np.int64)
        for at, count in enumerate(self._bounds.counts):
            rank[partitions_of(keys, count) == partition[candidates]] = at
        best = np.full(int(groups.max(initial=-1)) + 1, -1, np.int64)
        np.maximum.at(best, groups[candidates], rank)
        kept: npt.NDArray[np.int64] = candidates[(rank < 0) | (rank == best[groups[candidates]])]
        return kept

    def _rejected(self, partition: npt.NDArray[np.int64], offset: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        rejected = np.zeros(len(offset), bool)
        for number, offsets in self._bounds.rejected.items():
            here = partition == number
            rejected[here] = np.isin(offset[here], offsets)
        return rejected

    def _note_insertions(self, records: Rows, rows: Rows, row: npt.NDArray[np.int64]) -> None:
        """Remember, per partition, the oldest row that a retained record inserted: created after its arrival."""
        stored = row >= 0
        created = rows["created_at"][row[stored]].astype(np.int64)
        fresh = created >= records["timestamp"][stored]
        np.minimum.at(self._since, records["partition"][stored][fresh].astype(np.int64), created[fresh])

    def _sort_out(self, unmatched: Rows) -> None:
        self.counts.unexpected += len(unmatched)
        room = self._room("unexpected")
        for entry in unmatched[:room]:
            (home,) = partitions_of(entry["key"].reshape(1), self._partitions)
            self.findings.append(
                KeyFinding("unexpected", **_named(entry["key"]), partition=int(home), row_value=_double(entry["value"]))
            )

    def _room(self, kind: str) -> int:
        return self._examples - sum(finding.kind == kind for finding in self.findings)

    def _name(
        self,
        kind: Literal["lost", "different", "signless_zero"],
        which: npt.NDArray[np.bool_],
        records: Rows,
        rows: Rows,
        candidates: npt.NDArray[np.int64],
        group: npt.NDArray[np.int64],
        row_of: npt.NDArray[np.int64],
    ) -> None:
        for number in np.flatnonzero(which)[: self._room(kind)]:
            record = records[candidates[np.flatnonzero(group == number)[0]]]
            row = rows[row_of[number]] if row_of[number] >= 0 else None
            self.findings.append(
                KeyFinding(
                    kind,
                    **_named(record["key"]),
                    partition=int(record["partition"]),
                    offset=int(record["offset"]),
                    record_value=_double(record["value"]),
                    row_value=None if row is None else _double(row["value"]),
                    tags_differ=row is not None and bool(record["tags"] != row["tags"]),
                )
            )


class _Key(TypedDict):
    device_id: uuid.UUID
    published_at: str
    metric_name: int


def _named(key: np.void) -> _Key:
    return {
        "device_id": uuid.UUID(bytes=bytes(key["device_id"])),
        "published_at": moment_text(int(key["published_at"])),
        "metric_name": int(key["metric_name"]),
    }


def moment_text(microseconds: int) -> str:
    """A time in microseconds since 2000 as RFC 3339."""
    return (EPOCH + timedelta(microseconds=microseconds)).isoformat().replace("+00:00", "Z")


def _double(bits: np.generic) -> float:
    return float(np.array(bits, ">u8").view(">f8"))


def _per_partition(offsets: Mapping[int, int], partitions: int) -> npt.NDArray[np.int64]:
    return np.array([offsets.get(number, 0) for number in range(partitions)], np.int64)


def _grouped(record_keys: Rows, row_keys: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A number for each distinct key: of every record, and the index of the row (or -1) by number."""
    both = np.concatenate([record_keys, row_keys], dtype=KEY)
    distinct, number = np.unique(both.view(f"S{KEY.itemsize}"), return_inverse=True)
    row_of = np.full(len(distinct), -1, np.int64)
    row_of[number[len(record_keys) :]] = np.arange(len(row_keys))
    return number[: len(record_keys)].astype(np.int64), row_of


def _any(groups: npt.NDArray[np.int64], flags: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.bool_]:
    """For each group, whether any of its members is flagged."""
    flagged = np.zeros(count, bool)
    flagged[groups[flags]] = True
    return flagged
