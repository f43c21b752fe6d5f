"""Two pipelines on one machine, one with each sink, in folders of odd names, in a shell whose variables are all hostile.

The second is told nothing but `--free-ports`: every port of its settings is one of the first one's. Each is stopped while the other runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from metrics_pipeline.data_folder import VARIABLE, folder_id
from metrics_pipeline.definitions import defs
from metrics_pipeline.local.account import postgres_home, unprivileged
from metrics_pipeline.local.environment import for_python, isolated, replaced
from metrics_pipeline.local.jars import cache_dir
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.local.processes import marked
from metrics_pipeline.local.state import StackState
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.fakes import until
from metrics_pipeline_tests.integration.test_keeper import LOAD, Pipeline
from metrics_pipeline_tests.integration.test_sessions import VARIABLES
from metrics_pipeline_tests.patience import patience

pytestmark = [pytest.mark.integration, pytest.mark.whole_stack]

ODD = "a b ä 日本 # = '"
"""Letters that end something, or mean something else, somewhere on the way to Kafka."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")

BY_HAND = (
    "provision",
    "check_provisioning",
    "summaries",
    "check_throughput",
    "housekeeping",
    "replay_files",
    "partitions",
    "archive",
)
"""All jobs but `produce_metrics`, which is at work all the while."""
ENOUGH = ("provision", "replay_files", "archive")
"""Of these jobs: between them they ask everything that a job asks of others."""


@dataclass(frozen=True)
class Two:
    """The first stores by Kafka Connect, the second by the COPY sink."""

    connect: Pipeline
    copy: Pipeline


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    """Both up; the second one's ports were moved."""
    home = Path(tempfile.mkdtemp(prefix="metrics-pipeline-two-")) / ODD
    home.mkdir()
    ports = {name: port for name, port in isolated(home).items() if name.endswith("_PORT")}
    (nobody,) = free_ports(1)
    cache = home / "cache"
    cache.mkdir()
    (cache / "jars").symlink_to(cache_dir(Settings.load()).absolute() / "jars")
    common = {name: value for name, value in os.environ.items() if name.lower() not in ("no_proxy", "no_grpc_proxy")}
    common |= dict.fromkeys(PROXIES, f"http://127.0.0.1:{nobody}")
    common |= VARIABLES | hostile_python(home.parent)
    common |= LOAD | {"PIPELINE_MEMORY_GB": "3", "PIPELINE_CACHE_DIR": str(cache)}
    made = []
    for name in ("connect", "copy"):
        folder = home / name
        folder.mkdir()
        (folder / "env").write_text("".join(f"{port}={number}\n" for port, number in ports.items()) + f"SINK={name}\n")
        own = {"PIPELINE_ENV_FILE": str(folder / "env"), "PIPELINE_DATA_DIR": str(folder / "data")}
        made.append(Pipeline(common | own, folder / "data"))
    pair = Two(*made)
    try:
        begin(pair.connect)
        begin(pair.copy, "--free-ports")
        yield pair
    finally:
        ends = [pipeline.cli("down") for pipeline in made]
        for pipeline in made:
            shutil.rmtree(postgres_home(pipeline.data, unprivileged()), ignore_errors=True)
        shutil.rmtree(home.parent, ignore_errors=True)
        assert [end.returncode for end in ends] == [0, 0], [end.stdout + end.stderr for end in ends]


def hostile_python(folder: Path) -> dict[str, str]:
    """Variables of Python's and pip's, and packages that are too old."""
    old = folder / "old"
    old.mkdir()
    for name in ("numpy", "pydantic", "dagster"):
        (old / f"{name}.py").write_text("raise ImportError('too old')")
    return {
        "PYTHONPATH": str(old),
        "PYTHONOPTIMIZE": "2",
        "PYTHONWARNINGS": "error",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONSTARTUP": "/nowhere",
        "VIRTUAL_ENV": "/nowhere",
        "PIP_USER": "1",
        "PIP_TARGET": "/nowhere",
    }


def begin(pipeline: Pipeline, *options: str) -> None:
    """Up, and readings are stored."""
    up = pipeline.cli("up", "--detach", *options, timeout=500)
    assert up.returncode == 0, up.stdout + up.stderr
    pipeline.wait("storing readings", flows, 120)


def flows(sample: dict[str, Any]) -> bool:
    parts = ("postgres", "broker", "sink", "producer", "dagster")
    return all(sample[part]["healthy"] for part in parts) and (sample["rows_per_second"] or 0) > 0


def running(pipeline: Pipeline) -> set[int]:
    """Every process that was started for it."""
    return {process.pid for process, _ in marked(folder_id(pipeline.settings()))}


def end(pipeline: Pipeline) -> None:
    """Down, and nothing of it runs any more."""
    assert running(pipeline)
    down = pipeline.cli("down", timeout=400)
    assert down.returncode == 0, down.stdout + down.stderr
    assert running(pipeline) == set()


def test_each_is_itself_and_is_right(two: Two) -> None:
    for pipeline, kind in ((two.connect, "connect"), (two.copy, "copy")):
        sample = pipeline.status()
        settings = pipeline.settings()
        assert sample["sink"]["kind"] == kind
        assert sample["producer"]["url"] == settings.producer_http
        assert sample["postgres"]["url"].endswith(f":{settings.postgres_port}/metrics")
    ports = [
        {getattr(p.settings(), name) for name in ("kafka_port", "producer_port", "dagster_port")}
        for p in (two.connect, two.copy)
    ]
    assert not ports[0] & ports[1]
    two.connect.verify()
    two.copy.verify()


