"""Files of the world, the command line for each, and the readings that it must give. The files lie beside the checkout."""

from __future__ import annotations

import json
from dataclasses import dataclass

import polars as pl

from metrics_pipeline.settings import ROOT

FOLDER = ROOT.parent / "shared" / "cases" / "replay"

Expected = tuple[str, str, str, float]
"""Device by name, instant in UTC, metric, value."""


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        file: its name.
        options: of `replay`.
        readings: what it must give, in any order.
        alone: whether it is read rightly without options.
        bad: how many lines are bad.
        near: whether values were converted, and need not be equal to the last bit.
        asks: what the first try without options says.
    """

    file: str
    options: tuple[str, ...]
    readings: list[Expected]
    alone: bool = False
    bad: int = 0
    near: bool = False
    asks: tuple[str, ...] = ()


def at(*rows: tuple[str, str, str, float]) -> list[Expected]:
    return list(rows)


def wide(device: str, *lines: tuple[object, ...], metrics: str = "temperature") -> list[Expected]:
    """A device's lines: the instant, and a value (or none) for each metric."""
    return [
        (device, str(moment), metric, float(value))  # type: ignore[arg-type]
        for moment, *values in lines
        for metric, value in zip(metrics.split(), values, strict=True)
        if value is not None
    ]


def _kaggle(times: list[str]) -> list[Expected]:
    values = (22.7, 51.0), (19.700000762939453, 76.0), (22.6, 50.9)
    devices = "b8:27:eb:00:00:01", "00:0f:00:00:00:02", "1c:bf:ce:00:00:03"
    return [
        (devices[number % 3], moment, metric, value)
        for number, moment in enumerate(times)
        for metric, value in zip(("temperature", "humidity"), values[number % 3], strict=True)
    ]


def _floats() -> list[Expected]:
    """`time.time()` has seven decimals at times: the seventh is cut off."""
    found = []
    for line in (FOLDER / "c14a.ndjson").read_text().splitlines() if FOLDER.exists() else []:
        record = json.loads(line)
        seconds, _, digits = repr(record["ts"]).partition(".")
        moment = pl.from_epoch(pl.Series([int(seconds) * 10**6 + int(digits[:6].ljust(6, "0"))]), time_unit="us")
        found.append(("c14a", f"{moment.dt.to_string('iso')[0]}Z", "temperature", record["temperature"]))
    return found


_WHEN = "2024-02-01T10:00:00"
_PRESSURE = [98312.44 / 100, 98310.12 / 100, 98305.80 / 100]
_BME = wide(
    "141",
    ("2018-12-01T00:02:10Z", _PRESSURE[0], 11.42, 71.03),
    ("2018-12-01T00:04:38Z", _PRESSURE[1], 11.40, 71.10),
    ("2018-12-01T00:07:05Z", _PRESSURE[2], 11.37, 71.21),
    metrics="pressure temperature humidity",
)
_SENSORS = ("--device-column", "sensor_id", "--unit", "pressure=Pa")
_FLUX = wide("TLM0100", ("2021-06-11T09:32:25Z", 71.2, 35.1), metrics="temperature humidity")
_ORDER = ("--date-order", "dmy")
_ENTITIES = ("--map", "sensor.bath_temperature=temperature", "--map", "sensor.bath_humidity=humidity")


def _text_of_time(number: int, moment: str, *options: str) -> Case:
    file = f"c34-{number}.csv"
    readings = wide(f"c34-{number}", (moment, float(f"1.{number}")))
    return Case(file, options, readings, alone=not options, asks=("--date-order dmy or mdy",) if options else ())


