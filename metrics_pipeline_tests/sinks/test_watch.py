"""A sink that does not get ahead is noticed by one who looks for a while. Time is a number here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from metrics_pipeline.settings import Settings
from metrics_pipeline.sinks import watch
from metrics_pipeline.sinks.hanging import HangingSession
from metrics_pipeline.sinks.watch import Look, ProgressWatch
from metrics_pipeline_tests.fake_http import listening

pytestmark = pytest.mark.usefixtures("another_data_folder")

LIMIT = 20


@dataclass
class World:
    """A sink of two partitions, the second one read to its end."""

    look: Look = field(default_factory=lambda: Look("connect", {0: 40, 1: 100}, {0: 60, 1: 0}))
    now: float = 50.0
    happens: Callable[[], object] = lambda: None
    holds: bool = True

    def watch(self) -> ProgressWatch:
        settings = Settings(sink_stall_seconds=LIMIT)
        return ProgressWatch(
            settings,
            look=lambda _: self.look,
            holds=lambda *_: self.holds,
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.happens()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(watch, "hanging_sessions", lambda *_: [HangingSession(7, 21.0)])
    return World()


def test_a_partition_that_rests_with_records_waiting_is_named(world: World) -> None:
    found = world.watch()
    assert found.problem() is None
    world.now += LIMIT
    assert found.problem() is None
    world.now += 1
    assert found.problem() == (
        "nothing is stored for 21 s although records wait at topic metrics, partition 0, offset 40: "
        "PostgreSQL's session 7 is active in a transaction for 21 s"
    )
    world.look = Look("connect", {0: 41, 1: 100}, {0: 59, 1: 0})
    assert found.problem() is None


def test_the_end_of_a_partition_is_no_rest_and_the_other_sink_begins_anew(world: World) -> None:
    found = world.watch()
    found.problem()
    world.now += LIMIT + 1
    world.look = Look("connect", {0: 40, 1: 100}, {0: 0, 1: 0})
    assert found.problem() is None
    world.look = Look("connect", {0: 40, 1: 100}, {0: 60, 1: 3})
    assert found.problem() is None
    world.now += LIMIT + 1
    world.look = Look("copy", {0: 40, 1: 100}, {0: 60, 1: 3})
    assert found.problem() is None


def test_a_wait_ends_as_soon_as_everything_has_moved(world: World) -> None:
    begun = world.now

    def moves() -> None:
        world.look = Look("connect", {0: 45, 1: 100}, {0: 55, 1: 2})

    world.happens = moves
    assert world.watch().wait() is None
    assert world.now - begun == 1


def test_a_wait_ends_when_something_rests_for_too_long(world: World) -> None:
    begun = world.now
    assert "partition 0, offset 40" in str(world.watch().wait())
    assert world.now - begun == LIMIT + 1


def test_the_mark_of_a_transaction_at_the_end_is_not_waited_for(world: World) -> None:
    world.look, world.holds = Look("connect", {0: 99, 1: 100}, {0: 1, 1: 0}), False
    assert world.watch().wait() is None


def test_the_copy_sink_says_itself_where_it_is_stuck(world: World) -> None:
    answers = [(200, b"{}")]
    with listening(lambda request: request.reply(*answers[-1])) as server:
        settings = Settings(sink_port=server.server_port)
        place = f"127.0.0.1:{settings.sink_port}"
        assert watch.copy_sink_problem(settings) is None
        answers.append((503, json.dumps({"reason": "worker 1/2 has stored nothing for 31 s"}).encode()))
        assert watch.copy_sink_problem(settings) == f"{place} answers 503: worker 1/2 has stored nothing for 31 s"
        answers.append((500, b"<html>"))
        assert watch.copy_sink_problem(settings) == f"{place} answers 500"
    assert watch.copy_sink_problem(Settings(sink_port=1)) == "no answer on 127.0.0.1:1 (ConnectionError)"
