"""A producer run: one at a time, counted, answerable over HTTP, and with a report at the end whatever ends it.

All work is done in a thread of its own, and the caller's thread only waits. Signals reach the caller's thread alone, so
whatever they raise there, at whatever instruction, no delivery report is lost: the thread flushes, counts, writes the
ledger and closes the client before the caller's exception goes on its way.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import confluent_kafka

from metrics_pipeline.data_folder import folder_id
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.kafka import TopicWatch
from metrics_pipeline.producer.deliveries import Deliveries, Ranges, merged
from metrics_pipeline.producer.endpoints import HealthServer, ProducerMetrics, Snapshot
from metrics_pipeline.producer.generator import Generator
from metrics_pipeline.producer.guards import LagWatch, LogGuard, check_disk
from metrics_pipeline.producer.latency import LatencyProbe
from metrics_pipeline.producer.ledger import RunLedger, Source, State
from metrics_pipeline.producer.publisher import TICK_SECONDS, KafkaClient, Message, Publisher
from metrics_pipeline.settings import ProducerSettings, Settings
from metrics_pipeline.sinks import active

PROGRESS_SECONDS: Final = 1.0
LEDGER_SECONDS: Final = 30.0
"""How long the last write of the ledger may wait for a PostgreSQL that restarts."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """How a run ended. Every message taken from the source is acknowledged, failed or unknown.

    Attributes:
        run_id: names the run in the ledger.
        source: what the ledger calls it.
        state: finished, stopped on request, or failed.
        seconds: how long it took.
        acknowledged: messages in the topic.
        failed: messages that are certainly not there.
        unknown: messages that were sent but never answered.
        offsets: where the acknowledged ones are, by partition; upper ends excluded.
        first_error: the first one of a delivery, if there was any.
        ledger_problem: why the ledger does not hold these counts, if so.
    """

    run_id: UUID
    source: Source
    state: State
    seconds: float = 0.0
    acknowledged: int = 0
    failed: int = 0
    unknown: int = 0
    offsets: dict[int, Ranges] = field(default_factory=dict)
    first_error: str | None = None
    ledger_problem: str | None = None

    @property
    def clean(self) -> bool:
        """Whether everything was acknowledged and is written down: otherwise a command exits non-zero."""
        return not (self.failed or self.unknown or self.ledger_problem)

    def summary(self) -> str:
        """One line for people."""
        rate = self.acknowledged / self.seconds if self.seconds else 0.0
        return (
            f"run {self.run_id} {self.state} after {self.seconds:.1f} s: {self.acknowledged:,} acknowledged "
            f"({rate:,.0f}/s), {self.failed:,} failed, {self.unknown:,} unknown"
            + (f"; first error {self.first_error}" if self.first_error else "")
            + (f"; the ledger lacks these counts: {self.ledger_problem}" if self.ledger_problem else "")
        )


def steady_clock() -> Callable[[], datetime]:
    """A clock that goes on from now as time passes, whatever is done to the machine's clock meanwhile."""
    begun, start = datetime.now(UTC), time.monotonic()
    return lambda: begun + timedelta(seconds=time.monotonic() - start)


def simulated(settings: ProducerSettings, clock: Callable[[], datetime] | None = None) -> Iterator[list[Message]]:
    """Rounds of the simulated fleet without end; a round is empty when it is asked for too early.

    Args:
        settings: sizes and seed.
        clock: of the readings; by default one that no step of the machine's clock stops, or lets run ahead.
    """
    clock = clock or steady_clock()
    generator = Generator(settings, clock())
    while True:
        yield generator.round(clock())


