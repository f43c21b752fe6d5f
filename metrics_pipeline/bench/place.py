"""Where a benchmark runs: on a stack of its own that leaves nothing behind, or on the services of the settings."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

import psutil

from metrics_pipeline import kafka, postgres
from metrics_pipeline.bench import layout as layouts
from metrics_pipeline.bench.layout import Layout
from metrics_pipeline.bench.readings import empty_topic
from metrics_pipeline.bench.table import activate, empty, start_sink_at
from metrics_pipeline.errors import BusyError, ServiceError
from metrics_pipeline.local import account, environment
from metrics_pipeline.local.stack import Stack, build, outsider_problem
from metrics_pipeline.local.state import StackState
from metrics_pipeline.producer.ledger import LOCK_KEY
from metrics_pipeline.settings import CONNECTOR, TOPIC, Settings, external_services
from metrics_pipeline.sinks.connector import ForeignError, ensure_connector
from metrics_pipeline.sinks.connector import client as connect_client

CARRIED: Final = ("producer", "topic", "sink")
"""Groups of settings that a temporary stack takes over from the user's own."""

SERVICES: Final = ("postgres", "broker", "connect")
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Running services to measure.

    Attributes:
        settings: of these services.
        environment: for child processes, so that they meet the same services.
        processes: of the services that run on this machine and that we know of, by name.
        temporary: whether all of it goes away afterwards.
        load_before: the machine's load of the last minute before anything was started.
        layout: how the table is laid out.
    """

    settings: Settings
    environment: Mapping[str, str]
    processes: Mapping[str, psutil.Process]
    temporary: bool
    load_before: float = 0.0
    layout: Layout = "partitioned"


@contextmanager
def temporary(user: Settings, say: Say, layout: Layout = "partitioned") -> Iterator[Place]:
    """PostgreSQL, broker and Connect on free ports in a temporary folder: migrated, with the topic, without Dagster.

    Producer, topic and sink are set as in the user's settings; ports, folders, passwords and services are the stack's
    own, so a pipeline that runs on this machine is not touched. However the block ends, by an error, Ctrl-C or SIGTERM,
    the services are stopped and the folder is removed.

    Args:
        user: the user's own settings.
        say: told what is being started.
        layout: of the table.

    Raises:
        PipelineError: a part does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="metrics-pipeline-bench-")).resolve()
    embedded: Stack | None = None
    load = os.getloadavg()[0]

    def cancel() -> None:
        if embedded is not None:
            embedded.cancelled.set()

    with _as_interrupt(cancel), _environment(user, folder):
        try:
            environment.write_secrets()
            settings = Settings.load()
            embedded = build(settings, with_dagster=False, quiet=True)
            # Tells afterwards when each row became visible, without a query while the clock runs.
            embedded.service("postgres").command += ["-c", "track_commit_timestamp=on"]
            embedded.start(say, provision=False)
            postgres.migrate(settings)
            layouts.prepare(settings, layout)
            kafka.ensure_topic(settings)
            processes = {service.name: service.process for service in embedded.services if service.process}
            yield Place(
                settings,
                environment.for_python(settings),
                processes,
                temporary=True,
                load_before=load,
                layout=layout,
            )
        finally:
            with _undisturbed():
                if embedded is not None:
                    embedded.stop(lambda _line: None)
                home = account.postgres_home(folder / "data", account.unprivileged())
                shutil.rmtree(home, ignore_errors=True)
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def here(settings: Settings, say: Say, *, connect: bool = True) -> Iterator[Place]:
    """The services that the settings name. The topic, the table of the readings and that of the rejects are emptied before and after.

    The connector is removed meanwhile and put back; the active sink stays what it was.

    Args:
        settings: where the services are.
        say: told what is done to them.
        connect: whether Kafka Connect is needed; where none answers there is no connector to remove.

    Raises:
        ServiceError: one of them does not answer.
        BusyError: a producer or a COPY sink is at work on them.
    """
    problems = {name: problem for name in SERVICES if (problem := outsider_problem(settings, name))}
    for name, problem in problems.items():
        if name != "connect" or connect:
            raise ServiceError(f"--here needs {name} as the settings have it, but: {problem}")
    written = StackState.read(settings.data_dir).children
    processes = {
        name: process
        for name in SERVICES
        if {"broker": "kafka"}.get(name, name) not in external_services()
        and (child := written.get(name))
        and (process := child.find())
    }
    with _as_interrupt(lambda: None):
        _refuse_company(settings)
        client = connect_client(settings)
        try:
            had_connector = "connect" not in problems and client.config(CONNECTOR) is not None
        except ForeignError:
            if connect:
                raise
            had_connector = False
        with postgres.connect_admin(settings, settings.metrics_database) as connection:
            (active,) = connection.execute("SELECT active FROM sink_state").fetchone() or ("connect",)
        say(f"emptying the tables and the topic {TOPIC}; the connector {CONNECTOR} comes back at the end")
        try:
            if had_connector:
                client.delete(CONNECTOR)
            clear(settings)
            yield Place(
                settings, environment.for_python(settings), processes, temporary=False, load_before=os.getloadavg()[0]
            )
        finally:
            with _undisturbed():
                clear(settings)
                with postgres.connect_admin(settings, settings.metrics_database) as connection:
                    activate(connection, active)
                if had_connector:
                    ensure_connector(settings)


def clear(settings: Settings) -> None:
    """Nothing in the topic, nothing in the table, and the COPY sink stands at the topic's end."""
    ends = empty_topic(settings)
    with postgres.connect_admin(settings, settings.metrics_database) as connection:
        empty(connection)
        start_sink_at(connection, ends)


def _refuse_company(settings: Settings) -> None:
    with postgres.connect_admin(settings, settings.metrics_database) as connection:
        if connection.execute(postgres.query("producer_lock_holder"), {"key": LOCK_KEY}).fetchone():
            raise BusyError("a producer is running: terminate its run in Dagster, and stop the sensor, before `--here`")
        if connection.execute(postgres.query("bench_copy_sinks")).fetchone() != (0,):
            raise BusyError("a COPY sink is running: stop it before `--here`, which starts its own")


@contextmanager
def _environment(user: Settings, folder: Path) -> Iterator[None]:
    """The environment of a temporary stack: nothing of the user's that names a service, a port or a password."""
    kept = {name for group in CARRIED for name in Settings.group(group)} | {"disk_free_limit_gb", "pipeline_memory_gb"}
    # With SINK=copy a stack has no Connect; a benchmark of the COPY sink starts that itself. The sinks are measured by themselves.
    own = {name: getattr(user, name) for name in kept | {"pipeline_cache_dir"}} | {
        "sink": "connect",
        "sink_watch": False,
    }
    variables = {name.upper(): str(value) for name, value in own.items() if value is not None}
    with environment.replaced(variables | environment.isolated(folder)):
        yield


@contextmanager
def _as_interrupt(cancel: Callable[[], None]) -> Iterator[None]:
    """The first signal that ends the program raises KeyboardInterrupt here, after `cancel`; further ones do nothing.

    A second Ctrl-C would come while threads that start a service are waited for, and what they start would be left behind.
    """

    def handle(_number: int, _frame: FrameType | None) -> None:
        for number in SIGNALS:
            signal.signal(number, _do_nothing)
        cancel()
        raise KeyboardInterrupt

    former = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """A handler instead of SIG_IGN, which a service that starts in this moment would inherit, and could then only be killed."""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No second Ctrl-C leaves half of it behind."""
    former = {number: signal.signal(number, _do_nothing) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
