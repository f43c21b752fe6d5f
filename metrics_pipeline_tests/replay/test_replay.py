"""Files as people have them: what is read, to the last bit, and what is refused, by file and line."""

from __future__ import annotations

import csv
import gzip
import json
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics_pipeline.errors import RecordError, SettingError
from metrics_pipeline.metric import Reading, decode, encode
from metrics_pipeline.replay import source as replay_module
from metrics_pipeline.replay.cells import DEVICE_NAMESPACE, number, numbers, tags
from metrics_pipeline.replay.documents import parsed
from metrics_pipeline.replay.files import _frame
from metrics_pipeline.replay.names import METRICS
from metrics_pipeline.replay.readings import messages
from metrics_pipeline.replay.recipe import MetricPart, Recipe, checked_recipe, parse_mapping
from metrics_pipeline.replay.source import Replay, ReplayReport
from metrics_pipeline.replay.source import open_replay as open_files
from metrics_pipeline.replay.times import Clock

ROOM = uuid.uuid5(DEVICE_NAMESPACE, "room-1")


@dataclass(frozen=True)
class Options:
    """What a test says about a file; numbers that are times are seconds, since most of them here are small."""

    device: str | None = None
    device_column: str | None = None
    time_column: str | None = None
    mapping: dict[str, str] = field(default_factory=dict)
    tz: str | None = None
    skip_bad: bool = False
    allow: bool = False
    unit: str | None = "s"
    more: dict[str, Any] = field(default_factory=dict)

    def recipe(self) -> Recipe:
        return checked_recipe(
            {
                "device": {"name": self.device, "column": self.device_column},
                "time": {"columns": [self.time_column] if self.time_column else [], "zone": self.tz, "unit": self.unit},
                "metrics": [{"column": column, "metric": metric} for column, metric in self.mapping.items()],
                **self.more,
            },
            "options",
        )


def open_replay(paths: list[Path], options: Options, batch_size: int = 1000) -> Replay:
    return open_files(
        paths, options.recipe(), batch_size=batch_size, skip_bad=options.skip_bad, allow_implausible=options.allow
    )


OPTIONS = Options(device="room-1")
SKIP = Options(device="room-1", skip_bad=True)
AT = datetime(2015, 2, 4, 17, 51, tzinfo=UTC)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | bytes, name: str = "data.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def read(path: Path, options: Options = OPTIONS) -> tuple[list[Reading], ReplayReport]:
    replay = open_replay([path], options)
    readings = [reading for batch in replay for reading in batch]
    assert replay.bytes_read == replay.total_bytes == path.stat().st_size
    assert replay.report.readings == len(readings)
    return readings, replay.report


def short(readings: list[Reading]) -> list[tuple[str, int, float]]:
    return [(f"{it.published_at:%H:%M:%S}", it.metric_name, it.value) for it in readings]


PLAIN = "date,Temperature,CO2\n2015-02-04 17:51:00,23.18,721.25\n2015-02-04 17:52:00,23.15,714\n"
EXPECTED = [("17:51:00", 0, 23.18), ("17:51:00", 30, 721.25), ("17:52:00", 0, 23.15), ("17:52:00", 30, 714.0)]

QUIRKS: dict[str, str | bytes] = {
    "plain": PLAIN,
    "byte order mark": "\ufeff" + PLAIN,
    "CRLF": PLAIN.replace("\n", "\r\n"),
    "CR alone": PLAIN.replace("\n", "\r"),
    "no end of line at the end": PLAIN.rstrip("\n"),
    "semicolons": PLAIN.replace(",", ";"),
    "semicolons, commas in the header": PLAIN.replace(",", ";")
    .replace("Temperature", "Temperature")
    .replace("CO2\n", "CO2;Note, long, longer, longest\n")
    .replace("25\n", "25;x\n")
    .replace("714\n", "714;y\n"),
    "tabs": PLAIN.replace(",", "\t"),
    "bars": PLAIN.replace(",", "|"),
    "spaces after the comma": PLAIN.replace(",", ", "),
    "everything quoted": "".join(
        ",".join(f'"{cell}"' for cell in line.split(",")) + "\n" for line in PLAIN.splitlines()
    ),
    "header in capitals": PLAIN.replace("date,Temperature", "DATE,TEMPERATURE"),
    "header in small letters": PLAIN.replace("Temperature,CO2", "temperature,co2"),
    "blank lines": "\n" + PLAIN.replace("\n", "\n\n  \n,,\n"),
    "columns in another order": (
        "CO2,Temperature,date\n721.25,23.18,2015-02-04 17:51:00\n714,23.15,2015-02-04 17:52:00\n"
    ),
    "a column more": (
        "date,Temperature,Occupancy,CO2\n2015-02-04 17:51:00,23.18,1,721.25\n2015-02-04 17:52:00,23.15,x,714\n"
    ),
    "a row number without a name": (
        '"date","Temperature","CO2"\n"140","2015-02-04 17:51:00",23.18,721.25\n"141",2015-02-04 17:52:00,23.15,714\n'
    ),
    "a row number with an empty name": (
        '"","date","Temperature","CO2"\n0,2015-02-04 17:51:00,23.18,721.25\n1,2015-02-04 17:52:00,23.15,714\n'
    ),
    "a delimiter at the end of the data": (
        "date,Temperature,CO2\n2015-02-04 17:51:00,23.18,721.25,\n2015-02-04 17:52:00,23.15,714,\n"
    ),
    "a delimiter at the end everywhere": (
        "date,Temperature,CO2,\n2015-02-04 17:51:00,23.18,721.25,\n2015-02-04 17:52:00,23.15,714,\n"
    ),
    "a line end inside quotes": (
        'date,Note,Temperature,CO2\n2015-02-04 17:51:00,"two\nlines, ""quoted""",23.18,721.25\n'
        "2015-02-04 17:52:00,,23.15,714\n"
    ),
    "Latin 1 in a column that does not matter": (
        "date,Ort,Temperature,CO2\n2015-02-04 17:51:00,Köln,23.18,721.25\n2015-02-04 17:52:00,,23.15,714\n"
    ).encode("latin-1"),
    "one column named twice that does not matter": (
        "date,x,x,Temperature,CO2\n2015-02-04 17:51:00,1,2,23.18,721.25\n2015-02-04 17:52:00,1,2,23.15,714\n"
    ),
}


