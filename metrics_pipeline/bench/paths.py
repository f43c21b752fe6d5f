"""The paths from the topic into the table, each with the same few handles: begin, how far, end."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import psutil
import psycopg
from confluent_kafka import Consumer, KafkaException, TopicPartition

from metrics_pipeline import kafka, postgres
from metrics_pipeline.bench import table
from metrics_pipeline.bench.place import Place
from metrics_pipeline.bench.readings import BASELINE_TOPIC, EncodedRows, Reference
from metrics_pipeline.copy_sink.store import COPY
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.local.service import tail
from metrics_pipeline.settings import ROOT, TOPIC
from metrics_pipeline.sinks.connector import client as connect_client
from metrics_pipeline.sinks.connector import connector_config

BASELINE_FILE: Final = ROOT / "connect" / f"{BASELINE_TOPIC}.json"
LIMIT_NAME: Final = "metrics-pipeline bench limit"
LOOK_SECONDS: Final = 5.0
"""How often the state of Connect's tasks is asked for while they run."""
STOP_SECONDS: Final = 60.0


class DrainPath(ABC):
    """One path into the table.

    Attributes:
        name: as the report calls it.
        topic: that it reads.
        interval: seconds between two calls of `passed`, which costs something.
    """

    name: str
    topic = TOPIC
    interval = 0.2

    @abstractmethod
    def start(self) -> None:
        """Begin to store what the topic holds."""

    @abstractmethod
    def passed(self) -> int:
        """The sum over the partitions of the offsets up to which all is stored; may be a second behind.

        Raises:
            ServiceError: it has stopped by itself.
        """

    @abstractmethod
    def stop(self) -> None:
        """End it; nothing is written any more when this returns. May be called twice."""

    def processes(self) -> Mapping[str, psutil.Process]:
        """Processes of its own, which no other path has."""
        return {}


class ConnectPath(DrainPath):
    """A connector with a consumer group of its own, which begins at the first record of its topic."""

    def __init__(self, place: Place, name: str, config: Mapping[str, str], topic: str, connector: str) -> None:
        """Prepare.

        Args:
            place: where Connect is.
            name: as the report calls it.
            config: of the connector.
            topic: that it reads.
            connector: its name, and so that of its group: the same one goes on where it was.
        """
        self.name = name
        self.topic = topic
        self._place = place
        self._config = config
        self._connector = connector
        self._client = connect_client(place.settings)
        self._next_look = 0.0
        self._places = [TopicPartition(topic, number) for number in range(place.settings.topic_partitions_metrics)]
        self._consumer = Consumer(
            kafka.client_config(place.settings) | {"group.id": f"connect-{connector}", "enable.auto.commit": False}
        )
        self._closed = False

    @classmethod
    def ours(cls, place: Place, connector: str) -> ConnectPath:
        """Our connector as its file stands."""
        return cls(place, "connect", connector_config(), TOPIC, connector)

    def start(self) -> None:
        """Put the connector."""
        self._client.put(self._connector, self._config)
        self._next_look = time.monotonic() + LOOK_SECONDS

    def passed(self) -> int:
        """The sum of the committed offsets."""
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            state = self._client.state(self._connector)
            if state.failed or state.connector == "FAILED":
                raise ServiceError(f"{self.name}: {state.problems[0]}: see connect.log")
        try:
            committed = self._consumer.committed(self._places, timeout=kafka.TIMEOUT_SECONDS)
        except KafkaException as problem:
            raise ServiceError(f"{self.name}: the broker does not tell offsets: {problem.args[0].str()}") from problem
        return sum(max(0, place.offset) for place in committed)

    def stop(self) -> None:
        """Delete the connector and wait until its tasks have left PostgreSQL."""
        if self._closed:
            return
        self._client.delete(self._connector)
        self._consumer.close()
        self._closed = True
        _await_silence(self._place, "metrics-sink")


class BaselinePath(ConnectPath):
    """The usual configuration of that connector, with the schema in each message.

    On a temporary stack it has the table without the trigger that tells the summaries of each inserting statement: it
    inserts row by row, and the trigger, which a usual table does not have, would cost it a quarter of its speed.
    """

    def __init__(self, place: Place, connector: str) -> None:
        """Prepare; see `ConnectPath`."""
        config: dict[str, str] = json.loads(BASELINE_FILE.read_text("utf-8"))
        super().__init__(place, "connect-baseline", config, BASELINE_TOPIC, connector)

    def start(self) -> None:
        """Take the trigger away and put the connector."""
        self._trigger("DISABLE")
        super().start()

    def stop(self) -> None:
        """Delete the connector and put the trigger back."""
        super().stop()
        self._trigger("ENABLE ALWAYS")

    def _trigger(self, how: Literal["DISABLE", "ENABLE ALWAYS"]) -> None:
        # Elsewhere a bench that is killed would leave summaries that are wrong.
        if self._place.temporary:
            settings = self._place.settings
            with postgres.connect_admin(settings, settings.metrics_database) as connection:
                connection.execute(f"ALTER TABLE metrics {how} TRIGGER metrics_5_log_inserts".encode())


