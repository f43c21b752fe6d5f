"""`dg dev` in a clean checkout: its UI has the location, Ctrl-C ends all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from metrics_pipeline.definitions import defs
from metrics_pipeline.local.dagster import LOCATION
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline_tests.clean_checkout import CleanCheckout
from metrics_pipeline_tests.patience import patience

pytestmark = [pytest.mark.integration, pytest.mark.whole_stack]

LOADED = """query { workspaceOrError { ... on Workspace { locationEntries { name loadStatus
  locationOrLoadError { ... on RepositoryLocation { repositories { jobs { name } sensors { name } } } } } } } }"""


def location(port: int, process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    """The one location of the UI, as soon as it is loaded."""
    ends = time.monotonic() + 180
    while time.monotonic() < ends:
        assert process.poll() is None, log.read_text()
        with suppress(requests.ConnectionError, requests.Timeout):
            answer = requests.post(f"http://127.0.0.1:{port}/graphql", json={"query": LOADED}, timeout=10)
            answer.raise_for_status()
            (entry,) = answer.json()["data"]["workspaceOrError"]["locationEntries"]
            if entry["loadStatus"] == "LOADED":
                return dict(entry)
        time.sleep(0.2)
    pytest.fail(log.read_text())


def started_by(checkout: CleanCheckout) -> list[psutil.Process]:
    """Every process with the checkout's home in its environment, in whichever group and session."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME") == str(checkout.home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_dg_dev_serves_the_definitions_and_leaves_nothing_behind(tmp_path: Path) -> None:
    checkout = CleanCheckout.make(tmp_path)
    before = checkout.files()
    (port,) = free_ports(1)
    log = tmp_path / "dev.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            checkout.command(f"dev -h 127.0.0.1 -p {port}"),
            cwd=checkout.folder,
            env=checkout.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        entry = location(port, process, log)
        assert entry["name"] == LOCATION
        (repository,) = entry["locationOrLoadError"]["repositories"]
        assert {sensor["name"] for sensor in repository["sensors"]} == {sensor.name for sensor in defs.sensors or []}
        assert {job.name for job in defs.resolve_all_job_defs()} == {job["name"] for job in repository["jobs"]}
        assert len(started_by(checkout)) >= 4  # itself, code server, webserver, daemon
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=patience(90))
        _, remain = psutil.wait_procs(started_by(checkout), timeout=10)
        assert not remain
    finally:
        for left in started_by(checkout):
            with suppress(psutil.Error):
                left.kill()
        process.wait()
    assert checkout.files() == before, log.read_text()
    assert checkout.contacted == []
    assert "Traceback" not in log.read_text()
