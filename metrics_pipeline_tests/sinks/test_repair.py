"""The repair restarts what failed with back-off, and knows when that cannot help. Time is a number here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from metrics_pipeline.copy_sink.stretch import Stretch
from metrics_pipeline.errors import BusyError, ServiceError
from metrics_pipeline.settings import CONNECTOR, Settings
from metrics_pipeline.sinks import connector, repair
from metrics_pipeline.sinks.active import NO_WORKER, Position
from metrics_pipeline.sinks.connector import ConnectClient
from metrics_pipeline.sinks.hanging import HangingSession
from metrics_pipeline.sinks.moves import Move
from metrics_pipeline.sinks.quarantine import Taken
from metrics_pipeline.sinks.repair import ATTEMPTS, Offsets, SinkRepair, Tick
from metrics_pipeline_tests.fake_connect import FakeConnect, serving
from metrics_pipeline_tests.fake_sinks import FakeQuarantine

STALL_SECONDS = Settings().sink_stall_seconds
POISON = "org.apache.kafka.connect.errors.ConnectException: x\nCaused by: org.postgresql.util.PSQLException: ERROR: bad row 17"


@dataclass
class World:
    """Everything that the repair sees. Offsets: two partitions of a hundred records, the second one read to its end."""

    connect: FakeConnect
    now: float = 1000.0
    database: str | None = None
    committed: dict[int, int] | None = field(default_factory=lambda: {0: 40, 1: 100})
    end: int = 100
    state: str | None = None
    position: Position = field(default_factory=Position)
    away: bool = False
    move: Move | None = None
    quarantine: FakeQuarantine = field(default_factory=FakeQuarantine)
    settings: Settings = field(default_factory=Settings)
    hanging: list[HangingSession] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    holds: bool = True
    noted: int = 0

    def look(self, settings: Settings) -> Position:
        if self.away:
            raise ServiceError("PostgreSQL at fake cannot be reached")
        return self.position

    def offsets(self, settings: Settings) -> Offsets | None:
        if self.committed is None:
            return None
        return Offsets(
            dict(self.committed), {number: max(0, self.end - offset) for number, offset in self.committed.items()}
        )

    def tick(self, seconds: float = 1.0) -> Tick:
        """Some time later, by a repair that knows only what the one before wrote down: so a sensor runs it."""
        self.now += seconds
        sink = SinkRepair(
            self.settings,
            self.state,
            client=ConnectClient(self.connect.url, patience=0.1),
            offsets=self.offsets,
            database=lambda _settings: self.database,
            position=self.look,
            hanging=lambda _settings, _seconds: self.hanging,
            end=self.end_sessions,
            holds=lambda *_: self.holds,
            due=lambda _settings: self.move,
            note=self.note,
            quarantine=self.quarantine,
            clock=lambda: self.now,
            jitter=lambda: 1.0,
        )
        outcome = sink.tick()
        self.state = sink.dump()
        return outcome

    def note(self, _settings: Settings) -> None:
        self.noted += 1

    def end_sessions(self, _settings: Settings, pids: list[int]) -> int:
        self.ended += pids
        return len(pids)

    def until_given_up(self) -> Tick:
        for _ in range(300):
            outcome = self.tick()
            if [event.action for event in outcome.events] == ["give up"]:
                return outcome
        raise AssertionError("never gave up")

    @property
    def restarts(self) -> list[str]:
        return [request for request in self.connect.requests if "/restart" in request]


@pytest.fixture
def world() -> Iterator[World]:
    with serving() as fake:
        ConnectClient(fake.url).put(CONNECTOR, connector.connector_config())
        yield World(fake)


def test_a_sink_that_runs_is_left_alone(world: World) -> None:
    outcome = world.tick()
    assert outcome == Tick("connector and 2 tasks RUNNING, 60 records waiting", healthy=True)
    assert world.restarts == []


def test_failed_tasks_are_restarted_and_nothing_else(world: World) -> None:
    world.connect.fail(CONNECTOR, POISON, 1)
    outcome = world.tick()
    assert [event.action for event in outcome.events] == ["restart failed tasks"]
    assert "bad row 17" in outcome.events[0].reason
    assert world.restarts == [f"POST /connectors/{CONNECTOR}/restart?includeTasks=true&onlyFailed=true"]
    world.committed = {0: 50, 1: 100}
    assert world.tick().healthy


def test_restarts_come_at_growing_distances(world: World) -> None:
    world.connect.poison = POISON
    world.connect.fail(CONNECTOR, POISON)
    times = []
    for _ in range(200):
        world.committed = {0: (world.committed or {})[0] + 1, 1: 100}  # it moves: the repair goes on trying
        if world.tick().events:
            times.append(world.now)
    assert [int(b - a) for a, b in pairwise(times)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_progress_begins_the_distances_anew(world: World) -> None:
    for _ in range(3):
        world.connect.fail(CONNECTOR, POISON)
        assert world.tick(100).events
        world.committed = {0: (world.committed or {})[0] + 5, 1: 100}
        assert world.tick().healthy
    world.connect.fail(CONNECTOR, POISON)
    (event,) = world.tick().events
    assert event.attempt == 1


def test_after_repeated_failures_at_one_offset_it_stops_and_says_where_and_why(world: World) -> None:
    world.connect.poison = POISON
    world.connect.fail(CONNECTOR, POISON)
    outcome = world.until_given_up()
    assert len(world.restarts) == ATTEMPTS
    assert f"{ATTEMPTS} restarts without progress at topic metrics, partition 0, offset 40: " in outcome.message
    assert "PSQLException: ERROR: bad row 17" in outcome.message
    assert "`provision`" in outcome.message
    for _ in range(100):
        again = world.tick(10)
        assert (again.message, again.events) == (outcome.message, [])
    assert len(world.restarts) == ATTEMPTS


def test_healthy_partitions_that_move_do_not_hide_the_one_that_is_held_up(world: World) -> None:
    world.connect.poison = POISON
    world.connect.fail(CONNECTOR, POISON)
    world.committed, world.end = {0: 40, 1: 50}, 1000
    for _ in range(300):
        world.committed[1] += 1
        outcome = world.tick()
        if [event.action for event in outcome.events] == ["give up"]:
            break
    assert "at topic metrics, partition 0, offset 40:" in outcome.message
    assert "partition 1" not in outcome.message


def test_a_task_that_shows_running_between_failures_is_no_progress(world: World) -> None:
    world.connect.fail(CONNECTOR, POISON)
    for _ in range(200):
        outcome = world.tick()
        if [event.action for event in outcome.events] == ["give up"]:
            break
        world.tick(0.5)  # it runs for a moment …
        world.connect.fail(CONNECTOR, POISON)  # … and fails at the same record
    assert len(world.restarts) == ATTEMPTS
    assert "offset 40" in outcome.message


def test_a_connector_that_cannot_start_before_any_record_is_given_up_too(world: World) -> None:
    world.committed = {0: 100, 1: 100}
    world.connect.poison = "org.postgresql.util.PSQLException: FATAL: password authentication failed"
    world.connect.fail(CONNECTOR, world.connect.poison)
    assert "topic metrics, before any record: org.postgresql" in world.until_given_up().message


def given_up(world: World) -> None:
    world.connect.poison = POISON
    world.connect.fail(CONNECTOR, POISON)
    world.until_given_up()
    world.connect.poison = ""
    world.connect.requests.clear()


def test_it_tries_again_when_the_offset_moved(world: World) -> None:
    given_up(world)
    world.committed = {0: 41, 1: 100}
    assert world.tick(60).events
    assert world.tick().healthy


def test_it_tries_again_when_the_configuration_changed(world: World) -> None:
    given_up(world)
    world.connect.configs[CONNECTOR]["batch.size"] = "1"
    assert world.tick(60).events


def test_it_tries_again_when_the_failure_is_another_one(world: World) -> None:
    given_up(world)
    world.connect.fail(CONNECTOR, "java.lang.OutOfMemoryError: heap")
    assert world.tick(60).events


def test_other_numbers_in_the_same_failure_are_not_another_one(world: World) -> None:
    given_up(world)
    world.connect.fail(CONNECTOR, POISON.replace("17", "42"))
    assert world.tick(60).events == []


@pytest.mark.parametrize("state", ["STOPPED", "PAUSED"])
def test_a_person_who_stops_the_connector_is_not_overruled_and_begins_it_anew(world: World, state: str) -> None:
    given_up(world)
    world.connect.states[CONNECTOR] = state
    outcome = world.tick()
    assert (outcome.healthy, outcome.events) == (False, [])
    assert f"is {state}: not touched" in outcome.message
    world.connect.states[CONNECTOR] = "RUNNING"
    assert world.tick().events


def test_a_deleted_connector_is_said_to_be_missing(world: World) -> None:
    given_up(world)
    ConnectClient(world.connect.url).delete(CONNECTOR)
    assert "does not exist" in world.tick().message
    assert json.loads(world.state or "")["gave_up"] == ""


def test_running_again_for_long_ends_it_even_without_records(world: World) -> None:
    given_up(world)
    world.committed = {0: 40, 1: 100}
    world.end = 40
    world.connect.start(CONNECTOR)
    assert not world.tick().healthy
    assert world.tick(STALL_SECONDS + 1).healthy


def test_a_second_repair_that_still_tries_does_not_wake_the_first(world: World) -> None:
    """Sensor and keeper count apart: the restarts of one must not look like a person's to the other."""
    given_up(world)
    first = world.state
    world.connect.poison = POISON
    world.state = None
    for _ in range(100):
        world.tick()
        mine, world.state = world.state, first
        assert world.tick(0).events == []
        first, world.state = world.state, mine
    assert len(world.restarts) == ATTEMPTS


