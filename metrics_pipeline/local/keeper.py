"""The keeper: brings the stack up, keeps it up, and takes it down in order.

It runs in the foreground under `metrics-pipeline up`; its children have sessions of their own, so a Ctrl-C reaches the
keeper alone and it decides the order of their end. If it is killed, its children go on; the next keeper finds them.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

import psutil

from metrics_pipeline.data_folder import folder_id
from metrics_pipeline.errors import BusyError, InstallError
from metrics_pipeline.local import broker, environment, lock, ports
from metrics_pipeline.local.processes import identify, marked
from metrics_pipeline.local.service import Service
from metrics_pipeline.local.stack import ShowLine, Stack, build, ports_in_use, require_paths
from metrics_pipeline.local.state import StackState
from metrics_pipeline.settings import Settings
from metrics_pipeline.sinks.repair import SinkRepair, note, record

log = logging.getLogger(__name__)

LONGEST_PAUSE = 30.0
"""Seconds between two attempts to bring back a service that keeps ending."""
STEADY_SECONDS = 60.0
"""A service that ran this long begins its back-off from the start when it ends."""
TICK = 0.5
ASK_SECONDS = 2.0
"""Between two questions to a service, whether it answers at all."""
SILENCES = 2
"""How many questions in a row must have been for nothing: after the machine was asleep, one is no sign."""
KEEPER_SECONDS = 180.0
"""How long `down` waits for the keeper: it flushes a producer's run, and lets PostgreSQL write its checkpoint."""
STRAY_SECONDS = 10.0