class Producer:
    """One run: publishes what the source gives until the source ends, the time is up, or `stop` is set.

    A simulated run publishes a round every PRODUCER_PUBLISH_INTERVAL for PRODUCER_RUN_SECONDS, is the only one of its
    kind, and answers on PRODUCER_PORT. Any other, such as a replay, ends with its source.
    """

    def __init__(
        self,
        settings: Settings,
        source: Iterable[list[Message]] | None = None,
        *,
        kind: Source = "simulated",
        run_id: UUID | None = None,
        stop: threading.Event | None = None,
        on_progress: Callable[[Snapshot], None] | None = None,
        messages_per_second: float | None = None,
        lag: Callable[[], int] | None = None,
        topic: TopicWatch | None = None,
        serve: bool | None = None,
        make_client: Callable[[dict[str, Any]], KafkaClient] = confluent_kafka.Producer,
        ledger: RunLedger | None = None,
        probe: LatencyProbe | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is connected before `run`.

        Args:
            settings: everything that can be set.
            source: lists of keys and values; default: the simulated fleet.
            kind: what the ledger calls the source; a word of one's own will do.
            run_id: names the run; default: a new one.
            stop: set it to end the run. No signal handlers are installed.
            on_progress: called about every second in the thread that runs; what it raises ends the run.
            messages_per_second: bound for a run that is not simulated; default: as fast as it goes.
            lag: the sink's lag in records; default: no guard.
            topic: looks which log the topic's name stands for; default: the ledger does not say it.
            serve: whether to answer on PRODUCER_PORT; default: for simulated runs.
            make_client: makes the Kafka client; replaced by tests.
            ledger: replaced by tests.
            probe: replaced by tests.
            clock: monotonic, in seconds; that of the publisher and of the latencies, too.
        """
        simulation = kind == "simulated"
        self.stop = stop or threading.Event()
        self.run_id = run_id or uuid4()
        self.report = RunReport(self.run_id, kind, "failed")
        """How the run ended: complete once `run` returned or raised."""
        self._settings = settings
        self._kind: Source = kind
        self._clock = clock
        self._on_progress = on_progress
        metrics = ProducerMetrics(self.snapshot)
        self._probe = probe or LatencyProbe(settings, metrics.latency.observe, clock=clock)
        self._ledger = ledger or RunLedger(settings, self.run_id, kind, clock=clock)
        self._topic = LogGuard(topic) if topic else None
        self._lag = LagWatch(lag, settings.producer_max_lag) if lag else None
        self._server: HealthServer | None = None
        if simulation if serve is None else serve:
            stall = settings.producer_stall_seconds
            self._server = HealthServer(
                settings.producer_port,
                self.snapshot,
                metrics.registry,
                stall,
                settings.listen_host,
                folder_id(settings),
            )
        self._deliveries = Deliveries(self._probe.offer, clock)
        self._publisher = Publisher(
            settings,
            simulated(settings) if source is None else source,
            self._deliveries,
            make_client,
            stop=self._stops,
            watch=self._guard,
            paused=lambda: self._pause_reason() is not None,
            round_seconds=settings.producer_publish_interval / 1000 if simulation else 0.0,
            run_seconds=settings.producer_run_seconds if simulation else float("inf"),
            messages_per_second=messages_per_second,
            clock=clock,
        )
        self._begun = clock()
        self._worked = False
        self._ended: State | None = None
        self._interrupt: BaseException | None = None
        self._error: BaseException | None = None

    def run(self) -> RunReport:
        """Publish until the end, and say what became of every message.

        Raises:
            BusyError: another simulated producer runs, or PRODUCER_PORT is taken.
            ServiceError: PostgreSQL, the broker or the topic cannot be used.
            InstallError: the disk is nearly full.
            BaseException: whatever interrupts the wait, after the run was brought to its end.
        """
        worker = threading.Thread(target=self._work, name="producer")
        while True:
            # Plain assignments and sleeps only: an exception in the middle of a lock or a join would leave it broken.
            try:
                if not worker.ident:
                    _start_undisturbed(worker)
                self._wait()
                break
            except BaseException as error:  # raised again below
                self._interrupt = self._interrupt or error
        if self._interrupt is not None:
            raise self._interrupt
        if self._error is not None:
            raise self._error
        return self.report

    def _stops(self) -> bool:
        return self._interrupt is not None or self.stop.is_set()

    def _wait(self) -> None:
        next_progress = self._clock() + PROGRESS_SECONDS
        while not self._worked:
            time.sleep(TICK_SECONDS / 2)
            if self._on_progress and self._interrupt is None and self._clock() >= next_progress:
                next_progress = self._clock() + PROGRESS_SECONDS
                self._on_progress(self.snapshot())

    def snapshot(self) -> Snapshot:
        """The run at this moment; may be called from any thread."""
        counts = self._deliveries.tally().values()
        state = self._ended or self._publisher.state
        paused = self._pause_reason() if state == "running" else None
        return Snapshot(
            run_id=self.run_id,
            state="paused" if paused else state,
            seconds=self._clock() - self._begun,
            acknowledged=sum(count.acknowledged for count in counts),
            failed=sum(count.failed for count in counts),
            unknown=sum(count.unknown for count in counts),
            in_flight=self._deliveries.in_flight,
            acknowledged_per_second=self._publisher.acknowledged_per_second(),
            latency_seconds=self._probe.latency(),
            paused=paused,
            stalled_seconds=self._publisher.stalled_seconds(),
        )

    def _pause_reason(self) -> str | None:
        return self._lag.paused if self._lag else None

    def _guard(self) -> None:
        if self._ledger.usurped:
            raise self._ledger.usurped
        if self._topic:
            self._topic.check()
            self._ledger.log_id = self._topic.log_id
        check_disk(self._settings.data_dir, self._settings.disk_free_limit_gb)

    def _work(self) -> None:
        """The whole run, in the thread that no signal reaches."""
        try:
            self._run_to_its_end()
        finally:
            self._worked = True

    def _run_to_its_end(self) -> None:
        self._begun = self._clock()
        state: State = "failed"
        problem = None
        try:
            check_disk(self._settings.data_dir, self._settings.disk_free_limit_gb)
            if self._topic:
                self._topic.begin()
                self._ledger.log_id = self._topic.log_id
            self._ledger.open()
            with ExitStack() as services:
                for service in (self._server, self._probe, self._lag):
                    if service:
                        service.start()
                        services.callback(service.stop)
                self._ledger.start(self._deliveries.tally)
                try:
                    self._publisher.run()
                    state = "stopped" if self._stops() else "finished"
                except BaseException as error:  # raised again in the caller's thread
                    self._error = error
                if isinstance(self._interrupt, Exception):
                    state = "failed"
                problem = self._ledger.finish(self._deliveries.tally(), state, LEDGER_SECONDS)
        except BaseException as error:  # raised again in the caller's thread
            self._error = self._error or error
            self._ledger.close()
        counts = self._deliveries.tally()
        self.report = RunReport(
            run_id=self.run_id,
            source=self._kind,
            state=state,
            seconds=self._clock() - self._begun,
            acknowledged=sum(count.acknowledged for count in counts.values()),
            failed=sum(count.failed for count in counts.values()),
            unknown=sum(count.unknown for count in counts.values()),
            offsets={number: merged(count.ranges) for number, count in counts.items() if count.ranges},
            first_error=self._deliveries.first_error,
            ledger_problem=problem,
        )
        self._ended = state


def _start_undisturbed(thread: threading.Thread) -> None:
    """Start a thread with signals held back, since `Thread.start` waits on a lock; the thread keeps them blocked."""
    # Asked for first: a handler of a signal that came just before raises out of the call that blocks.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def run_producer(settings: Settings, source: Iterable[list[Message]] | None = None, **options: Any) -> RunReport:
    """Run a `Producer` to its end, guarded by the sink's lag; takes the same options.

    Raises:
        PipelineError: what ended the run, with the counts when there are any.
    """
    options.setdefault("lag", active.LagMeter(settings).total)
    if "topic" not in options:
        options["topic"] = TopicWatch.of(settings)
    producer = Producer(settings, source, **options)
    try:
        return producer.run()
    except PipelineError as error:
        report = producer.report
        if report.acknowledged or report.failed or report.unknown:
            error.args = (f"{error} ({report.summary()})",)
        raise
