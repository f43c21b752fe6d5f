"""The documents' queries, and its way to skip a record, on the real stack."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
import requests

from metrics_pipeline import kafka, summaries
from metrics_pipeline.settings import CONNECTOR, CONNECTOR_GROUP, TOPIC
from metrics_pipeline.sinks import connector
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.documents import DOCUMENTS, fences, page

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


def test_a_record_is_skipped_as_the_page_says(stack: RunningStack) -> None:
    (block,) = [block for block in fences(page("troubleshooting"), "sh") if "/offsets" in block]
    sink = f"{stack.settings.connect_rest}/connectors/{CONNECTOR}"
    assert f"/connectors/{CONNECTOR}\n" in block
    steps = re.findall(r"-X (\w+) \$sink/(\w+)", block)
    assert steps == [("PUT", "stop"), ("PATCH", "offsets"), ("PUT", "resume")]
    (body,) = re.findall(r"-d '(\{.*?\})'", block, re.DOTALL)
    offsets = json.loads(body)
    (place,) = offsets["offsets"]
    assert place["partition"]["kafka_topic"] == TOPIC
    partition = place["partition"]["kafka_partition"]
    # Where the sink stands, so that nothing is skipped here.
    behind = kafka.watermarks(stack.settings)[partition][1]
    place["offset"]["kafka_offset"] = behind
    _until(lambda: kafka.committed(stack.settings, CONNECTOR_GROUP).get(partition, 0) in (0, behind))
    try:
        requests.put(f"{sink}/stop", timeout=30).raise_for_status()
        _until(lambda: requests.patch(f"{sink}/offsets", json=offsets, timeout=30).ok)
        assert kafka.committed(stack.settings, CONNECTOR_GROUP)[partition] == behind
    finally:
        requests.put(f"{sink}/resume", timeout=30).raise_for_status()
        _until(lambda: connector.sink_state(stack.settings).running)


def _until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)
