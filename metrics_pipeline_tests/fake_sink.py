"""What surrounds a worker of the COPY sink, so that any order of events can be tried: threads that run one at a time, a clock, a
broker with its group, and PostgreSQL as far as transactions are concerned. The worker and its store are the real ones.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, Full
from types import SimpleNamespace
from typing import Any, Final, NoReturn, cast

import psycopg
import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from psycopg import errors as pg
from psycopg.pq import TransactionStatus

from metrics_pipeline import kafka, postgres
from metrics_pipeline.copy_sink import worker as worker_module
from metrics_pipeline.copy_sink.store import Store
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import TOPIC, Settings

LOG: Final = "fake/log"
"""What the topic's name stands for."""


@dataclass(frozen=True, slots=True)
class FakeMessage:
    """`confluent_kafka.Message`."""

    number: int
    at: int
    key_bytes: bytes | None
    value_bytes: bytes | None
    problem: Any = None

    def key(self) -> bytes | None:
        return self.key_bytes

    def value(self) -> bytes | None:
        return self.value_bytes

    def partition(self) -> int:
        return self.number

    def offset(self) -> int:
        return self.at

    def error(self) -> Any:
        return self.problem

    def timestamp(self) -> tuple[int, int]:
        return 1, self.at


def copied(data: bytes) -> list[tuple[bytes, ...]]:
    """The fields of each row of a binary COPY."""
    header = b"PGCOPY\n\xff\r\n\0" + bytes(8)
    assert data.startswith(header)
    rows, at = [], len(header)
    while (count := struct.unpack_from(">h", data, at)[0]) >= 0:
        at += 2
        fields = []
        for _ in range(count):
            (size,) = struct.unpack_from(">i", data, at)
            fields.append(data[at + 4 : at + 4 + size])
            at += 4 + size
        rows.append(tuple(fields))
    assert data[at:] == b"\xff\xff"
    return rows


# --- Threads that run one at a time ------------------------------------------------------------------------------


class Killed(BaseException):
    """The process of this thread is gone."""


class Task:
    """A thread that runs only while it is told to, from one pause to the next: so every order of events can be tried.

    Attributes:
        at: where it pauses.
        done: whether its body has ended.
    """

    _own = threading.local()

    def __init__(self, process: Process | None, body: Callable[[], object]) -> None:
        self.process = process
        self.at, self.done = "begin", False
        self._body = body
        self._error: BaseException | None = None
        self._verdict: object = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._main, daemon=True).start()

    @classmethod
    def current(cls) -> Task:
        task: Task = cls._own.task
        return task

    def _main(self) -> None:
        self._own.task = self
        self._go.acquire()
        try:
            if not self._dead:
                self._body()
        except Killed:
            pass
        except BaseException as error:
            self._error = error
        self.at, self.done = "end", True
        self._back.release()

    @property
    def _dead(self) -> bool:
        return self.process is not None and not self.process.alive

    def resume(self, verdict: object = None) -> None:
        """Let it run to its next pause, or its end; what its body raised is raised here."""
        if self.done:
            return
        self._verdict = verdict
        self._go.release()
        self._back.acquire()
        if self._error is not None and not self._dead:
            raise self._error

    def pause(self, at: str) -> object:
        """Of the thread itself: wait until told to go on."""
        if self._dead:
            raise Killed
        self.at = at
        self._back.release()
        self._go.acquire()
        if self._dead:
            raise Killed
        return self._verdict


def pause(at: str) -> object:
    return Task.current().pause(at)


class FakeEvent:
    """`threading.Event`; whoever waits lets the others run."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._set = False

    def set(self) -> None:
        self._set = True

    def clear(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float) -> bool:
        if not self._set:
            self._world.clock += timeout
            pause("waiting")
        return self._set


class FakeCondition:
    """`threading.Condition`; one look at what is waited for, and another after the others have run."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def wait_for(self, predicate: Callable[[], bool], timeout: float) -> bool:
        if not predicate() and timeout > 0:
            self._world.clock += timeout
            pause("queue is full")
        return predicate()


