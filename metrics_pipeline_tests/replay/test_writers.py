"""What other programs write comes back equal: any double, time to the microsecond, zone and separator."""

from __future__ import annotations

import csv
import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

import duckdb
import pandas as pd
import polars as pl
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from metrics_pipeline.replay.recipe import Recipe, checked_recipe
from metrics_pipeline.replay.source import open_replay

Rows = list[tuple[datetime, float]]
Write = Callable[[Path, Rows, str], None]

ZONES = ("UTC", "Europe/Berlin", "America/St_Johns", "Asia/Kathmandu", "Australia/Lord_Howe")
OFFSETS = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))

values = st.floats(allow_nan=False, allow_infinity=False)
# Before 1936 some zones were seconds off (St. John's until 1935), which polars and pandas do not write; pandas' own times end in 2262.
instants = st.datetimes(datetime(1936, 1, 1), datetime(2250, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
rows = st.lists(st.tuples(instants, values), min_size=1, max_size=8)


def by_csv(path: Path, rows: Rows, separator: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["time", "device", "temperature"])
        writer.writerows([moment, "a", value] for moment, value in rows)


def by_pandas(path: Path, rows: Rows, separator: str) -> None:
    times = pd.Series([moment for moment, _ in rows], dtype=None)
    pd.DataFrame({"time": times, "device": "a", "temperature": [value for _, value in rows]}).to_csv(
        path, sep=separator
    )


def frame(rows: Rows) -> pl.DataFrame:
    zone = rows[0][0].tzinfo
    times = pl.Series([moment.replace(tzinfo=None) for moment, _ in rows], dtype=pl.Datetime("us"))
    if isinstance(zone, ZoneInfo):
        times = pl.Series([moment.astimezone(UTC) for moment, _ in rows]).dt.convert_time_zone(zone.key)
    return pl.DataFrame({"time": times, "device": "a", "temperature": [value for _, value in rows]})


def by_polars(path: Path, rows: Rows, separator: str) -> None:
    frame(rows).write_csv(path, separator=separator)


def by_polars_as_parquet(path: Path, rows: Rows, separator: str) -> None:
    frame(rows).write_parquet(path)


def by_duckdb(path: Path, rows: Rows, separator: str) -> None:
    with duckdb.connect() as connection:
        zone = rows[0][0].tzinfo
        kind = "TIMESTAMP" if zone is None else "TIMESTAMPTZ"
        if isinstance(zone, ZoneInfo):
            connection.execute(f"SET TimeZone = '{zone.key}'")
        connection.execute(f"CREATE TABLE readings (time {kind}, device VARCHAR, temperature DOUBLE)")
        connection.executemany("INSERT INTO readings VALUES (?::VARCHAR, 'a', ?)", [
            (moment.isoformat(), value) for moment, value in rows
        ])  # fmt: skip
        form = "FORMAT parquet" if path.suffix == ".parquet" else f"FORMAT csv, DELIM '{separator}'"
        connection.execute(f"COPY readings TO '{path}' ({form})")


WRITERS: dict[str, tuple[Write, str]] = {
    "csv": (by_csv, "csv"),
    "pandas": (by_pandas, "csv"),
    "polars": (by_polars, "csv"),
    "DuckDB": (by_duckdb, "csv"),
    "polars, Parquet": (by_polars_as_parquet, "parquet"),
    "DuckDB, Parquet": (by_duckdb, "parquet"),
}


def read(path: Path, zone: str | None) -> list[tuple[datetime, bytes]]:
    recipe: Recipe = checked_recipe(
        {"time": {"columns": ["time"], "zone": zone}, "units": {"temperature": "degC"}}, "options"
    )
    replay = open_replay([path], recipe, allow_implausible=True)
    return [(it.published_at, struct.pack(">d", it.value)) for batch in replay for it in batch]


@pytest.mark.parametrize("name", WRITERS)
@given(rows=rows, separator=st.sampled_from(",;\t|"), zone=st.sampled_from(ZONES), named=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_comes_back_equal(
    name: str, tmp_path: Path, rows: Rows, separator: str, zone: str, named: bool
) -> None:
    write, suffix = WRITERS[name]
    local = [(moment.astimezone(ZoneInfo(zone)), value) for moment, value in rows]
    if not named:
        # A local time that occurs twice cannot be told apart, and is refused elsewhere.
        local = [(moment.replace(tzinfo=None), value) for moment, value in local if not twice(moment)]
        assume(local)
        assume([(moment.replace(tzinfo=ZoneInfo(zone)).astimezone(UTC), value) for moment, value in local])
    path = tmp_path / f"readings.{suffix}"
    write(path, local, separator)
    expected = [
        ((moment if named else moment.replace(tzinfo=ZoneInfo(zone))).astimezone(UTC), struct.pack(">d", value))
        for moment, value in local
    ]
    assert read(path, None if named else zone) == expected


def twice(moment: datetime) -> bool:
    zone: tzinfo | None = moment.tzinfo
    return moment.utcoffset() != moment.replace(fold=1 - moment.fold, tzinfo=zone).utcoffset()


@given(moment=instants, offset=OFFSETS, value=values)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_offset_comes_back_equal(tmp_path: Path, moment: datetime, offset: timezone, value: float) -> None:
    path = tmp_path / "readings.csv"
    by_csv(path, [(moment.astimezone(offset), value)], ",")
    assert read(path, None) == [(moment, struct.pack(">d", value))]


@given(rows=rows)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_decimal_comma_comes_back_equal(tmp_path: Path, rows: Rows) -> None:
    path = tmp_path / "readings.csv"
    lines = [f"{moment.isoformat()};a;{str(value).replace('.', ',')}" for moment, value in rows]
    path.write_text("\n".join(["time;device;temperature", *lines, ""]))
    recipe = checked_recipe({"file": {"decimal": ","}, "units": {"temperature": "degC"}}, "options")
    replay = open_replay([path], recipe, allow_implausible=True)
    found = [(it.published_at, struct.pack(">d", it.value)) for batch in replay for it in batch]
    assert found == [(moment, struct.pack(">d", value)) for moment, value in rows]
