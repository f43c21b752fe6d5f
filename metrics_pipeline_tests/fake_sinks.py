"""The tables `sink_state` and `sink_offsets` in memory, behind what `postgres.connect` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from metrics_pipeline import postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import TOPIC


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
    """

    active: str | None = "connect"
    offsets: dict[int, int] = field(default_factory=dict)
    sessions: int = 0
    down: bool = False
    roles: list[str] = field(default_factory=list)
    asked: Callable[[], object] = lambda: None

    @contextmanager
    def connect(self, settings: Any, role: str, **options: Any) -> Iterator[FakeSinkSession]:
        """Stands in for `postgres.connect`."""
        del settings, options
        if self.down:
            raise ServiceError("PostgreSQL at fake cannot be reached")
        self.roles.append(role)
        before = self.active, dict(self.offsets)
        try:
            yield FakeSinkSession(self, role)
        except BaseException:
            self.active, self.offsets = before
            raise


class FakeSinkSession:
    """One connection; knows the statements of `sinks` and no other."""

    def __init__(self, tables: FakeSinkTables, role: str) -> None:
        self._tables = tables
        self._role = role

    def execute(self, statement: str, values: dict[str, Any] | None = None) -> FakeResult:
        tables = self._tables
        if statement == postgres.query("sink_position"):
            tables.asked()
            if tables.active is None:
                raise psycopg.errors.UndefinedTable
            assert values == {"topic": TOPIC}
            places: list[tuple[int | None, int | None]] = [*sorted(tables.offsets.items())]
            return FakeResult([(tables.active, tables.sessions, *place) for place in places or [(None, None)]])
        if statement == postgres.query("sink_activate_connect"):
            assert self._role == "metrics_writer", "only the writer may call this"
            tables.active = "connect"
            return FakeResult([])
        if statement == postgres.query("sink_hand_back"):
            assert self._role in ("metrics_writer", "metrics_owner")
            return FakeResult(sorted(tables.offsets.items()))
        assert self._role == "metrics_owner", "only the owner may write these tables"
        assert values is not None
        if statement == postgres.query("sink_activate"):
            tables.active = values["active"]
            return FakeResult([])
        assert statement == postgres.query("sink_take_over")
        moved = []
        for number, offset in zip(values["partitions"], values["offsets"], strict=True):
            present = tables.offsets.get(number)
            if present is None or offset < present or (offset > present and not values["back"]):
                tables.offsets[number] = offset
                moved.append((number, offset))
        return FakeResult(moved)


class FakeResult:
    """Rows."""

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self._rows = rows

    def fetchall(self) -> list[tuple[Any, ...]]:
        return self._rows
