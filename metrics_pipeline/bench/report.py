"""A benchmark's result for people: tables, and the surroundings that it holds for.

`python -m metrics_pipeline.bench.report FILE.json` prints the result of a drain or of a growth as a Markdown table. With several results
of growths it prints one table each; `--chart FILE.svg` before them draws all of them into one chart.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    return growths([document])


def growths(documents: Sequence[Document]) -> str:
    """Results of growths in one chart: speed, latency, the summaries' tick and sizes by the rows in the table."""
    names = [_kind(document) for document in documents]
    if len(set(names)) < len(names):
        names = [f"{name}, {document['rows']:,} rows" for name, document in zip(names, documents, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name}, {number}" for number, name in enumerate(names, 1)]
    results = dict(zip(names, documents, strict=True))

    def each(value: Callable[[Any], float | None], label: str = "") -> dict[str, list[tuple[float, float]]]:
        return {
            f"{name}{label}": [
                (float(step["stored"]), float(found))
                for step in document["steps"]
                if (found := value(step)) is not None
            ]
            for name, document in results.items()
        }

    if len(documents) == 1:
        sizes = each(lambda step: step["heap_bytes"], ": table") | each(lambda step: step["index_bytes"], ": indexes")
    else:
        sizes = each(lambda step: step["heap_bytes"] + step["index_bytes"])
    sizes |= each(lambda step: step["summary_bytes"], ": summaries")
    rows = "rows stored"
    fewest = min((step["tick"]["rows"] for document in documents for step in document["steps"]), default=0)
    return charts.panels(
        f"A growing table, {_fleet(documents[0])}",
        [
            charts.Panel(each(lambda step: step["rows_per_second"]), rows, "rows stored a second"),
            charts.Panel(each(lambda step: step["latency"].get("p99")), rows, "p99 until visible, seconds"),
            charts.Panel(
                each(lambda step: step["tick"]["seconds"]),
                rows,
                f"the summaries' tick for {fewest:,} new rows, seconds",
            ),
            charts.Panel(sizes, rows, "bytes" if len(documents) == 1 else "bytes of the table with its indexes"),
        ],
    )


def _kind(document: Document) -> str:
    """What a growth is one of."""
    layout: str = document["layout"]["name"]
    return layout if document["sink"] == "copy" else f"{layout}, {document['sink']}"


def _fleet(document: Document) -> str:
    settings = document["settings"]
    low, high = settings["PRODUCER_MIN_DEVICES"], settings["PRODUCER_MAX_DEVICES"]
    return f"a fleet of {settings['PRODUCER_FLEET_SIZE']:,} devices, {low:,} to {high:,} of them in a round"


def _table(document: Document) -> str:
    layout = document["layout"]
    kinds = {
        "plain": "one heap",
        "partitioned": f"{layout['partitions']} partitions by {layout['width']}",
        "staging": f"{layout['partitions']} partitions by {layout['width']}, by way of a staging table",
    }
    return f"{layout['name']} table ({kinds[layout['name']]})"


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
        "in the table",
        "rows/s",
        "p50",
        "p99",
        "tick",
        "new rows",
        "all ticks, µs a row",
        "heap MiB",
        "indexes MiB",
        "summaries MiB",
        "CPU µs a row, by process",
    )
    for step in document["steps"]:
        tick = step["tick"]
        grid.add_row(
            f"{step['stored']:,}",
            f"{step['rows']:,}",
            f"{step['rows_per_second']:,.0f}",
            *(_seconds(step["latency"].get(name)) for name in ("p50", "p99")),
            _seconds(tick["seconds"]) + (" with a fold" if tick["folded"] else ""),
            f"{tick['rows']:,}",
            f"{step['tick_us_per_row']:.1f}",
            f"{step['heap_bytes'] / MIB:,.0f}",
            f"{step['index_bytes'] / MIB:,.0f}",
            f"{step['summary_bytes'] / MIB:,.0f}",
            _parts(step["cpu"]),
        )
    yield grid
    if staged := max((step["staging_bytes"] for step in document["steps"]), default=0):
        yield Text(f"The largest staging table that was moved: {staged / MIB:,.0f} MiB.")
    if parts := document["partitions"]:
        sizes = [part["rows"] for part in parts]
        yield Text(
            f"{len(parts)} of {document['layout']['partitions']} partitions hold readings, about {min(sizes):,} to {max(sizes):,} each."
        )
    if gone := sum(step["dropped_rows"] for step in document["steps"]):
        longest = max(step["drop_seconds"] for step in document["steps"])
        yield Text(f"{gone:,} rows were dropped with their partitions, in at most {longest:.2f} s after a step.")
    if document["correct"]:
        yield Text("The table held exactly the topic's keys, values and tags, and the summaries knew of all.")
    yield from (Text(f"NOT EQUAL: {problem}", "bold red") for problem in document["problems"])


