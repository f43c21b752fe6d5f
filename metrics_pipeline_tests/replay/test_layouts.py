"""Layouts by kind: each is read rightly, or asks for what it does not say; none gives something wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import zstandard

from metrics_pipeline.errors import PipelineError, SettingError
from metrics_pipeline.metric import MetricName
from metrics_pipeline.replay.cells import device_id
from metrics_pipeline.replay.names import spoken
from metrics_pipeline.replay.recipe import checked_recipe
from metrics_pipeline.replay.selection import selected
from metrics_pipeline.replay.source import Replay, open_replay
from metrics_pipeline.replay.times import Clock, units_of
from metrics_pipeline.replay.units import conversion, suspected

AT = datetime(2024, 2, 1, 10, tzinfo=UTC)
X: dict[str, Any] = {"device": {"name": "x"}}


def read(path: Path, said: dict[str, Any] | None = None, **options: bool) -> list[tuple[str, str, float]]:
    """Time, metric and value of each reading."""
    replay = open_replay([path], checked_recipe(X if said is None else said, "options"), **options)
    return brief(replay)


def brief(replay: Replay) -> list[tuple[str, str, float]]:
    found = [reading for batch in replay for reading in batch]
    return [
        (f"{it.published_at:%Y-%m-%d %H:%M:%S}", MetricName(it.metric_name).name.lower(), round(it.value, 9))
        for it in found
    ]


def at(*values: tuple[str, float], when: str = "2024-02-01 10:00:00") -> list[tuple[str, str, float]]:
    return [(when, metric, value) for metric, value in values]


T, H, P, C = "temperature", "humidity", "pressure", "co2"
HALF = at((T, 21.5), (H, 45))

READ: dict[str, tuple[str, str, dict[str, Any], list[tuple[str, str, float]]]] = {
    "HOBO": ("hobo.csv", ('"Plot Title: Office"\n"#","Date Time, GMT-05:00","Temp, °F (LGR S/N: 1, SEN S/N: 1)","RH, % (LGR S/N: 1)",'
             '"Coupler"\n1,07/14/23 02:00:00 PM,72.5,45.1,\n'), {}, at((T, 22.5), (H, 45.1), when="2023-07-14 19:00:00")),
    "ThingSpeak, CSV": ("feeds.csv", "created_at,entry_id,field1,field2,status\n2024-02-01 10:00:00 UTC,1,21.5,45,\n",
                        {"metrics": [{"column": "field1", "metric": T}, {"column": "field2", "metric": H}]}, HALF),
    "ThingSpeak, JSON": ("feeds.json", json.dumps({"channel": {"id": 9, "field1": "Temperature", "field2": "Humidity"}, "feeds": [
        {"created_at": "2024-02-01T10:00:00Z", "entry_id": 1, "field1": "21.5", "field2": "45"}]}), {}, HALF),
    "Grafana": ("panel.csv", '"Time","temperature {room=""a""}","humidity"\n"2024-02-01 10:00:00","21.5 °C","45%"\n', {}, HALF),
    "Netatmo": ("n.csv", ('Name;Long;Module\nHome;7.1;Indoor\nTimestamp;"Timezone : Europe/Berlin";Temperature;Humidity;CO2\n'
                '1706781600;"2024/02/01 11:00:00";21.5;45;600\n'), {}, [*HALF, *at((C, 600))]),
    "Ecowitt": ("e.csv", "Time,Outdoor Temperature(℉),Outdoor Humidity(%)\n2024/2/1 10:00,70.7,45\n",
                {"metrics": [{"column": "Outdoor Temperature(℉)", "metric": T}, {"column": "Outdoor Humidity(%)", "metric": H}]}, HALF),
    "Zigbee2MQTT": ("z.ndjson", '{"battery":100,"humidity":45,"last_seen":"2024-02-01T11:00:00+01:00","temperature":21.5}\n', {},
                    at((H, 45), (T, 21.5))),
    "Tasmota in °F and mmHg": ("t.ndjson", ('{"Time":"2024-02-01T10:00:00","BME280":{"Temperature":70.7,"Humidity":45,"DewPoint":48,'
                               '"Pressure":750},"PressureUnit":"mmHg","TempUnit":"F"}\n'), {},
                               [*HALF, *at((P, round(750 * 1.33322387415, 9)))]),
    "NOAA ISD by its codes": ("isd.csv", '"STATION","DATE","TMP"\n"722","2024-02-01T10:00:00","215"\n',
                              {"metrics": [{"column": "TMP", "metric": T, "scale": 0.1}]}, at((T, 21.5))),
    "Meteostat, no header": ("m.csv", "2024-02-01,10,21.5,1.1,45,,\n", {"time": {"columns": ["1", "2"]}, "metrics": [
        {"column": "3", "metric": T}, {"column": "5", "metric": H}]}, HALF),
    "Meteostat, JSON": ("m.json", json.dumps({"meta": {"generated": "x"}, "data": [
        {"time": "2024-02-01 10:00:00", "temp": 21.5, "rhum": 45, "dwpt": 9}]}), {}, HALF),
    "DWD": ("d.txt", ("STATIONS_ID;MESS_DATUM;QN_9;TT_TU;RF_TU;eor\n         44;2024020110;    3;  21.5;  45.0;eor\n"
            "         44;2024020111;    3;-999;  -999;eor\n"),
            {"time": {"unit": "date"}, "missing": ["-999"], "metrics": [{"column": "TT_TU", "metric": T}, {"column": "RF_TU", "metric": H}]}, HALF),
    "OpenAQ, JSON": ("o.json", json.dumps({"meta": {}, "results": [
        {"parameter": "temperature", "value": 70.7, "date": {"utc": "2024-02-01T10:00:00+00:00", "local": "x"}, "unit": "f"},
        {"parameter": "pm25", "value": 12, "date": {"utc": "2024-02-01T10:00:00+00:00", "local": "x"}, "unit": "µg/m³"}]}), {},
        at((T, 21.5))),
    "BigQuery": ("b.csv", "ts,temperature\n2024-02-01 10:00:00.000000 UTC,21.5\n", {}, at((T, 21.5))),
    "The Things Network": ("ttn.ndjson", json.dumps({"end_device_ids": {"device_id": "x"}, "received_at": "2024-02-01T10:00:00.000000009Z",
        "uplink_message": {"decoded_payload": {"temperature": 21.5, "humidity": 45}, "rx_metadata": [{"rssi": -50}],
                           "received_at": "2024-02-01T09:00:00Z"}}) + "\n", {"time": {"columns": ["received_at"]}}, HALF),
    "AWS IoT": ("a.ndjson", json.dumps({"timestamp": 1706781600000, "payload": {"temp": 70.7, "temp_unit": "F", "hum": 45}}) + "\n", {}, HALF),
    "lists of readings": ("l.ndjson", json.dumps({"ts": 1706781600, "readings": [
        {"name": "temperature", "value": 21.5}, {"name": "humidity", "value": 45}]}) + "\n", {"file": {"records": "readings"}}, HALF),
    "Open-Meteo": ("om.json", json.dumps({"timezone": "GMT", "hourly_units": {"time": "iso8601", "temperature_2m": "°F"}, "hourly": {
        "time": ["2024-02-01T10:00"], "temperature_2m": [70.7], "relative_humidity_2m": [45]}}), {}, HALF),
    "InfluxDB 1": ("i.json", json.dumps({"results": [{"series": [{"name": "env", "tags": {"room": "a"}, "columns": [
        "time", "temperature", "humidity"], "values": [[1706781600000000000, 21.5, 45]]}]}]}), {}, HALF),
    "Home Assistant's API": ("h.json", json.dumps([[{"entity_id": "sensor.t", "state": "21.5", "last_changed": "2024-02-01T10:00:00+00:00"}],
        [{"entity_id": "sensor.h", "state": "45", "last_changed": "2024-02-01T10:00:00+00:00"}]]),
        {"metrics": [{"name": "sensor.t", "metric": T}, {"name": "sensor.h", "metric": H}]}, HALF),
    "pandas, split": ("p.json", json.dumps({"columns": ["time", "temperature", "humidity"], "index": [0],
                                            "data": [["2024-02-01T10:00:00", 21.5, 45]]}), {}, HALF),
    "pandas, columns": ("p.json", json.dumps({"time": {"0": 1706781600000}, "temperature": {"0": 21.5}, "humidity": {"0": 45}}), {}, HALF),
    "Excel, German": ("x.csv", "Datum;Uhrzeit;Temperatur;Luftdruck\n01.02.2024;10:00;21,5;1.013,2\n", {}, at((T, 21.5), (P, 1013.2))),
    "Excel, French": ("x.csv", "Date;Heure;Température;Humidité\n01/02/2024;10:00;21,5;45\n13/02/2024;;;\n",
                      {"time": {"columns": ["Date", "Heure"], "order": "dmy"}}, HALF),
    "Excel's days": ("x.csv", "time,temperature,humidity\n45323.4166666667,21.5,45\n", {"time": {"unit": "excel"}}, HALF),
    "a preamble": ("p.csv", "Station: Roof\nSerial: 1\nExported: 2024-03-01 10:00\n\nTimestamp,Temp_F,Hum\n2024-02-01 10:00,70.7,45\n", {}, HALF),
    "a row of units": ("u.csv", "Date,Temp,Pressure\n,°F,kPa\n2024-02-01 10:00,70.7,101.3\n", {}, at((T, 21.5), (P, 1013))),
    "a header in a comment": ("n.csv", "# time,temperature,humidity\n1706781600.0,21.5,45\n", {}, HALF),
    "headers that come again": ("h.csv", "time,temperature\n2024-02-01T10:00Z,21.5\ntime,temperature\n2024-02-01T10:00Z,22\n", {},
                                at((T, 21.5), (T, 22))),
    "a column of units": ("u.csv", "time,temperature,unit\n2024-02-01T10:00Z,70.7,F\n2024-02-01T10:00Z,22,C\n", {}, at((T, 21.5), (T, 22))),
    "long with units": ("u.csv", "time,metric,value,unit\n2024-02-01T10:00Z,temperature,70.7,°F\n2024-02-01T10:00Z,humidity,0.45,ratio\n", {}, HALF),
    "a zone in the header": ("z.csv", "Time (UTC+02:00),temperature\n2024-02-01 12:00,21.5\n", {}, at((T, 21.5))),
    "only some lines": ("w.csv", "time,place,temperature\n2024-02-01T10:00Z,in,21.5\n2024-02-01T10:00Z,out,5\n", {"where": {"place": ["in"]}},
                        at((T, 21.5))),
    "metrics by conditions": ("w.csv", "time,kind,reading\n2024-02-01T10:00Z,t,21.5\n2024-02-01T10:00Z,h,45\n2024-02-01T10:00Z,x,1\n", {"metrics": [
        {"column": "reading", "metric": T, "where": {"kind": "t"}}, {"column": "reading", "metric": H, "where": {"kind": "h"}}]}, HALF),
    "columns that take turns": ("r.ndjson", ('{"time":"2024-02-01 10:00:00","temperature_C":21.5}\n'
        '{"time":"2024-02-01 10:00:00","temperature_F":70.7}\n'), {"metrics": [
            {"column": "temperature_C", "metric": T}, {"column": "temperature_F", "metric": T}]}, at((T, 21.5), (T, 21.5))),
    "NaN as Python writes it": ("n.ndjson", '{"time":"2024-02-01T10:00Z","temperature":NaN,"humidity":45}\n', {}, at((H, 45))),
    "a wrong zone in the cells": ("z.csv", "time,temperature\n2024-02-01T11:00:00Z,21.5\n",
                                  {"time": {"zone": "Europe/Berlin", "ignore_offset": True}}, at((T, 21.5))),
    "a format": ("f.csv", "time,temperature\n1 Feb 24 at 10h,21.5\n", {"time": {"formats": ["%d %b %y at %Hh"]}}, at((T, 21.5))),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "said", "expected"), READ.values(), ids=READ.keys())
def test_what_is_beyond_doubt_or_said_is_read(
    tmp_path: Path, name: str, text: str, said: dict[str, Any], expected: list[tuple[str, str, float]]
) -> None:
    path = tmp_path / name
    path.write_text(text, "utf-8")
    assert read(path, X | said, skip_bad=True) == expected


ASKED: dict[str, tuple[str, str]] = {
    "two units": ("time,temp_c,temp_f\n2024-02-01T10:00Z,21,70\n", "temp_c, temp_f are the same metric.*--map COLUMN=temperature"),
    "a letter that may be a unit": ("time,probe_f\n2024-02-01T10:00Z,21\n", "no column is named as a metric"),
    "two words": ("time,temperature,temp\n2024-02-01T10:00Z,21,22\n", "temperature, temp are the same metric"),
    "kelvin": ("time,temperature\n2024-02-01T10:00Z,294.1\n", "--unit temperature=K or --unit temperature=degC"),
    "Fahrenheit": ("time,temperature\n2024-02-01T10:00Z,70.1\n", "--unit temperature=degF or --unit temperature=degC"),
    "a ratio": ("time,humidity\n2024-02-01T10:00Z,0.45\n", "--unit humidity=ratio or --unit humidity=%"),
    "pascals": ("time,pressure\n2024-02-01T10:00Z,98312\n", "--unit pressure=Pa or --unit pressure=hPa"),
    "kilopascals": ("time,pressure\n2024-02-01T10:00Z,101.3\n", "--unit pressure=kPa"),
    "inches of mercury": ("time,pressure\n2024-02-01T10:00Z,29.92\n", "--unit pressure=inHg"),
    "millimetres of mercury": ("time,pressure\n2024-02-01T10:00Z,760\n", "--unit pressure=mmHg"),
    "a switch": ("time,light\n2024-02-01T10:00Z,0\n2024-02-01T10:01Z,1\n", "as a switch does: say --unit light=lx, or --leave-out light"),
    "another quantity": ("time,Humidity (g/m³)\n2024-02-01T10:00Z,8\n", "speaks of 'g/m³': say --unit humidity=UNIT, or --leave-out"),
    "millivolts": ("time,Temperature (mV)\n2024-02-01T10:00Z,8\n", "speaks of 'mV'"),
    "not possible": ("time,temperature\n2024-02-01T10:00Z,-127\n2024-02-01T10:00Z,20\n", "-127 °C is not possible.*--allow-implausible"),
    "which is the day": ("time,temperature\n01/02/2024 10:00,21\n", "may be several days: say --date-order dmy or mdy"),
    "which is the year": ("time,temperature\n01/02/03 10:00,21\n", "say --date-order dmy or mdy or ymd"),
    "milliseconds since the start": ("ts,temperature\n1234,21\n", "is no count since 1970 between 1980 and 2100: say --time-unit"),
    "a date or seconds": ("ts,temperature\n2024020110,21\n", "may be date or s: say --time-unit"),
    "days only": ("date,temperature\n2024-02-01,21\n2024-02-01,22\n", "date has days only.*--time date --time COLUMN"),
    "days and hours": ("date,hour,temperature\n2024-02-01,1,21\n", r"date has days only.*\(hour\?\)"),
    "a clock only": ("time,temperature\n10:00:00,21\n", "'10:00:00' is not a time in a form that is known: say --time-format"),
    "zones that are several": ("time,temperature\n2024-02-01 10:00 CST,21\n", "CST may be several zones: say --tz ZONE with --ignore-offset"),
    "a vague header": ("time (EST),temperature\n2024-02-01 10:00,21\n", "names the zone EST, which may be several: say --tz ZONE"),
    "a thousand or a decimal": ("time;pressure\n2024-02-01T10:00Z;1,013\n", "say --decimal , or --decimal ."),
    "two times": ("time,date,temperature\n2024-02-01T10:00Z,2024-02-02T10:00Z,21\n", "may each be the time: say which with --time"),
    "a value of anything": ("time,value\n2024-02-01T10:00Z,21\n", "--map value=METRIC --unit METRIC=UNIT"),
    "names of nothing": ("time,metric,value\n2024-02-01T10:00Z,pm25,21\n", "metric names no metric .* but pm25: .*--map NAME=metric"),
    "lines of the wrong width": ("time,temperature\n2024-02-01T10:00Z,21,5\n2024-02-01T10:00Z,21\n", "has 3 fields, the other lines have 2"),
    "a line without a reading": ("time,temperature\n2024-02-01T10:00Z,\n2024-02-01T10:00Z,21\n", ":2: no metric has a value in it"),
    "codes behind numbers": ("time;temperature\n2024-02-01T10:00Z;+0122,5\n", r"temperature"),
    "headers in another order": ("time,temperature,humidity\n2024-02-01T10:00Z,21,45\nhumidity,temperature,time\n", "another order: split"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), ASKED.values(), ids=ASKED.keys())
def test_what_is_in_doubt_is_asked_for(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(PipelineError, match=message):
        read(path)


def test_a_mapped_column_speaks_its_unit_or_is_asked_for_it(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    for column, value, result in (
        ("Outdoor (°F)", 50, 10),
        ("Outdoor, °F", 50, 10),
        ("baro_inHg", 29.92, 1013.2074812),
    ):
        path.write_text(f'time,"{column}"\n2024-02-01T10:00Z,{value}\n')
        metric = P if "baro" in column else T
        ((_, _, found),) = read(path, X | {"metrics": [{"column": column, "metric": metric}]})
        assert found == pytest.approx(result, rel=1e-9)
    for column, says in (("probe_f", "'f'"), ("Probe (mV)", "'mV'"), ("Probe (%)", "'%'")):
        path.write_text(f"time,{column}\n2024-02-01T10:00Z,21\n")
        with pytest.raises(SettingError, match=f"speaks of {re.escape(says)}: say --unit temperature=UNIT"):
            read(path, X | {"metrics": [{"column": column, "metric": T}]})
        assert read(path, X | {"metrics": [{"column": column, "metric": T, "unit": "degC"}]}) == at((T, 21))


@pytest.mark.parametrize("part", ["units", "scales"])
def test_what_is_said_of_nothing_is_refused(tmp_path: Path, part: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text("time,Temp\n2024-02-01T10:00Z,50\n")
    value: Any = "degF" if part == "units" else 0.5
    for key in ("Temp", "TEMP", "Temperature"):
        assert read(path, X | {part: {key: value}}) == at((T, 10 if part == "units" else 25))
    with pytest.raises(SettingError, match="Tmp: it is neither a metric nor a column that is one"):
        read(path, X | {part: {"Tmp": value}})


def test_a_mapping_never_makes_one_metric_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("time,metric_name,value\n2024-02-01T10:00Z,temperature,21\n2024-02-01T10:00Z,pm25,12\n")
    said = X | {"metrics": [{"column": "value", "metric": T}]}
    with pytest.raises(
        SettingError, match=r"metric_name says that value is pm25, temperature.*--where metric_name=pm25"
    ):
        read(path, said)
    assert read(path, said | {"where": {"metric_name": ["temperature"]}}) == at((T, 21))


PLAIN = "time;device;Temperatur (°C)\n01.02.2024 10:00;Küche;21,5\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(PLAIN.encode(encoding))
    replay = open_replay([path])
    assert brief(replay) == at((T, 21.5))
    assert replay.report.devices == {"Küche": str(device_id("Küche"))}


def packed(kind: str, data: bytes) -> bytes:
    if kind == "zst":
        return zstandard.compress(data[:9]) + zstandard.compress(data[9:])
    return {"gz": gzip.compress(data), "bz2": bz2.compress(data), "xz": lzma.compress(data)}[kind]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_compressions_whole_and_broken_off(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.csv.{kind}"
    path.write_bytes(packed(kind, PLAIN.encode()))
    assert brief(open_replay([path])) == at((T, 21.5))
    lines = "".join(f"2024-02-01T10:00:00Z,a,{number % 31}.{number % 97}\n" for number in range(30_000))
    whole = packed(kind, f"time,device,temperature\n{lines}".encode())
    path.write_bytes(whole[: len(whole) - 10])
    with pytest.raises(SettingError, match=f"data.csv.{kind}: cannot be read beyond line"):
        open_replay([path]).look()
    path.write_bytes(b"no such thing")
    with pytest.raises(SettingError, match="cannot be read beyond line 0: Not a"):
        open_replay([path])


def test_archives(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("one.csv", PLAIN)
    assert brief(open_replay([path])) == at((T, 21.5))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("two.csv", PLAIN)
    with pytest.raises(SettingError, match=r"holds 2 files \(one.csv, two.csv\): unzip it"):
        open_replay([path])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "")
    with pytest.raises(SettingError, match="is an Excel workbook: save the sheet as CSV"):
        open_replay([path])


def test_parquet_of_every_usual_type(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    moment = pl.Series([AT.replace(tzinfo=None)])
    base = pl.DataFrame(
        {"device": pl.Series(["a"], dtype=pl.Categorical), "temperature": [21.5], "flag": [True], "map": [[{"k": 1}]]}
    )
    for times in (
        moment.dt.cast_time_unit("ns"),
        moment.dt.cast_time_unit("ms"),
        moment.dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Kolkata"),
        moment.dt.epoch("s"),
        moment.dt.epoch("us").cast(pl.UInt64),
        moment.dt.to_string("iso"),
        moment.dt.to_string("iso").cast(pl.Binary),
        moment.dt.epoch("s").cast(pl.Float64),
    ):
        for kind in (pl.Float64, pl.Float32, pl.Decimal(10, 2), pl.String):
            base.with_columns(times.alias("time"), pl.col("temperature").cast(kind)).write_parquet(path)
            assert brief(open_replay([path])) == at((T, 21.5)), (times.dtype, kind)
    pl.DataFrame({"time": [date(2024, 2, 1)], "device": [1.0], "r": [{"temperature": 21.5}]}).write_parquet(path)
    assert brief(open_replay([path])) == at((T, 21.5), when="2024-02-01 00:00:00")


def test_what_later_records_of_json_have_counts_too(tmp_path: Path) -> None:
    path = tmp_path / "data.ndjson"
    early = '{"time":"2024-02-01T10:00:00Z","device":"a","temperature":21.5}\n'
    path.write_text(early * 21_000 + '{"time":"2024-02-01T10:00:00Z","device":"a","humidity":45,"x":1}\n')
    replay = open_replay([path])
    assert brief(replay)[-1] == ("2024-02-01 10:00:00", H, 45)
    assert replay.report.ignored == ["x"]
    assert replay.report.readings == 21_001


def test_later_names_of_a_long_file_count_too(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    line = "2024-02-01T10:00:00Z,a,temperature,21.5\n"
    path.write_text("time,device,metric,value\n" + line * 70_000 + "2024-02-01T10:00:00Z,a,humidity,45\n")
    assert brief(open_replay([path]))[-1] == ("2024-02-01 10:00:00", H, 45)


def test_values_that_speak_another_unit_later_are_asked_about(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    cold, warm = "2024-02-01T10:00:00Z,a,45\n", "2024-02-01T10:00:00Z,a,90\n"
    path.write_text("time,device,temperature\n" + cold * 90_000 + warm * 90_000)
    with pytest.raises(SettingError, match="--unit temperature=degF or --unit temperature=degC"):
        open_replay([path]).look()


@pytest.mark.parametrize(
    ("unit", "metric", "value", "result"),
    [
        ("degF", T, 77.4, 25.22222222222222),
        ("°F", T, 32, 0),
        ("K", T, 293.15, 20),
        ("mmHg", P, 766, 766 * 1.33322387415),
        ("inHg", P, 29.92, 1013.2074812),
        ("Pa", P, 98312.44, 983.1244),
        ("mbar", P, 996.52, 996.52),
        ("psi", P, 14.7, 1013.529322),
        ("ratio", H, 0.45, 45),
        ("%", C, 0.04, 400),
        ("ppb", C, 400_000, 400),
        ("klx", "light", 0.5, 500),
    ],
)
def test_units(unit: str, metric: str, value: float, result: float) -> None:
    way = conversion(unit, MetricName[metric.upper()])
    assert pl.select(way.of(pl.lit(value, pl.Float64))).item() == pytest.approx(result, rel=1e-9)


@pytest.mark.parametrize(
    ("unit", "metric"), [("mV", T), ("degC", H), ("Pa", "sound"), ("K/s", T), ("furlong", P), ("", "co2"), ("(", T)]
)
def test_what_is_no_unit_of_a_metric(unit: str, metric: str) -> None:
    with pytest.raises(SettingError, match=f"is no unit of {metric}"):
        conversion(unit or "nothing", MetricName[metric.upper()])


def test_names_of_other_quantities_are_not_taken_for_a_metric() -> None:
    for name in (
        "HumidityRatio",
        "Tdew (degC)",
        "Tpot (K)",
        "pressure_sealevel",
        "temp_min",
        "pm25",
        "VPmax (mbar)",
        "dew_point",
        "co",
    ):
        assert spoken(name).metric is None, name
    assert suspected(MetricName.TEMPERATURE, 20, 21, 22) == []
    assert units_of(["1706781600", "1706781600000"]) == set()
    assert Clock(unit="ns").micro("1612211479269686570") == 1612211479269686


def test_a_query_keeps_numbers_and_names_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("id,code,t,v\n7,007,1612211479269686570,0.1\n8,008,1612211479269686571,1e-5\n")
    query = "SELECT code AS device, t AS time, v AS temperature, typeof(id) AS a, typeof(code) AS b, typeof(t) AS c FROM input"
    with selected(query, [path], checked_recipe({}, "x"), tmp_path / "work") as (file,):
        assert [row for block in file.blocks() for row in block.frame.rows()] == [
            ("007", 1612211479269686570, 0.1, "BIGINT", "VARCHAR", "BIGINT"),
            ("008", 1612211479269686571, 1e-5, "BIGINT", "VARCHAR", "BIGINT"),
        ]
        assert file.place(1) == f"{path}:row 1"
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT * FROM nothing", "Table with name nothing does not exist.*the columns of input are id, t"),
        ("SELECT", "--select: "),
        ("DROP VIEW input", "give one SELECT over the table input"),
        ("SELECT 1; SELECT 2", "give one SELECT over the table input"),
        ("SELECT * FROM read_text('/etc/hostname')", "Permission Error"),
        ("INSTALL httpfs", "give one SELECT"),
    ],
)
def test_what_a_query_may_not(tmp_path: Path, query: str, message: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text("id,t\n1,2\n")
    with pytest.raises(SettingError, match=message), selected(query, [path], checked_recipe({}, "x"), tmp_path):
        pass
