"""Docker compose, checked as far as files go: schema, hardening, start order, and one source with the embedded stack."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import jsonschema
import pytest
import yaml
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from metrics_pipeline.compose import code, secrets
from metrics_pipeline.compose import connect_worker as container_connect
from metrics_pipeline.compose.commands import INITDB_CONF
from metrics_pipeline.local import connect_worker, jars, postgres
from metrics_pipeline.local.budget import GIB, Budget, postgres_memory
from metrics_pipeline.reference import default
from metrics_pipeline.settings import ROOT, Settings
from metrics_pipeline.sinks.connector import connector_config
from metrics_pipeline_tests.compose_files import (
    ARCHIVE,
    CLUSTER,
    FILES,
    MAIN,
    REPLAY,
    VARIABLE,
    all_before,
    each,
    ours,
    ports,
    project,
)
from metrics_pipeline_tests.containers import scenarios as containers
from metrics_pipeline_tests.documents import page, table
from metrics_pipeline_tests.fake_http import Request, listening

pytestmark = pytest.mark.usefixtures("another_data_folder")

BIN = Path(sys.executable).parent
STACKS = [(MAIN,), (MAIN, CLUSTER)]
STACK_IDS = ["one broker", "three brokers"]
ONE_SHOTS = {"secrets", "postgres-conf", "databases", "provision"}
SECRETS = "/run/metrics-secrets/"


def field_default(name: str) -> str:
    return default(Settings.model_fields[name.lower()])


# The files as such


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_file_is_what_the_compose_specification_says(file: Path) -> None:
    done = subprocess.run(
        [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_key_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(MAIN.read_text("utf-8").replace("stop_grace_period: 60s", "stop_grace_perod: 60s"), "utf-8")
    done = subprocess.run(
        [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file], capture_output=True, check=False
    )
    assert done.returncode != 0


def test_dockerfile_is_clean() -> None:
    done = subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_variable_is_a_setting_with_its_default(file: Path) -> None:
    found = {(match["name"], match["default"]) for match in VARIABLE.finditer(file.read_text("utf-8"))}
    assert found
    assert len(re.findall(r"\$\{", file.read_text("utf-8"))) == len(VARIABLE.findall(file.read_text("utf-8")))
    for name, given in found:
        assert name.lower() in Settings.model_fields, f"{name} is no setting"
        if (file, name) == (CLUSTER, "TOPIC_REPLICATION_FACTOR"):  # what the overlay is for
            assert given == "3"
        elif (file, name) in ((REPLAY, "REPLAY_FOLDER"), (ARCHIVE, "METRICS_ARCHIVE")):  # nothing to mount without
            assert given is None
        else:
            assert given in ("", field_default(name)), f"{name}: {given!r}"


@pytest.mark.parametrize("files", STACKS, ids=STACK_IDS)
@pytest.mark.parametrize("variables", [None, {}], ids=[".env.example", "no .env"])
def test_every_variable_resolves(files: tuple[Path, ...], variables: dict[str, str] | None) -> None:
    assert len(project(*files, variables=variables)) >= 16


def test_the_replay_folder_is_mounted_where_runs_and_sensors_are() -> None:
    code = project(MAIN, REPLAY, variables={"REPLAY_FOLDER": "/srv/inbox", "REPLAY_RECIPE": "tasmota"})["code"]
    (mount,) = [volume for volume in code["volumes"] if not isinstance(volume, str)]
    assert (mount["source"], mount["target"]) == ("/srv/inbox", code["environment"]["REPLAY_FOLDER"])
    assert code["environment"]["REPLAY_RECIPE"] == "tasmota"
    given = {name for name in code["environment"] if name.startswith("REPLAY_")}
    assert given == {name.upper() for name in Settings.group("replay")}
    with pytest.raises(KeyError, match="REPLAY_FOLDER"):
        project(MAIN, REPLAY, variables={})


def test_the_archive_is_mounted_where_runs_and_commands_are() -> None:
    code = project(MAIN, ARCHIVE, variables={"METRICS_ARCHIVE": "/srv/archive"})["code"]
    (mount,) = [volume for volume in code["volumes"] if not isinstance(volume, str)]
    assert (mount["source"], mount["target"]) == ("/srv/archive", code["environment"]["METRICS_ARCHIVE"])
    with pytest.raises(KeyError, match="METRICS_ARCHIVE"):
        project(MAIN, ARCHIVE, variables={})


# Each service


@pytest.mark.parametrize("files", STACKS, ids=STACK_IDS)
def test_every_published_port_is_on_loopback_and_used_once(files: tuple[Path, ...]) -> None:
    taken: list[int] = []

    def check(name: str, service: dict[str, Any]) -> None:
        assert "network_mode" not in service or service["network_mode"] == "none", name
        for host, published, _ in ports(service):
            assert host == "127.0.0.1", name
            first, _, last = published.partition("-")
            taken.extend(range(int(first), int(last or first) + 1))

    each(check, *files)
    assert len(taken) == len(set(taken))


@pytest.mark.parametrize("files", STACKS, ids=STACK_IDS)
def test_every_service_is_watched_bounded_and_pinned(files: tuple[Path, ...]) -> None:
    def check(name: str, service: dict[str, Any]) -> None:
        health = service["healthcheck"]
        assert health["test"][0] == "CMD", name
        assert {"start_period", "interval", "timeout"} <= health.keys(), name
        assert "disable" not in health
        limits = service["deploy"]["resources"]["limits"]
        assert re.fullmatch(r"\d+[mg]", limits["memory"]), name
        assert limits["pids"] > 0
        assert "cpus" not in limits  # an engine with fewer cores would refuse to start it
        assert service["restart"] == ("no" if name in ONE_SHOTS else "unless-stopped"), name
        assert re.fullmatch(r"\d+s", service["stop_grace_period"]), name
        assert service["logging"] == {"driver": "local", "options": {"max-size": "10m", "max-file": "5"}}, name
        assert re.search(r":v?\d+\.\d+", service["image"]), f"{name}: {service['image']} is not pinned"
        assert "container_name" not in service  # a service that is scaled has several
        assert "privileged" not in service

    each(check, *files)


@pytest.mark.parametrize("files", STACKS, ids=STACK_IDS)
def test_our_images_run_with_as_little_as_they_can(files: tuple[Path, ...]) -> None:
    def check(name: str, service: dict[str, Any]) -> None:
        if ours(service):
            assert service["read_only"] is True, name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
            # Root only to write what containers of other accounts read, and without a network.
            if name in ("secrets", "postgres-conf"):
                assert service["user"] == "0:0"
                assert service["network_mode"] == "none"
                assert service.get("cap_add", []) == (["CHOWN"] if name == "secrets" else [])
            else:
                assert "user" not in service
                assert "cap_add" not in service, name
        for volume in service.get("volumes", ()):
            assert "docker.sock" not in str(volume)
            if "secrets-" in str(volume) and name != "secrets":
                assert str(volume).endswith(":ro"), name
            assert not str(volume).startswith("secrets:") or name == "secrets"

    each(check, *files)
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    last_user = re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE)[-1]
    assert last_user == f"{secrets.PIPELINE_UID}:{secrets.PIPELINE_UID}"


WRITABLE_BY_ALL = {"/tmp", "/var/run/postgresql"}  # modes 1777 and 3777 in the images


@pytest.mark.parametrize("files", STACKS, ids=STACK_IDS)
def test_every_tmpfs_is_writable_by_the_account_of_its_service(files: tuple[Path, ...]) -> None:
    """It takes the mode of the folder that it covers, whatever `mode=` says, but belongs to root unless told otherwise."""

    def check(name: str, service: dict[str, Any]) -> None:
        for entry in service.get("tmpfs", ()):
            folder, _, options = entry.partition(":")
            if folder not in WRITABLE_BY_ALL and service.get("user", "") != "0:0":
                assert ours(service), f"{name}: whose {folder} is, is not known"
                owner = f"uid={secrets.PIPELINE_UID},gid={secrets.PIPELINE_UID}"
                assert owner in options, f"{name}: {entry}"

    each(check, *files)
    folders = {entry.partition(":")[0] for entry in project()["connect"]["tmpfs"]}
    (data,) = re.findall(r"PIPELINE_DATA_DIR=(/run/\S+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert data in folders


@pytest.mark.parametrize("files", STACKS, ids=STACK_IDS)
def test_an_image_is_built_by_one_service(files: tuple[Path, ...]) -> None:
    """Each `build:` is built and exported by itself: several of one tag leave dangling images, or fail on each other's."""
    services = project(*files)
    builders: dict[str, list[str]] = {service["image"]: [] for service in services.values() if ours(service)}
    for name, service in services.items():
        if "build" in service:
            builders[service["image"]].append(name)
    assert {image: len(names) for image, names in builders.items()} == dict.fromkeys(builders, 1), builders
    assert len(builders) == 2
    assert not [name for name, service in services.items() if ours(service) and service["pull_policy"] != "never"]
    for name, service in services.items():
        # Also `up NAME` and `run NAME` build the image, since they start what the service needs.
        if ours(service):
            (builder,) = builders[service["image"]]
            assert name == builder or builder in all_before(services, name) or name.startswith("connect-"), name


