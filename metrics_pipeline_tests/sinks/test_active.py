"""One sink takes over from the other without a gap, whatever state either is in; lag and health are those of the active one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from metrics_pipeline import kafka, postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import CONNECTOR, CONNECTOR_GROUP, TOPIC, Settings
from metrics_pipeline.sinks import active
from metrics_pipeline.sinks import connector as connect
from metrics_pipeline_tests.fake_connect import FakeConnect, serving
from metrics_pipeline_tests.fake_kafka import FakeBroker, FakeTopic
from metrics_pipeline_tests.fake_sinks import FakeSinkTables

NOWHERE = "http://127.0.0.1:1"


@dataclass
class World:
    """Three partitions of a hundred records; the connector has committed 40, 50 and nothing."""

    tables: FakeSinkTables
    broker: FakeBroker
    connect: FakeConnect

    def settings(self, sink: str, **values: Any) -> Settings:
        return Settings(**{"sink": sink, "connect_url": self.connect.url, **values})

    def ensure(self, sink: str, **values: Any) -> tuple[str, list[str]]:
        change = active.ensure_sink(self.settings(sink, **values), patience=0.2)
        return change.state, change.details

    @property
    def commits(self) -> dict[int, int]:
        return {place.partition: place.offset for place in self.broker.commits[CONNECTOR_GROUP]}

    @commits.setter
    def commits(self, offsets: dict[int, int]) -> None:
        self.broker.commits[CONNECTOR_GROUP] = [
            TopicPartition(TOPIC, number, offset) for number, offset in offsets.items()
        ]

    def connector(self, state: str = "RUNNING") -> None:
        """There is a connector in this state; one that does not stand still is a member of its group."""
        self.connect.configs[CONNECTOR] = connect.connector_config() | {"name": CONNECTOR}
        self.connect.start(CONNECTOR)
        self.connect.states[CONNECTOR] = state
        if state == "STOPPED":
            self.connect.task_states[CONNECTOR] = {}
            self.broker.members.discard(CONNECTOR_GROUP)
        else:
            self.broker.members.add(CONNECTOR_GROUP)

    @property
    def connector_state(self) -> str:
        return self.connect.states.get(CONNECTOR, "MISSING")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    tables, broker = FakeSinkTables(), FakeBroker()
    broker.add(TOPIC, FakeTopic(1, dict.fromkeys(range(3), (0, 100)), {}))
    monkeypatch.setattr(postgres, "connect", tables.connect)
    monkeypatch.setattr(kafka, "Consumer", broker.consumer)
    monkeypatch.setattr(kafka, "AdminClient", broker.admin)
    monkeypatch.setattr(connect, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(active, "WORKERS_SECONDS", 0.0)
    monkeypatch.setattr(active, "QUIET_SECONDS", 0.1)
    with serving() as fake:
        world = World(tables, broker, fake)
        world.commits = {0: 40, 1: 50}
        fake.stopped = lambda: broker.members.discard(CONNECTOR_GROUP)
        yield world


# --- connect → copy ----------------------------------------------------------------------------------------------


def test_the_copy_sink_begins_where_the_stopped_connector_committed(world: World) -> None:
    world.connector()
    world.tables.sessions = 2

    def commit_at_the_end() -> None:
        world.commits = {0: 45, 1: 50, 2: 3}
        world.broker.members.clear()

    world.connect.stopped = commit_at_the_end
    state, details = world.ensure("copy")
    assert state == "changed"
    assert details == [
        "the readings are stored by the COPY sink, before by Kafka Connect",
        f"connector {CONNECTOR} is stopped, was RUNNING",
        "the COPY sink goes on at offset 45 of partition 0",
        "the COPY sink goes on at offset 50 of partition 1",
        "the COPY sink goes on at offset 3 of partition 2",
    ]
    assert (world.tables.active, world.tables.offsets) == ("copy", {0: 45, 1: 50, 2: 3})
    assert world.connector_state == "STOPPED"
    assert world.ensure("copy") == ("unchanged", [])


def test_a_partition_without_a_commit_is_left_to_the_copy_sink(world: World) -> None:
    world.tables.sessions = 1
    world.tables.offsets = {2: 7}
    world.ensure("copy")
    assert world.tables.offsets == {0: 40, 1: 50, 2: 7}


def test_the_commits_count_even_where_the_copy_sink_was_further_once(world: World) -> None:
    """The connector has stored records up to its commit again: the newer ones must pass once more."""
    world.tables.sessions = 1
    world.tables.offsets = {0: 90, 1: 10}
    world.ensure("copy")
    assert world.tables.offsets == {0: 40, 1: 50}


def test_consumers_that_are_still_in_the_group_are_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.connector()
    world.tables.sessions = 1
    world.connect.stopped = lambda: None
    waits = []

    def leave(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            world.commits = {0: 60, 1: 60, 2: 60}
            world.broker.members.clear()

    monkeypatch.setattr("time.sleep", leave)
    world.ensure("copy")
    assert len(waits) == 3
    assert world.tables.offsets == {0: 60, 1: 60, 2: 60}


def test_a_paused_connector_is_stopped_too(world: World) -> None:
    world.connector("PAUSED")
    world.tables.sessions = 1
    world.ensure("copy")
    assert world.connector_state == "STOPPED"


def test_without_a_worker_nothing_is_changed(world: World) -> None:
    world.connector()
    with pytest.raises(ServiceError, match=r"`metrics-pipeline sink`.*Kafka Connect stays the one"):
        world.ensure("copy")
    assert (world.tables.active, world.tables.offsets, world.connector_state) == ("connect", {}, "RUNNING")


def test_a_worker_that_comes_late_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "WORKERS_SECONDS", 30.0)

    def come(_seconds: float) -> None:
        world.tables.sessions = 1

    monkeypatch.setattr("time.sleep", come)
    assert world.ensure("copy")[0] == "changed"


@pytest.mark.usefixtures("without_backoff")
def test_no_connect_is_fine_where_none_was_asked_for(world: World) -> None:
    world.tables.sessions = 1
    port = int(NOWHERE.rpartition(":")[2])
    state, details = world.ensure("copy", connect_url="", connect_port=port)
    assert state == "changed"
    assert f"no Kafka Connect of this pipeline answers at {NOWHERE}: no connector to stop" in details
    assert world.tables.offsets == {0: 40, 1: 50}
    assert world.ensure("copy", connect_url="", connect_port=port) == ("unchanged", [])


def test_another_stack_s_connector_on_the_default_port_is_left_alone(world: World) -> None:
    """Two stacks on one machine, the second with SINK=copy: it stopped the first one's connector."""
    world.connector()
    world.tables.sessions = 1
    world.connect.cluster = "of another stack"
    port = int(world.connect.url.rpartition(":")[2])
    state, details = world.ensure("copy", connect_url="", connect_port=port)
    assert state == "changed"
    assert f"no Kafka Connect of this pipeline answers at {world.connect.url}: no connector to stop" in details
    assert world.ensure("copy", connect_url="", connect_port=port) == ("unchanged", [])
    assert active.sink_drift(world.settings("copy", connect_url="", connect_port=port)) == []
    assert (world.connector_state, world.connect.requests, world.connect.asked) == ("RUNNING", [], [])


