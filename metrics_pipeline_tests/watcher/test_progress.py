"""How far the sink was when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from metrics_pipeline.watcher.progress import APART, SKEW, SinkProgress

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)


def progress(*samples: tuple[float, dict[int, int]]) -> SinkProgress:
    made = SinkProgress()
    for seconds, committed in samples:
        made.note(NOON + timedelta(seconds=seconds), committed)
    return made


def test_what_was_stored_at_a_moment_stands_behind_what_had_been_committed() -> None:
    known = progress((0, {0: 100, 1: 10}), (60, {0: 200, 1: 20}), (120, {0: 300, 1: 30}))
    assert known.before(NOON + timedelta(seconds=90)) == {0: 200, 1: 20}
    assert known.before(NOON + timedelta(seconds=600)) == {0: 300, 1: 30}


def test_clocks_may_differ() -> None:
    known = progress((0, {0: 100}), (60, {0: 200}))
    assert known.before(NOON + timedelta(seconds=60) + SKEW / 2) == {0: 100}
    assert known.before(NOON + timedelta(seconds=60) + SKEW) == {0: 200}


def test_before_it_began_nothing_is_known() -> None:
    assert SinkProgress().before(NOON) == {}
    assert progress((0, {0: 100})).before(NOON) == {}


def test_a_sink_that_went_back_stores_from_there() -> None:
    known = progress((0, {0: 100}), (60, {0: 40}), (120, {0: 300}))
    assert known.before(NOON + timedelta(seconds=30)) == {0: 40}
    assert known.before(NOON + timedelta(seconds=100)) == {0: 40}


def test_of_a_partition_that_came_later_nothing_is_known() -> None:
    known = progress((0, {0: 100}), (60, {0: 200, 1: 5}))
    assert known.before(NOON + timedelta(seconds=30)) == {0: 100}


def test_samples_are_kept_apart() -> None:
    known = progress((0, {0: 1}), (APART.total_seconds() / 2, {0: 2}))
    assert known.before(NOON + timedelta(hours=1)) == {0: 1}
