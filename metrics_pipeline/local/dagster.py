"""Dagster's processes: the code server that holds the definitions and runs the jobs, the webserver, the daemon.

One code server serves both others (and is the parent of every run), so the definitions are imported once.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import requests
from grpc_health.v1 import health_pb2, health_pb2_grpc
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from metrics_pipeline import loopback, postgres
from metrics_pipeline.local.environment import dagster_home, for_python
from metrics_pipeline.local.service import Service, http_problem
from metrics_pipeline.settings import ROOT, Settings, workplace

DEFINITIONS = "metrics_pipeline.definitions"
LOCATION = "metrics_pipeline"
HEARTBEATS = (
    """query { instance { daemonHealth { allDaemonStatuses { daemonType required healthy lastHeartbeatTime } } } }"""
)
START_SECONDS = 180
"""How long a run may take to start: on a busy machine a process needs minutes to import what a run needs. Dagster waits for 60 s otherwise, fails the
run, and the next one meets the same."""
CLOCK_SECONDS = 5.0
"""By how much a heartbeat may lie ahead."""
ACTIVE_RUNS = """query { runsOrError(filter: {statuses: [QUEUED, NOT_STARTED, STARTING, STARTED, CANCELING]}) {
  ... on Runs { results { runId jobName status } } } }"""
AGAIN = Retry(
    total=2, connect=0, read=0, status_forcelist=[500], allowed_methods=None, backoff_factor=0.1, raise_on_status=False
)
"""After a restart of PostgreSQL the webserver's first answer is an error: its connections are from before."""
TERMINATE = """mutation($ids: [String!]!) { terminateRuns(runIds: $ids) { __typename } }"""


def services(settings: Settings) -> list[Service]:
    """Code server, webserver and daemon as children of the keeper."""
    environment = for_python(settings) | {"DAGSTER_GRPC_TIMEOUT_SECONDS": str(START_SECONDS)}
    logs, home = settings.data_dir / "logs", dagster_home(settings)
    workspace = settings.data_dir / "config" / "workspace.yaml"
    bin_dir = Path(sys.executable).parent

    def prepare() -> None:
        prepare_home(settings)
        workspace.parent.mkdir(parents=True, exist_ok=True)
        workspace.write_text(
            f"load_from:\n  - grpc_server: {{host: 127.0.0.1, port: {settings.dagster_code_port}, location_name: {LOCATION}}}\n"
        )

    def part(
        name: str, title: str, url: str, command: list[str], check: Callable[[], str | None], needs: tuple[str, ...]
    ) -> Service:
        return Service(
            name=name,
            title=title,
            url=url,
            command=[str(bin_dir / command[0]), *command[1:]],
            environment=environment,
            log=logs / f"{name}.log",
            check=check,
            needs=needs,
            prepare=prepare,
            # Not the folder of `.env`, which Dagster would load over the ports chosen here.
            cwd=home,
            stop_seconds=20,
        )

    web = [
        "dagster-webserver",
        "-h",
        "127.0.0.1",
        "-p",
        str(settings.dagster_port),
        "-w",
        str(workspace),
        "--suppress-warnings",
    ]
    return [
        part("code", "Dagster code server", f"grpc://127.0.0.1:{settings.dagster_code_port}",
             code_command(settings, "127.0.0.1"), lambda: code_problem(settings), ("databases",)),
        part("webserver", "Dagster UI", settings.dagster_http, [*web, "--log-level", "warning"],
             lambda: web_problem(settings), ("code",)),
        part("daemon", "Dagster daemon", "", ["dagster-daemon", "run", "-w", str(workspace), "--log-level", "warning"],
             lambda: None, ("code",)),
    ]  # fmt: skip


def code_command(settings: Settings, host: str) -> list[str]:
    """What serves the definitions by gRPC, on DAGSTER_CODE_PORT."""
    command = ["dagster", "api", "grpc", "-m", DEFINITIONS, "-d", str(workplace())]
    command += ["-h", host, "-p", str(settings.dagster_code_port)]
    return [*command, "--location-name", LOCATION, "--log-level", "warning"]


