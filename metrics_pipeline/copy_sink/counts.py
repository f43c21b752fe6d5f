"""What a worker has done, in a form that can be sent to the supervisor and added up."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from metrics_pipeline.copy_sink.progress import Moment

LATENCY_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds in seconds; one more bucket holds what took longer."""


@dataclass
class WorkerCounts:
    """Totals since the worker began.

    Attributes:
        polled: messages consumed, those delivered again included.
        rows: readings stored.
        tombstones: messages without a value that were skipped.
        rejected: records rejected, by reason.
        batches: transactions committed, by path (`copy`, `upsert`, `bisect`, `none`).
        fenced: batches or parts of them given up because somebody else had written the partition.
        retries: failed attempts, by SQLSTATE or kind.
        lost_to_retention: records that the topic no longer held when they were to be read.
        latency: observations by bucket of `LATENCY_BUCKETS`, the broker's timestamp to COMMIT.
        latency_sum: of all observations, seconds.
    """

    polled: int = 0
    rows: int = 0
    tombstones: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    batches: Counter[str] = field(default_factory=Counter)
    fenced: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    lost_to_retention: int = 0
    latency: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BUCKETS) + 1))
    latency_sum: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count one latency."""
        self.latency[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self.latency_sum += seconds

    def add(self, other: WorkerCounts) -> None:
        """Add another worker's, or a former worker's, totals."""
        for name in ("polled", "rows", "tombstones", "fenced", "lost_to_retention", "latency_sum"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("rejected", "batches", "retries"):
            getattr(self, name).update(getattr(other, name))
        self.latency = [mine + theirs for mine, theirs in zip(self.latency, other.latency, strict=True)]


@dataclass
class WorkerReport:
    """A worker at one moment.

    Attributes:
        state: `starting`, `standing by`, `running`, `waiting`, `stopping`.
        reason: why it waits or stands by, for people; empty when it does neither.
        counts: what it has done.
        lag: records between where each of its partitions stands in the database and its end, as far as known.
        waiting_seconds: how long it has been failing without a success in between; 0 when all is well.
        moment: where its threads are, and since when.
    """

    state: str = "starting"
    reason: str = ""
    counts: WorkerCounts = field(default_factory=WorkerCounts)
    lag: dict[int, int] = field(default_factory=dict)
    waiting_seconds: float = 0.0
    moment: Moment = field(default_factory=Moment)

    def as_json(self) -> dict[str, Any]:
        """For `/status`."""
        return {
            "state": self.state,
            "reason": self.reason,
            "waiting_seconds": round(self.waiting_seconds, 1),
            "rows": self.counts.rows,
            "partitions": sorted(self.lag),
            "step": self.moment.shown(),
        }
