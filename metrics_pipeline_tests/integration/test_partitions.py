"""The partitions on a real PostgreSQL: made while others store and read, readings of any time, and the way there and back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from metrics_pipeline import partitions, postgres, retention, summaries
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.postgres import MIGRATIONS, Connection
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.databases import own_database

pytestmark = pytest.mark.integration

DEVICE = UUID(int=7)
STEPS = 20
MANY = 1_000_000
"""Readings that are more than a partition may hold that is looked at while the table is locked."""
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


def fill(settings: Settings, begin: datetime, rows: int, *, every: float) -> None:
    """Readings of five devices, one each so many seconds."""
    with postgres.connect(settings, "metrics_writer", autocommit=True) as connection:
        connection.execute(
            "INSERT INTO metrics (device_id, published_at, metric_name, value) "
            "SELECT lpad((n %% 5)::text, 32, '0')::uuid, %s::timestamptz + n * %s * interval '1 second', 0, n %% 100 "
            "FROM generate_series(0, %s - 1) AS n",
            [begin, every, rows],
        )


def test_how_much_is_in_a_partition_is_known_before_it_was_analyzed(database: Settings) -> None:
    now = datetime.now(UTC).replace(hour=12)
    (today, *_) = partitions.make(database, now)
    for rows, statement in ((20_000, "SELECT"), (10_000, f"ANALYZE {today}")):
        fill(database, now + timedelta(seconds=rows), rows, every=0.1)
        with postgres.connect_admin(database, database.metrics_database) as connection:
            found = {partition.name: partition.rows for partition in partitions.listed(connection)}
            connection.execute(statement)
        stored = where(database)[today]
        assert 0.6 * stored < found.pop(today) < 1.4 * stored
        assert set(found.values()) == {0}


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many readings of each partition were looked at when it was attached."""
    found: dict[str, int] = {}
    attach = partitions.attach

    def counted(connection: Connection, name: str, *bounds: Any) -> None:
        reads = "SELECT seq_tup_read FROM pg_stat_xact_user_tables WHERE relid = quote_ident(%s)::regclass"
        (before,) = connection.execute(reads, [name]).fetchone() or (0,)
        attach(connection, name, *bounds)
        (after,) = connection.execute(reads, [name]).fetchone() or (0,)
        found[name] = after - before

    exchange = partitions._Splitting._exchange

    def exchanged(splitting: Any) -> None:
        exchange(splitting)
        for name, _, _ in splitting._pieces:
            reads = "SELECT seq_tup_read FROM pg_stat_xact_user_tables WHERE relname = %s"
            (found[name],) = splitting._connection.execute(reads, [name.replace("split_", "")]).fetchone() or (0,)

    monkeypatch.setattr(partitions, "attach", counted)
    monkeypatch.setattr(partitions._Splitting, "_exchange", exchanged)
    return found


class Others:
    """Sessions that store and read without a pause, and what failed of it."""

    def __init__(self, settings: Settings, *times: datetime) -> None:
        self._settings = settings
        self._stop = threading.Event()
        self.failed: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(role, work, at))
            for at in times
            for role, work in (("metrics_writer", self._store), ("metrics_reader", self._read))
        ]

    def __enter__(self) -> Others:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, role: Any, work: Any, at: datetime) -> None:
        try:
            with postgres.connect(self._settings, role, autocommit=True) as connection:
                # Who reads a partition whole is who attaches it.
                connection.execute("SET enable_seqscan = off")
                # Who waits for a lock for so long fails, however slow the machine is otherwise.
                connection.execute("SET lock_timeout = '1s'")
                step = 0
                while not self._stop.is_set():
                    work(connection, at, step)
                    step += 1
                    time.sleep(0.002)
        except psycopg.Error as error:
            self.failed.append(error)

    @staticmethod
    def _store(connection: Connection, at: datetime, step: int) -> None:
        """New readings, the same again with other values, and in the end fewer."""
        connection.execute(
            "INSERT INTO metrics (device_id, published_at, metric_name, value) "
            "SELECT %s, %s::timestamptz + (%s + n) * interval '1 second', 10, %s FROM generate_series(1, 20) AS n "
            "ON CONFLICT (device_id, published_at, metric_name) DO UPDATE SET value = excluded.value",
            [DEVICE, at, step % 500 * 7, step],
        )

    @staticmethod
    def _read(connection: Connection, at: datetime, step: int) -> None:
        connection.execute(
            "SELECT count(*) FROM metrics WHERE device_id = %s AND published_at >= %s AND metric_name = 10",
            [DEVICE, at + timedelta(seconds=step)],
        )