def prepare_home(settings: Settings) -> None:
    """Make Dagster's folder, with our `dagster.yaml` in it."""
    home = dagster_home(settings)
    home.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / "dagster_home" / "dagster.yaml", home / "dagster.yaml")


MAKE_TABLES = [sys.executable, "-c", "from dagster import DagsterInstance; DagsterInstance.get()"]
"""Dagster's processes make its tables on first use, and several of them at once collide: this one goes first."""


MIGRATE_TABLES = [str(Path(sys.executable).parent / "dagster"), "instance", "migrate"]
"""After an upgrade of Dagster: without it, what the new release asks for may not be there."""


def tables_command(settings: Settings) -> tuple[str, list[str]] | None:
    """What Dagster's own database still needs, as what it was and the command that does it; None when it is up to date."""
    with postgres.connect_dagster(settings) as connection:
        found = connection.execute("SELECT to_regclass('alembic_version') IS NOT NULL").fetchone()
        if found != (True,):
            return "made", MAKE_TABLES
        revision = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if revision == (newest_revision(),) else ("migrated", MIGRATE_TABLES)


def newest_revision() -> str:
    """The revision of the tables that the installed Dagster wants, as its migrations name it.

    Alembic would say the same, but imports each of them, and Dagster with them, which takes seconds.
    """
    package = find_spec("dagster")
    assert package is not None  # noqa: S101  # it is a dependency
    assert package.origin is not None  # noqa: S101
    folder = Path(package.origin).parent / "_core" / "storage" / "alembic" / "versions"
    texts = [file.read_text("utf-8") for file in folder.glob("*.py")]
    revisions, former = (
        {found[1] for text in texts if (found := re.search(rf"^{name} = ['\"](\w+)['\"]", text, re.MULTILINE))}
        for name in ("revision", "down_revision")
    )
    return "".join(revisions - former)


def code_problem(settings: Settings) -> str | None:
    """None when the definitions are loaded and served, else why not."""
    with loopback.channel(f"127.0.0.1:{settings.dagster_code_port}") as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(service="DagsterApi"), timeout=3)
        except grpc.RpcError as error:
            return f"no answer ({type(error).__name__})"
    return None if answer.status == health_pb2.HealthCheckResponse.SERVING else "not serving"


def web_problem(settings: Settings) -> str | None:
    """None when the webserver answers, else why not."""
    return http_problem(f"{settings.dagster_http}/server_info")


def daemon_problem(settings: Settings) -> str | None:
    """None when every required daemon's heartbeat is fresh, else which are not."""
    try:
        statuses = graphql(settings, HEARTBEATS)["instance"]["daemonHealth"]["allDaemonStatuses"]
    except (requests.RequestException, KeyError, TypeError) as error:
        return f"heartbeats cannot be read ({type(error).__name__})"
    # Dagster takes a heartbeat from the future, after the clock was set back, for a fresh one.
    latest = time.time() + CLOCK_SECONDS
    late = [
        status["daemonType"]
        for status in statuses
        if status["required"] and (not status["healthy"] or (status.get("lastHeartbeatTime") or 0) > latest)
    ]
    return f"no heartbeat of {', '.join(late)}" if late else None


def terminate_runs(settings: Settings) -> list[str]:
    """Ask every active run to end; the names of the jobs that still run."""
    runs = graphql(settings, ACTIVE_RUNS)["runsOrError"]["results"]
    waiting = [run["runId"] for run in runs if run["status"] != "CANCELING"]
    if waiting:
        graphql(settings, TERMINATE, ids=waiting)
    return [run["jobName"] for run in runs]


def graphql(settings: Settings, query: str, **variables: object) -> dict[str, Any]:
    """Ask the webserver; the `data` of its answer.

    Raises:
        requests.RequestException: it cannot be reached, or answers with an error three times.
    """
    with loopback.session(settings.dagster_http) as session:
        session.mount("http://", HTTPAdapter(max_retries=AGAIN))
        answer = session.post(
            f"{settings.dagster_http}/graphql", json={"query": query, "variables": variables}, timeout=10
        )
    answer.raise_for_status()
    return dict(answer.json()["data"])
