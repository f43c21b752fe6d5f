"""Charts of a benchmark's result, as SVG files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Final

from metrics_pipeline.bench.figures import Spread
from metrics_pipeline.errors import PipelineError

WIDTH: Final = 760
_LEFT, _RIGHT, _BAR, _GAP = 130, 90, 26, 14
_AXIS, _PANEL, _LINE = 70, 320, 15
_COLOURS: Final = ("#4f43dd", "#0a8f62", "#c2410c", "#0891b2", "#a16207", "#be185d")
_INK: Final = "#444"


def bars(title: str, spreads: Mapping[str, Spread], unit: str, note: str = "") -> str:
    """A horizontal bar for each median, with its spread as a line.

    Args:
        title: stands above.
        spreads: by label, from the top.
        unit: of the values.
        note: stands below.
    """
    greatest = max((spread.high for spread in spreads.values()), default=0) or 1
    room = WIDTH - _LEFT - _RIGHT
    height = 44 + len(spreads) * (_BAR + _GAP) + 28
    parts = [_head(height), f'<text x="{_LEFT}" y="24" font-size="15">{escape(title)}</text>']
    for number, (label, spread) in enumerate(spreads.items()):
        top = 44 + number * (_BAR + _GAP)
        middle = top + _BAR / 2
        low, high, end = (_LEFT + room * value / greatest for value in (spread.low, spread.high, spread.median))
        parts += [
            f'<text x="{_LEFT - 10}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{_LEFT}" y="{top}" width="{end - _LEFT:.1f}" height="{_BAR}" fill="{_COLOURS[0]}"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10M{high:.1f} {middle - 5}v10" stroke="#111"/>',
            f'<text x="{max(end, high) + 8:.1f}" y="{middle + 4:.1f}">{short(spread.median)}</text>',
        ]
    below = f"{unit}; bar: median, line: least to greatest" + (f". {note}" if note else "")
    parts.append(f'<text x="{_LEFT}" y="{height - 10}" font-size="11">{escape(below)}</text>')
    return "".join([*parts, "</svg>\n"])


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over an axis of their own; both axes begin at zero.

    Attributes:
        series: points by label. `LABEL: PART` is dashed and has the colour of `LABEL`, when that is a series, too.
        x_unit: of the horizontal axis.
        y_unit: of the vertical axis.
    """

    series: Mapping[str, Sequence[tuple[float, float]]]
    x_unit: str
    y_unit: str


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]], x_unit: str, y_unit: str) -> str:
    """Lines over a common axis; both axes begin at zero.

    Args:
        title: stands above.
        series: points by label.
        x_unit: of the horizontal axis.
        y_unit: of the vertical axis.
    """
    return panels(title, [Panel(series, x_unit, y_unit)])


def panels(title: str, below_each_other: Sequence[Panel]) -> str:
    """Panels below each other, with one title above."""
    above, parts = 0, list[str]()
    for panel in below_each_other:
        legend = _legend(panel)
        end = above + _PANEL + _LINE * (legend[-1].line if legend else 0)
        parts += _panel(panel, legend, above, end)
        above = end
    return "".join(
        [_head(above), f'<text x="{_AXIS}" y="20" font-size="15">{escape(title)}</text>', *parts, "</svg>\n"]
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """A label above a panel: where it begins, in which line, and its size."""

    x: float
    line: int
    size: int


def _legend(panel: Panel) -> list[_Entry]:
    """An entry for each series, in as many lines as they need."""
    size = 11 if len(panel.series) > 4 else 13
    entries, x, line = list[_Entry](), _AXIS + 8.0, 0
    for label in panel.series:
        # A character is about half as wide as it is high.
        width = len(label) * size * 0.53
        if entries and x + width > WIDTH - 10:
            x, line = _AXIS + 8.0, line + 1
        entries.append(_Entry(x, line, size))
        x += max(width + 14, 0 if size < 13 else 170)
    return entries


def _panel(panel: Panel, legend: Sequence[_Entry], above: int, end: int) -> Iterator[str]:
    points = [point for line in panel.series.values() for point in line]
    most_x = max((x for x, _ in points), default=0) or 1
    most_y = max((y for _, y in points), default=0) or 1
    left, bottom = _AXIS, end - 46
    width, top = WIDTH - left - 30, bottom - (_PANEL - 94)
    yield f'<path d="M{left} {top}V{bottom}H{left + width}" stroke="{_INK}" fill="none"/>'
    for quarter in range(5):
        share = quarter / 4
        y, x = bottom - (bottom - top) * share, left + width * share
        if quarter:
            yield f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/>'
        yield f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" font-size="11">{short(most_y * share)}</text>'
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" font-size="11">{short(most_x * share)}</text>'
    wholes = {label: label.rpartition(": ")[0] for label in panel.series}
    colours = dict(zip((label for label in wholes if wholes[label] not in wholes), cycle(_COLOURS), strict=False))
    for (label, line), entry in zip(panel.series.items(), legend, strict=True):
        dashes = "" if label in colours else ' stroke-dasharray="5 3"'
        colour = colours[label if label in colours else wholes[label]]
        drawn = " ".join(f"{left + width * x / most_x:.1f},{bottom - (bottom - top) * y / most_y:.1f}" for x, y in line)
        yield f'<polyline points="{drawn}" stroke="{colour}" stroke-width="2" fill="none"{dashes}/>'
        y = above + 42 + _LINE * entry.line
        yield f'<text x="{entry.x:.0f}" y="{y}" fill="{colour}" font-size="{entry.size}">{escape(label)}</text>'
    yield f'<text x="{left}" y="{end - 10}" font-size="11">{escape(f"{panel.y_unit} by {panel.x_unit}")}</text>'


def _head(height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'font-family="sans-serif" font-size="13" fill="{_INK}"><rect width="{WIDTH}" height="{height:g}" fill="#fff"/>'
    )


def short(value: float) -> str:
    """A number in at most three digits and a unit."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def write(path: Path, svg: str) -> Path:
    """Write a chart, and return where it is.

    Raises:
        PipelineError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(svg, "utf-8")
    except OSError as error:
        raise PipelineError(f"--chart {path}: cannot be written: {error.strerror}; name another file") from error
    return path.resolve()
