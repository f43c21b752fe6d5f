"""Producer and sink at work together: what is stored a second, how far the sink is behind, how long a reading takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from math import sqrt
from typing import Any, Final

from metrics_pipeline import kafka, postgres
from metrics_pipeline.bench import cpu, load, readings, surroundings, table
from metrics_pipeline.bench.figures import quantiles, slope
from metrics_pipeline.bench.paths import ConnectPath, CopyPath, DrainPath
from metrics_pipeline.bench.place import Place
from metrics_pipeline.bench.produce import FAST
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import SinkKind
from metrics_pipeline.verification.verify import ShowProgress

TRIAL_SECONDS: Final = 20
"""How long a rate is tried at most while the highest is searched."""
FIRST_RATE: Final[Mapping[SinkKind, int]] = {"connect": 20_000, "copy": 100_000}
STEP: Final = 1.4
PRECISION: Final = 0.05
LEAST_RATE: Final = 500
FINAL_TRIES: Final = 4

SETTLE_SECONDS: Final = 2.0
"""From the first acknowledgement to the begin of what is measured."""
LOOK_SECONDS: Final = 1.0
WARM_UP: Final = 10_000

REACHED: Final = 0.97
"""Share of the rate that the producer must reach, and share of what it reaches that must be stored meanwhile."""
LAG_SECONDS: Final = 5.0
"""Most readings that may wait at the end of a sustained run, as seconds of the rate."""
GROWTH: Final = 0.05
"""Most that the lag may grow by in a second during the second half, as a share of the rate."""
HOPELESS_SECONDS: Final = 15.0
"""Lag, as seconds of the rate, at which a trial is broken off."""


@dataclass(frozen=True, slots=True)
class Look:
    """One moment of a run.

    Attributes:
        seconds: since the first acknowledgement.
        lag: records in the topic that are not stored yet.
    """

    seconds: float
    lag: int


@dataclass
class Trial:
    """One run at one rate.

    Attributes:
        rate: messages a second that were asked for.
        seconds: that were measured.
        acknowledged_per_second: by the broker.
        stored_per_second: rows that became part of the table meanwhile.
        latency: p50, p95 and p99 in seconds from acknowledged to visible; `samples` says of how many readings.
        cpu: microseconds of CPU a stored row by part; the producer's share is among them.
        producer_cpu: microseconds a message.
        cores_used: CPU seconds a second of all parts together.
        acknowledged: messages in all.
        rows: in the table at the end.
        looks: the lag over time.
        problem: why the rate is not sustained; None when it is.
        findings: what differs between the topic and the table; empty when nothing does.
        compared: whether that was looked at key by key.
    """

    rate: int
    seconds: float = 0.0
    acknowledged_per_second: float = 0.0
    stored_per_second: float = 0.0
    latency: dict[str, float | int | None] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    producer_cpu: float = 0.0
    cores_used: float = 0.0
    acknowledged: int = 0
    rows: int = 0
    looks: list[Look] = field(default_factory=list)
    problem: str | None = None
    findings: tuple[str, ...] = ()
    compared: bool = False


def paced(rate: int) -> dict[str, Any]:
    """Settings of a producer that publishes about `rate` messages a second, in rounds of equal size."""
    interval = 50 if rate >= 2000 else 500
    size = max(1, round(rate * interval / 1000))
    return {"producer_publish_interval": interval, "producer_min_metrics": size, "producer_max_metrics": size}


def problem(rate: float, acknowledged: float, stored: float, looks: Sequence[Look]) -> str | None:
    """Why a rate is not sustained: None when it is.

    Args:
        rate: messages a second that were asked for.
        acknowledged: that the broker acknowledged.
        stored: rows a second.
        looks: the lag over time.
    """
    if acknowledged < REACHED * rate:
        return f"the producer reached {acknowledged:,.0f} messages/s"
    if stored < REACHED * acknowledged:
        return f"{stored:,.0f} rows/s were stored of {acknowledged:,.0f} messages/s"
    half = looks[len(looks) // 2 :]
    if half and half[-1].lag > LAG_SECONDS * rate:
        return f"{half[-1].lag:,} records waited at the end"
    growth = slope([(look.seconds, float(look.lag)) for look in half])
    if growth > GROWTH * rate:
        return f"the lag grew by {growth:,.0f} records/s"
    return None


def highest(tries: Callable[[int], bool], first: int) -> int:
    """The highest rate that holds, within `PRECISION`: upwards or downwards by steps, then by halves.

    Args:
        tries: whether a rate holds.
        first: the rate to begin with.

    Raises:
        ServiceError: not even a very low one holds.
    """
    low, high, rate = 0, 0, first
    while not (low and high and high <= low * (1 + PRECISION)):
        if tries(rate):
            low = rate
        else:
            high = rate
        if high and high < LEAST_RATE:
            raise ServiceError(f"no rate holds, down to {high} messages/s: see the logs of the sink")
        step = low * STEP if not high else high / STEP if not low else sqrt(low * high)
        rate = max(1, round(step / 100) * 100)
        if rate in (low, high):
            break
    return low or rate


@contextmanager
def sinking(place: Place, sink: SinkKind) -> Iterator[tuple[DrainPath, postgres.Connection]]:
    """The sink at work, having stored its first readings, and a superuser's connection to look at the table.

    Raises:
        ServiceError: it does not begin.
    """
    settings = place.settings
    with postgres.connect_admin(settings, settings.metrics_database) as connection:
        path: DrainPath
        table.empty(connection)
        if sink == "copy":
            table.start_sink_at(connection, {n: high for n, (_, high) in kafka.watermarks(settings).items()})
            path = CopyPath(place, settings.sink_workers)
        else:
            table.activate(connection, "connect")
            path = ConnectPath.ours(place, f"bench-{datetime.now(UTC):%H%M%S}-live")
        # A new group begins at the first record there is: the topic must be empty, or the COPY sink's place is set above.
        readings.fill(settings, readings.simulated(settings, WARM_UP, datetime.now(UTC)), WARM_UP, lambda *_: None)
        try:
            path.start()
            catch_up(path, end_of(place), lambda _: None)
            yield path, connection
        finally:
            path.stop()


def end_of(place: Place) -> int:
    """The sum of the offsets after the topic's last records."""
    return sum(high for _, high in kafka.watermarks(place.settings).values())


