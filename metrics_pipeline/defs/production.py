"""The producer as a job of bounded length, the sensor that launches it again, and the sensor that repairs the sink."""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Optional
from uuid import UUID

import dagster as dg
from pydantic import Field, create_model

from metrics_pipeline import kafka
from metrics_pipeline.defs.provisioning import metrics_sink_connector, metrics_topic, not_provisioned
from metrics_pipeline.defs.resources import Pipeline, active_runs, plain_errors
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.producer import guards, ledger
from metrics_pipeline.producer.endpoints import Snapshot
from metrics_pipeline.producer.run import Producer, RunReport
from metrics_pipeline.settings import ProducerSettings, Settings
from metrics_pipeline.sinks import active, repair

OBSERVE_SECONDS: Final = 10.0
STORAGE_SECONDS: Final = 60.0
"""How long a run that is over waits for Dagster's storage: one that cannot write its end stays STARTED for ever."""
SPARE_SECONDS: Final = 60.0
"""What a run may take beyond its length, its flush and the wait for the storage before it is ended from outside."""
GONE_SECONDS: Final = 60.0
"""A run that is STARTED and has not held the producer's lock for this long has lost its process."""
TICK_SECONDS: Final = 30.0
"""What a tick of the sensor counts for at most: the clock between two of them may have been set."""
CLOCK_SECONDS: Final = 5.0
"""By how much two clocks may differ before one of them is said to have been set."""
FIRST_PAUSE_SECONDS: Final = 5.0
LONGEST_PAUSE_SECONDS: Final = 60.0

log = logging.getLogger(__name__)


def _config_fields() -> dict[str, Any]:
    """The producer's settings, each optional. A choice becomes text here: the settings refuse what is none of it."""
    fields: dict[str, Any] = {}
    for name, field in ProducerSettings.model_fields.items():
        kind = field.annotation if field.annotation in (int, float) else str
        fields[name] = (Optional[kind], Field(None, description=field.description))  # noqa: UP045  # not for a variable
    return fields


ProducerConfig: Any = create_model("ProducerConfig", __base__=dg.Config, **_config_fields())
ProducerConfig.__doc__ = "The producer's settings for one run; what is not given comes from the environment."


@dg.op
def publish(context: dg.OpExecutionContext, config: ProducerConfig, pipeline: Pipeline) -> None:
    """Publish simulated readings for PRODUCER_RUN_SECONDS, observing the topic as it goes."""
    given = {name: value for name, value in config.model_dump().items() if value is not None}
    # The run's end is written by Dagster after this body: only then may an error be shown as one line.
    with plain_errors(), storage_at_the_end(context):
        settings = pipeline.load(**given)
        watch = Watch(context, settings)
        producer = Producer(
            settings,
            run_id=UUID(context.run_id),
            on_progress=watch.progress,
            lag=active.LagMeter(settings).total,
            topic=kafka.TopicWatch.of(settings),
        )
        try:
            report = producer.run()
        finally:
            # Complete also when a termination is on its way through here.
            watch.end(producer.report)
        if not report.clean:
            raise dg.Failure(report.summary(), allow_retries=False)


