"""The pipeline as Prometheus sees it: PostgreSQL, lag, table sizes, Dagster's runs, and whether each part is well.

Each scrape asks the parts side by side, or takes what the last one was told when that is fresh. A part that does not answer
costs its own figures only: `metrics_pipeline_up` is 0 for it, and the scrape succeeds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import psycopg
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from metrics_pipeline import kafka, postgres, summaries
from metrics_pipeline.data_folder import folder_id
from metrics_pipeline.errors import PipelineError, ServiceError
from metrics_pipeline.settings import CONNECTOR_GROUP, COPY_GROUP, TOPIC, Settings
from metrics_pipeline.sinks import active, connector
from metrics_pipeline.sinks.watch import ProgressWatch
from metrics_pipeline.watcher.state import read_state
from metrics_pipeline.web import WebServer

FRESH_SECONDS: Final = 5.0
"""How long an answer serves further scrapes."""
ANSWER_SECONDS: Final = 6.0
"""How long a scrape waits for the parts: Prometheus itself gives up after ten seconds by default."""
CONNECT_SECONDS: Final = 3
HANG_UP_SECONDS: Final = 30.0
"""How long PostgreSQL may take for its figures until it is asked on a new line."""
METADATA_SECONDS: Final = 3.0
PRODUCER_SECONDS: Final = 30
"""A producer whose run reported within this time is up; between two runs it is silent for a few seconds."""
DAEMON_SECONDS: Final = 120.0
"""Dagster's daemons give a sign of life every 30 s."""

CLOCK_SECONDS: Final = 5.0
"""A sign of life from further ahead is none: the clock was set back since."""

TASK_STATES: Final = ("RUNNING", "UNASSIGNED", "PAUSED", "FAILED", "RESTARTING", "STOPPED")

log = logging.getLogger(__name__)


class NotUsedError(Exception):
    """The part has no job as things are, so that it is neither up nor down."""