def catch_up(path: DrainPath, target: int, progress: Callable[[int], None], patience: float = 120.0) -> None:
    """Wait until a path has passed all records.

    Raises:
        ServiceError: it does not advance.
    """
    best, since = -1, time.monotonic()
    while (passed := path.passed()) < target:
        if passed > best:
            best, since = passed, time.monotonic()
        elif time.monotonic() - since > patience:
            raise ServiceError(f"{path.name}: no progress for {patience:.0f} s, {target - passed:,} records left")
        progress(target - passed)
        time.sleep(path.interval)


def run(
    place: Place,
    path: DrainPath,
    connection: postgres.Connection,
    rate: int,
    seconds: int,
    progress: ShowProgress,
    *,
    changed: Mapping[str, Any] | None = None,
    compare: bool = False,
    keep: bool = False,
) -> Trial:
    """Publish at a rate for some seconds while the sink stores, wait for the rest, and compare.

    Args:
        place: where it runs.
        path: a sink at work that has nothing left to do.
        connection: see `sinking`.
        rate: messages a second.
        seconds: how long.
        progress: told how far it is.
        changed: the user's own changes of producer settings.
        compare: whether to compare the table with the topic key by key; else only the number of rows is.
        keep: whether to leave the rows in the table that are there.

    Raises:
        PipelineError: producer or sink failed.
    """
    if keep:
        table.settle(connection)
    else:
        table.empty(connection)
    began = table.clock(connection)
    start = {number: high for number, (_, high) in kafka.watermarks(place.settings).items()}
    trial = Trial(rate)
    # The settling second, and what `figures.steady` leaves out.
    overrides = {
        **{name: value for name, value in FAST.items() if name != "producer_publish_interval"},
        **(changed or {}),
        **paced(rate),
        "producer_run_seconds": seconds + int(SETTLE_SECONDS) + 1,
    }
    meter = cpu.CpuMeter({**place.processes, **path.processes()})
    with load.running(place, overrides, watch=True) as producer:
        first = producer.wait_until_publishing()
        time.sleep(SETTLE_SECONDS)
        begun, before, opened = time.monotonic(), meter.read(), table.clock(connection)
        closed, after, ended = opened, before, begun
        while producer.alive() and time.monotonic() - begun < seconds:
            time.sleep(LOOK_SECONDS)
            if not producer.alive():
                break
            lag = end_of(place) - path.passed()
            closed, after, ended = table.clock(connection), meter.read(), time.monotonic()
            trial.looks.append(Look(ended - begun, max(0, lag)))
            progress(f"{rate:,} messages/s, lag {max(0, lag):,}", min(seconds, int(ended - begun)), seconds)
            if lag > HOPELESS_SECONDS * rate:
                trial.problem = f"{lag:,} records waited after {ended - begun:.0f} s"
                producer.close()
        last = producer.wait()
        beats = [beat for beat in producer.beats if beat.at >= first.at + SETTLE_SECONDS and not beat.done]
    catch_up(path, end_of(place), lambda left: progress(f"{left:,} records to store", 0, 0))
    trial.seconds = ended - begun
    if len(beats) > 1 and trial.seconds:
        span, messages = beats[-1].at - beats[0].at, beats[-1].acknowledged - beats[0].acknowledged
        trial.acknowledged_per_second = messages / span
        trial.producer_cpu = (beats[-1].cpu - beats[0].cpu) * 1e6 / max(1, messages)
        stored = table.stored_between(connection, opened, closed)
        trial.stored_per_second = stored / trial.seconds
        trial.cpu = cpu.per_row(before, after, max(1, stored))
        total = trial.cpu.pop("total") * trial.stored_per_second
        producing = trial.producer_cpu * trial.acknowledged_per_second
        trial.cpu["producer"] = producing / max(1.0, trial.stored_per_second)
        trial.cores_used = (total + producing) / 1e6
    samples = [latency for beat in beats for latency in beat.latencies]
    trial.latency = {**quantiles(samples), "samples": len(samples)}
    trial.acknowledged = last.acknowledged
    trial.rows = table.stored(connection, began).rows
    if trial.rows != trial.acknowledged:
        trial.findings = (f"{trial.rows:,} rows of {trial.acknowledged:,} acknowledged messages",)
    if compare and not keep:
        with readings.read_reference(place.settings, place.settings.data_dir, progress, start=start) as reference:
            progress("comparing", 0, 0)
            trial.findings += table.check(place.settings, reference, full=True).findings
        trial.compared = True
    if trial.problem is None:
        trial.problem = problem(rate, trial.acknowledged_per_second, trial.stored_per_second, trial.looks)
    return trial