@pytest.mark.parametrize("text", QUIRKS.values(), ids=QUIRKS.keys())
def test_csv_with_quirks_gives_the_plain_readings(write: Write, text: str | bytes) -> None:
    readings, report = read(write(text))
    assert sorted(short(readings)) == EXPECTED
    assert {it.device_id for it in readings} == {ROOM}
    assert (report.lines, report.bad_lines, report.zoneless, report.zone) == (2, 0, 2, "UTC")


@pytest.mark.parametrize("name", ["data.txt", "data.tsv", "data.CSV", "data", "data.dat"])
def test_the_name_need_not_say_what_a_text_file_is(write: Write, name: str) -> None:
    assert short(read(write(PLAIN, name))[0]) == EXPECTED


@pytest.mark.parametrize("name", ["data.csv.gz", "data.ndjson.gz"])
def test_compressed_files_are_read_as_they_are(write: Write, name: str) -> None:
    text = PLAIN if "csv" in name else ndjson(PLAIN)
    assert short(read(write(gzip.compress(text.encode()), name))[0]) == EXPECTED


def ndjson(text: str) -> str:
    rows = csv.DictReader(text.splitlines())
    return "".join(json.dumps({k: v if k == "date" else float(v) for k, v in row.items()}) + "\n" for row in rows)


def test_columns_that_mean_nothing_are_listed_once(write: Write) -> None:
    text = "date,Temperature,HumidityRatio,Occupancy\n2015-02-04 17:51:00,1,2,3\n"
    replay = open_replay([write(text), write(text, "other.csv")], OPTIONS)
    assert [len(batch) for batch in replay] == [1, 1]
    assert replay.report.ignored == ["HumidityRatio", "Occupancy"]
    assert "columns ignored: HumidityRatio, Occupancy" in replay.report.text()


def test_empty_cells_are_no_readings_and_no_errors(write: Write) -> None:
    readings, report = read(write("date,Temperature,CO2\n2015-02-04 17:51:00,, 7\n2015-02-04 17:52:00,,\n"), SKIP)
    assert short(readings) == [("17:51:00", 30, 7.0)]
    assert (report.empty_cells, report.lines, report.bad_lines) == (3, 2, 1)
    assert report.bad_listed[0].endswith("data.csv:3: no_reading: no metric has a value in it")


