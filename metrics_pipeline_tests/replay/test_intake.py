"""Files of a folder are published once, whoever dies at whatever step, and never with a second meaning."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from polars.exceptions import PanicException

from metrics_pipeline.errors import PipelineError, ServiceError, SettingError
from metrics_pipeline.producer.run import RunReport
from metrics_pipeline.replay import folder as folders
from metrics_pipeline.replay import intake
from metrics_pipeline.replay.folder import ReplayFolder, sha256
from metrics_pipeline.replay.intake import ATTEMPTS, GONE, Intake, Result
from metrics_pipeline.replay.publishing import prepared
from metrics_pipeline.replay.recipe import Recipe, checked_recipe, named_recipe
from metrics_pipeline.replay.source import Replay
from metrics_pipeline.settings import Settings

GOOD = "time,temperature,co2\n2024-05-01T10:00:00Z,21.5,600\n2024-05-01T10:01:00Z,,601\n"
BAD = "time,temperature\n2024-05-01T10:00:00Z,21.5\n2024-05-01T10:01:00Z,warm\n"
ROOM = checked_recipe({"device": {"name": "room-1"}}, "test")
OTHER = checked_recipe({"device": {"name": "room-2"}}, "test")


class Killed(BaseException):
    """The process is gone: nothing that it does afterwards has any effect."""


def void(_value: object) -> None:
    """For what is called for its effect."""


class World:
    """A folder, and a topic that takes what is published."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.folder = ReplayFolder(path)
        self.topic: list[tuple[bytes, bytes]] = []
        self.told: list[Result] = []
        self.report: dict[str, Any] = {"state": "finished"}
        self.instead: Callable[[], None] = lambda: None

    def publish(self, settings: Settings, source: Replay, **_options: Any) -> RunReport:
        for batch in source.messages():
            for message in batch:
                self.topic.append(message)
                self.instead()
        return RunReport(uuid4(), "replay", **{"acknowledged": len(self.topic)} | self.report)

    def put(self, name: str, text: str = GOOD) -> Path:
        path = self.folder.path / name
        path.write_text(text)
        return path

    def run(self, *names: str, recipe: Recipe = ROOM, **options: Any) -> list[Result]:
        worker = Intake(Settings(), self.folder, recipe, told=self.told.append, **options)
        return worker.run(names)

    def files(self) -> dict[str, str]:
        """Everything but reports and the lock, by path."""
        return {
            str(path.relative_to(self.folder.path)): path.read_text()
            for path in self.folder.path.rglob("*")
            if path.is_file() and not path.name.endswith((".report.json", "lock"))
        }

    def document(self, place: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder.path / f"{place}.report.json").read_text())
        return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path / "in")
    monkeypatch.setattr(intake, "publish", made.publish)
    return made


def test_a_good_file_is_published_told_of_and_moved_with_its_report(world: World) -> None:
    digest = sha256(world.put("a.csv"))
    (result,) = world.run("a.csv")
    assert len(world.topic) == 3
    assert world.files() == {"done/a.csv": GOOD}
    document = world.document("done/a.csv")
    assert document == result.document == world.told[0].document
    assert {name: document[name] for name in ("file", "state", "sha256", "readings", "devices", "lines")} == {
        "file": "a.csv", "state": "done", "sha256": digest, "readings": 3, "devices": 1, "lines": 2,
    }  # fmt: skip
    assert (document["bad_lines"], document["bad_lines_listed"], document["empty_cells"]) == (0, [], 1)
    assert (document["from"], document["to"]) == ("2024-05-01T10:00:00+00:00", "2024-05-01T10:01:00+00:00")
    assert document["acknowledged"] == 3
    assert len(document["run_id"]) == 36
    assert document["seconds"] >= 0
    assert any("temperature" in line for line in document["understood"])
    assert 'name = "room-1"' in document["recipe"]


