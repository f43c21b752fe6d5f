"""Benchmarks on real stacks of their own: figures that can be true, differences that are seen, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from metrics_pipeline import kafka, postgres
from metrics_pipeline.bench import paths, place, readings
from metrics_pipeline.bench.drain import drain
from metrics_pipeline.bench.live import live
from metrics_pipeline.bench.paths import DrainPath, LimitPath
from metrics_pipeline.bench.place import Place
from metrics_pipeline.bench.produce import produce
from metrics_pipeline.bench.readings import Reference
from metrics_pipeline.errors import BusyError
from metrics_pipeline.local.account import postgres_home, unprivileged
from metrics_pipeline.settings import CONNECTOR, Settings
from metrics_pipeline.sinks.connector import ConnectClient

pytestmark = pytest.mark.integration

RECORDS = 20_000
QUIET = (lambda *_: None, lambda _: None)


@pytest.fixture(scope="module")
def bench() -> Iterator[Place]:
    """A temporary stack; whoever drains empties its topic before."""
    with place.temporary(Settings.load(pipeline_memory_gb=4), lambda _: None) as running:
        yield running
    assert not running.settings.data_dir.parent.exists()


def command(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "metrics_pipeline", "bench", *arguments],
        env={**os.environ, "TMPDIR": str(folder), "PIPELINE_MEMORY_GB": "4"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def left_behind(folder: Path) -> list[str]:
    """Processes that speak of the folder, and stacks that are still in it."""
    processes = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()) + " ".join(process.environ().values()):
                processes.append(f"{process.pid} {process.name()}")
        except psutil.Error:
            continue
    return processes + [str(path) for path in folder.glob("metrics-pipeline-bench-*")]


def test_drain_by_command(tmp_path: Path) -> None:
    child = command("drain", f"--records={RECORDS}", "--rounds=1", "--paths=copy-1,limit-1", "--json", folder=tmp_path)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    document = json.loads(out)
    assert document["correct"] is True
    for run in document["runs"]:
        assert run["rows"] == run["check"]["rows"] == RECORDS
        assert run["check"]["compared"]
        assert run["by_commit_times"]
        assert 1_000 < run["rows_per_second"] < 5_000_000
        assert run["seconds"] == pytest.approx(run["counted"] / run["rows_per_second"])
        assert 0.1 < run["cpu"]["postgres"] < 1_000
    assert [run["path"] for run in document["runs"]] == ["copy-1", "limit-1"]
    ratio = document["ratios"]["limit-1"]["copy-1"]
    rates = {path: own["rows_per_second"]["median"] for path, own in document["paths"].items()}
    assert ratio == pytest.approx(rates["copy-1"] / rates["limit-1"])
    assert document["postgres"]["fsync"] == document["postgres"]["synchronous_commit"] == "on"
    assert document["versions"]["postgresql"].startswith("17.")
    assert document["table"]["heap_bytes"] > RECORDS * 80
    assert ElementTree.fromstring(Path(document["chart"]).read_text()).tag.endswith("svg")
    assert left_behind(tmp_path) == []


def test_an_interrupted_benchmark_leaves_nothing_behind(tmp_path: Path) -> None:
    child = command("produce", "--seconds=60", folder=tmp_path)
    try:
        assert child.stderr is not None
        assert "PostgreSQL is up" in child.stderr.readline()
        assert left_behind(tmp_path)
        (folder,) = tmp_path.glob("metrics-pipeline-bench-*")
        home = postgres_home(folder / "data", unprivileged())
        child.send_signal(signal.SIGINT)
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)  # impatience changes nothing
        child.communicate(timeout=30)  # a broker that cannot be asked to end takes 45 s
    finally:
        child.kill()
    assert child.returncode == 130
    assert left_behind(tmp_path) == []
    assert not home.exists()


class Tampering(LimitPath):
    """Stores everything, and then changes, removes or adds one row."""

    statement = b""

    def stop(self) -> None:
        super().stop()
        settings = self._place.settings
        with postgres.connect_admin(settings, settings.metrics_database) as connection:
            assert connection.execute(self.statement).rowcount == 1


REJECT = (
    "INSERT INTO rejected_metrics (topic, partition, \"offset\", reason, detail) VALUES ('metrics', 0, 0, 'x', 'x')"
)
ONE = "WHERE ctid = (SELECT min(ctid) FROM metrics)"


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        (f"UPDATE metrics SET value = value + 1 {ONE}", "1 different"),
        (f"UPDATE metrics SET tags = array_append(tags, 'more') {ONE}", "1 different"),
        (f"DELETE FROM metrics {ONE}", "1 lost"),
        (
            f"INSERT INTO metrics SELECT device_id, '2001-02-03Z', metric_name, value, tags FROM metrics {ONE}",
            "1 unexpected",
        ),
        (REJECT, "1 rejects, expected 0"),
    ],
)
def test_a_tampered_table_is_not_correct(bench: Place, statement: str, finding: str) -> None:
    def make(where: Place, name: str, _: str, reference: Reference) -> DrainPath:
        path = Tampering(where, 1, reference)
        path.name, path.statement = name, statement.encode()
        return path

    readings.empty_topic(bench.settings)
    found = drain(bench, 5_000, 1, ["limit-1"], *QUIET, make=make)
    assert not found.correct
    assert finding in found.runs[0].checked.findings


def test_a_checksum_alone_sees_it_in_later_rounds(bench: Place) -> None:
    ways: list[DrainPath] = []

    def make(where: Place, name: str, connector: str, reference: Reference) -> DrainPath:
        if ways:
            tampering = Tampering(where, 1, reference)
            tampering.name, tampering.statement = name, f"DELETE FROM metrics {ONE}".encode()
            ways.append(tampering)
        else:
            ways.append(paths.make(where, name, connector, reference))
        return ways[-1]

    readings.empty_topic(bench.settings)
    found = drain(bench, 5_000, 2, ["limit-2"], *QUIET, make=make)
    assert [run.checked.equal for run in found.runs] == [True, False]
    assert "1 lost" in found.runs[1].checked.findings


def test_bad_records_among_the_good_ones_are_measured_too(bench: Place) -> None:
    readings.empty_topic(bench.settings)
    found = drain(bench, RECORDS, 1, ["limit-1", "copy-1"], *QUIET, bad_every=100)
    assert found.correct, found.runs
    assert [(run.path, run.checked.rows) for run in found.runs] == [
        ("limit-1", RECORDS),
        ("copy-1", RECORDS),
        ("copy-1-bad", RECORDS * 99 // 100),
    ]
    document = found.document()
    ratios = document["ratios"]["limit-1"]
    assert document["ratios_with_bad_records"]["copy-1"] == pytest.approx(ratios["copy-1-bad"] / ratios["copy-1"])
    # What is left in the topic is not of the wire format: the next test begins with an empty one.
    readings.empty_topic(bench.settings)


def test_connectors_drain_the_same_readings(bench: Place) -> None:
    readings.empty_topic(bench.settings)
    found = drain(bench, RECORDS, 1, ["connect", "connect-baseline"], *QUIET)
    assert found.correct, found.runs
    assert {run.checked.rows for run in found.runs} == {RECORDS}
    assert all(run.timed.cpu["connect"] > 1 for run in found.runs)
    assert ConnectClient(bench.settings.connect_urls).state("anything").connector == "MISSING"


def test_the_producer_alone(bench: Place) -> None:
    found = produce(bench, 6, {"kafka_batch_size": 400}, lambda *_: None)
    assert 1_000 < found["messages_per_second"] < 5_000_000
    assert found["acknowledged"] > found["messages"]
    assert found["settings"]["KAFKA_BATCH_SIZE"] == 400
    assert found["settings"]["PRODUCER_PUBLISH_INTERVAL"] == 0
    assert 0.1 < found["cpu_us_per_message"] < 500


def test_producer_and_sink_together(bench: Place) -> None:
    readings.empty_topic(bench.settings)
    found = live(bench, "copy", 5_000, 8, {}, *QUIET)
    (run,) = found["runs"]
    assert found["correct"], run["findings"]
    assert run["compared"]
    assert run["rows"] == run["acknowledged"]
    assert run["acknowledged_per_second"] == pytest.approx(5_000, rel=0.2)
    assert run["latency"]["samples"] > 20
    assert 0 < run["latency"]["p50"] <= run["latency"]["p95"] <= run["latency"]["p99"] < 30
    assert len(run["looks"]) >= 4


def test_here_refuses_company_and_leaves_the_services_as_they_were_but_empty(bench: Place) -> None:
    settings = bench.settings
    produce(bench, 5, {}, lambda *_: None)
    with postgres.connect_admin(settings, settings.metrics_database) as connection:
        connection.execute(f"{REJECT} ON CONFLICT DO NOTHING")  # another test may have left it
    with (
        postgres.connect(settings, "metrics_writer", application_name="metrics-pipeline sink 1"),
        pytest.raises(BusyError, match="COPY sink"),
        place.here(settings, lambda _: None),
    ):
        pass
    with place.here(settings, lambda _: None) as own:
        assert not own.temporary
        assert all(low == high for low, high in kafka.watermarks(settings).values())
        assert drain(own, 5_000, 1, ["limit-1"], *QUIET).correct
    with postgres.connect_admin(settings, settings.metrics_database) as connection:
        for name in ("metrics", "rejected_metrics"):
            assert connection.execute(f"SELECT count(*) FROM {name}").fetchone() == (0,)
        assert connection.execute("SELECT active FROM sink_state").fetchone() == ("connect",)
    assert all(low == high for low, high in kafka.watermarks(settings).values())
    assert ConnectClient(settings.connect_urls).state(CONNECTOR).connector == "MISSING"
