"""What is done to Kafka Connect and its repair, and what must be true afterwards: bad records, deaths in a quarantine, a sick database."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import psutil
import psycopg
from confluent_kafka import Producer

from metrics_pipeline import kafka
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.metric import Reading, encode
from metrics_pipeline.settings import TOPIC
from metrics_pipeline.sinks import active, connector
from metrics_pipeline.sinks.quarantine import PLACES, VARIABLE
from metrics_pipeline_tests.chaos import repairer
from metrics_pipeline_tests.chaos.processes import Load, Repair, VoidError, until
from metrics_pipeline_tests.chaos.scenarios import Outcome
from metrics_pipeline_tests.chaos.stack import Place

START: Final = datetime(2026, 4, 1, tzinfo=UTC)
RATE: Final = 20_000
"""Readings a second of a producer as it comes."""
BOUND: Final = 60.0
"""Seconds in which the sink has to go on by itself."""

Wire = tuple[bytes | None, bytes | None]
At = tuple[int, int]


def nul(number: int, device: UUID) -> Wire:
    """A reading with a NUL in a tag, which Connect hands on and PostgreSQL refuses."""
    key, value = encode(Reading(device, START + timedelta(microseconds=number), 10, 1.0, ["a:b"]))
    return key, value.replace(b"a:b", b"a\\u0000b")


def good(count: int, device: UUID, begin: int = 0) -> list[Wire]:
    """Readings of one device, one after the other."""
    return [
        encode(Reading(device, START + timedelta(days=1, microseconds=number), 10, float(number), ["good"]))
        for number in range(begin, begin + count)
    ]


def publish(place: Place, wires: Sequence[Wire], partition: int = -1) -> list[At]:
    """Publish messages; where each of them stands."""
    producer = Producer(kafka.client_config(place.settings) | {"linger.ms": 5, "message.max.bytes": 1_000_000})
    places: dict[int, At] = {}

    def delivered(at: int) -> Callable[[Any, Any], None]:
        def note(error: Any, message: Any) -> None:
            if error is not None:
                raise VoidError(f"a message was not acknowledged: {error}")
            places[at] = message.partition(), message.offset()

        return note

    for at, (key, value) in enumerate(wires):
        producer.produce(TOPIC, key=key, value=value, partition=partition, on_delivery=delivered(at))
        producer.poll(0)
    if producer.flush(60):
        raise VoidError("not all messages were acknowledged")
    return [places[at] for at in range(len(wires))]


def rejected(place: Place) -> dict[At, str]:
    """Where records stand that were rejected, and why."""
    with psycopg.connect(place.settings.admin_url(place.settings.metrics_database), autocommit=True) as connection:
        rows = connection.execute('SELECT partition, "offset", reason FROM rejected_metrics WHERE topic = %s', [TOPIC])
        return {(partition, offset): reason for partition, offset, reason in rows}


def _published(place: Place) -> int:
    return sum(high for _, high in kafka.watermarks(place.settings).values())


def _taken(place: Place) -> int:
    return int(place.one("SELECT coalesce(sum(rejected), 0) FROM quarantined_stretches"))


def passed(place: Place, places: Sequence[At]) -> bool:
    """Whether the connector is behind all of these."""
    with suppress(PipelineError):
        at = kafka.committed(place.settings)
        return all(at.get(partition, -1) > offset for partition, offset in places)
    return False


@contextmanager
def two_repairs(place: Place, **variables: str) -> Iterator[tuple[Repair, Repair]]:
    """One like the keeper's and one like the sensor's, which do not know of each other."""
    with (
        Repair(place, "keeper", **variables) as keeper,
        Repair(place, "sensor", **{repairer.TICK: "5"}) as sensor,
    ):
        yield keeper, sensor


class Record:
    """What is rejected and noted by the repairs from now on."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._known = rejected(place)
        self._taken = _taken(place)
        self._lines = len(self._noted())

    def _noted(self) -> list[dict[str, Any]]:
        path = self._place.settings.data_dir / "repairs.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def repairs(self) -> list[dict[str, Any]]:
        """What the repairs noted."""
        return self._noted()[self._lines :]

    def actions(self) -> Counter[str]:
        """How often they did what."""
        return Counter(one["action"] for one in self.repairs())

    def rejected(self) -> dict[At, str]:
        """What was rejected."""
        return {at: reason for at, reason in rejected(self._place).items() if at not in self._known}

    def quarantined(self) -> int:
        """How many records quarantines rejected. The watcher beside the connector names bad records, too, and takes none."""
        return _taken(self._place) - self._taken

    def settle(self, outcome: Outcome, bad: Mapping[At, str], bound: float = BOUND) -> None:
        """Wait until nothing waits any more; then exactly these records are rejected, and topic and table agree."""

        def done() -> bool:
            with suppress(PipelineError):
                return active.lag(self._place.settings).total == 0
            return False

        outcome.facts["seconds until nothing waited"] = round(until(done, bound, "all is stored", 0.3), 1)
        found = self.rejected()
        outcome.require(
            found == dict(bad),
            f"{len(found):,} records are rejected of {len(bad):,}: too many {sorted(found.keys() - bad.keys())[:5]}, "
            f"too few {sorted(bad.keys() - found.keys())[:5]}",
        )
        outcome.compare(self._place)
        actions = self.actions()
        outcome.facts["repairs"] = dict(actions)
        outcome.require(not actions["give up"], "the repair gave up")