# The start order


@pytest.mark.parametrize("files", STACKS, ids=STACK_IDS)
def test_start_order_is_a_graph_without_circles(files: tuple[Path, ...]) -> None:
    services = project(*files)
    for name, service in services.items():
        all_before(services, name)
        for need, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if need in ONE_SHOTS else "service_healthy"
            assert how == {"condition": wanted}, f"{name} → {need}"
            # Otherwise a profile that is off would keep a service of another one from starting.
            assert not services[need].get("profiles") or services[need]["profiles"] == service.get("profiles")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("secrets", "postgres"),
        ("postgres-conf", "postgres"),
        ("postgres", "databases"),
        ("databases", "provision"),
        ("redpanda", "connect"),
        ("databases", "connect"),
        ("connect", "provision"),
        ("databases", "code"),
        ("redpanda", "code"),
        ("code", "webserver"),
        ("code", "daemon"),
        ("provision", "daemon"),
        ("redpanda", "sink"),
        ("databases", "sink"),
        ("redpanda", "watcher"),
        ("databases", "watcher"),
        ("databases", "exporter"),
        ("connect", "console"),
        ("databases", "pgadmin"),
        ("prometheus", "grafana"),
    ],
)
def test_one_starts_before_the_other(first: str, then: str) -> None:
    assert first in all_before(project(), then)


def test_three_brokers_come_before_their_clients() -> None:
    services = project(MAIN, CLUSTER)
    brokers = {"redpanda", "redpanda-2", "redpanda-3"}
    for name in ("connect", "connect-2", "provision", "sink", "watcher", "code", "exporter"):
        assert brokers <= all_before(services, name), name
    assert "connect-2" in all_before(services, "provision")


@pytest.mark.parametrize("files", STACKS, ids=STACK_IDS)
def test_what_a_service_writes_to_stops_after_it(files: tuple[Path, ...]) -> None:
    """An engine stops in the reverse order of the start: a producer that stops last would have nobody to flush to."""
    services = project(*files)
    seen = set()
    for name, service in services.items():
        environment = service.get("environment", {})
        if name in ONE_SHOTS or not environment.get("POSTGRES_URL"):
            continue
        before = all_before(services, name)
        brokers = {broker.partition(":")[0] for broker in environment["KAFKA_URL"].split(",")}
        assert {"postgres"} | brokers <= before, f"{name} outlives {({'postgres'} | brokers) - before}"
        seen.add(name)
    assert {"code", "connect", "sink", "watcher", "exporter", "webserver", "daemon"} <= seen


def seconds(text: str) -> float:
    assert re.fullmatch(r"\d+s", text), text
    return float(text[:-1])


@pytest.mark.parametrize("files", STACKS, ids=STACK_IDS)
def test_a_busy_machine_has_time_to_stop_and_to_answer(files: tuple[Path, ...]) -> None:
    """At a load of 25 a second of computing takes twelve; after its grace period a container is killed."""

    def check(name: str, service: dict[str, Any]) -> None:
        if name not in ONE_SHOTS:
            assert seconds(service["stop_grace_period"]) >= 30, name
        health = service["healthcheck"]
        heavy = health["test"][1] in ("dagster-daemon", "dagster")
        assert seconds(health["timeout"]) >= (60 if heavy else 5), f"{name} imports Dagster for each check"

    each(check, *files)
    services = project(*files)
    # What the code server waits for, with as much again for the last words of the runs.
    assert seconds(services["code"]["stop_grace_period"]) >= 1.5 * code.RUNS_SECONDS + code.SERVER_SECONDS
    assert Settings.load().producer_flush_seconds < code.RUNS_SECONDS


@pytest.mark.parametrize("files", STACKS, ids=STACK_IDS)
def test_no_service_gains_or_keeps_rights_that_it_does_not_need(files: tuple[Path, ...]) -> None:
    def check(name: str, service: dict[str, Any]) -> None:
        assert "no-new-privileges:true" in service["security_opt"], name
        if not name.startswith("redpanda"):  # never tried with less
            assert service["cap_drop"] == ["ALL"], name

    each(check, *files)


def test_provisioning_does_schema_topic_and_connector_in_this_order() -> None:
    from metrics_pipeline.definitions import defs

    command = project()["provision"]["command"]
    assert command == ["dagster", "job", "execute", "-m", "metrics_pipeline.definitions", "-j", "provision"]
    graph = defs.resolve_asset_graph()
    order = [key.to_user_string() for key in graph.toposorted_asset_keys]
    places = [order.index(name) for name in ("metrics_schema", "metrics_topic", "metrics_sink_connector")]
    assert places == sorted(places)


# One source with the embedded stack