class CopyPath(DrainPath):
    """The native COPY sink, in processes of its own, which goes on at `sink_offsets`."""

    interval = 0.1

    def __init__(self, place: Place, workers: int) -> None:
        """Prepare.

        Args:
            place: where broker and PostgreSQL are.
            workers: processes that store.
        """
        self.name = f"copy-{workers}"
        self._place = place
        self._command = [sys.executable, "-m", "metrics_pipeline", "sink", "--workers", str(workers)]
        self._log = place.settings.data_dir / "logs" / "bench-sink.log"
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: postgres.Connection | None = None

    def start(self) -> None:
        """Make it the active sink and start its processes."""
        self._connection = postgres.connect_admin(self._place.settings, self._place.settings.metrics_database)
        table.activate(self._connection, "copy")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                self._command,
                env=dict(self._place.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def passed(self) -> int:
        """The sum of the stored offsets."""
        if self._child is None or self._connection is None:
            return 0
        if self._child.poll() is not None:
            raise ServiceError(f"{self.name}: the sink ended with exit code {self._child.returncode}: {self._words()}")
        answer = self._connection.execute("SELECT sum(next_offset) FROM sink_offsets WHERE topic = %s", [TOPIC])
        (total,) = answer.fetchone() or (None,)
        return int(total or 0)

    def processes(self) -> Mapping[str, psutil.Process]:
        """The sink, whose workers are its children."""
        return {"sink": psutil.Process(self._child.pid)} if self._child else {}

    def stop(self) -> None:
        """Ask the processes to end, and make the other sink the active one."""
        if self._child is not None:
            end(self._child)
            self._child = None
        if self._connection is not None:
            with contextlib.suppress(psycopg.Error):
                table.activate(self._connection, "connect")
            self._connection.close()
            self._connection = None

    def _words(self) -> str:
        return (tail(self._log, 1) or ["it said nothing"])[-1][:300]


class LimitPath(DrainPath):
    """Rows that were encoded beforehand, over one or more connections: what PostgreSQL can take.

    Each connection has its own partitions, as a sink's workers have, and commits after as many rows as they do.
    """

    interval = 0.05

    def __init__(self, place: Place, connections: int, reference: Reference) -> None:
        """Prepare.

        Args:
            place: where PostgreSQL is.
            connections: that copy at once.
            reference: has the rows.
        """
        self.name = f"limit-{connections}"
        self._place = place
        self._reference = reference
        self._stored = [0] * connections
        self._errors: list[BaseException] = []
        self._stopped = threading.Event()
        self._threads = []
        partitions = sorted({batch.partition for batch in reference.batches})
        for number in range(connections):
            own = set(partitions[number::connections])
            batches = [batch for batch in reference.batches if batch.partition in own]
            self._threads.append(threading.Thread(target=self._copy, args=(number, batches), name=f"limit-{number}"))

    def start(self) -> None:
        """Begin to copy."""
        for thread in self._threads:
            thread.start()

    def passed(self) -> int:
        """First offsets and committed rows."""
        if self._errors:
            raise ServiceError(f"{self.name}: COPY failed: {self._errors[0]}") from self._errors[0]
        return sum(self._stored) + sum(self._reference.low.values())

    def stop(self) -> None:
        """Wait for the connections, after the batches that they are at."""
        self._stopped.set()
        for thread in self._threads:
            if thread.ident:
                thread.join()

    def _copy(self, number: int, batches: Sequence[EncodedRows]) -> None:
        try:
            settings = self._place.settings
            with postgres.connect(settings, "metrics_writer", application_name=LIMIT_NAME) as connection:
                for batch in batches:
                    if self._stopped.is_set():
                        return
                    data = self._reference.data(batch)
                    with connection.cursor() as cursor, cursor.copy(COPY.encode()) as copy:
                        copy.write(data)
                    connection.commit()
                    self._stored[number] += batch.rows
        except BaseException as error:  # raised again by `passed`
            self._errors.append(error)


def end(child: subprocess.Popen[bytes]) -> None:
    """Ask a process that leads its session to end; kill it with its children when it does not."""
    if child.poll() is None:
        family = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        for left in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def _await_silence(place: Place, application: str) -> None:
    """Wait until no session of that application is left."""
    deadline = time.monotonic() + STOP_SECONDS
    with postgres.connect_admin(place.settings, place.settings.metrics_database) as connection:
        while time.monotonic() < deadline:
            answer = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [application]
            )
            if answer.fetchone() == (0,):
                return
            time.sleep(0.1)
    raise ServiceError(f"the connector still writes {STOP_SECONDS:.0f} s after it was deleted: see connect.log")


_KNOWN: Final = re.compile(r"connect|connect-baseline|(copy|limit)-[1-9][0-9]?")


def is_known(name: str) -> bool:
    """Whether there is a path of that name."""
    return _KNOWN.fullmatch(name) is not None


def make(place: Place, name: str, connector: str, reference: Reference) -> DrainPath:
    """The path of a known name; `connector` is what a connector would be called."""
    kind, _, number = name.rpartition("-")
    if name == "connect":
        return ConnectPath.ours(place, connector)
    if name == "connect-baseline":
        return BaselinePath(place, connector)
    if kind == "copy":
        return CopyPath(place, int(number))
    return LimitPath(place, int(number), reference)
