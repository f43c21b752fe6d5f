"""What repeated measurements amount to: medians with their spread, ratios, quantiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Final

PERCENTILES: Final = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing.

    Attributes:
        median: of them.
        low: the least.
        high: the greatest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value.

        Raises:
            ValueError: there is none.
        """
        if not values:
            raise ValueError("a spread needs at least one value")
        return cls(median(values), min(values), max(values))


def quantile(values: Sequence[float], percent: float) -> float | None:
    """The least value that at least `percent` of 100 values do not exceed; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """Quantiles as `p50`, `p95` and `p99`."""
    return {f"p{percent}": quantile(values, percent) for percent in PERCENTILES}


def ratios(rates: Mapping[str, Sequence[float]], base: str) -> dict[str, Spread]:
    """Each path's rates divided by the base's of the same round, which the machine's mood moves alike.

    Args:
        rates: a rate for each round, by path; all have the same rounds.
        base: the path to divide by; an empty result when it was not measured.
    """
    if base not in rates:
        return {}
    return {
        name: Spread.of([rate / against for rate, against in zip(own, rates[base], strict=True)])
        for name, own in rates.items()
        if name != base
    }


def ratio_of_medians(rates: Mapping[str, Sequence[float]], base: str) -> dict[str, float]:
    """Each path's median rate divided by the base's median rate."""
    if base not in rates:
        return {}
    return {name: median(own) / median(rates[base]) for name, own in rates.items() if name != base}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """How much y grows per x, by least squares; 0 for fewer than two distinct x."""
    if len(points) < 2:
        return 0.0
    mean_x, mean_y = fmean(x for x, _ in points), fmean(y for _, y in points)
    square = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / square if square else 0.0
