"""How fast each path drains the same records into an empty table, in rounds that take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from metrics_pipeline import postgres
from metrics_pipeline.bench import paths, readings, surroundings, table
from metrics_pipeline.bench.figures import Spread, ratio_of_medians, ratios
from metrics_pipeline.bench.paths import DrainPath
from metrics_pipeline.bench.place import Place
from metrics_pipeline.bench.readings import Reference
from metrics_pipeline.bench.stopwatch import Timed, time_path
from metrics_pipeline.bench.table import Checked
from metrics_pipeline.errors import SettingError
from metrics_pipeline.topic import TopicReader
from metrics_pipeline.verification.verify import ShowProgress

BASES: Final = ("limit-1", "limit-2", "connect", "connect-baseline")
"""What the others are divided by."""

BAD: Final = "-bad"
"""Ends the name of a path in the rounds with bad records among the good ones."""

MakePath = Callable[[Place, str, str, Reference], DrainPath]


@dataclass(frozen=True, slots=True)
class Run:
    """One path in one round.

    Attributes:
        path: the path's name.
        round: from 1.
        timed: what it took.
        checked: how the table compared with the topic afterwards.
    """

    path: str
    round: int
    timed: Timed
    checked: Checked


@dataclass
class Drain:
    """All rounds of a benchmark.

    Attributes:
        records: in the topic.
        rounds: that were asked for.
        paths: in the order of the first round.
        surroundings: see `surroundings.describe`.
        bad_every: one in as many records is bad in the rounds of the paths that end in `-bad`; 0 for no such rounds.
        runs: in the order in which they were made.
        table: sizes of the full table, in bytes.
    """

    records: int
    rounds: int
    paths: tuple[str, ...]
    surroundings: dict[str, Any]
    bad_every: int = 0
    runs: list[Run] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        """Whether the table equalled the topic after every round."""
        return bool(self.runs) and all(run.checked.equal for run in self.runs)

    def rates(self) -> dict[str, list[float]]:
        """Rows a second by path, in the order of the rounds."""
        by_path: dict[str, list[float]] = {path: [] for path in self.paths}
        for run in self.runs:
            by_path[run.path].append(run.timed.rows_per_second)
        return {path: rates for path, rates in by_path.items() if rates}

    def document(self) -> dict[str, Any]:
        """Everything as one JSON object."""
        rates = self.rates()
        return {
            "bench": "drain",
            "correct": self.correct,
            "records": self.records,
            "rounds": self.rounds,
            "bad_every": self.bad_every,
            **self.surroundings,
            "table": {"rows": self.records, **self.table},
            "paths": {path: self._summary(path, own) for path, own in rates.items()},
            "ratios": {base: ratio_of_medians(rates, base) for base in BASES if base in rates},
            "ratios_within_rounds": {
                base: {path: asdict(spread) for path, spread in ratios(rates, base).items()}
                for base in BASES
                if base in rates
            },
            "ratios_with_bad_records": {
                path: ratio_of_medians(rates, path)[path + BAD] for path in rates if path + BAD in rates
            },
            "runs": [
                {
                    "path": run.path,
                    "round": run.round,
                    **asdict(run.timed),
                    "rows_per_second": run.timed.rows_per_second,
                    "check": asdict(run.checked),
                }
                for run in self.runs
            ],
        }

    def _summary(self, path: str, rates: list[float]) -> dict[str, Any]:
        own = [run.timed for run in self.runs if run.path == path]
        parts = sorted({part for timed in own for part in timed.cpu})
        return {
            "rows_per_second": asdict(Spread.of(rates)),
            "seconds": asdict(Spread.of([timed.seconds for timed in own])),
            "cpu_us_per_row": {
                part: Spread.of([timed.cpu[part] for timed in own if part in timed.cpu]).median for part in parts
            },
            "rows_per_transaction": Spread.of([timed.rows / timed.transactions for timed in own]).median,
        }


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The paths of these names.

    Raises:
        SettingError: there is no such path, or one stands there twice.
    """
    for name in names:
        if not paths.is_known(name):
            raise SettingError(
                f"--paths {name}: there is no such path; there are connect, connect-baseline, "
                "copy-N with N workers and limit-N with N connections"
            )
    if len(set(names)) != len(names) or not names:
        raise SettingError(f"--paths {','.join(names)}: name each path once")
    return tuple(names)