def test_nothing_is_restarted_while_postgresql_is_away_however_long(world: World) -> None:
    world.connect.fail(CONNECTOR, POISON)
    world.database = "PostgreSQL at x cannot be reached"
    for _ in range(50):
        outcome = world.tick(10)
        assert outcome.events == []
    assert "restarted when PostgreSQL is back: PostgreSQL at x cannot be reached" in outcome.message
    world.database = None
    assert world.tick().events


def test_an_unknown_offset_never_makes_it_give_up(world: World) -> None:
    world.committed = None
    world.connect.poison = POISON
    world.connect.fail(CONNECTOR, POISON)
    for _ in range(20):
        assert [event.action for event in world.tick(61).events] == ["restart failed tasks"]


def test_running_without_progress_is_restarted_whole_once_per_wait(world: World) -> None:
    world.tick()
    assert world.tick(STALL_SECONDS).events == []
    outcome = world.tick(2)
    assert [event.action for event in outcome.events] == ["restart all"]
    assert "partition 0, offset 40" in outcome.message
    assert world.restarts == [f"POST /connectors/{CONNECTOR}/restart?includeTasks=true&onlyFailed=false"]
    assert world.tick(STALL_SECONDS - 5).events == []
    assert world.tick(10).events


def test_what_does_not_move_is_not_healthy_because_it_was_restarted_and_that_less_and_less_often(world: World) -> None:
    world.tick()
    times = []
    for _ in range(3000):
        outcome = world.tick()
        assert outcome.healthy == (world.now - 1001 <= STALL_SECONDS), outcome.message
        if outcome.events:
            times.append(world.now)
    waits = [round(after - before) for before, after in pairwise(times)]
    assert waits[:5] == [STALL_SECONDS, 2 * STALL_SECONDS, 4 * STALL_SECONDS, 600, 600]
    world.committed = {0: 41, 1: 100}
    assert world.tick().healthy
    # When it moved once, the waits begin anew.
    assert [event.action for event in world.tick(STALL_SECONDS + 1).events] == ["restart all"]


