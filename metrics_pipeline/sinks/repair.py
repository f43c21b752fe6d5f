"""The connector brought back after a failure: Connect itself never restarts a FAILED task. The COPY sink heals itself.

Run by a Dagster sensor and by the keeper of the embedded stack, since a PostgreSQL restart takes Dagster's own storage
down with it. Each keeps its own state; both at once are harmless, because only FAILED tasks are restarted.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Literal

from pydantic import BaseModel, ValidationError

from metrics_pipeline import kafka
from metrics_pipeline.errors import PipelineError, ServiceError
from metrics_pipeline.settings import CONNECTOR, CONNECTOR_GROUP, TOPIC, Settings, SinkKind
from metrics_pipeline.sinks import active as sinks
from metrics_pipeline.sinks import connector, moves
from metrics_pipeline.sinks.connector import ConnectClient, SinkState
from metrics_pipeline.sinks.hanging import HangingSession, end_sessions, hanging_sessions

FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 60.0
ATTEMPTS = 5
"""Restarts without progress at one offset after which the repair stops trying."""
LONGEST_PATIENCE_SECONDS = 600.0
"""Between two restarts of tasks that are stuck, at most: each one that did not help doubles the time."""

NOTE_SECONDS = 30.0
"""How long what the keeper saw last stands for the present."""

RECORD_BYTES = 2**20
"""Size of `repairs.jsonl` above which its older half goes."""

_VARYING = re.compile(r"\d+|'[^']*'|\([^)]*\)")


class LastOffset(BaseModel):
    """Where a partition stood, since when, and how many restarts did not move it."""

    offset: int
    since: float
    failures: int = 0


class StuckRestarts(BaseModel):
    """Restarts of all tasks because a partition did not move, and when the last one was."""

    count: int = 0
    last: float = 0.0


class RepairState(BaseModel):
    """What the repair remembers between two ticks; JSON, so that a sensor's cursor can hold it."""

    restarts: int = 0
    not_before: float = 0.0
    places: dict[int, LastOffset] = {}
    running_since: float = 0.0
    gave_up: str = ""
    gave_up_at: dict[int, int] = {}
    signature: str = ""
    active: SinkKind | None = None
    stuck: StuckRestarts = StuckRestarts()
    log: str = ""


Action = Literal["restart failed tasks", "restart all", "give up", "move offsets", "another log"]


@dataclass(frozen=True)
class Restart:
    """One restart that was asked of Connect, the decision to ask for no more, or what was done about another log or a growth."""

    at: str
    action: Action
    reason: str
    attempt: int


@dataclass(frozen=True)
class Tick:
    """The outcome of one look at the sink.

    Attributes:
        message: one line: how the sink is and what is done about it.
        healthy: everything runs and moves.
        events: what was done.
    """

    message: str
    healthy: bool
    events: list[Restart] = field(default_factory=list)


@dataclass(frozen=True)
class Offsets:
    """Per partition: the committed offset (the first retained one before any commit) and the records behind it."""

    committed: Mapping[int, int]
    waiting: Mapping[int, int]


def read_offsets(settings: Settings) -> Offsets | None:
    """Offsets of the sink's consumer group, or None when the broker does not tell."""
    try:
        committed = kafka.committed(settings, CONNECTOR_GROUP)
        marks = kafka.watermarks(settings)
    except ServiceError:
        return None
    places = {number: max(low, committed.get(number, low)) for number, (low, _) in marks.items()}
    return Offsets(places, {number: max(0, high - places[number]) for number, (_, high) in marks.items()})


def database_problem(settings: Settings) -> str | None:
    """Why PostgreSQL takes no connection now, or None when it does."""
    from metrics_pipeline import postgres

    try:
        postgres.connect(settings, "metrics_producer", connect_timeout=2).close()
    except PipelineError as error:
        return str(error)
    return None


