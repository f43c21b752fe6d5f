"""What runs and how fast: one sample of every part, for `status`, for the live table and for machines."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import psycopg
import requests

from metrics_pipeline import postgres, summaries
from metrics_pipeline.answers import ForeignAnswerError, ask
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.local import broker, connect_worker, ports
from metrics_pipeline.local.dagster import code_problem, daemon_problem, web_problem
from metrics_pipeline.local.processes import listens
from metrics_pipeline.local.service import silence
from metrics_pipeline.local.state import StackState
from metrics_pipeline.settings import Settings, SinkKind
from metrics_pipeline.sinks import active, quarantine, repair
from metrics_pipeline.sinks.connector import sink_state
from metrics_pipeline.sinks.watch import copy_sink_problem
from metrics_pipeline.watcher.state import WatcherState, read_state

RATE_SECONDS = 12.0
"""Rates of the live table are means over this long: PostgreSQL's counters arrive about once a second, in steps."""
QUARANTINE_SECONDS = 600
"""How long it is shown that records were taken from the connector."""
BETWEEN_RUNS_SECONDS = 30
"""A producer whose last run ended within this time is between two runs, not down."""
WAITING_SECONDS = 1.0
"""How long a worker of the COPY sink may have been unable to store until that is shown as a fault."""
ANSWER_SECONDS = 10.0
"""How long PostgreSQL may take until its line is hung up."""

Sample = dict[str, Any]

log = logging.getLogger(__name__)