def test_a_setting_says_how_long_it_may_not_move(world: World) -> None:
    world.settings = Settings(sink_stall_seconds=10)
    world.tick()
    assert world.tick(10).healthy
    assert [event.action for event in world.tick(1).events] == ["restart all"]


def test_dead_letters_that_rest_are_taken_and_nothing_is_restarted(world: World) -> None:
    world.quarantine.answer = Taken((Stretch(0, 40, 41, 0, 1),), {"bad_json": 1})
    world.tick()
    outcome = world.tick(STALL_SECONDS + 1)
    assert [event.action for event in outcome.events] == ["quarantine"]
    assert (world.restarts, world.quarantine.taken) == ([], [[0]])


def test_without_a_quarantine_what_rests_is_restarted(world: World) -> None:
    world.settings = Settings(sink_quarantine=False)
    world.tick()
    assert [event.action for event in world.tick(STALL_SECONDS + 1).events] == ["restart all"]
    assert world.quarantine.taken == []


def test_the_transactions_that_hang_are_ended_with_the_tasks(world: World) -> None:
    world.tick()
    world.hanging = [HangingSession(77, 80.2, "active", "Client/ClientRead"), HangingSession(78, 79.0)]
    outcome = world.tick(STALL_SECONDS + 1)
    assert "PostgreSQL's session 77 is active in a transaction for 80 s, waits for Client/ClientRead" in outcome.message
    assert (world.ended, len(world.restarts)) == ([77, 78], 1)


