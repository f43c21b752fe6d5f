"""What is done to the COPY sink, and what must be true afterwards.

Each scenario returns an `Outcome`; one that did not come about as meant (nobody died inside a transaction, nothing was
delivered twice, no load) is a problem, too: its result would say nothing.
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import psutil
import psycopg
from confluent_kafka import KafkaError, Producer

from metrics_pipeline import kafka
from metrics_pipeline.bench.readings import simulated
from metrics_pipeline.copy_sink.failpoint import PLACES
from metrics_pipeline.metric import Reading, encode
from metrics_pipeline.producer.publisher import producer_config
from metrics_pipeline.settings import TOPIC, Settings
from metrics_pipeline.verification.verify import VerifyReport, verify
from metrics_pipeline_tests.chaos import sink as chaos_sink
from metrics_pipeline_tests.chaos.processes import SINK, Load, Sink, VoidError, until
from metrics_pipeline_tests.chaos.proxy import Proxy
from metrics_pipeline_tests.chaos.stack import Place
from metrics_pipeline_tests.patience import patience

IN_TRANSACTION: Final = PLACES[PLACES.index("locked") : PLACES.index("committing") + 1]
RATE: Final = 6000
"""Readings a second: enough for a batch at each flush."""
MEMORY_LIMIT: Final = 500_000_000
"""Bytes that a worker may use at its peak."""
BIG: Final = 1_000_000
"""Bytes of a big message's value: about the most that a broker takes as it comes."""


@dataclass
class Outcome:
    """What a scenario found.

    Attributes:
        facts: figures by name, for people.
        problems: what must not be; empty when all is well.
        report: what `verify` said in the end.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    report: VerifyReport = field(default_factory=VerifyReport)

    def require(self, condition: object, problem: str) -> None:
        """Note a problem unless the condition holds."""
        if not condition:
            self.problems.append(problem)

    def settle(self, place: Place, sink: Sink | None = None) -> None:
        """Let a sink store what is left, one that nobody disturbs unless another is given, and compare table and topic."""
        with ExitStack() as stack:
            if sink is None:
                # In a group of its own, which has no dead members to wait for.
                stack.enter_context(Sink(place, CHAOS_GROUP=f"chaos-{uuid4()}"))
            self.compare(place)

    def compare(self, place: Place) -> None:
        """Compare table and topic, once the active sink has stored what is left."""
        self.report = verify(place.settings, timeout=patience(120))
        report, counts = self.report, self.report.counts
        self.facts |= {"records": report.records, "rows": report.rows, "verify": report.lines()[0]}
        if not report.clean:
            self.problems += ["verify is NOT CLEAN", *report.lines()[1:]]
        good = report.records - report.tombstones - sum(report.undecodable.values()) - counts.rejected
        self.require(report.rows == good, f"{report.rows:,} rows for {good:,} keys")
        self.require(report.records > 0, "void: the topic is empty")


class _Postgres:
    """What PostgreSQL counts and logs, from now on."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._log = place.logs / "postgres.log"
        self._begin = self._log.stat().st_size
        self._before = self._counts()

    def _counts(self) -> tuple[int, int]:
        # Sessions hand in their counts about once a second.
        time.sleep(1.2)
        which = "FROM pg_stat_database WHERE datname = current_database()"
        one = self._place.one
        return int(one(f"SELECT deadlocks {which}")), int(one(f"SELECT xact_rollback {which}"))

    def counted(self) -> tuple[int, int]:
        """How many deadlocks there were, and how many transactions were rolled back."""
        now = self._counts()
        return now[0] - self._before[0], now[1] - self._before[1]

    def broken_off(self) -> int:
        """How many clients of the sink went away with a transaction open."""
        with self._log.open("rb") as file:
            file.seek(self._begin)
            lines = file.read().decode(errors="replace").splitlines()
        return sum("metrics-pipeline sink" in line and "with an open transaction" in line for line in lines)


