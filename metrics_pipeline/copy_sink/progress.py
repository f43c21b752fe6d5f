"""Where the threads of a worker are and since when, and whether that is a stall. All times are of the monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Thread = Literal["reader", "writer"]

IDLE: Final = frozenset({"", "wait", "writer"})
"""Steps of a thread that has nothing to do, or waits for the other one."""
POSTGRES_STEPS: Final = frozenset({"offsets", "connect", "ask", "lock", "COPY", "COMMIT"})
"""Steps that PostgreSQL has to answer."""
BOUNDED: Final = frozenset({"connect", "ends", "leave", "offsets"})
"""Steps made of requests that end by themselves, the longest after half a minute."""
BOUND_SECONDS: Final = 30.0
SHOWN: Final[Mapping[str, str]] = {
    "fetch": "fetch",
    "decode": "decode",
    "ends": "asking the broker where the topic ends",
    "offsets": "asking PostgreSQL for its offsets",
    "leave": "leaving the group",
    "connect": "connecting to PostgreSQL",
    "ask": "asking PostgreSQL whether it is its turn",
    "lock": "the lock of its offsets",
    "COPY": "COPY",
    "COMMIT": "COMMIT",
    "retry": "the pause before it tries again",
    "wait": "nothing to do",
    "start": "its start",
}
"""Each step as people read it."""


STALL_STEPS: Final = tuple(step for step in SHOWN if step not in IDLE)
"""Those in which a worker can be stuck."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a thread is at, and for how many seconds."""

    name: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Moment:
    """A worker's threads at one moment.

    Attributes:
        reader: what the reader is at.
        writer: what the writer is at.
        unmoved_seconds: how long the partition that has rested longest has had records waiting without being read on.
    """

    reader: Step = Step()
    writer: Step = Step()
    unmoved_seconds: float = 0.0

    def shown(self) -> str:
        """The step that the other thread, if any, waits for."""
        step = self.reader if self.writer.name in IDLE else self.writer
        return f"{step.name or 'start'} for {step.seconds:.0f} s"


@dataclass(frozen=True, slots=True)
class Stall:
    """A worker that does not get ahead.

    Attributes:
        step: where it is stuck: a key of `SHOWN`.
        seconds: for how long.
        silent: it does not even report.
    """

    step: str
    seconds: float
    silent: bool = False

    def __str__(self) -> str:
        if self.silent:
            return f"does not answer for {self.seconds:.0f} s; the last that it told of: {SHOWN[self.step]}"
        return f"has stored nothing for {self.seconds:.0f} s, stuck in {SHOWN[self.step]}"


@dataclass(slots=True)
class _Trouble:
    reason: str
    since: float


@dataclass(slots=True)
class _Rest:
    offset: int | None
    since: float


@dataclass(slots=True)
class Progress:
    """Noted by the threads of a worker, read by the one that reports; each note is a single assignment.

    Attributes:
        clock: seconds that never go back.
    """

    clock: Callable[[], float] = time.monotonic
    _steps: dict[Thread, tuple[str, float]] = field(default_factory=dict)
    _troubles: dict[str, _Trouble] = field(default_factory=dict)
    _rests: dict[int, _Rest] = field(default_factory=dict)

    def at(self, thread: Thread, step: str) -> None:
        """A thread begins a step, or gets ahead in it."""
        self._steps[thread] = (step, self.clock())

    def place(self, partition: int, offset: int | None, *, waiting: bool) -> None:
        """Where a partition is read on; None: not known yet. Without records waiting it cannot rest for too long."""
        rest = self._rests.get(partition)
        if rest is None or not waiting or (offset is not None and offset != rest.offset):
            known = rest.offset if rest else None
            self._rests[partition] = _Rest(known if offset is None else offset, self.clock())

    def keep(self, partitions: set[int]) -> None:
        """Forget the other partitions: they are not ours."""
        for number in self._rests.keys() - partitions:
            del self._rests[number]

    def fails(self, what: str, reason: str, since: float | None = None) -> None:
        """Something does not work, for a reason that is known; told until `works`."""
        known = self._troubles.get(what)
        begin = known.since if known else self.clock() if since is None else since
        self._troubles[what] = _Trouble(reason, begin)

    def works(self, what: str) -> None:
        """It does again."""
        self._troubles.pop(what, None)

    def trouble(self) -> tuple[str, float] | None:
        """What does not work, and for how many seconds; None when everything does."""
        troubles = list(self._troubles.values())
        if not troubles:
            return None
        reasons = "; ".join(dict.fromkeys(trouble.reason for trouble in troubles))
        return reasons, self.clock() - min(trouble.since for trouble in troubles)

    def moment(self) -> Moment:
        """Where everything is now."""
        now = self.clock()
        steps = {thread: Step(name, now - since) for thread, (name, since) in list(self._steps.items())}
        rests = [now - rest.since for rest in list(self._rests.values())]
        return Moment(steps.get("reader", Step()), steps.get("writer", Step()), max(rests, default=0.0))


def stall_of(moment: Moment, limit: float, silent: float, *, waiting: bool = False) -> Stall | None:
    """The stall that a worker is in, if it is in one.

    Args:
        moment: what it reported last.
        limit: seconds that it may take for a step, or be without progress.
        silent: seconds since that report.
        waiting: it knows why it does not get ahead.
    """
    if silent > limit:
        last = moment.reader.name if moment.writer.name in IDLE else moment.writer.name
        return Stall(last if last in SHOWN else "start", silent, silent=True)
    for step in (moment.writer, moment.reader):
        if step.name not in IDLE and step.seconds > (max(limit, BOUND_SECONDS) if step.name in BOUNDED else limit):
            return Stall(step.name, step.seconds)
    if not waiting and moment.writer.name in {*IDLE, "ask"} and moment.unmoved_seconds > limit:
        return Stall("fetch", moment.unmoved_seconds)
    return None
