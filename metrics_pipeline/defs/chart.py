"""A bar chart small enough to be kept in an event log every minute."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, GAP = 640, 200, 4
_TOP, _BOTTOM = 24, 22


def bars(title: str, values: Sequence[tuple[str, float]]) -> str:
    """An SVG with one bar for each label and value; a bar's height is its share of the greatest value.

    Args:
        title: stands above the bars.
        values: at most about twenty labels with a value that is not negative.
    """
    greatest = max((value for _, value in values), default=0) or 1
    step = WIDTH / max(1, len(values))
    room = HEIGHT - _TOP - _BOTTOM
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="11" text-anchor="middle" fill="#666">'
    )
    parts = [
        head,
        f'<text x="{WIDTH / 2:g}" y="14" font-size="13">{escape(title)}</text>',
    ]
    for number, (label, value) in enumerate(values):
        height = room * value / greatest
        left, middle = number * step + GAP / 2, (number + 0.5) * step
        top = HEIGHT - _BOTTOM - height
        parts += [
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{step - GAP:.1f}" height="{height:.1f}" fill="#4f43dd"/>',
            f'<text x="{middle:.1f}" y="{HEIGHT - 8}">{escape(label)}</text>',
        ]
        if value:
            # Inside a tall bar, above a short one.
            inside = height > 16
            colour = ' fill="#fff"' if inside else ""
            parts.append(
                f'<text x="{middle:.1f}" y="{top + (12 if inside else -3):.1f}"{colour}>{_short(value)}</text>'
            )
    return "".join([*parts, "</svg>"])


def image(title: str, values: Sequence[tuple[str, float]]) -> str:
    """The chart as a Markdown image that carries its own data."""
    data = b64encode(bars(title, values).encode()).decode()
    return f"![{title}](data:image/svg+xml;base64,{data})"


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
