"""The embedded Kafka Connect workers with the Debezium JDBC sink: one, or several in one group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests

from metrics_pipeline import loopback
from metrics_pipeline.local import broker, java
from metrics_pipeline.local.budget import Budget
from metrics_pipeline.local.service import Service, http_problem, silence
from metrics_pipeline.settings import ROOT, Settings
from metrics_pipeline.sinks.connector import connector_config

WORKER_FILE = ROOT / "connect" / "worker.properties"
PORTS = {"connect": "connect_port", "connect-2": "connect_2_port", "connect-3": "connect_3_port"}
"""Each worker's name and the setting of its port."""


def sink_environment(settings: Settings) -> dict[str, str]:
    """What the connector's `${env:…}` references resolve to."""
    return {
        # Parts of a JDBC URL.
        "SINK_PG_HOST": f"[{host}]" if ":" in (host := settings.postgres_host) else host,
        "SINK_PG_PORT": str(settings.postgres_host_port),
        "SINK_PG_DB": quote(settings.metrics_database, safe=""),
        "SINK_PG_USER": "metrics_writer",
        "SINK_PG_PASSWORD": settings.metrics_writer_password.get_secret_value(),
    }


def services(settings: Settings, budget: Budget, jars: Sequence[Path], plugin: Path) -> list[Service]:
    """The Connect workers as children of the keeper."""
    names = list(PORTS)[: settings.connect_workers]
    return [_service(settings, budget, jars, plugin, name) for name in names]


def environment(settings: Settings, jars: Sequence[Path], *, listeners: str, advertised: str) -> dict[str, str]:
    """What a worker's file and the connector refer to, and the class path."""
    # Connect's own topics take the brokers' `min.insync.replicas`, so fewer replicas than brokers would not do.
    replicas = min(settings.topic_replication_factor, 3) if settings.kafka_url else settings.kafka_brokers
    return java.environment(
        jars,
        CONNECT_BOOTSTRAP_SERVERS=settings.bootstrap_servers,
        CONNECT_LISTENERS=listeners,
        CONNECT_ADVERTISED_HOST=advertised,
        CONNECT_REPLICATION_FACTOR=str(replicas),
        **sink_environment(settings),
    )


def command(worker: Path, heap: int, *options: str) -> list[str]:
    """The JVM of a worker with `heap` bytes."""
    return java.command(
        "org.apache.kafka.connect.cli.ConnectDistributed", [str(worker)], heap, "-XX:+UseParallelGC", *options
    )


def write_worker_file(worker: Path, plugin: Path) -> None:
    """Our worker file, with the folder of the plugin."""
    worker.parent.mkdir(parents=True, exist_ok=True)
    worker.write_text(f"{WORKER_FILE.read_text('utf-8')}{java.properties({'plugin.path': str(plugin)})}", "utf-8")


def _service(settings: Settings, budget: Budget, jars: Sequence[Path], plugin: Path, name: str) -> Service:
    url = f"http://127.0.0.1:{getattr(settings, PORTS[name])}"
    brokers = ["broker"] if settings.kafka_url else [node.name for node in broker.nodes(settings)]
    _, _, number = name.partition("-")
    worker = settings.data_dir / "config" / ("worker.properties" if not number else f"worker-{number}.properties")

    def check() -> str | None:
        return connect_problem(settings, url)

    return Service(
        name=name,
        title=f"Kafka Connect {number}".strip(),
        url=url,
        command=command(worker, budget.connect_heap),
        environment=environment(settings, jars, listeners=url, advertised="127.0.0.1"),
        log=settings.data_dir / "logs" / f"{name}.log",
        check=check,
        # What needs no other worker, nor the broker: a group that is rebalancing is no reason to kill one of its workers.
        answers=lambda: silence(f"{url}/"),
        prepare=lambda: write_worker_file(worker, plugin),
        needs=("postgres", *brokers),
        cwd=settings.data_dir,
        stop_seconds=45,
        start_seconds=120,
        first_cause=java.first_cause,
    )


def connect_problem(settings: Settings, url: str) -> str | None:
    """None when the worker answers, is of our Kafka cluster, has joined its group and has the connector's plugin, else why not."""
    if (problem := _foreign(settings, url)) is not None:
        return problem
    if (problem := http_problem(f"{url}/connectors")) is not None:
        return problem
    plugin = connector_config()["connector.class"]
    if http_problem(f"{url}/connector-plugins/{plugin}/config") is None:
        return None
    return f"Kafka Connect on {urlsplit(url).netloc} has no plugin {plugin}: correct plugin.path in its worker's file"


def _foreign(settings: Settings, url: str) -> str | None:
    """Why what answers is not a worker of ours; None for one that CONNECT_URL names, whosever it is."""
    ours = "" if settings.connect_url else broker.written_cluster(settings)
    if not ours:
        return None
    place = urlsplit(url).netloc
    try:
        theirs = loopback.get(f"{url}/", timeout=5).json()["kafka_cluster_id"]
    except requests.RequestException as error:
        return f"no answer on {place} ({type(error).__name__})"
    except (KeyError, TypeError):
        return f"what answers on {place} is no Kafka Connect"
    return (
        None if theirs == ours else f"what answers on {place} is the Kafka Connect of another Kafka cluster ({theirs})"
    )
