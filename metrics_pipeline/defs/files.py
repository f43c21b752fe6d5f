"""Files of readings: a job that replays them, and a sensor over a folder into which people put them."""

import json
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Optional

import dagster as dg
from pydantic import Field

from metrics_pipeline.defs.production import (
    OBSERVE_SECONDS,
    end_when_cancelled,
    pause_after_failures,
    storage_at_the_end,
    storage_may_be_away,
)
from metrics_pipeline.defs.provisioning import metrics_topic, not_provisioned
from metrics_pipeline.defs.resources import ACTIVE, OWNERS, Pipeline, plain_errors
from metrics_pipeline.errors import PipelineError, SettingError
from metrics_pipeline.producer.endpoints import Snapshot
from metrics_pipeline.producer.guards import check_disk
from metrics_pipeline.replay.folder import Look, ReplayFolder
from metrics_pipeline.replay.intake import FileError, Intake, Result, replay_one
from metrics_pipeline.replay.recipe import Recipe, checked_recipe, named_recipe
from metrics_pipeline.settings import Settings
from metrics_pipeline.sinks import active

FILES_AT_ONCE: Final = 100
"""Most files of a run of the sensor's."""
RUN_SECONDS: Final = 1800.0
"""After which such a run begins no further file."""
GONE_SECONDS: Final = 60.0
"""A run that is STARTED and has not held the folder's lock for this long has lost its process."""
FOLDER_TAG: Final = "metrics_pipeline/replay_folder"

replayed_files = dg.AssetSpec(
    "replayed_files",
    deps=[metrics_topic],
    group_name="readings",
    kinds={"file", "kafka"},
    owners=OWNERS,
    description="Files whose readings were published by the job `replay_files`: a materialization each, with its figures.",
)


class ReplayConfig(dg.Config):
    """Which files, and what they mean."""

    files: list[str] = Field([], description="paths of files; names in the folder when that is given")
    recipe: dict[str, Any] = Field({}, description="keys of a recipe file; they stand before those of `recipe_from`")
    recipe_from: str = Field("", description="path of a recipe file, or a preset's name; default: what fits by itself")
    on_error: str = Field(
        "stop", description="when a line is bad: `stop` publishes nothing of its file, `skip` leaves it out"
    )
    allow_implausible: bool = Field(False, description="publish values that are not possible for their metric, too")
    rate: Optional[float] = Field(None, description="messages a second; default: as fast as it goes")  # noqa: UP045  # Dagster knows no other
    folder: str = Field(
        "", description="the folder, as REPLAY_FOLDER has it: files are moved to `done` or `failed` in it"
    )

    def meant(self) -> Recipe:
        """The recipe that is said here.

        Raises:
            SettingError: it is not as a recipe must be, or there is none of that name.
        """
        return checked_recipe(self.recipe, "recipe").over(named_recipe("recipe_from", self.recipe_from))


@dg.op
def replay(context: dg.OpExecutionContext, config: ReplayConfig, pipeline: Pipeline) -> None:
    """Publish files one after the other, each of them a materialization of `replayed_files`."""
    with plain_errors(), storage_at_the_end(context):
        settings = pipeline.load()
        if config.on_error not in ("stop", "skip"):
            raise SettingError(f"on_error={config.on_error}: write stop or skip")
        results = list(_replayed(context, config, settings))
        if wrong := [result for result in results if result.state != "done"]:
            said = "; ".join(f"{result.name}: {result.error}" for result in wrong[:10])
            raise dg.Failure(f"{len(wrong)} of {len(results)} files are not done: {said}", allow_retries=False)


def _replayed(context: dg.OpExecutionContext, config: ReplayConfig, settings: Settings) -> Iterator[Result]:
    looked = time.monotonic()

    def progress(_snapshot: Snapshot) -> None:
        nonlocal looked
        if time.monotonic() - looked >= OBSERVE_SECONDS:
            looked = time.monotonic()
            end_when_cancelled(context)

    def tell(result: Result) -> None:
        with storage_may_be_away():
            context.log_event(_event(result))

    options: dict[str, Any] = {
        "skip_bad": config.on_error == "skip",
        "allow_implausible": config.allow_implausible,
        "on_progress": progress,
        "messages_per_second": config.rate,
    }
    meant = config.meant()
    if config.folder:
        intake = Intake(settings, ReplayFolder(Path(config.folder)), meant, told=tell, **options)
        yield from intake.run(config.files, RUN_SECONDS)
        return
    for path in map(Path, config.files):
        try:
            result = Result(path.name, "done", replay_one(settings, path, meant, **options))
        except FileError as error:
            result = Result(path.name, "failed", error.document, str(error))
        tell(result)
        yield result


def _event(result: Result) -> dg.AssetMaterialization | dg.AssetObservation:
    """A file that is published is a materialization; one that is not, an observation."""
    figures = dict(result.document)
    listed: list[str] = figures.pop("understood", [])
    figures = {
        "file": result.name,
        "state": result.state,
        **{name: value for name, value in figures.items() if isinstance(value, (str, int, float)) and value != ""},
    }
    metadata: dict[str, Any] = figures | {"understood": dg.MetadataValue.md("```\n" + "\n".join(listed) + "\n```")}
    if bad := result.document.get("bad_lines_listed"):
        metadata["bad_lines_listed"] = dg.MetadataValue.json(bad)
    kind = dg.AssetMaterialization if result.state == "done" else dg.AssetObservation
    return kind(replayed_files.key, description=result.error or result.name, metadata=metadata)


