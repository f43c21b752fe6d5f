"""The partitions on a real PostgreSQL: made while others store and read, readings of any time, and the way there and back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from metrics_pipeline import partitions, postgres, summaries
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.postgres import MIGRATIONS, Connection
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.databases import own_database

pytestmark = pytest.mark.integration

DEVICE = UUID(int=7)
MIGRATED = [
    "20261127000030_archive",
    "20261127000020_retention",
    "20261127000013_partitions",
    "20261127000012_partition_proof",
    "20261127000011_partition_cutover",
]


@pytest.fixture
def database(stack: RunningStack) -> Iterator[Settings]:
    with own_database(stack.settings) as own:
        yield own


def store(settings: Settings, *times: datetime) -> None:
    with postgres.connect(settings, "metrics_writer", autocommit=True) as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO metrics (device_id, published_at, metric_name, value) VALUES (%s, %s, 0, 20.5) "
            "ON CONFLICT (device_id, published_at, metric_name) DO UPDATE SET value = excluded.value",
            [(DEVICE, at) for at in times],
        )


def where(settings: Settings) -> dict[str, int]:
    """Readings by partition."""
    with postgres.connect(settings, "metrics_reader") as connection:
        rows = connection.execute("SELECT tableoid::regclass::text, count(*) FROM metrics GROUP BY 1 ORDER BY 1")
        return dict(rows.fetchall())


def names(settings: Settings) -> list[str]:
    with postgres.connect(settings, "metrics_reader") as connection:
        return [partition.name for partition in partitions.listed(connection)]


def summaries_agree(settings: Settings) -> None:
    found = summaries.device_summary(settings)
    with postgres.connect(settings, "metrics_reader") as connection:
        plain = connection.execute(postgres.query("device_summary_plain")).fetchall()
        assert found.rows == sum(row[1] for row in plain)
        kept = connection.execute("SELECT device_id, rows, first_seen, last_seen FROM device_summary ORDER BY 1")
        assert kept.fetchall() == plain
        assert summaries.row_count(connection) == found.rows


def test_a_new_table_has_partitions_from_today(database: Settings) -> None:
    now = datetime.now(UTC)
    assert partitions.missing(database) != []
    made = partitions.make(database)
    assert made[0] == f"metrics_p{now:%Y%m%d}"
    assert names(database) == [partitions.FIRST, *made, partitions.LAST]
    assert partitions.make(database) == []
    assert partitions.missing(database) == []
    store(database, now, now - timedelta(days=400), now + timedelta(days=400))
    assert where(database) == {made[0]: 1, partitions.FIRST: 1, partitions.LAST: 1}


def test_a_month_goes_by(database: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Each day's readings find their partition; those of clocks that are wrong find a place, and move when their time comes."""
    begin = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    summaries.ingestion_rate(database)
    store(database, begin + timedelta(days=20, hours=1), begin + timedelta(days=365), datetime(1, 1, 1, tzinfo=UTC))
    for day in range(31):
        now = begin + timedelta(days=day, hours=12)
        partitions.make(database, now)
        assert partitions.missing(database, now) == []
        store(database, now, now + timedelta(microseconds=1), now - timedelta(days=60), now + timedelta(days=300))
        if day % 10 == 0:
            summaries_agree(database)
    found = where(database)
    assert found.pop(partitions.FIRST) == 32
    assert found.pop(partitions.LAST) == 32
    days = [f"metrics_p{begin + timedelta(days=day):%Y%m%d}" for day in range(31)]
    assert found == {name: 3 if name == days[20] else 2 for name in days}
    summaries_agree(database)
    assert "counting all" not in caplog.text