class Sampler:
    """Takes samples and remembers enough of the former ones to give rates."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._inserted: deque[tuple[float, int]] = deque()
        self._connection: psycopg.Connection[Any] | None = None
        self._active: SinkKind = settings.sink
        self._lag = active.LagMeter(settings)
        self._pool = ThreadPoolExecutor(max_workers=6, thread_name_prefix="status")

    def sample(self) -> Sample:
        """One object with every part's health and the figures; never raises, a part that does not answer says so."""
        parts: dict[str, Callable[[], Sample]] = {
            "postgres": self._postgres,
            "broker": self._broker,
            "producer": self._producer,
            "dagster": self._dagster,
        }
        futures = {name: self._pool.submit(_whole, name, part) for name, part in parts.items()}
        answer = futures["postgres"].result()
        self._active = answer.pop("active", self._active)
        sessions, watched = answer.pop("sessions", 0), answer.pop("watched", None)
        taken = answer.pop("quarantines", None)
        futures["connect"] = self._pool.submit(_whole, "connect", self._connect)
        futures["sink"] = self._pool.submit(_whole, "sink", lambda: self._copy_sink(sessions))
        samples = {
            name: futures[name].result() for name in ("postgres", "broker", "connect", "sink", "producer", "dagster")
        }
        samples["watcher"] = self._watcher(watched, samples["postgres"].get("reason"))
        if self._active == "connect":
            samples["connect"] |= {"quarantines": taken} if taken else {}
            samples["sink"] = _connector_as_sink(samples["connect"])
        rows = samples["postgres"].pop("rows", None)
        lag = samples["broker"].pop("lag", None)
        figures = samples["producer"].pop("figures", {})
        if not samples["producer"]["healthy"] and samples["postgres"].pop("between_runs", False):
            samples["producer"] |= {"healthy": True, "state": "between two runs"}
            samples["producer"].pop("reason", None)
        samples["postgres"].pop("between_runs", None)
        return {
            **samples,
            "rows": rows,
            "rows_per_second": self._rate(),
            "acknowledged_per_second": figures.get("acknowledged_per_second", 0.0),
            "lag": lag,
            "latency_seconds": figures.get("latency_seconds", {"p50": None, "p99": None}),
        }

    def close(self) -> None:
        """End the session and the threads."""
        self._pool.shutdown()
        if self._connection is not None:
            self._connection.close()

    def _postgres(self) -> Sample:
        settings = self._settings
        answer: Sample = {
            "healthy": False,
            "url": f"postgresql://{settings.postgres_host}:{settings.postgres_host_port}/{settings.metrics_database}",
        }
        try:
            if self._connection is None or self._connection.closed:
                self._connection = postgres.connect(settings, "metrics_reader", autocommit=True)
            with postgres.impatient(self._connection, ANSWER_SECONDS):
                row = self._connection.execute(postgres.query("status"), {"seconds": BETWEEN_RUNS_SECONDS}).fetchone()
                if row is not None:
                    self._inserted.append((time.monotonic(), row[0]))
                    answer |= {"between_runs": row[1], "active": row[2], "sessions": row[3]}
                if self._settings.sink_watch:
                    answer["watched"] = read_state(self._connection)
                answer["quarantines"] = self._quarantines(self._connection)
                answer["rows"] = summaries.row_count(self._connection)
                if row is not None and row[4]:
                    # By its address another server may answer by now.
                    self._connection.close()
                    return answer | {"reason": "it is a standby, which takes no writes"}
                return answer | {"healthy": True}
        except psycopg.errors.UndefinedTable:
            return answer | {"healthy": True, "rows": None, "reason": "no schema yet: run the job `provision`"}
        except (psycopg.Error, PipelineError) as error:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            return answer | {"reason": str(error).strip().splitlines()[0]}

    @staticmethod
    def _quarantines(connection: psycopg.Connection[Any]) -> Sample | None:
        """What was taken from the connector lately, if anything was."""
        taken = quarantine.recent_in(connection, QUARANTINE_SECONDS)
        return asdict(taken) | {"text": f"{taken} ({QUARANTINE_SECONDS // 60} minutes)"} if taken.count else None

    def _rate(self) -> float | None:
        """Rows inserted a second, from PostgreSQL's own counter; None before the second sample."""
        now = time.monotonic()
        while len(self._inserted) > 2 and now - self._inserted[0][0] > RATE_SECONDS:
            self._inserted.popleft()
        if len(self._inserted) < 2:
            return None
        (then, before), (last, after) = self._inserted[0], self._inserted[-1]
        # The counter starts at 0 again after a crash of PostgreSQL.
        return round(max(after - before, 0) / (last - then), 1) if last > then else None

    def _broker(self) -> Sample:
        answers, problem = broker.look(self._settings)
        answer = _part(problem, self._settings.bootstrap_servers)
        if answers:
            with suppress(PipelineError):
                answer["lag"] = self._lag.total()
        return answer

    def _connect(self) -> Sample:
        answer = _absent("connect") | {"url": self._settings.connect_rest}
        if self._active != "connect":
            return answer | {"healthy": True, "state": "not used"}
        # One that is stopped takes requests and answers none, which the client would wait for much longer.
        silences = [silence(f"{url}/") for url in self._settings.connect_urls]
        if all(silences):
            return answer | {"reason": "; ".join(filter(None, silences))}
        try:
            state = sink_state(self._settings)
        except PipelineError as error:
            return answer | {"reason": str(error)}
        tasks = [{"id": task.id, "state": task.state} for task in state.tasks]
        # One worker has just answered for the group: only of several can another one be away.
        urls, problems = self._settings.connect_urls, state.problems
        away = [url for url in urls if connect_worker.connect_problem(self._settings, url)] if len(urls) > 1 else []
        if away:
            problems = [*problems, f"{len(away)} of {len(urls)} Connect workers away ({', '.join(away)})"]
        # Whether it gets ahead is known only to one who has looked for a while: the keeper.
        resting = repair.noted_problem(self._settings) if state.running and not away else None
        problems = [*problems, resting] if resting else problems
        reason = {"reason": "; ".join(problems)} if problems else {}
        return (
            answer
            | {"healthy": state.running and not away and not resting, "connector": state.connector, "tasks": tasks}
            | reason
        )

    def _copy_sink(self, sessions: int) -> Sample:
        """The COPY sink, when it is the active one; on another machine it shows by its sessions alone."""
        answer = _absent("sink") | {"state": "not running", "url": self._settings.sink_http}
        if self._active != "copy":
            return answer
        problem = copy_sink_problem(self._settings)
        try:
            published = ask(self._settings, f"{self._settings.sink_http}/status").json()
        except (requests.ConnectionError, requests.Timeout, ForeignAnswerError):
            # None of ours answers here: whether one runs elsewhere shows in PostgreSQL.
            return answer | ({"healthy": True, "state": "running elsewhere"} if sessions else {"reason": problem})
        workers = published.get("workers") or []
        states = sorted({str(worker["state"]) for worker in workers})
        if problem is None:
            # Its health has more patience: what is over in a moment is nobody's to restart.
            problem = next(
                (
                    f"worker {worker['name']} cannot go on for {worker['waiting_seconds']:.0f} s: {worker['reason']}"
                    for worker in workers
                    if worker["state"] == "waiting" and worker["waiting_seconds"] >= WAITING_SECONDS
                ),
                None,
            )
        answer |= {"healthy": problem is None, "state": ", ".join(states) or "starting", "workers": len(workers)}
        return answer | ({"reason": problem} if problem else {})

    def _watcher(self, state: WatcherState | None, postgres_problem: str | None) -> Sample:
        """The watcher, by what it leaves in PostgreSQL."""
        answer = _absent("watcher")
        if self._active != "connect" or not self._settings.sink_watch:
            return answer | {"healthy": True, "state": "not used"}
        if state is None:
            return answer | {"reason": postgres_problem or "nothing is known of it"}
        answer |= {"waiting": state.waiting, "to_put_right": state.to_put_right}
        if (problem := state.problem) is not None:
            return answer | {"state": "stuck" if state.sessions else "not running", "reason": problem}
        return answer | {"healthy": True, "state": "watching"}

    def _producer(self) -> Sample:
        url = self._settings.producer_http
        answer = _absent("producer") | {"url": url}
        try:
            published = ask(self._settings, f"{url}/status").json()
            health = ask(self._settings, f"{url}/health")
        except (requests.ConnectionError, requests.Timeout):
            return answer | {"state": "not running", "reason": "no producer answers"}
        except ForeignAnswerError as error:
            return answer | {"state": "not running", "reason": str(error)}
        latency = published["latency_seconds"]
        answer |= {
            "healthy": health.status_code == requests.codes.ok,
            "state": str(published["state"]),
            "figures": {
                "acknowledged_per_second": float(published["acknowledged_per_second"]),
                "latency_seconds": {name: _figure(latency[name]) for name in ("p50", "p99")},
            },
        }
        if published.get("paused"):
            answer["reason"] = published["paused"]
        elif not answer["healthy"]:
            answer["reason"] = "the broker has acknowledged nothing for a while"
        return answer

    def _dagster(self) -> Sample:
        settings = self._settings
        problem = (
            self._taken("webserver", "dagster_port")
            or self._taken("code", "dagster_code_port")
            or web_problem(settings)
            or code_problem(settings)
            or daemon_problem(settings)
        )
        return _part(problem, settings.dagster_http)

    def _taken(self, name: str, port: str) -> str | None:
        """Whether somebody else listens on the port of a part of Dagster's, whose answers do not say whose they are."""
        number = int(getattr(self._settings, port))
        # Where a setting names the webserver, as in containers, nothing of Dagster's is a child of a keeper's.
        if self._settings.dagster_url or not ports.is_taken(number):
            return None
        child = StackState.read(self._settings.data_dir).children.get(name)
        process = child.find() if child else None
        if process is not None and listens(process, number) is not False:
            return None
        return (
            f"what answers on 127.0.0.1:{number} is not the {name} of {self._settings.data_dir} "
            f"({ports.holder(number)}): set {port.upper()} to another port"
        )


