"""Files by Dagster: a job with a recipe as its run configuration, and a sensor over a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import dagster as dg
import pytest
import yaml

from metrics_pipeline.definitions import defs
from metrics_pipeline.defs import files
from metrics_pipeline.defs.resources import Pipeline
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.producer.run import RunReport
from metrics_pipeline.replay import intake
from metrics_pipeline.replay.folder import ReplayFolder
from metrics_pipeline.replay.source import Replay
from metrics_pipeline.settings import Settings
from metrics_pipeline.sinks import active

GOOD = "time,temp\n2024-05-01T10:00:00Z,71\n2024-05-01T10:01:00Z,72\n"
BAD = "time,temp\n2024-05-01T10:00:00Z,71\n2024-05-01T10:01:00Z,warm\n"
RECIPE: dict[str, Any] = {"device": {"name": "room-1"}, "units": {"temperature": "degF"}}
TOML = '[device]\nname = "room-1"\n\n[units]\ntemperature = "degF"\n'


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@dataclass
class Topic:
    """Takes what is published, or does not."""

    messages: list[tuple[bytes, bytes]] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    away: str = ""

    def publish(self, settings: Settings, source: Replay, **options: Any) -> RunReport:
        del settings
        if self.away:
            raise ServiceError(self.away)
        found = [message for batch in source.messages() for message in batch]
        self.messages += found
        self.options.append(options)
        return RunReport(uuid4(), "replay", "finished", acknowledged=len(found))


@pytest.fixture
def topic(monkeypatch: pytest.MonkeyPatch) -> Topic:
    made = Topic()
    monkeypatch.setattr(intake, "publish", made.publish)
    return made


def execute(instance: dg.DagsterInstance, config: dict[str, Any], **more: Any) -> dg.ExecuteInProcessResult:
    return defs.resolve_job_def("replay_files").execute_in_process(
        instance=instance, raise_on_error=False, run_config={"ops": {"replay": {"config": config}}}, **more
    )


def failure(result: dg.ExecuteInProcessResult) -> str:
    data = result.failure_data_for_node("replay")
    assert data is not None
    assert data.user_failure_data is not None, data.error
    return data.user_failure_data.description or ""


def told(instance: dg.DagsterInstance, run_id: str) -> dict[str, dict[str, Any]]:
    """Figures by the kind of the event and the file."""
    found = {}
    for entry in instance.all_logs(run_id):
        event = entry.dagster_event
        if event is not None and event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION:
            made: Any = event.step_materialization_data.materialization
        elif event is not None and event.event_type == dg.DagsterEventType.ASSET_OBSERVATION:
            made = event.asset_observation_data.asset_observation
        else:
            continue
        assert made.asset_key == dg.AssetKey("replayed_files")
        figures = {name: value.value for name, value in made.metadata.items()}
        found[f"{type(made).__name__} {figures['file']}"] = figures
    return found


# --- The job -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"recipe": RECIPE},
        {"recipe_from": "office.toml"},
        {"recipe_from": "office.toml", "recipe": {"device": {"name": "room-1"}}},
    ],
)
def test_a_recipe_is_a_structure_or_a_file_and_means_the_same(
    instance: dg.DagsterInstance, topic: Topic, tmp_path: Path, given: dict[str, Any]
) -> None:
    (tmp_path / "office.toml").write_text(TOML)
    (tmp_path / "a.csv").write_text(GOOD)
    if "recipe_from" in given:
        given = given | {"recipe_from": str(tmp_path / "office.toml")}
    result = execute(instance, {"files": [str(tmp_path / "a.csv")], "rate": 5.0, **given})
    assert result.success
    ((name, figures),) = told(instance, result.run_id).items()
    assert name == "AssetMaterialization a.csv"
    assert {key: figures[key] for key in ("state", "readings", "bad_lines", "devices", "from", "to")} == {
        "readings": 2, "bad_lines": 0, "devices": 1, "from": "2024-05-01T10:00:00+00:00", "to": "2024-05-01T10:01:00+00:00",
        "state": "done",
    }  # fmt: skip
    assert {"seconds", "run_id", "recipe", "understood"} <= figures.keys()
    assert "degF → °C" in figures["understood"]
    assert b"21.6666" in topic.messages[0][1]
    assert topic.options[0]["messages_per_second"] == 5.0
    assert (tmp_path / "a.csv").exists(), "only files of the folder are moved"


def test_a_preset_is_named(instance: dg.DagsterInstance, topic: Topic, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sensor_id;timestamp;P1;temperature;pressure\n7;2024-05-01T10:00:00;1;21;100000\n")
    assert execute(instance, {"files": [str(path)], "recipe_from": "sensor-community"}).success
    assert any(b"1000.0" in value for _, value in topic.messages), "pascals became hectopascals"


def test_a_file_that_fails_is_an_observation_and_makes_the_run_red(
    instance: dg.DagsterInstance, topic: Topic, tmp_path: Path
) -> None:
    for name, text in (("bad.csv", BAD), ("good.csv", GOOD)):
        (tmp_path / name).write_text(text)
    paths = [str(tmp_path / name) for name in ("bad.csv", "good.csv", "nowhere.csv")]
    result = execute(instance, {"files": paths, "recipe": RECIPE})
    assert not result.success
    assert "2 of 3 files are not done: bad.csv: bad_value: " in failure(result)
    found = told(instance, result.run_id)
    assert list(found) == ["AssetObservation bad.csv", "AssetMaterialization good.csv", "AssetObservation nowhere.csv"]
    assert found["AssetObservation bad.csv"]["bad_lines"] == 1
    assert "bad.csv:3: bad_value" in found["AssetObservation bad.csv"]["bad_lines_listed"][0]
    assert execute(instance, {"files": paths[:2], "recipe": RECIPE, "on_error": "skip"}).success


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"recipe": {"devise": {"name": "x"}}}, "recipe: devise is no key; there are"),
        ({"recipe": {"metrics": [{"metric": "wind", "column": "w"}]}}, "no metric has that name"),
        (
            {"recipe_from": "nowhere"},
            "recipe_from=nowhere: No such file or directory; it is the path of a file, or one of",
        ),
        ({"on_error": "ignore"}, "on_error=ignore: write stop or skip"),
    ],
)
def test_what_is_wrong_in_the_configuration_is_one_line(
    instance: dg.DagsterInstance, topic: Topic, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    (tmp_path / "a.csv").write_text(GOOD)
    assert says in failure(execute(instance, {"files": [str(tmp_path / "a.csv")], **config}))
    assert topic.messages == []


# --- The sensor --------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A folder and the sensor over it."""

    instance: dg.DagsterInstance
    path: Path
    cursor: str = ""
    not_provisioned: str | None = None
    sink: str | None = None

    def put(self, name: str, text: str = GOOD) -> Path:
        path = self.path / name
        path.write_text(text)
        return path

    def tick(self) -> dg.RunRequest | str:
        """What it launches, or why not."""
        resources = {"pipeline": Pipeline()}
        with dg.build_sensor_context(self.instance, cursor=self.cursor, resources=resources) as context:
            result = files.replay_folder_sensor(context)
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor or ""
        if result.run_requests:
            (request,) = result.run_requests
            return request
        assert isinstance(result.skip_reason, dg.SkipReason)
        return result.skip_reason.skip_message or ""

    def request(self) -> dg.RunRequest:
        found = self.tick()
        assert isinstance(found, dg.RunRequest), found
        return found

    def run(self, request: dg.RunRequest) -> dg.ExecuteInProcessResult:
        """As Dagster does what was asked for."""
        return execute(self.instance, config_of(request), tags=dict(request.tags))


