"""A long-running child process: how it is started, found again, checked and ended."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import requests

from metrics_pipeline import loopback
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.local import ports
from metrics_pipeline.local.account import Account
from metrics_pipeline.local.processes import listens

LOG_LIMIT = 20 * 2**20
"""Bytes of a log before it is moved aside."""
LOGS_KEPT = 3


class CancelledError(Exception):
    """A start that nobody wants any more: no failure, and nothing to tell."""


@dataclass(slots=True)
class Service:
    """One part of the stack.

    Attributes:
        name: as `logs` and `status` call it.
        title: as people read it.
        url: where it listens, without credentials.
        command: program and arguments; no secret stands in them, since `ps` shows them.
        environment: all variables of the process.
        log: file that takes its output; rotated by copying, since the process keeps it open.
        check: None when healthy, else the reason why not; takes at most a few seconds.
        needs: names of the services that must be healthy before it starts.
        prepare: makes folders and configuration files; called before each start.
        find: looks for a running instance that this keeper did not start.
        answers: None when it answers at all, else why not. One that has not for SINK_STALL_SECONDS is killed and started again;
            without this nobody asks, since killing a database or a broker that is only busy would make it worse.
        account: user to drop to.
        stop_signal: asks for a graceful end.
        stop_seconds: then it is killed.
        start_seconds: bound for becoming healthy.
        ports: setting and number of each port that it has to listen on itself: somebody else's answer says nothing of it.
        first_cause: reads the reason of its end out of its log's lines.
    """

    name: str
    title: str
    url: str
    command: list[str]
    environment: Mapping[str, str]
    log: Path
    check: Callable[[], str | None]
    needs: tuple[str, ...] = ()
    prepare: Callable[[], None] = lambda: None
    find: Callable[[], psutil.Process | None] = lambda: None
    answers: Callable[[], str | None] | None = None
    account: Account | None = None
    cwd: Path = Path("/")
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 30
    start_seconds: float = 90
    ports: tuple[tuple[str, int], ...] = ()
    first_cause: Callable[[list[str]], str | None] = lambda _: None
    process: psutil.Process | None = None
    _child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def fingerprint(self) -> str:
        """Changes when the process would be started differently."""
        # The caller's terminal and shell leave traces in the environment that mean nothing here.
        noise = (
            "COLUMNS",
            "LINES",
            "OLDPWD",
            "PWD",
            "SHLVL",
            "_",
            "TERM",
            "MAKEFLAGS",
            "MAKELEVEL",
            "MFLAGS",
            "MAKE_TERMOUT",
            "MAKE_TERMERR",
        )
        environment = {k: v for k, v in self.environment.items() if k not in noise}
        return hashlib.sha256(json.dumps([self.command, environment], sort_keys=True).encode()).hexdigest()

    def start(self) -> None:
        """Start the process in a session of its own: a Ctrl-C at the terminal reaches the keeper alone."""
        self.prepare()
        if self._child is not None:  # one that ended; nobody may have asked for its exit code yet
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(1)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        who = self.account.as_arguments() if self.account else {}
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **who,
            )
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process = psutil.Process(self._child.pid)

    def adopt(self, process: psutil.Process) -> None:
        """Take charge of a running instance."""
        self.process, self._child = process, None

    def alive(self) -> bool:
        """Whether the process runs; reaps it if it is a child that ended."""
        if self._child is not None and self._child.poll() is not None:
            return False
        if self.process is None:
            return False
        try:
            return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def exit_code(self) -> int | None:
        """Of a child that ended."""
        return self._child.poll() if self._child else None

    def wait_until_healthy(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Poll `check` until it is content.

        Raises:
            ServiceError: the process ended or did not become healthy in time; with the end of its log.
            CancelledError: nobody wants it any more.
        """
        deadline = time.monotonic() + self.start_seconds
        reason: str | None = "not checked yet"
        while time.monotonic() < deadline:
            if cancelled():
                raise CancelledError
            if not self.alive():
                raise ServiceError(
                    f"{self.title} ended while starting (exit code {self.exit_code()}): {self.taken() or self.last_words()}; "
                    f"full log: {self.log}"
                )
            reason = self.check()
            if reason is None and (reason := self.taken()) is None:
                return
            time.sleep(0.15)
        raise ServiceError(
            f"{self.title} is not healthy {self.start_seconds:.0f} s after its start: {reason}; log: {self.log}"
        )

    def taken(self) -> str | None:
        """Which of its ports somebody else has, if so: one may be taken between the look at it and the start."""
        for name, port in self.ports:
            if not ports.is_taken(port) or (self.process is not None and listens(self.process, port) is not False):
                continue
            return f"port {port} is in use by {ports.holder(port)}: set {name.upper()} to a free one, or let `up --free-ports` choose"
        return None

    def stop(self) -> None:
        """End the process and everything in its session: gracefully first, then by force."""
        process = self.process
        if process is None or not self.alive():
            self.process = None
            return
        session = _session_led_by(process)
        family = _family(process, session)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(self.stop_signal)
        deadline = time.monotonic() + self.stop_seconds
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        for left in family | _family(process, session):
            with contextlib.suppress(psutil.Error):
                if left.is_running() and left.status() != psutil.STATUS_ZOMBIE:
                    left.kill()
        if self._child is not None:
            self._child.wait()
        self.process = self._child = None

    def kill(self, process: psutil.Process) -> None:
        """End this process of the service and everything in its session at once; it need not be the present one any more."""
        for one in _family(process, _session_led_by(process)):
            with contextlib.suppress(psutil.Error):
                one.kill()

    def last_words(self) -> str:
        """The last telling line of the log: an error if there is one."""
        lines = [line for line in tail(self.log, 60) if line.strip()]
        if (cause := self.first_cause(tail(self.log, 400))) is not None:
            return cause[:300]
        errors = [
            line for line in lines if any(word in line for word in ("ERROR", "FATAL", "PANIC", "Error:", "Exception"))
        ]
        return (errors or lines or ["nothing was logged"])[-1].strip()[:300]

    def rotate_log(self) -> None:
        """Move a log that has grown too long aside, by copy and truncate: the process appends to the same open file."""
        try:
            if self.log.stat().st_size < LOG_LIMIT:
                return
        except FileNotFoundError:
            return
        for number in range(LOGS_KEPT - 1, 0, -1):
            older = self.log.with_suffix(f".log.{number}")
            if older.exists():
                older.replace(self.log.with_suffix(f".log.{number + 1}"))
        shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
        with self.log.open("r+b") as file:
            file.truncate(0)