CASES = [
    Case("c13.csv", (), _kaggle([f"2020-07-12T00:01:{text}Z" for text in (
        "34.385974", "35.485974", "36.585974", "37.685974", "38.785974", "39.885974", "40.985974", "42.085974", "43.185974",
        "44.285973")]), alone=True),
    Case("c13-ts.csv", (), _kaggle([f"2020-07-12T00:01:{text}Z" for text in (
        "34.386", "35.486", "36.586", "37.686", "38.786", "39.886", "40.986", "42.086", "43.186", "44.286")]), alone=True),
    Case("c13.ndjson", (), wide("6e:81:00:00:00:01", ("2020-07-10T22:13:15.292461Z", 31.799999237060547, 55.099998474121094),
                                metrics="temperature humidity"), alone=True),
    Case("c14a.ndjson", (), _floats(), alone=True),
    Case("c14b.csv", (), wide("c14b", ("2021-02-01T20:31:19.269686Z", 20.5), ("2021-02-01T20:31:20.269686Z", 20.6)), alone=True),
    Case("c14c.parquet", (), wide(
             "c14c", ("2020-07-12T00:01:34.385974Z", 20.0), ("2020-07-12T00:01:35.485974Z", 21.0),
             ("2020-07-12T00:01:36.585974Z", 22.0), ("2020-07-12T00:01:37.685974Z", 23.0), ("2020-07-12T00:01:38.785974Z", 24.0)),
         alone=True),
    Case("c14d.ndjson", (), wide("c14d", ("2024-01-01T12:00:00.868680Z", 20.5), ("2024-01-01T12:00:01.868680Z", 20.6)),
         alone=True),
    Case("n3.csv", (), wide("n3", ("2020-07-12T00:01:34.386Z", 20), ("2020-07-12T00:01:35.48Z", 21),
                            ("2020-07-12T00:01:36.586Z", 22), ("2020-07-12T00:01:37Z", 23)), alone=True),
    *(Case(name, _SENSORS, _BME, near=True, asks=("--device NAME or --device-column COLUMN", "--unit pressure=Pa"))
      for name in ("c15.csv", "c15.csv.zst", "c15.csv.xz", "c15.zip")),
    Case("c16-tasmota.ndjson", ("--device", "tasmota"),
         wide("tasmota", (f"{_WHEN}Z", 21.3, 45.6), metrics="temperature humidity"), asks=("--device NAME",)),
    *(Case(name, ("--device-column", "sensor_id", "--unit", "temperature=degC"), _FLUX,
           asks=("--device NAME or --device-column COLUMN", "--unit temperature=degF or --unit temperature=degC"))
      for name in ("c18.csv", "c18-plain.csv")),
    Case("c19.csv", (*_ORDER, "--device", "uci", "--map", "T=temperature", "--missing", "-200", "--on-error", "skip"),
         wide("uci", ("2004-03-10T18:00:00Z", 13.6, 48.9), ("2004-03-10T19:00:00Z", 13.3, 47.7), metrics="temperature humidity"),
         bad=1, asks=("--device NAME", "--date-order dmy or mdy")),
    Case("c20.csv", ("--device", "c20"),
         wide("c20", ("2023-05-01T10:00:00Z", 21.4, None), ("2023-05-01T10:01:00Z", None, 45), ("2023-05-01T10:02:00Z", 21.5, None),
              ("2023-05-01T10:03:00Z", None, 46), ("2023-05-01T10:04:00Z", None, 47), ("2023-05-01T10:05:00Z", 23.4, 48),
              ("2023-05-01T10:06:00Z", 22, 50), metrics="temperature humidity"), asks=("--device NAME",)),
    Case("c20.parquet", ("--device", "c20"),
         wide("c20", ("2023-05-01T10:00:00Z", 21.4, None), ("2023-05-01T10:01:00Z", None, 45), ("2023-05-01T10:02:00Z", 22, None),
              metrics="temperature humidity"), asks=("--device NAME",)),
    Case("c30.csv", ("--device", "bath", *_ENTITIES),
         wide("bath", ("2025-08-31T22:00:00Z", 21.3, 55), ("2025-08-31T22:20:00Z", 21.4, None), metrics="temperature humidity"),
         asks=("--device NAME", "sensor.bath_temperature, sensor.bath_humidity", "--map NAME=metric", "--recipe home-assistant")),
    Case("c31.csv", ("--device", "c31"), wide("c31", (f"{_WHEN}Z", 21.5, 45), metrics="temperature humidity"),
         asks=("--device NAME",)),
    Case("c33.csv", ("--device-column", "sensor_id"),
         wide("8", ("2026-03-01T00:01:00Z", 3.2, 71.5), metrics="temperature humidity"), asks=("--device-column COLUMN",)),
    Case("c33-long.csv", (), wide("c33b", ("2026-03-01T00:01:00Z", 3.2)), alone=True),
    _text_of_time(1, "2023-07-20T22:02:38Z"),
    _text_of_time(2, f"{_WHEN}Z"),
    _text_of_time(3, f"{_WHEN}Z"),
    _text_of_time(4, f"{_WHEN}Z", *_ORDER),
    _text_of_time(5, "2024-02-01T15:04:00Z", "--date-order", "mdy"),
    _text_of_time(6, "2024-01-02T00:00:00Z"),
    _text_of_time(7, "2017-01-01T00:00:00Z"),
    _text_of_time(8, f"{_WHEN}Z"),
    _text_of_time(9, f"{_WHEN}Z"),
    _text_of_time(10, "2024-01-31T00:00:00Z"),
    _text_of_time(11, "2024-02-01T09:00:00Z"),
    _text_of_time(12, f"{_WHEN}Z"),
    _text_of_time(13, f"{_WHEN}.5Z"),
    _text_of_time(14, f"{_WHEN}Z"),
    _text_of_time(15, f"{_WHEN}.5Z"),
    Case("c38b.csv", ("--on-error", "skip"),
         wide("c38b", *((f"2026-02-01T00:0{minute}:00Z", 20 + minute) for minute in (1, 2, 3, 5, 6))), bad=1,
         asks=("c38b.csv:5: holds NUL bytes", "--on-error skip")),
    Case("comment.csv", (), wide("cmt", (f"{_WHEN}Z", 20)), alone=True),
    Case("sep.csv", (), wide("sep", (f"{_WHEN}Z", 20)), alone=True),
    Case("taglist.csv", (), wide("tg", (f"{_WHEN}Z", 20)), alone=True),
    Case("l-toa5.dat", ("--device", "roof"),
         wide("roof", ("2026-06-25T10:00:00Z", 23.4, 56.2), ("2026-06-25T10:10:00Z", None, 56.1), metrics="temperature humidity"),
         asks=("--device NAME", "--recipe campbell-toa5")),
    Case("l-nohead.csv", ("--time", "1", "--device-column", "2", "--map", "3=temperature", "--map", "4=humidity"),
         wide("Living Room", ("2023-10-03T23:42:52.255775Z", 23.9, 56), metrics="temperature humidity")
         + wide("Backyard", ("2023-10-03T23:42:52.255775Z", 14.5, 77), metrics="temperature humidity"),
         asks=("--time COLUMN", "--device-column COLUMN", "--map COLUMN=metric", "1: 2023-10-03 23:42:52.255775, 2: Living Room")),
    Case("l-intel.txt", ("--time", "1", "--time", "2", "--device-column", "4", "--map", "5=temperature", "--map", "6=humidity",
                         "--map", "7=light", "--unit", "temperature=degC", "--allow-implausible"),
         wide("1", ("2004-03-31T03:38:15.757551Z", 122.153, -3.91901, 11.04), ("2004-02-28T00:59:16.027850Z", 19.9884, 37.0933, 45.08),
              metrics="temperature humidity light"), asks=("--time COLUMN", "--map COLUMN=metric", "4: 1, 5: 122.153")),
    Case("l-aranet.csv", ("--device", "aranet"),
         wide("aranet", ("2023-10-05T13:38:35Z", 721, (77.4 - 32) / 1.8, 61, 766 * 1.33322387415),
              ("2023-10-05T13:39:35Z", 704, (77.4 - 32) / 1.8, 60, 765 * 1.33322387415),
              metrics="co2 temperature humidity pressure"), near=True, asks=("--device NAME", "--recipe aranet")),
    Case("l-jena.csv", ("--device", "jena"),
         wide("jena", ("2009-01-01T00:10:00Z", 996.52, -8.02, 93.3), ("2009-01-01T00:20:00Z", 996.57, -8.41, 93.4),
              metrics="pressure temperature humidity"), asks=("--device NAME",)),
    Case("l-nab.csv", ("--device", "nab", "--map", "value=temperature", "--unit", "temperature=degF"),
         wide("nab", ("2013-07-04T00:00:00Z", (69.88083514 - 32) / 1.8), ("2013-07-04T01:00:00Z", (71.22022706 - 32) / 1.8)),
         near=True, asks=("--device NAME", "--map value=METRIC --unit METRIC=UNIT")),
    Case("l-struct.parquet", ("--device-column", "dev"),
         wide("a", ("2024-01-01T00:00:00Z", 20.5, 50), metrics="temperature humidity"), asks=("--device-column COLUMN",)),
    Case("l-telegraf.ndjson", (), wide("boron", ("2023-11-14T22:13:20Z", 23.5, 45.2), metrics="temperature humidity"), alone=True),
    Case("l-deephaven.parquet", ("--device-column", "sensor_id", "--map", "hpa_div_4=pressure", "--scale", "pressure=4"),
         wide("1", ("2006-01-01T00:00:00Z", 21.2, 1012), metrics="temperature pressure")
         + wide("2", ("2006-01-01T00:00:00.5Z", 21.3, 1016), metrics="temperature pressure"), asks=("--device-column COLUMN",)),
    Case("l-pandas.parquet", ("--device", "pandas"),
         wide("pandas", ("2024-01-01T00:00:00Z", 20.5, 50), ("2024-01-01T00:01:00Z", 21, 51), metrics="temperature humidity"),
         asks=("--device NAME",)),
    Case("l-array.json", ("--device", "hobo", "--tz", "UTC"),
         wide("hobo", ("2024-04-14T06:30:13Z", 21.47, 31.8, 938), metrics="temperature humidity co2"),
         asks=("--device NAME", "names the zone MST", "--tz UTC", "--ignore-offset")),
]  # fmt: skip
