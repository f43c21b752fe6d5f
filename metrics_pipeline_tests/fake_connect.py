"""Kafka Connect's REST API in memory, behind a real socket: the client under test is the real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from metrics_pipeline_tests.fake_http import Request, listening


@dataclass
class FakeConnect:
    """One worker. `poison` makes each task of a connector fail again as soon as it starts; `stopped` is called when one stops.

    `cluster` is the Kafka cluster that it belongs to; `asked` has the path of each request but for the worker itself.
    """

    url: str = ""
    version: str = "4.3.1"
    cluster: str | None = "fake"
    tasks: int = 2
    rebalances: int = 0
    refuse: str = ""
    poison: str = ""
    configs: dict[str, dict[str, str]] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    task_states: dict[str, dict[int, tuple[str, str]]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    stopped: Callable[[], object] = lambda: None

    def fail(self, name: str, trace: str, *tasks: int) -> None:
        """Set tasks (all by default) to FAILED with a trace."""
        for task in tasks or range(self.tasks):
            self.task_states[name][task] = ("FAILED", trace)

    def start(self, name: str) -> None:
        """All of the connector runs."""
        self.states[name] = "RUNNING"
        state = ("FAILED", self.poison) if self.poison else ("RUNNING", "")
        self.task_states[name] = dict.fromkeys(range(self.tasks), state)

    def answer(self, method: str, target: str, body: Any) -> tuple[int, Any]:
        """Status code and JSON of an answer."""
        path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
        if path == "/":
            own = {"kafka_cluster_id": self.cluster} if self.cluster else {}
            return 200, {"version": self.version, "commit": "0", **own}
        self.asked.append(path)
        if method != "GET":
            self.requests.append(f"{method} {target}")
            if self.rebalances:
                self.rebalances -= 1
                return 409, {"error_code": 409, "message": "Cannot complete request because of a conflicting operation"}
        _, _, name, *rest = path.split("/")
        action = rest[0] if rest else ""
        if (method, action) == ("PUT", "config"):
            if self.refuse:
                return 400, {"error_code": 400, "message": self.refuse}
            status = 200 if name in self.configs else 201
            self.configs[name] = {**body, "name": name}
            self.start(name)
            return status, {}
        if name not in self.configs:
            return 404, {"error_code": 404, "message": f"Connector {name} not found"}
        return self._existing(method, name, action, query)

    def _existing(self, method: str, name: str, action: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        match method, action:
            case "GET", "config":
                return 200, self.configs[name]
            case "GET", "status":
                tasks = [
                    {"id": number, "state": state, "worker_id": "fake"} | ({"trace": trace} if trace else {})
                    for number, (state, trace) in self.task_states[name].items()
                ]
                connector = {"state": self.states[name], "worker_id": "fake"}
                return 200, {"name": name, "connector": connector, "tasks": tasks}
            case "POST", "restart":
                only_failed = query.get("onlyFailed") == ["true"]
                for number, (state, _) in self.task_states[name].items():
                    if state == "FAILED" or not only_failed:
                        restarted = ("FAILED", self.poison) if self.poison else ("RUNNING", "")
                        self.task_states[name][number] = restarted
                return 202, {}
            case "PUT", "resume":
                self.start(name)
                return 202, None
            case "PUT", "stop":
                self.states[name], self.task_states[name] = "STOPPED", {}
                self.stopped()
                return 202, None
            case "DELETE", "":
                del self.configs[name], self.states[name], self.task_states[name]
                return 204, None
        return 405, {"error_code": 405, "message": "HTTP 405 Method Not Allowed"}


@contextmanager
def serving() -> Iterator[FakeConnect]:
    """A FakeConnect on a free port."""
    fake = FakeConnect()

    def respond(request: Request) -> None:
        status, answer = fake.answer(request.command, request.path, request.json())
        request.reply(status, b"" if answer is None else json.dumps(answer).encode())

    with listening(respond) as server:
        fake.url = f"http://127.0.0.1:{server.server_port}"
        yield fake