def test_what_is_set_in_env_reaches_the_pipeline() -> None:
    """Every setting that means something in containers, by its name, empty for the default."""
    raw = yaml.safe_load(MAIN.read_text("utf-8"))["x-pipeline-environment"]
    names = [
        *Settings.group("producer"),
        *Settings.group("topic"),
        *Settings.group("sink"),
        *Settings.group("monitoring"),
    ]
    names = [name for name in names if name != "schema_registry_url"]  # it is Redpanda's own
    for name in [*names, "disk_free_limit_gb"]:
        assert raw[name.upper()] == f"${{{name.upper()}:-}}", name
    others = raw.keys() - {name.upper() for name in names} - {"DISK_FREE_LIMIT_GB"}
    known = {name.upper() for name in Settings.model_fields}
    assert {name.removesuffix("_FILE") for name in others} - known == {
        "DAGSTER_GRPC_TIMEOUT_SECONDS",
        "DAGSTER_POSTGRES_URL",
        "PGPASSFILE",
        "DAGSTER_CODE_HOST",
        "no_proxy",
        "NO_PROXY",
    }


def test_no_service_of_ours_is_asked_through_a_proxy() -> None:
    """Docker may hand one to every container."""
    environment = project(MAIN, CLUSTER)["code"]["environment"]
    excepted = set(environment["no_proxy"].split(","))
    assert environment["NO_PROXY"] == environment["no_proxy"]
    urls = [
        environment[name] for name in ("POSTGRES_URL", "CONNECT_URL", "SCHEMA_REGISTRY_URL", "DAGSTER_POSTGRES_URL")
    ]
    hosts = {urlsplit(one).hostname for url in urls for one in url.split(",")} | {environment["DAGSTER_CODE_HOST"]}
    assert hosts <= excepted


def test_env_example_gives_the_pipeline_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = Settings.load()
    for name, value in project()["code"]["environment"].items():
        if not name.endswith(("_FILE", "_URL")):
            monkeypatch.setenv(name, value)
    assert Settings.load() == defaults


def test_ports_inside_are_those_of_the_settings() -> None:
    services = project()
    inside = {name: [port for _, _, port in ports(service)] for name, service in services.items()}
    settings = Settings.load()
    assert inside["code"] == [settings.producer_port]
    assert services["code"]["environment"]["DAGSTER_URL"] == f"http://webserver:{inside['webserver'][0]}"
    assert inside["webserver"] == [settings.dagster_port]
    assert inside["sink"] == [settings.sink_port]
    assert inside["exporter"] == [settings.exporter_port]
    assert inside["connect"] == [settings.connect_port]
    inside["code"].append(settings.dagster_code_port)  # for the other containers alone
    health = services["code"]["healthcheck"]["test"]
    assert health[-1] == f"grpc://127.0.0.1:{settings.dagster_code_port}/DagsterApi"
    assert services["code"]["environment"]["DAGSTER_CODE_PORT"] == str(settings.dagster_code_port)
    assert str(settings.dagster_port) in services["webserver"]["command"]
    assert settings.sink_ports.startswith(f"{settings.sink_port}-")
    for name, service in services.items():
        # A check asks a port that something in the container listens on.
        for port in re.findall(r"127\.0\.0\.1:(\d+)", " ".join(service["healthcheck"]["test"])):
            assert int(port) in inside[name], name
    prometheus = yaml.safe_load((ROOT / "compose/prometheus/prometheus.yaml").read_text("utf-8"))
    scraped = {job["job_name"]: job["dns_sd_configs"][0]["port"] for job in prometheus["scrape_configs"]}
    assert scraped == {
        "producer": settings.producer_port,
        "sink": settings.sink_port,
        "exporter": settings.exporter_port,
        "connect": container_connect.JMX_PORT,
        "redpanda": settings.redpanda_admin_port,
    }
    names = {name for job in prometheus["scrape_configs"] for name in job["dns_sd_configs"][0]["names"]}
    assert names <= project(MAIN, CLUSTER).keys()


def test_versions_are_those_of_the_embedded_stack() -> None:
    services = project()
    image = services["postgres"]["image"].partition("@")[0]  # a bot adds digests
    assert image == f"postgres:{jars.POSTGRES.removesuffix('.0')}-bookworm"
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert services["code"]["image"] == f"metrics-pipeline:{version}"
    assert services["connect"]["image"] == f"metrics-pipeline-connect:{version}"
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    targets = {service["build"]["target"] for service in services.values() if "build" in service}
    assert targets == {"pipeline", "connect"}
    assert targets <= set(re.findall(r" AS (\w+)$", dockerfile, re.MULTILINE))
    (python,) = re.findall(r"^ARG PYTHON=python:3\.(\d+)\.", dockerfile, re.MULTILINE)
    assert 11 <= int(python) < 15
    # Kafka and Debezium come from the lock alone: the Dockerfile names no version of them.
    assert "RUN /opt/venv/bin/metrics-pipeline container fetch" in dockerfile
    assert jars.KAFKA not in dockerfile
    assert {jar.use for jar in jars.needed(container_connect.USES)} == set(container_connect.USES)


