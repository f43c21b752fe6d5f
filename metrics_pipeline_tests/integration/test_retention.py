"""Retention on a real PostgreSQL: the summaries after each drop and each restore, deaths at each step, and who waits for whom."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from pydantic import SecretStr
from typer.testing import CliRunner

from metrics_pipeline import cli, partitions, postgres, retention, summaries
from metrics_pipeline.errors import BusyError, PipelineError, ServiceError
from metrics_pipeline.partitions import FIRST, Partition
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.databases import own_database
from metrics_pipeline_tests.integration.test_summaries import Bench, Writers
from metrics_pipeline_tests.patience import patience
from metrics_pipeline_tests.servers import Server, own_server

pytestmark = pytest.mark.integration

HOUR = timedelta(hours=1)
COLUMNS = "device_id, published_at, metric_name, value, tags, created_at"


@pytest.fixture
def database(stack: RunningStack) -> Iterator[Settings]:
    with own_database(stack.settings) as own:
        yield own.model_copy(update={"metrics_partition": "hour"})


@pytest.fixture(params=["put by", "folded at once"])
def often(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a tick puts entries by for later, or folds them in at once."""
    if request.param == "folded at once":
        monkeypatch.setattr(summaries, "FEWEST_PENDING", 0)
        monkeypatch.setattr(summaries, "MOST_PENDING", 0)


@contextmanager
def benches(settings: Settings) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(settings, stack)


def today() -> datetime:
    """Where the partitions of a new table begin."""
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def store(connection: postgres.Connection, begin: datetime, rows: int, *, every: float = 60, value: float = 0) -> None:
    """Readings of five devices, one each so many seconds; the same again is an upsert."""
    connection.execute(
        "INSERT INTO metrics (device_id, published_at, metric_name, value) "
        "SELECT lpad((n %% 5)::text, 32, '0')::uuid, %s::timestamptz + n * %s * interval '1 second', n %% 3 * 10, "
        "%s::float8 + n * 0.25 FROM generate_series(0, %s - 1) AS n "
        "ON CONFLICT (device_id, published_at, metric_name) DO UPDATE SET value = excluded.value",
        [begin, every, value, rows],
    )


def bounds_of(partition: Partition) -> tuple[datetime, datetime]:
    assert partition.low is not None
    assert partition.high is not None
    return partition.low, partition.high


def named(settings: Settings, name: str) -> Partition:
    with postgres.connect(settings, "metrics_reader") as connection:
        return next(one for one in partitions.listed(connection) if one.name == name)


def names(settings: Settings) -> list[str]:
    with postgres.connect(settings, "metrics_reader") as connection:
        return [one.name for one in partitions.listed(connection)]


def rows(settings: Settings) -> list[tuple[Any, ...]]:
    with postgres.connect(settings, "metrics_reader") as connection:
        return connection.execute(f"SELECT {COLUMNS} FROM metrics ORDER BY 1, 2, 3".encode()).fetchall()


def leftovers(settings: Settings) -> list[str]:
    """Tables that a drop or a restore left behind."""
    with postgres.connect_admin(settings, settings.metrics_database) as hand:
        found = hand.execute(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname ~ '^metrics_(detached|next|restored)'"
        )
        return sorted(name for (name,) in found)