class SinkRepair:
    """Restarts what failed with back-off, and stops when restarting cannot help.

    Args:
        settings: where Connect, the broker and PostgreSQL are.
        state: what `dump` returned after the tick before; with anything else it starts over.
        client: Connect.
        offsets: where the sink stands.
        database: why PostgreSQL takes no connection, or None.
        position: which sink is active, and how many sessions the COPY sink has.
        due: the move that the connector's offsets need.
        note: notes which log the topic's name stands for.
        hanging: the connector's transactions that have been open for some seconds.
        end: ends sessions of the connector.
        holds: whether a partition holds a record at an offset or behind it.
        clock: seconds that never go back, the same for all processes of a machine.
        jitter: a factor around 1 for each delay.
    """

    def __init__(
        self,
        settings: Settings,
        state: str | None = None,
        *,
        client: ConnectClient | None = None,
        offsets: Callable[[Settings], Offsets | None] = read_offsets,
        database: Callable[[Settings], str | None] = database_problem,
        position: Callable[[Settings], sinks.Position] = sinks.position,
        due: Callable[[Settings], moves.Move | None] = moves.due,
        note: Callable[[Settings], str | None] = moves.note,
        hanging: Callable[[Settings, float], list[HangingSession]] = hanging_sessions,
        end: Callable[[Settings, list[int]], int] = end_sessions,
        holds: Callable[[Settings, int, int], bool] = kafka.holds_record,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: random.uniform(0.8, 1.2),  # noqa: S311  # jitter is no secret
    ) -> None:
        self._settings = settings
        self._client = client or connector.client(settings, patience=2.0)
        self._offsets = offsets
        self._database = database
        self._position = position
        self._hanging = hanging
        self._end = end
        self._holds = holds
        self._due = due
        self._note = note
        self._clock = clock
        self._jitter = jitter
        self._state = _parse(state)

    def dump(self) -> str:
        """The state, to be handed to the next repair."""
        return self._state.model_dump_json()

    def tick(self) -> Tick:
        """Look at the sink once and do what is due. Never raises for a service that is away."""
        if self._remembers_another_clock():
            self._state = RepairState(active=self._state.active)
        try:
            if (copying := self._copying()) is not None:
                return copying
            sink = self._client.state(CONNECTOR)
            if (moved := self._moved(sink)) is not None:
                return moved
            if sink.connector in ("MISSING", "PAUSED", "STOPPED"):
                # A person's doing: leave it, and start over when it is back.
                self._state = RepairState(active="connect")
                return Tick(f"{sink.problems[0]}: not touched; the `provision` job brings it back", healthy=False)
            offsets = self._offsets(self._settings)
            if sink.failed or sink.connector == "FAILED":
                return self._failed(sink, offsets)
            return self._alive(sink, offsets)
        except PipelineError as error:
            return Tick(str(error), healthy=False)

    def _copying(self) -> Tick | None:
        """How the COPY sink is, when it is the active one."""
        try:
            position = self._position(self._settings)
        except PipelineError as error:
            # The one that was active still is: changing it takes PostgreSQL. A connector is repaired without.
            return Tick(str(error), healthy=False) if (self._state.active or self._settings.sink) == "copy" else None
        if position.active != "copy":
            self._state.active = "connect"
            return None
        with suppress(PipelineError):  # for the lag; its workers look, too
            self._note(self._settings)
        former, self._state = self._state.log, RepairState(active="copy", log=position.log)
        events = []
        if former and former != position.log:
            reason = f"topic {TOPIC} is another one: log {position.log}, before {former}; it is read from its beginning"
            events.append(self._event("another log", reason))
        if not position.sessions:
            return Tick(sinks.NO_WORKER, healthy=False, events=events)
        return Tick(f"the COPY sink stores the readings, in {position.sessions} sessions", healthy=True, events=events)

    def _moved(self, sink: SinkState) -> Tick | None:
        """What was done about a move of the connector's offsets, if one is due."""
        try:
            what = self._due(self._settings)
        except PipelineError:
            return None  # whatever is away, the rest of the repair names it
        stands = sink.connector in moves.STANDS_STILL
        if what is None or (not what.held and (sink.connector == "PAUSED" or (stands and what.growth))):
            return None  # stopped by a person: provisioning does it before it lets the connector run
        if not moves.move(self._settings, self._client, what, resume=what.held or not stands):
            return Tick(f"{what.reason}: the connector is stopped, and its consumers have not left yet", healthy=False)
        self._start_over()
        event = self._event("move offsets", what.reason)
        return Tick(f"offsets moved: {what.reason}", healthy=False, events=[event])

    def _alive(self, sink: SinkState, offsets: Offsets | None) -> Tick:
        if offsets is None:
            return Tick("the broker does not tell the sink's offsets", healthy=False)
        now = self._clock()
        self._watch(offsets, now)
        state = self._state
        state.running_since = (state.running_since or now) if sink.running else 0.0
        if stuck := self._stuck(offsets, now):
            return self._restart_stuck(stuck, now)
        state.stuck = StuckRestarts()
        if state.running_since and now - state.running_since > self._settings.sink_stall_seconds:
            self._start_over()
        elif not state.gave_up and sink.running and not self._held_up(offsets):
            # Not before what held it up moved: a task that fails at its first record shows RUNNING for a moment, too.
            state.restarts, state.not_before = 0, 0.0
        if state.gave_up:
            return Tick(state.gave_up, healthy=False)
        if sink.running:
            waiting = sum(offsets.waiting.values())
            return Tick(f"connector and {len(sink.tasks)} tasks RUNNING, {waiting} records waiting", healthy=True)
        return Tick("; ".join(sink.problems), healthy=False)

    def _failed(self, sink: SinkState, offsets: Offsets | None) -> Tick:
        now = self._clock()
        state = self._state
        state.running_since = 0.0
        if offsets is not None:
            self._watch(offsets, now)
        if state.gave_up and self._signature(sink) != state.signature:
            self._start_over()
        if state.gave_up:
            return Tick(state.gave_up, healthy=False)
        problems = "; ".join(sink.problems)
        if now < state.not_before:
            return Tick(f"{problems}; next restart in {state.not_before - now:.0f} s", healthy=False)
        if (problem := self._database(self._settings)) is not None:
            # Restarting now would fail for certain, and would use up the attempts.
            return Tick(f"{problems}; restarted when PostgreSQL is back: {problem}", healthy=False)
        if offsets is not None and (hopeless := self._hopeless(offsets)) is not None:
            return self._give_up(sink, hopeless)
        self._client.restart(CONNECTOR)
        if offsets is not None:
            for place in state.places.values():
                place.failures += 1
        delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** min(state.restarts, 10))
        state.restarts += 1
        state.not_before = now + delay * self._jitter()
        event = self._event("restart failed tasks", problems)
        return Tick(f"restarted (attempt {state.restarts}): {problems}", healthy=False, events=[event])

    def _give_up(self, sink: SinkState, where: list[int]) -> Tick:
        state = self._state
        place = _places(where, state.places) if where else f"topic {TOPIC}, before any record"
        cause = sink.failed[0].cause if sink.failed else sink.problems[0]
        state.gave_up = (
            f"the repair stopped trying: {ATTEMPTS} restarts without progress at {place}: {cause}. "
            "Mend the cause or skip the record (docs/troubleshooting.md), then run the `provision` job: it restarts the sink"
        )
        state.gave_up_at = {number: state.places[number].offset for number in where}
        state.signature = self._signature(sink)
        return Tick(state.gave_up, healthy=False, events=[self._event("give up", state.gave_up)])

    def _restart_stuck(self, stuck: list[int], now: float) -> Tick:
        state, limit = self._state, float(self._settings.sink_stall_seconds)
        longest = max(now - state.places[number].since for number in stuck)
        reason = f"no progress for {longest:.0f} s at {_places(stuck, state.places)}, although no task is FAILED"
        if (problem := self._database(self._settings)) is not None:
            return Tick(f"{reason}; restarted when PostgreSQL is back: {problem}", healthy=False)
        sessions = self._hanging(self._settings, limit / 2)
        waits = next((session for session in sessions if session.holders), None)
        if waits is not None:
            # New tasks would wait for the same.
            return Tick(f"{reason}; restarted when that lock is free: {waits}", healthy=False)
        reason = "; ".join([reason, *map(str, sessions[:1])])
        wait = state.stuck.last + min(limit * 2.0 ** (state.stuck.count - 1), LONGEST_PATIENCE_SECONDS) - now
        if state.stuck.count and wait > 0:
            return Tick(f"{reason}; restarted again in {wait:.0f} s", healthy=False)
        if sessions:
            # A task that was given up by Connect would keep its locks, and its successor would wait for them.
            self._end(self._settings, [session.pid for session in sessions])
        self._client.restart(CONNECTOR, only_failed=False)
        state.stuck = StuckRestarts(count=state.stuck.count + 1, last=now)
        return Tick(f"restarted all: {reason}", healthy=False, events=[self._event("restart all", reason)])

    def _event(self, action: Action, reason: str) -> Restart:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        return Restart(at, action, reason, self._state.restarts)

    def _start_over(self) -> None:
        """Forget failures, but not where the partitions stand and since when."""
        state = self._state
        state.restarts, state.not_before = 0, 0.0
        state.gave_up, state.gave_up_at, state.signature = "", {}, ""
        for place in state.places.values():
            place.failures = 0

    def _watch(self, offsets: Offsets, now: float) -> None:
        """Note where each partition stands; start over when one that made the repair give up has moved."""
        state = self._state
        before = state.places
        state.places = {
            number: before[number]
            if number in before and before[number].offset == offset
            else LastOffset(offset=offset, since=now)
            for number, offset in offsets.committed.items()
        }
        for number, place in state.places.items():
            if not offsets.waiting.get(number):
                place.since = now
        if any(offsets.committed.get(number) != offset for number, offset in state.gave_up_at.items()):
            self._start_over()

    def _held_up(self, offsets: Offsets) -> list[int]:
        """Partitions with records waiting that the last restarts did not move."""
        places = sorted(self._state.places.items())
        return [number for number, place in places if place.failures and offsets.waiting.get(number)]

    def _stuck(self, offsets: Offsets, now: float) -> list[int]:
        """Partitions with records waiting that rest for too long."""
        stuck = []
        for number, place in sorted(self._state.places.items()):
            if offsets.waiting.get(number) and now - place.since > self._settings.sink_stall_seconds:
                if self._holds(self._settings, number, place.offset):
                    stuck.append(number)
                else:
                    place.since = now
        return stuck

    def _remembers_another_clock(self) -> bool:
        """Whether what is remembered lies in the future: the machine was started anew since."""
        state, now = self._state, self._clock()
        past = [state.running_since, state.stuck.last, *(place.since for place in state.places.values())]
        return max(past) > now or state.not_before > now + 2 * LONGEST_DELAY_SECONDS

    def _hopeless(self, offsets: Offsets) -> list[int] | None:
        """The partitions that the last restarts did not move; empty when no record waits at all; None: go on trying."""
        places = self._state.places
        resting = [number for number in self._held_up(offsets) if places[number].failures >= ATTEMPTS]
        if resting:
            return resting
        nothing_waits = not any(offsets.waiting.values())
        return [] if nothing_waits and all(place.failures >= ATTEMPTS for place in places.values()) else None

    def _signature(self, sink: SinkState) -> str:
        """Differs when the failure or the connector's configuration does; values within messages do not count."""
        causes = sorted({_VARYING.sub("", task.cause) for task in sink.failed} | {sink.connector})
        config = self._client.config(CONNECTOR) or {}
        return sha256(json.dumps([causes, sorted(config.items())]).encode()).hexdigest()[:16]