@dataclass
class Trickle:
    """One bad record every so often, until it is ended.

    Attributes:
        places: where they stand.
    """

    place: Place
    per_second: float
    places: list[At] = field(default_factory=list)

    def __enter__(self) -> Trickle:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trickle", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def _run(self) -> None:
        device = uuid4()
        producer = Producer(kafka.client_config(self.place.settings) | {"linger.ms": 5})

        def note(_: Any, message: Any) -> None:
            self.places.append((message.partition(), message.offset()))

        begun, number = time.monotonic(), 0
        while not self._stop.is_set():
            while number < (time.monotonic() - begun) * self.per_second:
                key, value = nul(number, device)
                producer.produce(TOPIC, key=key, value=value, on_delivery=note)
                number += 1
            producer.poll(0.02)
        producer.flush(30)


def bad_one_in_a_thousand(place: Place, seconds: float = 300, *, rate: int = RATE) -> Outcome:
    """One bad record in a thousand at a producer's default rate: the lag stays bounded, and all that is good is stored.

    Args:
        place: where Connect runs.
        seconds: how long.
        rate: readings a second.
    """
    outcome, record, lags = Outcome(), Record(place), list[tuple[float, int]]()
    begun = _published(place)
    with two_repairs(place), Load(place, rate) as load, Trickle(place, rate / 1000) as bad:
        began = time.monotonic()
        while (now := time.monotonic() - began) < seconds:
            load.check()
            with suppress(PipelineError):
                lags.append((now, active.lag(place.settings).total))
            time.sleep(0.5)
        load.end()
        bad.__exit__()
        outcome.facts |= {
            "published a second": round((_published(place) - begun) / seconds),
            "bad records": len(bad.places),
            "most lag, by quarter": [
                max((lag for at, lag in lags if part * seconds / 4 <= at < (part + 1) * seconds / 4), default=0)
                for part in range(4)
            ],
        }
        record.settle(outcome, dict.fromkeys(bad.places, "bad_tags"))
    quarters = outcome.facts["most lag, by quarter"]
    outcome.require(len(bad.places) > seconds * rate / 2000, "void: hardly any bad record")
    # What arrives while it is found out that something is wrong, and until the stretches have grown.
    outcome.require(max(quarters) < rate * BOUND, f"lag went up to {max(quarters):,}")
    outcome.require(quarters[-1] < 2 * max(quarters[:2]) + rate, f"the lag grows: {quarters}")
    return outcome


def deaths(
    place: Place, places: Sequence[str] = PLACES, whom: Sequence[str] = ("repair", "connect", "postgres")
) -> Outcome:
    """The repair, Connect or PostgreSQL is killed (SIGKILL) at each step of a quarantine, under load.

    Args:
        place: where Connect runs.
        places: the steps.
        whom: is killed.
    """
    outcome, record, bad, waited = Outcome(), Record(place), dict[At, str](), dict[str, list[float]]()
    with Load(place, 1_000) as load:
        for victim in whom:
            for step in places:
                load.check()
                began = time.monotonic()
                (at,) = publish(place, [nul(0, uuid4())])
                bad[at] = "bad_tags"
                _kill(place, victim, step)
                with Repair(place, "keeper"):
                    until(partial(passed, place, [at]), 2 * BOUND, f"{at} is passed after {victim} died at {step}")
                    until(lambda: connector.sink_state(place.settings).running, BOUND, "the connector runs")
                waited.setdefault(victim, []).append(round(time.monotonic() - began, 1))
        load.end()
    outcome.facts["seconds by who was killed"] = waited
    with Repair(place, "keeper"):
        record.settle(outcome, bad)
    return outcome