def test_a_bad_file_costs_the_others_nothing(world: World) -> None:
    world.put("bad.csv", BAD)
    world.put("doubt.csv", "time,temperature\n01/02/2024 10:00,21\n")
    world.put("empty.csv", "")
    world.put("good.csv")
    results = world.run("bad.csv", "doubt.csv", "empty.csv", "good.csv", "gone.csv")
    assert [(result.name, result.state) for result in results] == [
        ("bad.csv", "failed"), ("doubt.csv", "failed"), ("empty.csv", "failed"), ("good.csv", "done"),
    ]  # fmt: skip
    assert len(world.topic) == 3
    assert sorted(world.files()) == ["done/good.csv", "failed/bad.csv", "failed/doubt.csv", "failed/empty.csv"]
    document = world.document("failed/bad.csv")
    assert (document["bad_lines"], document["bad_lines_by_reason"]) == (1, {"bad_value": 1})
    (listed,) = document["bad_lines_listed"]
    assert listed.endswith("bad.csv:3: bad_value: temperature: 'warm' is not a number")
    assert document["error"].endswith("nothing was published")
    assert "--date-order" in world.document("failed/doubt.csv")["error"]
    assert "run_id" not in document


def test_bad_lines_are_left_out_when_they_are_to_be(world: World) -> None:
    world.put("bad.csv", BAD)
    (result,) = world.run("bad.csv", skip_bad=True)
    assert (result.state, len(world.topic), world.document("done/bad.csv")["bad_lines"]) == ("done", 1, 1)


def test_the_same_name_twice_keeps_both(world: World) -> None:
    for text in (GOOD, GOOD.replace("600", "700")):
        world.put("a.csv", text)
        world.run("a.csv")
    assert world.files() == {"done/a.csv": GOOD, "done/a-2.csv": GOOD.replace("600", "700")}


def test_a_failed_file_is_tried_again_when_it_is_moved_back(world: World) -> None:
    world.put("a.csv", "time,temperature\n01/02/2024 10:00,21\n")
    world.run("a.csv")
    (world.folder.path / "failed" / "a.csv").rename(world.folder.path / "a.csv")
    world.run("a.csv", recipe=checked_recipe({"device": {"name": "r"}, "time": {"order": "dmy"}}, "test"))
    assert list(world.files()) == ["done/a.csv"]
    assert len(world.topic) == 1


def test_a_service_that_is_away_is_not_the_files_fault(world: World) -> None:
    def away() -> None:
        raise ServiceError("the broker does not answer")

    world.put("a.csv")
    world.put("b.csv")
    world.instead = away
    for _ in range(ATTEMPTS + 2):
        with pytest.raises(ServiceError, match="does not answer"):
            world.run("a.csv", "b.csv")
    assert {"a.csv", "b.csv"} <= world.files().keys()
    world.instead = lambda: None
    assert [result.state for result in world.run("a.csv", "b.csv")] == ["done", "done"]
    assert sorted(world.files()) == ["done/a.csv", "done/b.csv"]


@pytest.mark.parametrize("wrong", [{"state": "stopped"}, {"failed": 1}, {"unknown": 2}, {"ledger_problem": "away"}])
def test_a_file_is_moved_only_when_all_of_it_was_acknowledged(world: World, wrong: dict[str, Any]) -> None:
    world.put("a.csv")
    world.report |= wrong
    with pytest.raises(ServiceError, match="not all of it was acknowledged"):
        world.run("a.csv")
    assert "a.csv" in world.files()
    assert world.folder.look({}).under_way == 1


def test_a_file_that_changes_while_it_is_read_is_read_again(world: World) -> None:
    path = world.put("a.csv")
    more = GOOD + "2024-05-01T10:02:00Z,22,602\n"
    world.instead = lambda: void(path.write_text(more))
    (result,) = world.run("a.csv")
    assert (result.state, "changed while it was read" in result.error) == ("left", True)
    assert world.files() == {"a.csv": more}
    world.instead = lambda: None
    (result,) = world.run("a.csv")
    assert (result.state, result.document["readings"]) == ("done", 5)


@pytest.mark.parametrize("kind", [ZeroDivisionError, PanicException])
def test_what_a_library_stumbles_over_keeps_no_other_file_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def stumbling(self: Replay) -> None:
        raise kind("of the library")

    world.put("a.csv")
    monkeypatch.setattr(Replay, "look", stumbling)
    (result,) = world.run("a.csv")
    assert result.state == "failed"
    assert f"cannot be read: {kind.__name__}: of the library" in result.error