def live(
    place: Place,
    sink: SinkKind,
    rate: int | None,
    seconds: int,
    changed: Mapping[str, Any],
    progress: ShowProgress,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Measure at a rate; or search the highest that holds, and measure at it and at half of it.

    Args:
        place: where it runs; its topic must be empty.
        sink: which one stores.
        rate: messages a second; None for the highest.
        seconds: that a measurement lasts.
        changed: the user's own changes of producer settings.
        progress: told how far it is.
        say: told each run's outcome.

    Returns:
        One JSON object.

    Raises:
        PipelineError: a part of the pipeline failed.
    """
    document = surroundings.describe(place)
    tried: list[Trial] = []
    measured: list[Trial] = []
    with sinking(place, sink) as (path, connection):

        def at(each: int, how_long: int, *, final: bool) -> Trial:
            trial = run(place, path, connection, each, how_long, progress, changed=changed, compare=final)
            (measured if final else tried).append(trial)
            say(line(trial))
            return trial

        if rate is not None:
            at(rate, seconds, final=True)
            held = None if measured[0].problem else rate
        else:
            short = min(seconds, TRIAL_SECONDS)
            held = highest(lambda each: at(each, short, final=False).problem is None, FIRST_RATE[sink])
            for _ in range(FINAL_TRIES):
                if at(held, seconds, final=True).problem is None:
                    break
                held = round(held * (1 - PRECISION))
            else:
                held = None
            if held is not None:
                at(held // 2, seconds, final=True)
        sizes = table.size(connection)
    document["settings"] |= {name.upper(): value for name, value in {**FAST, **changed}.items()}
    return {
        "bench": "live",
        "correct": not any(trial.findings for trial in measured + tried),
        "sink": sink,
        "workers": document["settings"]["SINK_WORKERS"] if sink == "copy" else None,
        "sustained_per_second": held,
        **document,
        "table": sizes,
        "runs": [asdict(trial) for trial in measured],
        "tried": [asdict(trial) for trial in tried],
    }


def line(trial: Trial) -> str:
    """One run for people."""
    latency = trial.latency.get("p99")
    text = (
        f"{trial.rate:,} messages/s: {trial.stored_per_second:,.0f} rows/s stored, "
        f"p99 {'not measured' if latency is None else f'{latency:.2f} s'}, "
    )
    text += "sustained" if trial.problem is None else f"not sustained: {trial.problem}"
    return text + "".join(f"; NOT EQUAL: {finding}" for finding in trial.findings)


def series(runs: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The lag over time of each run of a document, by its rate."""
    return {
        f"{item['rate']:,} messages/s": [(look["seconds"], float(look["lag"])) for look in item["looks"]]
        for item in runs
    }
