"""What becomes of speed and latency, and of the summaries' time, while the table grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from metrics_pipeline import kafka, postgres, summaries
from metrics_pipeline.bench import live, readings, surroundings, table
from metrics_pipeline.bench.live import catch_up, end_of
from metrics_pipeline.bench.paths import ConnectPath, CopyPath, DrainPath
from metrics_pipeline.bench.place import Place
from metrics_pipeline.bench.stopwatch import time_path
from metrics_pipeline.settings import Settings, SinkKind
from metrics_pipeline.verification.verify import ShowProgress

RATE: Final[Mapping[SinkKind, int]] = {"connect": 10_000, "copy": 20_000}
"""Messages a second while latency is measured: well below what the sink can store."""
WATCH_SECONDS: Final = 15
WARM_UP: Final = 2_000


@dataclass(frozen=True, slots=True)
class Step:
    """What was measured while the table grew to one size.

    Attributes:
        rows: in the table at the end of the step.
        rows_per_second: while the greater part of the step was drained.
        latency: seconds from acknowledged to visible, at `rate` messages a second.
        rate: messages a second meanwhile.
        tick_rows: new readings that the first tick of the summaries added.
        tick_seconds: that it took.
        small_tick_rows: new readings that the second tick added.
        small_tick_seconds: that it took.
        heap_bytes: of the table.
        index_bytes: of its indexes.
        summary_bytes: of the tables that the summaries are kept in.
    """

    rows: int
    rows_per_second: float
    latency: dict[str, float | int | None]
    rate: int
    tick_rows: int
    tick_seconds: float
    small_tick_rows: int
    small_tick_seconds: float
    heap_bytes: int
    index_bytes: int
    summary_bytes: int


def ends(settings: Settings, count: int, steps: int, now: datetime) -> list[datetime]:
    """When the readings of each step end, so that no two steps share an instant."""
    span: timedelta = readings.ROUND * (count // settings.producer_min_metrics + 3)
    return [now - span * (steps - 1 - step) for step in range(steps)]


def growth(
    place: Place,
    sink: SinkKind,
    rows: int,
    steps: int,
    changed: Mapping[str, Any],
    progress: ShowProgress,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Let the table grow in equal steps, and measure at each.

    Args:
        place: where it runs; its topic must be empty.
        sink: which one stores.
        rows: at the end, not counting those that latency is measured by.
        steps: how many.
        changed: the user's own changes of producer settings.
        progress: told how far it is.
        say: told the outcome of each step.

    Returns:
        One JSON object.

    Raises:
        PipelineError: a part of the pipeline failed.
    """
    settings = place.settings
    document = surroundings.describe(place)
    stamp, chunk = datetime.now(UTC), rows // steps
    expected, measured, problems = 0, [], []

    def path() -> DrainPath:
        return CopyPath(place, settings.sink_workers) if sink == "copy" else ConnectPath.ours(place, connector)

    connector = f"bench-{stamp:%H%M%S}-growth"
    with postgres.connect_admin(settings, settings.metrics_database) as connection:
        table.empty(connection)
        table.activate(connection, "connect")
        table.start_sink_at(connection, {number: high for number, (_, high) in kafka.watermarks(settings).items()})
        summaries.ingestion_rate(settings)
        for number, end in enumerate(ends(settings, chunk, steps, stamp), 1):
            name = f"step {number} of {steps}"
            readings.fill(settings, readings.simulated(settings, chunk, end), chunk, progress)
            table.settle(connection)
            target = end_of(place)

            def show(passed: int, name: str = name, target: int = target) -> None:
                progress(f"{name}: storing", max(0, chunk - (target - passed)), chunk)

            timed = time_path(place, connection, path(), target, show)
            progress(f"{name}: the summaries", 0, 0)
            tick, _ = _tick(settings)
            watched = path()
            try:
                watched.start()
                _warm_up(place, watched)
                trial = live.run(
                    place, watched, connection, RATE[sink], WATCH_SECONDS, progress, changed=changed, keep=True
                )
            finally:
                watched.stop()
            small_tick, total = _tick(settings)
            expected += timed.rows + trial.acknowledged + WARM_UP
            if timed.rows != chunk:
                problems.append(f"{name}: {timed.rows:,} rows of {chunk:,} records")
            if total != expected:
                problems.append(f"{name}: {total:,} rows in the table, expected {expected:,}")
            measured.append(
                Step(
                    rows=total,
                    rows_per_second=timed.rows_per_second,
                    latency=trial.latency,
                    rate=RATE[sink],
                    tick_rows=timed.rows,
                    tick_seconds=tick,
                    small_tick_rows=trial.rows + WARM_UP,
                    small_tick_seconds=small_tick,
                    **table.size(connection),
                    summary_bytes=table.summary_size(connection),
                )
            )
            say(line(measured[-1]))
    return {
        "bench": "growth",
        "correct": not problems,
        "problems": problems,
        "sink": sink,
        "rows": rows,
        **document,
        "steps": [asdict(step) for step in measured],
    }


def _warm_up(place: Place, path: DrainPath) -> None:
    """Wait until a sink that was just started stores what comes."""
    now = datetime.now(UTC)
    readings.fill(place.settings, readings.simulated(place.settings, WARM_UP, now), WARM_UP, lambda *_: None)
    catch_up(path, end_of(place), lambda _: None)


def _tick(settings: Settings) -> tuple[float, int]:
    """Seconds of one tick of the summaries, and the readings there are."""
    begun = time.monotonic()
    rate = summaries.ingestion_rate(settings)
    return time.monotonic() - begun, rate.rows


def line(step: Step) -> str:
    """One step for people."""
    p99 = step.latency.get("p99")
    return (
        f"{step.rows:,} rows: {step.rows_per_second:,.0f} rows/s, "
        f"p99 {'not measured' if p99 is None else f'{p99:.2f} s'} at {step.rate:,} messages/s, "
        f"tick {step.tick_seconds:.2f} s for {step.tick_rows:,} new rows"
    )
