"""What the name of a column says: a metric and its unit, a time, a device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from metrics_pipeline.metric import MetricName
from metrics_pipeline.replay.units import fits, known_unit


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


METRICS: Final = {name.name.lower(): int(name) for name in MetricName}

_SYNONYMS: Final = {
    "temperature": "temp temps temperatur température temperatura temperatuur teplota airtemp airtemperature ambienttemperature "
    "lufttemperatur tair tempair",
    "humidity": "hum humid rh relativehumidity relhumidity relhum rhum feuchte luftfeuchte luftfeuchtigkeit feuchtigkeit "
    "relfeuchte relativefeuchte relativeluftfeuchte relativeluftfeuchtigkeit humidité humedad umidità umidade luchtvochtigheid hygro",
    "pressure": "press pres airpressure atmosphericpressure barometricpressure barometer baro luftdruck druck pressão presión pressione luchtdruk",
    "co2": "carbondioxide co₂ kohlendioxid",
    "light": "illuminance lux lightlevel beleuchtungsstärke illuminancelux",
    "sound": "noise soundlevel noiselevel soundpressurelevel spl schallpegel lautstärke",
}
_WITH_UNIT_ONLY: Final = {"t": "temperature", "p": "pressure", "ta": "temperature", "h": "humidity", "rf": "humidity"}
_OF_BASE: Final = {metric: metric for metric in METRICS} | {
    word: metric for metric, words in _SYNONYMS.items() if metric in METRICS for word in words.split()
}
_OF_UNIT: Final = {"°c": "temperature", "°f": "temperature", "℃": "temperature", "℉": "temperature", "%rh": "humidity",
                   "rh%": "humidity", "hpa": "pressure", "mbar": "pressure", "mmhg": "pressure", "inhg": "pressure"}  # fmt: skip
_aggregate: Final = re.compile(r"(?:avg|mean|average|last|median|first|value)\((.+)\)", re.IGNORECASE).fullmatch
_HARMLESS: Final = _words(
    "avg mean average sensor value actual current measured reading ch channel 2m instantaneous smp rel"
)
_LIKE: Final = re.compile(
    r"temp|(?<!\w)t(?!\w)|°|humid|feucht|hygro|(?<![a-z])rh(?![a-z])|press|druck|baro|hpa|mbar|mmhg|co2|carbon|lux|"
    r"illum|noise|sound|schall",
    re.IGNORECASE,
)
_TIMES: Final = _words(
    "date time timestamp publishedat datetime ts createdat lastchanged lastseen recordedat measuredat observedat "
    "timestamps datum zeit zeitstempel datumzeit datumuhrzeit utc receivedat messdatum zeitpunkt eventtime "
    "sampledat loggedat epoch unixtime unixtimestamp unix epochtime indexlevel0 datetimeutc timestamputc "
    "datetimelocal timeutc timelocal fecha horodatage dateutc obstime observationtime measurementtime sampletime "
    "readingtime recordtime dateheure dateandtime published recorded dateobserved phenomenontime time stamp"
)
_PLAIN_TIMES: Final = _words("date time timestamp publishedat datetime ts")
_DEVICES: Final = _words("device deviceid")
_DEVICES_PERHAPS: Final = _words(
    "sensor sensorid sensorname devicename station stationid stationname node nodeid mac macaddress deveui "
    "deviceuid location locationid room entityid host topic serial serialnumber stationsid gateway site gerät "
    "gerat sonde capteur logger loggerid"
)
LONG_NAMES: Final = _words(
    "metricname metric valuetype field measurement parameter variable quantity property observedproperty entityid "
    "valueid datatype measure measuretype metrictype kind key channel name series attribute sensortype parametername "
    "variablename type"
)
LONG_VALUES: Final = _words("value state val reading result metricvalue measurementvalue fieldvalue datavalue")
LONG_UNITS: Final = _words("unit units unitofmeasurement uom")
TIMES_OF_DAY: Final = _words("time uhrzeit heure hour hora ora zeit stunde timeofday tijd hr hh hhmm localtime utctime")
_PER_NUMBER: Final = {
    "ms": "ms", "millis": "ms", "msec": "ms", "milliseconds": "ms", "us": "us", "micros": "us", "microseconds": "us",
    "µs": "us", "ns": "ns", "nanos": "ns", "nanoseconds": "ns", "s": "s", "sec": "s", "secs": "s", "seconds": "s",
}  # fmt: skip


class Spoken(NamedTuple):
    """What a name says of a metric.

    Attributes:
        metric: None when it says none, or something else, too.
        unit: None when it says none.
        strange: what stands there like a unit, and is none that is known, or none of this metric's.
    """

    metric: MetricName | None = None
    unit: str | None = None
    strange: str | None = None


def base(name: str) -> str:
    """A name's letters and digits, in small letters, without what stands in brackets."""
    return re.sub(r"[\W_]+", "", re.sub(r"[(\[{][^()\[\]{}]*[)\]}]", "", _last(name))).casefold()


def _apart(text: str) -> list[str]:
    return re.split(r"[\s_,/:;.\-]+", text)