def test_a_repeated_key_is_counted(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(PLAIN + PLAIN.partition("\n")[2])
    assert read(path)[1].repeated_keys == 4
    assert read(write(PLAIN))[1].repeated_keys == 0
    monkeypatch.setattr(replay_module, "KEYS_REMEMBERED", 0)
    _, report = read(path)
    assert (report.repeated_keys, report.repeated_complete) == (0, False)


# --- Bad lines ---------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, str, str]] = {
    "no number": ("2015-02-04 17:51:00,warm,1", "bad_value", "Temperature: 'warm' is not a number"),
    "decimal comma": ('2015-02-04 17:51:00,"23,5",1', "bad_value", "decimals behind a point: say --decimal"),
    "underscore": ("2015-02-04 17:51:00,1_000,1", "bad_value", "'1_000' is not a number"),
    "other digits": ("2015-02-04 17:51:00,٣,1", "bad_value", "is not a number"),
    "hexadecimal": ("2015-02-04 17:51:00,0x10,1", "bad_value", "is not a number"),
    "infinite": ("2015-02-04 17:51:00,-inf,1", "bad_value", "not a finite double"),
    "too large": ("2015-02-04 17:51:00,1e999,1", "bad_value", "not a finite double"),
    "no time": (",1,1", "bad_time", "date: is empty"),
    "another form of time": (
        "on 04.02.2015,1,1",
        "bad_time",
        "date: 'on 04.02.2015' is not a time in a form that is known",
    ),
    "a zone of several": (
        "2015-02-04 17:51 CST,1,1",
        "bad_time",
        "CST may be several zones: say --tz ZONE with --ignore-offset",
    ),
    "no such day": ("2015-02-30 17:51:00,1,1", "bad_time", "is not a time"),
    "before year 1": ("0001-01-01T00:00:00+01:00,1,1", "bad_time", "years 1 and 9999"),
    "not possible": (
        "2015-02-04 17:51:00,-127,1",
        "implausible",
        "temperature of -127 °C is not possible (-100 to 100)",
    ),
    "no reading": ("2015-02-04 17:51:00,,NaN", "no_reading", "no metric has a value in it"),
    "NUL": ("2015-02-04 17:51:00,1,\0", "bad_line", "holds NUL bytes"),
    "a field too few": ("2015-02-04 17:51:00,1", "bad_line", "has 2 fields, the other lines have 3"),
    "a field too many": ("2015-02-04 17:51:00,1,2,3", "bad_line", "has 4 fields, the other lines have 3"),
    "text after a quote": ('"2015-02-04 17:51:00"x,1,1', "bad_line", "its quotes do not match"),
}


@pytest.mark.parametrize(("line", "reason", "detail"), BAD.values(), ids=BAD.keys())
def test_a_bad_line_is_named_and_its_neighbours_are_read(write: Write, line: str, reason: str, detail: str) -> None:
    header, first, second, *_ = PLAIN.splitlines()
    path = write(f"{header}\n{first}\n{line}\n{second}\n")

    readings, report = read(path, SKIP)
    assert short(readings) == EXPECTED
    assert (report.bad_lines, report.lines, report.reasons) == (1, 3, {reason: 1})
    (listed,) = report.bad_listed
    assert listed.startswith(f"{path}:3: {reason}: ")
    assert detail in listed

    with pytest.raises(RecordError, match=r"--on-error skip.*nothing was published") as stopped:
        next(iter(open_replay([path], OPTIONS)))
    assert stopped.value.reason == reason
    assert f"{path}:3: " in str(stopped.value)
    assert detail in str(stopped.value)


def test_a_quote_that_is_never_closed_costs_one_line(write: Write) -> None:
    lines = PLAIN.splitlines()
    path = write("\n".join([lines[0], lines[1], '2015-02-04 17:51:30,1,"2', lines[2], '2015-02-04 18:00:00,"1,2', ""]))
    readings, report = read(path, SKIP)
    assert short(readings) == EXPECTED
    assert [text.split(": ")[0] for text in report.bad_listed] == [f"{path}:3", f"{path}:5"]


def test_a_line_after_a_quoted_line_end_has_its_own_number(write: Write) -> None:
    path = write('date,Note,CO2\n2015-02-04 17:51:00,"a\nb\nc",1\n\n2015-02-04 17:52:00,d,x\n')
    _, report = read(path, SKIP)
    assert report.bad_listed[0].startswith(f"{path}:6: bad_value: CO2: ")


def test_all_bad_lines_are_counted_and_the_first_twenty_listed(write: Write) -> None:
    _, report = read(write(PLAIN + "x,1,2\n" * 30), SKIP)
    assert (report.bad_lines, len(report.bad_listed), report.reasons) == (30, 20, {"bad_time": 30})
    assert report.text()[-1] == "bad lines skipped: 30, 10 of them not listed"


def test_bytes_that_are_not_utf8_can_be_shown(write: Write) -> None:
    path = write(b"date,CO2\n2015-02-04 17:51:00,\x81\xfe\n")
    replay = open_replay([path], SKIP)
    replay.look().bad_listed[0].encode()
    with pytest.raises(RecordError, match=r"there is no reading in it: .*data\.csv:2: bad_value"):
        replay.refuse()


# --- Times -------------------------------------------------------------------------------------------------------

