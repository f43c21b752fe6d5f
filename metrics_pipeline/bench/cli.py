"""`metrics-pipeline bench …`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from metrics_pipeline.bench.layout import Layout, TableLayout
from metrics_pipeline.errors import SettingError
from metrics_pipeline.settings import Settings, SinkKind, producer_overrides

if TYPE_CHECKING:  # the rest is loaded by the command that runs
    from metrics_pipeline.verification.verify import ShowProgress

bench = typer.Typer(
    help="Measure this pipeline on this machine, on a stack of its own that leaves nothing behind.",
    no_args_is_help=True,
)

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

ALL_PATHS = "connect,connect-baseline,copy-1,copy-2,limit-1,limit-2"


Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
Chart = Annotated[
    Path | None, typer.Option("--chart", help="file of the chart; default: bench-NAME.svg in this folder")
]
Here = Annotated[
    bool,
    typer.Option("--here", help="on the services of the settings; EMPTIES the table and the topic `metrics`"),
]
Yes = Annotated[bool, typer.Option("--yes", help="with --here: do not ask")]
Changed = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="another producer setting for this run; repeatable"),
]
LaidOut = Annotated[
    TableLayout,
    typer.Option("--layout", help="of the table: one heap, or partitions by time; with --here as it is"),
]
Stored = Annotated[SinkKind | None, typer.Option("--sink", help="default: SINK")]


@bench.command()
def drain(
    records: Annotated[int, typer.Option("--records", min=1000, help="records in the topic")] = 2_000_000,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="times that each path drains them")] = 5,
    paths: Annotated[str, typer.Option("--paths", help="which ones, separated by commas")] = ALL_PATHS,
    bad_every: Annotated[
        int,
        typer.Option("--bad-every", metavar="N", min=0, help="let the COPY sink drain one bad record in N, too; 0: no"),
    ] = 0,
    layout: LaidOut = "partitioned",
    changed: Changed = None,
    chart: Chart = None,
    as_json: Json = False,
    here: Here = False,
    yes: Yes = False,
) -> None:
    """Drain the same records by each sink, and by COPY alone, into an empty table; compare the table with the topic each time."""
    from metrics_pipeline.bench.drain import chosen
    from metrics_pipeline.bench.drain import drain as measure

    names = chosen(paths.split(","))
    settings = Settings.load(**producer_overrides(changed))
    connect = any(name.startswith("connect") for name in names)
    with _place(settings, here=here, yes=yes, connect=connect, layout=layout) as place, _progress() as progress:
        document = measure(place, records, rounds, names, progress, _say, bad_every=bad_every).document()
    _finish(document, chart, as_json=as_json)


@bench.command()
def live(
    seconds: Annotated[int, typer.Option("--seconds", min=5, help="that a measurement lasts")] = 60,
    rate: Annotated[
        str, typer.Option("--rate", metavar="N|max", help="messages/s; `max` searches the highest")
    ] = "max",
    sink: Stored = None,
    changed: Changed = None,
    chart: Chart = None,
    as_json: Json = False,
    here: Here = False,
    yes: Yes = False,
) -> None:
    """Producer and sink together: stored rows/s, lag over time, latency, CPU; at a rate, or at the highest and half of it."""
    from metrics_pipeline.bench.live import live as measure

    if rate != "max" and not (rate.isascii() and rate.isdecimal() and int(rate) > 0):
        raise SettingError(f"--rate {rate}: give a whole number of messages a second, or max")
    settings = Settings.load(**producer_overrides(changed))
    stored_by = sink or settings.sink
    with _place(settings, here=here, yes=yes, connect=stored_by == "connect") as place, _progress() as progress:
        wanted = None if rate == "max" else int(rate)
        document = measure(place, stored_by, wanted, seconds, producer_overrides(changed), progress, _say)
    _finish(document, chart, as_json=as_json)


@bench.command()
def produce(
    seconds: Annotated[int, typer.Option("--seconds", min=5, help="how long")] = 30,
    changed: Changed = None,
    chart: Chart = None,
    as_json: Json = False,
    here: Here = False,
    yes: Yes = False,
) -> None:
    """One producer alone against the broker: acknowledged messages/s, and what a message costs."""
    from metrics_pipeline.bench.produce import produce as measure

    overrides = producer_overrides(changed)
    settings = Settings.load(**overrides)
    with _place(settings, here=here, yes=yes) as place, _progress() as progress:
        document = measure(place, seconds, overrides, progress)
    _finish(document, chart, as_json=as_json)


@bench.command()
def growth(
    rows: Annotated[int, typer.Option("--rows", min=10_000, help="rows in the table at the end")] = 10_000_000,
    steps: Annotated[int, typer.Option("--steps", min=1, help="sizes at which it is measured")] = 10,
    layout: Annotated[
        Layout,
        typer.Option("--layout", help="of the table: one heap, partitions by time, or these by way of a staging table"),
    ] = "partitioned",
    partition_rows: Annotated[
        int, typer.Option("--partition-rows", metavar="N", min=1000, help="about how many readings a partition gets")
    ] = 10_000_000,
    keep_rows: Annotated[
        int,
        typer.Option(
            "--keep-rows",
            metavar="N",
            min=0,
            help="drop the oldest partitions after each step so that N rows stay; 0: all",
        ),
    ] = 0,
    sink: Stored = None,
    changed: Changed = None,
    chart: Chart = None,
    as_json: Json = False,
    here: Here = False,
    yes: Yes = False,
) -> None:
    """Stored rows/s, latency and the summaries' time while the table grows."""
    from metrics_pipeline.bench.growth import Plan, check_disk
    from metrics_pipeline.bench.growth import growth as measure

    overrides = producer_overrides(changed)
    settings = Settings.load(**overrides)
    plan = Plan(sink or settings.sink, rows, steps, layout, partition_rows, keep_rows)
    plan.check(settings)
    if here and keep_rows:
        raise SettingError("--keep-rows: the partitions of --here stay as they are: leave one of the two out")
    if not here:
        check_disk(plan, settings)
    connect = plan.sink == "connect"
    with _place(settings, here=here, yes=yes, connect=connect, layout=layout) as place, _progress() as progress:
        document = measure(place, plan, overrides, progress, _say)
    _finish(document, chart, as_json=as_json)