@pytest.mark.parametrize("connector", ["RUNNING", "STOPPED"])
def test_a_connect_of_which_nobody_knows_whose_it_is_is_not_taken_for_none(world: World, connector: str) -> None:
    """It may be ours, and its connector would go on beside the COPY sink."""
    world.connector(connector)
    world.tables.sessions = 1
    world.broker.cluster = None
    port = int(world.connect.url.rpartition(":")[2])
    with pytest.raises(ServiceError, match="does not tell its cluster's id yet"):
        world.ensure("copy", connect_url="", connect_port=port)
    assert (world.tables.active, world.connector_state) == ("connect", connector)
    with pytest.raises(ServiceError, match="does not tell its cluster's id yet"):
        active.sink_drift(world.settings("copy", connect_url="", connect_port=port))


def test_our_own_connector_is_stopped_without_being_named(world: World) -> None:
    world.connector()
    world.tables.sessions = 1
    port = int(world.connect.url.rpartition(":")[2])
    assert world.ensure("copy", connect_url="", connect_port=port)[0] == "changed"
    assert world.connector_state == "STOPPED"


def test_a_connect_that_is_named_has_to_answer(world: World) -> None:
    """Its connector may run, and would go on when it answers again."""
    world.tables.sessions = 1
    with pytest.raises(ServiceError, match="cannot be reached"):
        world.ensure("copy", connect_url=NOWHERE)
    assert world.tables.active == "connect"


