"""Real readings from files to table, to the last bit."""

from __future__ import annotations

import struct
import time
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from metrics_pipeline import kafka
from metrics_pipeline.cells import device_id
from metrics_pipeline.columns import METRICS
from metrics_pipeline.producer import run_producer
from metrics_pipeline.replay import ReplayOptions, replay_source
from metrics_pipeline_tests.conftest import RunningStack

pytestmark = pytest.mark.integration


def replay(stack: RunningStack, files: list[Path], options: ReplayOptions) -> int:
    """Publish what is in the files and wait until the sink has all of it; returns how much there was."""
    report = run_producer(stack.settings, replay_source(files, options, 1000), kind="replay")
    assert report.clean, report.summary()
    deadline = time.monotonic() + 120
    while kafka.consumer_lag(stack.settings).total:
        assert time.monotonic() < deadline, "the sink does not catch up"
        time.sleep(0.5)
    return report.acknowledged


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
    assert replay(stack, occupancy, ReplayOptions(device="room-1")) == 82_240
    assert stored(stack, "room-1") == wanted
    # The keys are the same, so a second time changes nothing.
    assert replay(stack, occupancy, ReplayOptions(device="room-1")) == 82_240
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
        assert replay(stack, [path], ReplayOptions(device=device)) == len(wanted)
        assert stored(stack, device) == wanted