def crashes(
    place: Place,
    kills: int = 5,
    *,
    workers: int = 2,
    places: Sequence[str] = PLACES,
    module: str = SINK,
    session_ms: int | None = None,
    rate: int = RATE,
    seconds: float = 1800,
) -> Outcome:
    """Workers kill themselves under load at each of the places.

    Args:
        place: where.
        kills: how many must die at each place.
        workers: of the sink.
        places: names of failpoints.
        module: the sink's entry point.
        session_ms: after which the group gives up a dead worker; None for the sink's own.
        rate: readings a second.
        seconds: the longest that it may take.
    """
    outcome, notes = Outcome(), _notes(place, "crashes")
    postgres = _Postgres(place)
    variables = {"CHAOS_FOLDER": str(notes), "CHAOS_PLACES": ",".join(places)}
    with Load(place, rate) as load:
        with Sink(place, workers, module=module, session_ms=session_ms, **variables) as sink:

            def enough() -> bool:
                load.check()
                dead = chaos_sink.deaths(notes)
                return all(dead[name] >= kills for name in places)

            outcome.facts["seconds"] = round(until(enough, seconds, f"{kills} deaths at each of {places}", 0.3), 1)
            time.sleep(0.5)
            status = sink.status()
            sink.kill()
        dead = chaos_sink.deaths(notes)
    deadlocks, rollbacks = postgres.counted()
    again, broken_off = chaos_sink.delivered_again(notes), postgres.broken_off()
    outcome.facts |= {
        "kills": {name: dead[name] for name in places},
        "workers replaced": status["restarts"],
        "died inside a transaction, by the log": broken_off,
        "transactions rolled back": rollbacks,
        "records delivered again": again,
        "batches by path": status["batches"],
        "deadlocks": deadlocks,
    }
    outcome.require(again > 0, "void: no record was delivered again")
    if set(places) & set(IN_TRANSACTION):
        outcome.require(broken_off > 0, "void: PostgreSQL saw nobody die inside a transaction")
    outcome.require(
        0 <= sum(dead.values()) - status["restarts"] <= workers,
        f"{sum(dead.values())} workers killed themselves, and {status['restarts']} were replaced",
    )
    outcome.settle(place)
    return outcome


def restarts(place: Place, times: int = 3, *, bound: float = 60, rate: int = RATE) -> Outcome:
    """PostgreSQL is shut down at once and the broker killed, under load, again and again; the sink's processes stay.

    Args:
        place: where.
        times: how often each of them.
        bound: seconds in which readings must be stored again.
        rate: readings a second.
    """
    outcome, waited = Outcome(), []
    with Load(place, rate) as load, Sink(place).ready() as sink:
        progress(place, bound)
        for name, number in [("postgres", signal.SIGQUIT), ("broker", signal.SIGKILL)] * times:
            load.check()
            place.kill(name, number)
            waited.append((name, round(progress(place, bound), 1)))
            time.sleep(1 + random.random())
        load.check()
        load.end()
        status = sink.status()
        outcome.settle(place, sink)
        outcome.facts |= {
            "seconds to go on": waited,
            "retries": status["retries"],
            "batches by path": status["batches"],
            "workers replaced": status["restarts"],
        }
        outcome.require(status["restarts"] == 0, f"{status['restarts']} workers ended")
        outcome.require(sum(status["retries"].values()) > 0, "void: no attempt failed")
        outcome.require(sink.end() == 0, "the sink did not end as asked")
    return outcome


def comings_and_goings(
    place: Place, seconds: float = 120, *, period: float = 4, session_ms: int | None = None, rate: int = RATE
) -> Outcome:
    """Of two workers one is killed and another one added, every few seconds, under load; each is a process of its own."""
    outcome, postgres, killed = Outcome(), _Postgres(place), 0
    with Load(place, rate) as load, ExitStack() as stack:

        def another() -> Sink:
            return stack.enter_context(Sink(place, 1, session_ms=session_ms))

        sinks = [another().ready(), another().ready()]
        progress(place, 60)
        at, end, moved = sum(place.offsets().values()), time.monotonic() + seconds, 0
        while time.monotonic() < end:
            began = time.monotonic()
            load.check()
            sinks.append(another().ready())
            sinks.pop(random.randrange(2)).kill()
            killed += 1
            time.sleep(max(0.0, period - (time.monotonic() - began)))
            now = sum(place.offsets().values())
            moved, at = moved + (now > at), now
        load.end()
        outcome.facts |= {
            "seconds": seconds,
            "killed and added": killed,
            "periods in which readings were stored": moved,
            "deadlocks": postgres.counted()[0],
            "died inside a transaction, by the log": postgres.broken_off(),
        }
        for one in sinks:
            one.kill()
    outcome.require(killed >= 2, "void: hardly anybody was killed")
    outcome.require(moved > 0, "nothing was stored meanwhile")
    outcome.require(outcome.facts["deadlocks"] == 0, f"{outcome.facts['deadlocks']} deadlocks")
    outcome.settle(place)
    return outcome