class Death:
    """A process that dies before its step number `step`: a write, a move, a removal, a message, or telling."""

    def __init__(self, patch: pytest.MonkeyPatch, world: World, step: int) -> None:
        self.steps: list[str] = []
        self._limit = step
        self._world = world
        write, rename, unlink = folders._write, Path.rename, Path.unlink

        def dying_write(path: Path, content: bytes) -> None:
            self._step("write")
            write(path, content)

        def dying_rename(path: Path, target: Path) -> Path:
            self._step("move")
            return rename(path, target)

        def dying_unlink(path: Path, missing_ok: bool = False) -> None:
            self._step("remove")
            unlink(path, missing_ok)

        patch.setattr(folders, "_write", dying_write)
        patch.setattr(Path, "rename", dying_rename)
        patch.setattr(Path, "unlink", dying_unlink)
        patch.setattr(world, "instead", lambda: self._step("message"))

    def run(self, *names: str) -> bool:
        """Whether it died."""
        try:
            Intake(Settings(), self._world.folder, ROOM, told=self._tell).run(names)
        except Killed:
            return True
        return False

    def _tell(self, result: Result) -> None:
        self._step("tell")
        self._world.told.append(result)

    def _step(self, what: str) -> None:
        if len(self.steps) >= self._limit:
            raise Killed(what)
        self.steps.append(what)


def test_whoever_dies_at_whatever_step_each_file_comes_once_and_with_one_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each death another process goes on with another recipe: what was begun keeps the one that it was begun with."""
    died, step = True, 0
    while died:
        world = World(tmp_path / f"in-{step}")
        with monkeypatch.context() as patch:
            patch.setattr(intake, "publish", world.publish)
            world.put("a.csv")
            world.put("bad.csv", BAD)
            with monkeypatch.context() as dying:
                death = Death(dying, world, step)
                died = death.run("a.csv", "bad.csv")
            world.run("a.csv", "bad.csv", recipe=OTHER)
        what = step, death.steps
        assert world.files() == {"done/a.csv": GOOD, "failed/bad.csv": BAD}, what
        begun_with = ROOM if "write" in death.steps else OTHER
        assert {key for key, _ in world.topic} == keys(tmp_path, begun_with), what
        assert world.document("done/a.csv")["readings"] == 3
        assert {(result.name, result.state) for result in world.told} == {("a.csv", "done"), ("bad.csv", "failed")}
        assert world.folder.notes() == []
        step += 1
    assert (death.steps.count("message"), death.steps.count("move")) == (3, 2)


def keys(folder: Path, recipe: Recipe) -> set[bytes]:
    """Of the readings of GOOD."""
    path = folder / "good.csv"
    path.write_text(GOOD)
    with prepared(Settings(), [path], recipe) as source:
        return {key for batch in source.messages() for key, _ in batch}


@pytest.mark.parametrize("later", [None, GOOD.replace("600", "700")])
def test_a_file_that_was_begun_and_is_gone_or_another_one_is_told_of(
    world: World, tmp_path: Path, later: str | None
) -> None:
    def killed() -> None:
        raise Killed

    path = world.put("a.csv")
    world.instead = killed
    with pytest.raises(Killed):
        world.run("a.csv")
    world.instead = lambda: None
    path.unlink()
    if later:
        world.put("a.csv", later)
    results = world.run("a.csv", recipe=OTHER)
    assert [result.error for result in results] == [GONE, ""][: len(results)]
    assert world.document("failed/a.csv")["state"] == "failed"
    assert world.files() == ({"done/a.csv": later} if later else {})
    assert {key for key, _ in world.topic[1:]} == (keys(tmp_path, OTHER) if later else set())
    assert world.folder.notes() == []


def test_a_file_at_which_processes_die_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for want of memory: nobody is there to write how it ended."""
    world.put("a.csv")

    def dying(self: Replay) -> None:
        monkeypatch.setattr(folders, "_write", lambda *_given: None)
        raise Killed

    for _ in range(ATTEMPTS):
        with monkeypatch.context() as patch:
            real = folders._write
            patch.setattr(Replay, "look", dying)
            with pytest.raises(Killed):
                world.run("a.csv")
        monkeypatch.setattr(folders, "_write", real)
        assert "a.csv" in world.files()
    (result,) = world.run("a.csv")
    assert (result.state, world.topic) == ("failed", [])
    assert f"a process died at it {ATTEMPTS} times" in result.error