TIMES: dict[str, tuple[object, datetime]] = {
    "space": ("2015-02-04 17:51:00", AT),
    "T": ("2015-02-04T17:51", AT),
    "Z": ("2015-02-04T17:51:00Z", AT),
    "offset": ("2015-02-04 18:51:00+01:00", AT),
    "offset of PostgreSQL": ("2015-02-04 17:51:00+00", AT),
    "microseconds": ("2015-02-04 17:51:00.000001", AT + timedelta(microseconds=1)),
    "Java": ("2015-02-04T18:51+01:00[Europe/Berlin]", AT),
    "Go": ("2015-02-04 17:51:00 +0000 UTC", AT),
    "a zone by its name": ("2015-02-04 18:51 Europe/Berlin", AT),
    "twelve hours": ("2015-02-04 05:51 PM", AT),
    "midnight at noon": ("2015-02-04 12:51 a.m.", AT.replace(hour=0)),
    "a German browser": ("04.02.2015, 17:51:00", AT),
    "a mail": ("Wed, 04 Feb 2015 17:51:00 GMT", AT),
    "months by name": ("4-Feb-2015 17:51", AT),
    "American months": ("February 4, 2015 5:51 PM", AT),
    "the end of a day": ("2015-02-03T24:00:00", AT.replace(hour=0, minute=0)),
    "a leap second": ("2015-02-04T17:50:60Z", AT),
    "further zeros": ("2015-02-04 17:51:00.000001000", AT + timedelta(microseconds=1)),
    "day": ("2015-02-04", AT.replace(hour=0, minute=0)),
    "seconds": ("1423072260", AT),
    "seconds with a fraction": ("1423072260.000001", AT + timedelta(microseconds=1)),
    "seconds as a number": (1423072260, AT),
    "seconds as a double": (1423072260.25, AT + timedelta(milliseconds=250)),
    "milliseconds": ("1423072260001", AT + timedelta(milliseconds=1)),
    "milliseconds as a number": (1423072260001, AT + timedelta(milliseconds=1)),
    "microseconds since 1970": (1423072260000001, AT + timedelta(microseconds=1)),
    "nanoseconds": ("1423072260000001000", AT + timedelta(microseconds=1)),
    "before 1970": ("-1.5", datetime(1969, 12, 31, 23, 59, 58, 500000, tzinfo=UTC)),
    "a datetime": (datetime(2015, 2, 4, 18, 51, tzinfo=timezone(timedelta(hours=1))), AT),
    "a naive datetime": (datetime(2015, 2, 4, 17, 51), AT),  # noqa: DTZ001
    "a date": (date(2015, 2, 4), AT.replace(hour=0, minute=0)),
}


def instant(cell: object, clock: Clock | None = None) -> datetime:
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        unit = next((one for one, limit in (("s", 10**11), ("ms", 10**14), ("us", 10**17)) if abs(cell) < limit), "ns")
        clock = Clock(unit=unit)
    elif isinstance(cell, str) and cell.replace(".", "").lstrip("-").isdigit():
        unit = next((one for one, limit in (("s", 10**11), ("ms", 10**14)) if abs(float(cell)) < limit), "ns")
        clock = Clock(unit=unit)
    micros, errors = (clock or Clock()).column(pl.Series([cell]))
    if errors:
        raise errors[0]
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros[0])


@pytest.mark.parametrize(("cell", "moment"), TIMES.values(), ids=TIMES.keys())
def test_times(cell: object, moment: datetime) -> None:
    assert instant(cell) == moment


@pytest.mark.parametrize(
    "cell", [None, "", "now", float("inf"), float("nan"), "NaT", "2015-02-30", "24:00", "2015-02-04T25:00"]
)
def test_what_is_no_time(cell: object) -> None:
    with pytest.raises(RecordError) as refused:
        instant(cell)
    assert refused.value.reason == "bad_time"


def test_times_without_a_zone_are_local(write: Write) -> None:
    options = Options(device="room-1", tz="Europe/Berlin")
    readings, report = read(
        write("date,CO2\n2015-07-01 12:00:00,1\n2015-01-01 12:00:00,2\n2015-07-01T12:00Z,3\n"), options
    )
    assert short(readings) == [("10:00:00", 30, 1.0), ("11:00:00", 30, 2.0), ("12:00:00", 30, 3.0)]
    assert (report.zone, report.zoneless) == ("Europe/Berlin", 2)
    assert "2 times name no zone and were taken in Europe/Berlin" in report.text()


def test_the_hour_that_clocks_skip_is_refused() -> None:
    clock = Clock("Europe/Berlin")
    assert instant("2015-03-29 01:59:59", clock) == datetime(2015, 3, 29, 0, 59, 59, tzinfo=UTC)
    assert instant("2015-03-29 03:00:00", clock) == datetime(2015, 3, 29, 1, tzinfo=UTC)
    with pytest.raises(RecordError, match=r"2015-03-29 02:30:00 does not exist in Europe/Berlin"):
        instant("2015-03-29 02:30:00", clock)


def test_the_hour_that_clocks_repeat_is_refused_unless_said_which() -> None:
    twice = "2015-10-25 02:30:00"
    with pytest.raises(RecordError, match=r"occurs twice in Europe/Berlin.*02:30:00\+02:00 or .*02:30:00\+01:00"):
        instant(twice, Clock("Europe/Berlin"))
    assert instant(twice + "+01:00", Clock("Europe/Berlin")) == datetime(2015, 10, 25, 1, 30, tzinfo=UTC)