def config_of(request: dg.RunRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.run_config["ops"]["replay"]["config"]
    return found


@pytest.fixture
def world(instance: dg.DagsterInstance, tmp_path: Path, topic: Topic, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(instance, tmp_path / "in")
    made.path.mkdir()
    (tmp_path / "office.toml").write_text(TOML)
    monkeypatch.setenv("REPLAY_FOLDER", str(made.path))
    monkeypatch.setenv("REPLAY_RECIPE", str(tmp_path / "office.toml"))
    monkeypatch.setattr(files, "not_provisioned", lambda _instance: made.not_provisioned)
    monkeypatch.setattr(active, "sink_problem", lambda _settings: made.sink)
    return made


def test_off_while_no_folder_is_set(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPLAY_FOLDER")
    assert world.tick() == "REPLAY_FOLDER is not set"


def test_new_files_are_replayed_once_and_bad_ones_named(world: World, topic: Topic) -> None:
    assert world.tick() == "no file is new"
    world.put("a.csv")
    world.put("bad.csv", BAD)
    assert world.tick() == "2 files are new or still being written"
    request = world.request()
    assert config_of(request)["files"] == ["a.csv", "bad.csv"]
    result = world.run(request)
    assert "1 of 2 files are not done: bad.csv: bad_value" in failure(result)
    assert list(told(world.instance, result.run_id)) == ["AssetMaterialization a.csv", "AssetObservation bad.csv"]
    assert sorted(str(path.relative_to(world.path)) for path in world.path.rglob("*.csv*")) == [
        "done/a.csv", "done/a.csv.report.json", "failed/bad.csv", "failed/bad.csv.report.json",
    ]  # fmt: skip
    assert len(topic.messages) == 2
    assert world.tick() == "no file is new"


def pass_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the pause after a failure were over."""
    monkeypatch.setattr(files, "pause_after_failures", lambda *_given: 0.0)


def test_a_failed_file_that_is_moved_back_is_another_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pass_pause(monkeypatch)
    world.put("bad.csv", BAD)
    world.tick()
    first = world.request()
    assert world.request().run_key == first.run_key, "two daemons launch it once"
    world.run(first)
    (world.path / "failed" / "bad.csv").rename(world.path / "bad.csv")
    world.tick()
    second = world.request()
    assert config_of(second) == config_of(first)
    assert second.run_key != first.run_key


def test_one_run_at_a_time(world: World) -> None:
    world.put("a.csv")
    world.tick()
    request = world.request()
    run = start(world, request)
    with ReplayFolder(world.path).lock():
        assert world.tick() == f"run {run.run_id[:8]} is STARTED"
    world.instance.report_run_canceled(run)
    with ReplayFolder(world.path).lock():
        assert world.tick() == "a run that this sensor did not launch replays the folder"
    assert world.request()


def start(world: World, request: dg.RunRequest) -> dg.DagsterRun:
    """A run that is STARTED and has no process."""
    ReplayFolder(world.path).prepare()
    job = defs.resolve_job_def("replay_files")
    return world.instance.create_run_for_job(
        job, run_config=dict(request.run_config), tags=dict(request.tags), status=dg.DagsterRunStatus.STARTED
    )


def test_a_run_whose_process_is_gone_is_ended_and_its_files_go_on(
    world: World, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.put("a.csv")
    world.tick()
    run = start(world, world.request())
    assert world.tick() == f"run {run.run_id[:8]} does not hold the folder's lock"
    monkeypatch.setattr(files, "GONE_SECONDS", 0)
    assert "its process is gone" in str(world.tick())
    ended = world.instance.get_run_by_id(run.run_id)
    assert ended is not None
    assert ended.status == dg.DagsterRunStatus.FAILURE
    pass_pause(monkeypatch)
    assert world.run(world.request()).success
    assert len(topic.messages) == 2


def test_a_file_that_a_run_could_not_move_is_not_tried_again_at_once(world: World) -> None:
    world.put("a.csv")
    world.tick()
    run = start(world, world.request())
    world.instance.report_run_failed(run)
    assert "the last runs failed: next one in " in str(world.tick())
    world.put("b.csv")
    (world.path / "a.csv").unlink()
    world.tick()
    assert config_of(world.request())["files"] == ["b.csv"], "what is new does not wait"


def test_what_was_begun_goes_on_although_no_file_is_new(
    world: World, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker is away; then somebody takes the file away."""
    path = world.put("a.csv")
    world.tick()
    topic.away = "the broker does not answer"
    assert failure(world.run(world.request())) == "the broker does not answer"
    assert path.exists()
    assert "the last runs failed: next one in " in str(world.tick())
    path.unlink()
    topic.away = ""
    pass_pause(monkeypatch)
    request = world.request()
    assert config_of(request)["files"] == []
    assert "taken away" in failure(world.run(request))
    assert world.tick() == "no file is new"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"not_provisioned": "metrics_topic not provisioned yet"}, "metrics_topic not provisioned yet"),
        ({"sink": "no task of the sink runs"}, "no task of the sink runs"),
    ],
)
def test_it_waits_for_the_pipeline(world: World, wrong: dict[str, str], says: str) -> None:
    world.put("a.csv")
    world.tick()
    for name, value in wrong.items():
        setattr(world, name, value)
    assert world.tick() == says
    for name in wrong:
        setattr(world, name, None)
    assert world.request()


