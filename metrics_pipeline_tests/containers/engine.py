"""A container engine: the one that runs already, or one of our own that leaves nothing behind but its cache."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

POOL: Final = "10.213.0.0/16"
"""Where an engine of our own takes the networks of its containers from."""
START_SECONDS: Final = 120.0
STOP_SECONDS: Final = 120.0
FILES: Final = 65536
"""Open files that Redpanda's container asks for."""


class UnavailableError(Exception):
    """No engine can be had here; the message says what is missing."""


@dataclass(frozen=True)
class Engine:
    """Where commands go.

    Attributes:
        environment: for `docker`.
        own: whether it is ours alone: stand-ins may take the names of real images.
        version: its version and its runtime's.
    """

    environment: dict[str, str]
    own: bool
    version: str

    def docker(
        self, *words: str | Path, timeout: float = 600, check: bool = True, errors: bool = False, stdin: Any = None
    ) -> str:
        """What a command prints; with `errors`, also to standard error.

        Raises:
            RuntimeError: it failed; the message has what it said.
        """
        done = subprocess.run(
            ["docker", *map(str, words)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=stdin,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"docker {' '.join(map(str, words))}: exit {done.returncode}: {done.stderr[-3000:]}")
        return done.stdout + (done.stderr if errors else "")


def found() -> Engine | None:
    """The engine that `docker` of this account talks to, if one answers."""
    return _engine(dict(os.environ), own=False) if shutil.which("docker") else None


def _engine(environment: dict[str, str], *, own: bool) -> Engine | None:
    command = ["docker", "info", "--format", "{{json .}}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    known = json.loads(done.stdout or "{}") if done.returncode == 0 else {}
    if not known.get("ServerVersion"):
        return None
    text = f"engine {known['ServerVersion']}, {known['Driver']}, cgroup v{known.get('CgroupVersion', '1')}"
    return Engine(environment, own, text)


def files_are_limited() -> bool:
    """Whether a container cannot have as many open files as Redpanda's asks for: then runc refuses to start it."""
    return 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[1] < FILES


@contextmanager
def own(cache: Path) -> Iterator[Engine]:
    """A `dockerd` of our own. Its images stay in the cache; containers, networks, rules and processes go with it.

    It writes no iptables rules and needs no bridge of its own: ports are published by its proxy, on loopback. So containers
    reach nothing beyond their networks, and a second engine is not disturbed.

    Raises:
        UnavailableError: it cannot be had here.
    """
    if os.geteuid() != 0:
        raise UnavailableError("no container engine answers, and only root can start one")
    for program in ("dockerd", "containerd", "runc", "docker"):
        if shutil.which(program, path=_path()) is None:
            raise UnavailableError(f"no container engine answers, and there is no `{program}` to start one (docker.io)")
    if [process for process in psutil.process_iter(["name"]) if process.info["name"] == "dockerd"]:
        # Beside it, one without a bridge would take its bridge away.
        raise UnavailableError("another engine runs on this machine, and does not answer this account's `docker`")
    folder = Path(tempfile.mkdtemp(prefix="mp-engine-"))
    socket = f"unix://{folder}/docker.sock"
    environment = {**os.environ, "DOCKER_HOST": socket, "DOCKER_CONFIG": str(folder / "config"), "PATH": _path()}
    (folder / "config").mkdir()
    (cache / "engine").mkdir(parents=True, exist_ok=True)
    log = (cache / "engine.log").open("wb")
    before = _cgroups()
    process = subprocess.Popen(
        [
            "dockerd",
            *("--data-root", str(cache / "engine"), "--exec-root", str(folder / "exec")),
            *("--host", socket, "--pidfile", str(folder / "pid"), "--log-level", "warn"),
            *("--bridge", "none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"),
            *("--default-address-pool", f"base={POOL},size=24"),
        ],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # a Ctrl-C is ours to answer
    )
    try:
        engine = _started(process, environment, cache / "engine.log")
        _sweep(engine)
        with _between_containers():
            yield engine
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()
        for left in sorted(_cgroups() - before, key=lambda path: -len(path.parts)):
            with suppress(OSError):
                left.rmdir()
        _unmount(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(engine: Engine) -> None:
    """What a run left that was killed, and images that no longer have a name."""
    if left := engine.docker("ps", "--all", "--quiet").split():
        engine.docker("rm", "--force", "--volumes", *left)
    if left := engine.docker("volume", "ls", "--quiet").split():
        engine.docker("volume", "rm", *left)
    engine.docker("network", "prune", "--force")
    engine.docker("image", "prune", "--force")


def _unmount(folder: Path) -> None:
    """The namespaces of networks, which the engine leaves mounted."""
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text("utf-8").splitlines()]
    for place in reversed(mounted):
        if place.startswith(f"{folder}/"):
            subprocess.run(["umount", place], check=False, capture_output=True)


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _started(process: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> Engine:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if engine := _engine(environment, own=True):
            return engine
        time.sleep(0.5)
    if process.poll() is None:
        process.kill()
        process.wait()
    raise UnavailableError(f"no container engine answers, and one of our own does not start: {_last(log)}")


def _last(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1][-400:] if lines else "it says nothing"


@contextmanager
def _between_containers() -> Iterator[None]:
    """Where another engine left the kernel's rules so that nothing is forwarded, our networks are let through."""
    seen = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    program = shutil.which("iptables", path=_path())
    rule = ["FORWARD", "-s", POOL, "-d", POOL, "-j", "ACCEPT"]
    filtered = program is not None and seen.exists() and seen.read_text("utf-8").strip() == "1"
    if filtered:
        subprocess.run([program or "", "-I", *rule], check=True, capture_output=True)
    try:
        yield
    finally:
        if filtered:
            subprocess.run([program or "", "-D", *rule], check=False, capture_output=True)


def _cgroups() -> set[Path]:
    return {path for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/*") for path in Path("/").glob(f"{root[1:]}/docker*")}