def record(settings: Settings, events: list[Restart], source: str) -> None:
    """Append what was done to `repairs.jsonl` in the data folder, which outlasts PostgreSQL.

    Args:
        settings: where the data folder is.
        events: the outcome of a tick.
        source: who did it (`keeper`, `sensor`).
    """
    if not events:
        return
    path = settings.data_dir / "repairs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > RECORD_BYTES:
        lines = path.read_text("utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[len(lines) // 2 :]), "utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**asdict(event), "by": source}) + "\n" for event in events)


def note(settings: Settings, tick: Tick) -> None:
    """Leave the outcome of a look in `sink.json` in the data folder, for those who have only just begun to look."""
    folder = settings.data_dir
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / ".sink.json"
    scratch.write_text(json.dumps({"at": time.monotonic(), "healthy": tick.healthy, "message": tick.message}), "utf-8")
    scratch.replace(folder / "sink.json")


def noted_problem(settings: Settings) -> str | None:
    """What the last look, if it was a moment ago, found wrong with the sink."""
    try:
        noted = json.loads((settings.data_dir / "sink.json").read_text("utf-8"))
        fresh = 0 <= time.monotonic() - float(noted["at"]) < NOTE_SECONDS
        return str(noted["message"]) if fresh and not noted["healthy"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _parse(state: str | None) -> RepairState:
    try:
        return RepairState.model_validate_json(state or "{}")
    except ValidationError:  # a cursor of another version
        return RepairState()


def _places(numbers: list[int], places: Mapping[int, LastOffset]) -> str:
    return f"topic {TOPIC}, " + ", ".join(f"partition {number}, offset {places[number].offset}" for number in numbers)