class PipelineMetrics(Collector):
    """Asks every part when Prometheus does.

    Args:
        settings: where the parts are.
        fresh_seconds: how long an answer serves further scrapes.
        answer_seconds: how long a part may take; what comes later serves the next scrape.
    """

    def __init__(
        self, settings: Settings, fresh_seconds: float = FRESH_SECONDS, answer_seconds: float = ANSWER_SECONDS
    ) -> None:
        self.registry = CollectorRegistry()
        self._fresh_seconds = fresh_seconds
        self._answer_seconds = answer_seconds
        self._lock = threading.Lock()
        self._parts: dict[str, Callable[[], list[Metric]]] = {
            "postgres": DatabaseSource(settings),
            "producer": ProducerSource(settings),
            "broker": BrokerSource(settings),
            "connect": ConnectSource(settings),
            "sink": SinkSource(settings),
            "watcher": WatcherSource(settings),
            "dagster": DagsterSource(settings),
        }
        self._pool = ThreadPoolExecutor(max_workers=len(self._parts), thread_name_prefix="exporter")
        self._asked: dict[str, Future[list[Metric]]] = {}
        self._problems: dict[str, str] = {}
        self._last: list[Metric] = []
        self._until = 0.0
        self.registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask the parts."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The figures of this moment, or of a few seconds ago."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._last = self._ask()
                self._until = time.monotonic() + self._fresh_seconds
            return self._last

    def problems(self) -> dict[str, str]:
        """Why a part was down when it was last asked, by part."""
        return dict(self._problems)

    def close(self) -> None:
        """Ask no more; a part that still owes an answer is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for part in self._parts.values():
            if isinstance(part, _Reader):
                part.close()

    def _ask(self) -> list[Metric]:
        for name, part in self._parts.items():
            if name not in self._asked:
                self._asked[name] = self._pool.submit(part)
        wait(self._asked.values(), timeout=self._answer_seconds)
        up = GaugeMetricFamily(
            "metrics_pipeline_up", "1 for a part that does its work, 0 for one that does not", labels=["part"]
        )
        metrics: list[Metric] = [up]
        for name in self._parts:
            if not self._asked[name].done():
                self._note(name, f"no answer within {self._answer_seconds:g} s")
                up.add_metric([name], 0)
                continue
            try:
                metrics += self._asked.pop(name).result()
            except NotUsedError:
                self._note(name, None)
                continue
            except (PipelineError, psycopg.Error, KafkaException) as error:
                self._note(name, " ".join(str(error).split()) or type(error).__name__)
                up.add_metric([name], 0)
                continue
            except Exception as error:  # a scrape must not fail for one part's surprise
                log.exception("%s could not be asked", name)
                self._note(name, f"{type(error).__name__}: {error}")
                up.add_metric([name], 0)
                continue
            self._note(name, None)
            up.add_metric([name], 1)
        return metrics

    def _note(self, name: str, problem: str | None) -> None:
        former = self._problems.pop(name, None)
        if problem is not None:
            self._problems[name] = problem
        if (former is None) != (problem is None):
            log.warning("%s is %s", name, "healthy again" if problem is None else f"down: {problem}")


class _Reader:
    """Asks with a session of the read-only role, which is opened again after an error."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection: postgres.Connection | None = None

    def close(self) -> None:
        """End the session."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __call__(self) -> list[Metric]:
        """Ask PostgreSQL."""
        if self._connection is None or self._connection.closed:
            self._connection = postgres.connect(
                self._settings,
                "metrics_reader",
                autocommit=True,
                connect_timeout=CONNECT_SECONDS,
                application_name="metrics-pipeline exporter",
            )
        try:
            with postgres.impatient(self._connection, HANG_UP_SECONDS):
                return self._figures(self._connection)
        except psycopg.Error:
            self.close()
            raise

    def _figures(self, connection: postgres.Connection) -> list[Metric]:
        raise NotImplementedError


class DatabaseSource(_Reader):
    """PostgreSQL's own counters, the sizes of our tables, and how many readings there are."""

    def _figures(self, connection: postgres.Connection) -> list[Metric]:
        counted = connection.execute(postgres.query("exporter_postgres")).fetchone()
        assert counted is not None  # noqa: S101  # each of the views has a row
        commits, inserted, updated, deadlocks, wal, timed, requested, sessions = counted
        metrics: list[Metric] = [
            CounterMetricFamily(f"metrics_pipeline_postgres_{name}", text, value=value)
            for name, text, value in (
                ("xact_commit", "Transactions committed in the database of the readings", commits),
                ("tup_inserted", "Rows inserted in the database of the readings", inserted),
                ("tup_updated", "Rows updated in the database of the readings", updated),
                ("deadlocks", "Deadlocks in the database of the readings", deadlocks),
                ("wal_bytes", "Bytes of WAL written by the whole server", wal),
            )
        ]
        checkpoints = CounterMetricFamily(
            "metrics_pipeline_postgres_checkpoints", "Checkpoints, by what began them", labels=["kind"]
        )
        checkpoints.add_metric(["timed"], timed)
        checkpoints.add_metric(["requested"], requested)
        metrics.append(checkpoints)
        metrics.append(
            GaugeMetricFamily("metrics_pipeline_postgres_connections", "Sessions of all databases", sessions)
        )
        sizes = GaugeMetricFamily("metrics_pipeline_table_bytes", "Size on disk", labels=["table", "kind"])
        for table, heap, index in connection.execute(postgres.query("exporter_tables")):
            sizes.add_metric([table, "heap"], heap)
            sizes.add_metric([table, "index"], index)
        metrics.append(sizes)
        try:
            waiting = (connection.execute(postgres.query("exporter_rejected")).fetchone() or (0,))[0]
            rows = summaries.row_count(connection)
        except psycopg.errors.UndefinedTable:
            return metrics  # the server is well; `provision` has not run yet
        metrics.append(GaugeMetricFamily("metrics_pipeline_rows", "Readings stored", rows))
        metrics.append(
            GaugeMetricFamily("metrics_pipeline_rejected_rows", "Rejected records not published again yet", waiting)
        )
        return metrics


class ProducerSource(_Reader):
    """Whether a producer reports to its ledger. Its own figures are on its own port, while it runs."""

    def _figures(self, connection: postgres.Connection) -> list[Metric]:
        row = connection.execute(postgres.query("exporter_producer"), {"seconds": PRODUCER_SECONDS}).fetchone()
        if row != (True,):
            raise ServiceError(f"no producer's run has reported for {PRODUCER_SECONDS} s")
        return []


