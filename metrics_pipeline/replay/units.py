"""Units that files speak, and the way from each into the unit of a metric: pint knows the figures."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm
from tokenize import TokenError
from typing import Any, Final

import pint
import polars as pl

from metrics_pipeline.errors import SettingError
from metrics_pipeline.metric import MetricName

_SPELLINGS: Final = {
    "degC": "°c|c|degc|deg c|celsius|degree celsius|degrees celsius|deg celsius|grad celsius|grad c|℃|ºc|° c|cel|degree_celsius",
    "degF": "°f|f|degf|deg f|fahrenheit|degree fahrenheit|degrees fahrenheit|deg fahrenheit|℉|ºf|° f",
    "K": "k|kelvin|°k|degk|deg k",
    "%": "%|percent|pct|%rh|% rh|rh%|rh %|%rf|% rf|% r.h.|%r.h.|percentage|prozent|% rel|%rel|vol%|vol.%|vol.-%|% vol|perc",
    "ratio": "ratio|fraction|0-1|0..1",
    "hPa": "hpa|hectopascal|hectopascals",
    "mbar": "mbar|mb|millibar|millibars|mbars",
    "Pa": "pa|pascal|pascals",
    "kPa": "kpa|kilopascal|kilopascals",
    "bar": "bar|bars",
    "mmHg": "mmhg|mm hg|mm-hg|mm_hg|millimeters of mercury",
    "torr": "torr",
    "inHg": "inhg|in hg|inches hg|in-hg|in_hg|inches of mercury|\"hg|inches mercury",
    "psi": "psi|psia",
    "atm": "atm|atmosphere|atmospheres",
    "ppm": "ppm|ppmv|parts per million|parts-per-million",
    "ppb": "ppb|ppbv|parts per billion",
    "lx": "lx|lux|lm/m2|lm/m²|lumen/m2|lumens/m2",
    "klx": "klx|klux|kilolux",
    "lm/ft²": "lm/ft2|lm/ft²|lum/ft²|lum/ft2|footcandle|footcandles|foot-candle|fc|ft-cd",
    "dB": "db|dba|db(a)|dbspl|db spl|db(spl)|decibel|decibels|db(c)|dbc|dbz",
}  # fmt: skip
"""Names of units as messages and recipes have them, with how headers and cells write each, in small letters."""

KNOWN: Final = {text: name for name, texts in _SPELLINGS.items() for text in texts.split("|")}

_PINT: Final = {"%": "percent", "ratio": "dimensionless", "lx": "lux", "klx": "kilolux",
                "lm/ft²": "lumen / foot ** 2", "°C": "degC", "K": "kelvin", "dB": "1"}  # fmt: skip

_OF_METRIC: Final = {
    MetricName.TEMPERATURE: ("degC", "degF", "K"),
    MetricName.HUMIDITY: ("%", "ratio"),
    MetricName.PRESSURE: ("hPa", "Pa", "kPa", "bar", "mmHg", "inHg", "psi", "atm"),
    MetricName.CO2: ("ppm", "ppb", "%"),
    MetricName.LIGHT: ("lx", "klx", "lm/ft²"),
    MetricName.SOUND: ("dB",),
}

_USUAL: Final = {
    MetricName.TEMPERATURE: (-40.0, 60.0),
    MetricName.HUMIDITY: (1.000001, 100.0),
    MetricName.PRESSURE: (870.0, 1085.0),
}
"""Where nearly all readings lie. Values outside of it whose unit nothing names may speak another one: that is asked."""


@dataclass(frozen=True)
class Conversion:
    """From one unit into a metric's own: (value * factor + offset) / divisor, exact up to these three steps.

    Attributes:
        unit: the unit it comes from, as it was said.
        factor: a whole number.
        offset: a whole number.
        divisor: a whole number above zero.
    """

    unit: str
    factor: int = 1
    offset: int = 0
    divisor: int = 1

    @property
    def changes(self) -> bool:
        """Whether values come out otherwise than they go in."""
        return (self.factor, self.offset, self.divisor) != (1, 0, 1)

    def of(self, values: pl.Expr) -> pl.Expr:
        """The converted values."""
        if not self.changes:
            return values
        if max(abs(self.factor), abs(self.offset), self.divisor) < 2**53:
            product = values * float(self.factor) if self.factor != 1 else values
            total = product + float(self.offset) if self.offset else product
            return total / float(self.divisor) if self.divisor != 1 else total
        return values * (self.factor / self.divisor) + self.offset / self.divisor


def known_unit(text: str) -> str | None:
    """The unit that a text in a header or a cell names; None when it names none that is known."""
    return KNOWN.get(" ".join(text.split()).casefold())


@lru_cache(maxsize=1)
def _registry() -> Any:
    registry: Any = pint.UnitRegistry(non_int_type=Fraction, autoconvert_offset_to_baseunit=True)
    registry.define("ppb = 1e-9")
    return registry


@lru_cache(maxsize=256)
def conversion(unit: str, metric: MetricName) -> Conversion:
    """The way from a unit into the metric's own.

    Raises:
        SettingError: there is no such unit, or it measures something else; names those that there are.
    """
    name = known_unit(unit) or unit.strip()
    own = known_unit(metric.unit) or metric.unit
    if name == own:
        return Conversion(own)
    refused: Exception | None = None
    try:
        registry: Any = _registry()
        source, target = _PINT.get(name, name), _PINT.get(own, own)
        zero = Fraction(registry.Quantity(Fraction(0), source).to(target).magnitude)
        slope = Fraction(registry.Quantity(Fraction(1), source).to(target).magnitude) - zero
        divisor = lcm(zero.denominator, slope.denominator)
        way: Conversion | None = Conversion(name, int(slope * divisor), int(zero * divisor), divisor)
    except (
        pint.errors.PintError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        SyntaxError,
        TokenError,
    ) as error:
        way, refused = None, error
    # A factor cannot turn a logarithm such as the decibel into another unit.
    if way is None or own == "dB" or way.factor <= 0:
        known = ", ".join(_OF_METRIC.get(metric, (own,)))
        raise SettingError(
            f"{unit!r} is no unit of {metric.name.lower()}: say one of {known}, or another one that pint knows"
        ) from refused
    return way


def fits(unit: str, metric: MetricName) -> bool:
    """Whether a metric can be measured in a unit."""
    try:
        conversion(unit, metric)
    except SettingError:
        return False
    return True


def suspected(metric: MetricName, low: float, median: float, high: float) -> list[str]:
    """Units, other than the metric's own, that values would rather speak than it; none when they look as they should.

    Args:
        metric: what they are said to be.
        low: the least of the values.
        median: the middle one.
        high: the greatest.
    """
    least, most = metric.bounds
    usual = _USUAL.get(metric, (least, most))
    if usual[0] <= (high if metric is MetricName.HUMIDITY else median) <= usual[1] and least <= median <= most:
        return []
    found = []
    for unit in _OF_METRIC.get(metric, ())[1:]:
        way = conversion(unit, metric)
        a, b, c = ((value * way.factor + way.offset) / way.divisor for value in (low, median, high))
        inside = usual if metric is not MetricName.HUMIDITY else (0.0, 100.0)
        if inside[0] <= b <= inside[1] and least <= a and c <= most:
            found.append(unit)
    return found


def own_unit(metric: MetricName) -> str:
    """The metric's own unit by the name that options and recipes give it."""
    return known_unit(metric.unit) or metric.unit