def order(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number` (from 0): each path is first, second and so on about equally often."""
    turn = number % len(names)
    return [*names[turn:], *names[:turn]]


def drain(
    place: Place,
    records: int,
    rounds: int,
    names: Sequence[str],
    progress: ShowProgress,
    say: Callable[[str], None] = lambda _line: None,
    make: MakePath = paths.make,
    bad_every: int = 0,
) -> Drain:
    """Fill the topic once, then let each path drain it into an empty table, `rounds` times.

    The table is compared with the topic after each run: key by key after a path's first, by a checksum over all keys,
    values and tags after the others. A difference does not stop the benchmark; the result says so.

    Args:
        place: where it runs; its topic must be empty.
        records: to publish.
        rounds: of every path.
        names: of the paths.
        progress: told how far it is.
        say: told each run's rate.
        make: makes a path; replaced by tests.
        bad_every: when not 0, the topic is then filled again with one bad record in as many, and the COPY sink's paths
            drain that, too: no other path isolates a bad record.

    Raises:
        PipelineError: a part of the pipeline failed.
    """
    settings = place.settings
    baseline = "connect-baseline" in names
    if baseline:
        readings.make_baseline_topic(settings)
    result = Drain(records, rounds, tuple(names), surroundings.describe(place), bad_every)
    stamp = datetime.now(UTC)
    try:
        simulated = readings.simulated(settings, records, stamp)
        readings.fill(settings, simulated, records, progress, baseline=baseline)
        with readings.read_reference(
            settings, settings.data_dir, progress, batch_rows=settings.sink_flush_rows
        ) as reference:
            _take_turns(place, result, names, reference, progress, say, make)
    finally:
        if baseline:
            readings.drop_baseline_topic(settings)
    if copying := [name for name in names if bad_every and name.startswith("copy-")]:
        result.paths += tuple(name + BAD for name in copying)
        readings.empty_topic(settings)
        rounds_of_them = readings.spoilt(readings.simulated(settings, records, stamp), bad_every)
        readings.fill(settings, rounds_of_them, records, progress)
        bad = -(-records // bad_every)
        with readings.read_reference(settings, settings.data_dir, progress, bad=bad) as reference:
            _take_turns(place, result, copying, reference, progress, say, make, suffix=BAD)
    return result


def _take_turns(
    place: Place,
    result: Drain,
    names: Sequence[str],
    reference: Reference,
    progress: ShowProgress,
    say: Callable[[str], None],
    make: MakePath,
    suffix: str = "",
) -> None:
    settings = place.settings
    with postgres.connect_admin(settings, settings.metrics_database) as connection:
        for number in range(result.rounds):
            for name in order(names, number):
                label = name + suffix
                progress(f"preparing {label}", 0, 0)
                table.empty(connection)
                table.activate(connection, "connect")
                table.start_sink_at(connection, reference.low)
                path = make(place, name, f"bench-{datetime.now(UTC):%H%M%S}-{name}-{number + 1}", reference)
                target = sum(high for _, high in TopicReader(settings, path.topic).ends().values())
                first = target - result.records

                def show(passed: int, label: str = label, number: int = number, first: int = first) -> None:
                    progress(f"round {number + 1} of {result.rounds}: {label}", max(0, passed - first), result.records)

                timed = time_path(place, connection, path, target, show)
                progress(f"comparing after {label}", 0, 0)
                known = any(run.path == label for run in result.runs)
                checked = table.check(settings, reference, full=not known)
                result.runs.append(Run(label, number + 1, timed, checked))
                if not suffix:
                    result.table = table.size(connection)
                say(_line(result.runs[-1]))


def _line(run: Run) -> str:
    verdict = "equal to the topic" if run.checked.equal else f"NOT EQUAL: {'; '.join(run.checked.findings)}"
    return f"round {run.round}, {run.path}: {run.timed.rows_per_second:,.0f} rows/s, {verdict}"
