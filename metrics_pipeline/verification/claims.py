"""What the broker acknowledged to producer runs, against what the topic holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

OffsetRanges = Sequence[tuple[int, int]]
"""Ranges of offsets, each with its end excluded."""


@dataclass(frozen=True)
class Claim:
    """What one run wrote down for one partition.

    Attributes:
        run_id: the run.
        partition: of the topic.
        acknowledged: how many records were acknowledged.
        ranges: at which offsets, in order and apart from one another.
        log: which log these offsets are of; nothing when the run did not know.
    """

    run_id: str
    partition: int
    acknowledged: int
    ranges: OffsetRanges
    log: str = ""


def anomalies(claims: Iterable[Claim], ends: Mapping[int, int], holes: Mapping[int, OffsetRanges]) -> list[str]:
    """Every sign that an acknowledged record is not in the topic, one line each.

    Args:
        claims: read before `ends`, so that every claimed offset should lie below the end of its partition.
        ends: the offset after the last record, per partition.
        holes: offsets at which the topic holds no record though it should.
    """
    signs = []
    by_partition = defaultdict(list)
    for claim in claims:
        size = sum(end - start for start, end in claim.ranges)
        where = f"partition {claim.partition}"
        if size != claim.acknowledged:
            signs.append(
                f"run {claim.run_id} counted {claim.acknowledged} acknowledgements in {where}, at {size} offsets"
            )
        end = ends.get(claim.partition, 0)
        if claim.ranges and claim.ranges[-1][1] > end:
            beyond = sum(stop - max(start, end) for start, stop in claim.ranges if stop > end)
            signs.append(
                f"run {claim.run_id} was acknowledged {beyond} offsets of {where} up to {claim.ranges[-1][1] - 1}, "
                f"and the partition ends before {end}"
            )
        for start, stop in claim.ranges:
            signs += [
                f"run {claim.run_id} was acknowledged offsets {max(start, first)} to {min(stop, after) - 1} of {where}, "
                "and the topic holds no record there"
                for first, after in holes.get(claim.partition, ())
                if start < after and first < stop
            ]
            by_partition[claim.partition].append((start, stop, claim.run_id))
    for partition, ranges in sorted(by_partition.items()):
        ranges.sort()
        reach, holder = 0, ""
        for start, stop, run_id in ranges:
            if start < reach:
                signs.append(
                    f"runs {holder} and {run_id} were both acknowledged offsets {start} to {min(stop, reach) - 1} "
                    f"of partition {partition}"
                )
            if stop > reach:
                reach, holder = stop, run_id
    return signs


def unclaimed(claims: Iterable[Claim], low: Mapping[int, int], ends: Mapping[int, int]) -> int:
    """How many offsets between `low` and `ends` no run wrote down: records of others, or of a run that was killed."""
    ranges: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for claim in claims:
        ranges[claim.partition] += claim.ranges
    count = 0
    for partition, end in ends.items():
        reach = low.get(partition, 0)
        for start, stop in sorted(ranges[partition]):
            count += max(0, min(start, end) - reach)
            reach = max(reach, stop)
        count += max(0, end - reach)
    return count