# A big file takes longer than the limit that other runs have.
@dg.job(executor_def=dg.in_process_executor, tags={dg.MAX_RUNTIME_SECONDS_TAG: "86400"})
def replay_files() -> None:
    """Readings in files, published as a recipe says; beside the producer, and as often as it is launched."""
    replay()


# By name: as `producer_sensor`.
@dg.sensor(job_name="replay_files", minimum_interval_seconds=10, default_status=dg.DefaultSensorStatus.RUNNING)
def replay_folder_sensor(context: dg.SensorEvaluationContext, pipeline: Pipeline) -> dg.SensorResult:
    """Replay each new file in REPLAY_FOLDER once it stands still, and move it to `done` or `failed` with its report."""
    state = json.loads(context.cursor or "{}")
    found = Look()
    reason: str | None
    try:
        settings = pipeline.load()
        if settings.replay_path is None:
            return dg.SensorResult(skip_reason="REPLAY_FOLDER is not set", cursor="")
        folder = ReplayFolder(settings.replay_path)
        found = folder.look(state.get("seen", {}))
        named_recipe("REPLAY_RECIPE", settings.replay_recipe)
        reason = _not_now(context.instance, settings, folder, found, state)
    except (PipelineError, OSError) as error:
        reason = str(error)
    cursor = json.dumps({"seen": found.seen, "gone": state.get("gone")})
    if reason:
        return dg.SensorResult(skip_reason="; ".join([reason, *found.problems]), cursor=cursor)
    for problem in found.problems:
        context.log.warning(problem)
    return dg.SensorResult(run_requests=[_request(context.instance, settings, folder, found)], cursor=cursor)


def _not_now(
    instance: dg.DagsterInstance, settings: Settings, folder: ReplayFolder, found: Look, state: dict[str, Any]
) -> str | None:
    """Why no run should start now, or None; notes in the state since when a run seems to be dead."""
    gone, state["gone"] = state.get("gone"), None
    if records := instance.get_run_records(_runs(folder, ACTIVE), limit=1):
        run = records[0].dagster_run
        if run.status != dg.DagsterRunStatus.STARTED or folder.locked():
            return f"run {run.run_id[:8]} is {run.status.value}"
        since = gone["since"] if gone and gone["run"] == run.run_id else time.time()
        if time.time() - since < GONE_SECONDS:
            state["gone"] = {"run": run.run_id, "since": since}
            return f"run {run.run_id[:8]} does not hold the folder's lock"
        died = f"its process is gone: it has not held the folder's lock for {GONE_SECONDS:.0f} s"
        instance.report_run_failed(run, died)
        return f"run {run.run_id[:8]}: {died}"
    if not found.ready and not found.under_way:
        return f"{found.waiting} files are new or still being written" if found.waiting else "no file is new"
    if folder.locked():
        return "a run that this sensor did not launch replays the folder"
    if reason := not_provisioned(instance):
        return reason
    check_disk(settings.data_dir, settings.disk_free_limit_gb)
    if problem := active.sink_problem(settings):
        return problem
    wait = pause_after_failures(instance, replay_files.name, time.time()) if _in_vain(instance, folder, found) else 0
    return f"the last runs failed: next one in {wait:.0f} s" if wait > 0 else None


def _in_vain(instance: dg.DagsterInstance, folder: ReplayFolder, found: Look) -> bool:
    """Whether the last run left something that it had to move; one that failed for a bad file has moved that."""
    asked: set[str] = set()
    for record in instance.get_run_records(_runs(folder), limit=1):
        config: Any = record.dagster_run.run_config
        asked.update(config.get("ops", {}).get(replay.name, {}).get("config", {}).get("files", []))
    return bool(found.under_way or asked & set(found.ready))


def _request(instance: dg.DagsterInstance, settings: Settings, folder: ReplayFolder, found: Look) -> dg.RunRequest:
    names = found.ready[:FILES_AT_ONCE]
    config = {
        "files": names,
        "folder": str(folder.path),
        "recipe_from": settings.replay_recipe,
        "on_error": settings.replay_on_error,
    }
    tags = {FOLDER_TAG: str(folder.path)}
    # Two daemons launch it once; after it ended, whatever is still there, or there again, may be launched again.
    former = [record.dagster_run.run_id for record in instance.get_run_records(_runs(folder), limit=1)]
    key = sha256(json.dumps([former, [[name, *found.seen[name]] for name in names]]).encode()).hexdigest()
    return dg.RunRequest(run_key=key, run_config={"ops": {replay.name: {"config": config}}}, tags=tags)


def _runs(folder: ReplayFolder, statuses: Sequence[dg.DagsterRunStatus] | None = None) -> dg.RunsFilter:
    return dg.RunsFilter(job_name=replay_files.name, statuses=statuses, tags={FOLDER_TAG: str(folder.path)})


DEFINITIONS = dg.Definitions(assets=[replayed_files], jobs=[replay_files], sensors=[replay_folder_sensor])