def test_nobody_waits_for_a_producer_whose_clock_is_a_year_ahead(
    database: Settings, looked_at: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    """Its readings are copied into partitions of their time, and a few others that lie between and behind stay where they have a place."""
    begin = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    far = begin + timedelta(days=365)
    partitions.make(database)
    summaries.ingestion_rate(database)
    fill(database, far + timedelta(hours=20), MANY, every=0.02)
    store(database, begin + timedelta(days=5, hours=3), begin + timedelta(days=70), datetime(9999, 12, 31, tzinfo=UTC))
    summaries.ingestion_rate(database)
    now = begin + timedelta(days=2)
    with Others(database, begin, begin + timedelta(days=6), far + timedelta(days=1)) as others:
        looked_at.clear()
        made = partitions.make(database, now)
        assert partitions.make(database, now) == []
    assert others.failed == []
    assert set(looked_at.values()) == {0}
    assert partitions.missing(database, now) == []
    days = [f"metrics_p{far + timedelta(days=day):%Y%m%d}" for day in range(2)]
    assert set(days) < set(made)
    found = where(database)
    assert found[f"metrics_p{begin + timedelta(days=5):%Y%m%d}"] == 1
    assert found[partitions.LAST] == 1
    assert sum(found[day] for day in days) >= MANY
    with postgres.connect(database, "metrics_reader") as connection:
        listed = partitions.listed(connection)
    assert [one.low for one in listed[1:]] == [one.high for one in listed[:-1]]
    summaries_agree(database)
    # The year goes by, and their time comes.
    for day in (30, 200, 361, 364, 366, 380):
        partitions.make(database, begin + timedelta(days=day))
        assert partitions.missing(database, begin + timedelta(days=day)) == []
    summaries_agree(database)
    assert sum(where(database).values()) == sum(found.values())
    assert "counting all" not in caplog.text


def test_nobody_waits_for_many_readings_just_behind_the_last_partition(
    database: Settings, looked_at: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    begin = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    partitions.make(database)
    summaries.ingestion_rate(database)
    fill(database, begin + timedelta(days=5), MANY, every=0.2)
    with Others(database, begin + timedelta(days=5), begin + timedelta(days=6)) as others:
        looked_at.clear()
        assert len(partitions.make(database, begin + timedelta(days=2))) > 3
    assert others.failed == []
    assert set(looked_at.values()) == {0}
    assert partitions.LAST not in where(database)
    summaries_agree(database)
    assert "counting all" not in caplog.text


def test_many_late_readings_cost_nobody_anything(
    database: Settings, looked_at: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    """Old files are replayed: what lies before the partitions may be large while partitions are made and go."""
    begin = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    partitions.make(database)
    summaries.ingestion_rate(database)
    fill(database, begin - timedelta(days=3000), MANY, every=100)
    summaries.ingestion_rate(database)
    store(database, begin)
    (first, today, *_) = partitions.every(database)
    with Others(database, begin, begin - timedelta(days=2000)) as others:
        looked_at.clear()
        assert partitions.make(database, begin + timedelta(days=3)) != []
        retention.drop(database, today)
        assert partitions.every(database)[0].high == today.high
        retention.drop(database, partitions.every(database)[0])
    assert others.failed == []
    assert first.name in looked_at
    assert set(looked_at.values()) == {0}
    assert sum(where(database).values()) < MANY / 10
    summaries_agree(database)
    assert "counting all" not in caplog.text


def test_a_split_that_died_leaves_nothing(database: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its statements; what it left is cleared away by the next one, and the readings are always there."""
    monkeypatch.setattr(partitions, "FEW_BYTES", 0)
    monkeypatch.setattr(partitions, "FEW_ROWS", 5)
    monkeypatch.setattr(partitions, "PIECES_AHEAD", 0)
    begin = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    partitions.make(database)
    execute, step = psycopg.Connection.execute, 1
    for step in range(3, 300, 9):
        store(database, *(begin + timedelta(days=40 + 2 * step, hours=hour) for hour in range(20)))
        before, left = rows(database), step

        def counted(self: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            if left < 0:  # the process is not there any more
                raise psycopg.OperationalError("gone")
            return execute(self, *arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(psycopg.Connection, "execute", counted)
            with suppress(KeyboardInterrupt, ServiceError, psycopg.Error):
                partitions.make(database)
        assert rows(database) == before
        summaries_agree(database)
        partitions.make(database)
        assert rows(database) == before
        with postgres.connect_admin(database, database.metrics_database) as hand:
            assert hand.execute(
                "SELECT to_regclass('metrics_split'), (SELECT count(*) FROM split_changes)"
            ).fetchone() == (None, 0)
            assert hand.execute("SELECT FROM pg_trigger WHERE tgname LIKE 'metrics_8%'").fetchall() == []
        if left > 0:
            break
    assert step > 60
    summaries_agree(database)


def test_readings_everywhere_stay_in_one_partition_until_their_time(
    database: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "FEW_BYTES", 0)
    monkeypatch.setattr(partitions, "FEW_ROWS", 1)
    begin = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    (*_, last) = partitions.make(database)
    store(database, *(begin + timedelta(days=200, hours=hour) for hour in range(20)))
    assert f"metrics_p{begin + timedelta(days=200):%Y%m%d}" in partitions.make(database)
    (gap,) = [one for one in partitions.every(database) if one.name.startswith("metrics_gap")]
    assert gap.low is not None
    store(database, *(gap.low + timedelta(days=day) for day in range(length(gap).days)))
    stored = rows(database)
    assert partitions.make(database) == []
    wide = names(database)[names(database).index(last) + 1]
    assert wide.startswith("metrics_wide")
    assert partitions.make(database) == []
    for day in range(1, 30, 7):
        partitions.make(database, begin + timedelta(days=day))
        assert partitions.missing(database, begin + timedelta(days=day)) == []
    assert rows(database) == stored
    assert names(database)[-2:] == [names(database)[-2], partitions.LAST]
    summaries_agree(database)


def length(partition: partitions.Partition) -> timedelta:
    assert partition.low is not None
    assert partition.high is not None
    return partition.high - partition.low


@pytest.mark.parametrize("seed", range(2))
def test_any_history(
    database: Settings, seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Readings of any time, partitions made at any time and of any width: the table is what was stored, and the summaries are of it."""
    rng = random.Random(seed)
    monkeypatch.setattr(partitions, "FEW_BYTES", 4 * 8192)
    monkeypatch.setattr(partitions, "FEW_ROWS", 20)
    now = datetime.now(UTC)
    stored: dict[datetime, float] = {}
    with postgres.connect(database, "metrics_writer", autocommit=True) as writer:
        for _ in range(STEPS):
            now += timedelta(minutes=rng.choice([0, 1, 60, 1500, 50_000]))
            away = rng.choice([0, 0, 1, 5, 40, 365, 366, 4000]) * rng.choice([1, 1, -1])
            at = now + timedelta(days=away, seconds=rng.randrange(100_000))
            if rng.random() < 0.05:
                at = rng.choice([datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)])
            step = (
                timedelta(seconds=rng.choice([0.001, 1, 600, 86_400])) if at.year < 9000 else timedelta(milliseconds=1)
            )
            times = [at + n * step for n in range(rng.choice([1, 5, 100, 900]))]
            value = rng.random()
            with writer.cursor() as cursor, writer.transaction():
                cursor.executemany(
                    "INSERT INTO metrics (device_id, published_at, metric_name, value) VALUES (%s, %s, 0, %s) "
                    "ON CONFLICT (device_id, published_at, metric_name) DO UPDATE SET value = excluded.value",
                    [(DEVICE, at, value) for at in times],
                )
            stored |= dict.fromkeys(times, value)
            if rng.random() < 0.4:
                summaries.ingestion_rate(database)
            if rng.random() < 0.5:
                open_from = partitions._open(partitions.every(database), now)[0].low
                # Hours of weeks that nobody made partitions in are many.
                short = "hour" if open_from and open_from > now - timedelta(days=1) else "day"
                own = database.model_copy(update={"metrics_partition": rng.choice(["day", short, "month"])})
                partitions.make(own, now)
                assert partitions.missing(own, now) == []
                (present,) = [
                    one for one in partitions.every(own)[1:-1] if one.low and one.high and one.low <= now < one.high
                ]
                assert length(present) <= timedelta(days=31)
            assert {row[1]: row[3] for row in rows(database)} == stored
            summaries_agree(database)
    with postgres.connect(database, "metrics_reader") as connection:
        listed = partitions.listed(connection)
    assert [one.low for one in listed[1:]] == [one.high for one in listed[:-1]]
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


@contextmanager
def storing(settings: Settings) -> Iterator[list[float]]:
    """Somebody stores a reading again and again, and waits for no lock for as long as two seconds; how many seconds each took."""
    stop, took, failed = threading.Event(), [0.0], []

    def write() -> None:
        try:
            with postgres.connect(settings, "metrics_writer", autocommit=True) as connection:
                connection.execute("SET lock_timeout = '2s'")
                while not stop.is_set():
                    begun = time.monotonic()
                    connection.execute(
                        "INSERT INTO metrics (device_id, published_at, metric_name, value) "
                        "VALUES (%s, clock_timestamp(), 0, 1)",
                        [DEVICE],
                    )
                    took.append(time.monotonic() - begun)
                    time.sleep(0.01)
        except psycopg.Error as error:
            failed.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join()
    assert failed == []


def test_nobody_waits_long_behind_who_makes_partitions(database: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long reader keeps the table: what comes behind the statement that waits for it goes on within a second."""
    partitions.make(database)
    monkeypatch.setattr(partitions, "PATIENCE_SECONDS", 2.0)
    later = datetime.now(UTC) + timedelta(days=30)
    with postgres.connect(database, "metrics_reader") as reader:
        reader.execute("SELECT count(*) FROM metrics")
        with storing(database) as took:
            with pytest.raises(ServiceError, match="for too long"):
                partitions.make(database, later)
            reader.rollback()
            assert partitions.make(database, later) != []
    assert max(took) > 0.2, "it waited"
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


def test_nobody_waits_long_behind_the_migration(database: Settings) -> None:
    """Somebody reads all of the table for seconds, again and again: who comes behind the migration goes on within a second."""
    for _ in MIGRATED:
        postgres.rollback(database)
    store(database, datetime.now(UTC))
    stop = threading.Event()

    def read() -> None:
        with postgres.connect(database, "metrics_reader") as connection:
            while not stop.is_set():
                connection.execute("SELECT count(*) FROM metrics")
                stop.wait(3)
                connection.rollback()
                stop.wait(1.5)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with storing(database) as took:
            assert postgres.migrate(database) == MIGRATED[::-1]
    finally:
        stop.set()
        reader.join()
    assert max(took) > 0.2, "it waited"


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
