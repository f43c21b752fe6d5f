"""The parts of the embedded stack, started in the order of their needs and ended in reverse.

postgres ─┬─> databases ─> code ─┬─> webserver
          │                      └─> daemon
broker ───┴─> connect ───────────────> provision (the Dagster job), when everything before it is healthy

Beside Connect runs the watcher, which needs databases and broker, unless SINK_WATCH=off.
With SINK=copy the COPY sink stands in the place of both. Before Connect starts, the COPY sink's offsets become its own if that sink
was the active one (handover).
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import requests

from metrics_pipeline import postgres as database
from metrics_pipeline.data_folder import folder_id, make_folder_id
from metrics_pipeline.errors import PipelineError, ServiceError
from metrics_pipeline.local import broker, connect_worker, copy_sink, dagster, exporter, jars, java, postgres, watcher
from metrics_pipeline.local.budget import Budget
from metrics_pipeline.local.environment import dagster_home, for_python
from metrics_pipeline.local.processes import mark, marked
from metrics_pipeline.local.service import CancelledError, Service, tail
from metrics_pipeline.settings import Settings, external_services
from metrics_pipeline.sinks import active

log = logging.getLogger(__name__)

ShowLine = Callable[[str], None]

PORTS: dict[str, tuple[str, ...]] = {
    "postgres": ("postgres_port",),
    **broker.PORTS,
    **{name: (port,) for name, port in connect_worker.PORTS.items()},
    "sink": ("sink_port",),
    "exporter": ("exporter_port",),
    "webserver": ("dagster_port",),
    "code": ("dagster_code_port", "producer_port"),
}
"""What each service listens on, by the settings' names; the producer runs in the code server's care."""
NOT_ITS_OWN = frozenset({"producer_port"})
"""Of these, what another process listens on, and not always."""
RUN_END_SECONDS = 45
"""Bound for a producer run to flush and end when the stack stops."""


@dataclass(slots=True)
class StartStep:
    """A step of the start: a service to bring up, or something to do once others are up."""

    name: str
    needs: tuple[str, ...]
    run: Callable[[], str]
    """Does the work and returns the line to show."""


@dataclass(slots=True)
class Stack:
    """The services of one stack and how to bring all of them up and down.

    Attributes:
        settings: ports and folders already chosen.
        services: in the order in which they are started; ended in reverse.
        external: services that somebody else runs (by their URL in the real environment).
    """

    settings: Settings
    services: list[Service]
    external: frozenset[str]
    budget: Budget
    cancelled: threading.Event = field(default_factory=threading.Event)

    def service(self, name: str) -> Service:
        """The service of that name."""
        return next(service for service in self.services if service.name == name)

    def has(self, name: str) -> bool:
        """Whether this stack runs the service itself."""
        return any(service.name == name for service in self.services)

    def _names(self, part: str) -> tuple[str, ...]:
        """Names of the services of one part (`broker-2` is one of `broker`), or the part's when somebody else runs it."""
        return tuple(s.name for s in self.services if s.name.partition("-")[0] == part) or (part,)

    def start(self, report: ShowLine, *, provision: bool = True) -> None:
        """Bring everything up, side by side where nothing needs the other; ends quietly when `cancelled` is set meanwhile.

        Raises:
            PipelineError: what failed first; what was started stays up, for `stop`.
        """
        nodes = [StartStep(service.name, service.needs, self._starter(service)) for service in self.services]
        nodes += [
            StartStep(name, (), self._outsider(name))
            for name in ("postgres", "broker", "connect")
            if not self.has(name) and (name != "connect" or "connect" in self.external)
        ]
        nodes.append(StartStep("databases", ("postgres",), self._databases))
        if self.has("connect"):
            nodes.append(StartStep("handover", ("databases", *self._names("broker")), self._hand_over))
            for node in nodes:
                if node.name.startswith("connect"):
                    node.needs += ("handover",)
        if provision:
            needs = ("databases", *self._names("broker"), *self._names("connect"), *self._names("sink"))
            needs = tuple(node.name for node in nodes if node.name in needs)
            nodes.append(StartStep("provision", needs, self._provision))
        done = {node.name: threading.Event() for node in nodes}
        failure: list[BaseException] = []

        def work(node: StartStep) -> None:
            for need in node.needs:
                while not done[need].wait(0.1):
                    if failure or self.cancelled.is_set():
                        return
            began = time.monotonic()
            try:
                line = node.run()
            except CancelledError:
                return
            except BaseException as error:
                failure.append(error)
                return
            done[node.name].set()
            if line:
                report(f"{line} ({time.monotonic() - began:.1f} s)")

        with ThreadPoolExecutor(max_workers=len(nodes)) as pool:
            list(pool.map(work, nodes))
        if failure:
            raise failure[0]

    def stop(self, report: ShowLine) -> None:
        """End all services in reverse order, the producer's run first, so that it flushes while the broker is there."""
        if self.has("webserver") and self.service("webserver").alive():
            # Without the daemon nothing launches the next run.
            self.service("daemon").stop()
            self._end_runs(report)
        for service in reversed(self.services):
            if service.alive():
                began = time.monotonic()
                service.stop()
                report(f"{service.title} stopped ({time.monotonic() - began:.1f} s)")

    def _starter(self, service: Service) -> Callable[[], str]:
        def run() -> str:
            if service.alive():
                service.wait_until_healthy(self.cancelled.is_set)
                return f"{service.title} was running already: {service.url}"
            service.start()
            service.wait_until_healthy(self.cancelled.is_set)
            return f"{service.title} {'is up: ' + service.url if service.url else 'has started'}"

        return run

    def _outsider(self, name: str) -> Callable[[], str]:
        def run() -> str:
            problem = outsider_problem(self.settings, name)
            if problem:
                variable = {"broker": "KAFKA_URL"}.get(name, f"{name.upper()}_URL")
                raise ServiceError(f"{variable} is set, so no {name} is started here, but: {problem}")
            return f"{name} is run elsewhere and answers"

        return run

    def _databases(self) -> str:
        database.bootstrap(self.settings)
        if self.has("code"):
            dagster.prepare_home(self.settings)
            self._dagster_schema()
        return ""

    def _hand_over(self) -> str:
        """Before Connect runs the connector, or it would begin where it was when the COPY sink took its place."""
        if any(service.name.startswith("connect") and service.alive() for service in self.services):
            return ""
        return next(iter(active.hand_over(self.settings)), "")

    def _dagster_schema(self) -> None:
        if needed := dagster.tables_command(self.settings):
            self._run(needed[1], "dagster-schema", "Dagster's tables")

    def _provision(self) -> str:
        command = [
            str(Path(sys.executable).parent / "dagster"),
            "job",
            "execute",
            "-m",
            dagster.DEFINITIONS,
            "-j",
            "provision",
        ]
        self._run(command, "provision", "provisioning (the Dagster job `provision`)")
        return f"Provisioned: schema, topic, {'connector' if self.settings.sink == 'connect' else 'COPY sink'}"

    def _run(self, command: list[str], name: str, what: str) -> None:
        path = self.settings.data_dir / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as output:
            child = subprocess.Popen(
                command,
                env=for_python(self.settings) | mark(folder_id(self.settings), name),
                cwd=dagster_home(self.settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            while child.poll() is None:
                if self.cancelled.wait(0.1):
                    child.terminate()
                    child.wait()
                    raise CancelledError
        if child.returncode != 0:
            raise ServiceError(f"{what} failed: {reason_in(tail(path, 2000))}; full log: {path}")

    def _end_runs(self, report: ShowLine) -> None:
        deadline = time.monotonic() + RUN_END_SECONDS
        told = False
        while time.monotonic() < deadline and self.service("webserver").alive():
            try:
                running = dagster.terminate_runs(self.settings)
            except (requests.RequestException, KeyError, TypeError) as error:
                # It may be busy, or its storage on the way back: giving up would leave messages unflushed.
                log.warning("Dagster cannot be asked to end its runs: %s", error)
                time.sleep(1)
                continue
            if not running:
                return
            if not told:
                report(f"ending {', '.join(sorted(set(running)))}: outstanding messages are flushed")
                told = True
            time.sleep(0.5)


def reason_in(lines: list[str]) -> str:
    """The line of a Dagster log that says what went wrong: our own error if there is one."""
    for line in lines:
        _, mark, rest = line.partition("metrics_pipeline.errors.")
        if mark and ": " in rest:
            return rest.partition(": ")[2].strip()
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no output"])[-1].strip()[:300]


def outsider_problem(settings: Settings, name: str) -> str | None:
    """None when a service that somebody else runs answers, else why not."""
    if name == "broker":
        return broker.broker_problem(settings)
    if name == "connect":
        return connect_worker.connect_problem(settings, settings.connect_rest)
    return postgres.server_problem(settings)


def require_paths(settings: Settings) -> None:
    """Check that each part can be told where its files are, before any is made.

    Raises:
        SettingError: a folder's name is one that Kafka cannot be told.
    """
    external = external_services()
    if "kafka" in external and ("connect" in external or settings.sink == "copy"):
        return
    java.require_sayable("PIPELINE_DATA_DIR", settings.data_dir)
    java.require_sayable("PIPELINE_CACHE_DIR", jars.cache_dir(settings), in_class_path=True)


def build(settings: Settings, *, with_dagster: bool = True, quiet: bool = False, fetch: bool = True) -> Stack:
    """The stack for these settings: fetches jars and unpacks them if need be; starts nothing.

    Args:
        settings: of the stack.
        with_dagster: with Dagster's webserver, daemon and code server.
        quiet: show no progress.
        fetch: fetch and unpack; without it the services can be found and ended, not started.

    Raises:
        PipelineError: a download failed or a folder cannot be written.
    """
    require_paths(settings)
    external = external_services()
    runs_connect = "connect" not in external and settings.sink == "connect"
    budget = Budget.of(settings)
    uses = [name for name in ("postgres", "kafka") if name not in external]
    if runs_connect:
        uses.append("debezium")
    if runs_connect and "kafka" not in uses:
        uses.append("kafka")  # the worker's class path
    paths = jars.fetch(settings, uses, quiet=quiet) if fetch else jars.places(settings, uses)
    services: list[Service] = []
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        identity = make_folder_id(settings.data_dir)
        if "postgres" not in external:
            services.append(
                postgres.service(settings, budget, postgres.cluster(settings, paths["postgres"][0] if fetch else None))
            )
        if "kafka" not in external:
            services += broker.services(settings, budget, paths["kafka"])
        if runs_connect:
            plugins = jars.cache_dir(settings) / "plugins"
            plugin = jars.unpack_debezium(paths["debezium"][0], plugins) if fetch else jars.plugin_tree(plugins)
            services += connect_worker.services(settings, budget, paths["kafka"], plugin)
        if settings.sink == "copy":
            services.append(copy_sink.service(settings))
        elif settings.sink_watch:
            services.append(watcher.service(settings))
    except OSError as error:
        raise PipelineError(
            f"cannot write {error.filename or settings.data_dir}: {error.strerror}; set PIPELINE_DATA_DIR to a folder you own"
        ) from error
    if with_dagster:
        services += dagster.services(settings)
    if settings.exporter:
        services.append(exporter.service(settings))
    for service in services:
        service.environment = {**service.environment, **mark(identity, service.name)}
        service.ports = tuple(
            (name, getattr(settings, name)) for name in PORTS.get(service.name, ()) if name not in NOT_ITS_OWN
        )
        service.find = partial(_find, service.find, identity, service.name)
    return Stack(settings, services, external, budget)


def _find(find: Callable[[], psutil.Process | None], identity: str, name: str) -> psutil.Process | None:
    """A service's process that nobody wrote down, or whose note is lost."""
    if (process := find()) is not None:
        return process
    for process, part in marked(identity):
        with contextlib.suppress(OSError):
            if part == name and os.getsid(process.pid) == process.pid:
                return process
    return None


def ports_in_use(stack: Stack) -> list[str]:
    """Settings of the ports that the parts of this stack that are not up yet will listen on."""
    return [port for service in stack.services if not service.alive() for port in PORTS.get(service.name, ())]


def unused_ports(settings: Settings) -> set[str]:
    """Settings of the ports on which nothing of the embedded stack listens, as these settings are."""
    off = [*list(broker.PORTS)[settings.kafka_brokers :], *list(connect_worker.PORTS)[settings.connect_workers :]]
    off += [] if settings.exporter else ["exporter"]
    off += ["sink"] if settings.sink == "connect" else list(connect_worker.PORTS)
    used = {port for name, ports in PORTS.items() if name not in off for port in ports}
    return {name for name in Settings.model_fields if name.endswith("_port")} - used