def zombies(place: Place, times: int = 3, *, session_ms: int = 10_000) -> Outcome:
    """A worker is stopped inside a transaction for longer than its session, and goes on when others have its partitions."""
    outcome = Outcome()
    bound = session_ms / 1000 + 30
    others, taken_over = [], []
    with Load(place, RATE) as load, Sink(place, session_ms=session_ms).ready() as sink:
        until(
            lambda: all(one["partitions"] for one in sink.status()["workers"]),
            patience(60),
            "both workers have partitions",
        )
        for _ in range(times):
            progress(place, 30)
            before = sink.status()
            victim, number = stopped_inside_a_transaction(place, sink)
            try:
                own, began = before["workers"][number]["partitions"], time.monotonic()
                at = place.offsets()
                rest = [partition for partition in at if partition not in own]
                others.append(round(_moved(place, at, rest, bound), 1))
                _moved(place, at, own, bound)
                taken_over.append(round(time.monotonic() - began, 1))
                # It must have been given up by the group before it wakes.
                time.sleep(max(0.0, session_ms / 1000 + 2 - (time.monotonic() - began)))
                load.check()
            finally:
                victim.resume()
            name = before["workers"][number]["name"]

            def sent_away(count: int = _sent_away(before)) -> bool:
                return _sent_away(sink.status()) > count

            until(sent_away, patience(30), "the worker that was stopped noticed what it had missed")

            def is_back(name: str = name) -> bool:
                return any(one["name"] == name and one["partitions"] for one in sink.status()["workers"])

            time.sleep(1.5)  # it may not have found out yet that its partitions are others' now
            until(is_back, patience(60), "the worker that was stopped has partitions again")
        load.end()
        status = sink.status()
        outcome.settle(place, sink)
    outcome.facts |= {
        "stopped inside a transaction": times,
        "seconds until the others stored again": others,
        "seconds until the zombie's partitions were stored": taken_over,
        "fenced": status["fenced"],
        "retries": status["retries"],
    }
    outcome.require(max(others) < 10, f"the other worker waited {max(others)} s for the one that was stopped")
    outcome.require(status["restarts"] == 0, f"{status['restarts']} workers ended")
    return outcome


def lost_replies(place: Place, cuts: int = 20) -> Outcome:
    """The line to PostgreSQL is cut around COMMIT, before it arrives or before its answer does; the counts stay exact."""
    outcome = Outcome()
    before = sum(high for _, high in kafka.watermarks(place.settings).values())
    outcome.require(sum(place.offsets().values()) == before, "void: the topic holds records that are not stored yet")
    with (
        closing(Proxy(place.settings.postgres_port)) as proxy,
        Load(place, RATE) as load,
        Sink(place, POSTGRES_PORT=str(proxy.port)).ready() as sink,
    ):

        def enough() -> bool:
            load.check()
            return min(proxy.before, proxy.after) >= cuts

        until(enough, 60 + 3 * cuts, f"{cuts} cuts on each side of COMMIT")
        proxy.cutting = False
        load.end()
        outcome.settle(place, sink)
        time.sleep(1)
        status = sink.status()
    stored = outcome.report.records - before
    outcome.facts |= {
        "cut before COMMIT": proxy.before,
        "cut after COMMIT": proxy.after,
        "records of this sink": stored,
        "rows it counted": status["rows"],
        "retries": status["retries"],
    }
    outcome.require(status["rows"] == stored, f"the sink counted {status['rows']:,} rows, and {stored:,} were stored")
    outcome.require(status["restarts"] == 0, f"{status['restarts']} workers ended")
    return outcome