def _session_led_by(process: psutil.Process) -> int | None:
    """The id of the process's session; None when somebody else, such as a login shell, leads it."""
    with contextlib.suppress(ProcessLookupError):
        return session if (session := os.getsid(process.pid)) == process.pid else None
    return None


def _family(process: psutil.Process, session: int | None) -> set[psutil.Process]:
    """The process, its descendants, and those of its session whose own parent has ended."""
    family = {process}
    with contextlib.suppress(psutil.Error):
        family.update(process.children(recursive=True))
    if session is not None:
        for pid in psutil.pids():  # not process_iter: it remembers processes whose pid another one has meanwhile
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(pid) == session:
                    family.add(psutil.Process(pid))
    return family


def http_problem(url: str) -> str | None:
    """None when a GET succeeds within five seconds, else why not: a `check` of a service that speaks HTTP."""
    try:
        loopback.get(url, timeout=5).raise_for_status()
    except requests.RequestException as error:
        return f"no answer on {urlsplit(url).netloc} ({type(error).__name__})"
    return None


def silence(url: str) -> str | None:
    """None when a server answers within five seconds, whatever it says, else why not."""
    try:
        loopback.get(url, timeout=5)
    except requests.RequestException as error:
        return f"no answer on {urlsplit(url).netloc} ({type(error).__name__})"
    return None


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a text file, without reading more than its last 256 KiB."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**18))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []
