"""What happened to the containers, in order, as the engine tells it."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from metrics_pipeline_tests.containers.deployment import Deployment

ACTIONS = ("start", "die", "oom", "health_status")


@dataclass(frozen=True)
class Event:
    """One of them.

    Attributes:
        at: nanoseconds.
        service: whose container.
        action: `start`, `die`, `oom` or `healthy`.
        code: the exit code, of `die`.
    """

    at: int
    service: str
    action: str
    code: int


class Events:
    """Those of one project since they are listened to."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def all(self) -> list[Event]:
        """So far."""
        found = []
        for line in self._file.read_text("utf-8").splitlines():
            event = json.loads(line)
            about = event["Actor"]["Attributes"]
            action = str(event["Action"])
            if not action.startswith("health_status") or action.endswith(" healthy"):
                code = int(about.get("exitCode", 0))
                service = about["com.docker.compose.service"]
                # Commands of `docker compose run` are no parts of the stack.
                if about.get("com.docker.compose.oneoff") != "True":
                    found.append(Event(event["timeNano"], service, action.rpartition(" ")[2], code))
        return sorted(found, key=lambda event: event.at)

    def first(self, service: str, action: str, since: int = 0) -> Event | None:
        """The first of a kind."""
        return next(
            (one for one in self.all() if (one.service, one.action) == (service, action) and one.at >= since), None
        )


@contextmanager
def listening(deployment: Deployment) -> Iterator[Events]:
    """Events from now on."""
    with tempfile.NamedTemporaryFile("w", suffix=".events") as file:
        filters = [f"--filter=event={action}" for action in ACTIONS]
        label = f"--filter=label=com.docker.compose.project={deployment.name}"
        process = subprocess.Popen(
            ["docker", "events", "--filter=type=container", label, *filters, "--format", "{{json .}}"],
            env=deployment.engine.environment,
            stdout=file,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield Events(Path(file.name))
        finally:
            process.terminate()
            process.wait(30)