def test_a_lock_of_somebody_else_is_named_and_waited_for(world: World) -> None:
    world.tick()
    world.hanging = [HangingSession(77, 80.2, "active", "Lock/relation", ("pid 9 (psql, role me)",))]
    for _ in range(10):
        outcome = world.tick(STALL_SECONDS + 1)
        assert "PostgreSQL's session 77 waits for a lock that pid 9 (psql, role me) holds" in outcome.message
        assert (outcome.healthy, outcome.events) == (False, [])
    world.hanging = []
    assert world.tick().events
    assert world.ended == []


def test_the_mark_of_a_transaction_at_the_end_is_not_waited_for(world: World) -> None:
    world.committed, world.holds = {0: 99, 1: 100}, False
    for _ in range(10):
        assert world.tick(STALL_SECONDS + 1).healthy
    world.holds = True
    assert world.tick(STALL_SECONDS + 1).events


def test_what_was_remembered_before_the_machine_started_anew_is_forgotten(world: World) -> None:
    world.tick()
    world.now = 5.0
    assert world.tick().healthy
    assert world.tick(STALL_SECONDS).healthy
    assert world.tick(2).events


def test_a_partition_at_its_end_is_not_stuck(world: World) -> None:
    world.committed = {0: 100, 1: 100}
    for _ in range(10):
        assert world.tick(STALL_SECONDS).healthy
    world.end = 101  # one new record: the wait begins now
    assert world.tick().healthy


def test_one_stuck_partition_is_seen_although_the_other_moves(world: World) -> None:
    world.end = 10**6
    actions = []
    for _ in range(10):
        assert world.committed is not None
        world.committed[1] += 10
        actions += [event.action for event in world.tick(10).events]
    assert actions == ["restart all"]


def test_connect_away_is_said_and_no_crash(world: World) -> None:
    world.connect.url = "http://127.0.0.1:1"
    outcome = world.tick()
    assert not outcome.healthy
    assert "cannot be reached" in outcome.message
    assert world.noted == 1, "a growth of the topic meanwhile would go unnoticed"


def test_unassigned_tasks_are_waited_for(world: World) -> None:
    world.connect.task_states[CONNECTOR][1] = ("UNASSIGNED", "")
    assert world.tick() == Tick("task 1 is UNASSIGNED", healthy=False)


@pytest.mark.parametrize("cursor", ["", "nonsense", '{"restarts": "many"}', '{"unknown": 1}'])
def test_a_cursor_of_another_version_begins_anew(world: World, cursor: str) -> None:
    world.state = cursor
    assert world.tick().healthy


def test_restarts_are_recorded_in_a_file_that_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(pipeline_data_dir=tmp_path / "new")
    event = repair.Restart("2026-11-22T16:00:00+00:00", "restart all", "because", 1)
    repair.record(settings, [], "keeper")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(repair, "RECORD_BYTES", 1000)
    for _ in range(100):
        repair.record(settings, [event], "keeper")
    path = tmp_path / "new" / "repairs.jsonl"
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1]) == {
        "at": "2026-11-22T16:00:00+00:00",
        "action": "restart all",
        "reason": "because",
        "attempt": 1,
        "by": "keeper",
    }
    assert path.stat().st_size < 1500


def test_what_a_keeper_saw_a_moment_ago_is_told_to_those_who_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(pipeline_data_dir=tmp_path / "new")
    assert repair.noted_problem(settings) is None
    repair.note(settings, Tick("no progress for 80 s", healthy=False))
    assert repair.noted_problem(settings) == "no progress for 80 s"
    monkeypatch.setattr(repair, "NOTE_SECONDS", 0.0)
    assert repair.noted_problem(settings) is None
    monkeypatch.undo()
    repair.note(settings, Tick("all is well", healthy=True))
    assert repair.noted_problem(settings) is None
    (tmp_path / "new" / "sink.json").write_text("[]")
    assert repair.noted_problem(settings) is None


