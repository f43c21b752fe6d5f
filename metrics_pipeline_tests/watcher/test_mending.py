"""When the topic is searched, and what bounds it; what is done with the rows is tested on the real parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from metrics_pipeline import postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import Settings
from metrics_pipeline.watcher.mending import LOOK_AGAIN_SECONDS, SEARCH_SECONDS, SEARCH_SHARE, SLICE_SECONDS, Mender
from metrics_pipeline.watcher.progress import SinkProgress
from metrics_pipeline.watcher.readings import Key
from metrics_pipeline_tests.watcher.coerced import row_of

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)


@dataclass
class Table:
    """PostgreSQL, with one coerced record whose row is due; what was executed, by the query's name."""

    created_at: datetime | None
    executed: list[str] = field(default_factory=list)
    names: Mapping[str, str] = field(
        default_factory=lambda: {path.read_text("utf-8"): path.stem for path in postgres.QUERIES.glob("watcher_*.sql")}
    )

    def execute(self, text: str, values: Any = None) -> Table:
        self.executed.append(self.names.get(text, text))
        return self

    executemany = execute

    def fetchall(self) -> list[Any]:
        if self.executed[-1] == "watcher_due":
            row = row_of(uuid4())
            identity = (row.device_id, row.published_at, row.metric_name, row.value, row.tags)
            return [(3, 1000, 0, *identity, self.created_at)]
        return [(3, 1000)]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        yield

    @contextmanager
    def cursor(self) -> Iterator[Table]:
        yield self


@dataclass
class Search:
    """A topic in which nothing is found."""

    bounds: list[dict[int, int]] = field(default_factory=list)
    quick: bool = True
    found: Mapping[Key, Any] = field(default_factory=dict)

    closes: list[int] = field(default_factory=list)

    def __call__(self, settings: Settings, keys: list[Key]) -> Any:
        return self

    def close(self) -> None:
        self.closes.append(len(self.bounds))

    def steps(self, bound: dict[int, int]) -> Iterator[None]:
        self.bounds.append(bound)
        yield

    def catch_up(self, most: int) -> bool:
        return self.quick


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def mender(search: Search, clock: Clock, cost: Clock | None = None, progress: SinkProgress | None = None) -> Mender:
    return Mender(Settings(), progress or SinkProgress(), clock, cost or Clock(), search)


def look(made: Mender, table: Table) -> int:
    return made.look(table, {3: 2000})  # type: ignore[arg-type]  # a table in the place of a connection


def test_a_row_that_holds_something_else_is_looked_at_and_left() -> None:
    table, search = Table(None), Search()
    assert look(mender(search, Clock()), table) == 0
    assert table.executed == ["watcher_due", "watcher_looked"]
    assert search.bounds == []


def test_a_wrong_row_without_an_earlier_reading_is_removed() -> None:
    table, search = Table(NOON), Search()
    assert look(mender(search, Clock()), table) == 1
    assert table.executed[1] == "watcher_hold"
    assert any("withdraw_coerced" in text for text in table.executed)
    assert "watcher_restore" not in table.executed
    assert table.executed[-2:] == ["watcher_outcome", "watcher_looked"]


def test_when_too_much_came_meanwhile_nothing_is_done() -> None:
    table = Table(NOON)
    assert look(mender(Search(quick=False), Clock()), table) == 0
    assert table.executed == ["watcher_due", "watcher_hold"]


def test_a_long_search_lets_others_have_a_turn() -> None:
    clock = Clock()

    class Long(Search):
        def steps(self, bound: dict[int, int]) -> Iterator[None]:
            for _ in range(3):
                clock.now += SLICE_SECONDS + 1
                yield

    search, table = Long(), Table(NOON)
    made = mender(search, clock)
    assert [look(made, table) for _ in range(3)] == [0, 0, 0]
    assert table.executed == ["watcher_due"]
    assert search.closes == []
    assert look(made, table) == 1
    assert len(search.closes) == 1
    assert table.executed[-1] == "watcher_looked"


def test_a_search_that_fails_is_begun_again() -> None:
    class Failing(Search):
        def steps(self, bound: dict[int, int]) -> Iterator[None]:
            yield from super().steps(bound)
            if len(self.bounds) == 1:
                raise ServiceError("the broker is away")

    clock, search = Clock(), Failing()
    made = mender(search, clock)
    with pytest.raises(ServiceError):
        look(made, Table(NOON))
    assert len(search.closes) == 1
    clock.now += SEARCH_SECONDS + 1
    assert look(made, Table(NOON)) == 1


def test_searches_are_apart() -> None:
    clock, search = Clock(), Search()
    made = mender(search, clock)
    for seconds, searches in ((0, 1), (1, 1), (SEARCH_SECONDS - 2, 1), (1, 2)):
        clock.now += seconds
        look(made, Table(NOON))
        assert len(search.bounds) == searches


def test_a_search_that_took_much_cpu_is_followed_by_a_long_rest() -> None:
    clock, cost = Clock(), Clock()

    class Costly(Search):
        def steps(self, bound: dict[int, int]) -> Iterator[None]:
            yield from super().steps(bound)
            cost.now += 10

    search = Costly()
    made = mender(search, clock, cost)
    for seconds, searches in ((0, 1), (10 * SEARCH_SHARE - 1, 1), (1, 2)):
        clock.now += seconds
        look(made, Table(NOON))
        assert len(search.bounds) == searches


@pytest.mark.parametrize(
    ("minutes", "bound"),
    [
        (-1, {}),  # before it was known how far the sink was: everything retained
        (30, {3: 900, 4: 50}),
        (90, {3: 1000, 4: 60}),  # never behind the coerced record itself
    ],
)
def test_a_search_ends_where_the_sink_was_when_the_row_was_first_stored(minutes: int, bound: dict[int, int]) -> None:
    progress, search = SinkProgress(), Search()
    progress.note(NOON, {3: 900, 4: 50})
    progress.note(NOON + timedelta(hours=1), {3: 1500, 4: 60})
    look(mender(search, Clock(), progress=progress), Table(NOON + timedelta(minutes=minutes)))
    assert search.bounds == [bound]


def test_it_is_looked_at_again_later() -> None:
    assert list(LOOK_AGAIN_SECONDS) == sorted(LOOK_AGAIN_SECONDS)
    assert len(LOOK_AGAIN_SECONDS) == 2