class _Placed:
    """Something that depends on which sink is active; the last answer stands while PostgreSQL is away."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._place = active.Position()

    def _position(self) -> active.Position:
        try:
            self._place = active.position(self._settings)
        except ServiceError as error:
            log.debug("which sink is active is not known: %s", error)
        return self._place


class BrokerSource(_Placed):
    """The brokers there are, replicas that do not keep up, and the records that the active sink has still to store."""

    def __call__(self) -> list[Metric]:
        """Ask the broker."""
        admin = AdminClient(kafka.client_config(self._settings))
        metadata = admin.list_topics(timeout=METADATA_SECONDS)
        partitions = [partition for topic in metadata.topics.values() for partition in topic.partitions.values()]
        behind = sum(len(partition.isrs) < len(partition.replicas) for partition in partitions)
        metrics: list[Metric] = [
            GaugeMetricFamily("metrics_pipeline_brokers", "Brokers in the cluster", len(metadata.brokers)),
            GaugeMetricFamily(
                "metrics_pipeline_partitions_under_replicated", "Partitions with a replica that is not in sync", behind
            ),
        ]
        place = self._position()
        try:
            lag = active.lag_at(self._settings, place)
        except ServiceError as error:
            log.debug("no lag: %s", error)  # no topic yet, or its leader is being elected
            return metrics
        group = COPY_GROUP if place.active == "copy" else CONNECTOR_GROUP
        family = GaugeMetricFamily(
            "metrics_pipeline_lag", "Records that the active sink has still to store", labels=["group", "partition"]
        )
        for partition, records in lag.per_partition.items():
            family.add_metric([group, str(partition)], records)
        return [*metrics, family]


class ConnectSource(_Placed):
    """The connector's tasks, as long as it is the active sink."""

    def __call__(self) -> list[Metric]:
        """Ask Connect."""
        if self._position().active != "connect":
            raise NotUsedError
        family = GaugeMetricFamily(
            "metrics_pipeline_sink_task", "1 for the state that the connector's task is in", labels=["task", "state"]
        )
        for task in connector.sink_state(self._settings).tasks:
            for state in sorted({*TASK_STATES, task.state}):
                family.add_metric([str(task.id), state], int(task.state == state))
        return [family]


class SinkSource:
    """Whether the active sink stores readings, whichever it is, and gets ahead from scrape to scrape."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._watch = ProgressWatch(settings)

    def __call__(self) -> list[Metric]:
        """Ask PostgreSQL, the broker and, if it is the one, Connect."""
        if (problem := active.sink_problem(self._settings) or self._watch.problem()) is not None:
            raise ServiceError(problem)
        return []


class WatcherSource(_Reader):
    """Whether the watcher does its work, while Kafka Connect is the active sink."""

    def _figures(self, connection: postgres.Connection) -> list[Metric]:
        if not self._settings.sink_watch:
            raise NotUsedError
        try:
            row = connection.execute(postgres.query("watcher_sink"), {"topic": TOPIC}).fetchone()
            state = read_state(connection)
        except psycopg.errors.UndefinedTable:
            raise NotUsedError from None  # `provision` has not run yet
        if row is None or row[0] != "connect":
            raise NotUsedError
        if (problem := state.problem) is not None:
            raise ServiceError(problem)
        return []


class DagsterSource:
    """The runs that Dagster keeps, and its daemons' signs of life, out of its own database."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __call__(self) -> list[Metric]:
        """Ask Dagster's database."""
        with postgres.connect_dagster(
            self._settings,
            autocommit=True,
            connect_timeout=CONNECT_SECONDS,
            application_name="metrics-pipeline exporter",
        ) as connection:
            (silence,) = connection.execute(postgres.query("exporter_daemons")).fetchone() or (None,)
            runs = connection.execute(postgres.query("exporter_dagster")).fetchall()
        if silence is None or not -CLOCK_SECONDS < silence <= DAEMON_SECONDS:
            since = (
                "ever" if silence is None else f"{silence:.0f} s" if silence > 0 else "as long as the clock is set back"
            )
            raise ServiceError(
                f"Dagster's daemon has given no sign of life for {since}: see `metrics-pipeline logs daemon`"
            )
        family = GaugeMetricFamily(
            "metrics_pipeline_dagster_runs", "Runs that Dagster keeps (RUN_RETENTION_HOURS)", labels=["job", "status"]
        )
        for job, status, count in runs:
            family.add_metric([job, status], count)
        return [family]


class Exporter(WebServer):
    """`/metrics` for Prometheus, `/health` for those who look after the exporter itself.

    Args:
        settings: where the parts are, and the port.
    """

    def __init__(self, settings: Settings) -> None:
        self.metrics = PipelineMetrics(settings)
        routes = [Route("/metrics", self._metrics), Route("/health", self._health)]
        super().__init__(routes, settings.exporter_port, "EXPORTER_PORT", settings.listen_host, folder_id(settings))

    def stop(self) -> None:
        """Give the port back, and ask the parts no more."""
        super().stop()
        self.metrics.close()

    # Not coroutines, so that a scrape which waits for a part keeps nobody else waiting.

    def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _health(self, _: Request) -> Response:
        """Well as long as it answers; what it found wrong with the parts is for the reader."""
        return JSONResponse({"healthy": True, "down": self.metrics.problems()})
