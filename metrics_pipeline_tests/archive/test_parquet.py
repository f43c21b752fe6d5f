"""Readings go through Parquet without a bit changed, and what they add up to says so."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import polars as pl
import pytest
from hypothesis import given, settings

from metrics_pipeline.archive import parquet, table
from metrics_pipeline.errors import ServiceError
from metrics_pipeline_tests.archive import readings
from metrics_pipeline_tests.archive.readings import METRICS, Stored

BEGIN = datetime(2026, 11, 26, tzinfo=UTC)


@given(found=readings.rows())
@settings(max_examples=40, deadline=None)
def test_every_reading_comes_back_as_it_was(found: list[Stored]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = parquet.write(Path(folder), readings.frames(found, 7), METRICS, file_rows=11)
        copied = b"".join(table.copied(frame) for path in paths for frame in parquet.read(path, 5))
        assert copied == b"".join(row.row() for row in found)
        sums, first, last = parquet.sums(paths)
        assert sums == readings.sums(found)
        times = [row.published_at for row in found]
        assert (first, last) == (min(times, default=None), max(times, default=None))


def test_files_and_row_groups_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUP_ROWS", 1000)
    told: list[int] = []
    found = readings.simple(10_500, BEGIN)
    paths = parquet.write(tmp_path, readings.frames(found, 500), METRICS, file_rows=4000, told=told.append)
    assert [path.name for path in paths] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert told == [min(number, 10_500) for number in range(500, 11_000, 500)]
    with duckdb.connect() as connection:
        groups = connection.execute(
            "SELECT row_group_num_rows, path_in_schema, compression FROM parquet_metadata($files)",
            {"files": [str(path) for path in paths]},
        ).fetchall()
    assert {rows for rows, _, _ in groups} == {1000, 500}
    assert {compression for _, _, compression in groups} == {"ZSTD"}
    assert parquet.sums(paths)[0] == readings.sums(found)


def test_the_files_say_what_is_in_them(tmp_path: Path) -> None:
    paths = parquet.write(tmp_path, readings.frames(readings.simple(100, BEGIN)), METRICS)
    assert dict(pl.read_parquet_schema(paths[0])) == dict(parquet.SCHEMA)
    assert parquet.metrics_of(paths) == METRICS
    kept = pl.read_parquet_metadata(paths[0])
    assert '"temperature", "unit": "°C"' in kept["metrics_pipeline.metrics"]
    assert "microseconds in UTC" in kept["metrics_pipeline.columns"]
    with duckdb.connect() as connection:
        columns = connection.execute(f"DESCRIBE SELECT * FROM '{paths[0]}'").fetchall()
    assert [column[:2] for column in columns] == [
        ("device_id", "VARCHAR"),
        ("published_at", "TIMESTAMP WITH TIME ZONE"),
        ("metric_name", "SMALLINT"),
        ("metric", "VARCHAR"),
        ("value", "DOUBLE"),
        ("unit", "VARCHAR"),
        ("tags", "VARCHAR[]"),
        ("created_at", "TIMESTAMP WITH TIME ZONE"),
    ]


def test_no_reading_at_all_is_a_file_without_rows(tmp_path: Path) -> None:
    (path,) = parquet.write(tmp_path, iter(()), METRICS)
    assert pl.read_parquet(path).height == 0
    assert parquet.sums([path]) == (readings.sums([]), None, None)


def test_what_stands_elsewhere_is_found(tmp_path: Path) -> None:
    found = readings.simple(100, BEGIN)
    (some, all_of_them) = (tmp_path / "some", tmp_path / "all")
    some.mkdir()
    all_of_them.mkdir()
    few = parquet.write(some, readings.frames(found[10:20]), METRICS)
    many = parquet.write(all_of_them, readings.frames(found), METRICS)
    assert parquet.contains(many, few)
    assert not parquet.contains(few, many)


@pytest.mark.parametrize(
    "tags",
    [
        "000000020000000000000019000000010000000100000001000000010000000161",
        "00000001000000000000001900000001000000000000000161",
    ],
    ids=["two dimensions", "begins at 0"],
)
def test_tags_that_no_list_holds_are_refused(tags: str) -> None:
    row = readings.simple(1, BEGIN)[0].row()
    data = bytes.fromhex(tags)
    begin = row[: table._ROW.itemsize - 4]
    with pytest.raises(ServiceError, match="a list cannot hold"):
        table.frame_of([begin + len(data).to_bytes(4, "big") + data], METRICS)


def test_a_row_of_another_form_is_refused() -> None:
    row = readings.simple(1, BEGIN)[0].row()
    with pytest.raises(ServiceError, match="not as the migrations make it"):
        table.frame_of([row + b"x"], METRICS)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"cannot be written.*make room"):
        parquet.write(tmp_path / "absent", readings.frames(readings.simple(1, BEGIN)), METRICS)
