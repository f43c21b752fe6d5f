"""A table whose partitions come, are archived and go under load, with readings of every time and everybody else at work, too."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from metrics_pipeline import partitions, postgres, retention, summaries
from metrics_pipeline.archive import checking, listing, restoring
from metrics_pipeline.archive.folder import ArchiveFolder
from metrics_pipeline.errors import BusyError, ServiceError
from metrics_pipeline.settings import SinkKind
from metrics_pipeline.verification.verify import VerifyReport, verify
from metrics_pipeline_tests.chaos import jobs
from metrics_pipeline_tests.chaos.meanwhile import TICK_SECONDS, LongSession, Meanwhile, Stream, Ticks
from metrics_pipeline_tests.chaos.memory import Memory
from metrics_pipeline_tests.chaos.processes import Child, Load, Repair, Sink, VoidError, until
from metrics_pipeline_tests.chaos.scenarios import Outcome, progress
from metrics_pipeline_tests.chaos.stack import Place
from metrics_pipeline_tests.chaos.stored import files, stored
from metrics_pipeline_tests.chaos.waits import LONGEST, Waits

RATE: Final[Mapping[SinkKind, int]] = {"connect": 5_000, "copy": 20_000}
"""Readings a second: for the COPY sink those of a producer as it comes; for Kafka Connect what two cores have room for beside all the rest."""
FLEET: Final = {"PRODUCER_FLEET_SIZE": 2_000, "PRODUCER_MIN_DEVICES": 200, "PRODUCER_MAX_DEVICES": 800}


def ageing(place: Place, seconds: float = 600) -> Outcome:
    """Partitions of a minute are made, archived and dropped under load, and one is brought back: nobody waits, nothing is lost.

    Args:
        place: where, with either sink.
        seconds: how long.
    """
    minutes = max(1, round(seconds / 200))
    own = {
        "METRICS_PARTITION": "minute",
        "METRICS_RETENTION": f"{minutes}m",
        "METRICS_ARCHIVE": str(place.settings.data_dir / "archive"),
    }
    archive = {"metrics_archive": Path(own["METRICS_ARCHIVE"])}
    settings = place.settings.model_copy(update={name.lower(): value for name, value in own.items()} | archive)
    place = replace(place, settings=settings, environment={**place.environment, **own})
    _begin(place)
    return _Ageing(place, seconds).run()


def _begin(place: Place) -> None:
    """Let the partitions of an empty table begin now: otherwise there would be one for each minute since midnight."""
    begin = datetime.now(UTC).replace(second=0, microsecond=0).isoformat()
    with postgres.connect(place.settings, "metrics_owner", autocommit=True) as owner, owner.transaction():
        for name, low, high in (("before", "MINVALUE", f"'{begin}'"), ("after", f"'{begin}'", "MAXVALUE")):
            owner.execute(f"ALTER TABLE metrics DETACH PARTITION metrics_{name}".encode())
            attach = f"ALTER TABLE metrics ATTACH PARTITION metrics_{name} FOR VALUES FROM ({low}) TO ({high})"
            if name == "before":
                waiting = attach
            else:
                owner.execute(waiting.encode())
                owner.execute(attach.encode())
    partitions.make(place.settings)
    summaries.ingestion_rate(place.settings)


class _Ageing:
    """One run of the scenario."""

    def __init__(self, place: Place, seconds: float) -> None:
        self.place, self.seconds = place, seconds
        self.settings = place.settings
        self.copies = place.settings.sink == "copy"
        self.outcome = Outcome()
        self.memory = Memory(place)
        self.reports: list[tuple[float, VerifyReport]] = []
        self.red: dict[str, float] = {}
        self.restored: tuple[str, int] | None = None

    def run(self) -> Outcome:
        outcome, place = self.outcome, self.place
        rate = RATE[self.settings.sink]
        with ExitStack() as stack:
            children = {name: stack.enter_context(_job(place, name)) for name in jobs.JOBS}
            sink = stack.enter_context(Sink(place).ready()) if self.copies else None
            if not self.copies:
                children["repair"] = stack.enter_context(Repair(place, "keeper"))
            load = stack.enter_context(Load(place, rate, **FLEET))
            progress(place, 60) if self.copies else until(
                lambda: place.one("SELECT EXISTS (SELECT FROM metrics)"), 90, "stored"
            )
            waits = stack.enter_context(Waits(place))
            ticks = stack.enter_context(Ticks(self.settings))
            stream = stack.enter_context(Stream(place))
            session = stack.enter_context(LongSession(place))
            self._watch(load, children, sink, [ticks, stream, session])
            for thread in (session, stream, ticks):
                thread.__exit__(None, None, None)
            load.check()
            load.end()
            outcome.facts |= waits.facts(commits=self.copies)
            long = waits.logged()
            self._verify(self.seconds)
            for child in children.values():
                child.end()
        outcome.require(waits.longest <= LONGEST and not long, f"a statement of the sink waited longer: {long}")
        self._settled(ticks)
        outcome.facts |= {
            "readings a second": rate,
            "published besides": stream.counts,
            "transactions of the long session": session.ended,
            "ticks compared": ticks.compared,
            "longest tick, s": round(ticks.longest, 2),
        }
        outcome.require(ticks.compared >= self.seconds / 60, "void: hardly a tick was compared")
        outcome.problems += ticks.differences
        self._jobs()
        self.memory.judge(outcome)
        return outcome

    def _watch(self, load: Load, children: Mapping[str, Child], sink: Sink | None, threads: list[Meanwhile]) -> None:
        began, looked = time.monotonic(), 0.0
        moments = [self.seconds * part / 4 for part in (1, 2, 3)]
        while (now := time.monotonic() - began) < self.seconds:
            load.check()
            for name, child in children.items():
                if not child.alive():
                    raise VoidError(f"{name} ended with exit code {child.process.returncode}: {child.words()}")
            for thread in threads:
                thread.check()
            self.memory.look({"producer": load, **children}, sink)
            if now > looked + 5:
                looked = now
                self._drift()
                if now > self.seconds / 2 and self.restored is None:
                    self._restore()
            if moments and now > moments[0]:
                moments.pop(0)
                self._verify(now)
            time.sleep(0.5)

    def _drift(self) -> None:
        for name, found in (("ahead", partitions.missing(self.settings)), ("behind", retention.behind(self.settings))):
            if found:
                self.red[name] = self.red.get(name, 0) + 5
                self.outcome.facts[f"last that was red, {name}"] = found

    def _verify(self, now: float) -> None:
        report = verify(self.settings, timeout=120)
        self.reports.append((now, report))
        if not report.clean:
            self.outcome.problems += [f"verify after {now:.0f} s is NOT CLEAN", *report.lines()[1:]]

    def _restore(self) -> None:
        """Bring back a partition of which no reading was published again, after it had gone."""
        dropped = {name for run in jobs.notes(self.settings, "partitions") for name, _ in run.get("dropped", [])}
        chosen = [
            one
            for one in ArchiveFolder.of(self.settings).manifests()
            if one.partition in dropped and one.low and one.low.minute % 2 and one.sums.rows
        ]
        if not chosen:
            return
        archive, began = chosen[-1], time.monotonic()
        while True:
            try:
                restoring.restore(self.settings, archive)
                break
            except (BusyError, ServiceError) as error:
                if time.monotonic() - began > 120:
                    self.outcome.problems.append(f"{archive.name} was not restored: {error}")
                    return
                self.outcome.facts["restore was refused"] = str(error)
                time.sleep(1)
        self.restored = archive.name, archive.sums.rows
        self.outcome.facts["seconds to restore"] = round(time.monotonic() - began, 1)
        with stored(self.settings, "published_at >= %s AND published_at < %s", archive.low, archive.high) as found:
            lost = found.only_in(files(self.settings, archive), "stored")
        self.outcome.require(lost == 0, f"{lost:,} readings of {archive.name} are not in the table as they were")

    def _settled(self, ticks: Ticks) -> None:
        """When nothing comes any more, all is where it has to be."""
        outcome, settings = self.outcome, self.settings
        partitions.make(settings)
        with ExitStack() as stack:
            stack.enter_context(_job(self.place, "partitions"))
            until(lambda: not retention.behind(settings), 180, "retention has caught up", 2)
        outcome.require(not (found := partitions.missing(settings)), f"{found}")
        if self.restored is None:
            self._restore()
        ticks.tick()
        damages = checking.verify(ArchiveFolder.of(settings))
        outcome.problems += [str(damage) for damage in damages]
        report = outcome.report = verify(settings, timeout=120)
        outcome.require(report.clean, f"verify is NOT CLEAN in the end: {report.lines()[1:]}")
        archives = listing.listed(settings)
        with stored(settings, "true") as readings:
            # What the topic has and the table has not is what the archives have and the table has not.
            gone = readings.keys_only_in([path for one in archives for path in files(settings, one.archive)])
            differing = sum(
                readings.differing(files(settings, one.archive), one.archive)
                for one in archives
                if one.archive and one.table == "whole"
            )
        outcome.facts |= {
            "records": report.records,
            "rows": report.rows,
            "records expired": report.counts.expired,
            "readings in archives only": gone,
            "archives": len(archives),
            "compared with the table": sum(one.table == "whole" for one in archives),
        }
        outcome.require(
            gone == report.counts.expired, f"{report.counts.expired:,} records expired, archives have {gone:,}"
        )
        outcome.require(not differing, f"{differing:,} readings differ between archives and table")
        outcome.require(gone > 0, "void: nothing was dropped")

    def _jobs(self) -> None:
        outcome = self.outcome
        for name in jobs.JOBS:
            runs = jobs.notes(self.settings, name)
            problems = [run["problem"] for run in runs if "problem" in run]
            outcome.facts[f"runs of {name}"] = (
                f"{len(runs)}, {len(problems)} failed, the longest took {max((run['seconds'] for run in runs), default=0)} s"
            )
            if problems:
                outcome.facts[f"why {name} failed"] = sorted(set(problems))[:5]
            outcome.require(len(problems) <= len(runs) / 4, f"{name} failed {len(problems)} times")
        runs = jobs.notes(self.settings, "partitions")
        dropped = [entry for run in runs for entry in run.get("dropped", [])]
        archived = [entry for run in jobs.notes(self.settings, "archive") for entry in run.get("archived", [])]
        outcome.facts |= {
            "partitions made": sum(len(run.get("made", [])) for run in runs),
            "archived on time": len(archived),
            "dropped": f"{len(dropped)} with {sum(rows for _, rows in dropped):,} readings",
            "restored": self.restored,
            "seconds red": self.red,
            "verify meanwhile": [
                f"after {at:.0f} s: {report.lines()[0]}, {report.counts.expired:,} expired"
                for at, report in self.reports
            ],
        }
        outcome.require(self.restored, "void: nothing was restored")
        outcome.require(not self.red.get("ahead"), "partitions were missing")
        outcome.require(self.red.get("behind", 0) <= self.seconds / 10, "retention was behind")


def _job(place: Place, name: str) -> Child:
    return Child(place, f"job-{name}", "metrics_pipeline_tests.chaos.jobs", name, **{jobs.TICK: str(TICK_SECONDS)})
