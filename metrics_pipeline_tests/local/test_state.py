"""What a keeper writes down: one at a time, and the next one finds what a killed one left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from metrics_pipeline.local import lock
from metrics_pipeline.local.processes import ProcessId, identify
from metrics_pipeline.local.service import Service
from metrics_pipeline.local.state import StackState
from metrics_pipeline_tests.fakes import until

Make = Callable[[str], Service]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A service that sleeps."""
    made: list[Service] = []

    def build(name: str) -> Service:
        service = Service(
            name=name,
            title=name,
            url="",
            command=["sleep", "60"],
            environment={"PATH": os.defpath},
            log=tmp_path / f"{name}.log",
            check=lambda: None,
        )
        made.append(service)
        return service

    yield build
    for service in made:
        service.stop()


def test_a_state_survives_writing_and_reading(tmp_path: Path) -> None:
    state = StackState(
        keeper=ProcessId(1, "boot:25"),
        children={"broker": ProcessId(3, "boot:26")},
        fingerprints={"broker": "abc"},
        ready=True,
    )
    state.write(tmp_path)
    assert StackState.read(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == ["stack.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"keeper": null}', '{"keeper": {"pid": 1}, "children": {}}', "\x00"])
def test_a_state_that_cannot_be_understood_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text(text)
    assert StackState.read(tmp_path) == StackState()


def test_no_state_is_none(tmp_path: Path) -> None:
    assert StackState.read(tmp_path / "nowhere") == StackState()


def test_a_child_does_not_keep_the_lock_of_its_killed_keeper(tmp_path: Path, make: Make) -> None:
    taken = lock.take(tmp_path)
    make("part").start()
    taken.close()
    lock.take(tmp_path).close()


def test_a_new_keeper_adopts_what_runs_as_it_would_start_it(tmp_path: Path, make: Make) -> None:
    service = make("part")
    service.start()
    assert service.process is not None
    state = StackState(keeper=ProcessId(1, "boot:1"))
    state.note([service, make("not started")])
    state.write(tmp_path)
    assert set(json.loads((tmp_path / "stack.json").read_text())["children"]) == {"part"}

    after = make("part")
    assert StackState.read(tmp_path).adopt([after]) == []
    assert after.process == service.process
    assert after.alive()


def test_what_would_be_started_otherwise_now_is_named_stale(tmp_path: Path, make: Make) -> None:
    service = make("part")
    service.start()
    state = StackState()
    state.note([service])
    after = make("part")
    after.environment = {"PATH": os.defpath, "POSTGRES_PORT": "6000"}
    assert state.adopt([after]) == [after]
    assert after.alive()


def test_what_ended_is_not_adopted(make: Make) -> None:
    service = make("part")
    service.start()
    state = StackState()
    state.note([service])
    service.stop()
    after = make("part")
    assert state.adopt([after]) == []
    assert not after.alive()


def test_a_pid_of_another_program_is_not_adopted(make: Make) -> None:
    me = identify(psutil.Process())
    state = StackState(children={"part": ProcessId(me.pid, f"{me.started}1")}, fingerprints={"part": "x"})
    after = make("part")
    assert state.adopt([after]) == []
    assert not after.alive()


def test_an_instance_that_nobody_wrote_down_is_found_by_the_service_itself(make: Make) -> None:
    service = make("part")
    service.start()
    after = make("part")
    after.find = lambda: service.process
    assert StackState().adopt([after]) == [after]  # how it was started is not known
    assert after.process == service.process


def test_what_is_no_part_of_the_stack_any_more_can_be_ended(tmp_path: Path, make: Make) -> None:
    stays, goes = make("broker"), make("broker-2")
    for service in (stays, goes):
        service.start()
    state = StackState(keeper=ProcessId(1, "boot:1"))
    state.note([stays, goes])
    (other,) = state.others([make("broker")], tmp_path)
    assert (other.name, other.process) == ("broker-2", goes.process)
    other.stop()
    assert not goes.alive()
    assert stays.alive()
    assert state.others([make("broker")], tmp_path) == []


def test_what_a_former_version_wrote_by_a_clock_that_was_set_is_found_all_the_same(tmp_path: Path, make: Make) -> None:
    """It wrote a time of the wall clock; the process has our folder in its environment."""
    service = make("part")
    service.environment = {"PATH": os.defpath, "PIPELINE_DATA_DIR": str(tmp_path)}
    service.start()
    assert service.process is not None
    assert until(service.process.environ)  # the kernel shows it a moment after the program begins
    old = {"pid": service.process.pid, "created": service.process.create_time() - 5}
    for child in (old, old | {"created": service.process.create_time()}):
        text = {"keeper": {"pid": 1, "created": 1.5}, "children": {"part": child}, "fingerprints": {}, "ready": True}
        (tmp_path / "stack.json").write_text(json.dumps(text))
        after = make("part")
        assert StackState.read(tmp_path).adopt([after]) == [after]  # how it was started is not known
        assert after.process == service.process


def test_what_a_former_version_wrote_and_another_program_has_the_pid_of_is_nobody(tmp_path: Path, make: Make) -> None:
    old = {"pid": os.getpid(), "created": 5.0}
    text = {"keeper": old, "children": {"part": old}, "fingerprints": {}, "ready": True}
    (tmp_path / "stack.json").write_text(json.dumps(text))
    state = StackState.read(tmp_path)
    assert state.keeper is not None
    assert state.keeper.find() is None
    assert state.adopt([make("part")]) == []