def _kill(place: Place, victim: str, step: str) -> None:
    """Let a repair come to a step of a quarantine, and kill it there, or another one while it rests there."""
    if victim == "repair":
        with Repair(place, "dying", **{VARIABLE: f"{step}=1", repairer.TICK: "1"}) as repair:
            until(lambda: not repair.alive(), 2 * BOUND, f"the repair dies at {step}")
            if repair.process.returncode != -signal.SIGKILL:
                raise VoidError(f"the repair ended by itself: {repair.words()}")
        return
    note = place.settings.data_dir / f"stopped-{uuid4()}"
    variables = {repairer.STOP_AT: step, repairer.STOPPED: str(note), repairer.TICK: "1"}
    with Repair(place, "resting", **variables) as repair:
        process = psutil.Process(repair.process.pid)
        until(
            lambda: note.exists() and process.status() == psutil.STATUS_STOPPED,
            2 * BOUND,
            f"the repair rests at {step}",
        )
        place.kill(victim, signal.SIGKILL if victim == "connect" else signal.SIGQUIT)
        os.kill(repair.process.pid, signal.SIGCONT)
        time.sleep(2)


@contextmanager
def _statements(place: Place, begin: str, end: str) -> Iterator[None]:
    with psycopg.connect(place.settings.admin_url(place.settings.metrics_database), autocommit=True) as connection:
        connection.execute(begin.encode())
        try:
            yield
        finally:
            connection.execute(end.encode())


@contextmanager
def _down(place: Place) -> Iterator[None]:
    service = place.services.service("postgres")
    service.stop()
    try:
        yield
    finally:
        service.start()
        service.wait_until_healthy()


@contextmanager
def _standby(place: Place) -> Iterator[None]:
    """The server takes no writes: it is read-only whatever a session says, unlike a preset of a role or a database."""
    service, folder = place.services.service("postgres"), Path(place.one("SHOW data_directory"))
    service.stop()
    (folder / "standby.signal").touch()
    os.chown(folder / "standby.signal", folder.stat().st_uid, folder.stat().st_gid)
    service.start()

    def answers() -> bool:  # healthy it is not
        with suppress(psycopg.OperationalError):
            return bool(place.one("SELECT pg_is_in_recovery()"))
        return False

    until(answers, BOUND, "PostgreSQL is a standby")
    try:
        yield
    finally:
        place.one("SELECT pg_promote()")


@contextmanager
def _locked(place: Place) -> Iterator[None]:
    with psycopg.connect(place.settings.admin_url(place.settings.metrics_database)) as connection:
        connection.execute("LOCK TABLE metrics IN ACCESS EXCLUSIVE MODE")
        yield


_FULL: Final = """
CREATE FUNCTION of_chaos() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$;
CREATE TRIGGER of_chaos BEFORE INSERT ON metrics FOR EACH STATEMENT EXECUTE FUNCTION of_chaos();
"""

FAULTS: Final[Mapping[str, Callable[[Place], Any]]] = {
    "down": _down,
    "full": lambda place: _statements(place, _FULL, "DROP TRIGGER of_chaos ON metrics; DROP FUNCTION of_chaos()"),
    "no right": lambda place: _statements(
        place,
        "REVOKE INSERT ON metrics FROM metrics_writer",
        "GRANT INSERT ON metrics TO metrics_writer",
    ),
    "locked": _locked,
    "standby": _standby,
}


def _await_load(place: Place, load: Load, records: int) -> float:
    """Wait until so many records more were published; the seconds that took."""
    begun = _published(place)

    def more() -> bool:
        load.check()
        return _published(place) - begun >= records

    return until(more, BOUND, "records are published")


def sick_database(
    place: Place, seconds: float = 300, *, faults: Sequence[str] = tuple(FAULTS), rate: int = 2_000
) -> Outcome:
    """PostgreSQL cannot store for a while, with a bad record among what waits: nothing is rejected before it can again.

    Args:
        place: where Connect runs.
        seconds: how long each fault lasts.
        faults: which.
        rate: readings a second meanwhile.
    """
    outcome, record, bad, healed = Outcome(), Record(place), dict[At, str](), dict[str, float]()
    with two_repairs(place):
        for fault in faults:
            before, quarantines = record.rejected(), record.actions()["quarantine"]
            # Each has a producer of its own: without PostgreSQL none begins, and one may end.
            with Load(place, rate) as load:
                _await_load(place, load, rate)
                with FAULTS[fault](place):
                    waited = _await_load(place, load, rate)
                    time.sleep(max(0.0, seconds / 2 - waited))
                    # In the middle of good ones: what can be stored does not get this far.
                    (at,) = publish(place, [nul(0, uuid4())], partition=0)
                    time.sleep(seconds / 2)
                    outcome.require(
                        record.actions()["quarantine"] == quarantines, f"{fault}: something was quarantined"
                    )
            found = record.rejected()
            outcome.require(found.keys() - before.keys() <= {at}, f"{fault}: a good record is among the rejects")
            bad[at] = "bad_tags"
            healed[fault] = round(until(partial(passed, place, [at]), 3 * BOUND, f"it goes on after {fault}", 0.5), 1)
        outcome.facts["seconds to go on"] = healed
        record.settle(outcome, bad, 2 * BOUND)
    return outcome