class FakeQueue:
    """`queue.Queue` of one place."""

    def __init__(self, world: World, maxsize: int) -> None:
        assert maxsize == 1
        self._world = world
        self._items: list[Any] = []
        self.unfinished_tasks = 0
        self.all_tasks_done = FakeCondition(world)

    def put_nowait(self, item: Any) -> None:
        if self._items:
            raise Full
        self._items.append(item)
        self.unfinished_tasks += 1

    def put(self, item: Any, block: bool = True, timeout: float = 0.0) -> None:
        if self._items and block:
            self._world.clock += timeout
            pause("queue is full")
        self.put_nowait(item)

    def get(self, timeout: float) -> Any:
        if not self._items:
            self._world.clock += timeout
            pause("queue is empty")
        return self.get_nowait()

    def get_nowait(self) -> Any:
        if not self._items:
            raise Empty
        return self._items.pop()

    def task_done(self) -> None:
        self.unfinished_tasks -= 1

    def empty(self) -> bool:
        return not self._items


class FakeThread:
    """`threading.Thread` as a task of the process that starts it."""

    def __init__(self, world: World, *, target: Callable[..., object], args: tuple[Any, ...] = (), **_: Any) -> None:
        self._world = world
        self._body = partial(target, *args)
        self._task: Task | None = None

    def start(self) -> None:
        process = Task.current().process
        assert process is not None
        self._task = Task(process, self._body)
        process.writers.append(self._task)

    def join(self, timeout: float) -> None:
        """Waiting is a few turns of the others; then it has taken too long."""
        assert self._task is not None
        for _ in range(4):
            if self._task.done:
                return
            pause("joining")
        self._world.clock += timeout

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done


class FakeFailpoints:
    """Every named place is a pause."""

    def __init__(self, world: World, **_: object) -> None:
        self._world = world

    def begin(self, step: str) -> None:
        """Nothing happens there."""

    def reach(self, name: str) -> None:
        pause(name)


# --- PostgreSQL --------------------------------------------------------------------------------------------------

REFUSED: Final = 666.5
"""A value that a constraint of the database does not allow."""


class Database:
    """The tables of the COPY sink, as far as transactions are concerned.

    Attributes:
        active: the sink that stores.
        offsets: by partition, committed.
        rows: value and tags by key, as COPY sends them.
        rejects: reason by partition and offset.
        skipped: partition, from and to of each jump over records that were deleted.
        sessions: all that are connected.
        down: whether it takes connections.
        standby: whether it takes writes no more; sessions that it has stay.
        most: rows that it takes in one statement until a time limit ends it; 0: any number.
    """

    def __init__(self) -> None:
        self.active = "copy"
        self.offsets: dict[int, int] = {}
        self.rows: dict[bytes, bytes] = {}
        self.rejects: dict[tuple[int, int], str] = {}
        self.skipped: list[tuple[int, int, int]] = []
        self.sessions: list[FakeSession] = []
        self.down = self.standby = False
        self.most = 0
        self.commits = 0

    def connect(self, *_: Any, **__: Any) -> FakeSession:
        if self.down:
            raise ServiceError("PostgreSQL at fake cannot be reached")
        if self.standby:
            raise postgres.StandbyServerError("PostgreSQL at fake is a standby")
        session = FakeSession(self, Task.current().process)
        self.sessions.append(session)
        return session

    def holder(self, partition: int, besides: FakeSession | None = None) -> FakeSession | None:
        """Who has locked a partition's offset."""
        found = [one for one in self.sessions if one is not besides and partition in one.locked]
        assert len(found) <= 1
        return found[0] if found else None


@dataclass
class Changes:
    """What a transaction has done so far."""

    offsets: dict[int, int] = field(default_factory=dict)
    rows: dict[bytes, bytes] = field(default_factory=dict)
    rejects: dict[tuple[int, int], str] = field(default_factory=dict)
    skipped: list[tuple[int, int, int]] = field(default_factory=list)
    incoming: list[tuple[bytes, bytes]] = field(default_factory=list)

    def copy(self) -> Changes:
        return Changes(dict(self.offsets), dict(self.rows), dict(self.rejects), list(self.skipped), list(self.incoming))


