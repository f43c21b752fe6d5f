"""Kafka Connect over REST: the connector put as its file stands, its state, restarts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

import requests
import stamina
from stamina.instrumentation import set_on_retry_hooks

from metrics_pipeline import kafka, loopback
from metrics_pipeline.change import Change
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.server_url import jdbc_parameters
from metrics_pipeline.settings import CONNECTOR, ROOT, Settings

CONNECTOR_FILE = ROOT / "connect" / f"{CONNECTOR}.json"
OLDEST_VERSION = (4, 2)
"""The first Connect whose JsonConverter takes `schema.content`: an older one makes every record a dead letter."""

PATIENCE_SECONDS = 30.0
"""How long a request is tried again while Connect is away or rebalances."""
RUNNING_SECONDS = 90.0
"""How long `ensure_connector` waits for the connector and all its tasks."""
FAILED_GRACE_SECONDS = 5.0
"""A task that still shows FAILED this long after a change really failed: until then it is the state from before."""
SETTLE_SECONDS = 2.0
"""How long RUNNING must last after a change: a task that cannot start shows RUNNING for a moment."""
STOPPED_SECONDS = 60.0
"""How long `stop_connector` waits for the tasks to end; Connect itself gives up on a task after five seconds."""

HIBERNATE_NO_CONNECTION = "Unable to determine Dialect without JDBC metadata"
NO_CONNECTION = (
    "the sink cannot connect to PostgreSQL: not reachable, or user, password or database refused "
    "(SINK_PG_… of the Connect worker; its log has PostgreSQL's own words)"
)
"""What Hibernate means: the failure to connect is in Connect's log, but not in the task's trace."""

_OF_A_RECORD = re.compile(
    r"invalid byte sequence|out of range|violates (?:check|not-null|foreign key|exclusion) constraint|null value in column"
    r"|invalid input syntax|SQLState: 2[23]|no key|cannot have null schema|ConstraintViolationException|DataException|DateTime(?:Parse)?Exception"
    r"|NumberFormatException|Invalid UUID string|UUID string too large|cannot affect row a second time"
)
"""What PostgreSQL's errors of the classes 22 and 23, Hibernate's for them, and the connector's own look like in a trace."""

_TIMEOUT = (3.05, 20.0)

# stamina would report each retry through structlog, which prints on standard output. The last error says enough.
set_on_retry_hooks([])


@dataclass(frozen=True)
class TaskState:
    """One task of the connector; `trace` is the stack trace of a FAILED one."""

    id: int
    state: str
    trace: str = ""

    @property
    def cause(self) -> str:
        """One line that says why it failed: the innermost cause, or the first line."""
        lines = [line.strip() for line in self.trace.splitlines() if line.strip()]
        causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
        cause = causes[-1] if causes else lines[0] if lines else "no trace"
        return NO_CONNECTION if HIBERNATE_NO_CONNECTION in cause else cause[:300]

    @property
    def names_a_record(self) -> bool:
        """Whether what it says lies in a record: restarts do not change that. Nothing else is concluded from it."""
        return _OF_A_RECORD.search(self.trace) is not None


@dataclass(frozen=True)
class SinkState:
    """What Connect says of the connector: its own state (`MISSING` when there is none) and each task's."""

    connector: str
    tasks: tuple[TaskState, ...] = ()
    trace: str = ""

    @property
    def running(self) -> bool:
        """The connector and all its tasks run."""
        return self.connector == "RUNNING" and bool(self.tasks) and all(task.state == "RUNNING" for task in self.tasks)

    @property
    def failed(self) -> tuple[TaskState, ...]:
        """The tasks that Connect gave up."""
        return tuple(task for task in self.tasks if task.state == "FAILED")

    @property
    def names_a_record(self) -> bool:
        """Whether a task was given up for what lies in records."""
        return any(task.names_a_record for task in self.failed)

    @property
    def problems(self) -> list[str]:
        """One line for each part that does not run; empty when all do."""
        if self.connector == "MISSING":
            return [f"connector {CONNECTOR} does not exist"]
        problems = []
        if self.connector != "RUNNING":
            reason = f": {TaskState(-1, self.connector, self.trace).cause}" if self.trace else ""
            problems.append(f"connector {CONNECTOR} is {self.connector}{reason}")
        if not self.tasks:
            problems.append(f"connector {CONNECTOR} has no tasks")
        alike: dict[tuple[str, str], list[int]] = {}
        for task in self.tasks:
            if task.state != "RUNNING":
                alike.setdefault((task.state, f": {task.cause}" if task.trace else ""), []).append(task.id)
        for (state, cause), numbers in alike.items():
            which = f"task {numbers[0]} is" if len(numbers) == 1 else f"tasks {', '.join(map(str, numbers))} are"
            problems.append(f"{which} {state}{cause}")
        return problems


