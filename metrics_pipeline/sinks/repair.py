"""The connector brought back after a failure: Connect itself never restarts a FAILED task. The COPY sink heals itself.

Where restarts do not help because of a record, the quarantine takes it (`quarantine`).

Run by a Dagster sensor and by the keeper of the embedded stack, since a PostgreSQL restart takes Dagster's own storage
down with it. Each keeps its own state; both at once are harmless, because only FAILED tasks are restarted, and the quarantine has a lock.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ValidationError

from metrics_pipeline import kafka
from metrics_pipeline.copy_sink.stretch import Stretch
from metrics_pipeline.errors import BusyError, PipelineError, ServiceError
from metrics_pipeline.settings import CONNECTOR, CONNECTOR_GROUP, TOPIC, Settings, SinkKind
from metrics_pipeline.sinks import active as sinks
from metrics_pipeline.sinks import connector, moves
from metrics_pipeline.sinks.connector import ConnectClient, SinkState
from metrics_pipeline.sinks.hanging import HangingSession, end_sessions, hanging_sessions
from metrics_pipeline.sinks.quarantine import Quarantine, Taken

FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 60.0
ATTEMPTS = 5
"""Restarts without progress at one offset after which the repair stops trying."""
LONGEST_PATIENCE_SECONDS = 600.0
"""Between two restarts of tasks that are stuck, at most: each one that did not help doubles the time."""

NOTE_SECONDS = 30.0
"""How long what the keeper saw last stands for the present."""

RESTARTS_WITH_A_BAD_RECORD = 1
"""The same where the trace names what lies in a record; none soon after a quarantine."""
SETTLE_SECONDS = 2.0
"""How long the connector is left alone after a quarantine."""
LONGEST_WAIT_SECONDS = 30.0
"""Between two looks at a database that cannot store, which costs it little."""

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
    waits: int = 0
    waits_for: str = ""


Action = Literal["restart failed tasks", "restart all", "quarantine", "wait", "give up", "move offsets", "another log"]


@dataclass(frozen=True)
class Restart:
    """One thing that was done: a restart, a quarantine, a move of offsets, or the decision to try no more.

    Attributes:
        at: when.
        action: what.
        reason: why, for people.
        attempt: how many restarts there were.
        stretches: what a quarantine took, by partition.
    """

    at: str
    action: Action
    reason: str
    attempt: int
    stretches: tuple[Stretch, ...] = ()

    def document(self) -> dict[str, Any]:
        """For JSON; without what it has not."""
        return {name: value for name, value in asdict(self).items() if value != ()}


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


class Takes(Protocol):
    """What is used of `quarantine.Quarantine`."""

    def unfinished(self) -> int | None:
        """See there."""

    def alone(self) -> AbstractContextManager[None]:
        """See there."""

    def followed_closely(self) -> bool:
        """See there."""

    def finish(self) -> Taken | None:
        """See there."""

    def take(self, partitions: list[int] | None, cause: str, *, though_good: bool = False) -> Taken:
        """See there."""


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
        quarantine: takes the records that restarts do not get past.
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
        quarantine: Takes | None = None,
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
        self._quarantine: Takes = quarantine or Quarantine(settings)
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
            sink = self._ask()
            if (finishing := self._unfinished(sink)) is not None:
                return finishing
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

    def _ask(self) -> SinkState:
        try:
            return self._client.state(CONNECTOR)
        except PipelineError:
            # The topic may be made anew, or grow, while Connect is away: then as well it has to be known what it was before.
            with suppress(PipelineError):
                self._note(self._settings)
            raise

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
        with self._quarantine.alone():
            done = moves.move(self._settings, self._client, what, resume=what.held or not stands)
        if not done:
            return Tick(f"{what.reason}: the connector is stopped, and its consumers have not left yet", healthy=False)
        self._start_over()
        event = self._event("move offsets", what.reason)
        return Tick(f"offsets moved: {what.reason}", healthy=False, events=[event])

    def _unfinished(self, sink: SinkState) -> Tick | None:
        """End a quarantine that died, or leave the connector to the one that has it."""
        try:
            if self._quarantine.unfinished() is None:
                return None
            taken = self._quarantine.finish()
        except BusyError as busy:
            return Tick(str(busy), healthy=False)
        except PipelineError as error:
            if sink.connector != "STOPPED":
                return None
            return Tick(
                f"{sink.problems[0]}, by a person or by a quarantine that is not finished: {error}", healthy=False
            )
        if not taken or not taken.stretches:
            if sink.connector != "STOPPED":
                return None
            return Tick("a quarantine had died before it stored anything: the connector goes on", healthy=False)
        return self._taken(taken, "finished what another one had begun")

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
        if offsets is not None and (hopeless := self._hopeless(sink, offsets)) is not None:
            if not hopeless or not self._settings.sink_quarantine:
                return self._give_up(sink, hopeless)
            if (outcome := self._take(sink, hopeless)) is not None:
                return outcome
        self._client.restart(CONNECTOR)
        if offsets is not None:
            for place in state.places.values():
                place.failures += 1
        delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** min(state.restarts, 10))
        state.restarts += 1
        state.not_before = now + delay * self._jitter()
        event = self._event("restart failed tasks", problems)
        return Tick(f"restarted (attempt {state.restarts}): {problems}", healthy=False, events=[event])

    def _take(self, sink: SinkState, where: list[int]) -> Tick | None:
        """Let the quarantine take what restarts do not get past; None when there is something to be tried again."""
        state = self._state
        cause = sink.failed[0].cause if sink.failed else sink.problems[0]
        try:
            taken = self._quarantine.take(where, cause, though_good=sink.names_a_record)
        except BusyError as busy:
            return Tick(str(busy), healthy=False)
        except PipelineError as error:
            return self._wait(sink, str(error))
        if taken.stretches:
            return self._taken(taken, cause)
        if state.waits_for:
            # PostgreSQL stores again, and it was no record: what failed may run now.
            self._start_over()
            return None
        return self._give_up(sink, where, f"none of the next {taken.searched:,} records of a partition is bad")

    def _take_resting(self, where: list[int], reason: str) -> Tick | None:
        """Let the quarantine take dead letters that rest: the connector commits none as long as nothing is stored behind it."""
        if not self._settings.sink_quarantine:
            return None
        try:
            taken = self._quarantine.take(where, reason)
        except BusyError as busy:
            return Tick(str(busy), healthy=False)
        except PipelineError:
            return None  # whatever it is, new tasks may get over it
        return self._taken(taken, reason) if taken.stretches else None

    def _taken(self, taken: Taken, cause: str) -> Tick:
        reasons = ", ".join(f"{count:,} {name}" for name, count in sorted(taken.reasons.items()))
        parts = [*map(str, taken.stretches), *([f"rejected: {reasons}"] if reasons else []), cause]
        said = "; ".join([*parts, *([f"not all of it: {taken.problem}"] if taken.problem else [])])
        event = self._event("quarantine", said, taken.stretches)
        self._start_over()
        self._state.not_before = self._clock() + SETTLE_SECONDS
        return Tick(f"quarantined: {said}", healthy=False, events=[event])

    def _wait(self, sink: SinkState, problem: str) -> Tick:
        """Nothing is wrong with a record as long as nothing at all can be stored."""
        state = self._state
        delay = min(LONGEST_WAIT_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** min(state.waits, 10)) * self._jitter()
        state.waits += 1
        state.not_before = self._clock() + delay
        said = f"{'; '.join(sink.problems)}; nothing is quarantined: {problem}"
        new = _VARYING.sub("", problem) != _VARYING.sub("", state.waits_for)
        state.waits_for = problem
        events = [self._event("wait", said)] if new else []
        return Tick(f"{said}; tried again in {delay:.0f} s", healthy=False, events=events)

    def _give_up(self, sink: SinkState, where: list[int], found: str = "") -> Tick:
        state = self._state
        place = _places(where, state.places) if where else f"topic {TOPIC}, before any record"
        cause = sink.failed[0].cause if sink.failed else sink.problems[0]
        restarts = max((state.places[number].failures for number in where), default=ATTEMPTS)
        state.gave_up = (
            f"the repair stopped trying: {restarts} restarts without progress at {place}: {cause}. "
            + (f"{found}. ".capitalize() if found else "")
            + "Mend the cause (docs/troubleshooting.md), then run the `provision` job: it restarts the sink"
            + (
                "; or let `metrics-pipeline rejects quarantine` store the good records and reject the bad ones"
                if where and not self._settings.sink_quarantine
                else ""
            )
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
        if not sessions and (taken := self._take_resting(stuck, reason)) is not None:
            return taken
        if sessions:
            # A task that was given up by Connect would keep its locks, and its successor would wait for them.
            self._end(self._settings, [session.pid for session in sessions])
        self._client.restart(CONNECTOR, only_failed=False)
        state.stuck = StuckRestarts(count=state.stuck.count + 1, last=now)
        return Tick(f"restarted all: {reason}", healthy=False, events=[self._event("restart all", reason)])

    def _event(self, action: Action, reason: str, stretches: tuple[Stretch, ...] = ()) -> Restart:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        return Restart(at, action, reason, self._state.restarts, stretches)

    def _start_over(self) -> None:
        """Forget failures, but not where the partitions stand and since when."""
        state = self._state
        state.restarts, state.not_before = 0, 0.0
        state.gave_up, state.gave_up_at, state.signature = "", {}, ""
        state.waits, state.waits_for = 0, ""
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

    def _hopeless(self, sink: SinkState, offsets: Offsets) -> list[int] | None:
        """The partitions that the last restarts did not move; empty when no record waits at all; None: go on trying."""
        places = self._state.places
        enough = self._enough(sink)
        if not enough:
            return sorted(number for number, waiting in offsets.waiting.items() if waiting)
        resting = [number for number in self._held_up(offsets) if places[number].failures >= enough]
        if resting:
            return resting
        nothing_waits = not any(offsets.waiting.values())
        return [] if nothing_waits and all(place.failures >= ATTEMPTS for place in places.values()) else None

    def _enough(self, sink: SinkState) -> int:
        """Restarts without progress after which another one does not help either."""
        if not self._settings.sink_quarantine or not sink.names_a_record:
            return ATTEMPTS
        return 0 if self._quarantine.followed_closely() else RESTARTS_WITH_A_BAD_RECORD

    def _signature(self, sink: SinkState) -> str:
        """Differs when the failure or the connector's configuration does; values within messages do not count."""
        causes = sorted({_VARYING.sub("", task.cause) for task in sink.failed} | {sink.connector})
        config = self._client.config(CONNECTOR) or {}
        chosen = [self._settings.sink_quarantine] if self._settings.sink_quarantine else []
        return sha256(json.dumps([causes, sorted(config.items()), chosen]).encode()).hexdigest()[:16]


def quarantine_once(settings: Settings) -> Taken:
    """Take what a connector with FAILED tasks cannot pass, whatever the settings and the repair say; noted in `repairs.jsonl`.

    Raises:
        ServiceError: nothing is FAILED, or a part cannot be used: see `quarantine.Quarantine.take`.
        BusyError: a quarantine is under way.
    """
    quarantine = Quarantine(settings)
    if quarantine.unfinished() is not None:
        taken = quarantine.finish() or Taken()
        cause = "finished what another one had begun"
    else:
        sink = connector.sink_state(settings)
        if not sink.failed:
            raise ServiceError(
                f"no task is FAILED, so no record stops the connector ({'; '.join(sink.problems) or 'all of it runs'}): "
                "there is nothing to quarantine"
            )
        cause = sink.failed[0].cause
        taken = quarantine.take(None, cause, though_good=sink.names_a_record)
    if taken.stretches:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        record(settings, [Restart(at, "quarantine", cause, 0, taken.stretches)], "command")
    return taken


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
        file.writelines(json.dumps({**event.document(), "by": source}) + "\n" for event in events)


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