@pytest.mark.parametrize("zone", ["Europe/Berln", "", "../etc", "/etc/localtime", "Europe"])
def test_an_unknown_zone_is_refused_by_name(write: Write, zone: str) -> None:
    with pytest.raises(SettingError, match=r"--tz .*: no such time zone"):
        open_replay([write(PLAIN)], Options(device="room-1", tz=zone))


# --- Columns -----------------------------------------------------------------------------------------------------


def test_columns_can_be_mapped_to_metrics(write: Write) -> None:
    path = write("date,T_in,T_out,Humidity\n2015-02-04 17:51:00,1,2,3\n")
    said = {"units": {"pressure": "hPa"}}
    options = Options(device="room-1", mapping={"t_in": "Temperature", "T_out": "pressure"}, more=said, allow=True)
    readings, report = read(path, options)
    assert short(readings) == [("17:51:00", 0, 1.0), ("17:51:00", 20, 2.0), ("17:51:00", 10, 3.0)]
    assert report.ignored == []


def test_a_mapped_column_stands_before_one_that_has_the_name(write: Write) -> None:
    path = write("date,Temperature,Calibrated\n2015-02-04 17:51:00,1,2\n")
    readings, report = read(path, Options(device="room-1", mapping={"Calibrated": "temperature"}))
    assert short(readings) == [("17:51:00", 0, 2.0)]
    assert report.ignored == ["Temperature"]


def test_mapping_texts() -> None:
    assert parse_mapping(["T=temperature", "a=b=CO2"]) == [
        MetricPart(column="T", metric="temperature"),
        MetricPart(column="a=b", metric="co2"),
    ]
    with pytest.raises(
        SettingError, match=r"--map T=warmth: no metric .* temperature, humidity, pressure, co2, light, sound"
    ):
        parse_mapping(["T=warmth"])
    for text in ["T", "=co2"]:
        with pytest.raises(SettingError, match="COLUMN=metric"):
            parse_mapping([text])
    with pytest.raises(SettingError, match="twice"):
        parse_mapping(["T=co2", "T=light"])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no metric": (
        "date,x\n1,2\n",
        {},
        r"no column is named as a metric \(temperature, .*--map COLUMN=metric; .* date, x",
    ),
    "unknown metric": (
        PLAIN,
        {"mapping": {"CO2": "smell"}},
        r"options: metrics\.0\.metric: no metric has that name; there are temp",
    ),
    "unknown column": (PLAIN, {"mapping": {"Temp": "co2"}}, "--map Temp: no such column; .* date, Temperature, CO2"),
    "two for one": (
        PLAIN,
        {"mapping": {"CO2": "light", "Temperature": "light"}},
        "(Temperature, CO2|CO2, Temperature) are the same metric, light: say which with --map COLUMN=light",
    ),
    "a metric twice": ("date,CO2,co2\n1,2,3\n", {}, "CO2, co2 are the same metric"),
    "no time": ("day,CO2\n1,2\n", {}, "none is named as a time: say which with --time COLUMN; .* day, CO2"),
    "two times": ("date,time,CO2\n1,2,3\n", {}, "date, time may each be the time: .*--time COLUMN"),
    "unknown time": (PLAIN, {"time_column": "when"}, "--time when: no such column"),
    "no device": (PLAIN, {"device": None}, "none is named device or device_id: give --device NAME or --device-column"),
    "two devices": (
        "date,device,device_id,CO2\n1,2,3,4\n",
        {"device": None},
        "device, device_id may each be the device",
    ),
    "unknown device column": (PLAIN, {"device": None, "device_column": "room"}, "--device-column room: no such column"),
    "device twice over": (PLAIN, {"device_column": "CO2"}, "exclude each other"),
    "time twice": ("date,date,CO2\n1,2,3\n", {}, r"date, date \(2\) may each be the time"),
    "empty": ("", {}, "is empty"),
    "blank": ("\n \n", {}, "is empty"),
    "device without a name": (PLAIN, {"device": " "}, "--device: is empty"),
}


