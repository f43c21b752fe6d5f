"""Files that people put into a folder, while the pipeline runs: the sensor's runs die, and each reading is there once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from metrics_pipeline import kafka
from metrics_pipeline.defs import files
from metrics_pipeline.defs.resources import Pipeline
from metrics_pipeline.producer import ledger
from metrics_pipeline.replay.cells import device_id
from metrics_pipeline.replay.folder import ReplayFolder, sha256
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.patience import deadline, patience

pytestmark = pytest.mark.integration

LINES = 200
START = datetime(2024, 5, 1, tzinfo=UTC)
RATE = 150.0
"""Readings a second: a file takes a few seconds, so that a process can be killed in the middle of one."""


@dataclass
class Drop:
    """The folder, the sensor over it, and Dagster on this stack."""

    stack: RunningStack
    instance: dg.DagsterInstance
    folder: ReplayFolder
    work: Path
    cursor: str = ""

    def tick(self) -> dg.RunRequest | str:
        with dg.build_sensor_context(self.instance, cursor=self.cursor, resources={"pipeline": Pipeline()}) as context:
            result = files.replay_folder_sensor(context)
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor or ""
        if result.run_requests:
            return result.run_requests[0]
        assert isinstance(result.skip_reason, dg.SkipReason)
        return result.skip_reason.skip_message or ""

    def request(self) -> dg.RunRequest:
        """What the sensor launches, sooner or later."""
        said: list[object] = []

        def launches() -> bool:
            said.append(self.tick())
            return isinstance(said[-1], dg.RunRequest)

        wait_for(launches, said)
        assert isinstance(said[-1], dg.RunRequest)
        return said[-1]

    def execute(self, job: str, config: dict[str, Any], tags: dict[str, str]) -> subprocess.Popen[bytes]:
        """Run a job in a process of its own, whose output is in `log`."""
        file = self.work / f"{job}.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [str(Path(sys.executable).parent / "dagster"), "job", "execute", "-m", "metrics_pipeline.definitions"]
        command += ["-j", job, "-c", str(file), "--tags", json.dumps(tags)]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.work, env=dict(self.stack.environment), stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> Path:
        return self.work / "runs.log"

    def launch(self, request: dg.RunRequest, *, rate: float | None = None) -> subprocess.Popen[bytes]:
        """As Dagster does what the sensor asked for."""
        config = json.loads(json.dumps(request.run_config))
        config["ops"]["replay"]["config"]["rate"] = rate
        return self.execute("replay_files", config, dict(request.tags))

    def names(self, folder: str) -> set[str]:
        return {path.name for path in (self.folder.path / folder).iterdir() if not path.name.endswith(".report.json")}

    def rows(self, device: str) -> int:
        with self.stack.admin() as connection:
            row = connection.execute("SELECT count(*) FROM metrics WHERE device_id = %s", [device_id(device)])
            return int((row.fetchone() or (0,))[0])

    def told(self) -> dict[str, list[dict[str, Any]]]:
        """Figures of the materializations of each file."""
        found: dict[str, list[dict[str, Any]]] = {}
        records = self.instance.fetch_materializations(dg.AssetKey("replayed_files"), limit=100).records
        for record in records:
            made = record.asset_materialization
            assert made is not None
            figures = {name: value.value for name, value in made.metadata.items()}
            found.setdefault(str(figures["file"]), []).append(figures)
        return found


def wait_for(condition: Callable[[], bool], said: object = None, seconds: float = 120) -> None:
    give_up = deadline(seconds)
    while not condition():
        assert time.monotonic() < give_up, said
        time.sleep(0.2)


@pytest.fixture
def drop(stack: RunningStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drop]:
    folder = tmp_path / "in"
    folder.mkdir()
    recipe = tmp_path / "rooms.toml"
    recipe.write_text('[time]\nzone = "UTC"\n\n[units]\ntemperature = "degF"\n')
    for name, value in stack.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("REPLAY_FOLDER", str(folder))
    monkeypatch.setenv("REPLAY_RECIPE", str(recipe))
    monkeypatch.setattr(files, "GONE_SECONDS", 1.0)
    with dg.DagsterInstance.from_config(stack.environment["DAGSTER_HOME"]) as instance:
        yield Drop(stack, instance, ReplayFolder(folder), tmp_path)


def good(device: str) -> str:
    lines = [
        f"{(START + timedelta(minutes=at)).isoformat()},{device},{70 + at / 100},{400 + at}\n" for at in range(LINES)
    ]
    return "".join(["time,device,temperature,co2\n", *lines])


BAD = {
    "bad-1.csv": good("bad-1").replace(",450\n", ",many\n"),
    "bad-2.csv": "time,device,temperature\n01/02/2024 10:00,bad-2,70\n",
    "bad-3.parquet": "this is no Parquet",
}
GOOD = [f"room-{number}" for number in range(1, 8)]


def test_ten_files_three_of_them_bad_killed_in_the_middle(drop: Drop) -> None:
    assert drop.execute("provision", {}, {}).wait(patience(120)) == 0, drop.log.read_text()
    config = {"producer_min_metrics": 100, "producer_max_metrics": 200, "producer_run_seconds": 600}
    producer = drop.execute("produce_metrics", {"ops": {"publish": {"config": config}}}, {})
    try:
        wait_for(lambda: ledger.holder(drop.stack.settings) is not None)
        for device in GOOD:
            (drop.folder.path / f"{device}.csv").write_text(good(device))
        for name, text in BAD.items():
            (drop.folder.path / name).write_text(text)
        digests = {name: sha256(drop.folder.path / name) for name in (*BAD, *(f"{each}.csv" for each in GOOD))}

        # Killed in the middle of a file, when some are moved and some are not.
        first = drop.launch(drop.request(), rate=RATE)
        begun = wait_until_published(drop, first)
        first.send_signal(signal.SIGKILL)
        first.wait(patience(30))
        moved = drop.names("done") | drop.names("failed")
        assert 0 < len(moved) < 10
        assert begun not in moved
        left = set(digests) - moved
        assert begun in left

        # The sensor sees that the process is gone, and goes on with what is left, by the recipe with which it was begun.
        second = drop.request()
        assert set(second.run_config["ops"]["replay"]["config"]["files"]) == left
        assert drop.launch(second).wait(patience(240)) == (1 if left & set(BAD) else 0), drop.log.read_text()

        assert drop.names("done") == {f"{device}.csv" for device in GOOD}
        assert drop.names("failed") == set(BAD)
        for place, names in (("done", [f"{device}.csv" for device in GOOD]), ("failed", list(BAD))):
            for name in names:
                document = json.loads((drop.folder.path / place / f"{name}.report.json").read_text())
                assert (document["sha256"], document["state"]) == (digests[name], place)
        assert drop.folder.notes() == []
        assert drop.tick() == "no file is new"
    finally:
        producer.send_signal(signal.SIGINT)
        producer.wait(patience(120))

    wait_for(lambda: kafka.consumer_lag(drop.stack.settings).total == 0)
    assert {device: drop.rows(device) for device in GOOD} == dict.fromkeys(GOOD, 2 * LINES)
    assert drop.rows("bad-1") == drop.rows("bad-2") == 0
    with drop.stack.admin() as connection:
        warmest = connection.execute(
            "SELECT max(value) FROM metrics WHERE device_id = %s AND metric_name = 0", [device_id("room-1")]
        ).fetchone()
    assert warmest == (pytest.approx((70 + (LINES - 1) / 100 - 32) / 1.8),)
    told = drop.told()
    assert set(told) == {f"{device}.csv" for device in GOOD}
    for each in told.values():
        assert len(each) == 1
        assert (each[0]["readings"], each[0]["bad_lines"], each[0]["devices"]) == (2 * LINES, 0, 1)
    verified = drop.stack.cli("verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr


def wait_until_published(drop: Drop, process: subprocess.Popen[bytes]) -> str:
    """Until something is moved and some readings of the next good file are acknowledged: its name."""
    found: list[str] = []
    drop.folder.prepare()

    def under_way() -> bool:
        assert process.poll() is None, drop.log.read_text()
        notes = [note for note in drop.folder.notes() if not note.place and note.name not in BAD]
        found[:] = [note.name for note in notes if 0 < drop.rows(note.name.removesuffix(".csv")) < LINES]
        return bool(found) and bool(drop.names("done"))

    wait_for(under_way, found, 240)
    return found[0]
