"""Retention: partitions whose readings are old, or more than there is room for, are dropped whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from metrics_pipeline import partitions
from metrics_pipeline.partitions import Partition
from metrics_pipeline.settings import Settings


@dataclass(frozen=True, slots=True)
class Dropped:
    """What went with a partition.

    Attributes:
        rows: readings.
        bytes: with indexes.
    """

    rows: int
    bytes: int


def expired(settings: Settings, now: datetime | None = None) -> list[Partition]:
    """The partitions that METRICS_RETENTION and METRICS_RETENTION_SIZE have no room for, oldest first; only closed ones.

    Raises:
        ServiceError: PostgreSQL is not reachable, or the schema is not there.
    """
    now = now or datetime.now(UTC)
    age, room = settings.retention_age, settings.retention_bytes
    if age is None and room is None:
        return []
    raise NotImplementedError


def drop(settings: Settings, partition: Partition, keep: Callable[[Partition], None] | None = None) -> Dropped:
    """Drop a partition with its readings, and take them off the summaries.

    Nobody who stores or reads waits for as long as a second.

    Args:
        settings: which database.
        partition: which; one that has no end cannot go.
        keep: called before anything is dropped, while the partition can still be read under its name, by sessions of the callee's own.
            When it raises, nothing is dropped. When readings came to the partition after it began, it is called again.

    Raises:
        ServiceError: PostgreSQL is not reachable, the partition is not there any more, or somebody kept the table for too long.
    """
    raise NotImplementedError
