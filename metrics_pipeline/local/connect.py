"""The embedded Kafka Connect worker with the Debezium JDBC sink."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import requests

from metrics_pipeline.local import java
from metrics_pipeline.local.budget import Budget
from metrics_pipeline.local.service import Service
from metrics_pipeline.settings import ROOT, Settings

WORKER_FILE = ROOT / "connect" / "worker.properties"


def sink_environment(settings: Settings) -> dict[str, str]:
    """What the connector's `${env:…}` references resolve to."""
    return {
        "SINK_PG_HOST": settings.postgres_host,
        "SINK_PG_PORT": str(settings.postgres_host_port),
        "SINK_PG_DB": settings.metrics_database,
        "SINK_PG_USER": "metrics_writer",
        "SINK_PG_PASSWORD": settings.metrics_writer_password.get_secret_value(),
    }


def service(settings: Settings, budget: Budget, jars: Sequence[Path], plugin: Path) -> Service:
    """The Connect worker as a child of the keeper."""
    environment = java.environment(
        jars,
        CONNECT_BOOTSTRAP_SERVERS=settings.bootstrap_servers,
        CONNECT_LISTENERS=f"http://127.0.0.1:{settings.connect_port}",
        CONNECT_ADVERTISED_HOST="127.0.0.1",
        CONNECT_REPLICATION_FACTOR=str(min(settings.topic_replication_factor, 3)),
        **sink_environment(settings),
    )

    worker = settings.data_dir / "config" / "worker.properties"

    def prepare() -> None:
        worker.parent.mkdir(parents=True, exist_ok=True)
        worker.write_text(f"{WORKER_FILE.read_text()}plugin.path={plugin}\n")

    def check() -> str | None:
        return connect_problem(settings.connect_rest)

    return Service(
        name="connect",
        title="Kafka Connect",
        url=settings.connect_rest,
        command=java.command(
            "org.apache.kafka.connect.cli.ConnectDistributed",
            [str(worker)],
            budget.connect_heap,
            "-XX:+UseParallelGC",
        ),
        environment=environment,
        log=settings.data_dir / "logs" / "connect.log",
        check=check,
        prepare=prepare,
        needs=("postgres", "broker"),
        cwd=settings.data_dir,
        stop_seconds=45,
        start_seconds=120,
    )


def connect_problem(url: str) -> str | None:
    """None when the worker answers and has joined its group, else why not."""
    try:
        answer = requests.get(f"{url}/connectors", timeout=5)
        answer.raise_for_status()
    except requests.RequestException as error:
        return f"no answer on {urlsplit(url).netloc} ({type(error).__name__})"
    return None
