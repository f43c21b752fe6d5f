"""The COPY sink on one machine: worker processes, run and restarted, and what they did, added up and served."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from metrics_pipeline.copy_sink.counts import LATENCY_BUCKETS, WorkerCounts, WorkerReport
from metrics_pipeline.copy_sink.progress import POSTGRES_STEPS, STALL_STEPS, Stall, stall_of
from metrics_pipeline.copy_sink.sessions import SessionWatch
from metrics_pipeline.data_folder import folder_id
from metrics_pipeline.settings import Settings
from metrics_pipeline.web import WebServer

if TYPE_CHECKING:  # numpy comes with it, which a worker prepares for
    from metrics_pipeline.copy_sink.store import Store

log = logging.getLogger(__name__)

REPORT_SECONDS: Final = 0.5
UNHEALTHY_SECONDS: Final = 15.0
"""How long a worker may be unable to write before `/health` says so."""
SUSPICIOUS_SECONDS: Final = 2.0
"""How long a worker may wait for PostgreSQL, or say nothing, before PostgreSQL is asked about it."""
START_SECONDS: Final = 30.0
"""How long a new worker may take until its first report, at least."""
LONGEST_PATIENCE: Final = 3600.0
"""How long a worker may be stuck before it is replaced, at most: each one that was replaced in vain doubles the time."""
END_SECONDS: Final = 40.0
"""How long the workers have to write what they hold, before they are killed: what is not written is delivered again."""
LOCK_TIMEOUT: Final = "55P03"
"""What PostgreSQL says of a lock that was waited for too long."""
HOST_LETTERS: Final = 16
"""How much of the machine's name is part of a worker's: PostgreSQL cuts names off after 63 bytes."""
STEADY_SECONDS: Final = 30.0
LONGEST_PAUSE: Final = 15.0


@dataclass
class Slot:
    """A worker's place, taken by one process after another.

    Attributes:
        name: of the worker.
        process: who has it now.
        pipe: where its reports come from; closed with us, which ends it.
        report: the last one.
        began: when the process did, by the monotonic clock.
        heard: when it reported last; when it began, before it has.
        failures: how many ended early, one after another.
        due: when the next may begin.
        stall: where it is stuck, if it is.
        problem: the same for people, with what PostgreSQL says and what is done about it.
        replaced: how many were replaced because they were stuck, one after another, without having stored anything.
    """

    name: str
    process: BaseProcess | None = None
    pipe: Connection | None = None
    report: WorkerReport = field(default_factory=WorkerReport)
    began: float = 0.0
    heard: float = 0.0
    failures: int = 0
    due: float = 0.0
    stall: Stall | None = None
    problem: str = ""
    replaced: int = 0

    @property
    def state(self) -> str:
        """What it reports, or that it is stuck."""
        return "stuck" if self.stall else self.report.state


class Supervisor:
    """Keeps `workers` processes running until `stop`.

    Args:
        settings: where everything is; the workers read the same environment themselves.
        workers: how many.
        new_store: makes what a worker stores with, instead of a `Store`.
    """

    def __init__(self, settings: Settings, workers: int, new_store: Callable[..., Store] | None = None) -> None:
        self._settings = settings
        self._new_store = new_store
        # One heap for all threads of a worker: with glibc's default each keeps what it once needed. Read when a process begins.
        os.environ.setdefault("MALLOC_ARENA_MAX", "2")
        # Spawned, not forked: librdkafka and libpq do not survive a fork.
        self._context = get_context("spawn")
        # In containers every supervisor may have the same pid; their sessions must not be taken for one another's.
        own = f"{socket.gethostname()[:HOST_LETTERS]}:{os.getpid()}"
        self._slots = [Slot(f"{own}/{number}") for number in range(1, workers + 1)]
        self._former = WorkerCounts()
        self._restarts = 0
        self._stalls: Counter[str] = Counter()
        self._sessions = SessionWatch(settings)
        self._lock = threading.Lock()
        registry = CollectorRegistry()
        registry.register(_Metrics(self))
        self._registry = registry
        self._server = WebServer(
            [Route("/health", self._health), Route("/status", self._status), Route("/metrics", self._metrics)],
            settings.sink_port,
            "SINK_PORT",
            settings.listen_host,
            folder_id(settings),
        )

    @property
    def port(self) -> int:
        """Where `/health` listens."""
        return self._server.port

    def run(self, stop: threading.Event) -> bool:
        """Run until `stop`, then let the workers write what they hold.

        Returns:
            Whether all of them ended by themselves in time.

        Raises:
            BusyError: the port is taken.
        """
        self._server.start()
        try:
            while not stop.is_set():
                for slot in self._slots:
                    self._look_after(slot)
                stop.wait(0.1)
            return self._end()
        finally:
            self._server.stop()

    def report(self) -> tuple[WorkerCounts, list[Slot]]:
        """Totals of all workers there ever were, and the present ones."""
        total = WorkerCounts()
        with self._lock:
            total.add(self._former)
            for slot in self._slots:
                total.add(slot.report.counts)
            return total, list(self._slots)

    @property
    def restarts(self) -> int:
        """How often a worker that ended unasked was replaced."""
        return self._restarts

    @property
    def stalls(self) -> Counter[str]:
        """How often a worker was stuck, by where."""
        return Counter(self._stalls)

    def _look_after(self, slot: Slot) -> None:
        if slot.process is None:
            if not self._sessions.ended(slot.name):
                # Its successor would wait for what it left locked, and be taken for it.
                self._sessions.ask([slot.name])
            elif time.monotonic() >= slot.due:
                self._begin(slot)
            return
        self._hear(slot)
        if slot.process.is_alive():
            self._examine(slot)
            return
        self._hear(slot)
        log.warning("worker %s ended (exit code %s): replacing it", slot.name, slot.process.exitcode)
        now = time.monotonic()
        slot.failures = slot.failures + 1 if now - slot.began < STEADY_SECONDS else 1
        slot.due = now + min(0.1 * 2.0 ** (slot.failures - 1), LONGEST_PAUSE)
        self._restarts += 1
        self._retire(slot)

    def _examine(self, slot: Slot) -> None:
        """Find out whether a worker is stuck, name it, and replace it where that can help."""
        report, limit = slot.report, float(self._settings.sink_stall_seconds)
        silent = time.monotonic() - slot.heard
        if slot.heard == slot.began:
            limit = max(limit, START_SECONDS)
        stall = stall_of(report.moment, limit, silent, waiting=report.state != "running")
        writer = report.moment.writer
        asking = writer.seconds if writer.name in POSTGRES_STEPS else 0.0
        if stall or max(silent, report.waiting_seconds, asking) > SUSPICIOUS_SECONDS:
            self._sessions.ask([one.name for one in self._slots])
        if stall is None:
            if slot.stall:
                log.warning("worker %s goes on", slot.name)
            slot.stall, slot.problem = None, ""
            return
        if slot.stall is None:
            self._stalls[stall.step] += 1
        keeps, what_next = self._keeps(slot, stall, limit)
        problem = f"worker {slot.name} {stall}{what_next}"
        if slot.stall is None or not keeps:
            log.error("%s", problem)
        slot.stall, slot.problem = stall, problem
        if not keeps and slot.process is not None:
            slot.process.kill()
            slot.replaced += 1
            self._sessions.end(slot.name)

    def _keeps(self, slot: Slot, stall: Stall, limit: float) -> tuple[bool, str]:
        """Whether a stuck worker is left alone for now, and what is to be said of it."""
        session = self._sessions.seen(slot.name, reader=stall.step == slot.report.moment.reader.name)
        said = f": {session}" if session is not None and (stall.silent or stall.step in POSTGRES_STEPS) else ""
        if not stall.silent and stall.step in POSTGRES_STEPS:
            away = self._sessions.problem(2 * SUSPICIOUS_SECONDS)
            if away is not None:
                return True, f": PostgreSQL does not answer either ({away})" if away else ""
            if session is not None and session.holders:
                return True, said
        patience = min(limit * 2.0**slot.replaced, LONGEST_PATIENCE)
        if stall.seconds < patience:
            return True, f"{said}; it is replaced after {patience:.0f} s"
        return False, f"{said}: replacing it, and ending its sessions"

    def _begin(self, slot: Slot) -> None:
        ours, theirs = self._context.Pipe()
        slot.process = self._context.Process(
            target=work,
            args=(slot.name, theirs, *filter(None, [self._new_store])),
            name=f"sink {slot.name}",
            daemon=True,
        )
        slot.process.start()
        theirs.close()
        slot.pipe, slot.began = ours, time.monotonic()
        slot.heard = slot.began

    def _hear(self, slot: Slot) -> None:
        with suppress(EOFError, OSError):
            while slot.pipe is not None and slot.pipe.poll():
                report = slot.pipe.recv()
                slot.heard = time.monotonic()
                with self._lock:
                    slot.report = report
                if report.counts.batches:
                    slot.replaced = 0

    def _retire(self, slot: Slot) -> None:
        with self._lock:
            self._former.add(slot.report.counts)
            slot.report = WorkerReport()
        slot.stall, slot.problem = None, ""
        if slot.pipe is not None:
            slot.pipe.close()
        slot.process = slot.pipe = None

    def _end(self) -> bool:
        deadline = time.monotonic() + END_SECONDS
        for slot in self._slots:
            if slot.pipe is not None:
                with suppress(OSError):
                    slot.pipe.send("stop")
        clean = True
        for slot in self._slots:
            if slot.process is None:
                continue
            while slot.process.is_alive() and time.monotonic() < deadline:
                self._hear(slot)
                slot.process.join(0.1)
            self._hear(slot)
            if slot.process.is_alive():
                clean = False
                slot.process.kill()
                slot.process.join()
            clean = clean and slot.process.exitcode == 0
            self._retire(slot)
        return clean

    def _problem(self) -> str | None:
        patience = min(UNHEALTHY_SECONDS, self._settings.sink_stall_seconds)
        for slot in self.report()[1]:
            if slot.problem:
                return slot.problem
            if slot.report.waiting_seconds > patience:
                waits = f"worker {slot.name} cannot go on for {slot.report.waiting_seconds:.0f} s: {slot.report.reason}"
                blocked = self._sessions.blocked(slot.name) if LOCK_TIMEOUT in slot.report.reason else None
                return f"{waits}: {blocked}" if blocked is not None else waits
            if slot.failures > 3:
                return f"worker {slot.name} ended {slot.failures} times in a row"
            if not self._sessions.ended(slot.name):
                return (
                    f"worker {slot.name} was stuck and is gone; PostgreSQL does not answer yet that its sessions are ended, "
                    f"and then it is replaced: {self._sessions.problem(SUSPICIOUS_SECONDS) or 'it is asked'}"
                )
        return None

    async def _health(self, _: Request) -> Response:
        problem = self._problem()
        states = sorted({slot.state for slot in self._slots})
        answer = {"healthy": problem is None, "state": ", ".join(states), "reason": problem}
        return JSONResponse(answer, status_code=200 if problem is None else 503)

    async def _status(self, _: Request) -> Response:
        total, slots = self.report()
        return JSONResponse(
            {
                "workers": [
                    {
                        "name": slot.name,
                        "pid": slot.process.pid if slot.process else None,
                        **slot.report.as_json(),
                        "state": slot.state,
                        "problem": slot.problem or None,
                    }
                    for slot in slots
                ],
                "polled": total.polled,
                "rows": total.rows,
                "rejected": dict(total.rejected),
                "tombstones": total.tombstones,
                "batches": dict(total.batches),
                "fenced": total.fenced,
                "retries": dict(total.retries),
                "lag": sum(sum(slot.report.lag.values()) for slot in slots),
                "restarts": self._restarts,
                "stalls": dict(self._stalls),
            }
        )

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class _Metrics(Collector):
    """Everything is asked of the supervisor when Prometheus comes."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterable[Metric]:
        total, slots = self._supervisor.report()
        # Each step from the start: a counter that appears with its first event shows no increase then.
        stalls = Counter(dict.fromkeys(STALL_STEPS, 0) | self._supervisor.stalls)
        yield from _counters(total, self._supervisor.restarts, stalls)
        lag = GaugeMetricFamily(
            "metrics_sink_lag", "Records between a worker and the end of its partitions", labels=["partition"]
        )
        for slot in slots:
            for partition, records in slot.report.lag.items():
                lag.add_metric([str(partition)], records)
        yield lag
        workers = GaugeMetricFamily("metrics_sink_workers", "Workers by state", labels=["state"])
        states = [slot.state for slot in slots]
        for state in sorted(set(states)):
            workers.add_metric([state], states.count(state))
        yield workers


