"""A Kafka producer client and a PostgreSQL session in memory, which can be told to misbehave."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import psycopg
from confluent_kafka import KafkaError, KafkaException

from metrics_pipeline import postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import TOPIC
from metrics_pipeline_tests.patience import deadline


def until(condition: Callable[[], object], seconds: float = 5) -> bool:
    """Wait for a condition; False when it did not come true in time."""
    give_up = deadline(seconds)
    while time.monotonic() < give_up:
        if condition():
            return True
        time.sleep(0.005)
    return False


class FakeClock:
    """A monotonic clock that goes on only while somebody sleeps, and what is to happen by it."""

    LONGEST = 3600.0
    """Seconds after which a sleeper is taken to wait for ever."""

    def __init__(self) -> None:
        self.now = self.begun = 1000.0
        self._plans: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()

    def __call__(self) -> float:
        return self.now

    @property
    def passed(self) -> float:
        """Seconds since it was made."""
        return self.now - self.begun

    def at(self, seconds: float, action: Callable[[], object]) -> None:
        """Do something once that much time has passed, in the thread that sleeps then."""
        heapq.heappush(self._plans, (self.begun + seconds, next(self._count), action))

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while self._plans and self._plans[0][0] <= end:
            moment, _, action = heapq.heappop(self._plans)
            self.now = max(self.now, moment)
            action()
        self.now = max(self.now, end)
        assert self.passed < self.LONGEST, "it does not end"


DeliveryReport = Callable[[KafkaError | None, "FakeMessage"], None]


@dataclass(frozen=True)
class FakeMessage:
    """The message of a delivery report."""

    a_key: bytes | None
    a_partition: int | None
    an_offset: int | None

    def key(self) -> bytes | None:
        return self.a_key

    def partition(self) -> int | None:
        return self.a_partition

    def offset(self) -> int | None:
        return self.an_offset


@dataclass
class FakeTopic:
    """What the broker stored, and how it behaves. One instance stands behind every client that is made from it.

    Attributes:
        partitions: how many there are; 0 for no topic.
        latency: seconds from produce to the report.
        answering: whether the broker acknowledges.
        connected: whether messages leave the client's queue at all.
        reachable: whether the broker answers a question for its topics.
        capacity: messages that the client's queue holds.
        largest: bytes of the largest value that the client takes.
        errors: error of a delivery by key.
        purges: whether a purge gives reports.
        fatal: an error that makes the client useless, given with the next poll.
        clock: by which reports come.
        sleep: lets it go on.
        log: keys by partition, at their offsets.
    """

    partitions: int = 3
    latency: float = 0.0
    answering: bool = True
    connected: bool = True
    reachable: bool = True
    capacity: int = 1_000_000
    largest: int = 1_000_000
    errors: dict[bytes, KafkaError] = field(default_factory=dict)
    purges: bool = True
    fatal: KafkaError | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    log: dict[int, list[bytes]] = field(default_factory=dict)
    clients: list[FakeKafkaClient] = field(default_factory=list)

    def client(self, config: dict[str, Any]) -> FakeKafkaClient:
        """Stands in for the class `confluent_kafka.Producer`."""
        made = FakeKafkaClient(self, config)
        self.clients.append(made)
        return made

    @property
    def stored(self) -> list[bytes]:
        """The keys of all partitions."""
        return [key for keys in self.log.values() for key in keys]


class FakeKafkaClient:
    """What `confluent_kafka.Producer` does: `test_fakes` runs the same checks on both."""

    def __init__(self, topic: FakeTopic, config: dict[str, Any]) -> None:
        self.topic = topic
        self.config = config
        self.outstanding: deque[tuple[float, dict[str, Any], DeliveryReport]] = deque()
        self.most_outstanding = 0
        self.batches: list[int] = []
        self.times: list[float] = []
        self.polls = 0
        self.closed = False
        self.threads: set[int] = set()

    def produce_batch(self, topic: str, messages: list[dict[str, Any]], *, on_delivery: Any) -> int:
        assert topic == TOPIC
        assert not self.closed
        now = self.topic.clock()
        self.threads.add(threading.get_ident())
        self.batches.append(len(messages))
        self.times.append(now)
        taken = 0
        for message in messages:
            assert set(message) <= {"key", "value"}  # `_error` of an earlier refusal would be a bug
            if len(message["value"]) > self.topic.largest:
                message["_error"] = KafkaError(KafkaError.MSG_SIZE_TOO_LARGE, "Message failed: too large")
            elif len(self.outstanding) >= self.topic.capacity:
                message["_error"] = KafkaError(KafkaError._QUEUE_FULL, "Message failed: queue full")
            else:
                self.outstanding.append((now + self.topic.latency, message, on_delivery))
                taken += 1
        self.most_outstanding = max(self.most_outstanding, len(self.outstanding))
        return taken

    def poll(self, timeout: float) -> int:
        assert not self.closed
        assert timeout <= 0.2  # from 0.2 s on the real one waits for all of it
        self.polls += 1
        deadline = self.topic.clock() + timeout
        if self.topic.fatal is not None:
            fatal, self.topic.fatal = self.topic.fatal, None
            self.config["error_cb"](fatal)
        while True:
            served = self._serve()
            wait = deadline - self.topic.clock()
            if served or wait <= 0:
                return served
            self.topic.sleep(min(wait, 0.001))

    def _serve(self) -> int:
        served = 0
        while (
            self.topic.answering
            and self.topic.connected
            and self.outstanding
            and self.outstanding[0][0] <= self.topic.clock()
        ):
            _, message, report = self.outstanding.popleft()
            served += 1
            key = message["key"]
            number = zlib.crc32(key) % self.topic.partitions
            if error := self.topic.errors.get(key):
                report(error, FakeMessage(key, number, None))
                continue
            log = self.topic.log.setdefault(number, [])
            log.append(key)
            report(None, FakeMessage(key, number, len(log) - 1))
        return served

    def purge(self, in_queue: bool, in_flight: bool, blocking: bool) -> None:
        assert in_queue
        assert in_flight
        assert not blocking  # which means its opposite
        if not self.topic.purges:
            return
        code = KafkaError._PURGE_INFLIGHT if self.topic.connected else KafkaError._PURGE_QUEUE
        for _, message, report in self.outstanding:
            report(KafkaError(code), FakeMessage(message["key"], 0, None))
        self.outstanding.clear()

    def list_topics(self, *, timeout: float) -> Any:
        assert timeout <= 1
        if not self.topic.reachable:
            self.config["error_cb"](
                KafkaError(
                    KafkaError._TRANSPORT, "b:1/bootstrap: Connect to b:1 failed: Connection refused (after 1ms)"
                )
            )
            raise KafkaException(KafkaError(KafkaError._TRANSPORT, "Failed to get metadata"))
        if not self.topic.partitions:
            return SimpleNamespace(topics={})
        partitions = {number: SimpleNamespace(leader=1) for number in range(self.topic.partitions)}
        return SimpleNamespace(topics={TOPIC: SimpleNamespace(error=None, partitions=partitions)})

    def close(self) -> bool:
        assert not self.outstanding or not self.topic.purges
        self.closed = True
        return True


@dataclass
class FakePostgres:
    """The tables `producer_runs` and `metrics`, and the producer's lock.

    Attributes:
        down: whether a connection or a statement fails.
        hangs: whether a statement waits.
        slow: called by each write: lets time go by.
        refused: how many connections and statements failed.
        holder: application name of the session that holds the lock.
        rows: by run and partition; `offsets` is a set.
        writes: states in the order in which they were written.
        visible: keys that a SELECT sees; None for every key.
    """

    down: bool = False
    hangs: bool = False
    slow: Callable[[], object] = lambda: None
    refused: int = 0
    holder: str | None = None
    rows: dict[tuple[UUID, int], dict[str, Any]] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)
    visible: set[tuple[str, str, int]] | None = None
    sessions: list[FakeSession] = field(default_factory=list)

    def connect(self, settings: Any, role: str, **options: Any) -> Any:
        """Stands in for `postgres.connect`."""
        assert role == "metrics_producer"
        if self.down:
            self.refused += 1
            raise ServiceError("PostgreSQL at fake cannot be reached")
        self.sessions.append(FakeSession(self, options["application_name"]))
        return self.sessions[-1]

    def restart(self) -> None:
        """Every session breaks, and with them the locks."""
        for session in self.sessions:
            session.broken = True
        self.holder = None


class FakeSession:
    """One connection."""

    def __init__(self, server: FakePostgres, name: str) -> None:
        self.server = server
        self.name = name
        self.broken = False
        self.closed = False

    def _check(self) -> None:
        assert not self.closed
        while self.server.hangs:
            time.sleep(0.01)
        if self.broken or self.server.down:
            self.broken = True
            self.server.refused += 1
            raise psycopg.OperationalError("the connection is lost")

    def execute(self, statement: str, parameters: Any = None) -> Any:
        self._check()
        if "pg_try_advisory_lock" in statement:
            if self.server.holder in (None, self.name):
                self.server.holder = self.name
                return Rows([(True,)])
            return Rows([(False,)])
        if statement == postgres.query("producer_lock_holder"):
            return Rows([(self.server.holder, 1, datetime(2026, 11, 22, 16, tzinfo=UTC))])
        if statement == postgres.query("end_abandoned_runs"):
            for (run_id, _), row in self.server.rows.items():
                if row["source"] == "simulated" and row["state"] == "running" and run_id != parameters["run_id"]:
                    row["state"] = "failed"
            return Rows([])
        assert statement == postgres.query("visible_keys")
        keys = zip(parameters["devices"], parameters["times"], parameters["metrics"], strict=True)
        seen = [place for place, key in enumerate(keys, 1) if self.server.visible is None or key in self.server.visible]
        return Rows([(place,) for place in seen])

    @contextmanager
    def transaction(self) -> Iterator[None]:
        yield

    def cursor(self) -> FakeSession:
        return self

    def executemany(self, statement: str, rows: Sequence[Mapping[str, Any]]) -> None:
        assert statement == postgres.query("record_run")
        self._check()
        self.server.slow()
        for row in rows:
            place = row["run_id"], row["partition"]
            before = self.server.rows.get(place, {}).get("offsets", set())
            self.server.rows[place] = {**row, "offsets": before | offsets_of(row["offsets"])}
        self.server.writes.append(rows[0]["state"])

    def close(self) -> None:
        self.closed = True
        if self.server.holder == self.name:
            self.server.holder = None


class Rows:
    """A result."""

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self._rows = rows

    def fetchone(self) -> tuple[Any, ...] | None:
        return self._rows[0] if self._rows else None

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self._rows)


def offsets_of(text: str) -> set[int]:
    """The numbers in PostgreSQL's text of an int8multirange."""
    found: set[int] = set()
    for piece in text.strip("{}").removeprefix("[").removesuffix(")").split("),["):
        if piece:
            low, high = piece.split(",")
            found.update(range(int(low), int(high)))
    return found
