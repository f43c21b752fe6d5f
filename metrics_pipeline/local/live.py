"""The live table of `metrics-pipeline up`: what is stored, acknowledged and waiting, refreshed every few seconds."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import closing

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from metrics_pipeline.local.status import Sample, Sampler
from metrics_pipeline.settings import Settings

SAMPLE_SECONDS = 3.0
PLAIN_SECONDS = 10.0
"""Without a terminal, one line this often instead of a table."""

log = logging.getLogger(__name__)


class LiveTable:
    """Samples in a thread of its own, so that a slow answer delays neither the keeper nor a Ctrl-C."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._sample: Sample | None = None
        self._stop = threading.Event()
        self._live: Live | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> LiveTable:
        threading.Thread(target=self._watch, name="live", daemon=True).start()
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._live is not None:
            self._live.stop()

    def show(self) -> None:
        """Draw the last sample."""
        if self._sample is None:
            return
        if self._live is not None:
            self._live.update(table(self._sample))
        elif time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self._console.print(line(self._sample))

    def _watch(self) -> None:
        with closing(Sampler(self._settings)) as sampler:
            while not self._stop.wait(SAMPLE_SECONDS):
                try:
                    self._sample = sampler.sample()
                except Exception:
                    log.exception("no sample could be taken; the one before stays")


def table(sample: Sample) -> Table:
    """The figures and the state of each part."""
    grid = Table(box=None, show_header=False, padding=(0, 2))
    latency = sample["latency_seconds"]
    for name, value in (
        ("rows stored", f"{number(sample['rows'])}   {number(sample['rows_per_second'])}/s"),
        ("acknowledged", f"{number(sample['acknowledged_per_second'])} messages/s"),
        ("consumer lag", f"{number(sample['lag'])} records"),
        (
            "latency",
            f"p50 {seconds(latency['p50'])}   p99 {seconds(latency['p99'])}   (acknowledged → visible in PostgreSQL)",
        ),
    ):
        grid.add_row(f"[bold]{name}[/]", value)
    for part in _parts(sample):
        state = sample[part]
        mark = "[green]●[/] healthy" if state["healthy"] else f"[red]●[/] {escape(state.get('reason', 'not healthy'))}"
        if part == "connect" and state["connector"]:
            mark += f"   connector {state['connector']}, tasks {task_states(sample)}"
            if "quarantines" in state:
                mark += f"\n{escape(state['quarantines']['text'])}"
        if part == "sink" and state["healthy"]:
            mark += f"   COPY, {escape(state['state'])}" + ("" if state["workers"] is None else f", {workers(sample)}")
        if part == "watcher" and state["healthy"]:
            mark += f"   {escape(state['state'])}" + watched(state)
        grid.add_row(part, f"{mark}   [dim]{state['url']}[/]")
    return grid


def line(sample: Sample) -> str:
    """The same in one line, for a log."""
    sick = [part for part in _parts(sample) if not sample[part]["healthy"]]
    latency = sample["latency_seconds"]
    if sample["sink"]["kind"] == "copy":
        sink = f"COPY, {sample['sink']['state']}, {workers(sample)}"
    else:
        sink = f"{sample['connect']['connector'] or 'not running'} ({task_states(sample)})"
    return (
        f"rows {number(sample['rows'])} ({number(sample['rows_per_second'])}/s), acknowledged {number(sample['acknowledged_per_second'])}/s, "
        f"lag {number(sample['lag'])}, latency p50 {seconds(latency['p50'])} p99 {seconds(latency['p99'])}, "
        f"sink {sink}" + (f", not healthy: {', '.join(sick)}" if sick else "")
    )


def _parts(sample: Sample) -> tuple[str, ...]:
    """The parts to show: of the sinks, the one that stores the readings."""
    if sample["sink"]["kind"] == "copy":
        return ("postgres", "broker", "sink", "producer", "dagster")
    return ("postgres", "broker", "connect", "watcher", "producer", "dagster")


def watched(state: Sample) -> str:
    """How far the watcher is, when it is behind or has rows to put right."""
    figures = {"records behind": state["waiting"], "rows to put right": state["to_put_right"]}
    return "".join(f", {number(count)} {what}" for what, count in figures.items() if count)


def workers(sample: Sample) -> str:
    """How many workers the COPY sink has: `2 workers`."""
    count = sample["sink"]["workers"]
    return f"{'–' if count is None else count} worker{'' if count == 1 else 's'}"


def task_states(sample: Sample) -> str:
    """How many tasks are in which state: `6 RUNNING`."""
    states = [task["state"] for task in sample["connect"]["tasks"]]
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))) or "none"


def number(value: float | None) -> str:
    """With thousands separated; a dash for what is not known."""
    return "–" if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """A duration for people."""
    return "–" if value is None else f"{value:.2f} s"