def _last(name: str) -> str:
    """Of a nested name such as `payload.temp` the last part."""
    name = name.strip(".")
    return name.rsplit(".", 1)[-1] if "." in name and not re.search(r"[\s(\[]", name) else name


def spoken(name: str) -> Spoken:
    """Whether a name is that of one metric and of nothing else, and which unit it names."""
    text = _last(name.strip())
    if metric_of_unit := _OF_UNIT.get(text.casefold().replace(" ", "")):
        return Spoken(MetricName(METRICS[metric_of_unit]), known_unit(text))
    if inner := _aggregate(text):
        text = inner[1]
    if inner := _aggregate(text):
        text = inner[1]
    unit: str | None = None
    strange: str | None = None
    letter: str | None = None
    text = re.sub(r"\{[^{}]*\}", " ", text)  # labels, as Grafana and Prometheus write them
    for content in re.findall(r"[(\[]([^()\[\]]*(?:\([^()]*\))?)[)\]]", text):
        for part in [content, *re.split(r"[,;]", content)]:
            if unit is None and part.strip():
                unit = known_unit(part)
        if unit is None and content.strip() and not content.strip().isdigit():
            strange = content.strip()
    text = re.sub(r"[(\[][^()\[\]]*(?:\([^()]*\))?[)\]]", " ", text)
    words = [word for word in _apart(text.strip()) if word]
    if unit is None and "%" in text and (found := known_unit(re.sub(r"^[^%]*", "", text))):
        unit, words = found, [word for word in _apart(re.sub(r"%.*$", "", text)) if word and word != "in"]
    for size in (3, 2, 1):
        found = known_unit(" ".join(words[-size:]))
        if len(words) > size and found and found != "ratio" and unit in (None, found):
            letter = words[-1] if unit is None and len("".join(words[-size:])) == 1 else None
            unit, words = found, words[:-size]
            if words[-1].casefold() == "in":
                words.pop()
            break
    if unit is None and words and (tail := re.search(r"(?<=[a-zäöü])[A-Z]\w{0,3}$", words[-1])):
        # tempC, pressurePa: only when what stands before is a metric as a whole.
        found = known_unit(tail[0])
        if found and found != "ratio":
            letter = tail[0] if len(tail[0]) == 1 else None
            unit, words = found, [*words[:-1], words[-1][: tail.start()]]
    words = [part.casefold() for word in words for part in re.split(r"(?<=[a-zäöü])(?=[A-Z])", word)]
    if unit is not None:
        strange = None
    kept = [word for word in words if not word.isdigit() and word not in _HARMLESS] or words
    joined = "".join(kept)
    metric = _OF_BASE.get(joined)
    if metric is None and unit is not None:
        metric = _WITH_UNIT_ONLY.get(joined)
    if metric is None and unit is None and joined[-1:] in ("c", "f") and _OF_BASE.get(joined[:-1]) == "temperature":
        metric, unit = "temperature", known_unit(joined[-1])
    if metric is None:
        if unit is not None and letter:
            # The F of `probe_f` may be that of a room: only behind a metric's own name it is a unit.
            return Spoken(None, None, letter)
        return Spoken(None, unit, strange)
    found_metric = MetricName(METRICS[metric])
    if unit is not None and not fits(unit, found_metric):
        return Spoken(found_metric, None, unit)
    return Spoken(found_metric, unit, strange)


def looks_like_a_metric(name: str) -> bool:
    """Whether a person might take a column for one of the metrics."""
    return bool(_LIKE.search(name.rsplit(".", 1)[-1]))


def is_plainly_time(name: str) -> bool:
    """Whether a column is named as the time and as nothing more special, such as the time of a change."""
    return base(name) in _PLAIN_TIMES


def is_time(name: str) -> bool:
    """Whether a column is named as a time."""
    return _time_base(name)[0] in _TIMES


def time_unit(name: str) -> str | None:
    """What numbers in a column of times count, where its name says so: `timestamp_ms`."""
    return _time_base(name)[1]


def _time_base(name: str) -> tuple[str, str | None]:
    text = re.sub(r",?\s*(UTC|GMT)\s*[+-]?[\d:]*", "", name)
    inside = re.search(r"[(\[]\s*([a-zµ]+)\s*[)\]]", text)
    unit = _PER_NUMBER.get(inside[1].casefold()) if inside else None
    found = base(text or name)
    words = re.split(r"[\s_]+", _last(text.strip()).casefold())
    if len(words) > 1 and words[-1] in _PER_NUMBER:
        return "".join(words[:-1]), _PER_NUMBER[words[-1]]
    return found, unit


def is_device(name: str) -> bool:
    """Whether a column is named as a device."""
    return base(name) in _DEVICES


def may_be_device(name: str) -> bool:
    """Whether a column might tell devices apart."""
    return base(name) in _DEVICES_PERHAPS


def one_of(columns: Sequence[str], bases: frozenset[str]) -> list[str]:
    """The columns with one of these names."""
    return [name for name in columns if base(name) in bases]