def _surroundings(document: Document) -> RenderableType:
    machine, server = document["machine"], document["postgres"]
    durable = ", ".join(f"{name} {server[name]}" for name in ("fsync", "full_page_writes", "synchronous_commit"))
    sizes = ", ".join(f"{name} {server[name]}" for name in ("shared_buffers", "max_wal_size", "wal_buffers"))
    settings = " ".join(f"{name}={value}" for name, value in document["settings"].items())
    lines = [
        f"{_fleet(document)}; {_table(document)}",
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
    """The result of a drain or of a growth as a Markdown table, with fleet and layout above."""
    heads, rows = _growth_cells(document) if document["bench"] == "growth" else _drain_cells(document)
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---" for _ in heads], *rows)]
    return f"{_table(document)}, {_fleet(document)}\n\n" + "\n".join(lines) + "\n"


def _drain_cells(document: Document) -> tuple[list[str], list[list[str]]]:
    bases = [base for base in ("limit-2", "connect") if base in document["ratios"]]
    heads = ["path", "rows/s", "least to greatest", *(f"× `{base}`" for base in bases), "CPU µs a row"]
    rows = []
    for path, own in document["paths"].items():
        rate = own["rows_per_second"]
        ratios = [document["ratios"][base].get(path) for base in bases]
        rows.append(
            [
                f"`{path}`",
                f"{rate['median']:,.0f}",
                f"{rate['low']:,.0f} to {rate['high']:,.0f}",
                *("1" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                _parts(own["cpu_us_per_row"]),
            ]
        )
    return heads, rows


def _growth_cells(document: Document) -> tuple[list[str], list[list[str]]]:
    tick_rows = document["steps"][0]["tick"]["rows"] if document["steps"] else 0
    heads = [
        "rows",
        "in the table",
        "rows/s",
        "p99",
        f"tick, {tick_rows:,} new rows",
        "all ticks, µs a row",
        "table",
        "indexes",
        "summaries",
    ]
    rows = [
        [
            f"{step['stored']:,}",
            f"{step['rows']:,}",
            f"{step['rows_per_second']:,.0f}",
            _seconds(step["latency"].get("p99")),
            _seconds(step["tick"]["seconds"]) + (" with a fold" if step["tick"]["folded"] else ""),
            f"{step['tick_us_per_row']:.1f}",
            *(f"{step[name] / MIB:,.0f} MiB" for name in ("heap_bytes", "index_bytes", "summary_bytes")),
        ]
        for step in document["steps"]
    ]
    return heads, rows


def main(arguments: Sequence[str]) -> None:
    """Print results as Markdown; after `--chart FILE.svg`, draw those of growths together, too."""
    drawn, files = (Path(arguments[1]), arguments[2:]) if arguments[:1] == ["--chart"] else (None, arguments)
    documents = [json.loads(Path(file).read_text("utf-8")) for file in files]
    sys.stdout.write("\n".join(markdown(document) for document in documents))
    if drawn is not None:
        charts.write(drawn, growths([document for document in documents if document["bench"] == "growth"]))


if __name__ == "__main__":
    main(sys.argv[1:])
