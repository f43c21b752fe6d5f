"""Whether the active sink gets ahead: known only to one who looks for a while. Time is the monotonic clock's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

import requests

from metrics_pipeline import kafka
from metrics_pipeline.answers import ForeignAnswerError, ask
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import CONNECTOR_GROUP, TOPIC, Settings, SinkKind
from metrics_pipeline.sinks import active
from metrics_pipeline.sinks.hanging import hanging_sessions

LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Look:
    """Where the active sink is at one moment.

    Attributes:
        kind: which sink that is.
        offsets: where it stands, by partition; nowhere in one of which it has stored nothing.
        waiting: records behind that.
    """

    kind: SinkKind = "connect"
    offsets: Mapping[int, int] = field(default_factory=dict)
    waiting: Mapping[int, int] = field(default_factory=dict)


def look_now(settings: Settings) -> Look:
    """Ask PostgreSQL and the broker.

    Raises:
        ServiceError: one of them cannot be used, or the topic does not exist.
    """
    place = active.position(settings)
    offsets = place.offsets if place.active == "copy" else kafka.committed(settings, CONNECTOR_GROUP)
    return Look(place.active, offsets, kafka.lag_from(settings, offsets).per_partition)


class ProgressWatch:
    """Looks again and again, and notices a partition with records waiting in which nothing is stored for SINK_STALL_SECONDS.

    Args:
        settings: where everything is.
        look: at the sink.
        holds: whether a partition holds a record at an offset or behind it.
        clock: seconds that never go back.
        sleep: between two looks of `wait`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        look: Callable[[Settings], Look] = look_now,
        holds: Callable[[Settings, int, int], bool] = kafka.holds_record,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._settings = settings
        self._look = look
        self._holds = holds
        self._clock = clock
        self._sleep = sleep
        self._kind: SinkKind | None = None
        self._rests: dict[int, tuple[int | None, float]] = {}

    def problem(self) -> str | None:
        """Look once; which partitions have rested for too long since the first look, or None.

        Raises:
            ServiceError: PostgreSQL or the broker cannot be used, or the topic does not exist.
        """
        self._note()
        return self._found()

    def _found(self) -> str | None:
        now, limit = self._clock(), self._settings.sink_stall_seconds
        stuck = {number: now - since for number, (_, since) in self._rests.items() if now - since > limit}
        for number in list(stuck):
            offset = self._rests[number][0]
            if offset is not None and not self._holds(self._settings, number, offset):
                del stuck[number]
                self._rests[number] = offset, now
        if not stuck:
            return None
        places = ", ".join(f"partition {number}, offset {self._rests[number][0] or 0}" for number in sorted(stuck))
        said = f"nothing is stored for {max(stuck.values()):.0f} s although records wait at topic {TOPIC}, {places}"
        return f"{said}: {where}" if (where := self._where()) else said

    def wait(self) -> str | None:
        """Look until each partition with records waiting has moved, which takes a second or two, or has rested for too long.

        Raises:
            ServiceError: PostgreSQL or the broker cannot be used, or the topic does not exist.
        """
        self._note()
        begun = self._clock()
        while any(since <= begun for _, since in self._rests.values()):
            if (problem := self._found()) is not None:
                return problem
            self._sleep(LOOK_SECONDS)
            self._note()
        return None

    def _note(self) -> None:
        look, now = self._look(self._settings), self._clock()
        if look.kind != self._kind:
            self._kind, self._rests = look.kind, {}
        before = self._rests
        self._rests = {
            number: before[number]
            if number in before and before[number][0] == look.offsets.get(number)
            else (look.offsets.get(number), now)
            for number, waiting in look.waiting.items()
            if waiting
        }

    def _where(self) -> str | None:
        """What hangs, as far as it can be told from here."""
        if self._kind == "copy":
            return copy_sink_problem(self._settings)
        try:
            return next(map(str, hanging_sessions(self._settings, self._settings.sink_stall_seconds / 2)), None)
        except ServiceError as error:
            return str(error)


def copy_sink_problem(settings: Settings) -> str | None:
    """None when the COPY sink of this machine answers that it is well, else why not."""
    place = urlsplit(settings.sink_http).netloc
    try:
        answer = ask(settings, f"{settings.sink_http}/health", timeout=5)
    except requests.RequestException as error:
        return f"no answer on {place} ({type(error).__name__})"
    except ForeignAnswerError as error:
        return str(error)
    if answer.ok:
        return None
    try:
        reason = str(answer.json().get("reason") or "")
    except (ValueError, AttributeError):
        reason = ""
    return f"{place} answers {answer.status_code}" + (f": {reason}" if reason else "")