class Watch:
    """Observations of a run. Dagster's storage may be away at any time: then they are dropped, and the run goes on."""

    def __init__(self, context: dg.OpExecutionContext, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        self._observed = time.monotonic()
        self._meter = active.LagMeter(settings)
        self._limit = settings.producer_run_seconds + settings.producer_flush_seconds + STORAGE_SECONDS + SPARE_SECONDS
        self._begun = time.time() - time.monotonic()
        self._shift = 0.0
        self._bound()

    def _bound(self) -> None:
        """Tell Dagster how long the run may take. It goes by the machine's clock: when that is set, so is the bound."""
        limit = max(1, int(self._limit + self._shift))
        with storage_may_be_away():
            self._context.instance.add_run_tags(self._context.run_id, {dg.MAX_RUNTIME_SECONDS_TAG: str(limit)})

    def progress(self, snapshot: Snapshot) -> None:
        """Observe the topic when it is time to.

        Raises:
            DagsterExecutionInterruptedError: see `end_when_cancelled`.
        """
        shift = time.time() - time.monotonic() - self._begun
        if abs(shift - self._shift) > CLOCK_SECONDS:
            self._shift = shift
            self._bound()
        if time.monotonic() - self._observed < OBSERVE_SECONDS:
            return
        self._observed = time.monotonic()
        self._observe(
            {
                "state": snapshot.state,
                "acknowledged": snapshot.acknowledged,
                "acknowledged_per_second": float(snapshot.acknowledged_per_second),
                "failed": snapshot.failed,
                "unknown": snapshot.unknown,
                "latency_p50_seconds": snapshot.latency_seconds.p50,
                "latency_p99_seconds": snapshot.latency_seconds.p99,
                "lag": self._lag(),
                "paused": snapshot.paused,
            }
        )
        end_when_cancelled(self._context)

    def end(self, report: RunReport) -> None:
        """Observe how the run ended, unless it published nothing."""
        if not report.acknowledged + report.failed + report.unknown:
            return
        rate = report.acknowledged / report.seconds if report.seconds else 0.0
        self._observe(
            {
                "state": report.state,
                "acknowledged": report.acknowledged,
                "acknowledged_per_second": rate,
                "failed": report.failed,
                "unknown": report.unknown,
                "ledger_problem": report.ledger_problem,
            }
        )
        with storage_may_be_away():
            self._context.log.info(report.summary())

    def _observe(self, figures: dict[str, Any]) -> None:
        known = {name: value for name, value in figures.items() if value is not None}
        with storage_may_be_away():
            self._context.log_event(dg.AssetObservation(metrics_topic.key, metadata=known))

    def _lag(self) -> int | None:
        try:
            return self._meter.total()
        except PipelineError:
            return None


def end_when_cancelled(context: dg.OpExecutionContext) -> None:
    """Look at the run's state.

    Raises:
        DagsterExecutionInterruptedError: the run is to be cancelled, and no signal told so.
    """
    with storage_may_be_away():
        run = context.instance.get_run_by_id(context.run_id)
        if run is not None and run.status == dg.DagsterRunStatus.CANCELING:
            # A run that the command line started has no code server that could send it a signal.
            raise dg.DagsterExecutionInterruptedError


@contextmanager
def storage_may_be_away() -> Iterator[None]:
    """Dagster keeps its events in the PostgreSQL that the pipeline has to survive the restart of."""
    try:
        yield
    except Exception as error:  # whatever the storage raises; a termination is no Exception
        log.warning("Dagster's storage: %s", error)


@contextmanager
def storage_at_the_end(context: dg.OpExecutionContext) -> Iterator[None]:
    """Go on, however the body ended, only when Dagster's storage takes the run's end, or STORAGE_SECONDS later."""
    try:
        yield
    finally:
        deadline = time.monotonic() + STORAGE_SECONDS
        while time.monotonic() < deadline:
            try:
                context.instance.get_run_by_id(context.run_id)
            except Exception as error:  # as above
                log.warning("waiting for Dagster's storage: %s", error)
                time.sleep(1)
            else:
                break


@dg.job(executor_def=dg.in_process_executor)
def produce_metrics() -> None:
    """Simulated readings into the topic for PRODUCER_RUN_SECONDS; one at a time, however it is started."""
    # Never with a retry policy: Dagster would answer a termination with a retry.
    publish()


# By name: bound to the job itself, Dagster 1.13 warns of a beta parameter that nobody passed.
@dg.sensor(job_name="produce_metrics", minimum_interval_seconds=5, default_status=dg.DefaultSensorStatus.RUNNING)
def producer_sensor(context: dg.SensorEvaluationContext, pipeline: Pipeline) -> dg.SensorResult:
    """Launch the producer when the pipeline is provisioned and the sink runs, and again when it ended."""
    try:
        settings = pipeline.load()
        lock = ledger.holder(settings)
        if running := active_runs(context.instance, produce_metrics.name):
            return _while_active(context, running[0], lock)
        reason = _not_now(context.instance, settings, lock)
    except PipelineError as error:
        reason = str(error)
    return dg.SensorResult(run_requests=[] if reason else [dg.RunRequest()], skip_reason=reason, cursor="")


def _not_now(instance: dg.DagsterInstance, settings: Settings, lock: ledger.Holder | None) -> str | None:
    """Why no producer should start now, or None."""
    if lock is not None:
        return f"a producer that Dagster did not start is running ({lock.name})"
    if reason := not_provisioned(instance):
        return reason
    guards.check_disk(settings.data_dir, settings.disk_free_limit_gb)
    if problem := active.sink_problem(settings):
        return problem
    wait = pause_after_failures(instance, produce_metrics.name, time.time())
    return f"the last runs failed: next one in {wait:.0f} s" if wait > 0 else None


def _while_active(
    context: dg.SensorEvaluationContext, record: dg.RunRecord, lock: ledger.Holder | None
) -> dg.SensorResult:
    """Wait for the run, unless its process is gone: then nothing else would ever end it before its time limit."""
    run = record.dagster_run
    if run.status != dg.DagsterRunStatus.STARTED or (lock is not None and run.run_id in lock.name):
        return dg.SensorResult(skip_reason=f"run {run.run_id[:8]} is {run.status.value}", cursor="")
    seen = json.loads(context.cursor or "{}")
    now, gone = time.time(), 0.0
    if seen.get("run") == run.run_id:
        # From tick to tick, and none for longer than it can have taken.
        gone = seen.get("gone", 0.0) + min(max(now - seen.get("at", now), 0.0), TICK_SECONDS)
    if gone < GONE_SECONDS:
        cursor = json.dumps({"run": run.run_id, "gone": gone, "at": now})
        return dg.SensorResult(skip_reason=f"run {run.run_id[:8]} does not hold the producer's lock", cursor=cursor)
    reason = f"its process is gone: it has not held the producer's lock for {GONE_SECONDS:.0f} s"
    context.instance.report_run_failed(run, reason)
    return dg.SensorResult(skip_reason=f"run {run.run_id[:8]}: {reason}", cursor="")


def pause_after_failures(instance: dg.DagsterInstance, job: str, now: float) -> float:
    """Seconds still to wait: a run that cannot work should not be started every five seconds."""
    pause = 0.0
    records = instance.get_run_records(dg.RunsFilter(job_name=job), limit=5)
    for record in records:
        if record.dagster_run.status != dg.DagsterRunStatus.FAILURE:
            break
        pause = min(LONGEST_PAUSE_SECONDS, max(FIRST_PAUSE_SECONDS, 2 * pause))
    ended = (records[0].end_time or 0.0) if records else 0.0
    # A newest end in the future is from before the clock was set back: it says nothing, and the next one will.
    return 0.0 if ended - now > CLOCK_SECONDS else ended + pause - now


@dg.sensor(minimum_interval_seconds=5, default_status=dg.DefaultSensorStatus.RUNNING)
def sink_repair_sensor(context: dg.SensorEvaluationContext, pipeline: Pipeline) -> dg.SensorResult:
    """Restart what failed in Kafka Connect, with back-off; take the records that it cannot pass; say when neither helps. The COPY sink heals itself."""
    try:
        settings = pipeline.load()
        sink = repair.SinkRepair(settings, context.cursor)
        outcome = sink.tick()
        repair.record(settings, outcome.events, "sensor")
    except (PipelineError, OSError) as error:
        return dg.SensorResult(skip_reason=str(error))
    observations = [
        dg.AssetObservation(
            metrics_sink_connector.key,
            description=event.reason,
            metadata={
                "action": event.action,
                "attempt": event.attempt,
                "reason": event.reason,
                **({"stretches": dg.MetadataValue.json(event.document()["stretches"])} if event.stretches else {}),
            },
        )
        for event in outcome.events
    ]
    return dg.SensorResult(skip_reason=outcome.message, cursor=sink.dump(), asset_events=observations)


def producing(instance: dg.DagsterInstance, settings: Settings) -> float | None:
    """Seconds since a producer, however started, was meant to run; None when none is.

    For ever when it seems to begin in the future: the clock was set back, and nothing may be excused by a start just now.
    """
    begun = [record.start_time for record in active_runs(instance, produce_metrics.name) if record.start_time]
    if lock := ledger.holder(settings):
        begun.append(lock.since.timestamp())
    if not begun:
        return None
    age = time.time() - min(begun)
    return math.inf if age < -CLOCK_SECONDS else max(age, 0.0)


DEFINITIONS = dg.Definitions(jobs=[produce_metrics], sensors=[producer_sensor, sink_repair_sensor])