def test_a_connector_that_ran_beside_the_copy_sink_makes_it_go_back_and_never_ahead(world: World) -> None:
    world.tables.active, world.tables.sessions = "copy", 1
    world.tables.offsets = {0: 90, 1: 45, 2: 5}
    world.connector()
    state, details = world.ensure("copy")
    assert (state, details) == (
        "changed",
        [f"connector {CONNECTOR} is stopped, was RUNNING", "the COPY sink goes on at offset 40 of partition 0"],
    )
    assert world.tables.offsets == {0: 40, 1: 45, 2: 5}


# --- copy → connect ----------------------------------------------------------------------------------------------


def test_the_connector_begins_where_the_copy_sink_stands(world: World) -> None:
    world.connector("STOPPED")
    world.tables.active, world.tables.offsets = "copy", {0: 90, 1: 50, 2: 20}
    state, details = world.ensure("connect")
    assert state == "changed"
    assert details == [
        "the readings are stored by Kafka Connect, before by the COPY sink",
        "the connector begins at offset 90 of partition 0",
        "the connector begins at offset 20 of partition 2",
        "resumed, was STOPPED",
    ]
    assert world.commits == {0: 90, 1: 50, 2: 20}
    assert (world.tables.active, world.connector_state) == ("connect", "RUNNING")
    assert world.ensure("connect") == ("unchanged", [])


def test_commits_never_move_back_and_never_beyond_the_end(world: World) -> None:
    world.tables.active, world.tables.offsets = "copy", {0: 30, 1: 101, 2: 100}
    world.ensure("connect")
    assert world.commits == {0: 40, 1: 50, 2: 100}


def test_commits_are_moved_before_the_database_says_so(world: World) -> None:
    """A crash between the two leaves the COPY sink active, and nothing before the commits unstored."""
    world.tables.active, world.tables.offsets = "copy", {0: 90}
    world.broker.topics.clear()
    with pytest.raises(ServiceError, match="does not exist"):
        world.ensure("connect")
    assert world.tables.active == "copy"


def test_a_connector_that_runs_goes_on_from_its_own_offsets(world: World) -> None:
    """It may have put old values over newer ones, so it must not jump over these."""
    world.connector()
    world.tables.active, world.tables.offsets = "copy", {0: 90}
    world.ensure("connect")
    assert world.commits == {0: 40, 1: 50}
    assert world.tables.active == "connect"


def test_members_of_the_group_keep_their_offsets(world: World) -> None:
    world.connector("STOPPED")
    world.broker.members.add(CONNECTOR_GROUP)
    world.tables.active, world.tables.offsets = "copy", {0: 90}
    assert world.ensure("connect")[0] == "changed"
    assert world.commits == {0: 40, 1: 50}


@pytest.mark.usefixtures("without_backoff")
def test_the_copy_sink_stays_while_there_is_no_connect(world: World) -> None:
    world.tables.active, world.tables.offsets = "copy", {0: 90}
    with pytest.raises(ServiceError, match="cannot be reached"):
        world.ensure("connect", connect_url=NOWHERE)
    assert world.tables.active == "copy"


def test_a_connector_is_made_without_a_switch_too(world: World) -> None:
    assert world.ensure("connect") == ("created", [f"connector {CONNECTOR}"])
    assert "metrics_owner" not in world.tables.roles


def test_before_connect_starts_an_active_copy_sink_hands_over_if_it_can(world: World) -> None:
    settings = world.settings("connect")
    world.tables.offsets = {0: 70}
    assert active.hand_over(settings) == []
    assert world.commits == {0: 40, 1: 50}
    world.tables.active = "copy"
    world.tables.down = True
    assert active.hand_over(settings) == []
    world.tables.down = False
    assert active.hand_over(settings) == [
        "the readings are stored by Kafka Connect, before by the COPY sink",
        "the connector begins at offset 70 of partition 0",
    ]
    assert (world.tables.active, world.commits) == ("connect", {0: 70, 1: 50})
    assert set(world.tables.roles) == {"metrics_writer"}, "the container of Connect has no other password"


# --- drift -------------------------------------------------------------------------------------------------------


def test_drift_of_the_copy_sink_names_each_thing(world: World) -> None:
    world.connector()
    world.tables.offsets = {0: 500}
    assert active.sink_drift(world.settings("copy")) == [
        "the readings are stored by Kafka Connect, configured the COPY sink",
        active.NO_WORKER,
        f"connector {CONNECTOR} is RUNNING beside the COPY sink, configured STOPPED",
        (
            "the COPY sink's offset in partition 0 is 500, and the topic ends at 100: "
            "it was restored from before, and a process of the COPY sink that runs begins at its start"
        ),
    ]
    world.tables.sessions = 1
    world.tables.offsets = {0: 100}
    world.ensure("copy")
    assert active.sink_drift(world.settings("copy")) == []