class AbsentError(ServiceError):
    """There is no Connect of ours: nobody answers, or somebody else does. Any other failure leaves that open."""


class ForeignError(AbsentError):
    """What answers is the Connect of another Kafka cluster, or none at all: it is asked nothing and told nothing."""


class _RebalancingError(Exception):
    """409: the workers are agreeing on who runs what."""


class ConnectClient:
    """The part of Connect's REST API that we use.

    Args:
        urls: base URL of the worker, or of each worker of the group, without a trailing slash. Any of them answers for
            the group; one that does not answer is passed over.
        patience: seconds for which a request is tried again while Connect is away or rebalances.
        cluster: the id of the Kafka cluster that it has to belong to; None when it is meant whosever it is.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        patience: float = PATIENCE_SECONDS,
        cluster: Callable[[], str] | None = None,
    ) -> None:
        self._urls = [urls] if isinstance(urls, str) else list(urls)
        self._patience = patience
        self._cluster = cluster
        self._known_cluster = ""
        self._sessions = {url: loopback.session(url) for url in self._urls}

    @property
    def _url(self) -> str:
        """The worker that answered last."""
        return self._urls[0]

    @property
    def _session(self) -> requests.Session:
        return self._sessions[self._url]

    def version(self) -> str:
        """Connect's version.

        Raises:
            ServiceError: older than 4.2, or not reachable.
        """
        answer = self._object(self._request("GET", "/"))
        version = str(answer.get("version", ""))
        numbers = tuple(int(part) for part in version.split("-")[0].split(".")[:2] if part.isdigit())
        if numbers < OLDEST_VERSION:
            raise ServiceError(
                f"Kafka Connect at {self._url} is version {version or 'unknown'}, and the connector needs 4.2 or newer "
                "(schema.content): point CONNECT_URL at a newer one"
            )
        return version

    def config(self, name: str) -> dict[str, str] | None:
        """The connector's configuration as Connect holds it, or None when there is no such connector."""
        answer = self._request("GET", f"/connectors/{quote(name)}/config", allow=(404,))
        return None if answer.status_code == 404 else self._object(answer)

    def put(self, name: str, config: Mapping[str, str]) -> None:
        """Create the connector, or replace its configuration."""
        self._request("PUT", f"/connectors/{quote(name)}/config", json=dict(config))

    def state(self, name: str) -> SinkState:
        """State of the connector and of its tasks."""
        answer = self._request("GET", f"/connectors/{quote(name)}/status", allow=(404,))
        if answer.status_code == 404:
            return SinkState("MISSING")
        status = self._object(answer)
        try:
            tasks = [TaskState(task["id"], task["state"], task.get("trace", "")) for task in status["tasks"]]
            connector = status["connector"]
            return SinkState(
                connector["state"], tuple(sorted(tasks, key=lambda task: task.id)), connector.get("trace", "")
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise self._no_connect() from error

    def restart(self, name: str, only_failed: bool = True) -> None:
        """Restart the connector with its tasks; by default only those that FAILED."""
        flags = {"includeTasks": "true", "onlyFailed": str(only_failed).lower()}
        self._request("POST", f"/connectors/{quote(name)}/restart", params=flags)

    def resume(self, name: str) -> None:
        """Let a paused or stopped connector run again."""
        self._request("PUT", f"/connectors/{quote(name)}/resume")

    def stop(self, name: str) -> None:
        """Let the connector and its tasks end; its configuration and its committed offsets stay."""
        self._request("PUT", f"/connectors/{quote(name)}/stop")

    def delete(self, name: str) -> None:
        """Delete the connector; that there is none is no error. Its committed offsets stay."""
        self._request("DELETE", f"/connectors/{quote(name)}", allow=(404,))

    def _object(self, answer: requests.Response) -> dict[str, Any]:
        try:
            content = answer.json()
        except requests.JSONDecodeError as error:
            raise self._no_connect() from error
        if not isinstance(content, dict):
            raise self._no_connect()
        return content

    def _no_connect(self) -> ForeignError:
        return ForeignError(f"{self._url} answers, but is no Kafka Connect: correct CONNECT_URL (or CONNECT_PORT)")

    def _request(self, method: str, path: str, *, allow: tuple[int, ...] = (), **kwargs: Any) -> requests.Response:
        try:
            # A read that timed out is not repeated: each try may take 20 s.
            for attempt in stamina.retry_context(
                (_RebalancingError, requests.ConnectionError), attempts=None, timeout=self._patience, wait_max=2.0
            ):
                with attempt:
                    answer = self._once(method, path, **kwargs)
        except _RebalancingError as error:
            raise ServiceError(
                f"Kafka Connect at {self._url} is still rebalancing after {self._patience:.0f} s ({error}): "
                "see `metrics-pipeline logs connect`"
            ) from error
        except requests.RequestException as error:
            raise AbsentError(
                f"Kafka Connect at {', '.join(sorted(self._urls))} cannot be reached ({_reason(error)}): "
                "start it with `metrics-pipeline up`, or correct CONNECT_URL (or CONNECT_PORT)"
            ) from error
        if answer.ok or answer.status_code in allow:
            return answer
        raise ServiceError(
            f"Kafka Connect at {self._url} refused {method} {path} ({answer.status_code}): {_message(answer)}"
            + (f": mend {CONNECTOR_FILE.relative_to(ROOT)}" if answer.status_code == 400 else "")
        )

    def _once(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        answer = self._any(method, path, **kwargs)
        # A worker hands changes on to the group's leader, which may be the one that just went away.
        if answer.status_code == 409 or (answer.status_code == 500 and "forward REST request" in _message(answer)):
            raise _RebalancingError(_message(answer))
        return answer

    def _any(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        for untried in reversed(range(len(self._urls))):
            try:
                self._require_ours()
                return self._session.request(method, self._url + path, timeout=_TIMEOUT, **kwargs)
            except (requests.RequestException, ForeignError) as error:
                self._urls.append(self._urls.pop(0))
                # What a worker took in, but has not answered, may be under way: asking another one could do it twice.
                if not untried or not isinstance(error, (requests.ConnectionError, ForeignError)):
                    raise
        raise AssertionError("there is at least one URL")

    def _require_ours(self) -> None:
        """Before each request: who has the port may have changed since the one before.

        Raises:
            ForeignError: it is not ours.
            ServiceError: the broker cannot be asked which cluster is.
        """
        if self._cluster is None:
            return
        answer = self._session.get(f"{self._url}/", timeout=_TIMEOUT)
        if answer.status_code >= 500:
            raise requests.ConnectionError(f"it answers {answer.status_code}")  # it starts or ends: asked again
        try:
            theirs = str(answer.json()["kafka_cluster_id"])
        except (requests.JSONDecodeError, KeyError, TypeError):
            raise self._no_connect() from None
        if theirs == self._known_cluster:
            return
        self._known_cluster = self._cluster()
        if theirs != self._known_cluster:
            raise ForeignError(
                f"what answers at {self._url} is the Kafka Connect of another Kafka cluster ({theirs}, ours is "
                f"{self._known_cluster}): it is left alone. Set CONNECT_PORT to our own, or name another one by CONNECT_URL"
            )


def client(settings: Settings, patience: float = PATIENCE_SECONDS) -> ConnectClient:
    """The Connect of this pipeline: the one that CONNECT_URL names, else one on our ports that belongs to our Kafka cluster.

    All workers of a Kafka cluster with our group are one Connect, so the cluster's id says whose it is. A port alone does
    not: it may be that of another stack on this machine.
    """
    cluster = None if settings.connect_url else partial(kafka.cluster_id, settings)
    return ConnectClient(settings.connect_urls, patience, cluster)


def connector_config(settings: Settings | None = None) -> dict[str, str]:
    """The connector as its file has it, secrets and addresses by reference; with what these settings say of the server beyond that."""
    config = {str(name): str(value) for name, value in json.loads(CONNECTOR_FILE.read_text("utf-8")).items()}
    if settings is not None and settings.postgres_url:
        config["connection.url"] += jdbc_parameters(settings.postgres_server.tls)
    if settings is not None and settings.postgres_schema:
        begin, schema = "hibernate.agroal.initialSQL", settings.postgres_schema
        config[begin] = config[begin].replace("'search_path', 'public'", f"'search_path', '{schema}'")
        config["collection.name.format"] = f"{schema}.{config['collection.name.format']}"
    return config


def sink_state(settings: Settings, patience: float = 2.0) -> SinkState:
    """What Connect says of the connector and its tasks now.

    Raises:
        ServiceError: Connect cannot be reached.
    """
    return client(settings, patience).state(CONNECTOR)


def connector_drift(settings: Settings, patience: float = PATIENCE_SECONDS) -> list[str]:
    """Each difference between the connector and its file, then each part that does not run; empty when all is well.

    Raises:
        ServiceError: Connect cannot be reached.
    """
    rest = client(settings, patience)
    config = rest.config(CONNECTOR)
    if config is None:
        return [f"connector {CONNECTOR} does not exist"]
    return _differences(config, connector_config(settings)) + rest.state(CONNECTOR).problems


def ensure_connector(settings: Settings, patience: float = PATIENCE_SECONDS) -> Change:
    """Make the connector what its file says, and wait until it and all its tasks run.

    A paused connector is resumed and FAILED tasks are restarted once.

    Raises:
        ServiceError: Connect cannot be reached, is too old, refuses the file, or a task cannot start.
    """
    rest = client(settings, patience)
    rest.version()
    wanted = connector_config(settings)
    present = rest.config(CONNECTOR)
    details = ["connector " + CONNECTOR] if present is None else _differences(present, wanted)
    if details:
        rest.put(CONNECTOR, wanted)
    if present is not None:
        state = rest.state(CONNECTOR)
        if state.connector in ("PAUSED", "STOPPED"):
            rest.resume(CONNECTOR)
            details.append(f"resumed, was {state.connector}")
        elif not details and (state.failed or state.connector == "FAILED"):
            rest.restart(CONNECTOR)
            details.append(f"restarted, {state.problems[0]}")
    _wait_until_running(rest, settle=SETTLE_SECONDS if details else 0.0)
    if present is None:
        return Change("created", details)
    return Change("changed" if details else "unchanged", details)


def stop_connector(settings: Settings, patience: float = PATIENCE_SECONDS) -> None:
    """Stop the connector and wait until none of its tasks is left; they commit what they stored.

    Raises:
        ServiceError: Connect cannot be reached, or the tasks do not end.
    """
    await_stop(client(settings, patience))


def await_stop(rest: ConnectClient) -> None:
    """Stop the connector and wait until none of its tasks is left.

    Raises:
        ServiceError: Connect cannot be reached, or the tasks do not end.
    """
    rest.stop(CONNECTOR)
    begin = time.monotonic()
    while True:
        state = rest.state(CONNECTOR)
        if state.connector in ("STOPPED", "MISSING") and not state.tasks:
            return
        if time.monotonic() - begin >= STOPPED_SECONDS:
            raise ServiceError(
                f"connector {CONNECTOR} is {state.connector} with {len(state.tasks)} tasks {STOPPED_SECONDS:.0f} s after it "
                "was stopped: see `metrics-pipeline logs connect`, then run the job `provision` again"
            )
        time.sleep(0.25)


def _wait_until_running(client: ConnectClient, settle: float) -> None:
    begin = time.monotonic()
    failed_since = running_since = None
    while True:
        state = client.state(CONNECTOR)
        now = time.monotonic()
        failed_since = (failed_since or now) if state.failed or state.connector == "FAILED" else None
        running_since = (running_since or now) if state.running else None
        if running_since is not None and now - running_since >= settle:
            return
        if failed_since is not None and now - failed_since >= FAILED_GRACE_SECONDS:
            raise ServiceError(f"{state.problems[0]}: see `metrics-pipeline logs connect`, mend it and provision again")
        if now - begin >= RUNNING_SECONDS:
            raise ServiceError(
                f"{'; '.join(state.problems)} after {RUNNING_SECONDS:.0f} s: see `metrics-pipeline logs connect`"
            )
        time.sleep(0.25)


def _differences(present: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    differences = []
    for name in sorted(present.keys() | wanted.keys()):
        if name == "name":  # Connect adds it
            continue
        if name not in wanted:
            differences.append(f"{name} is {_shown(name, present[name])}, not configured")
        elif name not in present:
            differences.append(f"{name} is missing, configured {_shown(name, wanted[name])}")
        elif present[name] != wanted[name]:
            differences.append(f"{name} is {_shown(name, present[name])}, configured {_shown(name, wanted[name])}")
    return differences


def _shown(name: str, value: str) -> str:
    """A value fit for a line of a report: no secret that somebody put in by hand, no page of schema."""
    if "${" not in value and ("password" in name or "url" in name or "jaas" in name):
        return "(hidden)"
    return value if len(value) <= 80 else f"{value[:77]}…"


def _message(answer: requests.Response) -> str:
    try:
        text = str(answer.json().get("message", ""))
    except (requests.JSONDecodeError, AttributeError):
        text = answer.text
    return " ".join(text.split())[:500] or answer.reason


def _reason(error: requests.RequestException) -> str:
    text = str(error)
    for known in ("Connection refused", "Name or service not known", "timed out"):
        if known in text:
            return known
    return type(error).__name__
