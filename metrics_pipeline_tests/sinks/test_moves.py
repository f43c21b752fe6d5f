"""The connector's offsets follow the log that the topic's name stands for, whatever ends the move half-way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from metrics_pipeline import kafka, postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import CONNECTOR, CONNECTOR_GROUP, TOPIC, Settings
from metrics_pipeline.sinks import connector, moves
from metrics_pipeline.sinks.connector import ConnectClient
from metrics_pipeline.sinks.repair import Offsets, SinkRepair, Tick
from metrics_pipeline_tests.fake_connect import FakeConnect, serving
from metrics_pipeline_tests.fake_kafka import FakeBroker, FakeTopic
from metrics_pipeline_tests.fake_sinks import LOG, FakeQuarantine, FakeSinkTables

MARKS = {0: (10, 100), 1: (0, 100), 2: (0, 100)}


class World:
    """A connector that runs and has committed 90 everywhere."""

    def __init__(self, fake: FakeConnect) -> None:
        self.connect = fake
        self.settings = Settings(connect_url=fake.url)
        self.tables = FakeSinkTables()
        self.broker = FakeBroker(topics={TOPIC: FakeTopic(1, dict(MARKS), {})})
        self.commits = dict.fromkeys(MARKS, 90)
        self.client = ConnectClient(fake.url, patience=0.1)
        self.client.put(CONNECTOR, connector.connector_config())
        self.connect.requests.clear()

    @property
    def commits(self) -> dict[int, int]:
        return {place.partition: place.offset for place in self.broker.commits[CONNECTOR_GROUP]}

    @commits.setter
    def commits(self, offsets: dict[int, int]) -> None:
        self.broker.commits[CONNECTOR_GROUP] = [TopicPartition(TOPIC, *place) for place in offsets.items()]

    def tick(self) -> Tick:
        return SinkRepair(
            self.settings,
            client=self.client,
            offsets=lambda _: Offsets({}, {}),
            database=lambda _: None,
            quarantine=FakeQuarantine(),
        ).tick()

    def state(self) -> str:
        return self.client.state(CONNECTOR).connector


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with serving() as fake:
        world = World(fake)
        monkeypatch.setattr(postgres, "connect", world.tables.connect)
        monkeypatch.setattr(kafka, "AdminClient", world.broker.admin)
        monkeypatch.setattr(kafka, "Consumer", world.broker.consumer)
        monkeypatch.setattr(moves, "LEAVE_SECONDS", 0.0)
        yield world


def test_nothing_is_due_while_the_log_is_the_same(world: World) -> None:
    assert moves.due(world.settings) is None
    assert world.tick().events == []
    assert world.connect.requests == []


def test_offsets_from_before_such_notes_are_of_the_first_log_seen(world: World) -> None:
    world.tables.connector_log = world.tables.log = ""
    assert moves.due(world.settings) is None
    assert (world.tables.connector_log, world.tables.log) == (LOG, LOG)


def made_anew(world: World) -> None:
    world.broker.topic_ids[TOPIC] = 2


def another_cluster(world: World) -> None:
    world.broker.cluster = "other"


@pytest.mark.parametrize("change", [made_anew, another_cluster])
def test_another_log_is_read_from_its_beginning(world: World, change: Callable[[World], None]) -> None:
    change(world)
    outcome = world.tick()
    (event,) = outcome.events
    assert event.action == "move offsets"
    assert f"topic {TOPIC} is another one: log {kafka.topic_log(world.settings).id}, before {LOG}" in event.reason
    assert world.commits == {0: 10, 1: 0, 2: 0}
    assert (world.state(), world.tables.held) == ("RUNNING", False)
    assert world.tables.connector_log == world.tables.log == kafka.topic_log(world.settings).id
    assert world.tick().events == []


@pytest.mark.parametrize("failing", ["commit", "resume", "note"])
def test_a_move_that_ended_half_way_is_done_again(world: World, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """The connector stands still then, and nobody may take that for a person's wish."""
    made_anew(world)
    with monkeypatch.context() as broken:

        def fail(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        if failing == "commit":
            broken.setattr(kafka, "commit", fail)
        elif failing == "resume":
            broken.setattr(ConnectClient, "resume", fail)
        else:

            def resume(name: str) -> None:
                ConnectClient(world.connect.url).resume(name)
                raise KeyboardInterrupt

            broken.setattr(world.client, "resume", resume)
        with pytest.raises(KeyboardInterrupt):
            world.tick()
    assert world.tables.held
    assert world.tables.connector_log == LOG
    assert world.tick().events[0].action == "move offsets"
    assert (world.commits, world.state(), world.tables.held) == ({0: 10, 1: 0, 2: 0}, "RUNNING", False)


def test_consumers_that_stay_in_the_group_are_waited_for(world: World) -> None:
    made_anew(world)
    world.broker.members.add(CONNECTOR_GROUP)
    outcome = world.tick()
    assert "have not left yet" in outcome.message
    assert (outcome.events, world.tables.connector_log) == ([], LOG)
    world.broker.members.clear()
    assert world.tick().events[0].action == "move offsets"
    assert world.state() == "RUNNING"


def test_a_connector_that_a_person_stopped_stays_so(world: World) -> None:
    made_anew(world)
    world.client.stop(CONNECTOR)
    assert world.tick().events[0].action == "move offsets"
    assert (world.state(), world.commits) == ("STOPPED", {0: 10, 1: 0, 2: 0})
    assert "not touched" in world.tick().message


def test_provisioning_moves_before_it_resumes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made_anew(world)
    details = moves.ensure(world.settings, world.client)
    assert "is another one" in details[0]
    assert (world.state(), world.commits) == ("STOPPED", {0: 10, 1: 0, 2: 0})
    assert moves.ensure(world.settings, world.client) == []
    world.broker.topic_ids[TOPIC] = 3
    world.broker.members.add(CONNECTOR_GROUP)
    with pytest.raises(ServiceError, match="have not left it"):
        moves.ensure(world.settings, world.client)


# --- Growth ------------------------------------------------------------------------------------------------------


def grown(world: World, *, passed: list[int] | None, begins: list[int] | None, due: bool = True) -> None:
    world.broker.topics[TOPIC].offsets = dict.fromkeys(range(6), (0, 100))
    world.tables.partitions = 6
    world.tables.growth = (1, 3, 6, passed, begins, due, 0.0)


def test_after_a_growth_the_new_partitions_are_read_again_once_the_old_ones_are_passed(world: World) -> None:
    grown(world, passed=[90, 90, 91], begins=[-1, -1, -1, 0, 0, 7])
    world.commits = dict.fromkeys(range(6), 90)
    assert world.tick().events == []
    world.commits = world.commits | {2: 91}
    (event,) = world.tick().events
    assert "grew from 3 to 6 partitions: partitions [3, 4, 5] are read again" in event.reason
    assert world.commits == {0: 90, 1: 90, 2: 91, 3: 0, 4: 0, 5: 7}
    assert (world.tables.growth, world.state()) == (None, "RUNNING")


def test_records_that_retention_deleted_count_as_passed(world: World) -> None:
    grown(world, passed=[90, 90, 50], begins=[-1, -1, -1, 0, 0, 0])
    world.broker.topics[TOPIC].offsets[2] = (60, 100)
    world.commits = {0: 90, 1: 90}
    assert world.tick().events != []


def test_a_growth_waits_while_a_person_has_stopped_the_connector(world: World) -> None:
    grown(world, passed=[90, 90, 90], begins=[-1, -1, -1, 0, 0, 0])
    world.client.stop(CONNECTOR)
    assert world.tick().events == []
    assert world.tables.growth is not None