@pytest.mark.usefixtures("often")
def test_the_summaries_are_right_after_each_drop(database: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """With late readings, upserts and deletions before, between and after; without counting all again."""
    begin = today()
    partitions.make(database, begin + 12 * HOUR)
    with benches(database) as bench:
        bench.tick()
        store(bench.writer, begin - 3 * HOUR, 2_000)
        bench.tick()
        store(bench.writer, begin + HOUR, 500, value=3)
        for at in range(4):
            # Late, and not in the summaries yet: new readings, other values, others gone, some moved to other partitions.
            store(bench.writer, begin + at * HOUR + timedelta(seconds=7), 90, every=40)
            store(bench.writer, begin + at * HOUR, 50, value=100 + at)
            bench.hand.execute(
                "DELETE FROM metrics WHERE published_at >= %s AND published_at < %s AND value::bigint %% 7 = 3",
                [begin + at * HOUR, begin + (at + 2) * HOUR],
            )
            bench.hand.execute(
                "UPDATE metrics SET published_at = published_at + interval '100 minutes 1 microsecond' "
                "WHERE published_at >= %s AND published_at < %s AND metric_name = 20",
                [begin + at * HOUR + HOUR / 2, begin + at * HOUR + HOUR],
            )
            name = names(database)[1]
            there = bench.hand.execute(f"SELECT count(*) FROM {name}".encode()).fetchone()
            dropped = retention.drop(database, named(database, name))
            assert (dropped.rows,) == there
            bench.count()
            bench.tick()
            assert name not in names(database)
            assert bench.hand.execute("SELECT retained_from FROM retention_state").fetchone() == (
                begin + (at + 1) * HOUR,
            )
            # Later than late: it has its place, and goes the next time.
            store(bench.writer, begin + at * HOUR, 70, every=10)
            if at % 2:
                retention.drop(database, named(database, FIRST))
                assert bench.hand.execute(f"SELECT count(*) FROM {FIRST}".encode()).fetchone() == (0,)
            bench.count()
            bench.tick()
    assert leftovers(database) == []
    assert "counting all" not in caplog.text
    assert "counted again" not in caplog.text


def test_any_partition_may_go(database: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """One in the middle leaves an empty one in its place."""
    begin = today()
    partitions.make(database, begin + 12 * HOUR)
    rng = random.Random(7)
    with benches(database) as bench:
        bench.tick()
        store(bench.writer, begin - HOUR, 900)
        bench.tick()
        for _ in range(12):
            store(bench.writer, begin + timedelta(minutes=rng.randrange(700)), 100, every=rng.choice([1, 30, 300]))
            if rng.random() < 0.5:
                bench.tick()
            partition = rng.choice([one for one in names(database) if one != partitions.LAST])
            retention.drop(database, named(database, partition))
            bench.count()
            if rng.random() < 0.5:
                bench.tick()
        bench.tick()
    with postgres.connect(database, "metrics_reader") as connection:
        found = partitions.listed(connection)
    assert [one.low for one in found[1:]] == [one.high for one in found[:-1]]
    assert "counting all" not in caplog.text
    with pytest.raises(ServiceError, match="has no end"):
        retention.drop(database, named(database, partitions.LAST))
    with pytest.raises(ServiceError, match="list them again"):
        retention.drop(database, Partition("metrics_p2020010101", begin, begin + HOUR, 0, 0))


@pytest.mark.usefixtures("often")
def test_partitions_of_a_minute(database: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Smaller than a slot of the summaries: what is left of the slot is exact."""
    own = database.model_copy(update={"metrics_partition": "minute", "metrics_retention": "5m"})
    begin = today()
    partitions.make(own, begin + timedelta(minutes=70))
    with benches(own) as bench:
        bench.tick()
        for minute in range(50, 70, 2):
            now = begin + timedelta(minutes=minute)
            store(bench.writer, now - timedelta(minutes=2), 1_000, every=0.12)
            store(bench.writer, now - timedelta(minutes=9), 100, every=3, value=minute)
            if minute % 4:
                bench.tick()
            gone = retention.run(own, now)
            assert all(one.high and one.high <= now - timedelta(minutes=5) for one, _ in gone)
            assert retention.behind(own, now) == []
            store(bench.writer, now - timedelta(minutes=7), 10, every=2, value=-1)
            bench.count()
            bench.tick()
    assert "counting all" not in caplog.text


def test_a_transaction_that_is_open_meanwhile(database: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = today()
    partitions.make(database, begin + 3 * HOUR)
    monkeypatch.setattr(partitions, "PATIENCE_SECONDS", 1.0)
    with benches(database) as bench, postgres.connect(database, "metrics_writer") as slow:
        store(bench.writer, begin, 200)
        bench.tick()
        store(slow, begin, 20, value=5)
        with pytest.raises(ServiceError, match="for too long"):
            retention.drop(database, named(database, names(database)[1]))
        bench.tick()
        slow.commit()
        bench.tick()
        store(bench.writer, begin + timedelta(seconds=1), 200)
        assert retention.drop(database, named(database, names(database)[1])).rows == 120
        bench.count()
        bench.tick()
        # One that had read, and not yet written, before the partition went.
        slow.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        slow.execute("SELECT now()")
        retention.drop(database, named(database, names(database)[1]))
        store(slow, begin + HOUR, 30)
        bench.tick()
        slow.commit()
        bench.count()
        bench.tick()


def test_what_is_kept_is_what_goes(database: Settings) -> None:
    """The hook sees the partition whole, is called again when readings went, and stops the drop when it fails."""
    begin = today()
    partitions.make(database, begin + 3 * HOUR)
    name = names(database)[1]
    kept: list[list[Any]] = []
    with benches(database) as bench:
        store(bench.writer, begin, 100)
        bench.tick()

        def refuse(_partition: Partition) -> None:
            raise PipelineError("the archive is full")

        before = rows(database)
        with pytest.raises(PipelineError, match="is full"):
            retention.drop(database, named(database, name), refuse)
        assert rows(database) == before
        assert name in names(database)

        def keep(partition: Partition) -> None:
            kept.append(bench.hand.execute(f"SELECT {COLUMNS} FROM {partition.name} ORDER BY 1, 2".encode()).fetchall())
            if len(kept) == 1:
                bench.hand.execute(f"DELETE FROM {partition.name} WHERE metric_name = 10".encode())
            elif len(kept) == 2:
                # Three of these are new, and seven get another value: they stay.
                store(bench.writer, begin, 10, value=77)

        stored = retention.drop(database, named(database, name), keep).rows
        assert len(kept) == 2
        assert (len(kept[-1]), stored) == (40, 33)
        left = bench.hand.execute(f"SELECT count(*), min(value) FROM {FIRST}".encode()).fetchone()
        assert left == (10, 77)
        bench.tick()

        def endless(partition: Partition) -> None:
            oldest = f"SELECT min(published_at) FROM {partition.name}"
            bench.hand.execute(f"DELETE FROM {partition.name} WHERE published_at = ({oldest})".encode())

        with pytest.raises(ServiceError, match="keep coming"):
            retention.drop(database, named(database, names(database)[1]), endless)
        bench.count()
        bench.tick()
        retention.drop(database, named(database, names(database)[1]))
        bench.tick()
    assert leftovers(database) == []


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("minutes", [60, 1])
def test_late_readings_stay_when_their_partition_goes(
    database: Settings, minutes: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that come while it is put by, again and again: it goes without them, and so does `metrics_before`."""
    own = database.model_copy(update={"metrics_partition": "hour" if minutes == 60 else "minute"})
    begin, width = today(), timedelta(minutes=minutes)
    partitions.make(own, begin + timedelta(hours=1))
    with benches(own) as bench:
        bench.tick()
        for at in range(4):
            name = FIRST if at % 2 else names(own)[1]
            low = named(own, name).low or begin - (30 + at) * width
            store(bench.writer, low, 50, every=0.5, value=at)
            if at < 2:
                bench.tick()
            (there, already) = (
                bench.hand.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() or (0,)
                for table in (name, FIRST)
            )

            def keep(_partition: Partition, low: datetime = low, at: int = at) -> None:
                store(bench.writer, low + timedelta(seconds=30.25), 20, every=0.5)
                if at % 3:
                    bench.tick()
                store(bench.writer, low + timedelta(seconds=45.25), 10, every=0.5)
                store(bench.writer, low + timedelta(seconds=45.25), 5, every=0.5, value=7)

            dropped = retention.drop(own, named(own, name), keep)
            assert (dropped.rows,) == there
            left = bench.hand.execute(f"SELECT count(*) FROM {FIRST}".encode()).fetchone()
            assert left == (30 + (0 if name == FIRST else already[0]),)
            bench.count()
            bench.tick()

    assert leftovers(own) == []
    assert "counting all" not in caplog.text
    assert "counted again" not in caplog.text


def test_only_what_was_detached_is_dropped(database: Settings) -> None:
    begin = today()
    partitions.make(database, begin + 3 * HOUR)
    with benches(database) as bench, postgres.connect(database, "metrics_owner", autocommit=True) as owner:
        store(bench.writer, begin, 100)
        owner.execute("CREATE TABLE metrics_detached_1 AS SELECT 1 AS one")
        with pytest.raises(ServiceError, match="already exists"):
            retention.drop(database, named(database, names(database)[1]))
        bench.tick()
        # A number is taken only once.
        retention.drop(database, named(database, names(database)[1]))
        bench.tick()
        owner.execute(
            "INSERT INTO detached_partitions (partition, high, rows, bytes, detached_at) "
            "VALUES ('one', now(), 1, 1, now() - interval '1 day'), ('two', now(), 1, 1, now() - interval '1 day')"
        )
        owner.execute("CREATE TABLE metrics_detached_3 AS SELECT 1 AS one")
        retention.run(database)
        assert leftovers(database) == ["metrics_detached_1", "metrics_detached_3"]
        assert ["metrics_detached_3 is not the table" in line for line in retention.behind(database)] == [True]


def test_by_hand(database: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "load", classmethod(lambda _: database))
    begin = today()

    def run(*arguments: str) -> str:
        ended = CliRunner().invoke(cli.app, ["partitions", *arguments])
        assert ended.exit_code == 0, ended.output
        return ended.output

    assert f"made metrics_p{begin:%Y%m%d}00\n" in run("make")
    assert "all of them are there" in run("make")
    with benches(database) as bench:
        store(bench.writer, begin - HOUR, 120)
        assert f"{begin:%Y-%m-%d} 01:00" in run("list")
        (first, second, *_, last) = json.loads(run("list", "--json"))["partitions"]
        assert (first["name"], first["low"], first["high"]) == (FIRST, None, begin.isoformat())
        assert (second["low"], second["expired"], last["high"]) == (begin.isoformat(), False, None)
        assert "0 partitions" in run("drop", "--before", f"{begin - HOUR:%Y-%m-%dT%H:%M}")
        said = run("drop", "--before", f"{begin + HOUR:%Y-%m-%dT%H:%M}", "--yes")
        assert f"dropped {FIRST}: 60 readings" in said
        assert f"dropped {second['name']}: 60 readings" in said
        assert rows(database) == []
        bench.tick()


def test_one_at_a_time(database: Settings) -> None:
    partitions.make(database)
    (first, *_) = [one for one in names(database) if one != FIRST]

    def other(_partition: Partition) -> None:
        with pytest.raises(BusyError):
            retention.drop(database, named(database, first))

    retention.drop(database, named(database, first), other)


def test_retention_by_age_and_by_size(database: Settings) -> None:
    begin = today()
    partitions.make(database, begin + 6 * HOUR)
    now = begin + 6 * HOUR
    with benches(database) as bench:
        store(bench.writer, begin, 360, every=60)
        bench.tick()
        assert retention.expired(database, now) == []
        old = database.model_copy(update={"metrics_retention": "3h"})
        assert [one.name[-2:] for one in retention.expired(old, now)] == ["00", "01", "02"]
        assert len(retention.expired(old, now + timedelta(minutes=59))) == 3
        assert retention.behind(old, now + timedelta(minutes=31)) != []
        store(bench.writer, begin - HOUR, 10)
        assert retention.expired(old, now)[0].name == FIRST
        room = database.model_copy(update={"metrics_retention_size": "1MB"})
        large = retention.expired(room, now)
        assert large[0].name == FIRST
        assert [one.name for one, _ in retention.run(room, now)] == [one.name for one in large]
        # The empty table in the place of metrics_before has a size, too.
        retention.run(room, now)
        assert retention.expired(room, now) == []
        sizes = [one.bytes for one in partitions.every(room)]
        assert sum(sizes) <= 1_000_000 or len(partitions.closed(room, now)) == 1
        bench.tick()


def test_nobody_waits_while_a_partition_goes(database: Settings) -> None:
    """Who stores into the present and into the past, and who reads all, while eight partitions go."""
    begin = today()
    partitions.make(database, begin + 12 * HOUR)
    stop, failed = threading.Event(), []

    def again(role: Any, work: Callable[[postgres.Connection], object]) -> None:
        try:
            with postgres.connect(database, role, autocommit=True) as connection:
                # Who waits for a lock for so long fails, however slow the machine is otherwise.
                connection.execute("SET lock_timeout = '1s'")
                while not stop.is_set():
                    work(connection)
        except psycopg.Error as error:
            failed.append(error)

    with benches(database) as bench:
        store(bench.writer, begin - HOUR, 100_000, every=0.4)
        bench.tick()
        late = random.Random(3)
        threads = [
            threading.Thread(target=again, args=arguments)
            for arguments in (
                ("metrics_writer", lambda one: store(one, datetime.now(UTC), 50, every=0.001)),
                (
                    "metrics_writer",
                    lambda one: store(one, begin + timedelta(minutes=late.randrange(600)), 3, value=late.random()),
                ),
                ("metrics_reader", lambda one: one.execute("SELECT count(*) FROM metrics").fetchone()),
            )
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(8):
                retention.drop(database, named(database, names(database)[1]))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        bench.count()
        bench.tick()
    assert failed == []


def dies_before(step: int, settings: Settings, name: str) -> bool:
    """Drop a partition in a process that kills itself before one of its statements; whether it did."""
    values = {one: getattr(settings, one) for one in settings.model_fields_set if getattr(settings, one) is not None}
    secrets = {one: value.get_secret_value() for one, value in values.items() if isinstance(value, SecretStr)}
    document = json.dumps({one: str(value) for one, value in values.items()} | secrets)
    done = subprocess.run(
        [sys.executable, "-c", MORTAL, str(step), name], input=document, text=True, check=False, timeout=patience(120)
    )
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


MORTAL = """
import json, os, signal, sys
import psycopg
from metrics_pipeline import partitions, retention
from metrics_pipeline.settings import Settings

step, name = int(sys.argv[1]), sys.argv[2]
settings = Settings(_env_file=None, **json.load(sys.stdin))
(partition,) = [one for one in partitions.every(settings) if one.name == name]
execute, done = psycopg.Connection.execute, 0

def counted(self, *arguments, **options):
    global done
    done += 1
    if done == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return execute(self, *arguments, **options)

psycopg.Connection.execute = counted
retention.drop(settings, partition, lambda _partition: None)
"""


@pytest.mark.parametrize(
    ("which", "stride"),
    [
        pytest.param(1, 6, id="a partition"),
        pytest.param(0, 11, id="metrics_before"),
        pytest.param(1, 1, id="a partition, each", marks=pytest.mark.long),
        pytest.param(0, 1, id="metrics_before, each", marks=pytest.mark.long),
    ],
)
def test_a_death_at_each_step(database: Settings, which: int, stride: int, caplog: pytest.LogCaptureFixture) -> None:
    """Before each of its statements (without `long`, before some of them): the readings are all there or all gone, and whoever comes next ends what was begun."""
    begin = today()
    partitions.make(database, begin + 100 * HOUR)
    step = 1
    with benches(database) as bench:
        bench.tick()
        while True:
            at = names(database)[which]
            low = named(database, at).low or begin - 5 * HOUR
            store(bench.writer, low, 200, every=15, value=step)
            bench.tick()
            store(bench.writer, low + HOUR / 3, 100, every=20, value=step)
            before = len(rows(database))
            died = dies_before(step, database, at)
            assert len(rows(database)) in (before, 0)
            bench.count()
            bench.tick()
            if rows(database):
                retention.drop(database, named(database, at), lambda _partition: None)
            retention.run(database)
            assert rows(database) == []
            assert leftovers(database) == []
            bench.count()
            bench.tick()
            if not died:
                break
            step += stride
    assert step > 30
    assert "counting all" not in caplog.text


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[tuple[Server, Settings]]:
    """A server that may be killed, and a database of ours on it, in a schema of its own."""
    with own_server() as server:
        values: dict[str, Any] = {f"{role}_password": f"secret of {role}" for role in (*postgres.ROLES, "dagster")}
        values |= {"pipeline_data_dir": tmp_path, "postgres_url": server.url("readings"), "postgres_schema": "plant"}
        settings = Settings(_env_file=None, metrics_partition="hour", **values)
        postgres.bootstrap(settings)
        postgres.migrate(settings)
        yield server, settings


def test_a_death_of_postgresql_at_each_step(
    mortal: tuple[Server, Settings], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every few statements; and all of it happens in another schema than `public`."""
    server, settings = mortal
    begin = today()
    partitions.make(settings, begin + 40 * HOUR)
    with benches(settings) as bench:
        bench.tick()
    execute, done, step, dead = psycopg.Connection.execute, 0, 2, True

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        if done == step:
            server.stop("immediate")
            server.start()
        return execute(self, *arguments, **options)

    while dead:
        at = names(settings)[1]
        with benches(settings) as bench:
            store(bench.writer, named(settings, at).low or begin, 200, every=15, value=step)
            bench.tick()
            store(bench.writer, named(settings, at).low or begin, 100, every=20, value=step)
        before, done = len(rows(settings)), 0
        partition = named(settings, at)
        monkeypatch.setattr(psycopg.Connection, "execute", counted)
        try:
            retention.drop(settings, partition)
            dead = False
        except ServiceError:
            pass
        finally:
            monkeypatch.setattr(psycopg.Connection, "execute", execute)
        assert len(rows(settings)) in (before, 0)
        if rows(settings):
            retention.drop(settings, named(settings, at))
        retention.run(settings)
        assert rows(settings) == []
        with benches(settings) as bench:
            bench.count()
            bench.tick()
            found = bench.hand.execute(
                "SELECT relname FROM pg_class WHERE relname ~ '^metrics_(detached|next)_?[0-9]*$'"
            )
            assert found.fetchall() == []
        step += 4
    assert step > 30
    assert "counting all" not in caplog.text


def test_a_month_goes_by(database: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """The clock is passed in: partitions are made, are over, and go on time, whatever time the readings say that it is."""
    own = database.model_copy(update={"metrics_partition": "day", "metrics_retention": "7d"})
    begin = today()
    kept: list[str] = []
    with benches(own) as bench:
        bench.tick()
        for at in range(31):
            now = begin + timedelta(days=at, hours=12)
            partitions.make(own, now)
            store(bench.writer, now - HOUR, 50)
            store(bench.writer, now - timedelta(days=365), 5)
            store(bench.writer, now + timedelta(days=365), 5)
            store(bench.writer, now - timedelta(days=3), 20, value=at)
            gone = retention.run(own, now, keep=lambda partition: kept.append(partition.name))
            assert all(one.high and one.high <= now - timedelta(days=7) for one, _ in gone)
            assert retention.behind(own, now) == []
            assert partitions.missing(own, now) == []
            assert [one.name for one in partitions.closed(own, now)][
                -1
            ] == f"metrics_p{now - timedelta(days=1):%Y%m%d}" or at == 0
            if at % 5 == 0:
                bench.count()
                bench.tick()
    days = [f"metrics_p{begin + timedelta(days=at):%Y%m%d}" for at in range(31)]
    assert [name for name in kept if name != FIRST] == days[: 31 - 8]
    assert names(own)[1] == days[31 - 8]
    with postgres.connect(own, "metrics_reader") as connection:
        found = connection.execute("SELECT retained_from FROM retention_state").fetchone()
    assert found == (begin + timedelta(days=31 - 8),)
    assert "counting all" not in caplog.text


def copied(saved: list[tuple[Any, ...]]) -> Callable[[postgres.Connection, str], None]:
    """What fills a table with readings that were saved."""

    def fill(connection: postgres.Connection, table: str) -> None:
        with connection.cursor() as cursor, cursor.copy(f"COPY {table} ({COLUMNS}) FROM STDIN".encode()) as copy:
            for row in saved:
                copy.write_row(row)

    return fill


@pytest.mark.usefixtures("often")
def test_what_went_comes_back(database: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """With created_at, as a partition, while late readings lie in its place; later changes of it are counted."""
    begin = today()
    partitions.make(database, begin + 12 * HOUR)
    with benches(database) as bench:
        bench.tick()
        store(bench.writer, begin - 2 * HOUR, 1_000)
        bench.hand.execute("UPDATE metrics SET created_at = created_at - interval '3 days' WHERE metric_name = 10")
        bench.hand.execute("UPDATE metrics SET value = '-0', tags = '{a,b}' WHERE metric_name = 20")
        bench.tick()
        saved = {
            name: bench.hand.execute(f"SELECT {COLUMNS} FROM {name} ORDER BY 1, 2, 3".encode()).fetchall()
            for name in names(database)[1:5]
        }
        whole = rows(database)
        bounds = {name: named(database, name) for name in saved}
        for name in saved:
            retention.drop(database, named(database, name))
        bench.tick()
        third, second = list(saved)[2], list(saved)[1]
        # Late readings lie there: one before, one within, one of the very same, one behind.
        low, high = bounds_of(bounds[third])
        for at in (low - timedelta(seconds=7), low + timedelta(seconds=1), high + HOUR / 2):
            store(bench.writer, at, 1, value=9)
        bench.writer.execute(
            "INSERT INTO metrics (device_id, published_at, metric_name, value, tags) VALUES (%s, %s, %s, %s, %s)",
            saved[third][0][:5],
        )
        partitions.restore(database, third, low, high, copied(saved[third]))
        bench.count()
        bench.tick()
        assert names(database)[:2] == [FIRST, third]
        found = bench.hand.execute(f"SELECT {COLUMNS} FROM {third} ORDER BY 1, 2, 3".encode()).fetchall()
        assert [row for row in found if row[1] != low + timedelta(seconds=1)][1:] == saved[third][1:]
        # It stays for a while, and so does what comes into it.
        now = begin + 10 * HOUR
        old = database.model_copy(update={"metrics_retention": "3h"})
        assert third not in [one.name for one in retention.expired(old, now)]
        assert third in [one.name for one in retention.expired(old, now + timedelta(days=8))]
        store(bench.writer, low, 30, value=4)
        bench.hand.execute("DELETE FROM metrics WHERE published_at >= %s AND metric_name = 20", [low])
        bench.tick()
        # Where partitions are by now, or in part: reading by reading.
        low, high = bounds_of(bounds[second])
        partitions.restore(database, third, low, high, copied(saved[second]))
        bench.count()
        bench.tick()
        assert names(database).count(third) == 1
        for name in saved:
            retention.drop(database, named(database, FIRST))
            if name in names(database):
                retention.drop(database, named(database, name))
            bench.tick()
    assert leftovers(database) == []
    assert "counting all" not in caplog.text
    assert whole


@pytest.mark.usefixtures("often")
def test_what_comes_back_before_the_next_tick_is_counted_once(
    database: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """That its readings went, or one of them was deleted by hand, is not in the summaries yet."""
    begin = today()
    for width, minutes in (("minute", 1), ("hour", 60)):
        own = database.model_copy(update={"metrics_partition": width})
        partitions.make(own, begin + timedelta(minutes=20 if minutes == 1 else 600))
        with benches(own) as bench:
            one = named(own, names(own)[1])
            low, high = bounds_of(one)
            store(bench.writer, low, 100, every=0.5)
            bench.tick()
            saved = bench.hand.execute(f"SELECT {COLUMNS} FROM {one.name}".encode()).fetchall()
            retention.drop(own, one)
            if minutes == 60:
                bench.writer.execute(
                    "INSERT INTO metrics (device_id, published_at, metric_name, value, tags) VALUES (%s, %s, %s, %s, %s)",
                    saved[0][:5],
                )
                bench.tick()
                bench.hand.execute("DELETE FROM metrics WHERE published_at = %s", [saved[0][1]])
            partitions.restore(own, one.name, low, high, copied(saved))
            bench.count()
            bench.tick()
            retention.drop(own, named(own, one.name))
            bench.tick()
    assert "counting all" not in caplog.text


def test_all_of_it_comes_back_to_the_last_bit(database: Settings) -> None:
    begin = today()
    partitions.make(database, begin + 12 * HOUR)
    with benches(database) as bench:
        store(bench.writer, begin, 600)
        bench.hand.execute("UPDATE metrics SET value = '-0', tags = '{a,b}' WHERE metric_name = 20")
        bench.tick()
        whole, pieces = rows(database), names(database)[1:9]
        bounds = [named(database, name) for name in pieces]
        saved = [
            bench.hand.execute(f"SELECT {COLUMNS} FROM {name} ORDER BY 1, 2, 3".encode()).fetchall() for name in pieces
        ]
        for one in bounds:
            retention.drop(database, one)
        for one, readings in list(zip(bounds, saved, strict=True))[::-1]:
            partitions.restore(database, one.name, *bounds_of(one), copied(readings))
            bench.tick()
        assert names(database)[1:9] == pieces
        assert list(map(str, rows(database))) == list(map(str, whole)), "-0.0 is not 0.0"


def test_what_cannot_come_back(database: Settings) -> None:
    begin = today()
    partitions.make(database, begin + 3 * HOUR)
    with benches(database) as bench:
        store(bench.writer, begin, 30)
        bench.tick()
        name = names(database)[1]
        one = named(database, name)
        saved = rows(database)
        retention.drop(database, one)
        store(bench.writer, begin, 1, value=5)
        bench.tick()
        low, high = bounds_of(one)
        with pytest.raises(ServiceError, match="another value or other tags"):
            partitions.restore(database, name, low, high, copied(saved))
        bench.hand.execute("DELETE FROM metrics")
        with pytest.raises(ServiceError, match="give the bounds"):
            partitions.restore(database, name, low, low + HOUR / 4, copied(saved))

        def breaks(_connection: postgres.Connection, _table: str) -> None:
            raise PipelineError("a file is broken")

        with pytest.raises(PipelineError, match="is broken"):
            partitions.restore(database, name, low, high, breaks)
        bench.tick()
        assert rows(database) == []
        assert leftovers(database) == []
        partitions.restore(database, name, low, high, copied(saved))
        bench.tick()
        assert rows(database) == saved
        # Once more changes nothing; another value is refused there, too.
        partitions.restore(database, name, low, high, copied(saved))
        bench.tick()
        assert rows(database) == saved
        bench.hand.execute("UPDATE metrics SET tags = '{z}' WHERE ctid = (SELECT min(ctid) FROM metrics)")
        with pytest.raises(ServiceError, match="another value or other tags"):
            partitions.restore(database, name, low, high, copied(saved))
        bench.tick()


def test_the_migration_goes_and_comes_back(database: Settings) -> None:
    begin = today()
    partitions.make(database, begin + 6 * HOUR)
    with benches(database) as bench:
        store(bench.writer, begin - HOUR, 200)
        bench.tick()
        for name in (FIRST, names(database)[1]):
            retention.drop(database, named(database, name))

        store(bench.writer, begin - HOUR, 10)

        def refuse(_partition: Partition) -> None:
            raise PipelineError("no")

        with pytest.raises(PipelineError):
            retention.drop(database, named(database, names(database)[1]), refuse)
        stored = rows(database)
        gone = [postgres.rollback(database) for _ in range(5)]
        assert gone[1] == "20261127000020_retention"
        assert rows(database) == stored
        postgres.migrate(database)
        assert rows(database) == stored
        bench.tick()


class WritersWhilePartitionsGo(Writers):
    """As the others, while partitions go and come back."""

    def teardown(self) -> None:
        if hasattr(self, "connections"):
            for writer in range(3):
                self.roll_back(writer)
            # In each example, whatever chance did: nobody has the table now.
            self.drop(back=1)
            self.drop_the_first()
        super().teardown()

    def go(self, partition: Partition) -> None:
        kept: list[list[tuple[Any, ...]]] = []

        def keep(one: Partition) -> None:
            kept.append(self.bench.reader.execute(f"SELECT {COLUMNS} FROM {one.name}".encode()).fetchall())

        self.bench.reader.execute("SET lock_timeout = '100ms'")
        with suppress(ServiceError):  # a writer has the table
            dropped = retention.drop(self.database, partition, keep)
            assert dropped.rows == len(kept[-1])
            if partition.low is not None:
                self.gone.append((partition, kept[-1]))

    @property
    def gone(self) -> list[tuple[Partition, list[tuple[Any, ...]]]]:
        """What went, and was not brought back."""
        found: list[tuple[Partition, list[tuple[Any, ...]]]] = self.__dict__.setdefault("_gone", [])
        return found

    @rule(back=st.integers(1, 4))
    def drop(self, back: int) -> None:
        with suppress(ServiceError):  # a writer empties the table
            self.go([one for one in partitions.every(self.database) if one.high is not None][-back:][0])

    @rule()
    def drop_the_first(self) -> None:
        with suppress(ServiceError):  # a writer empties the table
            self.go(partitions.every(self.database)[0])

    @precondition(lambda self: self.gone)
    @rule()
    def restore(self) -> None:
        partition, saved = self.gone.pop()
        with suppress(ServiceError):  # a writer has the table, or wrote another value
            partitions.restore(self.database, partition.name, *bounds_of(partition), copied(saved))


def test_writers_that_interleave_at_random(database: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCK_MS": 20, "PATIENCE_SECONDS": 0.0, "STILL_SECONDS": 0.1}.items():
        monkeypatch.setattr(partitions, name, value)
    monkeypatch.setattr(summaries, "MOST_PENDING", 3_000_000)
    monkeypatch.setattr(summaries, "MOST_KEPT", 0.5)
    monkeypatch.setattr(summaries, "SETTLED_AFTER", timedelta(hours=6))
    for role in ("metrics_owner", "metrics_summarizer", "metrics_reader"):
        # Who waits for another writer here would wait for ever.
        monkeypatch.setitem(postgres._ROLE_SETTINGS, role, {"lock_timeout": "100ms"})
    partitions.make(database)
    machine = type("WritersHere", (WritersWhilePartitionsGo,), {"database": database})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=50,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    with postgres.connect(database, "metrics_reader") as connection:
        found = connection.execute("SELECT count(*) FROM detached_partitions").fetchone()
    assert found is not None
    assert found[0] > 20
