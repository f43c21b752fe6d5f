from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

from metrics_pipeline.bench import charts
from metrics_pipeline.bench.charts import Panel

SPACE = {"s": "http://www.w3.org/2000/svg"}
LINE = [(1.0, 1.0), (2.0, 3.0)]


def drawn(*labels: str) -> ElementTree.Element:
    return ElementTree.fromstring(charts.panels("title", [Panel(dict.fromkeys(labels, LINE), "x", "y")]))


def legend(svg: ElementTree.Element, *labels: str) -> dict[str, tuple[float, float, float]]:
    """Where each label begins, its height above the axis's line, and its size."""
    return {
        str(text.text): (float(text.attrib["x"]), float(text.attrib["y"]), float(text.attrib["font-size"]))
        for text in svg.findall("s:text", SPACE)
        if text.text in labels
    }


def test_labels_that_are_too_long_for_one_line_go_to_the_next_one() -> None:
    labels = [f"a layout, {number}00,000,000 rows: summaries" for number in range(1, 8)]
    svg = drawn(*labels)
    places = legend(svg, *labels)
    assert len({y for _, y, _ in places.values()}) > 1
    for label, (x, _, size) in places.items():
        assert x + len(label) * size * 0.53 <= charts.WIDTH
    for y in {y for _, y, _ in places.values()}:
        row = sorted((x, x + len(label) * size * 0.53) for label, (x, at, size) in places.items() if at == y)
        assert all(end < begin for (_, end), (begin, _) in pairwise(row)), "side by side"
    lowest = max(y for _, y, _ in places.values())
    lines = [point.split(",") for line in svg.findall("s:polyline", SPACE) for point in line.attrib["points"].split()]
    assert min(float(y) for _, y in lines) > lowest, "below all labels"
    assert float(svg.attrib["height"]) > float(drawn("one").attrib["height"])


def test_part_of_another_line_has_its_colour_and_is_dashed() -> None:
    whole, other, part = drawn("plain", "partitioned", "partitioned: summaries").findall("s:polyline", SPACE)
    assert part.attrib["stroke"] == other.attrib["stroke"] != whole.attrib["stroke"]
    assert "stroke-dasharray" in part.attrib
    assert "stroke-dasharray" not in other.attrib


def test_parts_without_a_whole_have_colours_of_their_own() -> None:
    lines = drawn("plain: table", "plain: indexes", "plain: summaries").findall("s:polyline", SPACE)
    assert len({line.attrib["stroke"] for line in lines}) == 3
    assert not any("stroke-dasharray" in line.attrib for line in lines)


def test_part_may_come_before_its_whole_and_colours_go_round() -> None:
    part, *wholes = drawn("0: summaries", *map(str, range(8))).findall("s:polyline", SPACE)
    colours = [line.attrib["stroke"] for line in wholes]
    assert part.attrib["stroke"] == colours[0]
    assert len(set(colours[:6])) == 6
    assert colours[6:] == colours[:2]


def test_a_chart_of_nothing_is_a_chart() -> None:
    assert drawn().findall("s:polyline", SPACE) == []
