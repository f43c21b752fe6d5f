"""A clean clone whose compose files run: commands as people type them, and what the engine knows of the containers."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from metrics_pipeline.local.ports import is_free
from metrics_pipeline.settings import ROOT, Settings
from metrics_pipeline_tests.compose_files import ARCHIVE, CLUSTER, MAIN, REPLAY, project
from metrics_pipeline_tests.containers.engine import Engine, files_are_limited

OVERLAY: Final = "stand-in.yaml"
CLUSTER_OVERLAY: Final = "stand-in.cluster.yaml"
TYPE_SECONDS: Final = 600.0


class ProblemError(AssertionError):
    """Something is not as it has to be."""


def wait_until(what: str, check: Callable[[], object], seconds: float, pause: float = 1.0) -> Any:
    """What the check returns, once it is true.

    Raises:
        ProblemError: it was not within the time; the last answer or error is in the message.
    """
    deadline = time.monotonic() + seconds
    while True:
        said: object
        try:
            if answer := check():
                return answer
            said = answer
        except (RuntimeError, ProblemError, ValueError, OSError) as error:
            said = error
        if time.monotonic() > deadline:
            raise ProblemError(f"not within {seconds:.0f} s: {what} ({str(said)[-1500:]})")
        time.sleep(pause)


@dataclass
class Deployment:
    """One project of Compose.

    Attributes:
        engine: where it runs.
        checkout: the clone.
        name: of the project.
        settings: the lines of `.env`.
        typed: every command that was typed, as the pages have it.
        stand_in: whether the overlay for stand-ins is there.
    """

    engine: Engine
    checkout: Path
    name: str
    settings: dict[str, str]
    stand_in: bool
    typed: list[str] = field(default_factory=list)

    def set(self, **settings: str) -> None:
        """Lines of `.env`; an empty one takes it out."""
        self.settings |= settings
        text = "".join(f"{name}={value}\n" for name, value in self.settings.items() if value)
        (self.checkout / ".env").write_text(text, "utf-8")

    def type(self, command: str, timeout: float = TYPE_SECONDS, *, check: bool = True) -> str:
        """A command as it stands in the pages, in the checkout; what it prints.

        Raises:
            ProblemError: it failed.
        """
        self.typed.append(command)
        command = command.replace("docker compose exec ", "docker compose exec -T ")  # there is no terminal
        if self.stand_in and " -f " in command:  # which takes the place of COMPOSE_FILE
            command = command.replace(CLUSTER.name, f"{CLUSTER.name} -f {OVERLAY} -f {CLUSTER_OVERLAY}")
            for overlay in (REPLAY, ARCHIVE):
                command = command.replace(overlay.name, f"{overlay.name} -f {OVERLAY}")
        return self._run(["bash", "-c", command], timeout, check=check)

    def compose(self, *words: str, timeout: float = TYPE_SECONDS, check: bool = True) -> str:
        """`docker compose …`."""
        return self._run(["docker", "compose", *words], timeout, check=check)

    def inside(self, service: str, *words: str, timeout: float = 300, check: bool = True) -> str:
        """A command in the container of a service."""
        return self.compose("exec", "-T", service, *words, timeout=timeout, check=check)

    def sql(self, statement: str) -> str:
        """The last line of an answer, asked by the read-only role."""
        said = self.inside("code", "metrics-pipeline", "sql", "--plain", statement, timeout=120)
        return said.strip().splitlines()[-1].strip()

    def as_superuser(self, statement: str, database: str = "metrics") -> str:
        """By loopback, in its container."""
        words = ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "postgres", "-d"]
        password = "PGPASSWORD=$(cat /run/metrics-secrets/postgres_password)"
        return self.inside(
            "postgres", "sh", "-c", f'{password} exec "$@"', "sh", *words, database, "-c", statement
        ).strip()

    def containers(self) -> dict[str, list[dict[str, Any]]]:
        """What the engine says of each container, by service."""
        label = f"label=com.docker.compose.project={self.name}"
        ids = self.engine.docker("ps", "--all", "--quiet", "--filter", label).split()
        found: dict[str, list[dict[str, Any]]] = {}
        for one in json.loads(self.engine.docker("inspect", *ids)) if ids else []:
            found.setdefault(one["Config"]["Labels"]["com.docker.compose.service"], []).append(one)
        return found

    def container(self, service: str) -> dict[str, Any]:
        """The first container of a service."""
        try:
            return self.containers()[service][0]
        except KeyError:
            raise ProblemError(f"{service} has no container") from None

    def port(self, service: str, inside: int) -> int:
        """Where a port of a service is published."""
        return int(self.compose("port", service, str(inside)).strip().rpartition(":")[2])

    def crash(self, service: str) -> None:
        """End the first process of a container, and so all of them: for the engine that is no stop by hand, but a crash."""
        before = self.container(service)["State"]
        try:
            os.kill(before["Pid"], signal.SIGKILL)
        except PermissionError:
            program = f"import os; os.kill({before['Pid']}, {int(signal.SIGKILL)})"
            rights = ["--pid", "host", "--user", "0:0", "--network", "none", "--entrypoint", "python"]
            self.engine.docker("run", "--rm", *rights, self.container("code")["Config"]["Image"], "-c", program)
        wait_until(
            f"{service} is started again",
            lambda: (now := self.container(service)["State"])["Running"] and now["StartedAt"] != before["StartedAt"],
            60,
            0.3,
        )

    def up(self, command: str = "docker compose up -d", timeout: float = TYPE_SECONDS) -> float:
        """Type what starts it; the seconds that it took.

        Raises:
            ProblemError: it failed, with the log of what did not come up.
        """
        began = time.monotonic()
        try:
            self.type(command, timeout)
        except (ProblemError, subprocess.TimeoutExpired) as error:
            raise ProblemError(f"{str(error)[-1200:]}\n{self.troubles()}") from error
        return time.monotonic() - began

    def troubles(self) -> str:
        """State and last lines of each container that is not well."""
        said = []
        for name, ones in self.containers().items():
            for one in ones:
                state = one["State"]
                health = (state.get("Health") or {}).get("Status")
                if state["ExitCode"] or one["RestartCount"] or (health == "unhealthy" and state["Running"]):
                    log = self.engine.docker("logs", "--tail", "12", one["Id"], check=False, errors=True)
                    checks = (state.get("Health") or {}).get("Log") or [{}]
                    said.append(
                        f"{name}: exit {state['ExitCode']}, restarts {one['RestartCount']}, {health}, "
                        f"check: {str(checks[-1].get('Output', ''))[-400:]}\n{log[-900:]}"
                    )
        return "\n".join(said)

    def _run(self, words: Sequence[str], timeout: float, *, check: bool) -> str:
        done = subprocess.run(
            words,
            cwd=self.checkout,
            env=self.engine.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode != 0:
            raise ProblemError(
                f"{' '.join(words)[-300:]}: exit {done.returncode}: {(done.stdout + done.stderr)[-2500:]}"
            )
        return done.stdout


def snapshot(revision: str | None = None) -> str:
    """A commit of the checkout as it stands, changes included: what a clone of it gets."""
    if revision:
        return _git("rev-parse", revision)
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        _git("read-tree", "HEAD", **index)
        _git("add", "--all", **index)
        tree = _git("write-tree", **index)
    if tree == _git("rev-parse", "HEAD^{tree}"):
        return _git("rev-parse", "HEAD")
    who = {
        f"GIT_{role}_{what}": "containers@example.invalid"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    return _git("commit-tree", tree, "-p", "HEAD", "-m", "The checkout as it stands", **who)


def _git(*words: str, **variables: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@contextmanager
def deployed(
    engine: Engine, revision: str, *, stand_in: bool, settings: Mapping[str, str] | None = None, keep: bool = False
) -> Iterator[Deployment]:
    """A clean clone of a commit, with ports of its own in `.env`; whatever it started is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="mp-containers-"))
    checkout = folder / "checkout"
    origin = folder / "origin.git"
    name = f"mp-{random.randrange(16**6):06x}"
    made: Deployment | None = None
    try:
        # A branch of its own in a repository of its own: `git pull` has somewhere to pull from.
        subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", origin], check=True)
        # The public CI has a shallow clone.
        subprocess.run(["git", "-C", origin, "config", "receive.shallowUpdate", "true"], check=True)
        _git("push", "--quiet", str(origin), f"{revision}:refs/heads/main")
        subprocess.run(["git", "clone", "--quiet", origin, checkout], check=True)
        files = [MAIN.name]
        if stand_in:
            for file, what in overlays(checkout).items():
                (checkout / file).write_text(yaml.safe_dump(what).replace("'!reset'", "!reset null"), "utf-8")
            files.append(OVERLAY)
        own = _ports() | {"COMPOSE_PROJECT_NAME": name, "COMPOSE_FILE": ":".join(files)}
        # Of somebody else's engine no image is replaced, and of ours none is taken that an earlier clone had built.
        own |= {"PIPELINE_IMAGE": name}
        if engine.own:  # a commit from before that setting
            engine.docker("image", "rm", "--force", *_images("metrics-pipeline"), check=False)
        made = Deployment(engine, checkout, name, {}, stand_in)
        made.set(**own, **(settings or {}))
        yield made
    finally:
        if made is not None and not keep:
            words = ["--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "5"]
            made.compose(*words, check=False)
            engine.docker("image", "rm", "--force", *_images(name), check=False)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _images(name: str) -> list[str]:
    return [f"{name}:0.1.0", f"{name}-connect:0.1.0"]


def overlays(checkout: Path) -> dict[str, dict[str, Any]]:
    """What this machine, or an engine without a bridge, does not give, and digests, which no stand-in has.

    By file, one of them for the cluster.
    """
    (python,) = re.findall(r"^ARG PYTHON=([^@\s]+)", (checkout / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    found: dict[str, dict[str, Any]] = {}
    for name, service in project(checkout / MAIN.name, checkout / CLUSTER.name).items():
        if "build" in service:
            found.setdefault(name, {})["build"] = {"network": "host", "args": {"PYTHON": python}}
        if "@" in service["image"]:
            found.setdefault(name, {})["image"] = service["image"].partition("@")[0]
        if "ulimits" in service and files_are_limited():
            found.setdefault(name, {})["ulimits"] = "!reset"
    # Those of the cluster would be services without an image to the others.
    main = project(checkout / MAIN.name)
    return {
        OVERLAY: {"services": {name: what for name, what in found.items() if name in main}},
        CLUSTER_OVERLAY: {"services": {name: what for name, what in found.items() if name not in main}},
    }


def _ports() -> dict[str, str]:
    """Below those that the kernel gives to clients."""
    names = [name for name in Settings.model_fields if name.endswith("_port")]
    first = next(
        port
        for port in iter(lambda: random.randrange(20000, 31000), None)
        if all(is_free(number) for number in range(port, port + len(names) + 12))
    )
    ports = {name.upper(): str(first + index) for index, name in enumerate(names)}
    return ports | {"SINK_PORTS": f"{first + len(names)}-{first + len(names) + 9}"}


def long_running(*files: Path) -> set[str]:
    """The services that stay up, profiles included."""
    return {name for name, service in project(*files).items() if service["restart"] == "unless-stopped"}
