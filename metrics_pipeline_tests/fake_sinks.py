"""The tables `sink_state` and `sink_offsets` in memory, behind what `postgres.connect` returns, and a quarantine that takes what it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import psycopg

from metrics_pipeline import postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import TOPIC
from metrics_pipeline.sinks.quarantine import Taken

LOG = "fake/AAAAAAAAAAAAAAAAAAAAAQ"


@dataclass
class FakeSinkTables:
    """A transaction that ends with an exception changes nothing.

    Attributes:
        active: the row of `sink_state`; None before the migrations.
        offsets: the rows of `sink_offsets` by partition.
        sessions: connections of the COPY sink.
        down: whether PostgreSQL takes connections.
        roles: who connected.
        asked: called at each look at the position.
        log: which log the topic's name was noted to stand for.
        connector_log: which log the connector's offsets are of.
        partitions: how many the topic was noted to have.
        held: the connector was stopped for a move.
        growth: the row of `topic_growths` that is to be settled next.
        logs: which log the COPY sink's offsets are of, by partition, where it is another one.
    """

    active: str | None = "connect"
    offsets: dict[int, int] = field(default_factory=dict)
    sessions: int = 0
    down: bool = False
    roles: list[str] = field(default_factory=list)
    asked: Callable[[], object] = lambda: None
    log: str = LOG
    connector_log: str = LOG
    partitions: int = 3
    held: bool = False
    growth: tuple[Any, ...] | None = None
    logs: dict[int, str] = field(default_factory=dict)

    @contextmanager
    def connect(self, settings: Any, role: str, **options: Any) -> Iterator[FakeSinkSession]:
        """Stands in for `postgres.connect`."""
        del settings, options
        if self.down:
            raise ServiceError("PostgreSQL at fake cannot be reached")
        self.roles.append(role)
        before = self.active, dict(self.offsets), self.connector_log, dict(self.logs)
        try:
            yield FakeSinkSession(self, role)
        except BaseException:
            self.active, self.offsets, self.connector_log, self.logs = before
            raise


class FakeSinkSession:
    """One connection; knows the statements of `sinks` and no other."""

    def __init__(self, tables: FakeSinkTables, role: str) -> None:
        self._tables = tables
        self._role = role

    def commit(self) -> None:
        pass

    def execute(self, statement: str, values: Any = None) -> FakeResult:
        tables = self._tables
        if statement == postgres.query("sink_position"):
            tables.asked()
            if tables.active is None:
                raise psycopg.errors.UndefinedTable
            assert values == {"topic": TOPIC}
            places: list[tuple[int | None, int | None]] = [
                (number, offset)
                for number, offset in sorted(tables.offsets.items())
                if tables.logs.get(number, LOG) == tables.log
            ]
            logs = tables.log, tables.connector_log
            return FakeResult([(tables.active, tables.sessions, *place, *logs) for place in places or [(None, None)]])
        if statement.startswith("SELECT connector_log"):
            return FakeResult([(tables.connector_log, tables.held) if "held" in statement else (tables.connector_log,)])
        if statement.startswith("UPDATE sink_state SET connector_log"):
            if not statement.endswith("= ''") or not tables.connector_log:
                tables.connector_log = (values or [""])[0]
            tables.held = tables.held and "connector_held = false" not in statement
            return FakeResult([])
        if statement == "UPDATE sink_state SET connector_held = true":
            tables.held = True
            return FakeResult([])
        if statement == postgres.query("topic_growth_settle"):
            tables.growth = None
            return FakeResult([])
        if statement == postgres.query("topic_log_present"):
            return FakeResult([(tables.log, tables.partitions)] if tables.log else [])
        if statement == postgres.query("topic_growth_note"):
            tables.partitions = values["after"]
            return FakeResult([])
        if statement == postgres.query("topic_growth_oldest"):
            return FakeResult([tables.growth] if tables.growth else [])
        if statement.startswith("SELECT note_topic_log"):
            _, tables.log, tables.partitions = values
            return FakeResult([])
        if statement == postgres.query("sinks_lock"):
            return FakeResult([(None,)])
        if statement == postgres.query("sink_activate_connect"):
            assert self._role == "metrics_writer", "only the writer may call this"
            tables.active = "connect"
            return FakeResult([])
        if statement == postgres.query("sink_hand_back"):
            assert self._role in ("metrics_writer", "metrics_owner")
            return FakeResult([(n, at, tables.logs.get(n, LOG)) for n, at in sorted(tables.offsets.items())])
        assert self._role == "metrics_owner", "only the owner may write these tables"
        assert values is not None
        if statement == postgres.query("sink_activate"):
            tables.active = values["active"]
            return FakeResult([])
        assert statement == postgres.query("sink_take_over")
        moved = []
        for number, offset in zip(values["partitions"], values["offsets"], strict=True):
            present = tables.offsets.get(number) if tables.logs.get(number, LOG) == values["log_id"] else None
            tables.logs[number] = values["log_id"]
            if present is None or offset < present or (offset > present and not values["back"]):
                tables.offsets[number] = offset
                moved.append((number, offset))
        return FakeResult(moved)


class FakeResult:
    """Rows."""

    rowcount = 0

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self._rows = rows

    def fetchone(self) -> tuple[Any, ...] | None:
        return self._rows[0] if self._rows else None

    def fetchall(self) -> list[tuple[Any, ...]]:
        return self._rows


@dataclass
class FakeQuarantine:
    """Finds no bad record unless told to; `answer` is what it takes, or why it cannot."""

    answer: Taken | Exception = field(default_factory=Taken)
    number: int | None = None
    finished: int = 0
    close: bool = False
    taken: list[list[int] | None] = field(default_factory=list)
    though_good: bool = False

    def unfinished(self) -> int | None:
        return self.number

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()

    def followed_closely(self) -> bool:
        return self.close

    def finish(self) -> Taken | None:
        if isinstance(self.answer, Exception):
            raise self.answer
        self.finished += 1
        self.number = None
        return self.answer

    def take(self, partitions: list[int] | None, cause: str, *, though_good: bool = False) -> Taken:
        assert cause
        self.taken.append(partitions)
        self.though_good = though_good
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer
