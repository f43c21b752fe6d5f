"""A table of the time before partitions becomes partitioned, and back, while a sink stores and others read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from metrics_pipeline import kafka, partitions, postgres
from metrics_pipeline.metric import Reading, encode
from metrics_pipeline.settings import TOPIC
from metrics_pipeline.sinks import connector
from metrics_pipeline.verification.verify import verify
from metrics_pipeline_tests.chaos.meanwhile import Ticks
from metrics_pipeline_tests.chaos.processes import Load, Repair, Sink, until
from metrics_pipeline_tests.chaos.quarantine import good, publish
from metrics_pipeline_tests.chaos.scenarios import Outcome
from metrics_pipeline_tests.chaos.stack import Place
from metrics_pipeline_tests.chaos.waits import LONGEST, Waits

BEFORE: Final = "20261127000010"
"""The first migration of the partitions' release."""
CUTOVER: Final = "20261127000011_partition_cutover"
"""The last one that the way back undoes."""
RATE: Final = 10_000
DEVICES: Final = 2_000
OLD: Final = datetime(2026, 6, 1, tzinfo=UTC)
"""When the readings begin that are there before."""
REPORT_SECONDS: Final = 2.0
"""A reader that looks at all readings pauses for so long."""

_FILL: Final = """
INSERT INTO metrics (device_id, published_at, metric_name, value, tags)
SELECT
    md5((n %% {devices})::text)::uuid, %s::timestamptz + n / {devices} * interval '1 second', n / {devices} %% 6 * 10,
    (n * 7919 %% 10007) / 100.0, ARRAY['site:' || n %% 4, 'floor:' || n %% 5]
FROM generate_series(%s::bigint, %s::bigint) AS n
"""
# What the ticks of that time would have left.
_SUMMARIES: Final = (
    """
    INSERT INTO device_slots (device_id, metric_name, slot, rows, total, min, max, first_seen, last_seen)
    SELECT device_id, metric_name, date_bin('10 minutes', published_at, '2000-01-01 00:00:00+00'), count(*),
        sum(value::text::numeric), min(value), max(value), min(published_at), max(published_at)
    FROM metrics GROUP BY 1, 2, 3
    """,
    """
    INSERT INTO device_metric_summary (device_id, metric_name, rows, total, min, max, first_seen, last_seen)
    SELECT device_id, metric_name, sum(rows), sum(total), min(min), max(max), min(first_seen), max(last_seen)
    FROM device_slots GROUP BY 1, 2
    """,
    """
    INSERT INTO device_summary (device_id, rows, first_seen, last_seen)
    SELECT device_id, sum(rows), min(first_seen), max(last_seen) FROM device_slots GROUP BY 1
    """,
    "INSERT INTO ingestion_minutes SELECT date_trunc('minute', created_at), count(*) FROM metrics GROUP BY 1",
    "DELETE FROM summary_inserts",
    "UPDATE summary_state SET source = metrics_source(), rows = (SELECT sum(rows) FROM device_summary), absorbed_at = now()",
)


def upgrade(place: Place, rows: int = 20_000_000, *, rate: int = RATE, seconds: float = 20) -> Outcome:
    """A table with readings becomes partitioned under load, goes back, and becomes partitioned again.

    Args:
        place: where, with either sink.
        rows: readings there are before.
        rate: readings a second of the producer.
        seconds: how long the sink's speed is measured before and after.
    """
    copies = place.settings.sink == "copy"
    outcome = Outcome()
    while postgres.migration_status(place.settings).applied[-1] >= BEFORE:
        postgres.rollback(place.settings)
    began = time.monotonic()
    _fill(place, rows)
    outcome.facts |= {"rows before": rows, "seconds to fill": round(time.monotonic() - began)}
    _forget_records(place)
    with ExitStack() as stack:
        if copies:
            stack.enter_context(Sink(place).ready())
        else:
            stack.enter_context(Repair(place, "keeper"))
        load = stack.enter_context(Load(place, rate))
        until(lambda: _newest(place) > datetime.now(UTC) - timedelta(minutes=1), 90, "the sink stores")
        # Clocks that are ahead: these readings have to go to a place of their own.
        publish(place, _ahead(1_000))
        old = _checksum(place)
        outcome.require(old[0] == rows, f"void: {old[0]:,} old rows")
        speed = {"before": _speed(place, load, seconds)}
        with _not_retained(place):
            _verified(outcome, place, "before")
        for at, (what, change) in enumerate({"up": _up, "down": _down, "up again": _up}.items()):
            load.check()
            with Waits(place) as waits, Readers(place) as readers, _timed(place) as times:
                begun = time.monotonic()
                change(place)
                took = time.monotonic() - begun
                _goes_on(place, copies=copies)
            partitions.make(place.settings) if change is _up else None
            publish(place, _ahead(1_000, days=at + 1))
            outcome.facts[what] = {
                "seconds": round(took, 1),
                "seconds of each": dict(times),
                **waits.facts(commits=copies),
                "longest wait of a reader, s": round(readers.longest, 2),
                "reports meanwhile": readers.reports,
            }
            speed[f"after {what}"] = _speed(place, load, seconds)
            outcome.require(_checksum(place) == old, f"{what}: the old rows are not what they were")
            with nullcontext() if change is _up else _not_retained(place):
                _verified(outcome, place, f"after {what}")
            if change is _up:
                long = waits.logged()
                outcome.require(
                    waits.longest <= LONGEST and not long, f"{what}: a statement of the sink waited longer: {long}"
                )
                outcome.require(readers.longest <= LONGEST + 0.5, f"{what}: a reader waited {readers.longest:.1f} s")
        load.end()
        outcome.facts["rows stored a second"] = speed
        outcome.report = verify(place.settings, timeout=120)
        outcome.require(outcome.report.clean, f"verify is NOT CLEAN in the end: {outcome.report.lines()[1:]}")
        outcome.require(place.one("SELECT count(*) FROM rejected_metrics") == 0, "something was rejected")
        ticks = Ticks(place.settings)
        ticks.tick()
        outcome.problems += ticks.differences
    return outcome


def _fill(place: Place, rows: int) -> None:
    """Fill the table as it is filled fastest: without its index, and the summaries at once."""
    step = 2_000_000
    with postgres.connect(place.settings, "metrics_owner", autocommit=True) as owner:
        owner.execute("SET statement_timeout = 0")
        owner.execute("ALTER TABLE metrics DROP CONSTRAINT metrics_pkey")
        for first in range(0, rows, step):
            owner.execute(_FILL.format(devices=DEVICES).encode(), [OLD, first, min(first + step, rows) - 1])
        owner.execute("SET maintenance_work_mem = '512MB'")
        owner.execute(
            "ALTER TABLE metrics ADD CONSTRAINT metrics_pkey PRIMARY KEY (device_id, published_at, metric_name)"
        )
        with owner.transaction():
            for statement in _SUMMARIES:
                owner.execute(statement.encode())
        owner.execute("SELECT brin_summarize_new_values('metrics_created_at_idx')")
        owner.execute("ANALYZE metrics")


def _forget_records(place: Place) -> None:
    """Let the topic begin behind some records that are gone, since most of the rows have none: `verify` calls them older then."""
    numbers = sorted(kafka.watermarks(place.settings))
    for number in numbers:
        publish(place, good(1, uuid4()), number)
    ends = [TopicPartition(TOPIC, number, high) for number, (_, high) in kafka.watermarks(place.settings).items()]
    admin = AdminClient(kafka.client_config(place.settings))
    for future in admin.delete_records(ends).values():
        future.result(30)


def _ahead(count: int, days: int = 0) -> list[tuple[bytes | None, bytes | None]]:
    """Readings of the days after the cutover."""
    device, begin = uuid4(), datetime.now(UTC) + timedelta(days=3, hours=days)
    return [
        encode(Reading(device, begin + timedelta(hours=number % 48, microseconds=number), 20, float(number), ["ahead"]))
        for number in range(count)
    ]


def _newest(place: Place) -> datetime:
    newest = place.one("SELECT max(created_at) FROM metrics WHERE published_at > now() - interval '1 hour'")
    return newest or datetime.min.replace(tzinfo=UTC)


def _checksum(place: Place) -> tuple[int, Any]:
    """Of the rows that were there before: how many, and what their contents add up to."""
    with psycopg.connect(place.settings.admin_url(place.settings.metrics_database), autocommit=True) as connection:
        row = connection.execute(
            "SELECT count(*), sum(hash_record_extended(m.*, 0)::numeric) FROM "
            "(SELECT device_id, published_at, metric_name, value, tags, created_at FROM metrics WHERE published_at >= %s AND published_at < %s) AS m",
            [OLD, OLD + timedelta(days=100)],
        ).fetchone()
    assert row is not None
    return int(row[0]), row[1]


def _speed(place: Place, load: Load, seconds: float) -> int:
    """Rows stored a second."""
    load.check()
    began, before = time.monotonic(), place.one("SELECT clock_timestamp()")
    time.sleep(seconds)
    load.check()
    count: int = place.one(
        "SELECT count(*) FROM metrics WHERE created_at >= %s AND published_at > now() - interval '1 hour'", before
    )
    return round(count / (time.monotonic() - began))


@contextmanager
def _not_retained(place: Place) -> Iterator[None]:
    """The `verify` of the time before did not ask for what this one needs."""
    with postgres.connect(place.settings, "metrics_owner", autocommit=True) as owner:
        owner.execute("CREATE TABLE retention_state AS SELECT NULL::timestamptz AS retained_from")
        owner.execute("GRANT SELECT ON retention_state TO metrics_reader")
        yield
        owner.execute("DROP TABLE retention_state")


def _verified(outcome: Outcome, place: Place, when: str) -> None:
    report = verify(place.settings, timeout=120)
    outcome.facts[f"verify {when}"] = f"{report.lines()[0]}, {report.counts.unverifiable:,} older"
    if not report.clean:
        outcome.problems += [f"verify {when} is NOT CLEAN", *report.lines()[1:]]


def _up(place: Place) -> None:
    postgres.migrate(place.settings)


def _down(place: Place) -> None:
    while postgres.rollback(place.settings) != CUTOVER:
        pass


def _goes_on(place: Place, *, copies: bool) -> None:
    """Wait until the sink stores again, by itself."""
    if not copies:
        until(lambda: connector.sink_state(place.settings).running, 90, "the connector runs")
    at = place.one("SELECT clock_timestamp()")
    until(lambda: _newest(place) > at, 90, "the sink stores again")


@contextmanager
def _timed(place: Place) -> Iterator[dict[str, float]]:
    """How long each migration takes, by when it is noted."""
    times: dict[str, float] = {}
    stop = threading.Event()

    def noted(connection: psycopg.Connection[tuple[Any, ...]]) -> set[str]:
        return {version for (version,) in connection.execute("SELECT version FROM schema_migrations")}

    def watch() -> None:
        with psycopg.connect(place.settings.admin_url(place.settings.metrics_database), autocommit=True) as connection:
            known, since = noted(connection), time.monotonic()
            while not stop.wait(0.02):
                if changed := (now := noted(connection)) ^ known:
                    for version in changed:
                        times[version] = round(time.monotonic() - since, 2)
                    known, since = now, time.monotonic()

    thread = threading.Thread(target=watch, name="migrations", daemon=True)
    thread.start()
    try:
        yield times
    finally:
        stop.set()
        thread.join(30)


class Readers:
    """Two who read: the newest readings of a device all the time, and all readings every few seconds.

    Attributes:
        longest: seconds that the quick one waited for an answer.
        reports: how often the other one was through.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._stop = threading.Event()
        self.longest, self.reports = 0.0, 0
        self._threads = [threading.Thread(target=body, daemon=True) for body in (self._quick, self._report)]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _quick(self) -> None:
        device = UUID(int=1)
        with postgres.connect(self._place.settings, "metrics_reader", autocommit=True) as connection:
            while not self._stop.wait(0.02):
                began = time.monotonic()
                connection.execute(
                    "SELECT value FROM metrics WHERE device_id = %s AND published_at > now() - interval '1 hour' LIMIT 1",
                    [device],
                ).fetchone()
                self.longest = max(self.longest, time.monotonic() - began)

    def _report(self) -> None:
        with postgres.connect(self._place.settings, "metrics_reader", autocommit=True) as connection:
            while not self._stop.wait(REPORT_SECONDS):
                connection.execute("SELECT count(*) FROM metrics WHERE value > 90").fetchone()
                self.reports += 1
