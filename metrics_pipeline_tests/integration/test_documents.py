"""The documents' queries, on the real stack."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from metrics_pipeline import summaries
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.documents import DOCUMENTS, fences

pytestmark = pytest.mark.integration

QUERIES = [query for document in DOCUMENTS for query in fences(document, "sql") if "-- migrate:up" not in query] + [
    shlex.split(call)[2]
    for document in DOCUMENTS
    for block in fences(document, "sh")
    for call in block.splitlines()
    if call.startswith('metrics-pipeline sql "')
]
"""Of every page; migrations are run where their page is followed."""
ROWS = 12


@pytest.fixture(scope="module")
def readings(stack: RunningStack) -> Iterator[None]:
    """A few stored readings of two devices, and a run in the ledger, so that no query meets an empty table."""
    run, devices, now = uuid4(), (uuid4(), uuid4()), datetime.now(UTC)
    with stack.admin() as connection:
        connection.cursor().executemany(
            "INSERT INTO metrics (device_id, published_at, metric_name, value) VALUES (%s, %s, 0, 20)",
            [(devices[number % 2], now - timedelta(seconds=number)) for number in range(ROWS)],
        )
        connection.execute(
            "INSERT INTO producer_runs (run_id, partition, source, state, acknowledged, started_at, updated_at) "
            "VALUES (%s, -1, 'simulated', 'finished', 0, now(), now())",
            [run],
        )
        summaries.ingestion_rate(stack.settings)
        summaries.device_summary(stack.settings)
        yield
        connection.execute("DELETE FROM metrics WHERE device_id = ANY(%s)", [list(devices)])
        connection.execute("DELETE FROM producer_runs WHERE run_id = %s", [run])


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: re.sub(r"\s+", " ", query)[:40])
@pytest.mark.usefixtures("readings")
def test_every_query_of_the_documents_runs_and_finds_something(query: str, stack: RunningStack) -> None:
    ended = stack.cli("sql", query, "--json")
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout)
    assert rows
    assert any(value is not None for value in rows[0].values())


def test_there_are_queries() -> None:
    assert len(QUERIES) >= 9
    assert "SELECT count(*) FROM metrics" in QUERIES
