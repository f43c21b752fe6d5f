"""What a figure is worth nothing without: machine, versions, settings, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import confluent_kafka
import psutil
import psycopg
import requests

from metrics_pipeline import loopback, postgres
from metrics_pipeline.bench.layout import described
from metrics_pipeline.bench.place import Place
from metrics_pipeline.local.account import postgres_home, unprivileged
from metrics_pipeline.settings import CHECKOUT, ROOT, Settings, external_services

GIB: Final = 2**30
MEMORY_FILESYSTEMS: Final = ("tmpfs", "ramfs")


def describe(place: Place) -> dict[str, Any]:
    """Everything about the place that a figure depends on, as one JSON object."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(postgres_home(place.settings.data_dir, unprivileged()))
        | {"load_before": round(place.load_before, 2)},
        "versions": versions(place),
        "postgres": postgres_settings(place.settings),
        "settings": pipeline_settings(place.settings),
        "layout": layout(place),
        "commit": commit(),
        "stack": "temporary" if place.temporary else "of the settings",
    }


def machine(folder: Path) -> dict[str, Any]:
    """The hardware, the operating system, and what PostgreSQL's folder lies on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "filesystem": filesystem(folder),
    }


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def filesystem(folder: Path) -> str:
    """Type of the file system that holds a folder."""
    holders = [
        partition
        for partition in psutil.disk_partitions(all=True)
        if folder.is_relative_to(partition.mountpoint) and partition.fstype
    ]
    return max(holders, key=lambda holder: len(holder.mountpoint)).fstype if holders else "unknown"


def versions(place: Place) -> dict[str, str]:
    """Of everything that takes part."""
    by_part = {
        "metrics-pipeline": version("metrics-pipeline"),
        "python": platform.python_version(),
        "librdkafka": confluent_kafka.libversion()[0],
        "psycopg": psycopg.__version__,
    }
    with postgres.connect(place.settings, "metrics_reader", autocommit=True) as connection:
        row: Any = connection.execute("SHOW server_version").fetchone()
        by_part["postgresql"] = row[0]
    if "kafka" not in external_services():
        by_part["broker"] = f"Apache Kafka {_locked('org.apache.kafka:kafka_2.13')}"
    return by_part | _connect_versions(place.settings)


def _locked(artifact: str) -> str:
    lines = (ROOT / "connect" / "jars.lock").read_text("utf-8").splitlines()
    numbers = (words[1].rpartition(":")[2] for line in lines if (words := line.split())[1].startswith(f"{artifact}:"))
    return next(numbers, "of unknown version")


def _connect_versions(settings: Settings) -> dict[str, str]:
    session = loopback.session(settings.connect_rest)
    try:
        connect = session.get(settings.connect_rest, timeout=10).json()["version"]
        plugins = session.get(f"{settings.connect_rest}/connector-plugins", timeout=10).json()
    except (requests.RequestException, KeyError, TypeError):
        return {}  # there need not be one
    sinks = [
        plugin["version"] for plugin in plugins if plugin["class"].endswith("debezium.connector.jdbc.JdbcSinkConnector")
    ]
    return {"connect": connect, "debezium-jdbc": sinks[0] if sinks else "missing"}


def postgres_settings(settings: Settings) -> dict[str, str]:
    """Those of the server that durability and speed depend on."""
    with postgres.connect(settings, "metrics_reader", autocommit=True) as connection:
        return dict(connection.execute(postgres.query("bench_settings")).fetchall())


def pipeline_settings(settings: Settings) -> dict[str, Any]:
    """Of the producer (its fleet among them), the topic, the sink and the table."""
    names = [name for group in ("producer", "topic", "sink", "table") for name in Settings.group(group)]
    return {name.upper(): getattr(settings, name) for name in names}


def layout(place: Place) -> dict[str, Any]:
    """How the table is laid out."""
    with postgres.connect(place.settings, "metrics_reader", autocommit=True) as connection:
        return described(connection, place.layout, place.settings.metrics_partition)


def commit() -> str:
    """The checkout's commit, with `-dirty` when files differ from it; empty without git, or when a wheel was installed."""
    if CHECKOUT is None:  # the folder around may be somebody else's repository
        return ""
    try:
        done = subprocess.run(
            [
                "git",
                "-c",
                f"safe.directory={CHECKOUT}",
                "describe",
                "--always",
                "--dirty",
                "--abbrev=12",
                "--exclude=*",
            ],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def warnings(surroundings: Mapping[str, Any]) -> list[str]:
    """What makes the figures mean something else than they seem to."""
    doubts = []
    if surroundings["machine"]["filesystem"] in MEMORY_FILESYSTEMS:
        doubts.append("the data lies in memory, so a sync costs nothing: set TMPDIR to a folder on a disk")
    unsafe = [
        name for name in ("fsync", "full_page_writes", "synchronous_commit") if surroundings["postgres"][name] == "off"
    ]
    if unsafe:
        doubts.append(f"PostgreSQL trades durability for speed: {', '.join(unsafe)} off")
    if surroundings["machine"]["load_before"] > 0.5 * surroundings["machine"]["cores"]:
        doubts.append(f"the machine was busy before the start: load {surroundings['machine']['load_before']}")
    return doubts
