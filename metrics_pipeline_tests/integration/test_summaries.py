"""Summaries against counts over all readings: after each kind of change, after random ones, and while writers run."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from psycopg import sql
from psycopg.pq import TransactionStatus

from metrics_pipeline import partitions, postgres, summaries
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.postgres import Connection
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.databases import own_database
from metrics_pipeline_tests.summary_pairs import PAIRS

pytestmark = pytest.mark.integration

DEVICES = [UUID(int=number) for number in range(3)]
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
UPSERT = (
    " ON CONFLICT (device_id, published_at, metric_name) DO UPDATE SET value = excluded.value, tags = excluded.tags"
)


@pytest.fixture(scope="module")
def database(stack: RunningStack) -> Iterator[Settings]:
    with own_database(stack.settings) as own:
        yield own


def absorb(conn: postgres.Connection) -> int:
    """What a tick does, without what it then reads."""
    summaries._refresh_index(conn)
    with summaries._tick(conn):
        return summaries._absorb(conn)


class Bench:
    """Connections to the database: the summarizer's, the writer's, and a superuser's for what is done by hand."""

    def __init__(self, database: Settings, stack: ExitStack) -> None:
        self.settings = database
        self.summarizer = stack.enter_context(postgres.connect(database, "metrics_summarizer", autocommit=True))
        self.reader = stack.enter_context(postgres.connect(database, "metrics_reader", autocommit=True))
        self.writer = stack.enter_context(postgres.connect(database, "metrics_writer", autocommit=True))
        self.hand = stack.enter_context(postgres.connect_admin(database, database.metrics_database))

    def tick(self) -> None:
        """Absorb, and compare every table with its count over all readings of the same snapshot."""
        self.summarizer.execute("SELECT refresh_created_at_index()")
        with summaries._tick(self.summarizer):
            summaries._absorb(self.summarizer)
            for table, (kept, plain) in PAIRS.items():
                assert self.summarizer.execute(kept).fetchall() == self.summarizer.execute(plain).fetchall(), table

    def count(self) -> None:
        """The quick count is the count, with whatever has not been absorbed."""
        with self.reader.transaction():
            self.reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            quick = summaries.row_count(self.reader)
            assert (quick,) == self.reader.execute("SELECT count(*) FROM metrics").fetchone()

    def log_rows(self) -> int:
        row = self.hand.execute(
            "SELECT (SELECT count(*) FROM summary_inserts) + (SELECT count(*) FROM summary_changes)"
        ).fetchone()
        assert row is not None
        return int(row[0])