class FakeSession:
    """A psycopg connection that knows the statements of `store` and no other.

    Attributes:
        locked: partitions whose offsets its transaction has locked.
        reply_lost: the next COMMIT works, and its answer does not arrive.
        changes: what its transaction has done so far.
    """

    def __init__(self, database: Database, process: Process | None) -> None:
        self._database = database
        self.process = process
        self.closed = False
        self.locked: set[int] = set()
        self.reply_lost = False
        self.changes = Changes()
        self._status = TransactionStatus.IDLE

    @property
    def info(self) -> Any:
        return SimpleNamespace(transaction_status=self._status)

    def end(self) -> None:
        """The session is gone, and with it what its transaction did."""
        self.closed = True
        self._forget()
        if self in self._database.sessions:
            self._database.sessions.remove(self)

    close = end

    def _forget(self) -> None:
        self.locked = set()
        self.changes = Changes()
        self._status = TransactionStatus.IDLE

    def _usable(self) -> None:
        if self.closed:
            raise pg.AdminShutdown("terminating connection due to administrator command")
        if self._status == TransactionStatus.INERROR:
            raise pg.InFailedSqlTransaction("current transaction is aborted")
        self._status = TransactionStatus.INTRANS

    def _require_writable(self) -> None:
        if self._database.standby:
            self._refuse(pg.ReadOnlySqlTransaction("cannot execute in a read-only transaction"))

    def _refuse(self, error: psycopg.Error) -> NoReturn:
        self._status = TransactionStatus.INERROR
        raise error

    def commit(self) -> None:
        if self.closed:
            raise pg.AdminShutdown("terminating connection due to administrator command")
        assert self._status != TransactionStatus.INERROR, "a COMMIT would be a ROLLBACK, in silence"
        changes, database = self.changes, self._database
        for key, row in changes.rows.items():
            database.rows[key] = row
        database.offsets |= changes.offsets
        database.rejects |= changes.rejects
        database.skipped += changes.skipped
        database.commits += 1
        self._forget()
        if self.reply_lost:
            self.reply_lost = False
            self.end()
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    def rollback(self) -> None:
        if self.closed:
            raise psycopg.OperationalError("the connection is closed")
        self._forget()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self._usable()
        before = self.changes.copy()
        try:
            yield
        except BaseException:
            if not self.closed:
                self.changes, self._status = before, TransactionStatus.INTRANS
            raise

    @contextmanager
    def cursor(self) -> Iterator[FakeSession]:
        yield self

    @contextmanager
    def copy(self, statement: bytes) -> Iterator[FakeCopy]:
        self._usable()
        copy = FakeCopy()
        yield copy
        self._usable()
        rows = [(fields[0] + fields[1] + fields[2], fields[3] + fields[4]) for fields in copied(bytes(copy.data))]
        self._require_writable()
        if self._database.most and len(rows) > self._database.most:
            self._refuse(pg.QueryCanceled("canceling statement due to statement timeout"))
        if statement.startswith(b"COPY incoming_metrics "):
            self.changes.incoming += rows
            return
        assert statement.startswith(b"COPY metrics ")
        for key, row in rows:
            if key in self.changes.rows or key in self._database.rows:
                self._refuse(pg.UniqueViolation("duplicate key value violates unique constraint"))
            self._store(key, row)

    def _store(self, key: bytes, row: bytes) -> None:
        if row[:8] == struct.pack(">d", REFUSED):
            self._refuse(pg.CheckViolation("new row violates check constraint"))
        self.changes.rows[key] = row

    def execute(self, statement: str | bytes, values: Any = None) -> Found:
        self._usable()
        text = statement.decode() if isinstance(statement, bytes) else statement
        named = {postgres.query(name): getattr(self, f"_{name}") for name in _STATEMENTS}
        if text in named:
            return cast("Found", named[text](values))
        for begin, run in (
            ("SELECT active = 'copy', pg_is_in_recovery() FROM sink_state", self._active),
            ("SELECT connector_log FROM sink_state", lambda _: Found([(LOG,)])),
            ("SELECT partition, next_offset, log_id, last_timestamp FROM sink_offsets", self._offsets),
            ("INSERT INTO sink_offsets", self._begin),
            ("CREATE TEMPORARY TABLE IF NOT EXISTS incoming_metrics", lambda _: Found([])),
            ("DELETE FROM incoming_metrics", self._empty),
        ):
            if text.startswith(begin):
                return run(values)
        raise AssertionError(f"this PostgreSQL does not know: {text}")

    def _at(self, partition: int) -> int | None:
        return self.changes.offsets.get(partition, self._database.offsets.get(partition))

    def _lock(self, partitions: Iterable[int]) -> None:
        self._require_writable()
        for partition in sorted(partitions):
            if self._database.holder(partition, self) is not None:
                pause("lock")
                self._usable()
            if self._database.holder(partition, self) is not None:
                self._refuse(pg.LockNotAvailable("canceling statement due to lock timeout"))
            if self._at(partition) is not None:
                self.locked.add(partition)

    def _active(self, _: Any) -> Found:
        return Found([(self._database.active == "copy", self._database.standby)])

    def _offsets(self, values: Any) -> Found:
        return Found([(number, at, LOG, None) for number in values[1] if (at := self._at(number)) is not None])

    def _begin(self, values: Any) -> Found:
        _, partition, log, offset = values
        assert log == LOG
        self._require_writable()
        if self._at(partition) is not None:
            return Found([], 0)
        self.changes.offsets[partition] = offset
        return Found([], 1)

    def _sink_move(self, values: Any) -> Found:
        partition, expected, offset = values["partition"], values["expected"], values["offset"]
        assert values["expected_log"] == values["log_id"] == LOG
        # Seen as it was when the statement began, unless the row itself has been changed meanwhile.
        active = self._database.active == "copy"
        self._lock([partition])
        if self._at(partition) != expected or not active:
            return Found([], 0)
        self.changes.offsets[partition] = offset
        self.changes.skipped.append((partition, expected, offset))
        return Found([], 1)

    def _empty(self, _: Any) -> Found:
        self.changes.incoming = []
        return Found([])

    def _sink_lock(self, values: Any) -> Found:
        # What is no part of the locked rows is seen as it was when the statement began, before it waited.
        active = self._database.active == "copy"
        self._lock(values["partitions"])
        return Found(
            [(number, at, LOG, active) for number in values["partitions"] if (at := self._at(number)) is not None]
        )

    def _sink_advance(self, values: Any) -> Found:
        if "sink_state" in postgres.query("sink_advance") and self._database.active != "copy":
            return Found([], 0)
        moved = 0
        self._lock(values["partitions"])
        for partition, start, stop in zip(values["partitions"], values["starts"], values["stops"], strict=True):
            if self._at(partition) == start:
                self.changes.offsets[partition] = stop
                moved += 1
        return Found([], moved)

    def _sink_upsert(self, _: Any) -> Found:
        keys = [key for key, _ in self.changes.incoming]
        if len(set(keys)) < len(keys):
            self._refuse(pg.CardinalityViolation("ON CONFLICT DO UPDATE command cannot affect row a second time"))
        for key, row in self.changes.incoming:
            self._store(key, row)
        return Found([])

    def _sink_reject(self, values: Any) -> Found:
        records = json.loads(values["records"])
        assert values["topic"] == TOPIC
        places = [(record["partition"], record["offset"]) for record in records]
        assert len(set(places)) == len(places), "a statement cannot keep the same record twice"
        for record in records:
            assert record["log_id"] == LOG
            self.changes.rejects[record["partition"], record["offset"]] = record["reason"]
        return Found([])

    def _sink_end_stalled(self, _: Any) -> Found:
        stalled = [one for one in self._database.sessions if one is not self and one.locked and one.process]
        for session in stalled:
            session.end()
        return Found([(len(stalled),)])


