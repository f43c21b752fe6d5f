"""The embedded stack as such."""

from __future__ import annotations

import pytest
import requests

from metrics_pipeline import kafka
from metrics_pipeline.sinks import connector
from metrics_pipeline_tests.conftest import RunningStack

pytestmark = pytest.mark.integration


def test_real_parts_are_the_pinned_ones(stack: RunningStack) -> None:
    with stack.admin() as connection:
        row = connection.execute("SHOW server_version").fetchone()
    assert row is not None
    assert row[0].startswith("17.")
    assert requests.get(stack.settings.connect_rest, timeout=5).json()["version"] == "4.3.1"


def test_durability_is_on(stack: RunningStack) -> None:
    with stack.admin() as connection:
        found = dict(
            connection.execute(
                "SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit', 'data_checksums')"
            ).fetchall()
        )
    assert found == {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "data_checksums": "on"}


def test_topic_and_connector_are_as_configured(stack: RunningStack) -> None:
    assert kafka.topic_drift(stack.settings) == []
    assert connector.connector_drift(stack.settings) == []


def test_everything_listens_on_loopback_only(stack: RunningStack) -> None:
    ours = {process.pid: service.name for service in stack.services.services if (process := service.process)}
    import psutil

    addresses = {
        (ours[c.pid], c.laddr.ip)
        for c in psutil.net_connections("tcp")
        if c.pid in ours and c.status == psutil.CONN_LISTEN and c.laddr
    }
    assert {name for name, _ in addresses} == {"postgres", "broker", "connect"}
    assert {ip.removeprefix("::ffff:") for _, ip in addresses} == {"127.0.0.1"}
