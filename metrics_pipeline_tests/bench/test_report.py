"""Results as documents, tables and charts, made of made-up measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from metrics_pipeline.bench import charts, report, surroundings
from metrics_pipeline.bench.drain import Drain, Run
from metrics_pipeline.bench.figures import Spread
from metrics_pipeline.bench.stopwatch import Timed
from metrics_pipeline.bench.table import Checked
from metrics_pipeline.errors import PipelineError

SURROUNDINGS: dict[str, Any] = {
    "measured_at": "2026-11-22T20:00:00+00:00",
    "machine": {
        "cpu": "A & B <fast>",
        "cores": 2,
        "memory_gib": 24.0,
        "os": "Linux",
        "filesystem": "ext4",
        "load_before": 0.1,
    },
    "versions": {"postgresql": "17.11", "connect": "4.3.1"},
    "postgres": dict.fromkeys(("fsync", "full_page_writes", "synchronous_commit"), "on")
    | {"shared_buffers": "6GB", "max_wal_size": "3GB", "wal_buffers": "48MB"},
    "settings": {
        "SINK_WORKERS": 2,
        "PRODUCER_FLEET_SIZE": 100_000,
        "PRODUCER_MIN_DEVICES": 2_000,
        "PRODUCER_MAX_DEVICES": 4_000,
    },
    "layout": {"name": "partitioned", "partitions": 12, "width": "hour"},
    "commit": "0123abc",
    "stack": "temporary",
}
EQUAL = Checked(1000, True, compared=True)


def timed(rate: float, **costs: float) -> Timed:
    costs["total"] = sum(costs.values())
    return Timed(1000, 800, 800 / rate, costs, 5, steady=True, by_commit_times=True)


@pytest.fixture
def drained() -> Drain:
    drain = Drain(
        1000, 2, ("connect", "copy-2", "limit-2"), SURROUNDINGS, table={"heap_bytes": 2**20, "index_bytes": 2**19}
    )
    for number, (connect, copy, limit) in enumerate([(50.0, 250.0, 500.0), (40.0, 240.0, 480.0)], 1):
        drain.runs += [
            Run("connect", number, timed(connect, postgres=9.0, connect=23.0), EQUAL),
            Run("copy-2", number, timed(copy, postgres=4.5, sink=4.0), EQUAL),
            Run("limit-2", number, timed(limit, postgres=4.0, bench=0.1), EQUAL),
        ]
    return drain


def shown(document: Any) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(report.rendered(document))
    text = console.export_text()
    console.file.close()
    return text


def test_a_drain_as_a_document(drained: Drain) -> None:
    document = json.loads(json.dumps(drained.document()))
    assert document["bench"] == "drain"
    assert document["correct"] is True
    copy = document["paths"]["copy-2"]
    assert copy["rows_per_second"] == pytest.approx({"median": 245.0, "low": 240.0, "high": 250.0})
    assert copy["cpu_us_per_row"] == pytest.approx({"postgres": 4.5, "sink": 4.0, "total": 8.5})
    assert copy["rows_per_transaction"] == 200
    assert document["ratios"]["limit-2"]["copy-2"] == pytest.approx(0.5)
    assert document["ratios"]["connect"]["copy-2"] == pytest.approx(245 / 45)
    assert document["ratios_within_rounds"]["limit-2"]["copy-2"]["low"] == pytest.approx(0.5)
    assert len(document["runs"]) == 6
    assert document["commit"] == "0123abc"


def test_a_drain_for_people(drained: Drain) -> None:
    text = shown(drained.document())
    assert "245" in text
    assert "0.50" in text
    assert "8.5 = postgres 4.5 + sink 4.0" in text
    assert "fsync on" in text
    assert "exactly the topic's keys" in text
    assert "NOT EQUAL" not in text


def test_what_bad_records_cost_is_told_by_path(drained: Drain) -> None:
    assert drained.document()["ratios_with_bad_records"] == {}
    assert "bad" not in shown(drained.document())
    drained.paths += ("copy-2-bad",)
    drained.bad_every = 100
    drained.runs += [Run("copy-2-bad", number, timed(196.0, sink=4.5), EQUAL) for number in (1, 2)]
    assert drained.document()["ratios_with_bad_records"] == {"copy-2": pytest.approx(0.8)}
    assert "copy-2 keeps 0.80 of its rate with 1 in 100 records bad" in shown(drained.document())


def test_a_drain_as_markdown(drained: Drain) -> None:
    above, _, *lines = report.markdown(drained.document()).splitlines()
    assert above.startswith("partitioned table (12 partitions by hour), a fleet of 100,000 devices")
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| `copy-2` | 245 | 240 to 250 | 0.50 | 5.44 | 8.5 = ")
    assert lines[4].startswith("| `limit-2` | 490 | 480 to 500 | 1 | 10.89 | ")


def test_one_difference_spoils_a_drain(drained: Drain) -> None:
    drained.runs[-1] = Run(
        "limit-2", 2, drained.runs[-1].timed, Checked(999, False, compared=True, findings=("1 lost",))
    )
    assert not drained.correct
    assert drained.document()["correct"] is False
    text = shown(drained.document())
    assert "NOT EQUAL after round 2, limit-2: 1 lost" in text
    assert "exactly the topic's keys" not in text


def test_nothing_measured_is_not_correct() -> None:
    assert not Drain(1000, 1, ("connect",), SURROUNDINGS).correct


def test_warnings_say_what_makes_figures_worthless() -> None:
    assert surroundings.warnings(SURROUNDINGS) == []
    doubtful = SURROUNDINGS | {
        "machine": SURROUNDINGS["machine"] | {"filesystem": "tmpfs", "load_before": 3.0},
        "postgres": SURROUNDINGS["postgres"] | {"fsync": "off"},
    }
    memory, durability, busy = surroundings.warnings(doubtful)
    assert "memory" in memory
    assert "fsync off" in durability
    assert "busy" in busy


def bar_widths(svg: str) -> list[float]:
    tree = ElementTree.fromstring(svg)
    space = {"s": "http://www.w3.org/2000/svg"}
    return [float(bar.attrib["width"]) for bar in tree.findall("s:rect", space) if bar.attrib["fill"] != "#fff"]


def test_bars_are_as_long_as_the_medians(drained: Drain) -> None:
    connect, copy, limit = bar_widths(report.chart(drained.document()))
    assert copy / connect == pytest.approx(245 / 45, rel=0.01)
    assert limit / copy == pytest.approx(2, rel=0.01)


def test_texts_of_charts_are_escaped() -> None:
    svg = charts.bars("a < b & c", {"<x>": Spread(1, 1, 1)}, "rows/s")
    assert "".join(ElementTree.fromstring(svg).itertext()).count("<x>") == 1
    assert "a < b & c" in "".join(ElementTree.fromstring(svg).itertext())


def test_charts_of_nothing_are_charts() -> None:
    for svg in (charts.bars("none", {}, "rows/s"), charts.lines("none", {}, "s", "rows")):
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_lines_reach_the_edges_and_stay_inside() -> None:
    svg = charts.lines("lag", {"a": [(0, 0), (5, 50)], "b": [(10, 100)]}, "s", "records")
    space = {"s": "http://www.w3.org/2000/svg"}
    first, second = (line.attrib["points"] for line in ElementTree.fromstring(svg).findall("s:polyline", space))
    corner, middle = (tuple(map(float, point.split(","))) for point in first.split())
    far = tuple(map(float, second.split(",")))
    assert middle[0] - corner[0] == pytest.approx((far[0] - corner[0]) / 2, abs=0.2)
    assert corner[1] - middle[1] == pytest.approx((corner[1] - far[1]) / 2, abs=0.2)
    assert far[1] > 0


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (950.0, "950"), (1500.0, "1.5k"), (2e6, "2M"), (3.14159e9, "3.14G")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert charts.short(value) == text


def test_a_chart_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match="--chart"):
        charts.write(tmp_path / "file" / "chart.svg", "<svg/>")
    written = charts.write(tmp_path / "new" / "chart.svg", "<svg/>")
    assert written.read_text() == "<svg/>"


LIVE_RUN = {
    "rate": 100_000,
    "acknowledged_per_second": 99_900.0,
    "stored_per_second": 99_500.0,
    "latency": {"p50": 0.21, "p95": 0.4, "p99": 0.55, "samples": 1200},
    "cpu": {"postgres": 5.0, "sink": 4.0},
    "looks": [{"seconds": 1.0, "lag": 20_000}, {"seconds": 2.0, "lag": 30_000}],
    "problem": None,
    "findings": [],
}


def test_a_live_run_for_people_and_as_a_chart() -> None:
    document = SURROUNDINGS | {
        "bench": "live",
        "sink": "copy",
        "sustained_per_second": 100_000,
        "runs": [LIVE_RUN],
        "tried": [LIVE_RUN | {"findings": ["3 rows of 4 acknowledged messages"]}],
    }
    text = shown(document)
    assert "0.55 s" in text
    assert "100,000 messages/s are sustained" in text
    assert "NOT EQUAL at 100,000 messages/s: 3 rows of 4" in text
    assert "100,000 messages/s" in report.chart(document)


def grown(layout: str = "partitioned", factor: float = 1.0, **more: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {
            "stored": number * 1_000_000,
            "rows": 1_000_000,
            "rows_per_second": 150_000.0 * factor,
            "cpu": {"postgres": 3.0, "sink": 1.5, "total": 4.5},
            "latency": {"p50": 0.2, "p99": None if number == 1 else 0.75},
            "tick": {"rows": 100_000, "seconds": 0.8, "folded": number == 2},
            "ticks": [],
            "tick_us_per_row": 1.25,
            "heap_bytes": 130 * 2**20,
            "index_bytes": 70 * 2**20,
            "summary_bytes": 7 * 2**20,
            "staging_bytes": 31 * 2**20 if layout == "staging" else 0,
            "dropped_rows": 500_000 if number == 1 else 0,
            "drop_seconds": 1.5 if number == 1 else 0.0,
        }
        for number in (1, 2)
    ]
    parts = (
        [] if layout == "plain" else [{"name": "metrics_p2026112220", "rows": rows} for rows in (700_000, 1_300_000)]
    )
    return SURROUNDINGS | {
        "bench": "growth",
        "sink": "copy",
        "rows": 2_000_000,
        "steps": steps,
        "partitions": parts,
        "problems": [],
        "correct": True,
        "layout": {
            "name": layout,
            "partitions": 0 if layout == "plain" else 12,
            "width": None if layout == "plain" else "hour",
        },
        **more,
    }


def test_a_growth_for_people() -> None:
    text = shown(grown())
    assert "150,000" in text
    assert "0.80 s with a fold" in text
    assert "2 of 12 partitions hold readings, about 700,000 to 1,300,000 each" in text
    assert "exactly the topic's keys" in text
    assert "500,000 rows were dropped with their partitions, in at most 1.50 s" in text
    assert "staging" not in text
    assert "The largest staging table that was moved: 31 MiB" in shown(grown("staging"))
    assert "partitions hold" not in shown(grown("plain"))
    wrong = shown(grown(correct=False, problems=["step 1: wrong"]))
    assert "NOT EQUAL: step 1: wrong" in wrong
    assert "exactly the topic's keys" not in wrong


def test_every_result_says_the_fleet_and_the_layout(drained: Drain) -> None:
    for document in (grown(), drained.document()):
        text = shown(document)
        assert "a fleet of 100,000 devices, 2,000 to 4,000 of them in a round" in text
        assert "partitioned table (12 partitions by hour)" in text
    assert "plain table (one heap)" in shown(grown("plain"))
    assert "by way of a staging table" in shown(grown("staging"))


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    space = {"s": "http://www.w3.org/2000/svg"}
    return [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]  # type: ignore[misc]
        for line in ElementTree.fromstring(svg).findall("s:polyline", space)
    ]


def test_a_growth_has_panels_of_speed_latency_ticks_and_sizes() -> None:
    svg = report.chart(grown())
    rates, latencies, ticks, table, indexes, summaries = polylines(svg)
    assert [len(line) for line in (rates, latencies, ticks, table)] == [2, 1, 2, 2]
    assert rates[0][1] < latencies[0][1] < ticks[0][1] < table[0][1], "one below the other"
    assert table[0][1] < indexes[0][1] < summaries[0][1], "more is higher"
    assert "the summaries' tick for 100,000 new rows" in "".join(ElementTree.fromstring(svg).itertext())


def test_growths_of_several_layouts_share_a_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for layout, factor in (("plain", 0.5), ("partitioned", 1.0), ("staging", 0.75)):
        files.append(tmp_path / f"{layout}.json")
        files[-1].write_text(json.dumps(grown(layout, factor)))
    report.main(["--chart", str(tmp_path / "all.svg"), *map(str, files)])
    tables = capsys.readouterr().out
    assert tables.count("| 2,000,000 | 1,000,000 | ") == 3
    assert "plain table (one heap), a fleet of 100,000 devices" in tables
    assert {line.count("|") for line in tables.splitlines() if line.startswith("|")} == {10}
    svg = (tmp_path / "all.svg").read_text()
    lines = polylines(svg)
    assert len(lines) == 3 * 3 + 2 * 3
    plain, partitioned, staging = (line[0][1] for line in lines[:3])
    assert partitioned < staging < plain
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert all(name in text for name in ("plain", "partitioned: summaries", "staging"))


def test_growths_of_the_same_layout_are_told_apart() -> None:
    def names(*documents: report.Document) -> str:
        return "".join(ElementTree.fromstring(report.growths(documents)).itertext())

    equal = names(grown(), grown())
    assert "partitioned, 2,000,000 rows, 1" in equal
    assert "partitioned, 2,000,000 rows, 2" in equal
    longer = names(grown(), grown(rows=100_000_000), grown("plain"))
    assert all(
        name in longer for name in ("partitioned, 100,000,000 rows", "partitioned, 2,000,000 rows", "plain, 2,000")
    )
    assert "rows, 1" not in longer


def test_produce_for_people_and_as_a_chart() -> None:
    produced = SURROUNDINGS | {
        "bench": "produce",
        "messages_per_second": 300_000.0,
        "messages_per_second_of_a_second": {"median": 3.0e5, "low": 2.9e5, "high": 3.1e5},
        "cpu_us_per_message": 2.5,
        "cpu_us_per_message_by_part": {"producer": 2.5, "broker": 1.0},
        "points": [{"seconds": 1.0, "messages_per_second": 300_000.0}],
    }
    assert "300,000" in shown(produced)
    assert "2.50" in shown(produced)
    assert "polyline" in report.chart(produced)