_STATEMENTS: Final = ("sink_lock", "sink_move", "sink_advance", "sink_upsert", "sink_reject", "sink_end_stalled")


@dataclass(frozen=True)
class Found:
    """A cursor after its statement."""

    rows: list[tuple[Any, ...]]
    rowcount: int = 0

    def fetchone(self) -> tuple[Any, ...] | None:
        return self.rows[0] if self.rows else None

    def fetchall(self) -> list[tuple[Any, ...]]:
        return self.rows


class FakeCopy:
    """A psycopg Copy that takes everything."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, piece: bytes) -> None:
        self.data += piece


# --- The broker and its group ------------------------------------------------------------------------------------


@dataclass
class Log:
    """A partition.

    Attributes:
        records: by offset; None where there is none (a transaction's mark, or compacted away).
        low: first offset that is retained.
        owner: the member that the group has given it to.
        leaving: the owner was asked to give it back.
    """

    records: list[FakeMessage | None] = field(default_factory=list)
    low: int = 0
    owner: FakeConsumer | None = None
    leaving: bool = False


class FakeConsumer:
    """`confluent_kafka.Consumer`, member of a group that the test drives."""

    def __init__(self, world: World, config: dict[str, Any]) -> None:
        assert config["enable.auto.commit"] is False
        process = Task.current().process
        assert process is not None
        self._world = world
        self.process = process
        self.assigned: dict[int, int | None] = {}
        self.asked: list[tuple[str, list[int]]] = []
        self.committed: dict[int, int] = {}
        self._paused: set[int] = set()
        self._callbacks: dict[str, Callable[..., None]] = {}
        self.member = False

    def subscribe(self, topics: list[str], **callbacks: Callable[..., None]) -> None:
        assert topics == [TOPIC]
        self._callbacks = callbacks
        self.member = True
        self.process.consumer = self

    def consume(self, count: int, _: float) -> list[FakeMessage]:
        early = pause("consume") == "early"
        self._world.reach_broker()
        messages = self._fetch(count) if early else []
        while self.asked:
            what, numbers = self.asked.pop(0)
            self._callbacks[what](self, [TopicPartition(TOPIC, number) for number in numbers])
        return messages or self._fetch(count)

    def _fetch(self, count: int) -> list[FakeMessage]:
        self._world.clock += 0.01
        found: list[FakeMessage] = []
        for number in self._world.order(sorted(self.assigned)):
            log, position = self._world.logs[number], self.assigned[number]
            if number in self._paused or position is None:
                continue
            if position < log.low or position > len(log.records):
                found.append(FakeMessage(number, -1001, None, None, KafkaError(KafkaError._AUTO_OFFSET_RESET)))
                self.assigned[number] = None
                continue
            for record in log.records[position:]:
                if len(found) >= count or self._world.enough(found):
                    break
                position += 1
                if record is not None:
                    found.append(record)
            self.assigned[number] = position
        return found

    def incremental_assign(self, places: list[TopicPartition]) -> None:
        self.assigned |= {place.partition: place.offset for place in places}

    def incremental_unassign(self, places: list[TopicPartition]) -> None:
        for place in places:
            self.assigned.pop(place.partition, None)
            self._paused.discard(place.partition)
            log = self._world.logs[place.partition]
            # One that was lost may have been given back to the same member by now.
            if log.owner is self and log.leaving:
                log.owner, log.leaving = None, False

    def pause(self, places: list[TopicPartition]) -> None:
        self._paused |= {place.partition for place in places}

    def resume(self, places: list[TopicPartition]) -> None:
        self._paused -= {place.partition for place in places}

    def seek(self, place: TopicPartition) -> None:
        pause("seek")
        self._world.reach_broker()
        if place.partition not in self.assigned or self._world.seeks_refused > 0:
            self._world.seeks_refused -= 1
            raise KafkaException(KafkaError(KafkaError._STATE))
        self.assigned[place.partition] = place.offset

    def get_watermark_offsets(self, place: TopicPartition, **_: Any) -> tuple[int, int]:
        self._world.reach_broker()
        log = self._world.logs[place.partition]
        return log.low, len(log.records)

    def commit(self, offsets: list[TopicPartition], **_: Any) -> None:
        for place in offsets:
            assert place.offset <= self._world.database.offsets[place.partition], "committed before it was stored"

    def close(self) -> None:
        pause("close")
        if self.assigned and self.member:
            self._callbacks["on_revoke"](self, [TopicPartition(TOPIC, number) for number in sorted(self.assigned)])
        self.leave()

    def leave(self) -> None:
        """Of the group: what it had is free."""
        self.member = False
        self.process.consumer = None
        for log in self._world.logs.values():
            if log.owner is self:
                log.owner, log.leaving = None, False


# --- Everything together -----------------------------------------------------------------------------------------


class FakeLogWatch:
    """The topic's name always stands for the same log."""

    def __init__(self, *_: Any) -> None:
        pass

    def begin(self) -> None:
        pass

    def present(self) -> str:
        return LOG

    def moved(self) -> bool:
        return False


class Process:
    """A worker process: the real `Worker` on threads that run one at a time.

    Attributes:
        alive: until it is killed.
        reader: the thread of `Worker.run`.
        writers: the thread of each session; more than one runs when a former one hangs.
        consumer: its member of the group.
    """

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self.alive = True
        self.writers: list[Task] = []
        self.consumer: FakeConsumer | None = None
        self.worker = worker_module.CopyWorker(world.settings, name)
        self.reader = Task(self, self.worker.run)

    @property
    def tasks(self) -> list[Task]:
        return [task for task in (self.reader, *self.writers) if not task.done]

    def kill(self) -> None:
        """As SIGKILL does: transactions end, the group notices sooner or later."""
        self.alive = False
        for session in [one for one in self._world.database.sessions if one.process is self]:
            session.end()
        for task in (self.reader, *self.writers):
            while not task.done:
                task.resume()
        if self.consumer is not None:
            self.consumer.leave()


class World:
    """A topic, a database, and worker processes that know nothing else.

    Args:
        partitions: how many.
        store: the class of the workers' store.

    Attributes:
        clock: seconds.
        connector: the connector's committed offsets.
    """

    def __init__(self, partitions: int, store: type[Store] = Store, flush_rows: int = 4) -> None:
        self.clock = 1_000.0
        self.logs = {number: Log() for number in range(partitions)}
        self.database = Database()
        self.processes: list[Process] = []
        self.connector: dict[int, int] = {}
        self.broker_fails = 0
        self.seeks_refused = 0
        self.most = 100
        self.backwards = False
        self.settings = Settings(sink="copy", sink_flush_rows=flush_rows, sink_flush_ms=50)
        self._patch = pytest.MonkeyPatch()
        self._patched(store)

    def _patched(self, store: type[Store]) -> None:
        change = partial(self._patch.setattr, worker_module)
        change("Consumer", partial(FakeConsumer, self))
        change("Queue", partial(FakeQueue, self))
        change("Failpoints", partial(FakeFailpoints, self))
        change("Store", store)
        change("LogWatch", FakeLogWatch)
        change("random", SimpleNamespace(uniform=lambda _, most: most))
        change("time", SimpleNamespace(monotonic=lambda: self.clock, time=lambda: self.clock, sleep=self._sleep))
        change(
            "threading",
            SimpleNamespace(
                Lock=threading.Lock,
                Event=partial(FakeEvent, self),
                Thread=partial(FakeThread, self),
                local=threading.local,
            ),
        )
        self._patch.setattr(kafka, "committed", lambda *_: dict(self.connector))
        self._patch.setattr(postgres, "connect", self.database.connect)

    def _sleep(self, seconds: float) -> None:
        self.clock += seconds
        pause("sleeping")

    def reach_broker(self) -> None:
        if self.broker_fails:
            self.broker_fails -= 1
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))

    def order(self, numbers: list[int]) -> list[int]:
        return numbers[::-1] if self.backwards else numbers

    def enough(self, found: list[FakeMessage]) -> bool:
        return len(found) >= self.most

    def start(self) -> Process:
        """A process of another machine, for all it knows."""
        process = Process(self, f"{len(self.processes)}")
        self.processes.append(process)
        return process

    @property
    def running(self) -> list[Process]:
        return [process for process in self.processes if process.alive and not process.reader.done]

    @property
    def members(self) -> list[FakeConsumer]:
        return [one.consumer for one in self.processes if one.alive and one.consumer and one.consumer.member]

    def assign(self, number: int, member: FakeConsumer) -> None:
        """Give a free partition to a member."""
        log = self.logs[number]
        assert log.owner is None
        log.owner = member
        member.asked.append(("on_assign", [number]))

    def revoke(self, number: int) -> None:
        """Ask a partition's owner to give it back."""
        log = self.logs[number]
        if log.owner is not None and not log.leaving:
            log.leaving = True
            log.owner.asked.append(("on_revoke", [number]))

    def expel(self, member: FakeConsumer) -> None:
        """A member was silent for too long: others get what it had, and it hears of it when it comes back."""
        gone = [number for number, log in self.logs.items() if log.owner is member]
        for number in gone:
            self.logs[number].owner, self.logs[number].leaving = None, False
        member.asked = []
        if lost := sorted({*gone, *member.assigned}):
            member.asked.append(("on_lost", lost))

    def __str__(self) -> str:
        lines = [f"partition {n}: {log.low}..{len(log.records)}, {log.leaving=}" for n, log in self.logs.items()]
        for process in self.running:
            worker, consumer = process.worker, process.consumer
            lines.append(
                f"reader at {process.reader.at}, writers at {[task.at for task in process.writers]}, "
                f"{worker.report.state}: {worker.report.reason}, places {worker._places._places}, "
                f"has {consumer and consumer.assigned}, is asked {consumer and consumer.asked}, "
                f"owns {[n for n, log in self.logs.items() if consumer and log.owner is consumer]}"
            )
        return "\n".join(lines)

    def close(self) -> None:
        """End all threads and undo what was patched."""
        for process in self.processes:
            process.kill()
        self._patch.undo()
