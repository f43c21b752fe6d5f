"""The whole pipeline as `metrics-pipeline up` runs it, with parts of it killed under load.

A stack of its own, Dagster included, at its own ports and folder. The tests share it and leave it healthy; each may run alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import requests
import stamina

from metrics_pipeline.local.account import postgres_home, unprivileged
from metrics_pipeline.local.dagster import graphql
from metrics_pipeline.local.environment import isolated, replaced
from metrics_pipeline.local.state import StackState
from metrics_pipeline.local.status import Sampler, is_healthy
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.fakes import until
from metrics_pipeline_tests.patience import patience

pytestmark = [pytest.mark.integration, pytest.mark.whole_stack]

POLL_SECONDS = 0.3
LOAD = {
    # Little enough that each test soon verifies all that has piled up since the first one.
    "PRODUCER_PUBLISH_INTERVAL": "500",
    "PRODUCER_MIN_METRICS": "100",
    "PRODUCER_MAX_METRICS": "300",
    # No test waits for the end of a run, or meets the time between two.
    "PRODUCER_RUN_SECONDS": "3600",
}


@dataclass(frozen=True)
class Pipeline:
    """A running pipeline.

    Attributes:
        environment: ports and folders of its own.
        data: its data folder.
    """

    environment: dict[str, str]
    data: Path

    def cli(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command of ours against it."""
        command = [sys.executable, "-m", "metrics_pipeline", *arguments]
        return subprocess.run(
            command,
            env=self.environment,
            cwd=self.data.parent,
            capture_output=True,
            text=True,
            timeout=patience(timeout),
            check=False,
        )

    def wait(self, what: str, condition: Callable[[dict[str, Any]], bool], limit: float = 90) -> float:
        """Wait until a sample satisfies the condition; the seconds it took.

        Its rates count from the begin of the wait: what was stored before is no sign of life.
        """
        began = time.monotonic()
        sample: dict[str, Any] = {}
        with closing(Sampler(self.settings())) as sampler:
            while time.monotonic() - began < patience(limit):
                sample = sampler.sample()
                if condition(sample):
                    return time.monotonic() - began
                time.sleep(POLL_SECONDS)
        pytest.fail(f"not {what} after {patience(limit):.0f} s: {json.dumps(sample)}")

    def wait_healthy(self, limit: float = 90) -> float:
        """Wait until every part is healthy and rows keep coming."""
        return self.wait(
            "healthy",
            lambda s: (
                all(s[part]["healthy"] for part in ("postgres", "broker", "connect", "producer", "dagster"))
                and (s["rows_per_second"] or 0) > 0
            ),
            limit,
        )

    def status(self) -> dict[str, Any]:
        """What `status` says as soon as it finds all well: on a busy machine, a part may once not answer it in time."""
        said: list[subprocess.CompletedProcess[str]] = []

        def well() -> bool:
            said[:] = [self.cli("status", "--json")]
            return said[0].returncode == 0

        assert until(well, 30), said[0].stdout + said[0].stderr
        return dict(json.loads(said[0].stdout))

    def child(self, name: str) -> psutil.Process:
        """The process of a service."""
        found = StackState.read(self.data).children[name].find()
        assert found is not None, f"{name} does not run"
        return found

    def wait_for_another(self, name: str, former: int) -> None:
        """Wait until the keeper looks after another process of a service."""

        def another() -> bool:
            found = StackState.read(self.data).children[name].find()
            return found is not None and found.pid != former

        assert until(another, 60), f"{name} is not another one after 60 s"

    def kill_keeper(self) -> None:
        """End the keeper, and nothing else."""
        keeper = StackState.read(self.data).keeper
        assert keeper is not None
        process = keeper.find()
        assert process is not None
        process.kill()
        assert until(lambda: keeper.find() is None)

    def settings(self) -> Settings:
        """As its processes read them."""
        with replaced(self.environment):
            return Settings.load()

    def verify(self) -> None:
        """Nothing lost, nothing added, nothing changed."""
        report = self.cli("verify", "--json", timeout=600)
        assert report.returncode == 0, report.stdout + report.stderr