def memory(place: Place, records: int = 10_000_000, big: int = 1_000) -> Outcome:
    """Two workers drain a topic in which there are big messages, good and bad ones, one by one and in a row.

    Args:
        place: where.
        records: readings of the usual size.
        big: messages of a megabyte.
    """
    outcome = Outcome()
    filled = _fill(place.settings, records, big)
    began = time.monotonic()
    with Sink(place).ready() as sink:
        end = sum(high for _, high in kafka.watermarks(place.settings).values())
        peaks: dict[str, int] = {}

        def drained() -> bool:
            peaks.update({str(one["pid"]): _peak(one["pid"]) for one in sink.status()["workers"]})
            return sum(place.offsets().values()) >= end

        until(drained, 120 + (records + 1000 * big) / 10_000, "the topic is drained", 0.5)
        seconds = time.monotonic() - began
        outcome.settle(place, sink)
        status = sink.status()
    outcome.facts |= {
        "messages": filled,
        "peak of each worker, MB": [round(peak / 1e6) for peak in peaks.values()],
        "records a second": round(filled / seconds),
        "rejected": status["rejected"],
        "batches by path": status["batches"],
    }
    outcome.require(max(peaks.values()) < MEMORY_LIMIT, f"a worker used {max(peaks.values()) / 1e6:,.0f} MB")
    outcome.require(len(peaks) == 2 and status["restarts"] == 0, "workers ended")
    outcome.require(sum(status["rejected"].values()) >= big // 2, "void: no big message was rejected")
    return outcome


# --- Parts of them -----------------------------------------------------------------------------------------------


def _notes(place: Place, name: str) -> Path:
    """A new folder for what a sink notes."""
    number = len(list(place.settings.data_dir.glob(f"{name}-*")))
    folder = place.settings.data_dir / f"{name}-{number}"
    folder.mkdir()
    return folder


def progress(place: Place, bound: float) -> float:
    """Wait until more is stored than now; the seconds that took."""
    at = sum(place.offsets().values())
    return until(lambda: sum(place.offsets().values()) > at, bound, "something is stored")


def _moved(place: Place, at: dict[int, int], partitions: Sequence[int], bound: float) -> float:
    def moved() -> bool:
        now = place.offsets()
        return all(now[partition] > at[partition] for partition in partitions)

    return until(moved, bound, f"readings of partitions {list(partitions)} are stored")


def stopped_inside_a_transaction(place: Place, sink: Sink, seconds: float = 120) -> tuple[psutil.Process, int]:
    """Stop a worker while it holds its rows of `sink_offsets`; which one."""
    deadline = time.monotonic() + seconds
    workers = sink.status()["workers"]
    numbers = {f"metrics-pipeline sink {worker['name']}": number for number, worker in enumerate(workers)}
    writing = (
        "SELECT application_name FROM pg_stat_activity WHERE application_name = ANY(%s) AND backend_xid IS NOT NULL"
    )
    inside = f"{writing} AND (state LIKE 'idle in%%' OR wait_event = 'ClientRead')"
    with psycopg.connect(place.settings.admin_url(place.settings.metrics_database), autocommit=True) as connection:
        while time.monotonic() < deadline:
            found = connection.execute(writing, [list(numbers)]).fetchall()
            if not found:
                time.sleep(0.002)
                continue
            (name,) = random.choice(found)
            process = psutil.Process(workers[numbers[name]]["pid"])
            process.suspend()
            time.sleep(0.1)  # what it had asked for is answered
            if connection.execute(inside, [[name]]).fetchall():
                return process, numbers[name]
            process.resume()
            time.sleep(random.uniform(0.01, 0.3))
    raise VoidError(f"no worker was met inside a transaction in {seconds:.0f} s")


def _sent_away(status: dict[str, Any]) -> int:
    """Attempts that failed because a session or a partition was somebody else's by then; 55P03 is a wait for a lock."""
    lost = sum(count for kind, count in status["retries"].items() if kind != "55P03")
    return int(status["fenced"]) + int(lost)


def _peak(pid: int) -> int:
    """The most memory that a process ever had, in bytes."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _fill(settings: Settings, records: int, big: int) -> int:
    """Publish readings with big messages among them, half of those in one go; how many messages."""
    config = producer_config(settings) | {
        "linger.ms": 50,
        "queue.buffering.max.messages": 200_000,
        "queue.buffering.max.kbytes": 128 << 10,
        "message.max.bytes": 1_048_588,
    }
    failed: list[KafkaError] = []

    def reported(error: KafkaError | None, _: object) -> None:
        if error is not None:
            failed.append(error)

    producer = Producer(config)
    published, messages = 0, _messages(settings, records, big)
    for batch in messages:
        published += len(batch)
        for key, value in batch:
            while True:
                try:
                    producer.produce(TOPIC, key=key, value=value, on_delivery=reported)
                    break
                except BufferError:
                    producer.poll(0.1)
        producer.poll(0)
    left = producer.flush(120)
    if left or failed:
        raise VoidError(f"{left} messages were not acknowledged, {len(failed)} failed: {failed[:1]}")
    return published


def _messages(settings: Settings, records: int, big: int) -> Iterator[list[tuple[bytes, bytes]]]:
    bulky, singles = _bulky(big), big // 2
    every = records // (singles + 1)
    done = given = 0
    # Long before any producer of this stack, whose fleet is the same.
    for readings in simulated(settings, records, datetime(2026, 1, 1, tzinfo=UTC)):
        before, done = done, done + len(readings)
        yield readings
        while given < singles and (given + 1) * every <= done:
            given += 1
            yield [next(bulky)]
        if before < records // 2 <= done:
            for one in islice(bulky, big - singles):
                yield [one]


def _bulky(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Big messages: readings with an unknown field that long, which are good, and with tags that long, which are not.

    Half of both are of one letter, so that a fetch of a megabyte holds a hundred of them; the others can hardly be compressed.
    """
    device, start = UUID(int=0xB16), datetime(2026, 3, 1, tzinfo=UTC)
    noise = random.Random(6).randbytes(BIG // 2).hex().encode()
    for number in range(count):
        key, value = encode(Reading(device, start + timedelta(seconds=number), 10, float(number), ["size:big"]))
        length = BIG - len(value) - 20
        filler = noise[:length] if number // 2 % 2 else b"x" * length
        if number % 2:
            yield key, value[:-1] + b',"note":"' + filler + b'"}'
        else:
            yield key, value.replace(b"size:big", filler)