@pytest.fixture(params=["put by", "folded at once"])
def often(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a tick puts entries by for later, as it does until there are many, or folds them in at once."""
    if request.param == "folded at once":
        monkeypatch.setattr(summaries, "FEWEST_PENDING", 0)
        monkeypatch.setattr(summaries, "MOST_PENDING", 0)


@pytest.fixture
def bench(database: Settings, often: None) -> Iterator[Bench]:
    del often
    with ExitStack() as stack:
        bench = Bench(database, stack)
        bench.hand.execute("TRUNCATE metrics")
        bench.tick()
        yield bench


def insert(
    conn: Connection,
    rows: int = 1,
    *,
    device: int = 0,
    start: int = 0,
    metric: int = 10,
    value: float | None = None,
    then: str = "",
) -> None:
    """Insert readings a second apart; their values are their numbers unless one is given."""
    conn.execute(
        "INSERT INTO metrics (device_id, published_at, metric_name, value, tags) "
        "SELECT %(device)s, %(begin)s + n * interval '1 second', %(metric)s, coalesce(%(value)s::float8, n), '{a}' "
        "FROM generate_series(%(first)s::int, %(last)s::int) AS n" + then,
        {
            "device": DEVICES[device],
            "begin": BEGIN,
            "metric": metric,
            "value": value,
            "first": start,
            "last": start + rows - 1,
        },
    )


def test_new_readings_are_added(bench: Bench) -> None:
    insert(bench.writer, 1000)
    insert(bench.writer, 10, device=1, metric=50)
    bench.tick()
    insert(bench.writer, 1000, start=1000)
    bench.count()
    bench.tick()
    assert bench.log_rows() == 0


def test_late_readings_reach_back(bench: Bench) -> None:
    insert(bench.writer, 10)
    bench.tick()
    insert(bench.writer, 10, start=-86_400)
    bench.tick()


def test_an_upsert_changes_values_and_leaves_created_at(bench: Bench) -> None:
    insert(bench.writer, 1000)
    bench.tick()
    before = bench.hand.execute("SELECT DISTINCT created_at FROM metrics").fetchall()
    time.sleep(0.01)
    insert(bench.writer, 1000, value=7.5, then=UPSERT)
    assert bench.hand.execute("SELECT DISTINCT created_at FROM metrics").fetchall() == before
    bench.count()
    bench.tick()
    (device,) = summaries.device_summary(bench.settings).first
    assert [(m.rows, m.min, m.mean, m.max) for m in device.metrics] == [(1000, 7.5, 7.5, 7.5)]


def test_an_upsert_of_new_and_known_keys_in_one_statement(bench: Bench) -> None:
    insert(bench.writer, 100)
    bench.tick()
    insert(bench.writer, 200, value=1.25, then=UPSERT)
    bench.count()
    bench.tick()


def test_an_upsert_of_what_was_inserted_since_the_last_tick(bench: Bench) -> None:
    insert(bench.writer, 100)
    insert(bench.writer, 100, value=2.5, then=UPSERT)
    insert(bench.writer, 100, value=-2.5, then=UPSERT)
    bench.count()
    bench.tick()


def test_equal_readings_delivered_again_leave_no_trace(bench: Bench) -> None:
    insert(bench.writer, 100)
    bench.tick()
    before = bench.hand.execute("SELECT ctid, xmin FROM metrics ORDER BY ctid").fetchall()
    insert(bench.writer, 100, then=UPSERT)
    assert bench.hand.execute("SELECT ctid, xmin FROM metrics ORDER BY ctid").fetchall() == before
    assert bench.hand.execute("SELECT count(*) FROM summary_changes").fetchone() == (0,)
    bench.tick()


def test_copy_to_a_temporary_table_and_upsert_from_it(bench: Bench) -> None:
    insert(bench.writer, 50)
    bench.tick()
    with bench.writer.transaction():
        bench.writer.execute("CREATE TEMP TABLE stage (LIKE metrics INCLUDING DEFAULTS) ON COMMIT DROP")
        copy = "COPY stage (device_id, published_at, metric_name, value, tags) FROM STDIN"
        with bench.writer.cursor() as cursor, cursor.copy(copy) as out:
            for n in range(100):
                out.write_row((DEVICES[0], BEGIN + timedelta(seconds=n), 10, n * 1.5, ["b"]))
        bench.writer.execute(
            "INSERT INTO metrics (device_id, published_at, metric_name, value, tags) "
            "SELECT device_id, published_at, metric_name, value, tags FROM stage" + UPSERT
        )
    bench.count()
    bench.tick()


def test_copy_straight_into_the_table(bench: Bench) -> None:
    copy = "COPY metrics (device_id, published_at, metric_name, value, tags) FROM STDIN"
    with bench.writer.cursor() as cursor, cursor.copy(copy) as out:
        for n in range(5000):
            out.write_row((DEVICES[n % 3], BEGIN + timedelta(seconds=n), 10 * (n % 6), n / 7, []))
    bench.count()
    bench.tick()


def test_rows_of_a_rewritten_batch(bench: Bench) -> None:
    """What pgjdbc makes of a batch with reWriteBatchedInserts."""
    rows = ", ".join("(%s, %s, %s, %s, %s)" for _ in range(128))
    for value in (1.0, 2.0):
        parameters = [
            part
            for n in range(128)
            for part in (DEVICES[0], BEGIN + timedelta(seconds=n), 10, value + n % 2, ["site:a"])
        ]
        bench.writer.execute(
            f"INSERT INTO metrics (device_id, published_at, metric_name, value, tags) VALUES {rows}{UPSERT}",
            parameters,
        )
        bench.count()
        bench.tick()


def test_deletes_are_taken_off(bench: Bench) -> None:
    insert(bench.writer, 1000)
    insert(bench.writer, 10, device=1)
    bench.tick()
    bench.hand.execute("DELETE FROM metrics WHERE value IN (0, 500, 999)")
    bench.count()
    bench.tick()
    bench.hand.execute("DELETE FROM metrics WHERE device_id = %s", [DEVICES[1]])
    bench.tick()
    assert bench.hand.execute("SELECT count(*) FROM device_summary").fetchone() == (1,)
    bench.hand.execute("DELETE FROM metrics")
    bench.tick()
    assert bench.hand.execute("SELECT count(*) FROM device_slots").fetchone() == (0,)


def test_a_reading_deleted_and_stored_again(bench: Bench) -> None:
    insert(bench.writer, 10)
    bench.tick()
    bench.hand.execute("DELETE FROM metrics WHERE value = 5")
    insert(bench.writer, 1, start=5, value=50)
    bench.tick()
    insert(bench.writer, 1, start=20)
    bench.hand.execute("DELETE FROM metrics WHERE value = 20")
    insert(bench.writer, 1, start=20, value=21)
    bench.tick()


def test_rows_with_a_created_at_of_their_own(bench: Bench) -> None:
    insert(bench.writer, 10)
    bench.tick()
    bench.hand.execute(
        "INSERT INTO metrics (device_id, published_at, metric_name, value, created_at) VALUES "
        "(%(device)s, '2026-01-01 01:00+00', 10, 1, now() - interval '3 days'), "
        "(%(device)s, '2026-01-01 02:00+00', 10, 2, now() + interval '3 days'), "
        "(%(device)s, '2026-01-01 03:00+00', 10, 3, now())",
        {"device": DEVICES[2]},
    )
    bench.count()
    bench.tick()
    bench.hand.execute("UPDATE metrics SET created_at = created_at - interval '1 year' WHERE value < 3")
    bench.tick()


def test_a_key_that_moves(bench: Bench) -> None:
    insert(bench.writer, 10)
    insert(bench.writer, 1, device=1)
    bench.tick()
    bench.hand.execute("DELETE FROM metrics WHERE value = 3")
    bench.hand.execute("UPDATE metrics SET published_at = published_at - interval '1 second' WHERE value = 4")
    bench.hand.execute("UPDATE metrics SET device_id = %s WHERE device_id = %s", [DEVICES[2], DEVICES[1]])
    bench.count()
    bench.tick()


def test_truncate_begins_anew(bench: Bench) -> None:
    insert(bench.writer, 100)
    bench.tick()
    insert(bench.writer, 100, start=100)
    with bench.hand.transaction():
        insert(bench.hand, 5, start=300)
        bench.hand.execute("TRUNCATE metrics")
        insert(bench.hand, 3)
    bench.count()
    insert(bench.writer, 2, device=1)
    bench.tick()
    with bench.hand.transaction(force_rollback=True):
        bench.hand.execute("TRUNCATE metrics")
    insert(bench.writer, 2, device=2)
    bench.tick()


def test_a_table_rewritten_begins_anew(bench: Bench) -> None:
    insert(bench.writer, 100)
    bench.tick()
    insert(bench.writer, 100, start=100)
    bench.hand.execute("VACUUM FULL metrics_before")
    bench.count()
    bench.tick()


def test_vacuum_and_freeze_change_nothing(bench: Bench) -> None:
    insert(bench.writer, 1000)
    insert(bench.writer, 500, value=3.5, then=UPSERT)
    bench.hand.execute("VACUUM (FREEZE) metrics")
    bench.hand.execute("VACUUM (FREEZE) summary_inserts")
    bench.hand.execute("VACUUM (FREEZE) summary_changes")
    bench.count()
    bench.tick()
    insert(bench.writer, 700, value=4.5, then=UPSERT)
    bench.tick()


def test_a_transaction_open_across_two_ticks(bench: Bench, database: Settings) -> None:
    """created_at is the transaction's start: by its commit, two ticks have gone past it."""
    insert(bench.writer, 10)
    with postgres.connect(database, "metrics_writer") as slow:
        insert(slow, 10, start=100)
        insert(slow, 5, value=-1, then=UPSERT)
        for tick in range(2):
            insert(bench.writer, 10, start=200 + 10 * tick)
            bench.count()
            bench.tick()
        slow.commit()
        bench.count()
        bench.tick()
        insert(slow, 5, value=-2, then=UPSERT)
        bench.tick()


def test_a_transaction_with_savepoints_open_across_two_ticks(bench: Bench, database: Settings) -> None:
    with postgres.connect(database, "metrics_writer") as slow:
        insert(slow, 10)
        with slow.transaction():
            insert(slow, 10, start=10)
            with slow.transaction():
                insert(slow, 10, start=20)
        bench.tick()
        with slow.transaction(force_rollback=True):
            insert(slow, 10, start=30)
            insert(slow, 10, value=9, then=UPSERT)
        with slow.transaction():
            insert(slow, 15, value=8, then=UPSERT)
            with slow.transaction():
                insert(slow, 5, value=7, then=UPSERT)
        bench.tick()
        slow.commit()
    bench.count()
    bench.tick()
    assert bench.hand.execute("SELECT count(*), sum(value) FROM metrics").fetchone() == (
        30,
        5 * 7 + 10 * 8 + sum(range(15, 30)),
    )


def test_transactions_that_begin_in_the_same_microsecond(bench: Bench, database: Settings) -> None:
    """Readings are told apart by transaction, not by created_at alone."""
    with postgres.connect_admin(database, database.metrics_database, autocommit=False) as other:
        insert(other, 10)
        row = other.execute("SELECT now()").fetchone()
        assert row is not None
        bench.hand.execute(
            "INSERT INTO metrics (device_id, published_at, metric_name, value, created_at) VALUES (%s, %s, 10, 1, %s)",
            [DEVICES[1], BEGIN, row[0]],
        )
        bench.tick()
        other.commit()
    bench.count()
    bench.tick()


def test_a_rolled_back_transaction_leaves_nothing(bench: Bench) -> None:
    insert(bench.writer, 10)
    bench.tick()
    with bench.writer.transaction(force_rollback=True):
        insert(bench.writer, 100, start=50)
        insert(bench.writer, 10, value=1, then=UPSERT)
    bench.count()
    bench.tick()


def test_extreme_values_add_up_exactly(bench: Bench) -> None:
    extremes = [5e-324, 1.7976931348623157e308, -1.7976931348623157e308, 1e-300, 0.1, 0.2, -0.3, 1e16, 1.0]
    for n, value in enumerate(extremes):
        insert(bench.writer, 1, start=n, value=value)
        bench.tick()
    for value in extremes[1:]:
        bench.hand.execute("DELETE FROM metrics WHERE value = %s", [value])
        bench.tick()
    insert(bench.writer, 2, start=50, value=0.0)
    bench.tick()
    (device,) = summaries.device_summary(bench.settings).first
    assert [(m.min, m.mean, m.max) for m in device.metrics] == [(0.0, 0.0, 5e-324)]


def test_the_digits_of_a_mean_do_not_depend_on_what_went(bench: Bench) -> None:
    for n, value in enumerate([0.0, 1.0, 0.1, 0.0, 3.3, 3.3, 5e-324]):
        insert(bench.writer, 1, start=n, value=value)
    bench.tick()
    bench.hand.execute("DELETE FROM metrics WHERE value = 5e-324")
    bench.tick()


def test_the_first_and_the_last_years(bench: Bench) -> None:
    for year in ("0001-01-01 00:00:00+00", "9999-12-31 23:59:59.999999+00"):
        bench.writer.execute(
            "INSERT INTO metrics (device_id, published_at, metric_name, value) VALUES (%s, %s, 0, 1)",
            [DEVICES[0], year],
        )
    bench.tick()
    (device,) = summaries.device_summary(bench.settings).first
    assert (device.first_seen.year, device.last_seen.year) == (1, 9999)


def test_migrating_a_table_that_has_readings(stack: RunningStack) -> None:
    with own_database(stack.settings) as own, ExitStack() as connections:
        while postgres.rollback(own) != "20261122000002_summaries":
            pass
        with postgres.connect(own, "metrics_writer", autocommit=True) as writer:
            insert(writer, 100)
        postgres.migrate(own)
        bench = Bench(own, connections)
        insert(bench.writer, 100, start=50, value=1, then=UPSERT)
        bench.count()
        bench.tick()


def test_migrating_summaries_of_ten_minutes(stack: RunningStack, caplog: pytest.LogCaptureFixture) -> None:
    """What they hold is put together anew; the readings are not counted again."""
    with own_database(stack.settings) as own, ExitStack() as connections:
        while postgres.rollback(own) != "20261127000010_device_summaries":
            pass
        with postgres.connect(own, "metrics_writer", autocommit=True) as writer:
            insert(writer, 10_000)
            insert(writer, 50, device=1, metric=0)
        with postgres.connect_admin(own, own.metrics_database) as hand:
            hand.execute("UPDATE metrics SET published_at = now() WHERE value = 19 AND metric_name = 10")
            hand.execute(
                "INSERT INTO device_slots SELECT device_id, metric_name, "
                "date_bin('10 minutes', published_at, '2000-01-01 00:00:00+00'), count(*), sum(value::text::numeric), "
                "min(value), max(value), min(published_at), max(published_at) FROM metrics GROUP BY 1, 2, 3"
            )
            hand.execute(
                "INSERT INTO ingestion_minutes SELECT date_trunc('minute', created_at), count(*) FROM metrics GROUP BY 1"
            )
            hand.execute("UPDATE summary_state SET source = metrics_source(), rows = (SELECT count(*) FROM metrics)")
            hand.execute("TRUNCATE summary_inserts, summary_changes")
        postgres.migrate(own)
        bench = Bench(own, connections)
        bench.tick()
        insert(bench.writer, 100, start=9_950, value=-1, then=UPSERT)
        bench.hand.execute("DELETE FROM metrics WHERE value = 9949")
        bench.tick()
        assert "counting all" not in caplog.text


def test_many_entries_are_folded_and_settled(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: what was put by, what is in slots that are not over, and what is in the totals."""
    monkeypatch.setattr(summaries, "FEWEST_PENDING", 5)
    for n in range(12):
        insert(bench.writer, 1, start=n * 1800)
        monkeypatch.setattr(summaries, "SETTLED_AFTER", datetime.now(UTC) - BEGIN - timedelta(minutes=30 * n - 60))
        bench.tick()
    totals = bench.hand.execute("SELECT sum(rows) FROM device_metric_totals").fetchone()
    slots = bench.hand.execute("SELECT sum(rows) FROM device_slots").fetchone()
    assert totals
    assert slots
    assert totals[0] < slots[0] <= 12
    insert(bench.writer, 1, start=0, value=-5, then=UPSERT)
    bench.hand.execute("DELETE FROM metrics WHERE value IN (1, 1800, 12 * 1800)")
    bench.tick()
    assert bench.hand.execute("SELECT count(*) FROM device_deltas").fetchone() == (0,)


def test_entries_of_the_same_hours_become_one_and_wait_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """While that makes them few, slots stay as they are; sums keep each digit, however large and however many decimals."""
    monkeypatch.setattr(summaries, "FEWEST_PENDING", 10)
    monkeypatch.setattr(summaries, "MOST_PENDING", 10)
    entries, slots = "SELECT pending FROM summary_state", "SELECT count(*) FROM device_slots"
    values = (0.1, -0.00001, 1e15, 123.4567, 5e-324, 1.7e308)
    pending: list[int] = []
    for tick in range(5):
        for device in range(3):
            insert(bench.writer, 1, device=device, start=tick, value=values[(tick + device) % len(values)])
        bench.tick()
        pending += bench.hand.execute(entries).fetchone() or ()
    assert pending == [3, 6, 9, 3, 6]
    assert bench.hand.execute(slots).fetchone() == (0,)
    for hour in range(1, 4):
        for device in range(3):
            insert(bench.writer, 1, device=device, start=3600 * hour, value=1.5)
        bench.tick()
    assert bench.hand.execute(slots).fetchone() == (9,), "nine are more than half of ten"
    # What goes is looked for in all that was put by.
    insert(bench.writer, 3, start=3601)
    bench.tick()
    insert(bench.writer, 1, device=1, start=2, value=-7, then=UPSERT)
    bench.hand.execute("DELETE FROM metrics WHERE value = 1e15")
    bench.tick()


def test_ingestion_rate_is_the_plain_query(bench: Bench) -> None:
    while datetime.now(UTC).second >= 50:
        time.sleep(0.1)
    insert(bench.writer, 100)
    bench.hand.execute(
        "INSERT INTO metrics (device_id, published_at, metric_name, value, created_at) "
        "SELECT %s, %s + n * interval '1 second', 10, n, now() - n * interval '1 minute' FROM generate_series(1, 20) AS n",
        [DEVICES[1], BEGIN],
    )
    rate = summaries.ingestion_rate(bench.settings)
    plain = bench.reader.execute(postgres.query("ingestion_rate_plain")).fetchall()
    assert [(minute.minute, minute.rows) for minute in rate.minutes] == plain
    assert bench.reader.execute("SELECT minute, rows FROM ingestion_rate ORDER BY minute").fetchall() == plain
    assert len(plain) == 10
    assert rate.rows == 120
    assert rate.rows_last_10_minutes == 109
    assert rate.rows_per_second == 1 / 60
    assert (rate.newest,) == bench.reader.execute("SELECT max(created_at) FROM metrics").fetchone()
    insert(bench.writer, 1, start=5_000)
    insert(bench.writer, 1, start=5_000, then=" ON CONFLICT DO NOTHING")
    bench.hand.execute("DELETE FROM metrics WHERE value = 5000")
    newest = bench.reader.execute("SELECT max(created_at) FROM metrics").fetchone()
    assert (summaries.ingestion_rate(bench.settings).newest,) == newest


def test_ingestion_rate_of_an_empty_table(bench: Bench) -> None:
    rate = summaries.ingestion_rate(bench.settings)
    assert (rate.rows, rate.newest, rate.rows_last_10_minutes, len(rate.minutes)) == (0, None, 0, 10)


def test_device_summary_names_the_busiest(bench: Bench) -> None:
    for device, rows in enumerate((5, 50, 20)):
        insert(bench.writer, rows, device=device)
        insert(bench.writer, 1, device=device, metric=50, value=40.5)
    found = summaries.device_summary(bench.settings, limit=2)
    assert (found.devices, found.rows) == (3, 78)
    assert [(device.device_id, device.rows) for device in found.first] == [(DEVICES[1], 51), (DEVICES[2], 21)]
    assert found.first[0].metrics == [
        summaries.MetricSummary("humidity", 50, 0.0, 24.5, 49.0),
        summaries.MetricSummary("sound", 1, 40.5, 40.5, 40.5),
    ]


def test_two_ticks_at_once_wait_for_each_other(bench: Bench, database: Settings) -> None:
    insert(bench.writer, 1000)
    errors: list[BaseException] = []

    def tick_often() -> None:
        try:
            with postgres.connect(database, "metrics_summarizer", autocommit=True) as conn:
                for _ in range(10):
                    absorb(conn)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=tick_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(20):
        insert(bench.writer, 10, start=2000 + 10 * n)
    for thread in threads:
        thread.join()
    assert errors == []
    bench.tick()


def fetched(bench: Bench) -> int:
    """How many rows of `metrics` queries have read so far."""
    bench.summarizer.execute("SELECT pg_stat_force_next_flush()")
    bench.hand.execute("SELECT pg_stat_force_next_flush()")
    bench.hand.execute("SELECT pg_stat_clear_snapshot()")
    row = bench.hand.execute(
        "SELECT sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_user_tables WHERE relname IN ('metrics_before', 'metrics_after')"
    ).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("analyzed", [True, False])
def test_a_tick_reads_what_is_new_and_not_what_is_there(bench: Bench, analyzed: bool) -> None:
    """Counted in rows read rather than in seconds: a page range of the index is about 10,000 rows."""
    for n in range(10):
        insert(bench.writer, 30_000, start=n * 30_000)
        time.sleep(0.01)
    absorb(bench.summarizer)
    if analyzed:
        bench.hand.execute("VACUUM (ANALYZE) metrics")
    read = fetched(bench)
    insert(bench.writer, 1000, device=1)
    absorb(bench.summarizer)
    new, read = fetched(bench) - read, fetched(bench)
    assert 1000 <= new < 40_000
    insert(bench.writer, 1000, start=7000, value=12.5, then=UPSERT)
    written = fetched(bench) - read
    absorb(bench.summarizer)
    changed = fetched(bench) - read - written
    assert changed < 40_000
    read = fetched(bench)
    absorb(bench.summarizer)
    assert fetched(bench) - read <= 40_000
    bench.tick()


def test_many_changes_do_not_cost_their_square(bench: Bench) -> None:
    """Statistics about the logs are always out of date; as loops within loops this would take an hour."""
    bench.hand.execute("ALTER TABLE summary_changes SET (autovacuum_enabled = off)")
    insert(bench.writer, 50_000)
    bench.tick()
    insert(bench.writer, 50_000, value=1.5, then=UPSERT)
    begin = time.monotonic()
    bench.count()
    bench.tick()
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("analyzed", [True, False])
def test_plans_do_not_depend_on_statistics(bench: Bench, analyzed: bool) -> None:
    """Left alone, the planner expects one reading and one transaction, and compares each reading with each of these."""
    insert(bench.writer, 20_000)
    if analyzed:
        bench.hand.execute("VACUUM (ANALYZE) metrics")
    bench.tick()
    for n in range(50):
        insert(bench.writer, 20, start=30_000 + 20 * n)
    insert(bench.writer, 50, start=30_000, value=-1, then=UPSERT)
    with summaries._tick(bench.summarizer):
        bench.summarizer.execute(postgres.query("absorb_begin"))
        ((low, high),) = bench.summarizer.execute(postgres.query("absorb_spans")).fetchall()
        with summaries._fixed_plan(bench.summarizer):
            plans = {
                name: "\n".join(
                    row[0]
                    for row in bench.summarizer.execute(
                        f"EXPLAIN (COSTS off) {postgres.query(name)}",
                        {"low": low, "high": high, "mask": 0},
                        prepare=False,
                    )
                )
                for name in ("absorb_inserted", "absorb_changed", "absorb_removed")
            }
    assert "Bitmap Index Scan on metrics_before_created_at_idx" in plans["absorb_inserted"]
    assert "Nested Loop" not in plans["absorb_inserted"] + plans["absorb_removed"]
    assert plans["absorb_changed"].count("Nested Loop") == 1
    assert "metrics_before_pkey" in plans["absorb_changed"]
    assert "Seq Scan on metrics" not in "".join(plans.values())


def test_truncate_waits_for_a_tick(bench: Bench) -> None:
    """It empties the table for every snapshot, also for those taken before."""
    insert(bench.writer, 10)
    with summaries._tick(bench.summarizer):
        bench.summarizer.execute("SELECT count(*) FROM summary_inserts")
        bench.hand.execute("SET lock_timeout = '200ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            bench.hand.execute("TRUNCATE metrics")
    bench.tick()


def test_a_tick_refuses_a_connection_in_a_transaction(database: Settings) -> None:
    with postgres.connect(database, "metrics_summarizer") as conn:
        conn.execute("SELECT 1")
        with pytest.raises(ValueError, match="without an open transaction"), summaries._tick(conn):
            pass


VALUES = [0.0, 1.0, -1.0, 0.1, 0.2, 3.3, 1e308, -1e308, 5e-324]
CREATED = ["default", "default", "now()", "now() - interval '3 hours'", "'2020-02-02 00:00:30+00'"]
CONFLICT = [
    "",
    " ON CONFLICT DO NOTHING",
    UPSERT,
    " ON CONFLICT (device_id, published_at, metric_name) DO UPDATE SET value = excluded.value",
]
keys = st.tuples(
    st.sampled_from(DEVICES[:2]),
    st.sampled_from([0, 1, 3599, 3600, 7201]).map(lambda second: BEGIN + timedelta(seconds=second)),
    st.sampled_from([0, 10]),
)
writers = st.integers(0, 2)
EXPECTED = (
    psycopg.errors.UniqueViolation,
    psycopg.errors.LockNotAvailable,
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
)


class Writers(RuleBasedStateMachine):
    """Writers that interleave at random, ticks among them; few keys, so that they meet."""

    database: Settings

    @initialize()
    def open(self) -> None:
        self.connections = ExitStack()
        self.bench = Bench(self.database, self.connections)
        self.writers = [
            self.connections.enter_context(postgres.connect_admin(self.database, self.database.metrics_database))
            for _ in range(3)
        ]
        for conn in self.writers:
            # Who waits for another writer here would wait for ever.
            conn.execute("SET lock_timeout = '20ms'")
        self.savepoints = [0, 0, 0]
        # Behind all partitions there are: as it goes on, they are cut off.
        last = partitions.listed(self.bench.reader)[-1].low
        assert last is not None
        self.shift = last - BEGIN
        self.cut = 0
        self.bench.hand.execute("TRUNCATE metrics")
        self.bench.tick()
        self.bench.summarizer.execute("SET lock_timeout = '100ms'")

    def teardown(self) -> None:
        if hasattr(self, "connections"):
            for writer in range(3):
                self.roll_back(writer)
            # In each example once, whatever chance did: nobody has the table now.
            if self.cut < 3:
                self.make_partitions()
            # It may have to wait for a vacuum.
            self.bench.summarizer.execute("SET lock_timeout = '30s'")
            self.bench.tick()
            self.connections.close()

    @contextmanager
    def statement(self, writer: int) -> Iterator[Connection]:
        """Run a statement as a client would: an error ends the transaction, or what came after the last savepoint."""
        conn = self.writers[writer]
        try:
            yield conn
        except EXPECTED:
            if conn.info.transaction_status == TransactionStatus.INERROR:
                if self.savepoints[writer]:
                    conn.execute(f"ROLLBACK TO SAVEPOINT s{self.savepoints[writer]}")
                else:
                    conn.execute("ROLLBACK")
        if conn.info.transaction_status == TransactionStatus.IDLE:
            self.savepoints[writer] = 0

    def placed(self, key: tuple[Any, ...]) -> tuple[Any, ...]:
        return key[0], key[1] + self.shift, key[2]

    def busy(self) -> list[int]:
        return [n for n, conn in enumerate(self.writers) if conn.info.transaction_status != TransactionStatus.IDLE]

    @rule(writer=writers, level=st.sampled_from(["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]))
    def begin(self, writer: int, level: str) -> None:
        if writer not in self.busy():
            self.writers[writer].execute(f"BEGIN ISOLATION LEVEL {level}")

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        with self.statement(data.draw(st.sampled_from(self.busy()))) as conn:
            conn.execute("COMMIT")

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def savepoint(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from(self.busy()))
        self.savepoints[writer] += 1
        self.writers[writer].execute(f"SAVEPOINT s{self.savepoints[writer]}")

    @precondition(lambda self: any(self.savepoints))
    @rule(data=st.data(), release=st.booleans())
    def end_savepoint(self, data: st.DataObject, release: bool) -> None:
        writer = data.draw(st.sampled_from([n for n, depth in enumerate(self.savepoints) if depth]))
        name = f"s{self.savepoints[writer]}"
        if release:
            self.writers[writer].execute(f"RELEASE SAVEPOINT {name}")
            self.savepoints[writer] -= 1
        else:
            self.writers[writer].execute(f"ROLLBACK TO SAVEPOINT {name}")

    @rule(writer=writers)
    def roll_back(self, writer: int) -> None:
        if writer in self.busy():
            self.writers[writer].execute("ROLLBACK")
            self.savepoints[writer] = 0

    @rule(
        writer=writers,
        readings=st.dictionaries(keys, st.sampled_from(VALUES), min_size=1, max_size=4),
        created=st.sampled_from(CREATED),
        conflict=st.sampled_from(CONFLICT),
    )
    def insert(self, writer: int, readings: dict[Any, float], created: str, conflict: str) -> None:
        rows = ", ".join([f"(%s, %s, %s, %s, '{{a}}', {created})"] * len(readings))
        with self.statement(writer) as conn:
            conn.execute(
                f"INSERT INTO metrics VALUES {rows}{conflict}",
                [part for key, value in readings.items() for part in (*self.placed(key), value)],
            )

    @rule(writer=writers, readings=st.dictionaries(keys, st.sampled_from(VALUES), min_size=1, max_size=4))
    def copy(self, writer: int, readings: dict[Any, float]) -> None:
        copy = "COPY metrics (device_id, published_at, metric_name, value, tags) FROM STDIN"
        with self.statement(writer) as conn, conn.cursor() as cursor, cursor.copy(copy) as out:
            for key, value in readings.items():
                out.write_row((*self.placed(key), value, ["copied"]))

    @rule(writer=writers, key=keys, value=st.sampled_from(VALUES))
    def update(self, writer: int, key: tuple[Any, ...], value: float) -> None:
        with self.statement(writer) as conn:
            conn.execute(
                "UPDATE metrics SET value = %s WHERE device_id = %s AND metric_name = %s", [value, key[0], key[2]]
            )

    @rule(writer=writers, key=keys)
    def update_created_at(self, writer: int, key: tuple[Any, ...]) -> None:
        with self.statement(writer) as conn:
            conn.execute("UPDATE metrics SET created_at = now() - interval '1 day' WHERE device_id = %s", [key[0]])

    @rule(writer=writers, key=keys, to=keys)
    def move(self, writer: int, key: tuple[Any, ...], to: tuple[Any, ...]) -> None:
        with self.statement(writer) as conn:
            conn.execute(
                "UPDATE metrics SET device_id = %s, published_at = %s, metric_name = %s "
                "WHERE device_id = %s AND published_at = %s AND metric_name = %s",
                [*self.placed(to), *self.placed(key)],
            )

    @rule(writer=writers, key=keys)
    def delete(self, writer: int, key: tuple[Any, ...]) -> None:
        with self.statement(writer) as conn:
            conn.execute("DELETE FROM metrics WHERE device_id = %s AND published_at = %s", self.placed(key)[:2])

    @rule(writer=writers, often=st.integers(0, 9))
    def truncate(self, writer: int, often: int) -> None:
        if often == 0:
            with self.statement(writer) as conn:
                conn.execute("TRUNCATE metrics")

    @rule(then=st.sampled_from(["put by", "made one", "folded"]), settle=st.integers(0, 3))
    def tick(self, then: str, settle: int) -> None:
        summaries.MOST_PENDING = {"put by": 3_000_000, "made one": 1, "folded": 0}[then]
        summaries.MOST_KEPT = 1e9 if then == "made one" else 0.5
        # Which of the few hours of these readings are over.
        summaries.SETTLED_AFTER = datetime.now(UTC) - BEGIN - self.shift - timedelta(hours=settle)
        with suppress(psycopg.errors.LockNotAvailable):
            self.bench.tick()

    @precondition(lambda self: self.cut < 3)
    @rule()
    def make_partitions(self) -> None:
        now = BEGIN + self.shift + timedelta(hours=self.cut) - partitions.AHEAD["hour"]
        with suppress(ServiceError):  # a writer has the table
            partitions.make(self.database.model_copy(update={"metrics_partition": "hour"}), now + timedelta(seconds=1))
            self.cut += 1

    @rule()
    def count(self) -> None:
        with suppress(psycopg.errors.LockNotAvailable):
            self.bench.reader.execute("SET lock_timeout = '100ms'")
            self.bench.count()


def test_writers_that_interleave_at_random(database: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """While partitions are cut off that hold what they write, and readings move between them."""
    monkeypatch.setattr(partitions, "LOCK_MS", 20)
    monkeypatch.setattr(partitions, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(summaries, "MOST_PENDING", 3_000_000)
    monkeypatch.setattr(summaries, "MOST_KEPT", 0.5)
    monkeypatch.setattr(summaries, "SETTLED_AFTER", timedelta(hours=6))
    machine = type("WritersHere", (Writers,), {"database": database})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=50,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    with postgres.connect(database, "metrics_reader") as connection:
        assert len(partitions.listed(connection)) > 20


def test_writers_that_run_at_the_same_time(bench: Bench, database: Settings) -> None:
    """Four writers for five seconds: copies, upserts over each other's keys, savepoints, rollbacks, deletes."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def write(number: int) -> None:
        chance = random.Random(number)
        try:
            with postgres.connect_admin(database, database.metrics_database, autocommit=False) as conn:
                while not stop.is_set():
                    try:
                        for _ in range(chance.randrange(1, 4)):
                            step(conn, chance)
                        conn.rollback() if chance.random() < 0.2 else conn.commit()
                    except EXPECTED:
                        conn.rollback()
        except BaseException as error:
            errors.append(error)

    def step(conn: Connection, chance: random.Random) -> None:
        start, device, value = chance.randrange(2000), chance.randrange(3), chance.choice(VALUES)
        kind = chance.randrange(5)
        if kind == 0:
            insert(conn, 200, device=device, start=start, then=" ON CONFLICT DO NOTHING")
        elif kind == 1:
            insert(conn, 50, device=device, start=start, value=value, then=UPSERT)
        elif kind == 2:
            with conn.transaction(force_rollback=chance.random() < 0.5):
                insert(conn, 50, device=device, start=start, value=value, then=UPSERT)
        elif kind == 3:
            low = BEGIN + timedelta(seconds=start)
            conn.execute(
                "DELETE FROM metrics WHERE device_id = %s AND published_at BETWEEN %s AND %s",
                [DEVICES[device], low, low + timedelta(seconds=20)],
            )
        else:
            time.sleep(chance.random() * 0.05)

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    begin, ticks = time.monotonic(), 0
    try:
        while time.monotonic() - begin < 5 or ticks <= 5:
            bench.tick()
            bench.count()
            ticks += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    bench.tick()
    assert errors == []


def test_the_index_on_created_at_is_kept_up_to_date(bench: Bench) -> None:
    insert(bench.writer, 50_000)
    absorb(bench.summarizer)
    assert bench.hand.execute("SELECT brin_summarize_new_values('metrics_before_created_at_idx')").fetchone() == (0,)


def test_a_vacuum_is_not_disturbed(bench: Bench) -> None:
    """Whoever waits for its lock makes an autovacuum give up."""
    insert(bench.writer, 50_000)
    with bench.hand.transaction():
        bench.hand.execute("LOCK TABLE metrics IN SHARE UPDATE EXCLUSIVE MODE")
        begin = time.monotonic()
        assert absorb(bench.summarizer) == 50_000
        assert time.monotonic() - begin < 10
        assert bench.summarizer.execute("SELECT refresh_created_at_index()").fetchone() == (None,)


def test_every_table_of_the_summaries_is_compared(bench: Bench) -> None:
    tables = {
        row[0]
        for row in bench.hand.execute(
            "SELECT table_name FROM information_schema.role_table_grants "
            "WHERE grantee = 'metrics_summarizer' AND privilege_type = 'UPDATE'"
        )
    }
    views = {"device_metric_summary", "device_summary"}
    assert tables == PAIRS.keys() - views - {"device_deltas"} | {"ingestion_rate"}
    for table in sorted(tables):
        statement = sql.SQL("SELECT obj_description({}::regclass)").format(sql.Literal(table))
        assert bench.hand.execute(statement).fetchone() != (None,)
