"""Real readings from files to table, to the last bit."""

from __future__ import annotations

import struct
import time
from datetime import datetime
from pathlib import Path
from uuid import UUID

import polars as pl
import pytest

from metrics_pipeline import kafka
from metrics_pipeline.replay.cells import device_id
from metrics_pipeline.replay.names import METRICS
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.patience import deadline
from metrics_pipeline_tests.replay.cases import CASES, FOLDER

pytestmark = pytest.mark.integration


def replay(stack: RunningStack, files: list[Path], device: str, readings: int) -> None:
    """Publish what is in the files and wait until the sink has all of it."""
    done = stack.cli("replay", *map(str, files), "--device", device)
    assert done.returncode == 0, done.stderr
    assert f"{readings:,} readings from " in done.stdout
    assert "times name no zone and were taken in UTC" in done.stdout
    assert f"{readings:,} acknowledged" in done.stdout
    give_up = deadline(120)
    while kafka.consumer_lag(stack.settings).total:
        assert time.monotonic() < give_up, "the sink does not catch up"
        time.sleep(0.2)


Stored = dict[tuple[datetime, int], bytes]


def stored(stack: RunningStack, device: str) -> Stored:
    """The bits of each value of a device, by time and metric."""
    with stack.admin() as connection:
        rows = connection.execute(
            "SELECT published_at, metric_name, float8send(value) FROM metrics WHERE device_id = %s",
            (device_id(device),),
        )
        return {(published_at, metric): bits for published_at, metric, bits in rows}


def expected(files: list[Path]) -> Stored:
    found = {}
    for path in files:
        for line in path.read_text().replace('"', "").splitlines()[1:]:
            _, moment, *texts = line.split(",")
            for name, text in zip(("temperature", "humidity", "light", "co2"), texts[:4], strict=True):
                key = datetime.fromisoformat(f"{moment}+00:00"), METRICS[name]
                found[key] = struct.pack(">d", float(text))
    return found


def test_the_occupancy_files_are_stored_to_the_last_bit(stack: RunningStack, occupancy: list[Path]) -> None:
    wanted = expected(occupancy)
    assert len(wanted) == 82_240
    replay(stack, occupancy, "room-1", 82_240)
    assert stored(stack, "room-1") == wanted
    # The keys are the same, so a second time changes nothing.
    replay(stack, occupancy, "room-1", 82_240)
    assert stored(stack, "room-1") == wanted


def test_ndjson_and_parquet_give_the_same_rows(stack: RunningStack, occupancy: list[Path], tmp_path: Path) -> None:
    files = occupancy[:1]
    names = ["date", "Temperature", "Humidity", "Light", "CO2"]
    lines = [line.split(",")[1:6] for line in files[0].read_text().replace('"', "").splitlines()[1:]]
    columns = {name: [line[at] for line in lines] for at, name in enumerate(names)}
    frame = pl.DataFrame(columns).with_columns(
        pl.col("date").str.to_datetime(), *(pl.Series(name, map(float, columns[name])) for name in names[1:])
    )
    ndjson, parquet = tmp_path / "readings.ndjson", tmp_path / "readings.parquet"
    frame.with_columns(pl.col("date").dt.to_string("iso")).write_ndjson(ndjson)
    frame.write_parquet(parquet)
    wanted = expected(files)
    for path, device in ((files[0], "as-csv"), (ndjson, "as-ndjson"), (parquet, "as-parquet")):
        replay(stack, [path], device, len(wanted))
        assert stored(stack, device) == wanted


def test_with_a_bad_line_nothing_is_published_unless_it_is_to_be_left_out(stack: RunningStack, tmp_path: Path) -> None:
    path = tmp_path / "readings.csv"
    path.write_text("date,CO2\n2015-02-04 17:51,1\n2015-02-04 17:52,x\n2015-02-04 17:53,3\n")
    stopped = stack.cli("replay", str(path), "--device", "stops")
    assert stopped.returncode == 1
    assert (
        f"{path}:3: CO2: 'x' is not a number; correct it, or leave bad lines out with --on-error skip" in stopped.stderr
    )
    skipped = stack.cli("replay", str(path), "--device", "skips", "--on-error", "skip")
    assert skipped.returncode == 0
    assert f"{path}:3: bad_value: CO2: 'x' is not a number" in skipped.stdout
    assert "bad lines skipped: 1" in skipped.stdout
    stored_at_last(stack, "skips", 2)
    assert stored(stack, "stops") == {}


def stored_at_last(stack: RunningStack, device: str, rows: int) -> Stored:
    give_up = deadline(60)
    while len(found := stored(stack, device)) < rows:
        assert time.monotonic() < give_up, found
        time.sleep(0.2)
    return found