def test_drift_of_the_connector_is_seen_as_before(world: World) -> None:
    world.tables.active = "copy"
    assert active.sink_drift(world.settings("connect")) == [
        "the readings are stored by the COPY sink, configured Kafka Connect",
        f"connector {CONNECTOR} does not exist",
    ]
    world.ensure("connect")
    assert active.sink_drift(world.settings("connect")) == []


# --- position, lag and health ------------------------------------------------------------------------------------


def test_before_the_migrations_the_connector_is_active(world: World) -> None:
    world.tables.active = None
    assert active.position(world.settings("copy")) == active.Position("connect", {}, 0)


def test_offsets_and_lag_are_those_of_the_active_sink(world: World) -> None:
    settings = world.settings("connect")
    world.tables.offsets = {0: 100, 1: 99}
    assert active.offsets(settings) == {0: 40, 1: 50}
    assert active.lag(settings) == kafka.Lag(210, {0: 60, 1: 50, 2: 100})
    world.tables.active = "copy"
    assert active.offsets(settings) == {0: 100, 1: 99}
    assert active.lag(settings) == kafka.Lag(101, {0: 0, 1: 1, 2: 100})


def test_records_that_retention_deleted_are_no_lag(world: World) -> None:
    world.tables.active = "copy"
    world.broker.topics[TOPIC].offsets = dict.fromkeys(range(3), (80, 100))
    world.tables.offsets = {0: 10}
    assert active.lag(world.settings("copy")).total == 60


def test_the_lag_grows_on_while_postgresql_is_away(world: World) -> None:
    """No sink gets ahead without it, and the producer must be held back before retention overtakes the sink."""
    world.tables.active, world.tables.offsets = "copy", dict.fromkeys(range(3), 90)
    meter = active.LagMeter(world.settings("copy"))
    assert meter.total() == 30
    world.tables.down = True
    world.broker.topics[TOPIC].offsets = dict.fromkeys(range(3), (0, 200))
    assert meter.total() == 330
    with pytest.raises(ServiceError):
        active.LagMeter(world.settings("copy")).total()


def test_the_problem_is_that_of_the_active_sink(world: World) -> None:
    settings = world.settings("connect")
    assert active.sink_problem(settings) == f"connector {CONNECTOR} does not exist"
    world.ensure("connect")
    assert active.sink_problem(settings) is None
    world.tables.active = "copy"
    assert active.sink_problem(settings) == active.NO_WORKER
    world.tables.sessions = 1
    assert active.sink_problem(settings) is None


# --- Another log -------------------------------------------------------------------------------------------------


def test_offsets_of_a_former_log_are_no_position(world: World) -> None:
    world.tables.active, world.tables.offsets = "copy", {0: 100, 1: 100, 2: 100}
    assert active.lag(world.settings("copy")).total == 0
    world.broker.topic_ids[TOPIC] = 2
    assert active.lag(world.settings("copy")).total == 300
    assert active.offsets(world.settings("copy")) == {}
    assert [line for line in active.sink_drift(world.settings("copy")) if "is another one" in line]
    world.tables.active = "connect"
    world.connector()
    assert active.lag(world.settings("connect")).total == 300
    assert active.offsets(world.settings("connect")) == {}
    assert [line for line in active.sink_drift(world.settings("connect")) if "is another one" in line]


def test_a_connector_whose_commits_are_of_another_log_begins_where_the_copy_sink_stands(world: World) -> None:
    """Its commits look as if it were further."""
    world.broker.topic_ids[TOPIC] = 2
    log = kafka.topic_log(world.settings("connect")).id
    world.commits = {0: 90, 1: 90, 2: 90}
    world.tables.active, world.tables.offsets = "copy", {0: 30, 1: 70, 2: 80}
    world.tables.log = log
    world.tables.logs = {0: log, 1: log}
    world.connector("STOPPED")
    world.ensure("connect")
    assert world.commits == {0: 30, 1: 70, 2: 0}
    assert world.tables.connector_log == log


def test_the_copy_sink_does_not_begin_at_commits_of_another_log(world: World) -> None:
    world.broker.topic_ids[TOPIC] = 2
    world.tables.sessions = 1
    world.connector("STOPPED")
    world.ensure("copy")
    assert world.tables.offsets == {}