def _counters(total: WorkerCounts, restarts: int, stalls: Counter[str]) -> Iterator[Metric]:
    for name, text, value in (
        ("polled", "Messages consumed, those delivered again included", total.polled),
        ("rows", "Readings stored", total.rows),
        ("tombstones", "Messages without a value, skipped", total.tombstones),
        ("fenced", "Batches given up because somebody else had written the partition", total.fenced),
        ("lost_to_retention", "Records deleted from the topic before they were stored", total.lost_to_retention),
        ("restarts", "Workers that ended unasked and were replaced", restarts),
    ):
        yield CounterMetricFamily(f"metrics_sink_{name}", text, value=value)
    for name, label, text, counter in (
        ("rejected", "reason", "Records rejected", total.rejected),
        ("batches", "path", "Transactions committed", total.batches),
        ("retries", "reason", "Attempts that failed", total.retries),
        ("stalls", "step", "Workers that were stuck, by where", stalls),
    ):
        family = CounterMetricFamily(f"metrics_sink_{name}", text, labels=[label])
        for key, value in sorted(counter.items()):
            family.add_metric([key], value)
        yield family
    buckets, running = [], 0
    for bound, count in zip([*map(str, LATENCY_BUCKETS), "+Inf"], total.latency, strict=True):
        running += count
        buckets.append((bound, running))
    yield HistogramMetricFamily(
        "metrics_sink_latency_seconds",
        "The broker's timestamp of sampled records to their COMMIT",
        buckets=buckets,
        sum_value=total.latency_sum,
    )