def test_nothing_read_is_a_failure_whatever_is_to_be_left_out(stack: RunningStack, tmp_path: Path) -> None:
    path = tmp_path / "readings.csv"
    path.write_text("date,CO2\n2015-02-04 17:52,x\n")
    for option in ("stop", "skip"):
        done = stack.cli("replay", str(path), "--device", "nothing", "--on-error", option)
        assert (done.returncode, f"{path}:2: " in done.stderr) == (1, True), done.stderr


def test_a_plan_is_edited_and_replayed_and_a_query_gives_the_same(stack: RunningStack, tmp_path: Path) -> None:
    path = tmp_path / "readings.csv"
    path.write_text("When;T in;RH\n01.02.2024 10:00;70,5;45\n01.02.2024 10:10;-999;46\n")
    options = ["--time", "When", "--map", "T in=temperature", "--unit", "temperature=degF", "--missing", "-999"]
    plan = stack.cli("replay", str(path), "--device", "planned", *options, "--plan", check=True).stdout
    assert 'unit = "degF"' in plan
    recipe = tmp_path / "own.toml"
    recipe.write_text(plan.replace('zone = "UTC"', 'zone = "Europe/Berlin"'))
    assert recipe.read_text() != plan
    seen = stack.cli("replay", str(path), "--recipe", str(recipe), "--dry-run", check=True).stdout
    assert "3 readings, 2024-02-01 09:00:00 UTC to 2024-02-01 09:10:00 UTC" in seen
    assert stored(stack, "planned") == {}
    stack.cli("replay", str(path), "--recipe", str(recipe), check=True)
    planned = stored_at_last(stack, "planned", 3)
    query = (
        "SELECT \"When\" AS time, 'asked' AS device, RH AS humidity, "
        "nullif(CAST(replace(\"T in\", ',', '.') AS DOUBLE), -999) AS temperature_f FROM input"
    )
    stack.cli("replay", str(path), "--select", query, "--tz", "Europe/Berlin", check=True)
    assert stored_at_last(stack, "asked", 3) == planned


@pytest.mark.skipif(not FOLDER.exists(), reason="the cases are not beside this checkout")
def test_files_of_the_world_are_stored(stack: RunningStack) -> None:
    wanted: dict[tuple[UUID, datetime, int], tuple[float, float]] = {}
    for case in CASES:
        done = stack.cli("replay", str(FOLDER / case.file), *case.options)
        assert done.returncode == 0, done.stderr
        for device, moment, metric, value in case.readings:
            key = device_id(device), datetime.fromisoformat(moment), METRICS[metric]
            wanted[key] = value, 1e-15 if case.near else 0.0
    give_up = deadline(60)
    devices = list({key[0] for key in wanted})
    while True:
        with stack.admin() as connection:
            rows = connection.execute(
                "SELECT device_id, published_at, metric_name, value FROM metrics WHERE device_id = ANY(%s)", (devices,)
            ).fetchall()
        if len(rows) >= len(wanted) or time.monotonic() > give_up:
            break
        time.sleep(0.2)
    found = {(device, moment, metric): value for device, moment, metric, value in rows}
    assert found.keys() == wanted.keys()
    for key, (value, tolerance) in wanted.items():
        assert found[key] == pytest.approx(value, rel=tolerance, abs=0), key


def test_what_cannot_be_replayed_is_one_line(stack: RunningStack, tmp_path: Path) -> None:
    path = tmp_path / "readings.csv"
    path.write_text("date,smell\n2015-02-04 17:51,1\n")
    (tmp_path / "bad.toml").write_text("[tims]\n")
    for arguments, reason in (
        ((str(path), "--device", "x"), "no column is named as a metric (temperature, "),
        ((str(path), "--device", "x", "--map", "smell=odour"), "no metric has that name; there are temperature, "),
        ((str(path), "--map", "smell=co2"), "give --device NAME or --device-column COLUMN"),
        ((str(path), "--device", "x", "--map", "smell=co2", "--tz", "Mars/Base"), "no such time zone"),
        (
            (str(path), "--device", "x", "--recipe", str(tmp_path / "bad.toml")),
            "tims is no key; there are description, ",
        ),
        ((str(path), "--device", "x", "--select", "DROP TABLE input"), "give one SELECT"),
        (
            (str(path), "--device", "x", "--select", "SELECT * FROM read_csv('/etc/passwd')"),
            "--select: Permission Error",
        ),
        ((str(tmp_path / "none.csv"),), "there is no such file"),
    ):
        done = stack.cli("replay", *arguments)
        assert done.returncode == 2
        assert reason in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