def test_a_folder_that_is_missing_or_a_recipe_that_is_wrong_is_said_and_the_sensor_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.put("a.csv")
    world.tick()
    away = world.path.rename(world.path.parent / "away")
    assert "it does not exist; make it, or correct the setting" in str(world.tick())
    away.rename(world.path)
    with monkeypatch.context() as patch:
        patch.setenv("REPLAY_RECIPE", "nowhere")
        assert "REPLAY_RECIPE=nowhere: No such file or directory; it is the path of a file, or one of aranet" in str(
            world.tick()
        )
    assert world.request()


def test_what_cannot_be_read_is_named_and_the_others_go_on(world: World) -> None:
    (world.path / "link.csv").symlink_to("nowhere")
    assert world.tick() == "no file is new; link.csv is a link: put the file itself there"
    world.put("a.csv")
    world.tick()
    assert config_of(world.request())["files"] == ["a.csv"]


def test_a_run_takes_a_bounded_number_of_files(world: World) -> None:
    for number in range(files.FILES_AT_ONCE + 1):
        os.utime(world.put(f"{number:03}.csv"), (1_700_000_000, 1_700_000_000))
    world.tick()
    request = world.request()
    assert config_of(request)["files"] == [f"{number:03}.csv" for number in range(files.FILES_AT_ONCE)]
    assert yaml.safe_load(json.dumps(request.run_config)), "it can be shown, and stored"
