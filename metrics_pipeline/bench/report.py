"""A benchmark's result for people: tables, and the surroundings that it holds for.

`python -m metrics_pipeline.bench.report FILE.json` prints a drain's result as a Markdown table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from metrics_pipeline.bench import charts, live
from metrics_pipeline.bench.figures import Spread
from metrics_pipeline.bench.surroundings import warnings

Document = Mapping[str, Any]

MIB: Final = 2**20


def rendered(document: Document) -> RenderableType:
    """The result of any benchmark."""
    body = {"drain": _drain, "live": _live, "produce": _produce, "growth": _growth}[document["bench"]](document)
    return Group(*body, _surroundings(document), *(Text(f"warning: {line}", "yellow") for line in warnings(document)))


def chart(document: Document) -> str:
    """The result of any benchmark as SVG."""
    where = f"{document['machine']['cores']} cores, {document['machine']['cpu']}, commit {document['commit']}"
    if document["bench"] == "drain":
        spreads = {path: Spread(**own["rows_per_second"]) for path, own in document["paths"].items()}
        return charts.bars(f"Draining {document['records']:,} records", spreads, "rows/s", where)
    if document["bench"] == "live":
        runs = document["runs"]
        return charts.lines(f"Lag of the sink {document['sink']}", live.series(runs), "seconds", "records waiting")
    if document["bench"] == "produce":
        points = [(point["seconds"], point["messages_per_second"]) for point in document["points"]]
        return charts.lines("One producer", {"messages/s": points}, "seconds", "messages acknowledged a second")
    steps = document["steps"]
    rates = [(float(step["rows"]), step["rows_per_second"]) for step in steps]
    return charts.lines(f"The sink {document['sink']}", {"rows/s": rates}, "rows in the table", "rows stored a second")


def _drain(document: Document) -> Iterable[RenderableType]:
    ratios = document["ratios"]
    grid = Table("path", "rows/s", "least – greatest", *(f"× {base}" for base in ratios), "CPU µs a row, by process")
    for path, own in document["paths"].items():
        rate = own["rows_per_second"]
        grid.add_row(
            path,
            f"{rate['median']:,.0f}",
            f"{rate['low']:,.0f} – {rate['high']:,.0f}",
            *(f"{ratios[base][path]:.2f}" if path in ratios[base] else "" for base in ratios),
            _parts(own["cpu_us_per_row"]),
        )
    yield grid
    heap, index = document["table"]["heap_bytes"] / MIB, document["table"]["index_bytes"] / MIB
    yield Text(
        f"{document['records']:,} records, {document['rounds']} rounds; medians. "
        f"The full table: {heap:,.0f} MiB and {index:,.0f} MiB of indexes."
    )
    hasty = sorted({run["path"] for run in document["runs"] if not run["steady"]})
    if hasty:
        yield Text(
            f"Too few records for a steady clock: {', '.join(hasty)} counted from the first transaction's begin."
        )
    for path, ratio in document["ratios_with_bad_records"].items():
        yield Text(f"{path} keeps {ratio:.2f} of its rate with 1 in {document['bad_every']:,} records bad.")
    if document["correct"]:
        yield Text("After each run the table held exactly the topic's keys, values and tags.")
    for run in document["runs"]:
        for finding in run["check"]["findings"]:
            yield Text(f"NOT EQUAL after round {run['round']}, {run['path']}: {finding}", "bold red")


def _live(document: Document) -> Iterable[RenderableType]:
    grid = Table(
        "messages/s",
        "acknowledged/s",
        "stored rows/s",
        "p50",
        "p95",
        "p99",
        "greatest lag",
        "sustained",
        "CPU µs a row",
    )
    for run in document["runs"]:
        grid.add_row(
            f"{run['rate']:,}",
            f"{run['acknowledged_per_second']:,.0f}",
            f"{run['stored_per_second']:,.0f}",
            *(_seconds(run["latency"].get(name)) for name in ("p50", "p95", "p99")),
            f"{max((look['lag'] for look in run['looks']), default=0):,}",
            "yes" if run["problem"] is None else f"no: {run['problem']}",
            _parts(run["cpu"]),
        )
    yield grid
    held = document["sustained_per_second"]
    yield Text(
        f"sink {document['sink']}: "
        + (f"{held:,} messages/s are sustained" if held else "the rate is not sustained")
        + "; latency from acknowledged to visible"
    )
    for run in (*document["runs"], *document["tried"]):
        for finding in run["findings"]:
            yield Text(f"NOT EQUAL at {run['rate']:,} messages/s: {finding}", "bold red")


def _produce(document: Document) -> Iterable[RenderableType]:
    spread = document["messages_per_second_of_a_second"]
    grid = Table("acknowledged messages/s", "least – greatest second", "CPU µs a message", "others, µs a message")
    others = {part: cost for part, cost in document["cpu_us_per_message_by_part"].items() if part != "producer"}
    grid.add_row(
        f"{document['messages_per_second']:,.0f}",
        f"{spread['low']:,.0f} – {spread['high']:,.0f}",
        f"{document['cpu_us_per_message']:.2f}",
        _parts(others),
    )
    yield grid


def _growth(document: Document) -> Iterable[RenderableType]:
    grid = Table(
        "rows",
        "rows/s",
        "p50",
        "p99",
        "tick",
        "new rows",
        "small tick",
        "new rows",
        "heap MiB",
        "indexes MiB",
        "summaries MiB",
    )
    for step in document["steps"]:
        grid.add_row(
            f"{step['rows']:,}",
            f"{step['rows_per_second']:,.0f}",
            *(_seconds(step["latency"].get(name)) for name in ("p50", "p99")),
            _seconds(step["tick_seconds"]),
            f"{step['tick_rows']:,}",
            _seconds(step["small_tick_seconds"]),
            f"{step['small_tick_rows']:,}",
            f"{step['heap_bytes'] / MIB:,.0f}",
            f"{step['index_bytes'] / MIB:,.0f}",
            f"{step['summary_bytes'] / MIB:,.0f}",
        )
    yield grid
    yield from (Text(f"NOT EQUAL: {problem}", "bold red") for problem in document["problems"])


def _surroundings(document: Document) -> RenderableType:
    machine, server = document["machine"], document["postgres"]
    durable = ", ".join(f"{name} {server[name]}" for name in ("fsync", "full_page_writes", "synchronous_commit"))
    sizes = ", ".join(f"{name} {server[name]}" for name in ("shared_buffers", "max_wal_size", "wal_buffers"))
    settings = " ".join(f"{name}={value}" for name, value in document["settings"].items())
    lines = [
        f"{machine['cores']} cores, {machine['cpu']}, {machine['memory_gib']:g} GiB, {machine['os']}, {machine['filesystem']}",
        ", ".join(f"{name} {number}" for name, number in document["versions"].items()),
        f"PostgreSQL: {durable}; {sizes}",
        settings,
        f"commit {document['commit'] or 'unknown'}, {document['measured_at']}, stack: {document['stack']}",
    ]
    return Text("\n".join(lines), "dim")


def _parts(costs: Mapping[str, float]) -> str:
    ordered = sorted(((part, cost) for part, cost in costs.items() if part != "total"), key=lambda item: -item[1])
    shown = [f"{part} {cost:.1f}" for part, cost in ordered if cost >= 0.05]
    total = sum(cost for _, cost in ordered)
    return f"{total:.1f} = {' + '.join(shown)}" if shown else f"{total:.1f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def markdown(document: Document) -> str:
    """A drain's result as a Markdown table."""
    bases = [base for base in ("limit-2", "connect") if base in document["ratios"]]
    heads = ["path", "rows/s", "least to greatest", *(f"× `{base}`" for base in bases), "CPU µs a row"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for path, own in document["paths"].items():
        rate = own["rows_per_second"]
        ratios = [document["ratios"][base].get(path) for base in bases]
        cells = [
            f"`{path}`",
            f"{rate['median']:,.0f}",
            f"{rate['low']:,.0f} to {rate['high']:,.0f}",
            *("1" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            _parts(own["cpu_us_per_row"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