def _place(
    settings: Settings, *, here: bool, yes: bool, connect: bool = False, layout: Layout = "partitioned"
) -> AbstractContextManager[Any]:
    from metrics_pipeline.bench import place

    if not here:
        return place.temporary(settings, _say, layout)
    if layout != "partitioned":
        raise SettingError(f"--layout {layout}: the table of --here stays as it is: leave one of the two out")
    target = f"{settings.postgres_host}:{settings.postgres_host_port} and {settings.bootstrap_servers}"
    if not yes and not typer.confirm(
        f"Empty the tables metrics and rejected_metrics, and the topic metrics, at {target}?", err=True
    ):
        raise typer.Exit(1)
    return place.here(settings, _say, connect=connect)


def _say(line: str) -> None:
    err.print(line, markup=False)


@contextmanager
def _progress() -> Iterator[ShowProgress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Drawn seldom: the bench shares the cores with what it measures.
    with Progress(*columns, console=err, transient=True, refresh_per_second=2, disable=not err.is_terminal) as bar:
        task = bar.add_task("starting")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield show


def _finish(document: dict[str, Any], chart: Path | None, *, as_json: bool) -> None:
    """Show the result, write the chart, and exit with 1 when the table was not what it had to be."""
    from metrics_pipeline.bench import charts, report

    written = charts.write(chart or Path(f"bench-{document['bench']}.svg"), report.chart(document))
    document["chart"] = str(written)
    if as_json:
        sys.stdout.write(json.dumps(document, default=str) + "\n")
    else:
        out.print(report.rendered(document))
    _say(f"chart: {written}")
    raise typer.Exit(0 if document["correct"] else 1)