@contextmanager
def own_pipeline(**variables: str) -> Iterator[Pipeline]:
    """Folder and ports of a pipeline that is not up yet, set to these variables besides; ended by `down`."""
    folder = Path(tempfile.mkdtemp(prefix="metrics-pipeline-up-"))
    own = {"PIPELINE_MEMORY_GB": "4"} | LOAD | variables
    pipeline = Pipeline(dict(os.environ) | isolated(folder) | own, folder / "data")
    try:
        yield pipeline
    finally:
        stopped = pipeline.cli("down")
        shutil.rmtree(postgres_home(folder / "data", unprivileged()), ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    """`metrics-pipeline up --detach`, healthy."""
    with own_pipeline() as running:
        started = running.cli("up", "--detach", timeout=400)
        assert started.returncode == 0, started.stdout + started.stderr
        running.wait_healthy()
        yield running


def test_it_runs_and_verifies(pipeline: Pipeline) -> None:
    pipeline.wait(
        "fast", lambda s: (s["acknowledged_per_second"] or 0) > 200 and s["latency_seconds"]["p99"] is not None
    )
    assert is_healthy(pipeline.status())
    pipeline.verify()


def test_ctrl_c_while_it_starts_ends_quietly() -> None:
    """A person who thinks better of it is told of no failure."""
    with own_pipeline() as place:
        with subprocess.Popen(
            [sys.executable, "-m", "metrics_pipeline", "up"],
            env=place.environment,
            cwd=place.data.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            first = next(line for line in process.stdout if " is up: " in line or " has started" in line)
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
            assert process.wait(60) == 130, first + rest
        assert "error:" not in rest
        assert "SIGINT: stopping everything in order" in rest
        assert StackState.read(place.data).children == {}


def test_a_second_keeper_is_refused(pipeline: Pipeline) -> None:
    second = pipeline.cli("up")
    assert second.returncode == 1
    assert "is running already" in second.stderr


RUNS = """query { runsOrError(filter: {pipelineName: "produce_metrics"}, limit: 5) {
  ... on Runs { results { runId status } } } }"""
TERMINATE = """mutation ($id: String!) { terminateRun(runId: $id) { __typename } }"""


def test_a_run_terminated_in_dagster_is_flushed_counted_and_followed_by_another(pipeline: Pipeline) -> None:
    pipeline.wait_healthy()
    settings = pipeline.settings()

    def runs() -> dict[str, str]:
        return {run["runId"]: run["status"] for run in graphql(settings, RUNS)["runsOrError"]["results"]}

    def started(but: str = "") -> str | None:
        return next((run for run, status in runs().items() if status == "STARTED" and run != but), None)

    run = started()
    assert run is not None
    pipeline.wait("at work", lambda s: (s["acknowledged_per_second"] or 0) > 200)
    assert graphql(settings, TERMINATE, id=run)["terminateRun"]["__typename"] == "TerminateRunSuccess"
    pipeline.wait("ended", lambda _: runs()[run] not in ("STARTED", "CANCELING"), 60)
    assert runs()[run] == "CANCELED"
    counted = pipeline.cli(
        "sql",
        "--plain",
        f"SELECT min(state), max(state), sum(acknowledged) > 200, sum(failed), sum(unknown) FROM producer_runs WHERE run_id = '{run}'",
    )
    assert counted.stdout.split() == ["stopped", "stopped", "True", "0", "0"], counted.stdout + counted.stderr
    pipeline.wait("followed by another", lambda _: started(but=run) is not None, 120)
    pipeline.wait_healthy()
    pipeline.verify()


@pytest.mark.parametrize("name", ["connect", "broker"])
def test_a_killed_service_comes_back(pipeline: Pipeline, name: str) -> None:
    pipeline.wait_healthy()
    process = pipeline.child(name)
    process.kill()
    pipeline.wait_for_another(name, process.pid)
    pipeline.wait_healthy()
    pipeline.verify()


def test_postgres_restarted_by_hand(pipeline: Pipeline) -> None:
    pipeline.wait_healthy()
    old = pipeline.child("postgres")
    arguments = old.cmdline()
    data = arguments[arguments.index("-D") + 1]
    account = unprivileged()
    who = account.as_arguments() if account else {}
    command = [
        str(Path(arguments[0]).with_name("pg_ctl")),
        "restart",
        "-m",
        "immediate",
        "-D",
        data,
        "-l",
        "/dev/null",
        "-w",
    ]
    subprocess.run(
        command, check=True, capture_output=True, cwd="/", timeout=patience(60), env={"LANG": "C.UTF-8"}, **who
    )
    pipeline.wait_for_another("postgres", old.pid)
    pipeline.wait_healthy()
    pipeline.verify()


def test_a_killed_keeper_is_followed_by_one_that_takes_over(pipeline: Pipeline) -> None:
    pipeline.wait_healthy()
    state = StackState.read(pipeline.data)
    pipeline.kill_keeper()
    assert pipeline.child("broker").is_running()
    again = pipeline.cli("up", "--detach", timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert StackState.read(pipeline.data).children["broker"] == state.children["broker"], (
        "the broker was adopted, not restarted"
    )
    pipeline.wait_healthy()
    pipeline.verify()


def test_no_secret_shows(pipeline: Pipeline) -> None:
    lines = [
        line.split("=", 1)
        for line in Path(pipeline.environment["PIPELINE_ENV_FILE"]).read_text().splitlines()
        if "PASSWORD=" in line
    ]
    secrets = [value.strip("'\"") for _, value in lines]
    assert len(secrets) == 7
    settings = pipeline.settings()
    places = {f"log {path.name}": path.read_text(errors="replace") for path in (pipeline.data / "logs").glob("*.log")}
    for process in psutil.process_iter(["cmdline"]):
        places[f"ps {process.pid}"] = " ".join(process.info["cmdline"] or [])
    connect, dagster, producer = settings.connect_rest, settings.dagster_http, settings.producer_http
    for path in (
        "/",
        "/connectors?expand=info&expand=status",
        "/connectors/metrics-postgres-sink/config",
        "/connector-plugins",
    ):
        places[f"Connect {path}"] = requests.get(connect + path, timeout=10).text
    query = "{ runsOrError { ... on Runs { results { runConfigYaml tags { value } } } } instance { info } workspaceOrError { __typename } }"
    # All of the answer, errors too: not only the data that `graphql` returns.
    places["Dagster"] = requests.post(f"{dagster}/graphql", json={"query": query}, timeout=10).text
    # Between two runs nobody answers there.
    for attempt in stamina.retry_context(
        on=requests.ConnectionError, timeout=patience(90), wait_initial=0.5, wait_max=2
    ):
        with attempt:
            places |= {
                f"producer {path}": requests.get(producer + path, timeout=10).text
                for path in ("/metrics", "/status", "/health")
            }
    with psycopg.connect(settings.dagster_postgres_url) as connection:
        places["Dagster's event log"] = str(
            connection.execute("SELECT string_agg(event, '') FROM event_logs").fetchone()
        )
        places["Dagster's runs"] = str(connection.execute("SELECT string_agg(run_body, '') FROM runs").fetchone())
    assert [place for place, text in places.items() if any(secret in text for secret in secrets)] == []


def test_everything_listens_on_loopback_only(pipeline: Pipeline) -> None:
    family = {
        process.pid
        for child in StackState.read(pipeline.data).children.values()
        if (found := child.find())
        for process in [found, *found.children(recursive=True)]
    }
    listening = {
        c.laddr.ip.removeprefix("::ffff:")
        for c in psutil.net_connections("tcp")
        if c.pid in family and c.status == psutil.CONN_LISTEN and c.laddr
    }
    assert listening == {"127.0.0.1"}