def test_widths_may_change(database: Settings) -> None:
    begin = datetime.now(UTC)
    for day, width in enumerate(("hour", "day", "month", "minute", "hour")):
        own = database.model_copy(update={"metrics_partition": width})
        partitions.make(own, begin + timedelta(days=60 * day // 4))
        store(database, begin + timedelta(days=60 * day // 4))
    with postgres.connect(database, "metrics_reader") as connection:
        found = partitions.listed(connection)
    assert [partition.low for partition in found[1:]] == [partition.high for partition in found[:-1]]
    summaries_agree(database)


def test_nobody_waits_long_behind_who_makes_partitions(database: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long reader keeps the table: what comes behind the statement that waits for it goes on within a second."""
    partitions.make(database)
    monkeypatch.setattr(partitions, "PATIENCE_SECONDS", 2.0)
    later = datetime.now(UTC) + timedelta(days=30)
    longest, stop = 0.0, threading.Event()

    def write() -> None:
        nonlocal longest
        with postgres.connect(database, "metrics_writer", autocommit=True) as connection:
            while not stop.is_set():
                begun = time.monotonic()
                connection.execute(
                    "INSERT INTO metrics (device_id, published_at, metric_name, value) VALUES (%s, clock_timestamp(), 0, 1)",
                    [DEVICE],
                )
                longest = max(longest, time.monotonic() - begun)
                time.sleep(0.01)

    writer = threading.Thread(target=write)
    with postgres.connect(database, "metrics_reader") as reader:
        reader.execute("SELECT count(*) FROM metrics")
        writer.start()
        try:
            with pytest.raises(ServiceError, match="for too long"):
                partitions.make(database, later)
            reader.rollback()
            assert partitions.make(database, later) != []
        finally:
            stop.set()
            writer.join()
    assert 0.2 < longest < 3, "it waited, and not until the reader was done"
    summaries_agree(database)


def rows(settings: Settings) -> list[tuple[Any, ...]]:
    with postgres.connect(settings, "metrics_reader") as connection:
        return connection.execute("SELECT * FROM metrics ORDER BY 1, 2, 3").fetchall()


def triggers(connection: Connection) -> list[tuple[Any, ...]]:
    return connection.execute(
        "SELECT tgname, tgenabled, tgfoid::regproc FROM pg_trigger WHERE tgrelid = 'metrics'::regclass ORDER BY 1"
    ).fetchall()


def grants(connection: Connection) -> list[tuple[Any, ...]]:
    return connection.execute(
        "SELECT grantee, privilege_type, column_name FROM information_schema.column_privileges "
        "WHERE table_name = 'metrics' ORDER BY 1, 2, 3"
    ).fetchall()


def checks(connection: Connection) -> list[tuple[Any, ...]]:
    return connection.execute(
        "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'metrics'::regclass ORDER BY 1"
    ).fetchall()


def test_a_table_with_readings_becomes_a_partition_and_back(
    database: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    now = datetime.now(UTC)
    with postgres.connect_admin(database, database.metrics_database) as hand:
        after = triggers(hand), grants(hand), checks(hand)
        assert [postgres.rollback(database) for _ in MIGRATED] == MIGRATED
        before = triggers(hand), grants(hand), checks(hand)
        assert (before[1], before[2]) == (after[1], after[2])
        summaries.ingestion_rate(database)
        store(database, *(now - timedelta(hours=n) for n in range(200)))
        summaries.ingestion_rate(database)
        store(database, *(now + timedelta(hours=n) for n in range(1, 100)))
        stored = rows(database)
        caplog.clear()
        assert postgres.migrate(database) == MIGRATED[::-1]
        assert rows(database) == stored
        assert (triggers(hand), grants(hand), checks(hand)) == after
        assert set(where(database)) == {partitions.FIRST, partitions.LAST}
        summaries_agree(database)
        partitions.make(database, now + timedelta(days=3))
        store(database, *(now + timedelta(hours=n) for n in range(-3, 150)))
        stored = rows(database)
        summaries_agree(database)
        assert "counting all" not in caplog.text
        assert [postgres.rollback(database) for _ in MIGRATED] == MIGRATED
        assert rows(database) == stored
        assert (triggers(hand), grants(hand), checks(hand)) == before
        summaries_agree(database)
        postgres.migrate(database)
        assert rows(database) == stored
        summaries_agree(database)


def test_a_check_that_was_never_validated_comes_along(database: Settings) -> None:
    """As the migration of another metric leaves it."""
    for _ in MIGRATED:
        postgres.rollback(database)
    store(database, datetime.now(UTC))
    check = "CHECK (metric_name IN (0, 10, 20, 30, 40, 50, 60)) NOT VALID"
    with postgres.connect(database, "metrics_owner", autocommit=True) as owner:
        owner.execute("ALTER TABLE metrics DROP CONSTRAINT metrics_metric_name_is_known")
        owner.execute(f"ALTER TABLE metrics ADD CONSTRAINT metrics_metric_name_is_known {check}".encode())
        postgres.migrate(database)
        partitions.make(database, datetime.now(UTC) + timedelta(days=3))
        owner.execute(
            "INSERT INTO metrics (device_id, published_at, metric_name, value) SELECT %s, now() + n * '1 day'::interval, 60, 1 FROM generate_series(-1, 9) AS n",
            [DEVICE],
        )
        with pytest.raises(psycopg.errors.CheckViolation):
            owner.execute(
                "INSERT INTO metrics (device_id, published_at, metric_name, value) VALUES (%s, now(), 61, 1)", [DEVICE]
            )
        # Once partitioned, the same again: for all partitions at once, and those that come.
        owner.execute("ALTER TABLE metrics DROP CONSTRAINT metrics_metric_name_is_known")
        owner.execute(f"ALTER TABLE metrics ADD CONSTRAINT metrics_metric_name_is_known {check}".encode())
    assert partitions.make(database, datetime.now(UTC) + timedelta(days=30)) != []
    assert sum(where(database).values()) == 12


def test_a_reading_of_a_later_time_waits_for_the_migration(database: Settings) -> None:
    """It is neither stored in the wrong place nor refused: sinks wait as they do for a lock."""
    now = datetime.now(UTC)
    for _ in MIGRATED:
        postgres.rollback(database)
    store(database, now)
    (file,) = MIGRATIONS.glob("20261127000011_*.sql")
    up = file.read_text().partition("-- migrate:up")[2].partition("-- migrate:down")[0]
    with postgres.connect(database, "metrics_owner") as owner:
        owner.execute(up.encode())
    store(database, now + timedelta(hours=20))
    with pytest.raises(psycopg.errors.LockNotAvailable, match="when the table is partitioned"):
        store(database, now + timedelta(days=5))


def test_the_roles_may_do_through_the_table_only_what_they_could(database: Settings) -> None:
    (name, *_) = partitions.make(database)
    with postgres.connect(database, "metrics_writer", autocommit=True) as writer:
        for table in (name, partitions.FIRST, partitions.LAST):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                writer.execute(
                    f"INSERT INTO {table} (device_id, published_at, metric_name, value) VALUES (%s, now(), 0, 1)",
                    [DEVICE],
                )