def work(name: str, pipe: Connection, new_store: Callable[..., Store] | None = None) -> None:
    """The body of a worker process: ends when told to, on SIGTERM, or when the supervisor is gone."""
    # The supervisor decides what a Ctrl-C means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        level=os.environ.get("LOG_LEVEL", "WARNING"), format=f"%(asctime)s %(levelname)s sink {name}: %(message)s"
    )
    logging.getLogger("metrics_pipeline.librdkafka").setLevel(logging.CRITICAL)
    # Before numpy is there: its matrices are small, and threads of its own would only take turns with ours.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # The writer needs the interpreter often and briefly; by default it would wait 5 ms for the reader each time.
    sys.setswitchinterval(0.0005)
    from metrics_pipeline.copy_sink.worker import CopyWorker

    # What is loaded by now stays; messages by the thousand would have the collector look at it again and again.
    gc.freeze()
    worker = CopyWorker(Settings.load(), name, new_store) if new_store else CopyWorker(Settings.load(), name)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    ended = threading.Event()

    def talk() -> None:
        with suppress(EOFError, OSError):
            while not ended.wait(REPORT_SECONDS):
                with suppress(RuntimeError):  # a counter grew meanwhile: half a second later it will not
                    pipe.send(worker.current())
                if pipe.poll():
                    pipe.recv()
                    break
        worker.stop()

    talker = threading.Thread(target=talk, name="reports", daemon=True)
    talker.start()
    worker.run()
    ended.set()
    talker.join(2)
    with suppress(OSError):
        pipe.send(worker.current())
