"""What becomes of speed and latency, and of the summaries' time, while the table grows.

The readings of all steps are those of one fleet whose clock goes on without a gap, so slowly that an hour, which is a partition, has about as
many readings as asked for; the last ones are taken before the benchmark begins. So a step stores into the partition that the step before
left half full, and goes over into the next one. What latency is measured by is of the present, and has a partition of its own.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from metrics_pipeline import kafka, partitions, postgres, retention, summaries
from metrics_pipeline.bench import layout as layouts
from metrics_pipeline.bench import live, readings, staging, surroundings, table
from metrics_pipeline.bench.layout import Layout
from metrics_pipeline.bench.live import catch_up, end_of
from metrics_pipeline.bench.paths import ConnectPath, CopyPath, DrainPath
from metrics_pipeline.bench.place import Place
from metrics_pipeline.bench.readings import Stream, Sum
from metrics_pipeline.bench.stopwatch import time_path
from metrics_pipeline.errors import InstallError, SettingError
from metrics_pipeline.local import account
from metrics_pipeline.local.budget import Budget
from metrics_pipeline.partitions import Partition
from metrics_pipeline.settings import Settings, SinkKind
from metrics_pipeline.verification.verify import ShowProgress

RATE: Final[Mapping[SinkKind, int]] = {"connect": 10_000, "copy": 20_000}
"""Messages a second while latency is measured: well below what the sink can store."""
WATCH_SECONDS: Final = 15
TICK_ROWS: Final = 1_000_000
"""New readings for which the summaries' tick is measured; half of a step when that is less."""
MOST_PARTITIONS: Final = 500
HOUR: Final = timedelta(hours=1)

