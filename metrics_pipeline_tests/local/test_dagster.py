"""What is asked of Dagster's webserver, with one that fails."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from alembic.script import ScriptDirectory
from dagster._grpc.utils import default_grpc_timeout

from metrics_pipeline.local import dagster
from metrics_pipeline.settings import ROOT, Settings
from metrics_pipeline_tests.fake_http import Request, listening


@dataclass
class Webserver:
    """Answers `data`, after as many errors as `errors`."""

    data: dict[str, Any]
    errors: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)

    def respond(self, request: Request) -> None:
        self.asked.append(request.json())
        if self.errors:
            self.errors -= 1
            return request.reply(500, b"Internal Server Error", "text/plain")
        return request.reply(200, json.dumps({"data": self.data}).encode())


@pytest.fixture
def webserver() -> Iterator[Webserver]:
    found = Webserver({})
    with listening(found.respond) as server:
        found.settings = Settings(dagster_port=server.server_port)
        yield found


def test_who_launches_runs_waits_until_they_have_started() -> None:
    """Dagster's client gives up after a minute, whatever `dagster.yaml` says, and a run that it gave up has failed."""
    launching = [service for service in dagster.services(Settings()) if service.name in ("daemon", "webserver")]
    assert len(launching) == 2
    composed = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())["services"]
    home = yaml.safe_load((ROOT / "dagster_home" / "dagster.yaml").read_text())
    waits = [dict(service.environment)["DAGSTER_GRPC_TIMEOUT_SECONDS"] for service in launching]
    waits += [composed[service.name]["environment"]["DAGSTER_GRPC_TIMEOUT_SECONDS"] for service in launching]
    assert waits == [str(home["run_monitoring"]["start_timeout_seconds"])] * 4


def test_dagster_reads_how_long_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_GRPC_TIMEOUT_SECONDS", "180")
    assert default_grpc_timeout() == 180


def test_an_error_of_the_webserver_is_asked_again(webserver: Webserver) -> None:
    webserver.data, webserver.errors = {"a": 1}, 1
    assert dagster.graphql(webserver.settings, "query { a }", id="x") == {"a": 1}
    assert webserver.asked == [{"query": "query { a }", "variables": {"id": "x"}}] * 2


def test_a_webserver_that_goes_on_failing_is_an_error(webserver: Webserver) -> None:
    webserver.errors = 9
    with pytest.raises(requests.HTTPError, match="500"):
        dagster.graphql(webserver.settings, "query { a }")
    assert len(webserver.asked) == 3
    assert dagster.daemon_problem(webserver.settings) == "heartbeats cannot be read (HTTPError)"


def test_a_late_daemon_is_named(webserver: Webserver) -> None:
    statuses: list[dict[str, Any]] = [
        {"daemonType": "SENSOR", "required": True, "healthy": False},
        {"daemonType": "SCHEDULER", "required": True, "healthy": True},
        {"daemonType": "BACKFILL", "required": False, "healthy": False},
    ]
    webserver.data = {"instance": {"daemonHealth": {"allDaemonStatuses": statuses}}}
    assert dagster.daemon_problem(webserver.settings) == "no heartbeat of SENSOR"
    statuses[0]["healthy"] = True
    assert dagster.daemon_problem(webserver.settings) is None
    statuses[1]["lastHeartbeatTime"] = time.time() - 20
    assert dagster.daemon_problem(webserver.settings) is None
    statuses[1]["lastHeartbeatTime"] = time.time() + 3600
    assert dagster.daemon_problem(webserver.settings) == "no heartbeat of SCHEDULER", (
        "from before the clock was set back"
    )


def test_runs_that_are_being_canceled_are_not_asked_again(webserver: Webserver) -> None:
    runs = [
        {"runId": "1", "jobName": "produce_metrics", "status": "STARTED"},
        {"runId": "2", "jobName": "summaries", "status": "CANCELING"},
    ]
    webserver.data = {"runsOrError": {"results": runs}}
    assert dagster.terminate_runs(webserver.settings) == ["produce_metrics", "summaries"]
    assert [asked["variables"] for asked in webserver.asked] == [{}, {"ids": ["1"]}]
    del webserver.asked[:], runs[0]
    assert dagster.terminate_runs(webserver.settings) == ["summaries"]
    assert len(webserver.asked) == 1


def test_the_newest_revision_of_dagster_s_tables_is_the_one_that_alembic_names() -> None:
    package = find_spec("dagster")
    assert package is not None
    assert package.origin is not None
    script = ScriptDirectory(str(Path(package.origin).parent / "_core" / "storage" / "alembic"))
    assert script.get_heads() == [dagster.newest_revision()]
