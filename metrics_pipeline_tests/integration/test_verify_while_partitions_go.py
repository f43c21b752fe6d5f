"""What `verify` reads of the table is one state of it, also when a partition goes meanwhile."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from metrics_pipeline import partitions, postgres, retention
from metrics_pipeline.settings import Settings
from metrics_pipeline.verification.table_entries import read_rows, take_snapshot
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.databases import own_database
from metrics_pipeline_tests.patience import patience

pytestmark = pytest.mark.integration


def seen(settings: Settings) -> tuple[int | None, int]:
    """From when on nothing is said to have been dropped, and how many readings there are."""
    with postgres.connect(settings, "metrics_reader") as connection:
        _, retained_from = take_snapshot(connection)
        return retained_from, sum(map(len, read_rows(connection)))


def test_a_partition_is_read_or_known_to_be_gone(stack: RunningStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who begins while it goes and waits for that: its readings would be neither there nor expired, and count as lost."""
    with own_database(stack.settings) as settings, ThreadPoolExecutor() as pool:
        partitions.make(settings)
        with postgres.connect(settings, "metrics_writer", autocommit=True) as writer:
            writer.execute(
                "INSERT INTO metrics (device_id, published_at, metric_name, value) VALUES (%s, %s, 0, 1)",
                [UUID(int=1), datetime.now(UTC)],
            )
        assert seen(settings) == (None, 1)
        detach, meanwhile = retention._detach, list[Future[tuple[int | None, int]]]()

        def with_a_reader(connection: postgres.Connection, *arguments: Any) -> None:
            meanwhile.append(pool.submit(seen, settings))
            waiting = (
                "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = 'relation' "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
            )
            while connection.execute(waiting).fetchone() != (True,):
                time.sleep(0.01)
            detach(connection, *arguments)

        monkeypatch.setattr(retention, "_detach", with_a_reader)
        retention.drop(settings, partitions.every(settings)[1])
        (reader,) = meanwhile
        retained_from, rows = reader.result(patience(60))
        assert rows == 0
        assert retained_from is not None