@pytest.mark.parametrize("gib", [1, 4, 32])
def test_postgresql_settings_are_those_of_the_embedded_stack(gib: int, tmp_path: Path) -> None:
    file = tmp_path / "metrics-pipeline.conf"
    command = project()["postgres-conf"]["command"]
    done = subprocess.run(
        [BIN / command[0], *(str(file) if word.startswith("/conf/") else word for word in command[1:])],
        env={**os.environ, "POSTGRES_MEMORY_GB": str(gib)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = file.read_text("utf-8").splitlines()
    assert lines[0] == f"include_if_exists = '{INITDB_CONF}'"
    written = dict(line.split(" = ", 1) for line in lines[1:] if not line.startswith("#"))
    budget = Budget.from_total(gib * GIB, "test")
    embedded = postgres.configuration(Settings.load(), budget)
    place = {"listen_addresses", "port", "unix_socket_directories"}
    assert {k: v for k, v in written.items() if k not in place} == {k: v for k, v in embedded.items() if k not in place}
    assert {name: written[name] for name in place} == {
        "listen_addresses": "'*'",
        "port": "5432",
        "unix_socket_directories": "'/var/run/postgresql'",
    }
    for name in ("fsync", "full_page_writes", "synchronous_commit"):
        assert written[name] == "on"


def test_32_gib_give_postgresql_what_the_original_has() -> None:
    assert postgres_memory(32 * GIB)["shared_buffers"] == "8192MB"
    assert postgres_memory(32 * GIB)["effective_cache_size"] == "24576MB"


def test_postgresql_is_told_to_read_that_file_and_is_made_as_the_embedded_one() -> None:
    services = project()
    (volume,) = (v for v in services["postgres"]["volumes"] if v.startswith("postgres-conf:"))
    folder = volume.split(":")[1]
    assert services["postgres"]["command"] == ["postgres", "-c", f"config_file={folder}/metrics-pipeline.conf"]
    arguments = services["postgres"]["environment"]["POSTGRES_INITDB_ARGS"].split()
    source = (ROOT / "metrics_pipeline/local/postgres.py").read_text("utf-8")
    for argument in arguments:
        assert f'"{argument}"' in source, argument


def test_a_container_s_worker_is_the_embedded_one_with_other_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"kafka": [tmp_path / "a.jar"], "debezium": [tmp_path / "d.tar.gz"], "jmx": [tmp_path / "jmx.jar"]}
    monkeypatch.setattr(jars, "fetch", lambda *_args, **_kwargs: folders)
    monkeypatch.setattr(jars, "unpack_debezium", lambda *_args: tmp_path / "plugin")
    monkeypatch.setenv("PIPELINE_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("LISTEN_HOST", "0.0.0.0")
    for name, value in project()["connect"]["environment"].items():
        if not name.endswith("_FILE"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("METRICS_WRITER_PASSWORD", "of the writer")
    settings = Settings.load()
    made = container_connect.worker(settings)
    (embedded,) = connect_worker.services(
        settings, Budget.from_total(4 * GIB, "test"), folders["kafka"], tmp_path / "plugin"
    )
    agent = [word for word in made.command if word.startswith("-javaagent:")]
    assert agent == [f"-javaagent:{tmp_path}/jmx.jar=0.0.0.0:9404:{ROOT}/compose/jmx/connect.yaml"]

    def without_heap(command: list[str]) -> list[str]:
        return [word for word in command if not word.startswith(("-Xm", "-javaagent"))]

    assert without_heap(made.command) == without_heap(list(embedded.command))
    assert f"-Xmx{settings.connect_memory_gb * 512}m" in made.command
    differ = {
        name for name, value in made.environment.items() if embedded.environment.get(name) != value
    } | embedded.environment.keys() - made.environment.keys()
    assert differ == {"CONNECT_LISTENERS", "CONNECT_ADVERTISED_HOST"}
    assert made.environment["CONNECT_LISTENERS"] == "http://0.0.0.0:8083"
    assert made.environment["CONNECT_ADVERTISED_HOST"] == socket.gethostname()
    assert made.environment["SINK_PG_HOST"] == "postgres"
    worker = (tmp_path / "config/worker.properties").read_text("utf-8")
    assert worker == connect_worker.WORKER_FILE.read_text("utf-8") + f"plugin.path={tmp_path}/plugin\n"
    connector = (ROOT / "connect/metrics-postgres-sink.json").read_text("utf-8")
    for name in re.findall(r"\$\{env:(\w+)\}", worker + connector):
        assert made.environment[name], name


def test_the_image_holds_what_the_package_reads() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    needed = [
        "metrics_pipeline/cli.py",
        "sql/migrations/20261122000001_metrics.sql",
        "sql/queries/status.sql",
        "connect/metrics-postgres-sink.json",
        "connect/worker.properties",
        "connect/jars.lock",
        "connect/log4j2.yaml",
        "dagster_home/dagster.yaml",
        "compose/workspace.yaml",
        "compose/jmx/connect.yaml",
        "pyproject.toml",
        "requirements/runtime.txt",
        "README.md",
    ]
    for path in needed:
        assert (ROOT / path).is_file(), path
        assert any(path == entry or path.startswith(f"{entry}/") for entry in allowed), path
    for entry in allowed:
        assert (ROOT / entry).exists(), entry
        assert not entry.startswith((".env", ".local", ".git", "metrics_pipeline_tests"))
    copied = re.findall(r"^COPY (?!--from)(\S+) ", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert copied == ["requirements/runtime.txt", ".", "compose/workspace.yaml"]


# Secrets


def test_every_secret_comes_from_a_file_that_its_share_holds() -> None:
    of_volume = {
        "secrets-pipeline": "pipeline",
        "secrets-connect": "connect",
        "secrets-postgres": "postgres",
        "secrets-pgadmin": "pgadmin",
        "secrets-grafana": "grafana",
    }
    services = project(MAIN, CLUSTER)
    mounted = {volume.split(":")[0]: volume.split(":")[1] for volume in services["secrets"]["volumes"]}
    assert mounted == {"secrets": "/secrets/store"} | {v: f"/secrets/{s}" for v, s in of_volume.items()}
    assert set(of_volume.values()) == set(secrets.SHARES)
    for name, service in services.items():
        if name == "secrets":
            continue
        shares = [of_volume[str(v).split(":")[0]] for v in service.get("volumes", ()) if str(v).startswith("secrets-")]
        files = [value for value in service.get("environment", {}).values() if str(value).startswith(SECRETS)]
        if files:
            share = secrets.SHARES[shares[0]]
            for file in files:
                wanted = file.removeprefix(SECRETS)
                assert wanted in share.names or (wanted == "pgpass" and share.roles), f"{name}: {file}"
        for variable, value in service.get("environment", {}).items():
            if "PASSWORD" in variable and not variable.endswith("_FILE"):
                assert variable == "PGADMIN_CONFIG_MASTER_PASSWORD_REQUIRED", f"{name}: {variable}={value}"


def test_what_env_sets_for_a_password_reaches_the_secrets() -> None:
    raw = yaml.safe_load(MAIN.read_text("utf-8"))["services"]["secrets"]["environment"]
    assert raw == {name.upper(): f"${{{name.upper()}:-}}" for name in Settings.group("secrets")}


# What only containers have


FILE_SCHEMAS = {
    # https://docs.redpanda.com/streaming/26.1/console/config/configure-console/
    "compose/console/config.yaml": {
        "kafka": {"brokers": list},
        "schemaRegistry": {"enabled": bool, "urls": list},
        "redpanda": {"adminApi": {"enabled": bool, "urls": list}},
        "kafkaConnect": {"enabled": bool, "clusters": list},
        "analytics": {"enabled": bool},
    },
    # https://docs.redpanda.com/streaming/26.1/reference/properties/cluster-properties/
    "compose/redpanda/bootstrap.yaml": {"write_caching_default": str, "auto_create_topics_enabled": bool},
    # https://docs.dagster.io/deployment/code-locations/workspace-yaml
    "compose/workspace.yaml": {"load_from": list},
    # https://grafana.com/docs/grafana/v12.2/administration/provisioning/
    "compose/grafana/provisioning/datasources/prometheus.yaml": {"apiVersion": int, "datasources": list},
    "compose/grafana/provisioning/dashboards/pipeline.yaml": {"apiVersion": int, "providers": list},
    # https://prometheus.github.io/jmx_exporter/1.0.1/http-mode/rules/
    "compose/jmx/connect.yaml": {
        "lowercaseOutputName": bool,
        "lowercaseOutputLabelNames": bool,
        "includeObjectNames": list,
        "rules": list,
    },
}


def schema(shape: Any) -> dict[str, Any]:
    names = {list: "array", bool: "boolean", str: "string", int: "integer"}
    if not isinstance(shape, dict):
        return {"type": names[shape]}
    properties = {name: schema(inner) for name, inner in shape.items()}
    return {"type": "object", "properties": properties, "required": list(shape), "additionalProperties": False}


@pytest.mark.parametrize("path", FILE_SCHEMAS)
def test_file_has_the_keys_of_its_documentation(path: str) -> None:
    text = (ROOT / path).read_text("utf-8")
    jsonschema.validate(yaml.safe_load(text), schema(FILE_SCHEMAS[path]))
    assert re.search(r"^# .*https://", text, re.MULTILINE), "its source is cited"


def test_console_finds_the_others() -> None:
    config = yaml.safe_load((ROOT / "compose/console/config.yaml").read_text("utf-8"))
    environment = project()["code"]["environment"]
    assert config["kafka"]["brokers"] == [environment["KAFKA_URL"]]
    assert config["kafkaConnect"]["clusters"] == [{"name": "metrics", "url": environment["CONNECT_URL"]}]
    assert config["schemaRegistry"]["urls"] == [environment["SCHEMA_REGISTRY_URL"]]


def test_pgadmin_knows_the_server_and_reads_only() -> None:
    """Fields: https://www.pgadmin.org/docs/pgadmin4/9.16/import_export_servers.html."""
    (server,) = json.loads((ROOT / "compose/pgadmin/servers.json").read_text("utf-8"))["Servers"].values()
    assert server == {
        "Name": "metrics",
        "Group": "Servers",
        "Host": secrets.DATABASE_HOST,
        "Port": 5432,
        "MaintenanceDB": field_default("postgres_db"),
        "Username": "metrics_reader",
        "ConnectionParameters": {"sslmode": "prefer", "connect_timeout": 10, "passfile": f"{SECRETS}pgpass"},
    }
    assert secrets.SHARES["pgadmin"].roles == ("metrics_reader",)


def test_redpanda_acknowledges_what_is_on_disk() -> None:
    start = (ROOT / "compose/redpanda/start").read_text("utf-8")
    assert "--mode" not in start
    assert "fsync" not in start
    bootstrap = yaml.safe_load((ROOT / "compose/redpanda/bootstrap.yaml").read_text("utf-8"))
    assert bootstrap["write_caching_default"] == "disabled"
    for service in project(MAIN, CLUSTER).values():
        assert "dev-container" not in str(service)


@pytest.mark.parametrize(
    ("name", "files", "seeds"),
    [
        ("redpanda", (MAIN,), None),
        ("redpanda", (MAIN, CLUSTER), None),
        ("redpanda-3", (MAIN, CLUSTER), "redpanda:33145"),
    ],
)
def test_redpanda_is_started_with_the_addresses_that_clients_use(
    name: str, files: tuple[Path, ...], seeds: str | None, tmp_path: Path
) -> None:
    rpk = tmp_path / "rpk"
    rpk.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    rpk.chmod(0o755)
    service = project(*files)[name]
    shell, script = service["entrypoint"]
    assert script == "/opt/compose/start"
    done = subprocess.run(
        [shell, ROOT / "compose/redpanda/start"],
        env={**service["environment"], "PATH": f"{tmp_path}:{os.defpath}"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split()
    assert words[:2] == ["redpanda", "start"]
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words[2:])
    ((_, published, inside),) = (port for port in ports(service) if port[2] == 19092)
    assert options["kafka-addr"] == f"internal://0.0.0.0:9092,external://0.0.0.0:{inside}"
    assert options["advertise-kafka-addr"] == f"internal://{name}:9092,external://127.0.0.1:{published}"
    assert options.get("seeds") == seeds
    memory = int(options["memory"].removesuffix("M"))
    assert memory == int(service["deploy"]["resources"]["limits"]["memory"].removesuffix("g")) * 1024 * 4 // 5
    assert (options["smp"], options["reserve-memory"]) == ("1", "0M")


@pytest.mark.parametrize(("answer", "exit_code"), [("200 OK", 0), ("503 Service Unavailable", 1), (None, 1)])
def test_redpanda_ready_asks_its_admin_api(answer: str | None, exit_code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        asked: list[bytes] = []

        def serve() -> None:
            client, _ = server.accept()
            with client:
                with client.makefile("rb") as lines:  # to the empty line, or bash would write into a closed socket
                    asked.extend(iter(lines.readline, b"\r\n"))
                client.sendall(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode())

        thread = threading.Thread(target=serve, daemon=True)
        if answer is None:
            server.close()
        else:
            thread.start()
        done = subprocess.run(
            ["/bin/bash", ROOT / "compose/redpanda/ready"],
            env={"REDPANDA_ADMIN_PORT_INSIDE": str(port), "PATH": os.defpath},
            capture_output=True,
            check=False,
        )
        if answer:
            thread.join(5)
            assert asked[0].startswith(b"GET /v1/status/ready HTTP/1.0\r\n")
    assert done.returncode == exit_code, done.stderr


def test_healthy_says_what_the_answer_is() -> None:
    from metrics_pipeline.compose import healthy

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/health"

        def serve() -> None:
            for status in ("200 OK", "503 Down"):
                client, _ = server.accept()
                with client:
                    client.recv(4096)
                    client.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert healthy.main(url) == 0
        assert healthy.main(url) == 1
        thread.join(5)
    assert healthy.main(url) == 1


def test_healthy_asks_every_url_and_names_the_one_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    from metrics_pipeline.compose import healthy

    def respond(request: Request) -> None:
        request.reply(404 if request.path == "/absent" else 200, b"")

    with listening(respond) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        assert healthy.main(f"{url}/there", f"{url}/here") == 0
        assert healthy.main(f"{url}/there", f"{url}/absent") == 1
    assert capsys.readouterr().err.startswith(f"{url}/absent: HTTP Error 404")


@pytest.mark.parametrize("status", ["SERVING", "NOT_SERVING", None])
def test_healthy_asks_by_grpc_whether_a_service_serves(status: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    from metrics_pipeline.compose import healthy

    server = grpc.server(ThreadPoolExecutor(1))
    servicer = HealthServicer()
    if status:
        servicer.set("DagsterApi", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
    add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    assert healthy.main(f"grpc://127.0.0.1:{port}/DagsterApi") == (0 if status == "SERVING" else 1)
    server.stop(None).wait()
    assert healthy.main(f"grpc://127.0.0.1:{port}/DagsterApi") == 1
    said = capsys.readouterr().err
    assert "StatusCode.UNAVAILABLE" in said
    assert ("DagsterApi: not serving" in said, "StatusCode.NOT_FOUND" in said) == (
        status == "NOT_SERVING",
        status is None,
    )


def test_a_service_without_a_port_is_healthy_while_it_touches_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from metrics_pipeline.compose import healthy

    file = tmp_path / "alive"
    assert healthy.main(str(file)) == 1
    file.touch()
    assert healthy.main(str(file)) == 0
    os.utime(file, (0, 0))
    assert healthy.main(str(file)) == 1
    assert "last touched" in capsys.readouterr().err
    command = project()["watcher"]["command"]
    assert project()["watcher"]["healthcheck"]["test"][-1] == command[command.index("--alive") + 1]


def test_the_watcher_has_the_password_of_the_sinks_role_alone() -> None:
    watcher = project()["watcher"]
    assert [name for name in watcher["environment"] if name.endswith("_FILE")] == ["METRICS_WRITER_PASSWORD_FILE"]
    assert secrets.SHARES["connect"].names == ("metrics_writer_password",)
    assert watcher["volumes"] == ["secrets-connect:/run/metrics-secrets:ro"]


def test_connect_is_healthy_only_with_its_plugin() -> None:
    plugin = connector_config()["connector.class"]
    assert project()["connect"]["healthcheck"]["test"][-1].endswith(f"/connector-plugins/{plugin}/config")


def test_health_check_of_our_images_imports_little() -> None:
    heavy = {"pydantic", "typer", "grpc", "dagster"}
    program = f"import sys, metrics_pipeline.compose.healthy as h; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_workflow_runs_compose_for_real() -> None:
    text = (ROOT / ".github/workflows/compose.yaml").read_text("utf-8")
    workflow = yaml.safe_load(text)
    for piece in ("docker compose config", "promtool", "make containers ARGS="):
        assert piece in text, piece
    # The others need no engine, or are about the checks themselves.
    scenarios = workflow["jobs"]["run"]["strategy"]["matrix"]["scenario"]
    assert set(scenarios) == set(containers.ALL) - {"env"}


def test_the_page_tells_of_every_scenario_of_containers() -> None:
    rows = table(page("containers"), "## Try all of it")
    assert [row[0].strip("`") for row in rows if row[0].startswith("`")] == [*containers.ALL, "faults"]


# The page on containers


def test_the_page_lists_every_published_port() -> None:
    listed = {
        (row[0].strip("`"), re.findall(r"127\.0\.0\.1:(\d+)", row[1])[0], row[2].strip("`"))
        for row in table(page("containers"), "# Containers")
        if row[1].lstrip("<").startswith(("127.", "http"))
    }
    published = {(name, port.partition("-")[0]) for name, service in project().items() for _, port, _ in ports(service)}
    assert {(name, port) for name, port, _ in listed} == published
    for _, port, setting in listed:
        assert field_default(setting).partition("-")[0] == port


def test_the_page_s_sizes_are_those_that_the_code_gives() -> None:
    rows = table(page("containers"), "## Sizes")
    sizes = [row for row in rows if row[0][0].isdigit()]
    assert len(sizes) == 4
    for _, gib, buffers, *_ in sizes:
        assert postgres_memory(int(gib) * GIB)["shared_buffers"] == buffers
    defaults = [
        field_default(name)
        for name in ("postgres_memory_gb", "redpanda_memory_gb", "redpanda_cores", "connect_memory_gb")
    ]
    assert defaults in [[row[1], *row[3:]] for row in sizes]