@pytest.mark.parametrize(("text", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_understood_is_refused_before_the_first_reading(
    write: Write, text: str, options: dict[str, Any], message: str
) -> None:
    path = write(text)
    with pytest.raises(SettingError, match=message):
        open_replay([path], Options(**{"device": "room-1", **options}))


def test_files_that_cannot_be_read(tmp_path: Path, write: Write) -> None:
    for path, message in {
        tmp_path / "none.csv": "there is no such file",
        tmp_path: "is no regular file",
        write(b"PAR1 no more", "broken.parquet"): "is not a Parquet file",
        write(b"\0\1\2", "data.bin"): "neither CSV, NDJSON nor Parquet",
        write('{\n"date": 1\n', "cut.json"): "no JSON object in any of its lines, and as a whole it is not JSON",
        write("{}", "none.json"): "no JSON object in its first 1 lines",
        write(PLAIN, "plain.csv.gz"): "cannot be read beyond line 0: Not a gzip file, as its name says",
    }.items():
        with pytest.raises(SettingError, match=message) as refused:
            open_replay([path], OPTIONS)
        assert str(path) in str(refused.value)
    with pytest.raises(SettingError, match="at least one file"):
        open_replay([], OPTIONS)


def test_a_file_that_breaks_off_gives_what_it_holds_and_says_where(write: Write) -> None:
    rows = "".join(f"{1423072260 + at},{at * 0.37}\n" for at in range(50_000))
    whole = gzip.compress(("date,CO2\n" + rows).encode())
    path = write(whole[: len(whole) // 2], "cut.csv.gz")
    with pytest.raises(SettingError, match=r"cut\.csv\.gz: cannot be read beyond line \d+"):
        list(open_replay([path], OPTIONS))
    replay = open_replay([path], SKIP)
    found = [reading for batch in replay for reading in batch]
    assert [reading.value for reading in found] == [at * 0.37 for at in range(len(found))]
    assert replay.report.bad_lines == 1
    assert "cannot be read beyond line" in replay.report.bad_listed[0]


def test_a_line_without_end_is_refused(write: Write) -> None:
    with pytest.raises(SettingError, match=r"data\.csv:1: longer than"):
        open_replay([write("x" * (1 << 20))], OPTIONS)


# --- Devices -----------------------------------------------------------------------------------------------------


def test_a_device_by_name_is_the_same_for_ever() -> None:
    assert str(ROOM) == "c7ab144f-c368-5587-9c92-4dd08e995535"


def test_devices_by_column(write: Write) -> None:
    own = "0F8FAD5B-D9CB-469F-A165-70867728950E"
    path = write(f"date,device,CO2\n1,room-1,1\n2, room-2 ,2\n3,{own},3\n4,{own.replace('-', '')},4\n")
    readings, report = read(path, Options())
    assert [it.device_id for it in readings] == [ROOM, uuid.uuid5(DEVICE_NAMESPACE, "room-2")] + [uuid.UUID(own)] * 2
    assert report.devices == {"room-1": str(ROOM), "room-2": str(uuid.uuid5(DEVICE_NAMESPACE, "room-2"))}


def test_another_column_can_be_the_device_and_another_the_time(write: Write) -> None:
    path = write("Sensor,date,when,CO2\nroom-1,yesterday,2015-02-04 17:51,1\n")
    readings, report = read(path, Options(device_column="sensor", time_column="when"))
    assert [(it.device_id, it.published_at) for it in readings] == [(ROOM, AT)]
    assert report.ignored == ["date"]


def test_a_line_without_its_device_is_bad(write: Write) -> None:
    _, report = read(write("date,device,CO2\n1,,1\n2,nan,1\n3,a,1\n"), Options(skip_bad=True))
    assert (report.bad_lines, report.readings) == (2, 1)
    assert all(text.endswith("bad_uuid: device: is empty") for text in report.bad_listed)


# --- The long form -----------------------------------------------------------------------------------------------

LONG = [
    Reading(ROOM, AT, 30, 721.25, ["site:a", "floor:2"]),
    Reading(ROOM, AT + timedelta(microseconds=1), 0, -0.0, []),
    Reading(ROOM, AT, 50, 1e-320, ['"', "\\", "a,b", "{}", " x ", "NULL", "ü"]),
]


def test_the_wire_is_read_back(write: Write) -> None:
    path = write(b"".join(encode(reading)[1] + b"\n" for reading in LONG), "wire.ndjson")
    readings, _ = read(path, Options())
    assert [encode(it) for it in readings] == [encode(it) for it in LONG]


def test_the_table_is_read_back_from_csv(write: Write) -> None:
    # As `COPY metrics TO STDOUT (FORMAT csv, HEADER)` writes it.
    path = write(
        "device_id,published_at,metric_name,value,tags,created_at\n"
        f'{ROOM},2015-02-04 17:51:00+00,30,721.25,"{{site:a,floor:2}}",2026-01-01 00:00:00+00\n'
        f"{ROOM},2015-02-04 17:51:00.000001+00,0,-0,{{}},2026-01-01 00:00:00+00\n"
        f'{ROOM},2015-02-04 17:51:00+00,50,1e-320,"{{""\\"""",""\\\\"",""a,b"",""{{}}"","" x "",""NULL"",ü}}",'
        "2026-01-01 00:00:00+00\n"
    )
    readings, report = read(path, Options())
    assert [encode(it) for it in readings] == [encode(it) for it in LONG]
    assert report.ignored == ["created_at"]


def test_metrics_by_name_or_code(write: Write) -> None:
    text = "device,ts,Metric_Name,Value\nroom-1,1,CO2,1\nroom-1,1,40,2\nroom-1,1,smell,3\nroom-1,1,7,4\nroom-1,1,0,\n"
    readings, report = read(write(text), Options())
    assert [(it.metric_name, it.value) for it in readings] == [(30, 1.0), (40, 2.0)]
    assert (report.bad_lines, report.lines, report.empty_cells) == (0, 5, 1)
    assert report.files[0].left_out_names == {"smell": 1, "7": 1}
    assert "  left out     records of 7 (1), smell (1)" in report.summary()


def test_tags_of_a_wide_line_belong_to_all_its_readings(write: Write) -> None:
    readings, _ = read(write('date,Temperature,CO2,Tags\n1,2,3,"[""a"",""b""]"\n4,5,6,\n'))
    assert [it.tags for it in readings] == [["a", "b"]] * 2 + [[]] * 2


@pytest.mark.parametrize(
    "cell", ["a,b", "{a,,b}", "{a,}", "{,a}", "{a,NULL}", '{"a}', "{{a},{b}}", "[1]", "[", 5, "{a}b"]
)
def test_what_is_no_list_of_tags(cell: object) -> None:
    with pytest.raises(RecordError) as refused:
        tags(cell)
    assert refused.value.reason == "bad_tags"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))))
