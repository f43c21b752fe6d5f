"""The commands of docker-compose.yaml as they stand, outside containers: on loopback, against the embedded PostgreSQL and broker.

What is replaced is what the engine gives: names of hosts become 127.0.0.1, ports become free ones, volumes become folders.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import promql_parser
import psycopg
import pytest
import requests
import yaml

from metrics_pipeline.compose.connect_worker import JMX_PORT, fetch
from metrics_pipeline.compose.dashboards import ROWS
from metrics_pipeline.local import account, environment, jars, postgres
from metrics_pipeline.local.dagster import graphql, newest_revision
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.local.stack import build
from metrics_pipeline.settings import ROOT, Settings
from metrics_pipeline_tests.compose.test_dashboards import names_in
from metrics_pipeline_tests.compose_files import ports, project
from metrics_pipeline_tests.patience import deadline, patience

pytestmark = [pytest.mark.integration, pytest.mark.whole_stack]

LOAD = {"PRODUCER_MIN_METRICS": "200", "PRODUCER_MAX_METRICS": "400"}
CHECKOUT = "/opt/metrics-pipeline"


@dataclass
class Containers:
    """The services of docker-compose.yaml, started one by one in their order."""

    settings: Settings
    folder: Path
    replaced: dict[str, str]
    stack: ExitStack = field(default_factory=ExitStack)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def words(self, words: list[str]) -> list[str]:
        """A command with this machine's addresses."""
        found = [self._here(word) for word in words]
        return [str(Path(sys.executable).parent / found[0]), *found[1:]]

    def environment(self, name: str) -> dict[str, str]:
        """What the Dockerfile and the service set."""
        own = {key: self._here(value) for key, value in project(variables=LOAD)[name]["environment"].items()}
        data = self.folder / "data"
        image = {
            "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
            "HOME": str(self.folder),
            "PYTHONUNBUFFERED": "1",
            "LISTEN_HOST": "127.0.0.1",
            "PIPELINE_DATA_DIR": str(data),
            "DAGSTER_HOME": str(data / "dagster_home"),
            # In a container there is no env file, and ports are the defaults.
            "PIPELINE_ENV_FILE": str(self.folder / "none"),
            **{
                f"{name.upper()}": str(getattr(self.settings, name))
                for name in Settings.model_fields
                if name.endswith("_port")
            },
        }
        share = "connect" if name in ("connect", "watcher") else "pipeline"
        own = {
            key: value.replace("/run/metrics-secrets", str(self.folder / "secrets" / share))
            for key, value in own.items()
        }
        return (
            image
            | {key: value for key, value in own.items() if key != "SCHEMA_REGISTRY_URL"}
            | {"DAGSTER_CODE_HOST": "127.0.0.1", "PIPELINE_CACHE_DIR": str(jars.cache_dir(self.settings))}
        )

    def run(self, name: str, words: list[str] | None = None, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """A service that ends, or a command in its container."""
        command = self.words(words or project()[name]["command"])
        return subprocess.run(
            command,
            env=self.environment(name) | ({} if name != "secrets" else self._passwords()),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self, name: str, words: list[str] | None = None) -> subprocess.Popen[bytes]:
        """A service that stays; ended with the test."""
        log = self.stack.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            self.words(words or project()[name]["command"]),
            env=self.environment(name),
            cwd=self.folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

        self.processes[name] = process

        def end() -> None:
            process.terminate()
            try:
                process.wait(patience(60))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

        self.stack.callback(end)
        return process

    def healthy(self, name: str) -> subprocess.CompletedProcess[str]:
        """The service's health check."""
        _, *test = project()[name]["healthcheck"]["test"]
        return self.run(name, test, timeout=patience(60))

    def wait(self, name: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
        """Until the health check is content."""
        give_up = deadline(seconds)
        while (done := self.healthy(name)).returncode != 0:
            log = (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]
            assert process.poll() is None, f"{name} ended: {log}"
            assert time.monotonic() < give_up, f"{name}: {done.stderr}{log}"
            time.sleep(0.5)

    def _here(self, text: str) -> str:
        # In one pass: a free port may hold the digits of another one.
        return re.sub("|".join(map(re.escape, self.replaced)), lambda found: self.replaced[found[0]], text)

    def _passwords(self) -> dict[str, str]:
        return {name.upper(): getattr(self.settings, name).get_secret_value() for name in Settings.group("secrets")}


@pytest.fixture(scope="module")
def containers() -> Iterator[Containers]:
    """PostgreSQL and broker of the embedded stack, empty; then secrets, databases, connect, provision as compose runs them."""
    folder = Path(tempfile.mkdtemp(prefix="metrics-pipeline-"))
    # The folder `data` is that of the containers.
    own = {"PIPELINE_DATA_DIR": str(folder / "stack"), "PIPELINE_MEMORY_GB": "3"}
    with environment.replaced(environment.isolated(folder) | own):
        environment.write_secrets()
        settings = Settings.load()
        embedded = build(settings, with_dagster=False, quiet=True)
    started = [embedded.service(name) for name in ("postgres", "broker")]
    made = Containers(
        settings,
        folder,
        {
            "@postgres:5432": f"@127.0.0.1:{settings.postgres_port}",
            "redpanda:9092": settings.bootstrap_servers,
            "http://connect:8083": settings.connect_rest,
            "127.0.0.1:8083": f"127.0.0.1:{settings.connect_port}",
            "http://webserver:3070": settings.dagster_http,
            "127.0.0.1:3070": f"127.0.0.1:{settings.dagster_port}",
            "127.0.0.1:9187": f"127.0.0.1:{settings.exporter_port}",
            "127.0.0.1:3002": f"127.0.0.1:{settings.sink_port}",
            "3071": str(settings.dagster_code_port),
            "3070": str(settings.dagster_port),
            "0.0.0.0": "127.0.0.1",
            f"{CHECKOUT}/": f"{ROOT}/",
            "/secrets": str(folder / "secrets"),
            "/run/metrics-pipeline/watcher": str(folder / "watcher-is-alive"),
        },
    )
    try:
        with made.stack:
            for service in started:
                service.start()
            for service in started:
                service.wait_until_healthy()
            _bring_up(made)
            yield made
    finally:
        for service in reversed(started):
            service.stop()
        shutil.rmtree(account.postgres_home(settings.data_dir, account.unprivileged()), ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def _bring_up(made: Containers) -> None:
    done = made.run("secrets")
    assert done.returncode == 0, done.stderr
    assert made.healthy("secrets").returncode == 0
    pgpass = made.folder / "secrets/pipeline/pgpass"
    if os.geteuid() != 0:
        pgpass.chmod(0o600)
    text = pgpass.read_text().replace("postgres:5432:", f"127.0.0.1:{made.settings.postgres_port}:")
    pgpass.write_text(text)

    done = made.run("databases")
    assert done.returncode == 0, done.stderr
    assert "Dagster's tables were made" in done.stdout
    assert made.healthy("databases").returncode == 0

    fetch(made.settings)  # a step of the image's build; a container fetches nothing
    # The image's own command; the agent's port is fixed in a container. Here it is a second worker's: there is none.
    jmx = str(made.settings.connect_2_port)
    (command,) = re.findall(r"^CMD (\[.*connect.*\])$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    worker = made.start("connect", [*yaml.safe_load(command), "--jmx-port", jmx])
    made.replaced[str(JMX_PORT)] = jmx
    made.wait("connect", worker)

    done = made.run("provision")
    assert done.returncode == 0, done.stderr
    assert made.healthy("provision").returncode == 0
    # Side by side, as far as none needs the other.
    for names in (("code", "exporter", "sink", "watcher"), ("webserver", "daemon")):
        for name, process in [(name, made.start(name)) for name in names]:
            if name != "daemon":  # its first sign of life may take a while
                made.wait(name, process)


def test_postgresql_takes_the_file_that_is_written_for_it(containers: Containers) -> None:
    place = postgres.cluster(containers.settings, _archive(containers.settings))
    file = place.home / "metrics-pipeline.conf"  # where PostgreSQL's account may read it
    command = [word if not word.startswith("/conf/") else str(file) for word in project()["postgres-conf"]["command"]]
    assert containers.run("secrets", command).returncode == 0
    who = place.account.as_arguments() if place.account else {}
    for name, wanted in (("max_wal_size", "1024"), ("fsync", "on"), ("listen_addresses", "*"), ("work_mem", "8192")):
        done = subprocess.run(
            [place.binaries / "postgres", "-D", place.data, "-C", name, "-c", f"config_file={file}"],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            **who,
        )
        assert done.stdout.strip() == wanted, done.stderr


def _archive(settings: Settings) -> Path:
    return jars.fetch(settings, ["postgres"], quiet=True)["postgres"][0]


def test_no_secret_stands_in_a_command_or_an_environment(containers: Containers) -> None:
    secrets = {getattr(containers.settings, name).get_secret_value() for name in Settings.group("secrets")}
    for name, service in project().items():
        if "command" in service and "environment" in service and name not in ("secrets", "prometheus"):
            assert not [value for value in service["environment"].values() if value in secrets]
    for word in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = word.read_bytes().decode(errors="replace")
        except OSError:
            continue
        assert not any(secret in text for secret in secrets)


def test_the_secrets_are_read_from_files(containers: Containers) -> None:
    """The URLs have no password: PostgreSQL asks for one, and `*_FILE` and pgpass have it."""
    url = containers.environment("code")["DAGSTER_POSTGRES_URL"]
    assert url == f"postgresql://dagster@127.0.0.1:{containers.settings.postgres_port}/dagster"
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(url)


def test_dagster_s_tables_are_migrated_when_they_are_of_an_older_release(containers: Containers) -> None:
    with psycopg.connect(containers.settings.dagster_postgres_url, autocommit=True) as connection:
        (newest,) = connection.execute("SELECT version_num FROM alembic_version").fetchone() or ("",)
        assert newest == newest_revision()
        connection.execute("UPDATE alembic_version SET version_num = '7e2f3204cf8e'")
        done = containers.run("databases")
        assert "Dagster's tables were migrated" in done.stdout, done.stdout + done.stderr
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (newest,)
    assert "Dagster" not in containers.run("databases").stdout


def test_webserver_has_the_definitions_by_grpc(containers: Containers) -> None:
    query = """query { workspaceOrError { ... on Workspace { locationEntries { name loadStatus
      locationOrLoadError { __typename ... on RepositoryLocation { repositories { jobs { name } } } } } } } }"""
    (entry,) = graphql(containers.settings, query)["workspaceOrError"]["locationEntries"]
    assert (entry["name"], entry["loadStatus"]) == ("metrics_pipeline", "LOADED")
    jobs = {job["name"] for job in entry["locationOrLoadError"]["repositories"][0]["jobs"]}
    assert {"provision", "produce_metrics"} <= jobs


def test_the_sensor_launches_the_producer_and_rows_arrive(containers: Containers) -> None:
    settings = containers.settings
    give_up = deadline(120)
    with psycopg.connect(settings.role_url("metrics_reader"), autocommit=True) as connection:
        while (connection.execute("SELECT count(*) FROM metrics").fetchone() or (0,))[0] <= 5000:
            assert time.monotonic() < give_up, (containers.folder / "daemon.log").read_text()[-3000:]
            time.sleep(0.3)
    done = containers.run("code", ["metrics-pipeline", "sql", "--plain", "SELECT count(*) > 5000 FROM metrics"])
    assert done.stdout.split()[-1:] == ["True"], done.stdout + done.stderr
    while True:
        try:
            answer = requests.get(f"{settings.producer_http}/health", timeout=5)
            break
        except requests.ConnectionError:  # between two runs nobody answers
            assert time.monotonic() < give_up, (containers.folder / "daemon.log").read_text()[-3000:]
            time.sleep(0.3)
    assert (answer.status_code, answer.json()["healthy"]) == (200, True)


def test_status_is_healthy_in_the_container_of_the_code(containers: Containers) -> None:
    """Where the alerts send people; Dagster's UI is in another container, and found by DAGSTER_URL."""
    test_the_sensor_launches_the_producer_and_rows_arrive(containers)
    give_up = deadline(90)
    while (done := containers.run("code", ["metrics-pipeline", "status"])).returncode != 0:
        assert time.monotonic() < give_up, done.stdout + done.stderr
        time.sleep(0.5)
    assert containers.replaced["http://webserver:3070"] in done.stdout


def test_daemon_is_alive(containers: Containers) -> None:
    give_up = deadline(90)
    while (done := containers.healthy("daemon")).returncode != 0:
        assert time.monotonic() < give_up, done.stdout + done.stderr
        time.sleep(0.5)


def test_a_health_check_that_asks_nobody_fails(containers: Containers) -> None:
    """Each of them would notice."""
    url = f"http://127.0.0.1:{free_ports(1)[0]}/health"
    assert containers.run("code", ["python", "-m", "metrics_pipeline.compose.healthy", url]).returncode == 1
    nobody = f"grpc://127.0.0.1:{free_ports(1)[0]}/DagsterApi"
    assert containers.run("code", ["python", "-m", "metrics_pipeline.compose.healthy", nobody]).returncode == 1
    command = ["metrics-pipeline", "container", "secrets", "--directory", str(containers.folder), "--check"]
    assert containers.run("code", command).returncode == 1


def test_a_worker_without_the_plugin_is_not_healthy(containers: Containers) -> None:
    """It answers, has joined its group, and could run no connector of ours."""
    _, *test = project()["connect"]["healthcheck"]["test"]
    assert containers.run("connect", test).returncode == 0
    test[-1] = test[-1].replace("JdbcSinkConnector", "AbsentConnector")
    done = containers.run("connect", test)
    assert (done.returncode, "AbsentConnector/config: HTTP Error 404" in done.stderr) == (1, True)


def test_a_stopped_code_server_lets_the_producer_flush(containers: Containers) -> None:
    """As an engine does it: one SIGTERM. The run ends, and its ledger says with what."""
    test_the_sensor_launches_the_producer_and_rows_arrive(containers)
    process = containers.processes["code"]
    process.terminate()
    assert process.wait(55) == 0
    with psycopg.connect(containers.settings.role_url("metrics_reader")) as connection:
        rows = connection.execute("SELECT DISTINCT state FROM producer_runs").fetchall()
        unknown = connection.execute("SELECT sum(unknown), sum(acknowledged) FROM producer_runs").fetchone()
    assert ("running",) not in rows
    assert unknown is not None
    assert unknown[0] == 0
    assert unknown[1] > 5000
    containers.wait("code", containers.start("code"))


def test_every_figure_of_dashboard_and_alerts_is_exported(containers: Containers) -> None:
    """All but Redpanda's, which does not run here: those are cited in dashboards.py."""
    test_the_sensor_launches_the_producer_and_rows_arrive(containers)
    settings = containers.settings
    urls = [f"{base}/metrics" for base in (settings.producer_http, settings.sink_http, settings.exporter_http)]
    urls.append(f"http://127.0.0.1:{containers.replaced[str(JMX_PORT)]}/metrics")
    exported: set[str] = {"up"}
    for url in urls:
        answer = requests.get(url, timeout=30)
        answer.raise_for_status()
        # A family without a sample yet is exported, too.
        for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", answer.text, re.MULTILINE):
            exported |= {name + end for end in ("", *(("_bucket", "_count", "_sum") if kind == "histogram" else ()))}
    rules = yaml.safe_load((ROOT / "compose/prometheus/alerts.yaml").read_text("utf-8"))
    queries = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    queries += [query for _, row in ROWS for panel in row for _, query in panel.queries]
    named = {name for query in queries for name in names_in(promql_parser.parse(query))}
    missing = {name for name in named - exported if not name.startswith("redpanda_")}
    assert not missing
    assert len(named & exported) > 25
    assert ports(project()["exporter"])