@pytest.mark.parametrize("job", [pytest.param(job, marks=() if job in ENOUGH else pytest.mark.long) for job in BY_HAND])
def test_dagster_by_hand_needs_no_proxy_either(job: str, two: Two, tmp_path: Path) -> None:
    every = {one.name for one in defs.get_repository_def().get_all_jobs()} - {"__ASSET_JOB"}
    assert every == {*BY_HAND, "produce_metrics"}, "a new job is to be tried here"
    pipeline = (two.connect, two.copy)[BY_HAND.index(job) % 2]
    with replaced(pipeline.environment):
        variables = for_python(Settings.load()) | {name: pipeline.environment[name] for name in (*PROXIES, *VARIABLES)}
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        del variables[name]
    command = [
        str(Path(sys.executable).parent / "dagster"),
        "job",
        "execute",
        "-m",
        "metrics_pipeline.definitions",
        "-j",
        job,
    ]
    if job == "replay_files":
        file = tmp_path / "readings.csv"
        file.write_text("time,device,temperature\n2026-11-01T10:00:00Z,attic,21.5\n")
        (tmp_path / "config.yaml").write_text(json.dumps({"ops": {"replay": {"config": {"files": [str(file)]}}}}))
        command += ["--config", str(tmp_path / "config.yaml")]
    if job == "archive":
        variables["METRICS_ARCHIVE"] = str(tmp_path / "archive")
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        command += ["--tags", json.dumps({f"dagster/asset_partition_range_{end}": today for end in ("start", "end")})]
    done = subprocess.run(
        command, env=variables, cwd=pipeline.data, capture_output=True, text=True, timeout=patience(200), check=False
    )
    if job == "archive":  # as PostgreSQL says that it was asked
        assert "no closed partition begins within" in done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
    else:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_part_of_another_stack_on_our_port_is_not_taken_for_ours(two: Two) -> None:
    """As if both had kept the same ports: one asks where the other one answers."""
    theirs = two.connect.settings()
    ports = {name.upper(): str(getattr(theirs, name)) for name in Settings.group("ports")}
    passwords = {name.upper(): getattr(theirs, name).get_secret_value() for name in Settings.group("secrets")}
    mistaken = Pipeline(two.copy.environment | ports | passwords, two.copy.data)
    two.connect.wait("at work", flows)
    parts = ("postgres", "broker", "producer", "dagster")
    sample: dict[str, Any] = {}

    def all_answer() -> bool:
        said = mistaken.cli("status", "--json")
        assert said.returncode == 1
        sample.update(json.loads(said.stdout))
        assert not any(sample[part]["healthy"] for part in parts), sample
        return all("what answers" in sample[part]["reason"] for part in parts)

    assert until(all_answer, 30), sample
    assert (sample["rows"], sample["lag"], sample["acknowledged_per_second"]) == (None, None, 0)


@pytest.mark.long
@pytest.mark.parametrize("first", ["connect", "copy"])
def test_each_goes_on_while_the_other_one_ends_and_begins(first: str, two: Two) -> None:
    one, other = (two.connect, two.copy) if first == "connect" else (two.copy, two.connect)
    before = running(other)
    end(one)
    assert running(other) >= before - {pid for pid in before if not Path(f"/proc/{pid}").exists()}
    other.wait("storing readings beside one that ended", flows, 60)
    other.verify()
    begin(one)
    two.connect.verify()
    two.copy.verify()


@pytest.mark.parametrize(
    "note",
    ["gone", *(pytest.param(note, marks=pytest.mark.long) for note in ("of a clock that was set", "of nobody"))],
)
def test_down_ends_what_a_killed_keeper_left_whatever_is_written_of_it(note: str, two: Two) -> None:
    pipeline = two.copy
    pipeline.kill_keeper()
    path = pipeline.data / "stack.json"
    content = json.loads(path.read_text("utf-8"))
    if note == "gone":
        path.unlink()
    else:
        for child in [content["keeper"], *content["children"].values()]:
            del child["started"]
            child["created"] = time.time() - 5 if note == "of nobody" else 5.0
        path.write_text(json.dumps(content))
    reset = pipeline.cli("reset", "--yes")
    assert reset.returncode == 1
    assert "services of this stack still run (" in reset.stderr
    end(pipeline)
    assert StackState.read(pipeline.data) == StackState()
    assert until(lambda: not running(pipeline), 5)
    two.connect.wait("storing readings all the while", flows, 60)
    begin(pipeline)
    pipeline.verify()


def test_the_mark_reaches_every_process(two: Two) -> None:
    """Nobody's child is without it: it is by the mark that they are found."""
    for pipeline in (two.connect, two.copy):
        children = StackState.read(pipeline.data).children
        assert children
        for name in children:
            assert pipeline.child(name).environ()[VARIABLE] == f"{folder_id(pipeline.settings())}/{name}"


@pytest.mark.parametrize(("letter", "called"), [(",", "a comma"), ("\\", "a backslash")])
def test_a_folder_that_kafka_cannot_be_told_is_refused_before_anything_is_made(
    letter: str, called: str, tmp_path: Path
) -> None:
    for name in ("PIPELINE_DATA_DIR", "PIPELINE_CACHE_DIR"):
        environment = dict(os.environ) | isolated(tmp_path) | {name: str(tmp_path / f"a{letter}b")}
        for options in ([], ["--detach"]):
            done = Pipeline(environment, tmp_path / "data").cli("up", *options)
            assert done.returncode == 2
            assert done.stderr.startswith(f"error: {name}: there is {called} in ")
    assert list(tmp_path.iterdir()) == []