def test_every_quoted_array_of_postgresql_is_read(labels: list[str]) -> None:
    escaped = (label.replace("\\", "\\\\").replace('"', '\\"') for label in labels)
    assert tags("{" + ",".join(f'"{label}"' for label in escaped) + "}") == labels


def test_tags_that_the_wire_does_not_allow_make_a_line_bad(write: Write) -> None:
    path = write("".join(json.dumps({"date": 1, "CO2": 2, "tags": ["x" * n]}) + "\n" for n in (300, 3)), "data.ndjson")
    assert "bad_tags: tags: " in read(path, SKIP)[1].bad_listed[0]


# --- The same readings in every format ---------------------------------------------------------------------------


def bits(value: float) -> bytes:
    return struct.pack(">d", value)


def test_all_formats_give_the_same_messages(tmp_path: Path) -> None:
    times = [AT + timedelta(milliseconds=1234 * at) for at in range(500)]
    values = [(-1) ** at * 1.1**at / 3 for at in range(500)]
    rows = [{"published_at": time, "device": f"d{at % 3}", "Light": values[at], "sound": None if at % 7 else -0.0}
            for at, time in enumerate(times)]  # fmt: skip
    frame = pl.DataFrame(rows)
    frame.write_parquet(tmp_path / "us.parquet", row_group_size=100)
    frame.with_columns(pl.col("published_at").dt.cast_time_unit("ns")).write_parquet(tmp_path / "ns.parquet")
    frame.with_columns(pl.col("published_at").dt.cast_time_unit("ms")).write_parquet(tmp_path / "ms.pq")
    frame.with_columns(pl.col("published_at").dt.replace_time_zone(None)).write_parquet(tmp_path / "naive.parquet")
    frame.with_columns(pl.col("published_at").dt.convert_time_zone("Asia/Kolkata")).write_parquet(
        tmp_path / "zone.parquet"
    )
    frame.with_columns(pl.col("published_at").dt.epoch("ms")).write_parquet(tmp_path / "epoch.parquet")
    with (tmp_path / "text.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["published_at", "device", "Light", "sound"])
        writer.writeheader()
        writer.writerows(rows)
    with (tmp_path / "text.ndjson").open("w") as file:
        file.writelines(json.dumps(row | {"published_at": row["published_at"].isoformat()}) + "\n" for row in rows)

    found = {
        path.name: [
            pair for batch in open_replay([path], Options(unit=None, allow=True), 64).messages() for pair in batch
        ]
        for path in sorted(tmp_path.iterdir())
    }
    reference = found.pop("text.csv")
    assert len(reference) == 500 + 72
    for name, pairs in found.items():
        assert pairs == reference, name
    decoded = [decode(*message) for message in reference]
    assert [bits(it.value) for it in decoded if it.metric_name == 40] == [bits(value) for value in values]


def test_parquet_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pl.DataFrame({"ts": [1, 2, None, 4], "CO2": [1.0, float("inf"), 3.0, float("nan")]}).write_parquet(path)
    _, report = read(path, SKIP)
    assert report.bad_listed == [
        f"{path}:row 2: bad_value: CO2: inf is not a finite double",
        f"{path}:row 3: bad_time: ts: is empty",
        f"{path}:row 4: no_reading: no metric has a value in it",
    ]


def test_what_is_finer_than_a_microsecond_is_cut_off_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    frame = pl.DataFrame({"ts": [1_000_001], "CO2": [1.0]}).with_columns(pl.col("ts").cast(pl.Datetime("ns")))
    frame.write_parquet(path)
    readings, report = read(path, OPTIONS)
    assert readings[0].published_at == datetime(1970, 1, 1, 0, 0, 0, 1000, tzinfo=UTC)
    assert "1 times are finer than a microsecond: what is finer was cut off" in report.text()


def test_parquet_types(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    frame = pl.DataFrame(
        {
            "ts": [date(2015, 2, 4)],
            "device": [ROOM.bytes],
            "Temperature": pl.Series([Decimal("1.10")]),
            "Humidity": pl.Series([0.1], dtype=pl.Float32),
            "CO2": pl.Series([2**53 + 1]),
            "tags": [["a", "b"]],
        }
    )
    frame.write_parquet(path)
    readings, _ = read(path, Options(more={"units": {"humidity": "%"}}, allow=True))
    assert [(it.device_id, it.value, it.tags) for it in readings] == [
        (ROOM, value, ["a", "b"]) for value in (1.1, struct.unpack("f", struct.pack("f", 0.1))[0], float(2**53 + 1))
    ]


def test_ndjson_lines_need_not_have_the_same_fields(write: Write) -> None:
    path = write(
        '\ufeff{"ts": 1, "CO2": 1, "x": {"y": [1]}}\r\n\n{"Light": 2, "ts": "1970-01-01T00:00:02Z"}\n{"CO2": 3}\n'
        '{"ts": 4, "CO2": "4.5", "sound": null}\n{"ts": 5, "CO2": true}\n{"ts": 6, "CO2": NaN}\n7\n{"ts": 8,\n'
        '{"ts": 9, "CO2": 9}\n{"ts": 10, "CO2": {}}\n{"ts": 11, "CO2": 1e400}\n{"ts": 12}\n',
        "data.jsonl",
    )
    readings, report = read(path, SKIP)
    assert short(readings) == [
        ("00:00:01", 30, 1.0),
        ("00:00:02", 40, 2.0),
        ("00:00:04", 30, 4.5),
        ("00:00:09", 30, 9.0),
    ]
    assert [text.removeprefix(f"{path}:").split(": ")[:2] for text in report.bad_listed] == [
        ["4", "bad_time"],
        ["6", "bad_value"],
        ["7", "no_reading"],
        ["8", "bad_line"],
        ["9", "bad_line"],
        ["11", "bad_value"],
        ["12", "bad_line"],
        ["13", "no_reading"],
    ]
    assert report.ignored == ["x.y"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_to_the_last_bit(value: float) -> None:
    for text in (repr(value), f"{value:.17g}", f" {value:.17E} ", f"{Decimal(value):f}"):
        assert bits(numbers(pl.Series([text])).values[0]) == bits(value), text
        assert bits(number(text)[0]) == bits(value), text  # type: ignore[arg-type]


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30))
def test_ndjson_numbers_are_the_nearest_doubles(value: Decimal) -> None:
    text = f"{value:f}"
    frame = _frame([parsed('{"CO2":' + text + "}")])
    assert bits(numbers(frame["CO2"]).values[0]) == bits(float(text))


# --- Real readings -----------------------------------------------------------------------------------------------


def test_the_occupancy_files_as_they_are(occupancy: list[Path]) -> None:
    replay = open_replay(occupancy, OPTIONS)
    found = {(it.published_at, it.metric_name): it.value for batch in replay for it in batch if it.device_id == ROOM}
    expected = {}
    for path in occupancy:
        for line in path.read_text().replace('"', "").splitlines()[1:]:
            _, time, *texts = line.split(",")
            values = map(float, texts[:4])
            for name, value in zip(("temperature", "humidity", "light", "co2"), values, strict=True):
                expected[datetime.fromisoformat(time + "+00:00"), METRICS[name]] = value
    assert {key: bits(value) for key, value in found.items()} == {key: bits(value) for key, value in expected.items()}
    report = replay.report
    assert (report.readings, report.lines, report.bad_lines, report.repeated_keys) == (82_240, 20_560, 0, 0)
    assert (report.ignored, report.zoneless) == (["HumidityRatio", "Occupancy"], 20_560)
    assert replay.bytes_read == replay.total_bytes


@given(
    st.lists(
        st.tuples(
            st.uuids(),
            st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999),
            st.sampled_from([*METRICS.values()]),
            st.floats(allow_nan=False, allow_infinity=False),
            st.lists(
                st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9), max_size=3
            ),
        )
    )
)
def test_messages_are_byte_for_byte_what_the_wire_says(
    rows: list[tuple[uuid.UUID, int, int, float, list[str]]],
) -> None:
    frame = pl.DataFrame(
        [(str(device), time, metric, value, json.dumps(labels)) for device, time, metric, value, labels in rows],
        schema={"device": pl.String, "time": pl.Int64, "metric": pl.Int64, "value": pl.Float64, "tags": pl.String},
        orient="row",
    ).with_columns(pl.Series("tags", [msgspec.json.encode(row[4]).decode() for row in rows], pl.String))
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert messages(frame) == [
        encode(Reading(device, epoch + timedelta(microseconds=time), metric, value, labels))
        for device, time, metric, value, labels in rows
    ]
