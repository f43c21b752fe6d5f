"""The COPY sink killed, cut off, stopped and crowded, briefly; `make chaos` does all of it at full length."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from metrics_pipeline import kafka, postgres
from metrics_pipeline.bench.table import start_sink_at
from metrics_pipeline.copy_sink.failpoint import PLACES
from metrics_pipeline_tests.chaos import scenarios, sink
from metrics_pipeline_tests.chaos.scenarios import Outcome
from metrics_pipeline_tests.chaos.stack import Place, own_stack

pytestmark = pytest.mark.integration

RATE = 1_500
"""Readings a second: little to compare afterwards."""
SESSION_MS = 6_000
"""The shortest that a broker allows: a dead worker's partitions are others' sooner."""


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Services of its own: one of the tests loses records on purpose."""
    with own_stack() as running:
        yield running


def passed(outcome: Outcome) -> Outcome:
    assert outcome.problems == [], outcome.facts
    return outcome


def test_dying_at_each_place_changes_nothing(place: Place) -> None:
    outcome = passed(scenarios.crashes(place, 1, workers=6, session_ms=SESSION_MS, rate=RATE, seconds=180))
    assert set(outcome.facts["kills"]) == set(PLACES)


def test_a_sink_that_commits_its_offsets_first_is_caught(place: Place) -> None:
    outcome = scenarios.crashes(
        place,
        1,
        places=["copied"],
        module="metrics_pipeline_tests.broken_sink",
        session_ms=SESSION_MS,
        rate=RATE,
        seconds=60,
    )
    assert outcome.report.counts.lost > 0
    assert "verify is NOT CLEAN" in outcome.problems
    # Stored after all, for the tests that come next.
    with postgres.connect_admin(place.settings, place.settings.metrics_database) as connection:
        start_sink_at(connection, {number: low for number, (low, _) in kafka.watermarks(place.settings).items()})
    healed = Outcome()
    healed.settle(place)
    passed(healed)


def test_postgres_and_broker_restart_under_load(place: Place) -> None:
    passed(scenarios.restarts(place, 1, rate=RATE))


def test_workers_come_and_go(place: Place) -> None:
    passed(scenarios.comings_and_goings(place, 12, session_ms=SESSION_MS, rate=RATE))


def test_a_worker_that_was_stopped_finds_itself_replaced(place: Place) -> None:
    passed(scenarios.zombies(place, 1, session_ms=SESSION_MS))


def test_an_answer_to_commit_that_is_lost_is_no_doubt(place: Place) -> None:
    passed(scenarios.lost_replies(place, 3))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is told by Linux only")
def test_big_messages_do_not_fill_the_memory(place: Place) -> None:
    passed(scenarios.memory(place, 100_000, 200))


@pytest.mark.parametrize(
    ("spans", "numbers"), [([], 0), ([(0, 3)], 3), ([(0, 3), (2, 5), (9, 10)], 6), ([(0, 9), (1, 2), (5, 8)], 9)]
)
def test_what_was_delivered_again_is_counted(spans: list[tuple[int, int]], numbers: int) -> None:
    assert sink.covered(spans) == numbers