ROW_BYTES: Final = 215
"""Of the table, its indexes and the summaries, for a reading of a large fleet."""
RECORD_BYTES: Final = 100
"""Of the topic, compressed."""
STAGED_BYTES: Final = 125
"""Of the staging table."""
SPARE_BYTES: Final = 2 * 2**30
"""Segments of the topic that are not deleted yet, logs, and what vacuum and sorting need for a while."""
MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class Plan:
    """How the table is to grow.

    Attributes:
        sink: which one stores.
        rows: at the end, not counting those that latency is measured by.
        steps: how many.
        layout: of the table.
        partition_rows: about how many readings an hour has, which is a partition.
        keep_rows: so many stay at least when the oldest partitions are dropped after each step; 0: all stay.
    """

    sink: SinkKind
    rows: int
    steps: int
    layout: Layout = "partitioned"
    partition_rows: int = 10_000_000
    keep_rows: int = 0

    @property
    def chunk(self) -> int:
        """Readings of a step."""
        return self.rows // self.steps

    @property
    def few(self) -> int:
        """Of these, those that the tick is measured for."""
        return min(TICK_ROWS, self.chunk // 2)

    def check(self, settings: Settings) -> None:
        """See whether it can be done.

        Raises:
            SettingError: it cannot.
        """
        if self.layout == "staging" and self.sink != "copy":
            raise SettingError("--layout staging is of the COPY sink: give --sink copy, too")
        if self.layout == "plain" and self.keep_rows:
            raise SettingError("--keep-rows: a plain table has no partitions that could be dropped: leave it out")
        if self.rows > MOST_PARTITIONS * self.partition_rows:
            raise SettingError(
                f"--partition-rows {self.partition_rows}: makes more than {MOST_PARTITIONS} partitions: give a greater number"
            )
        if self.partition_rows < readings.mean_round(settings):
            raise SettingError(
                f"--partition-rows {self.partition_rows}: is less than one round of the producer: give a greater number, "
                "or a smaller PRODUCER_MAX_METRICS"
            )

    def round(self, settings: Settings) -> timedelta:
        """How far the simulated clock moves from round to round."""
        return HOUR * (readings.mean_round(settings) / self.partition_rows)

    def begin(self, settings: Settings, now: datetime) -> datetime:
        """When the clock begins, so that all readings are taken before now."""
        return now - self.round(settings) * readings.rounds_of(settings, self.rows)

    def needed(self, settings: Settings) -> int:
        """About how many bytes of disk it takes, until the producer would stop (DISK_FREE_LIMIT_GB)."""
        watched = self.steps * RATE[self.sink] * (WATCH_SECONDS + 5)
        wal = int(Budget.of(settings).postgres["max_wal_size"].removesuffix("MB")) * MIB
        # The records of a step are deleted while those of the next one are there.
        most = self.rows
        if self.keep_rows:
            most = min(most, self.keep_rows + self.partition_rows + self.chunk)
        table = (most + watched) * ROW_BYTES + 2 * self.chunk * RECORD_BYTES
        staged = self.chunk * STAGED_BYTES if self.layout == "staging" else 0
        return table + staged + wal + SPARE_BYTES + int(settings.disk_free_limit_gb * 2**30)

    def largest(self, settings: Settings, free: int) -> int:
        """About how many rows fit into so many bytes of disk, in as many steps."""
        fixed = replace(self, rows=0).needed(settings)
        each = (self.needed(settings) - fixed) / self.rows
        return max(0, int((free - fixed) / each))


def check_disk(plan: Plan, settings: Settings, free: int | None = None) -> None:
    """Refuse what the disk has no room for, before anything is started.

    Args:
        plan: what is to be stored.
        settings: of the sizes.
        free: bytes there are; default: where temporary files go, and PostgreSQL's data when that is another place.

    Raises:
        InstallError: it has not enough.
    """
    folder = Path(tempfile.gettempdir())
    if free is None:
        # Another account's PostgreSQL cannot reach a temporary folder of ours.
        shared = next(place for place in (account.SHARED_STATE, *account.SHARED_STATE.parents) if place.exists())
        places = [folder, shared] if account.unprivileged() else [folder]
        free, folder = min((shutil.disk_usage(place).free, place) for place in places)
    needed = plan.needed(settings)
    if needed > free:
        raise InstallError(
            f"{plan.rows:,} rows in {plan.steps} steps need about {needed / 2**30:.0f} GiB of disk, and {folder} has {free / 2**30:.0f} GiB: "
            f"give --rows {max(10_000, plan.largest(settings, free) // 100_000 * 100_000)}, --keep-rows, a TMPDIR on another disk, or a lower "
            f"DISK_FREE_LIMIT_GB ({settings.disk_free_limit_gb:g})"
        )


@dataclass(frozen=True, slots=True)
class Tick:
    """One tick of the summaries.

    Attributes:
        rows: new readings that it added.
        seconds: that it took.
        folded: whether it brought what was put by into the slots of the devices, which is done once in several ticks.
    """

    rows: int
    seconds: float
    folded: bool


@dataclass(frozen=True, slots=True)
class Step:
    """What was measured while the table grew to one size.

    Attributes:
        stored: rows so far at the end of the step.
        rows: of these, those in the table while it was measured.
        rows_per_second: while the greater part of the step was drained.
        cpu: microseconds of CPU a row by part meanwhile.
        latency: seconds from acknowledged to visible, at `rate` messages a second.
        rate: messages a second meanwhile.
        tick: the summaries' for a number of new readings that is the same at each size.
        ticks: all of the step: for the greater part of it, that one, and for what latency was measured by.
        tick_us_per_row: microseconds a new reading of all of them.
        heap_bytes: of the table.
        index_bytes: of its indexes.
        summary_bytes: of the tables that the summaries are kept in.
        staging_bytes: of the largest staging table that was moved so far; 0 without.
        dropped_rows: of the partitions that were dropped afterwards.
        drop_seconds: that this took, without the comparison.
    """

    stored: int
    rows: int
    rows_per_second: float
    cpu: dict[str, float]
    latency: dict[str, float | int | None]
    rate: int
    tick: Tick
    ticks: tuple[Tick, ...]
    tick_us_per_row: float
    heap_bytes: int
    index_bytes: int
    summary_bytes: int
    staging_bytes: int
    dropped_rows: int = 0
    drop_seconds: float = 0.0


class Growth:
    """A table that grows in equal steps, measured at each.

    Args:
        place: where it runs; its topic must be empty.
        plan: how far.
        changed: the user's own changes of producer settings.
        progress: told how far it is.
        connection: of the superuser, autocommit, to the database of the readings.
        counter: where the topic's records are summed up, beside what fills it.
    """

    def __init__(
        self,
        place: Place,
        plan: Plan,
        changed: Mapping[str, Any],
        progress: ShowProgress,
        connection: postgres.Connection,
        counter: ProcessPoolExecutor,
    ) -> None:
        self._place = place
        self._plan = plan
        self._changed = changed
        self._progress = progress
        self._connection = connection
        self._counter = counter
        settings = place.settings
        now = datetime.now(UTC)
        begin = plan.begin(settings, now)
        self._connector = f"bench-{now:%H%M%S}-growth"
        table.empty(connection)
        table.activate(connection, "connect")
        if place.temporary and place.layout != "plain":
            layouts.begin_at(settings, begin)
        self._low = _ends(settings)
        table.start_sink_at(connection, self._low)
        self._stream = Stream(settings, begin, plan.round(settings))
        self._expected = summaries.ingestion_rate(settings).rows
        self._counted = Sum()
        self._dropped = Sum()
        self._counting: tuple[Mapping[int, int], Future[Sum]] | None = None
        self.problems: list[str] = []

    def step(self, number: int) -> Step:
        """Let it grow once, and measure."""
        place, plan, connection = self._place, self._plan, self._connection
        name = f"step {number} of {plan.steps}"
        much = plan.chunk - plan.few
        self._fill(much)
        self._settle_count()
        table.settle(connection)
        target = end_of(place)

        def show(passed: int) -> None:
            self._progress(f"{name}: storing", max(0, much - (target - passed)), much)

        timed = time_path(place, connection, self._path(), target, show)
        self._progress(f"{name}: the summaries", 0, 0)
        ticks = [self._tick(timed.rows)]
        watched = self._path()
        try:
            watched.start()
            self._fill(plan.few)
            catch_up(watched, end_of(place), lambda left: self._progress(f"{name}: {left:,} records to store", 0, 0))
            ticks.append(self._tick(plan.few))
            trial = live.run(
                place,
                watched,
                connection,
                RATE[plan.sink],
                WATCH_SECONDS,
                self._progress,
                changed=self._changed,
                keep=True,
            )
        finally:
            watched.stop()
        ticks.append(self._tick(trial.rows))
        if timed.rows != much:
            self.problems.append(f"{name}: {timed.rows:,} rows of {much:,} records")
        if trial.rows != trial.acknowledged:
            self.problems.append(f"{name}: {trial.rows:,} rows of {trial.acknowledged:,} acknowledged messages")
        self._begin_to_count()
        step = Step(
            stored=self._expected + self._dropped.count,
            rows=self._expected,
            rows_per_second=timed.rows_per_second,
            cpu=timed.cpu,
            latency=trial.latency,
            rate=RATE[plan.sink],
            tick=ticks[1],
            ticks=tuple(ticks),
            tick_us_per_row=sum(tick.seconds for tick in ticks) * 1e6 / max(1, sum(tick.rows for tick in ticks)),
            **table.size(connection),
            summary_bytes=table.summary_size(connection),
            staging_bytes=staging.most_bytes(connection) if plan.layout == "staging" else 0,
        )
        return self._drop(step) if plan.keep_rows else step

    def compare(self) -> None:
        """Compare the table, and what was dropped of it, with all records that were in the topic, by their checksums."""
        self._settle_count()
        expected = self._counted
        found = self._dropped + table.sum_of(
            self._place.settings, lambda rows: self._progress("comparing with the topic", rows, expected.count)
        )
        self.problems += table.differences(found, expected)

    def _drop(self, step: Step) -> Step:
        """Drop the oldest partitions that are more than is to stay; what is in them is summed up before."""
        settings, gone, seconds = self._place.settings, Sum(), 0.0
        over = self._stream.now - self._plan.round(settings)
        for partition in partitions.listed(self._connection)[1:]:
            if (
                partition.high is None
                or partition.high > over
                or self._expected - partition.rows < self._plan.keep_rows
            ):
                break
            sums: list[Sum] = []

            def keep(partition: Partition, sums: list[Sum] = sums) -> None:
                self._progress(f"comparing {partition.name} before it goes", 0, 0)
                begun = time.monotonic()
                # The only one that is left of that time.
                sums.append(table.sum_of(settings, before=partition.high))
                nonlocal seconds
                seconds -= time.monotonic() - begun

            begun = time.monotonic()
            dropped = retention.drop(settings, partition, keep)
            seconds += time.monotonic() - begun
            if dropped.rows != sums[-1].count:
                self.problems.append(f"{partition.name}: {dropped.rows:,} rows were dropped of {sums[-1].count:,}")
            gone += sums[-1]
            self._expected -= dropped.rows
        self._dropped += gone
        return replace(step, dropped_rows=gone.count, drop_seconds=seconds)

    def _path(self) -> DrainPath:
        workers = self._place.settings.sink_workers
        if self._plan.layout == "staging":
            return staging.StagingPath(self._place, workers)
        if self._plan.sink == "copy":
            return CopyPath(self._place, workers)
        return ConnectPath.ours(self._place, self._connector)

    def _fill(self, count: int) -> None:
        readings.fill(self._place.settings, self._stream.take(count), count, self._progress)

    def _begin_to_count(self) -> None:
        stop = _ends(self._place.settings)
        self._counting = stop, self._counter.submit(readings.sum_of, self._place.settings, self._low, stop)
        self._low = stop

    def _settle_count(self) -> None:
        """Wait for what is known of the records of the step before, and let go of them."""
        if self._counting is not None:
            stop, counting = self._counting
            self._counted += counting.result()
            readings.delete_before(self._place.settings, stop)
            self._counting = None

    def _tick(self, rows: int) -> Tick:
        """One tick, which is to add so many readings."""
        before = self._pending()
        begun = time.monotonic()
        total = summaries.ingestion_rate(self._place.settings).rows
        seconds = time.monotonic() - begun
        self._expected += rows
        if total != self._expected:
            self.problems.append(f"the summaries know {total:,} readings, expected {self._expected:,}")
        return Tick(rows, seconds, folded=self._pending() < max(1, before))

    def _pending(self) -> int:
        (pending,) = self._connection.execute("SELECT pending FROM summary_state").fetchone() or (0,)
        return int(pending)


def growth(
    place: Place,
    plan: Plan,
    changed: Mapping[str, Any],
    progress: ShowProgress,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Let the table grow in equal steps, and measure at each.

    Args:
        place: where it runs; its topic must be empty.
        plan: how far.
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
    begun = time.monotonic()
    with (
        postgres.connect_admin(settings, settings.metrics_database) as connection,
        # Spawned, not forked: librdkafka and libpq do not survive a fork.
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as counter,
    ):
        grown = Growth(place, plan, changed, progress, connection, counter)
        steps = []
        for number in range(1, plan.steps + 1):
            steps.append(grown.step(number))
            say(line(steps[-1]))
        grown.compare()
        held = layouts.filled(connection, place.layout)
        if place.temporary:
            document["layout"] = layouts.described(connection, place.layout, layouts.WIDTH)
    return {
        "bench": "growth",
        "correct": not grown.problems,
        "problems": grown.problems,
        "sink": plan.sink,
        "rows": plan.rows,
        "partition_rows": plan.partition_rows,
        "keep_rows": plan.keep_rows,
        **document,
        "seconds": time.monotonic() - begun,
        "partitions": held,
        "steps": [asdict(step) for step in steps],
    }


def _ends(settings: Settings) -> dict[int, int]:
    return {number: high for number, (_, high) in kafka.watermarks(settings).items()}


def line(step: Step) -> str:
    """One step for people."""
    p99 = step.latency.get("p99")
    return (
        f"{step.stored:,} rows: {step.rows_per_second:,.0f} rows/s, "
        f"p99 {'not measured' if p99 is None else f'{p99:.2f} s'} at {step.rate:,} messages/s, "
        f"tick {step.tick.seconds:.2f} s for {step.tick.rows:,} new rows{' with a fold' if step.tick.folded else ''}, "
        f"{step.tick_us_per_row:.1f} µs a row of all ticks"
        + (f"; dropped {step.dropped_rows:,} rows in {step.drop_seconds:.2f} s" if step.dropped_rows else "")
    )
