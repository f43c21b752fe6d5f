"""Benchmarks on real stacks of their own: figures that can be true, differences that are seen, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from uuid import UUID
from xml.etree import ElementTree

import psutil
import pytest

from metrics_pipeline import kafka, postgres
from metrics_pipeline.bench import growth as growing
from metrics_pipeline.bench import layout as layouts
from metrics_pipeline.bench import paths, place, readings, staging
from metrics_pipeline.bench.drain import drain
from metrics_pipeline.bench.growth import Plan
from metrics_pipeline.bench.layout import Layout
from metrics_pipeline.bench.live import live
from metrics_pipeline.bench.paths import DrainPath, LimitPath
from metrics_pipeline.bench.place import Place
from metrics_pipeline.bench.produce import produce
from metrics_pipeline.bench.readings import Reference, simulated
from metrics_pipeline.copy_sink.batch import BatchDecoder, Chunk
from metrics_pipeline.errors import BusyError
from metrics_pipeline.local.account import postgres_home, unprivileged
from metrics_pipeline.metric import decode
from metrics_pipeline.settings import CONNECTOR, Settings
from metrics_pipeline.sinks.connector import ConnectClient
from metrics_pipeline_tests.databases import own_database
from metrics_pipeline_tests.fake_sink import FakeMessage
from metrics_pipeline_tests.patience import patience

pytestmark = pytest.mark.integration

RECORDS = 20_000
QUIET = (lambda *_: None, lambda _: None)


@pytest.fixture(scope="module")
def bench() -> Iterator[Place]:
    """A temporary stack; whoever drains empties its topic before."""
    with place.temporary(Settings.load(pipeline_memory_gb=4), lambda _: None) as running:
        yield running
    assert not running.settings.data_dir.parent.exists()


@contextmanager
def command(*arguments: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A benchmark, which is gone afterwards whatever becomes of the test."""
    with subprocess.Popen(
        [sys.executable, "-m", "metrics_pipeline", "bench", *arguments],
        env={**os.environ, "TMPDIR": str(folder), "PIPELINE_MEMORY_GB": "4"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


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
    arguments = ("drain", f"--records={RECORDS}", "--rounds=1", "--paths=copy-1,limit-1", "--json")
    with command(*arguments, folder=tmp_path) as child:
        out, err = child.communicate(timeout=patience(120))
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
    with command("produce", "--seconds=60", folder=tmp_path) as child:
        assert child.stderr is not None
        assert "PostgreSQL is up" in child.stderr.readline()
        assert left_behind(tmp_path)
        (folder,) = tmp_path.glob("metrics-pipeline-bench-*")
        home = postgres_home(folder / "data", unprivileged())
        child.send_signal(signal.SIGINT)
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)  # impatience changes nothing
        child.communicate(timeout=30)  # a broker that cannot be asked to end takes 45 s
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


@contextmanager
def laid_out(bench: Place, layout: Layout) -> Iterator[Place]:
    """A database of its own with another layout, on the same services."""
    with own_database(bench.settings) as own:
        layouts.prepare(own, layout)
        environment = {**bench.environment, "POSTGRES_DB": own.postgres_db}
        yield replace(bench, settings=own, environment=environment, layout=layout)


def kinds(settings: Settings) -> dict[str, str]:
    """Kind of each table of readings: `r` for a heap, `p` for a partitioned table."""
    with postgres.connect(settings, "metrics_reader") as connection:
        return dict(
            connection.execute(
                "SELECT relname, relkind::text FROM pg_class WHERE relname LIKE 'metrics%' AND relkind IN ('r', 'p')"
            ).fetchall()
        )


def test_a_plain_table_is_one_heap_with_the_same_checks_triggers_and_indexes(bench: Place) -> None:
    readings.empty_topic(bench.settings)
    shapes = []
    for layout in ("partitioned", "plain"):
        with (
            laid_out(bench, layout) as own,
            postgres.connect_admin(own.settings, own.settings.postgres_db) as connection,
        ):
            found = drain(own, 5_000, 1, ["copy-1", "limit-1"], *QUIET)
            assert found.correct, found.runs
            assert found.document()["layout"]["name"] == layout
            assert found.table["heap_bytes"] > 5_000 * 80
            assert found.table["index_bytes"] > 5_000 * 30
            tables = kinds(own.settings)
            assert tables["metrics"] == ("r" if layout == "plain" else "p")
            assert (len(tables) == 1) == (layout == "plain")
            shapes.append(
                [
                    sorted(row[0] for row in connection.execute(statement))
                    for statement in (
                        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'metrics'::regclass",
                        "SELECT tgname FROM pg_trigger WHERE tgrelid = 'metrics'::regclass",
                        "SELECT regexp_replace(indexdef, ' ON (ONLY )?', ' ON ') FROM pg_indexes WHERE tablename = 'metrics'",
                    )
                ]
            )
        readings.empty_topic(bench.settings)
    (checks, triggers, indexes), (plain_checks, plain_triggers, plain_indexes) = shapes
    assert checks == plain_checks
    assert indexes == plain_indexes
    # An update that moves a reading into another partition has no such trigger.
    assert plain_triggers == sorted([*triggers, "metrics_3_log_new_key"])


@pytest.mark.parametrize(
    ("layout", "steps"), [pytest.param("plain", 1, marks=pytest.mark.long), ("partitioned", 2), ("staging", 2)]
)
def test_a_table_grows_and_is_compared_at_the_end(
    bench: Place, layout: Layout, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metrics_pipeline.bench.growth.WATCH_SECONDS", 5)
    monkeypatch.setitem(cast("dict[str, int]", growing.RATE), "copy", 2_000)
    readings.empty_topic(bench.settings)
    plan = Plan("copy", steps * 20_000, steps, layout, partition_rows=8_000)
    with laid_out(bench, layout) as own:
        found = growing.growth(own, plan, {}, *QUIET)
        with postgres.connect(own.settings, "metrics_reader") as connection:
            plainly = connection.execute(postgres.query("device_summary_plain")).fetchall()
            summed = connection.execute("SELECT device_id, rows, first_seen, last_seen FROM device_summary ORDER BY 1")
            assert summed.fetchall() == plainly
    assert found["correct"], found["problems"]
    assert len(found["steps"]) == steps
    for number, step in enumerate(found["steps"], 1):
        assert step["rows"] > number * 20_000
        assert step["tick"]["rows"] == 10_000
        assert [tick["rows"] for tick in step["ticks"][:2]] == [10_000, 10_000]
        assert step["rows_per_second"] > 100
        assert 0 < step["latency"]["p50"] <= step["latency"]["p99"] < 30
        assert step["heap_bytes"] > step["rows"] * 80
        assert step["summary_bytes"] > 0
        assert (step["staging_bytes"] > 0) == (layout == "staging")
    held = {part["low"]: part["rows"] for part in found["partitions"]}
    if layout == "plain":
        assert held == {}
    else:
        # Some hours of readings, and the present, which may be two.
        assert len(held) >= 5
        assert None not in held
        assert sorted(held.values())[-3] < 15_000
    assert sum(part["rows"] for part in found["partitions"]) in (0, found["steps"][-1]["rows"])
    # The records of each step are deleted once they are counted.
    assert sum(high - low for low, high in kafka.watermarks(bench.settings).values()) == 0


def test_what_is_dropped_while_a_table_grows_is_compared_before(bench: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metrics_pipeline.bench.growth.WATCH_SECONDS", 5)
    monkeypatch.setitem(cast("dict[str, int]", growing.RATE), "copy", 2_000)
    readings.empty_topic(bench.settings)
    with laid_out(bench, "partitioned") as own:
        found = growing.growth(own, Plan("copy", 40_000, 2, partition_rows=8_000, keep_rows=15_000), {}, *QUIET)
    assert found["correct"], found["problems"]
    first, last = found["steps"]
    assert first["stored"] == first["rows"] > 20_000
    assert 5_000 < first["dropped_rows"] <= first["rows"] - 15_000
    assert last["rows"] == last["stored"] - first["dropped_rows"]
    left = last["rows"] - last["dropped_rows"]
    assert sum(part["rows"] for part in found["partitions"]) == left > 15_000


def test_a_table_that_lost_a_row_while_it_grew_is_not_correct(bench: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metrics_pipeline.bench.growth.WATCH_SECONDS", 5)
    readings.empty_topic(bench.settings)
    with laid_out(bench, "partitioned") as own:

        def lose(_: str) -> None:
            with postgres.connect_admin(own.settings, own.settings.postgres_db) as connection:
                connection.execute(
                    "UPDATE metrics SET value = value + 1 WHERE (device_id, published_at, metric_name) = "
                    "(SELECT device_id, published_at, metric_name FROM metrics LIMIT 1)"
                )

        found = growing.growth(own, Plan("copy", 10_000, 1, partition_rows=8_000), {}, lambda *_: None, lose)
    assert not found["correct"]
    assert "with checksum" in found["problems"][0]


DEVICE = UUID(int=7)
AT = datetime(2026, 11, 26, 7, tzinfo=UTC)


def stage(settings: Settings, *values: float, offset: int) -> None:
    """Readings of one key after another, as a worker stages them, with the offset of the next record."""
    with postgres.connect(settings, "metrics_writer") as connection:
        connection.execute(
            "INSERT INTO sink_offsets (topic, partition, next_offset) VALUES ('metrics', 0, %s) "
            "ON CONFLICT (topic, partition) DO UPDATE SET next_offset = excluded.next_offset",
            [offset],
        )
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO staged_metrics (device_id, published_at, metric_name, value, tags) VALUES (%s, %s, 0, %s, '{}')",
                [(DEVICE, AT, value) for value in values],
            )


def test_what_is_staged_is_moved_once_and_the_newest_value_wins(bench: Place) -> None:
    with laid_out(bench, "staging") as own, postgres.connect(own.settings, "metrics_owner") as connection:
        mover = staging.Mover(own.settings)

        def state() -> tuple[Any, ...]:
            metrics = connection.execute("SELECT array_agg(value) FROM metrics").fetchone() or ()
            left = connection.execute(
                "SELECT (SELECT count(*) FROM staged_metrics), (SELECT count(*) FROM moving_metrics), moved FROM staging_state"
            )
            found = (metrics[0], *(left.fetchone() or ()))
            connection.rollback()
            return found

        assert not mover.take(connection), "nothing has come"
        stage(own.settings, 1.0, 3.0, 2.0, offset=3)
        assert state() == (None, 3, 0, 0)
        assert mover.take(connection)
        # Here the mover dies, and more comes; the next one begins with what was left.
        stage(own.settings, 5.0, offset=4)
        assert state() == (None, 1, 3, 0)
        mover.finish(connection)
        assert state() == ([2.0], 1, 0, 3)
        mover.finish(connection)
        assert state() == ([2.0], 1, 0, 3)
        assert mover.take(connection)
        mover.finish(connection)
        assert state() == ([5.0], 0, 0, 4)
        assert not mover.take(connection)


def test_what_the_staging_table_refuses_is_rejected_and_the_rest_is_staged(bench: Place) -> None:
    pairs = [pair for round_ in simulated(bench.settings, 300, AT) for pair in round_]
    messages = [FakeMessage(0, number, *pair) for number, pair in enumerate(pairs)]
    refused = sum(decode(*pair).value > 1_000 for pair in pairs)
    assert 0 < refused < 150
    batch = BatchDecoder().decode(messages, {0: Chunk(0, 1, 0, 300, "log")})
    with laid_out(bench, "staging") as own:
        with postgres.connect(own.settings, "metrics_owner") as connection:
            connection.execute("ALTER TABLE staged_metrics ADD CHECK (value <= 1000)")
        with postgres.connect(own.settings, "metrics_writer") as session:
            written = staging.StagingWriter().write(session, batch, upsert=True)
        assert (written.rows, len(written.rejects)) == (300 - refused, refused)
        with postgres.connect(own.settings, "metrics_owner") as connection:
            staged = connection.execute("SELECT count(*), max(value) <= 1000 FROM staged_metrics")
            assert staged.fetchone() == (300 - refused, True)
            rejects = connection.execute("SELECT count(*) FROM rejected_metrics WHERE reason = 'refused_by_database'")
            assert rejects.fetchone() == (refused,)


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