class Keeper:
    """Runs one stack. Use as `with Keeper(settings, report) as keeper: keeper.start(); keeper.run(show)`."""

    def __init__(
        self,
        settings: Settings,
        report: ShowLine,
        *,
        free_ports: bool = False,
        chosen: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare.

        Args:
            settings: of the stack.
            report: shows a line.
            free_ports: move busy ports.
            chosen: variables that were given as options, to be kept in the env file once they are known to fit.
        """
        self._show_line = report
        self._troubles: set[str] = set()
        self._free_ports = free_ports
        self._chosen = dict(chosen or {})
        self._settings = settings
        self._lock: lock.Lock | None = None
        self._state = StackState()
        self._stop = threading.Event()
        self._signal: signal.Signals | None = None
        self._attempts: dict[str, tuple[int, float, float]] = {}
        self._handlers: dict[signal.Signals, object] = {}
        self.stack: Stack | None = None

    @property
    def settings(self) -> Settings:
        """The settings in force, ports as finally chosen."""
        return self._settings

    def __enter__(self) -> Keeper:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _report(self, line: str) -> None:
        """Show a line, if there is still somebody to show it to."""
        self._harmless("show what happens", lambda: self._show_line(line))

    def _harmless(self, what: str, step: Callable[[], object]) -> None:
        """A step whose failure must not end the services; it is told once, until it succeeds again."""
        try:
            step()
        except Exception:
            if what not in self._troubles:
                self._troubles.add(what)
                log.exception("cannot %s; the services go on", what)
        else:
            self._troubles.discard(what)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self._stop.is_set():
            self._signal = signal.Signals(number)
            self._report(f"{self._signal.name}: stopping everything in order")
        self.request_stop()

    def request_stop(self) -> None:
        """Let `start` or `run` return at the next chance."""
        self._stop.set()
        if self.stack is not None:
            self.stack.cancelled.set()

    @property
    def stopping(self) -> bool:
        """Whether an end was asked for."""
        return self._stop.is_set()

    @property
    def exit_code(self) -> int:
        """Of a start that was interrupted: 128 and the signal's number, as shells have it; 130 for Ctrl-C."""
        return 128 + (self._signal or signal.SIGINT)

    def start(self) -> None:
        """Bring the stack up, taking over what a killed keeper left; returns early, quietly, when it is to stop.

        Raises:
            PipelineError: what failed; `__exit__` ends what was started.
        """
        self._prepare_folder()
        self._lock = lock.take(self._settings.data_dir)
        broker.require_same_brokers(self._settings)
        environment.write_secrets()
        self._settings = Settings.load()
        if self._chosen:
            environment.remember(self._chosen)
            self._report(f"{', '.join(f'{k}={v}' for k, v in self._chosen.items())} (kept in the env file)")
        stack = self._claim()
        if self._free_ports:
            stack = self._move_ports(stack)
        ports.require_free(self._settings, ports_in_use(stack))
        environment.remember(
            {
                "DAGSTER_HOME": str(environment.dagster_home(self._settings)),
                "DAGSTER_POSTGRES_URL": self._settings.dagster_postgres_url,
            }
        )
        self._state = StackState(keeper=identify(psutil.Process()))
        try:
            stack.start(self._report)
        finally:
            self._note()
        if not self._stop.is_set():
            self._state.ready = True
            self._note()

    def run(self, show: Callable[[], None]) -> None:
        """Keep the services up until a signal or `request_stop`; `show` is called every tick, and may fail."""
        assert self.stack is not None  # noqa: S101  # start() came before
        repairer = threading.Thread(target=self._repair, name="repair", daemon=True)
        repairer.start()
        for service in self.stack.services:
            if service.answers is not None:
                threading.Thread(
                    target=self._listen, args=(service,), name=f"listens {service.name}", daemon=True
                ).start()
        while not self._stop.wait(TICK):
            for service in self.stack.services:
                self._harmless(f"look after {service.title}", partial(self._look_after, service))
                self._harmless(f"rotate {service.log}", service.rotate_log)
            self._harmless("show how it runs", show)

    def _look_after(self, service: Service) -> None:
        if not service.alive():
            self._bring_back(service)

    def _listen(self, service: Service) -> None:
        """Kill a process of ours that runs and answers nothing any more; as one that ended, it is then brought back."""
        process, heard, silences, answered = service.process, time.monotonic(), 0, False
        while not self._stop.wait(ASK_SECONDS):
            if service.process is not process or not service.alive():
                process, heard, silences, answered = service.process, time.monotonic(), 0, False
                continue
            problem = service.answers() if service.answers is not None else None
            if problem is None or process is None:
                heard, silences, answered = time.monotonic(), 0, True
                continue
            silences += 1
            patience = float(self._settings.sink_stall_seconds)
            if not answered:
                patience = max(patience, service.start_seconds)
            silent = time.monotonic() - heard
            if silent > patience and silences >= SILENCES and not self._stop.is_set():
                self._report(f"{service.title} does not answer for {silent:.0f} s ({problem}): killing it")
                service.kill(process)

    def _prepare_folder(self) -> None:
        folder = self._settings.data_dir
        require_paths(self._settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InstallError(
                f"cannot write the data folder {folder}: {error.strerror}; set PIPELINE_DATA_DIR to a folder you own"
            ) from error
        require_disk(self._settings, folder)

    def _claim(self) -> Stack:
        """Build the stack and take over, or end, what still runs of it."""
        stack = build(self._settings)
        self.stack = stack
        if self._stop.is_set():
            stack.cancelled.set()
        state = StackState.read(self._settings.data_dir)
        stale = state.adopt(stack.services)
        for service in reversed(stale):
            self._report(f"{service.title} runs with other settings: restarting it")
            service.stop()
        for service in state.others(stack.services, self._settings.data_dir / "logs"):
            self._report(f"{service.title} is no part of the stack any more: ending it")
            service.stop()
        return stack

    def _move_ports(self, stack: Stack) -> Stack:
        busy = [name for name in ports_in_use(stack) if not ports.is_free(getattr(self._settings, name))]
        if not busy:
            return stack
        chosen = dict(zip(busy, ports.free_ports(len(busy)), strict=True))
        environment.remember({name.upper(): str(port) for name, port in chosen.items()})
        for name, port in chosen.items():
            self._report(f"{name.upper()}={getattr(self._settings, name)} is busy: using {port} (kept in the env file)")
        self._settings = Settings.load(**chosen)
        return self._claim()

    def _bring_back(self, service: Service) -> None:
        if (process := service.find()) is not None:
            service.adopt(process)
            self._report(f"{service.title} was restarted by somebody else: looking after pid {process.pid} now")
            self._note()
            return
        attempts, last, due = self._attempts.get(service.name, (0, 0.0, 0.0))
        now = time.monotonic()
        if attempts and now - last > STEADY_SECONDS:
            attempts = 0
        if now < due:
            return
        self._attempts[service.name] = (attempts + 1, now, now + min(2.0**attempts, LONGEST_PAUSE))
        self._report(f"{service.title} ended (exit code {service.exit_code()}): starting it again; log: {service.log}")
        try:
            service.start()
        except OSError as error:
            log.warning("%s cannot be started: %s", service.title, error)
        self._note()

    def _repair(self) -> None:
        """The sink's repair runs here too: while PostgreSQL restarts, Dagster's own storage is away."""
        repair = SinkRepair(self._settings)
        while not self._stop.wait(3):
            try:
                tick = repair.tick()
                note(self._settings, tick)
                record(self._settings, tick.events, "keeper")
                for event in tick.events:
                    self._report(f"sink: {event.action}: {event.reason}")
            except Exception:
                log.exception("the sink's repair failed; trying again")

    def _note(self) -> None:
        if self.stack is not None and self._lock is not None:
            self._state.note(self.stack.services)
            self._state.write(self._settings.data_dir)

    def _end(self) -> None:
        self._stop.set()
        if self.stack is not None and self._lock is not None:
            self.stack.cancelled.set()
            self.stack.stop(self._report)
            self._state = StackState()
            self._note()
        if self._lock is not None:
            self._lock.close()


def require_disk(settings: Settings, folder: Path) -> None:
    """Check the free space before anything is started.

    Raises:
        InstallError: there is less than the limit at which the producer would stop anyway.
    """
    free = psutil.disk_usage(str(folder)).free / 2**30
    if free < settings.disk_free_limit_gb:
        raise InstallError(
            f"{free:.1f} GiB are free for {folder}, and the producer stops below {settings.disk_free_limit_gb:g} GiB: "
            "free some space, set PIPELINE_DATA_DIR to a larger disk, or lower DISK_FREE_LIMIT_GB"
        )


def stop_running(settings: Settings, report: ShowLine) -> bool:
    """End a stack that runs in the background, or what a killed keeper left; whether there was anything to end.

    Raises:
        BusyError: something goes on running, which it names.
        InstallError: the folder cannot be used.
    """
    if not settings.data_dir.exists():
        return False
    was_running = _end_keeper(settings)
    with lock.take(settings.data_dir):
        state = StackState.read(settings.data_dir)
        if not was_running or leftovers(settings, state):
            # What is to be ended needs no jars: where they could not be fetched, `down` has to work as well.
            stack = build(settings, fetch=False)
            state.adopt(stack.services)
            others = state.others(stack.services, settings.data_dir / "logs")
            was_running = was_running or bool(others) or any(service.alive() for service in stack.services)
            for service in others:  # a sink of another SINK, which is to end before the broker does
                service.stop()
            stack.stop(report)
            was_running = _end_strays(settings, report) or was_running
        if left := leftovers(settings, state):
            raise BusyError(
                f"still running, although everything was told to end: {', '.join(left)}: end them by hand, then "
                "`metrics-pipeline down` again"
            )
        StackState().write(settings.data_dir)
    return was_running


def leftovers(settings: Settings, state: StackState) -> list[str]:
    """What runs of the stack in this data folder, each as `NAME (pid N)`: what was written down, and what bears its mark."""
    found = {process.pid: part for process, part in marked(folder_id(settings))}
    for name, child in state.children.items():
        if (process := child.find()) is not None:
            found[process.pid] = name
    return [f"{name} (pid {pid})" for pid, name in sorted(found.items())]


def _end_keeper(settings: Settings) -> bool:
    """Let the keeper take everything down, and wait for its end; False when there is none.

    Raises:
        BusyError: it does not end in time.
    """
    written = StackState.read(settings.data_dir).keeper
    keeper = (written.find() if written else None) or _keeper_with_lock(settings)
    if keeper is None:
        return False
    try:
        keeper.send_signal(signal.SIGTERM)
        keeper.wait(timeout=KEEPER_SECONDS)
    except psutil.NoSuchProcess:
        pass
    except psutil.AccessDenied as error:
        raise BusyError(
            f"the keeper (pid {keeper.pid}) is another user's: run `metrics-pipeline down` as that user"
        ) from error
    except psutil.TimeoutExpired as error:
        raise BusyError(
            f"the keeper (pid {keeper.pid}) has not ended after {KEEPER_SECONDS:.0f} s and goes on running, with: "
            f"{', '.join(leftovers(settings, StackState.read(settings.data_dir))) or 'nothing else'}; "
            f"see {settings.data_dir / 'logs'}"
        ) from error
    return True


def _keeper_with_lock(settings: Settings) -> psutil.Process | None:
    """A keeper of which nothing is written down, or something wrong: it has the lock. Others have it for a moment, too."""
    holder = lock.holder(settings.data_dir)
    try:
        return holder if holder is not None and "up" in holder.cmdline() else None
    except psutil.Error:
        return None


def _end_strays(settings: Settings, report: ShowLine) -> bool:
    """End what bears the data folder's mark and belongs to no service that is known any more."""
    strays = list(marked(folder_id(settings)))
    for process, part in strays:
        report(f"{part} (pid {process.pid}) was left over: ending it")
        with suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs([process for process, _ in strays], timeout=STRAY_SECONDS)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=STRAY_SECONDS)
    return bool(strays)