def test_the_copy_sink_is_left_to_itself_and_its_absence_is_said(world: World) -> None:
    world.connect.fail(CONNECTOR, POISON)
    world.position = Position("copy", {}, 2)
    outcome = world.tick()
    assert outcome == Tick("the COPY sink stores the readings, in 2 sessions", healthy=True)
    world.position = Position("copy", {}, 0)
    assert world.tick() == Tick(NO_WORKER, healthy=False)
    assert world.restarts == []


def test_while_postgresql_is_away_the_sink_is_the_one_it_was(world: World) -> None:
    world.connect.fail(CONNECTOR, POISON)
    world.position = Position("copy", {}, 2)
    world.tick()
    world.away = True
    assert world.tick() == Tick("PostgreSQL at fake cannot be reached", healthy=False)
    world.position, world.away = Position(), False
    assert [event.action for event in world.tick().events] == ["restart failed tasks"]
    world.away = True
    assert world.tick().message.startswith("connector"), "a connector is looked at without PostgreSQL"


# --- Quarantine --------------------------------------------------------------------------------------------------

NUL = (
    "org.apache.kafka.connect.errors.ConnectException: x\nCaused by: org.postgresql.util.PSQLException: "
    'ERROR: invalid byte sequence for encoding "UTF8": 0x00'
)
TAKEN = Taken((Stretch(0, 40, 60, 19, 1),), {"bad_tags": 1})


def stuck(world: World, trace: str = NUL) -> None:
    """It fails again as soon as it starts."""
    world.connect.poison = trace
    world.connect.fail(CONNECTOR, trace)


def until_taken(world: World) -> Tick:
    for _ in range(300):
        outcome = world.tick()
        if [event.action for event in outcome.events] == ["quarantine"]:
            return outcome
    raise AssertionError("nothing was quarantined")


def test_a_record_that_the_trace_names_is_taken_after_one_restart(world: World) -> None:
    stuck(world)
    world.quarantine.answer = TAKEN
    outcome = until_taken(world)
    assert len(world.restarts) == 1
    assert world.quarantine.taken == [[0]], "the other partition has nothing that waits"
    (event,) = outcome.events
    assert "partition 0, offsets 40 to 59: 19 stored, 1 rejected; rejected: 1 bad_tags; " in event.reason
    assert "invalid byte sequence" in event.reason
    assert event.stretches == TAKEN.stretches
    world.connect.start(CONNECTOR)
    world.connect.poison = ""
    world.connect.start(CONNECTOR)
    world.committed = {0: 60, 1: 100}
    assert world.tick().healthy


def test_another_failure_has_all_its_restarts_first(world: World) -> None:
    stuck(world, POISON)
    world.quarantine.answer = TAKEN
    until_taken(world)
    assert len(world.restarts) == ATTEMPTS


def test_the_next_record_soon_after_is_taken_without_a_restart(world: World) -> None:
    stuck(world)
    world.quarantine.answer = TAKEN
    until_taken(world)
    world.connect.requests.clear()
    world.quarantine.close = True
    world.committed = {0: 60, 1: 90}
    until_taken(world)
    assert world.restarts == []
    assert world.quarantine.taken[-1] == [0, 1], "wherever records wait: which of them is stuck was not tried"
    world.quarantine.close = False
    world.committed = {0: 80, 1: 100}
    until_taken(world)
    assert len(world.restarts) == 1


def test_without_a_bad_record_it_stops_and_says_so(world: World) -> None:
    stuck(world)
    outcome = world.until_given_up()
    assert "1 restarts without progress at topic metrics, partition 0, offset 40: " in outcome.message
    assert "None of the next 20,000 records of a partition is bad. Mend the cause" in outcome.message
    assert "rejects quarantine" not in outcome.message


def test_switched_off_it_stops_as_ever_and_names_the_command(world: World) -> None:
    world.settings = Settings(sink_quarantine=False)
    stuck(world)
    outcome = world.until_given_up()
    assert world.quarantine.taken == []
    assert len(world.restarts) == ATTEMPTS
    assert "`metrics-pipeline rejects quarantine`" in outcome.message
    world.settings = Settings()
    world.quarantine.answer = TAKEN
    until_taken(world)


def test_a_database_that_cannot_store_is_waited_for_and_nothing_is_given_up(world: World) -> None:
    stuck(world, POISON)
    world.quarantine.answer = ServiceError("PostgreSQL could not store: no space left on device (53100)")
    events, times = [], list[float]()
    for _ in range(300):
        outcome = world.tick()
        if world.quarantine.taken[len(times) :]:
            times.append(world.now)
        events += [event for event in outcome.events if event.action != "restart failed tasks"]
    assert [event.action for event in events] == ["wait"], "said once"
    assert "nothing is quarantined: PostgreSQL could not store: no space left" in events[0].reason
    assert len(world.restarts) == ATTEMPTS
    apart = [round(b - a) for a, b in pairwise(times)]
    assert apart[:5] == [1, 2, 4, 8, 16]
    assert set(apart[5:]) == {30}
    # It stores again, and no record is bad: what failed is started.
    world.connect.poison = ""
    world.quarantine.answer = Taken()
    world.connect.requests.clear()
    for _ in range(40):
        if not world.restarts:
            world.tick()
    world.committed = {0: 100, 1: 100}
    assert world.tick().healthy
    assert len(world.restarts) == 1


def test_the_second_repair_leaves_the_connector_to_the_first(world: World) -> None:
    stuck(world)
    world.connect.states[CONNECTOR], world.connect.task_states[CONNECTOR] = "STOPPED", {}
    world.quarantine.number = 7
    world.quarantine.answer = BusyError("a quarantine is under way")
    state = world.state
    assert world.tick() == Tick("a quarantine is under way", healthy=False)
    assert world.connect.requests == [f"PUT /connectors/{CONNECTOR}/config"]
    world.state = state
    world.connect.start(CONNECTOR)
    for _ in range(50):
        assert not world.tick(60).events, "nor while it has not stopped it yet"


def test_a_quarantine_that_died_is_finished(world: World) -> None:
    world.connect.states[CONNECTOR], world.connect.task_states[CONNECTOR] = "STOPPED", {}
    world.quarantine.number, world.quarantine.answer = 7, TAKEN
    outcome = world.tick()
    assert [event.action for event in outcome.events] == ["quarantine"]
    assert "finished what another one had begun" in outcome.events[0].reason
    assert world.quarantine.finished == 1


def test_one_that_died_before_it_stored_is_finished_and_it_goes_on_as_ever(world: World) -> None:
    world.quarantine.number = 7
    world.connect.fail(CONNECTOR, POISON, 1)
    assert [event.action for event in world.tick().events] == ["restart failed tasks"]
    assert world.quarantine.finished == 1


def test_one_that_died_with_the_connector_stopped_is_no_person(world: World) -> None:
    world.connect.states[CONNECTOR], world.connect.task_states[CONNECTOR] = "STOPPED", {}
    world.quarantine.number = 7
    outcome = world.tick()
    assert (outcome.healthy, outcome.events) == (False, [])
    assert outcome.message == "a quarantine had died before it stored anything: the connector goes on"


def test_while_postgresql_is_away_a_stopped_connector_may_be_a_quarantine_s(world: World) -> None:
    given_up(world)
    world.connect.states[CONNECTOR] = "STOPPED"
    world.quarantine.number = 7
    world.quarantine.answer = ServiceError("PostgreSQL at fake cannot be reached")
    outcome = world.tick()
    assert "STOPPED, by a person or by a quarantine that is not finished: PostgreSQL at fake" in outcome.message
    assert json.loads(world.state or "")["gave_up"], "not forgotten before it is known"


def test_what_was_taken_stands_in_the_file(tmp_path: Path) -> None:
    settings = Settings(pipeline_data_dir=tmp_path)
    event = repair.Restart("2026-11-22T16:00:00+00:00", "quarantine", "because", 1, TAKEN.stretches)
    repair.record(settings, [event], "sensor")
    (line,) = (tmp_path / "repairs.jsonl").read_text().splitlines()
    assert json.loads(line)["stretches"] == [{"partition": 0, "first": 40, "next": 60, "stored": 19, "rejected": 1}]
