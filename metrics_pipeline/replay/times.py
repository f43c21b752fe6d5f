"""Times as files write them: ISO 8601 and its relatives, dates in each order, month names, counts since 1970."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal, InvalidOperation
from typing import Final, Literal, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import polars as pl

from metrics_pipeline.errors import RecordError, SettingError
from metrics_pipeline.replay.cells import MISSING, shown

Unit = Literal["s", "ms", "us", "ns", "excel", "date"]
"""What a number that is a time counts since 1970 (`excel`: days since 1899-12-30), or `date`: 20240201, 202402011000, …"""

Order = Literal["dmy", "mdy", "ymd"]
"""Of day, month and year in a date of numbers."""

UNITS: Final[tuple[str, ...]] = get_args(Unit)
ORDERS: Final[tuple[str, ...]] = get_args(Order)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EXCEL: Final = datetime(1899, 12, 30, tzinfo=UTC)
_MICRO: Final = timedelta(microseconds=1)
_PER_SECOND: Final = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_EARLY, _LATE = 315_532_800, 4_102_444_800
"""1980 and 2100: a count that was not said to be one is taken for what lies between them in one unit only."""

_ZONES_SINCE: Final = datetime(1930, 1, 1)  # noqa: DTZ001  # local times are compared with it
_ZONES_UNTIL: Final = datetime(2037, 12, 31)  # noqa: DTZ001

_MONTHS: Final = {
    name: month
    for month, names in enumerate(
        [
            *("jan january januar janvier", "feb february februar fev", "mar march mär märz mrz mars", "apr april avr"),
            *("may mai mayo", "jun june juni juin", "jul july juli juillet", "aug august août aout"),
            *("sep sept september", "oct october okt oktober", "nov november", "dec december dez dezember"),
        ],
        1,
    )
    for name in names.split()
}
_TIME = (
    r"(?:(?P<hour>\d{1,2})(?:[:.h](?P<minute>\d{2})(?:[:.](?P<second>\d{2})(?:[.,:](?P<fraction>\d+))?)?)?"
    r"\s*(?P<half>[AaPp]\.?[Mm]\.?)?|(?P<clock>\d{3,4}|\d{6})(?:[.,](?P<rest>\d+))?)"
)
_ZONE = r"\s*(?P<zone>Z|z|(?:UTC|GMT|utc)?\s*[+-]\d{1,2}(?::?\d{2})?(?::?\d{2})?|UTC|GMT|utc|\[?[A-Z][A-Za-z_]+/[A-Za-z_/+-]+\]?|[A-Z]{2,5})?"
_NAMED = r"(?:[A-Za-zäöü]{2,10}\.?,?\s+)?"
_FORMS: Final = [
    re.compile(pattern + r"\Z", re.ASCII if "ä" not in pattern else 0)
    for pattern in (
        rf"(?P<y>\d{{4}})(?P<sep>[-/.])(?P<m>\d{{1,2}})(?P=sep)(?P<d>\d{{1,2}})(?:(?:[T_,]\s*|\s+(?:-\s+)?){_TIME})?{_ZONE}",
        rf"(?P<y>\d{{4}})(?P<m>\d{{2}})(?P<d>\d{{2}})(?:(?:T|\s+){_TIME}{_ZONE})",
        rf"(?P<a>\d{{1,2}})(?P<sep>[-/.])(?P<b>\d{{1,2}})(?P=sep)(?P<c>\d{{4}}|\d{{2}})(?:(?:[T_,]\s*|\s+(?:-\s+)?){_TIME}{_ZONE})?",
        rf"{_NAMED}(?P<d>\d{{1,2}})\.?[- /]\s*(?P<month>[A-Za-zäöü]{{3,9}})\.?,?[- /]\s*(?P<y>\d{{4}}|\d{{2}})(?:[T,]?\s*:?{_TIME}{_ZONE})?",
        rf"{_NAMED}(?P<month>[A-Za-zäöü]{{3,9}})\.?\s+(?P<d>\d{{1,2}})(?:st|nd|rd|th)?,?\s+(?P<y>\d{{4}})(?:,?\s+(?:at\s+)?{_TIME}{_ZONE})?",
        rf"{_NAMED}(?P<month>[A-Za-z]{{3,9}})\s+(?P<d>\d{{1,2}})\s+{_TIME}\s+(?:(?P<zone>[A-Z]{{3,4}}|[+-]\d{{4}})\s+)?(?P<y>\d{{4}})",
    )
]
_week: Final = re.compile(r"\d{4}-?W\d{2}(-?\d)?(T[\d:.,]+)?(Z|[+-]\d{2}(:?\d{2})?)?").fullmatch
_number: Final = re.compile(r"[+-]?\d+(?:[.,]\d*)?(?:[eE][+-]?\d+)?", re.ASCII).fullmatch
_offset: Final = re.compile(r"(?:UTC|GMT|utc)?\s*([+-])(\d{1,2}):?(\d{2})?:?(\d{2})?").fullmatch
_header_offset: Final = re.compile(r"(?:UTC|GMT)\s*([+-])\s*(\d{1,2})(?::?(\d{2}))?|([+-])(\d{2}):(\d{2})")
_header_name: Final = re.compile(r"[A-Z][a-z]+/[A-Z][A-Za-z_/]+")
_header_word: Final = re.compile(r"(?<![A-Za-z])(UTC|GMT|utc|gmt)(?![A-Za-z])")
_abbreviated: Final = re.compile(
    r"(?<![A-Za-z])(MST|MDT|EST|EDT|CST|CDT|PST|PDT|AKST|HST|CET|CEST|MEZ|MESZ|BST|WET|WEST|EET|EEST|MSK|IST|JST|KST|AEST|"
    r"AEDT|ACST|AWST|NZST|NZDT|[Ll]ocal|LOCAL|LST|LT)(?![A-Za-z])"
)
_header_order: Final = (
    (re.compile(r"\bd{1,2}[-/.]m{1,3}[-/.]y{2,4}\b", re.IGNORECASE), "dmy"),
    (re.compile(r"\bm{1,2}[-/.]d{1,2}[-/.]y{2,4}\b", re.IGNORECASE), "mdy"),
    (re.compile(r"\by{2,4}[-/.]m{1,2}[-/.]d{1,2}\b", re.IGNORECASE), "ymd"),
)
_FAST = r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00|\+00| UTC)?$"


def find_zone(name: str) -> tzinfo:
    """A zone by its name in the IANA database, or an offset such as `+01:00` or `UTC-5`.

    Raises:
        SettingError: there is no such zone.
    """
    if (fixed := _offset(name.strip())) and name.strip():
        return _fixed(fixed[1], fixed[2], fixed[3])
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise SettingError(
            f"--tz {name}: no such time zone; use a name of the IANA database such as UTC or Europe/Berlin"
        ) from error


def _is_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def _fixed(sign: str, hours: str, minutes: str | None, seconds: str | None = None) -> timezone:
    ahead = timedelta(hours=int(hours), minutes=int(minutes or 0), seconds=int(seconds or 0))
    if ahead >= timedelta(days=1):
        raise ValueError("an offset of a day or more")
    return timezone(-ahead if sign == "-" else ahead)


@dataclass(frozen=True)
class HeaderTime:
    """What the name of a time's column says.

    Attributes:
        zone: a zone; None when it names none.
        vague: an abbreviation that may stand for several, or for another one in summer.
        order: of day, month and year.
    """

    zone: str | None = None
    vague: str | None = None
    order: Order | None = None

    @classmethod
    def of(cls, names: Iterable[str]) -> HeaderTime:
        """Read the names of the columns."""
        text = " ".join(names)
        order = next((order for pattern, order in _header_order if pattern.search(text)), None)
        if found := _header_offset.search(text):
            sign, hours, minutes = (found[1], found[2], found[3]) if found[1] else (found[4], found[5], found[6])
            return cls(f"{sign}{int(hours):02d}:{minutes or '00'}", None, order)  # type: ignore[arg-type]
        if (found := _header_name.search(text)) and _is_zone(found[0]):
            return cls(found[0], None, order)  # type: ignore[arg-type]
        if found := _abbreviated.search(text):
            return cls(None, found[0], order)  # type: ignore[arg-type]
        if _header_word.search(text):
            return cls("UTC", None, order)  # type: ignore[arg-type]
        return cls(None, None, order)  # type: ignore[arg-type]


def units_of(texts: Iterable[str]) -> set[str] | None:
    """Units that each number among these texts can be a time in, between 1980 and 2100; None when there is no number."""
    found: set[str] | None = None
    for text in texts:
        if _number(text):
            fitting = _fitting(text)
            found = fitting if found is None else found & fitting
    return found


def _fitting(text: str) -> set[str]:
    count = Decimal(text.replace(",", "."))
    fitting = {unit for unit, scale in _PER_SECOND.items() if _EARLY * scale <= count < _LATE * scale}
    if text.isdigit() and len(text) in (8, 10, 12, 14):
        try:
            if 1980 <= _compact(text).year < 2100:
                fitting.add("date")
        except ValueError:
            pass
    return fitting


def orders_of(texts: Iterable[str]) -> set[str] | None:
    """Orders that each date of numbers among these texts can have; None when there is none, or points or ISO say it."""
    found: set[str] | None = None
    for text in texts:
        match = _FORMS[2].match(text)
        if match is None:
            continue
        fitting = {order for order in ORDERS if _date_exists(match, order)}
        if match["sep"] == "." and "dmy" in fitting:
            fitting = {"dmy"}
        found = fitting if found is None else found & fitting
    return found


def _date_exists(match: re.Match[str], order: str) -> bool:
    try:
        year, month, day = _ordered(match, order)
        datetime(year, month, day, tzinfo=UTC)
    except ValueError:
        return False
    return not (order == "ymd" and len(match["c"]) == 4)


def _ordered(match: re.Match[str], order: str) -> tuple[int, int, int]:
    parts = dict(zip(order, (match["a"], match["b"], match["c"]), strict=True))
    return _year(parts["y"]), int(parts["m"]), int(parts["d"])


def _year(text: str) -> int:
    year = int(text)
    return year if len(text) > 2 else year + (2000 if year < 70 else 1900)


def _compact(text: str) -> datetime:
    parts = [int(text[at : at + 2]) for at in range(4, len(text), 2)]
    return datetime(int(text[:4]), *parts, tzinfo=UTC)  # type: ignore[arg-type,misc]


def names_zone(text: str) -> bool:
    """Whether a time names its zone."""
    return any((match := form.match(text)) is not None and match["zone"] for form in _FORMS)


class Clock:
    """Reads times; those without a zone are taken in one that is given.

    A local time that does not exist (clocks put forward) is refused, and so is one that occurs twice (clocks put back).

    Attributes:
        zone: where times without a zone are taken.
        zoneless: how many such times were read.
        finer: how many were finer than a microsecond; what is finer is cut off.
    """

    def __init__(
        self,
        zone: str = "UTC",
        *,
        unit: str | None = None,
        order: str | None = None,
        formats: Sequence[str] = (),
        ignore_offset: bool = False,
        any_year: bool = True,
    ) -> None:
        """Look up the zone.

        Args:
            zone: where times without a zone are taken.
            unit: what numbers count.
            order: of day, month and year in dates of numbers.
            formats: as `strptime` has them; when there are any, no other form is read.
            ignore_offset: whether a zone that a time names is passed over.
            any_year: whether counts before 1980 and after 2100 are taken, since the unit was said.

        Raises:
            SettingError: there is no such zone.
        """
        self.zone = find_zone(zone)
        self.zoneless = 0
        self.finer = 0
        self._name = zone
        self._unit = unit
        self._order = order
        self._formats = formats
        self._ignore_offset = ignore_offset
        self._any_year = any_year

    def column(self, cells: pl.Series) -> tuple[pl.Series, dict[int, RecordError]]:
        """The instants of a column in microseconds since 1970, and what is wrong by place in it; null where it is wrong."""
        kind = cells.dtype
        if isinstance(kind, pl.Date):
            cells = cells.cast(pl.Datetime("us"))
            kind = cells.dtype
        if isinstance(kind, pl.Datetime):
            return self._typed(cells, kind)
        if kind == pl.Binary:
            cells = cells.cast(pl.String, strict=False)
        if kind == pl.Float64:
            cells = pl.Series([None if cell is None else _plain(cell) for cell in cells], dtype=pl.String)
        texts = cells.cast(pl.String)
        micros = pl.Series("time", [None], pl.Int64).new_from_index(0, len(texts))
        if not self._formats:
            micros = self._fast(texts)
        errors: dict[int, RecordError] = {}
        rest = micros.is_null()
        if rest.any():
            places = rest.arg_true()
            known: dict[str | None, int | RecordError] = {}
            found: list[int | None] = []
            for place, text in zip(places.to_list(), texts.gather(places).to_list(), strict=True):
                before = self.zoneless, self.finer
                value = known.get(text)
                if value is None:
                    try:
                        value = self.micro(text)
                    except RecordError as error:
                        value = error
                    # Those that leave no trace in the counts need not be read again.
                    if before == (self.zoneless, self.finer) and len(known) < 1 << 16:
                        known[text] = value
                if isinstance(value, RecordError):
                    errors[place] = value
                    found.append(None)
                else:
                    found.append(value)
            micros = micros.scatter(places, pl.Series(found, dtype=pl.Int64))
        return micros, errors

    def _typed(self, cells: pl.Series, kind: pl.Datetime) -> tuple[pl.Series, dict[int, RecordError]]:
        if kind.time_unit == "ns":
            self.finer += int((cells.dt.timestamp("ns") % 1000 != 0).sum())
        zoned = kind.time_zone is not None
        naive = cells.dt.replace_time_zone(None) if zoned and self._ignore_offset else cells
        if zoned and not self._ignore_offset:
            micros = _floor(cells)
        else:
            self.zoneless += len(cells) - cells.null_count()
            micros = self._local_column(_floor(naive).cast(pl.Datetime("us")))
        errors: dict[int, RecordError] = {}
        for place in micros.is_null().arg_true().to_list():
            moment = _floor(naive)[place]
            if moment is None:
                errors[place] = RecordError("bad_time", "is empty")
                continue
            try:
                micros[place] = self._of_naive((_EPOCH + moment * _MICRO).replace(tzinfo=None))
            except RecordError as error:
                errors[place] = error
        return micros, errors

    def _fast(self, texts: pl.Series) -> pl.Series:
        """Counts, and times in the form that nearly all files have; null for all that needs a closer look."""
        frame = pl.DataFrame({"text": texts})
        text = pl.col("text")
        if self._unit in ("s", "ms", "us", "ns"):
            whole = text.str.extract(r"^(\d{1,19})(?:[.,]\d*)?$").cast(pl.Int64, strict=False)
            fraction = text.str.extract(r"[.,](\d+)$").fill_null("")
            digits = {"s": 6, "ms": 3}.get(self._unit, 0)
            scale = 10**digits
            if self._unit == "ns":
                value, fine = whole // 1000, (whole % 1000 != 0)
            else:
                part = (
                    (fraction + "0" * digits).str.slice(0, digits).cast(pl.Int64, strict=False) if digits else pl.lit(0)
                )
                fine = fraction.str.slice(digits).str.contains("[1-9]")
                limit = (2**63 - 1) // scale - 1
                value = pl.when(whole <= limit).then(whole * scale + part)
            if not self._any_year:
                value = pl.when(value.is_between(_EARLY * 10**6, _LATE * 10**6)).then(value)
            found = frame.select(value.alias("time"), fine=fine & value.is_not_null())
            if found["time"].null_count() < len(texts):
                self.finer += int(found["fine"].sum() or 0)
                return found["time"]
        bare = text.str.replace(r"(Z| UTC|\+00(:00)?)$", "")
        plain = (text.str.contains(_FAST)) & ~text.str.contains(r":60|T24| 24")
        frame = frame.select(
            zoned=bare != text,
            moment=pl.when(plain).then(
                bare.str.replace("T", " ", literal=True).str.to_datetime(
                    "%Y-%m-%d %H:%M:%S%.f", time_unit="us", strict=False
                )
            ),
        )
        if frame["moment"].null_count() == len(texts):
            return frame["moment"].cast(pl.Int64)
        zoned = frame["zoned"] & frame["moment"].is_not_null()
        if self._ignore_offset:
            zoned = zoned & False
        local = self._local_column(frame["moment"])
        micros = frame.select(pl.when(zoned).then(pl.col("moment").cast(pl.Int64)).otherwise(local)).to_series()
        self.zoneless += int((~zoned & micros.is_not_null()).sum())
        return micros

    def _local_column(self, moments: pl.Series) -> pl.Series:
        """Local times in microseconds since 1970; null where the zone has none or two of them."""
        if isinstance(self.zone, ZoneInfo):
            if self._name in ("UTC", "Etc/UTC"):
                return moments.cast(pl.Int64)
            # polars' table of zones ends in 2099, and older times have offsets with seconds: Python reads those one by one.
            known = moments.is_between(_ZONES_SINCE, _ZONES_UNTIL)
            sure = pl.select(pl.when(known).then(moments)).to_series()
            return sure.dt.replace_time_zone(self.zone.key, ambiguous="null", non_existent="null").cast(pl.Int64)
        ahead = self.zone.utcoffset(None) or timedelta()
        return moments.cast(pl.Int64) - ahead // _MICRO

    def micro(self, text: str | None) -> int:
        """The instant that a text says, in microseconds since 1970.

        Raises:
            RecordError: it is none, or stands for no instant or two in the zone.
        """
        if text is None or not (text := text.strip(" \t\r\n\"'\u200e\ufeff\xa0")) or text.casefold() in MISSING:
            raise RecordError("bad_time", "is empty")
        try:
            if self._formats:
                return self._by_format(text)
            if _number(text):
                return self._count(text)
            return self._text(" ".join(text.split()))
        except (ValueError, ArithmeticError, InvalidOperation) as error:
            raise RecordError("bad_time", f"{shown(text)} is not a time between the years 1 and 9999") from error

    def _by_format(self, text: str) -> int:
        for one in self._formats:
            try:
                moment = datetime.strptime(text, one)  # noqa: DTZ007  # its zone comes below
            except ValueError:
                # strptime reads six digits of a fraction and no more.
                shorter = re.sub(r"([.,]\d{6})\d+", r"\1", text)
                try:
                    moment = datetime.strptime(shorter, one)  # noqa: DTZ007
                except ValueError:
                    continue
                self.finer += 1
            return self._of(moment)
        raise RecordError("bad_time", f"{shown(text)} is not as --time-format {' or '.join(self._formats)} has it")

    def _count(self, text: str) -> int:
        if self._unit is None:
            raise RecordError("bad_time", f"{text} may count several things: say --time-unit {'|'.join(UNITS)}")
        if self._unit == "date":
            if not text.isdigit() or len(text) not in (8, 10, 12, 14):
                raise RecordError(
                    "bad_time", f"{text} is not a date such as 20240201, with hours, minutes, seconds or not"
                )
            return self._of(_compact(text).replace(tzinfo=None))
        count = Decimal(text.replace(",", "."))
        if not self._any_year and self._unit not in _fitting(text):
            raise RecordError(
                "bad_time", f"{text} is not a time between 1980 and 2100 in {self._unit}: say --time-unit"
            )
        if self._unit == "excel":
            milli = (count * 86_400_000).to_integral_value()
            return self._of((_EXCEL + timedelta(milliseconds=int(milli))).replace(tzinfo=None))
        micro = count * 1_000_000 / _PER_SECOND[self._unit]
        whole = micro.to_integral_value(rounding="ROUND_FLOOR")
        self.finer += micro != whole
        return (timedelta(microseconds=int(whole)) + _EPOCH - _EPOCH) // _MICRO

    def _text(self, text: str) -> int:
        # Java writes the zone behind the offset, and so does Go.
        text = re.sub(r"(Z|[+-]\d{2}:?\d{2})(?:\[[^\]]+\]| [A-Z]{2,5})$", r"\1", text)
        if _week(text):
            return self._of(datetime.fromisoformat(text))
        for form in _FORMS:
            match = form.match(text)
            if match is not None:
                break
        else:
            raise RecordError(
                "bad_time",
                f"{shown(text)} is not a time in a form that is known: say --time-format, such as '%d.%m.%Y %H:%M'",
            )
        part = match.groupdict()
        if "a" in part:
            order = self._order or ("dmy" if part["sep"] == "." else None)
            if order is None:
                raise RecordError("bad_time", f"{shown(text)}: which is the day? Say --date-order dmy or mdy")
            year, month, day = _ordered(match, order)
        else:
            year, day = _year(part["y"]), int(part["d"])
            month = int(part["m"]) if part.get("m") else _MONTHS.get(part["month"].casefold(), 0)
        hour, minute, second, fraction = self._time_of_day(part)
        later = timedelta()
        if hour == 24 and minute == second == 0:
            hour, later = 0, timedelta(days=1)
        if second == 60:
            second, later = 59, timedelta(seconds=1)
        moment = datetime(year, month, day, hour, minute, second, int(fraction[:6].ljust(6, "0")))  # noqa: DTZ001
        self.finer += fraction[6:].strip("0") != ""
        return self._of(self._zoned(moment + later, part.get("zone"), text))

    @staticmethod
    def _time_of_day(part: dict[str, str | None]) -> tuple[int, int, int, str]:
        if clock := part.get("clock"):
            digits = clock.zfill(4)
            seconds = digits[4:6] or "0"
            return int(digits[:2]), int(digits[2:4]), int(seconds), part.get("rest") or ""
        hour = int(part.get("hour") or 0)
        if half := part.get("half"):
            if not 1 <= hour <= 12:
                raise ValueError("an hour of twelve")
            hour = hour % 12 + (12 if half[0] in "pP" else 0)
        return hour, int(part.get("minute") or 0), int(part.get("second") or 0), part.get("fraction") or ""

    def _zoned(self, moment: datetime, zone: str | None, text: str) -> datetime:
        zone = (zone or "").strip(" []")
        if not zone or self._ignore_offset:
            return moment
        if zone.upper() in ("Z", "UTC", "GMT"):
            return moment.replace(tzinfo=UTC)
        if fixed := _offset(zone):
            return moment.replace(tzinfo=_fixed(fixed[1], fixed[2], fixed[3], fixed[4]))
        if "/" in zone:
            try:
                return moment.replace(tzinfo=ZoneInfo(zone))
            except (ZoneInfoNotFoundError, ValueError, OSError):
                pass
        raise RecordError("bad_time", f"{shown(text)}: {zone} may be several zones: say --tz ZONE with --ignore-offset")

    def _of(self, moment: datetime) -> int:
        if moment.tzinfo is None or self._ignore_offset:
            return self._of_naive(moment.replace(tzinfo=None), count=True)
        return (moment.astimezone(UTC) - _EPOCH) // _MICRO

    def _of_naive(self, moment: datetime, *, count: bool = False) -> int:
        self.zoneless += count
        first, second = (moment.replace(tzinfo=self.zone, fold=fold) for fold in (0, 1))
        before, after = first.utcoffset(), second.utcoffset()
        if before == after or before is None or after is None:
            return (first.astimezone(UTC) - _EPOCH) // _MICRO
        if before < after:
            raise RecordError("bad_time", f"{moment} does not exist in {self._name}: clocks were put forward")
        raise RecordError(
            "bad_time",
            f"{moment} occurs twice in {self._name}, where clocks were put back: write it with its offset "
            f"({first.isoformat(' ')} or {second.isoformat(' ')})",
        )


def _plain(value: float) -> str:
    """A double as text without an exponent."""
    text = repr(value)
    return text if "e" not in text else f"{Decimal(text):f}"


def _floor(cells: pl.Series) -> pl.Series:
    unit = cells.dtype.time_unit  # type: ignore[attr-defined]
    whole = cells.cast(pl.Int64)
    return {"ns": lambda: whole // 1000, "us": lambda: whole, "ms": lambda: whole * 1000}[unit]()