def test_a_run_begins_no_file_after_its_time(world: World) -> None:
    world.put("a.csv")
    assert Intake(Settings(), world.folder, ROOM).run(["a.csv"], seconds=-1) == []
    assert world.files() == {"a.csv": GOOD}


def test_a_file_that_cannot_be_moved_is_finished_by_the_next_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, _target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    world.put("a.csv")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(
            SettingError, match=r"done/a\.csv: a\.csv is over and cannot be moved there: Permission denied"
        ):
            world.run("a.csv")
    published = len(world.topic)
    (result,) = world.run("a.csv")
    assert (result.state, len(world.topic)) == ("done", published), "it is not published again"
    assert list(world.files()) == ["done/a.csv"]


def test_a_recipe_is_named(tmp_path: Path) -> None:
    assert named_recipe("X", "") == Recipe()
    assert named_recipe("X", "tasmota").description
    path = tmp_path / "office.toml"
    path.write_text('[device]\nname = "room-1"\n')
    assert named_recipe("X", str(path)).device.name == "room-1"
    with pytest.raises(PipelineError, match=r"X=nowhere: .*; it is the path of a file, or one of"):
        named_recipe("X", "nowhere")


PROCESS = """
import sys, time
from pathlib import Path
from uuid import uuid4
from metrics_pipeline.producer.run import RunReport
from metrics_pipeline.replay import intake
from metrics_pipeline.replay.folder import ReplayFolder
from metrics_pipeline.replay.recipe import Recipe
from metrics_pipeline.settings import Settings

inbox, topic, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
written = 0

def publish(settings, source, **options):
    global written
    source.refuse()
    with topic.open("ab", buffering=0) as file:
        for batch in source.messages():
            for key, value in batch:
                file.write(key + b"\\t" + value + b"\\n")
                written += 1
                if written == last:
                    print("there", flush=True)
                    time.sleep(600)
    return RunReport(uuid4(), "replay", "finished", acknowledged=source.report.readings)

intake.publish = publish
names = sorted(path.name for path in inbox.iterdir() if path.is_file())
intake.Intake(Settings(), ReplayFolder(inbox), Recipe()).run(names)
"""


def test_ten_files_three_of_them_bad_and_a_process_that_is_killed_in_the_middle(tmp_path: Path) -> None:
    inbox, topic = tmp_path / "in", tmp_path / "topic"
    inbox.mkdir()
    devices = [f"room-{number}" for number in range(7)]
    for device in devices:
        lines = [f"2024-05-01T10:{minute:02}:00Z,{device},{20 + minute / 10}\n" for minute in range(50)]
        (inbox / f"{device}.csv").write_text("".join(["time,device,temperature\n", *lines]))
    bad = {"a.csv": BAD, "room-3-b.csv": "time,device,temperature\n01/02/2024,x,1\n", "z.parquet": "no Parquet"}
    for name, text in bad.items():
        (inbox / name).write_text(text)
    files = {path.name: sha256(path) for path in inbox.iterdir()}
    command = [sys.executable, "-c", PROCESS, str(inbox), str(topic)]

    with subprocess.Popen([*command, "120"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        process.kill()
    left = {path.name for path in inbox.iterdir() if path.is_file()}
    assert left == files.keys() - {"a.csv", "room-0.csv", "room-1.csv"}
    subprocess.run([*command, "0"], check=True, timeout=60)

    assert {path.name for path in inbox.iterdir() if path.is_file()} == set()
    moved = {path.name: path for folder in ("done", "failed") for path in (inbox / folder).iterdir()}
    assert {name: sha256(path) for name, path in moved.items() if not name.endswith(".report.json")} == files
    assert {name for name, path in moved.items() if path.parent.name == "failed"} == {
        *bad,
        *(f"{name}.report.json" for name in bad),
    }
    published = [line.partition(b"\t") for line in topic.read_bytes().splitlines()]
    assert len({key for key, _, _ in published}) == 7 * 50, "all readings"
    assert len({(key, value) for key, _, value in published}) == 7 * 50, "none in two meanings"
    assert len(published) == 7 * 50 + 20, "one file was begun twice"