def _absent(name: str) -> Sample:
    """What is shown of a part that tells nothing: every key that it would have."""
    answer: Sample = {"healthy": False, "url": ""}
    match name:
        case "connect":
            return answer | {"connector": None, "tasks": []}
        case "sink":
            return answer | {"kind": "copy", "state": "unknown", "workers": None}
        case "watcher":
            return answer | {"state": "unknown", "waiting": None, "to_put_right": None}
        case "producer":
            return answer | {"state": "unknown"}
    return answer


def _whole(name: str, part: Callable[[], Sample]) -> Sample:
    """What a part tells of itself. Anybody may answer on its port, with anything: that is its problem, and not its display's."""
    try:
        return part()
    except Exception as error:
        log.debug("%s", name, exc_info=True)
        return _absent(name) | {"reason": f"its answer is not that of a {name} ({type(error).__name__}: {error})"}


def _figure(value: Any) -> float | None:
    return None if value is None else float(value)


def _part(problem: str | None, url: str) -> Sample:
    return {"healthy": problem is None, "url": url} | ({"reason": problem} if problem else {})


def _connector_as_sink(connect: Sample) -> Sample:
    running = [task for task in connect["tasks"] if task["state"] == "RUNNING"]
    answer: Sample = {
        "kind": "connect",
        "healthy": connect["healthy"],
        "state": connect["connector"] or "not running",
        "url": connect["url"],
        "workers": len(running),
    }
    return answer | ({"reason": connect["reason"]} if "reason" in connect else {})


def is_healthy(sample: Sample) -> bool:
    """Whether every part of a sample is; of the sinks, the one that stores the readings."""
    return all(sample[part]["healthy"] for part in ("postgres", "broker", "sink", "watcher", "producer", "dagster"))
