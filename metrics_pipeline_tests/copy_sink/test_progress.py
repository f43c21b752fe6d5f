"""What a worker notes of its threads, and when that is a stall."""

from __future__ import annotations

import pytest

from metrics_pipeline.copy_sink.failpoint import STEPS
from metrics_pipeline.copy_sink.progress import (
    BOUND_SECONDS,
    BOUNDED,
    IDLE,
    POSTGRES_STEPS,
    SHOWN,
    Moment,
    Progress,
    Stall,
    Step,
    stall_of,
)

LIMIT = 20.0


@pytest.mark.parametrize(
    ("moment", "silent", "waiting", "found"),
    [
        # Nothing to do, for ever, is no stall.
        (Moment(Step("fetch", 0.1), Step("wait", 500)), 0.5, False, None),
        (Moment(Step("wait", 500), Step("wait", 500)), 0.5, False, None),
        # Who waits for the other one is not the one who is stuck.
        (Moment(Step("writer", 40), Step("COPY", 30)), 0.5, False, Stall("COPY", 30)),
        (Moment(Step("writer", 40), Step("COPY", 3)), 0.5, False, None),
        (Moment(Step("decode", 21), Step("wait", 21)), 0.5, False, Stall("decode", 21)),
        (Moment(Step("fetch", 21), Step("wait", 0.1)), 0.5, False, Stall("fetch", 21)),
        # A long transaction that gets ahead is none, however long nothing is committed.
        (Moment(Step("writer", 90), Step("COPY", 0.5), 90), 0.5, False, None),
        # Records wait, everybody is at work, and nothing is read.
        (Moment(Step("fetch", 0.01), Step("wait", 0.1), 21), 0.5, False, Stall("fetch", 21)),
        (Moment(Step("fetch", 0.01), Step("wait", 0.1), 19), 0.5, False, None),
        # It knows why: another one would fare no better.
        (Moment(Step("fetch", 0.01), Step("wait", 0.1), 21), 0.5, True, None),
        # But a step that does not end is one even so.
        (Moment(Step("fetch", 0.01), Step("COMMIT", 21), 21), 0.5, True, Stall("COMMIT", 21)),
        # What ends by itself may take its time.
        (Moment(Step("ends", 21), Step("wait", 0.1)), 0.5, False, None),
        (Moment(Step("ends", 31), Step("wait", 0.1)), 0.5, False, Stall("ends", 31)),
        # Nobody reports.
        (Moment(Step("fetch", 0.01), Step("lock", 0.3)), 21, False, Stall("lock", 21, silent=True)),
        (Moment(Step("decode", 0.01), Step("wait", 0.3)), 21, True, Stall("decode", 21, silent=True)),
        (Moment(), 21, False, Stall("start", 21, silent=True)),
    ],
)
def test_what_is_a_stall(moment: Moment, silent: float, waiting: bool, found: Stall | None) -> None:
    assert BOUND_SECONDS > LIMIT
    assert stall_of(moment, LIMIT, silent, waiting=waiting) == found


def test_each_step_has_a_name_for_people() -> None:
    assert {*STEPS.values(), *POSTGRES_STEPS, *BOUNDED} <= SHOWN.keys()
    assert str(Stall("COPY", 61)) == "has stored nothing for 61 s, stuck in COPY"
    assert "does not answer for 7 s; the last that it told of: decode" in str(Stall("decode", 7, silent=True))
    assert not IDLE & POSTGRES_STEPS


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_steps_and_places_are_timed() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress.at("reader", "fetch")
    progress.at("writer", "COPY")
    progress.place(0, 7, waiting=True)
    progress.place(1, 9, waiting=True)
    clock.now += 5
    progress.at("reader", "fetch")
    progress.place(0, 8, waiting=True)
    # Sought again, it is nowhere for a moment, and then where it was.
    progress.place(1, None, waiting=True)
    progress.place(1, 9, waiting=True)
    assert progress.moment() == Moment(Step("fetch", 0), Step("COPY", 5), 5)
    assert progress.moment().shown() == "COPY for 5 s"
    progress.place(1, 9, waiting=False)
    clock.now += 1
    assert progress.moment().unmoved_seconds == 1
    progress.keep({1})
    progress.place(1, 10, waiting=True)
    assert progress.moment().unmoved_seconds == 0
    # A partition whose place cannot be found out rests, too.
    progress.place(2, None, waiting=True)
    clock.now += 3
    progress.place(2, None, waiting=True)
    progress.place(1, 11, waiting=True)
    assert progress.moment().unmoved_seconds == 3


def test_troubles_last_until_they_are_over() -> None:
    clock = Clock()
    progress = Progress(clock)
    assert progress.trouble() is None
    progress.fails("PostgreSQL", "refused")
    clock.now += 4
    progress.fails("PostgreSQL", "refused again")
    progress.fails("broker", "silent", since=98.0)
    assert progress.trouble() == ("refused again; silent", 6.0)
    progress.works("broker")
    assert progress.trouble() == ("refused again", 4.0)
    progress.works("PostgreSQL")
    progress.works("PostgreSQL")
    assert progress.trouble() is None
