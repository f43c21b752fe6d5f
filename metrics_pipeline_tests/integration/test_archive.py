"""The archive of a real PostgreSQL: compared by another reader, killed at each step, on a full disk, and brought back."""

from __future__ import annotations

import json
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import dagster as dg
import duckdb
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples

from metrics_pipeline import partitions, postgres, retention, summaries
from metrics_pipeline.archive import checking, keeping, listing, parquet, restoring, table
from metrics_pipeline.archive.folder import ArchiveFolder
from metrics_pipeline.definitions import defs
from metrics_pipeline.defs import archive as dagster_archive
from metrics_pipeline.defs.resources import Pipeline
from metrics_pipeline.errors import ServiceError, SettingError
from metrics_pipeline.partitions import Partition
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.archive import readings
from metrics_pipeline_tests.archive.readings import Stored
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.databases import own_database
from metrics_pipeline_tests.patience import patience

pytestmark = pytest.mark.integration

NOW = datetime.now(UTC)
BEGIN = NOW.replace(hour=0, minute=0, second=0, microsecond=0)


@dataclass(frozen=True)
class Place:
    """A database and a folder of a test's own."""

    settings: Settings
    root: ArchiveFolder
    environment: dict[str, str]

    def cli(self, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """`metrics-pipeline …` against this database."""
        environment = self.environment | more.pop("environment", {})
        stack = RunningStack(self.settings, environment, None)
        return stack.cli(*arguments) if not more else self._limited(environment, arguments, **more)

    def _limited(
        self, environment: dict[str, str], arguments: Sequence[str], *, file_bytes: int
    ) -> subprocess.CompletedProcess[str]:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        return subprocess.run(
            [sys.executable, "-m", "metrics_pipeline", *arguments],
            env=environment,
            cwd=self.settings.data_dir,
            capture_output=True,
            text=True,
            timeout=patience(300),
            check=False,
            preexec_fn=limit,
        )

    @contextmanager
    def owner(self) -> Iterator[postgres.Connection]:
        with postgres.connect(self.settings, "metrics_owner", autocommit=True) as connection:
            yield connection

    def partition(self, name: str | None = None) -> Partition:
        with self.owner() as connection:
            return next(
                one for one in partitions.listed(connection) if one.name == (name or f"metrics_p{BEGIN:%Y%m%d}")
            )

    def left_over(self) -> list[str]:
        return sorted(path.name for path in self.root.path.glob(".*") if path.name != ".lock")


@pytest.fixture
def place(stack: RunningStack, tmp_path: Path) -> Iterator[Place]:
    with own_database(stack.settings) as own:
        settings = own.model_copy(update={"metrics_archive": tmp_path / "archive"})
        partitions.make(settings)
        environment = {
            **stack.environment,
            "POSTGRES_DB": own.postgres_db,
            "METRICS_ARCHIVE": str(tmp_path / "archive"),
        }
        yield Place(settings, ArchiveFolder(tmp_path / "archive"), environment)


def store(place: Place, rows: Sequence[Stored]) -> None:
    """As a hand that may say when a row was stored."""
    with place.owner() as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO metrics (device_id, published_at, metric_name, value, tags, created_at) VALUES (%s, %s, %s, %s, %s, %s)",
            [
                (row.device_id, row.published_at, row.metric_name, row.value, list(row.tags), row.created_at)
                for row in rows
            ],
        )


def late(place: Place, value: float = 1.0) -> None:
    """A reading of a sink's that comes when its partition is over."""
    with postgres.connect(place.settings, "metrics_writer", autocommit=True) as connection:
        connection.execute(
            "INSERT INTO metrics (device_id, published_at, metric_name, value) VALUES (%s, %s, 0, %s) "
            "ON CONFLICT (device_id, published_at, metric_name) DO UPDATE SET value = excluded.value",
            [UUID(int=77), BEGIN + timedelta(hours=1), value],
        )


def stored_rows(place: Place, name: str = "metrics") -> list[tuple[Any, ...]]:
    """As text of PostgreSQL's own, bits of the value included."""
    with place.owner() as connection:
        found = connection.execute(
            f"SELECT device_id::text, published_at::text, metric_name, encode(float8send(value), 'hex'), tags, created_at::text "
            f"FROM {name}".encode()
        ).fetchall()
    return sorted(found, key=lambda row: row[:3])


def archived_rows(place: Place, name: str) -> list[tuple[Any, ...]]:
    """The same by DuckDB, which writes times as text of its own."""
    with duckdb.connect() as connection:
        found = connection.execute(
            "SELECT device_id, epoch_us(published_at), metric_name, value, tags, epoch_us(created_at) "
            f"FROM '{place.root.path}/{name}/*.parquet'"
        ).fetchall()
    texts = [(row[0], _text(row[1]), row[2], struct.pack(">d", row[3]).hex(), row[4], _text(row[5])) for row in found]
    return sorted(texts, key=lambda row: row[:3])


def _text(micros: int) -> str:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)
    fraction = f".{moment.microsecond:06}".rstrip("0") if moment.microsecond else ""
    return f"{moment:%Y-%m-%d %H:%M:%S}".rjust(19, "0") + f"{fraction}+00"


def require_whole(place: Place, partition: Partition) -> None:
    """As a drop does it, in a transaction of its own."""
    with postgres.connect(place.settings, "metrics_owner") as connection:
        connection.execute(f"LOCK TABLE {partition.name} IN ACCESS EXCLUSIVE MODE".encode())
        keeping.require_whole(connection, partition)


def test_an_archive_is_the_readings_by_another_reader(place: Place) -> None:
    rows = readings.simple(3000, BEGIN)
    store(place, rows)
    partition = place.partition()
    with pytest.raises(ServiceError, match=f"it has no archive: run `metrics-pipeline archive make {partition.name}`"):
        require_whole(place, partition)
    kept = keeping.keep(place.settings, partition)
    assert kept.made
    assert kept.archive.sums == readings.sums(rows)
    assert archived_rows(place, partition.name) == stored_rows(place)
    assert len(stored_rows(place)) == 3000
    require_whole(place, partition)
    assert checking.verify(place.root) == []
    again = keeping.keep(place.settings, partition)
    assert (again.made, again.archive) == (False, kept.archive)
    assert [(one.name, one.table) for one in listing.listed(place.settings)] == [(partition.name, "whole")]


EARLIER = readings.times(BEGIN - timedelta(microseconds=1))


@given(rows=readings.rows(EARLIER))
@examples(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_reading_that_the_table_takes_is_archived(place: Place, rows: list[Stored]) -> None:
    with place.owner() as connection:
        connection.execute("DELETE FROM metrics")
    store(place, rows)
    kept = keeping.make(place.settings, place.partition(partitions.FIRST))
    assert kept.archive.sums == readings.sums(rows)
    assert archived_rows(place, kept.archive.name) == stored_rows(place)
    with place.owner() as connection, connection.transaction(force_rollback=True):
        connection.execute("CREATE TEMPORARY TABLE brought_back (LIKE metrics)")
        restoring.filler(place.root, kept.archive)(connection, "brought_back")
        difference = "SELECT count(*) FROM (TABLE {} EXCEPT ALL TABLE {}) AS d"
        for one, other in (("metrics", "brought_back"), ("brought_back", "metrics")):
            assert connection.execute(difference.format(one, other).encode()).fetchone() == (0,)
        assert table.sums(connection, "brought_back") == kept.archive.sums


def test_a_reading_that_comes_while_it_is_archived_is_not_lost(place: Place) -> None:
    store(place, readings.simple(500, BEGIN))
    partition = place.partition()
    came: list[str] = []

    def comes(what: str, _done: int, _total: int) -> None:
        if what.startswith("adding up") and not came:
            came.append(what)
            late(place)

    assert keeping.keep(place.settings, partition, comes).archive.sums.rows == 500
    assert came
    with pytest.raises(ServiceError, match="1 transactions have changed it since it was archived"):
        require_whole(place, partition)
    assert [one.table for one in listing.listed(place.settings)] == ["changed"]
    kept = keeping.keep(place.settings, partition)
    assert (kept.made, kept.archive.sums.rows, kept.archive.name) == (True, 501, partition.name)
    require_whole(place, partition)
    assert place.root.names() == [partition.name]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE metrics SET value = value + 1 WHERE device_id = '00000000-0000-0000-0000-000000000001'",
        "DELETE FROM metrics WHERE metric_name = 10",
        "UPDATE metrics SET published_at = published_at + interval '1 day' WHERE metric_name = 10",
        "UPDATE metrics SET published_at = published_at - interval '1 day' WHERE published_at >= '{tomorrow}'",
        "TRUNCATE {name}",
        "ALTER TABLE {name} DISABLE TRIGGER metrics_9_note_change",
        "DROP TRIGGER metrics_9_note_change ON {name}",
        "SET session_replication_role = replica; DELETE FROM metrics WHERE metric_name = 10",
    ],
)
def test_whatever_changes_a_partition_is_known(place: Place, change: str) -> None:
    store(place, [*readings.simple(60, BEGIN), *readings.simple(2, BEGIN + timedelta(days=1, hours=1))])
    partition = place.partition()
    keeping.keep(place.settings, partition)
    require_whole(place, partition)
    with postgres.connect_admin(place.settings, place.settings.postgres_db) as hand:
        hand.execute("SET search_path = public")
        hand.execute(change.format(name=partition.name, tomorrow=BEGIN + timedelta(days=1)).encode())
    with pytest.raises(ServiceError, match="archive make"):
        require_whole(place, partition)
    assert keeping.keep(place.settings, partition).archive.name == partition.name
    require_whole(place, partition)
    assert archived_rows(place, partition.name) == stored_rows(place, partition.name)


def test_what_is_rolled_back_changes_nothing(place: Place) -> None:
    store(place, readings.simple(60, BEGIN))
    partition = place.partition()
    keeping.keep(place.settings, partition)
    with place.owner() as connection:
        with connection.transaction(force_rollback=True):
            connection.execute("DELETE FROM metrics")
        with connection.transaction(), connection.transaction(force_rollback=True):
            connection.execute("DELETE FROM metrics")
    require_whole(place, partition)


def test_a_writer_that_is_not_done_is_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store(place, readings.simple(60, BEGIN))
    partition = place.partition()
    with postgres.connect(place.settings, "metrics_writer") as writer:
        writer.execute(
            "INSERT INTO metrics (device_id, published_at, metric_name, value) VALUES (%s, %s, 0, 1)",
            [UUID(int=5), BEGIN],
        )
        monkeypatch.setattr(partitions, "PATIENCE_SECONDS", 0.5)
        with pytest.raises(ServiceError, match=f"somebody has kept the table {partition.name} for too long"):
            keeping.keep(place.settings, partition)
        monkeypatch.setattr(partitions, "PATIENCE_SECONDS", 30.0)
        ending = threading.Timer(1, writer.commit)
        ending.start()
        assert keeping.keep(place.settings, partition).archive.sums.rows == 61
        ending.join()
    require_whole(place, partition)


def test_two_late_writers_do_not_wait_for_each_other(place: Place) -> None:
    store(place, readings.simple(60, BEGIN))
    partition = place.partition()
    keeping.keep(place.settings, partition)
    statement = "INSERT INTO metrics (device_id, published_at, metric_name, value) VALUES (%s, %s, 0, 1)"
    with (
        postgres.connect(place.settings, "metrics_writer") as one,
        postgres.connect(place.settings, "metrics_writer") as other,
    ):
        for connection in (one, other):
            connection.execute("SET lock_timeout = '2s'")
        for number, connection in enumerate((one, other, one, other)):
            connection.execute(statement, [UUID(int=100 + number), BEGIN])
    with pytest.raises(ServiceError, match="2 transactions have changed it"):
        require_whole(place, partition)


def test_what_is_called_whole_is_all_there_is_while_late_readings_keep_coming(place: Place) -> None:
    store(place, readings.simple(300, BEGIN))
    partition = place.partition()
    keeping.keep(place.settings, partition)
    stop, stored = threading.Event(), threading.Event()

    def write(writer: int) -> None:
        with postgres.connect(place.settings, "metrics_writer") as connection:
            number = 0
            while not stop.is_set():
                number += 1
                for part in range(3):
                    connection.execute(
                        "INSERT INTO metrics (device_id, published_at, metric_name, value) VALUES (%s, %s, 0, %s) "
                        "ON CONFLICT (device_id, published_at, metric_name) DO UPDATE SET value = excluded.value",
                        [UUID(int=1000 * writer + number % 50), BEGIN + timedelta(seconds=part), number],
                    )
                (connection.rollback if number % 4 == 0 else connection.commit)()
                stored.set()

    def whole() -> bool:
        with postgres.connect(place.settings, "metrics_owner") as connection:
            connection.execute(f"LOCK TABLE {partition.name} IN SHARE MODE".encode())
            archive = place.root.manifests()[0]
            try:
                keeping.require_whole(connection, partition)
            except ServiceError:
                return False
            assert table.sums(connection, partition.name) == archive.sums
            return True

    assert whole()
    writers = [threading.Thread(target=write, args=[writer]) for writer in (1, 2)]
    for thread in writers:
        thread.start()
    try:
        assert stored.wait(patience(30))
        for _ in range(5):
            keeping.keep(place.settings, partition)
            whole()
    finally:
        stop.set()
        for thread in writers:
            thread.join()
    keeping.keep(place.settings, partition)
    assert whole()
    assert archived_rows(place, partition.name) == stored_rows(place)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_flipped_byte_is_found_and_nothing_is_dropped_for_it(
    place: Place, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    store(place, readings.simple(500, BEGIN))
    partition = place.partition()
    keeping.keep(place.settings, partition)
    path = place.root.path / partition.name / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 0x10
    path.write_bytes(data)
    ended = place.cli("archive", "verify")
    assert ended.returncode == 1
    assert f"{path}: its bytes have changed" in ended.stdout
    assert f"archive make {partition.name}" in ended.stdout
    # Before a drop, the table still has it: the archive is made again.
    assert keeping.keep(place.settings, partition).made
    assert "its bytes have changed" in caplog.text
    assert checking.verify(place.root) == []
    # And where that cannot be, what has to be called before a drop raises.
    path.write_bytes(data)
    place.root.path.joinpath(f".making-{partition.name}").touch()
    keep = keeping.keeper(place.settings)
    assert keep is not None
    with pytest.raises(ServiceError, match="cannot be written"):
        keep(partition)


def test_nothing_has_to_be_kept_without_an_archive(place: Place) -> None:
    assert keeping.keeper(place.settings.model_copy(update={"metrics_archive": None})) is None


def test_a_missing_file_stops_a_drop(place: Place) -> None:
    store(place, readings.simple(50, BEGIN))
    partition = place.partition()
    keeping.keep(place.settings, partition)
    (place.root.path / partition.name / "part-00000.parquet").unlink()
    with pytest.raises(ServiceError, match=r"part-00000.parquet cannot be read: No such file"):
        require_whole(place, partition)


@pytest.mark.parametrize("where", keeping.PLACES)
def test_who_is_killed_at_any_step_leaves_the_partition_or_a_whole_archive(place: Place, where: str) -> None:
    store(place, readings.simple(500, BEGIN))
    partition = place.partition()
    if where == "moved":  # when an archive takes the place of another one
        keeping.keep(place.settings, partition)
        late(place)
    rows = stored_rows(place)
    environment = {keeping.FAILPOINTS: f"{where}=1"}
    ended = place.cli("archive", "make", partition.name, environment=environment)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert stored_rows(place) == rows
    assert checking.verify(place.root) == [], "what has a name is whole"
    try:
        require_whole(place, partition)
    except ServiceError:
        assert where != "noted"
    else:
        assert where == "noted"
    kept = keeping.keep(place.settings, partition)
    assert kept.made == (where not in ("published", "noted"))
    require_whole(place, partition)
    assert place.root.names() == [partition.name]
    assert place.left_over() == []
    assert archived_rows(place, partition.name) == rows


def test_a_full_disk_is_said_and_leaves_nothing(place: Place, tmp_path: Path) -> None:
    store(place, readings.simple(3000, BEGIN))
    partition = place.partition()
    ended = place.cli("archive", "make", partition.name, file_bytes=8000)
    assert ended.returncode == 1
    assert "cannot be written" in ended.stderr
    assert "make room there, then try again" in ended.stderr
    assert place.root.names() == []
    assert place.left_over() == []
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        return
    try:
        own = place.settings.model_copy(update={"metrics_archive": small / "archive"})
        with pytest.raises(ServiceError, match=r"cannot be written: .*No space left on device.*make room there"):
            keeping.keep(own, partition)
        assert [path.name for path in (small / "archive").iterdir()] == [".lock"]
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert keeping.keep(place.settings, partition).made


def test_postgresql_breaks_off(place: Place) -> None:
    store(place, readings.simple(3000, BEGIN))
    partition = place.partition()

    def cut(what: str, _done: int, _total: int) -> None:
        if what.startswith("adding up"):
            with postgres.connect_admin(place.settings, place.settings.postgres_db) as hand:
                hand.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'metrics_owner' AND datname = current_database()"
                )

    with pytest.raises(ServiceError, match=f"the table {partition.name} cannot be read"):
        keeping.keep(place.settings, partition, cut)
    assert place.root.names() == []
    assert place.left_over() == []
    assert keeping.keep(place.settings, partition).made


def test_an_archive_of_what_has_gone_is_never_replaced(place: Place) -> None:
    """The table of that name is another one by now: its readings get an archive of their own."""
    store(place, readings.simple(50, BEGIN))
    partition = place.partition()
    keeping.keep(place.settings, partition)
    former = archived_rows(place, partition.name)
    with postgres.connect_admin(place.settings, place.settings.postgres_db) as hand:
        hand.execute("SET search_path = public")
        for statement in (
            f"ALTER TABLE metrics DETACH PARTITION {partition.name}",
            f"ALTER TABLE {partition.name} RENAME TO elsewhere",
            f"SET ROLE metrics_owner; CREATE TABLE {partition.name} PARTITION OF metrics FOR VALUES FROM ('{partition.low}') TO ('{partition.high}')",
        ):
            hand.execute(statement.encode())
    late(place)
    kept = keeping.keep(place.settings, partition)
    assert kept.archive.name == f"{partition.name}.2"
    assert archived_rows(place, partition.name) == former
    require_whole(place, partition)
    # Once it has all of the former one's keys, it may take its place.
    with place.owner() as connection:
        connection.execute("INSERT INTO metrics SELECT * FROM elsewhere ON CONFLICT DO NOTHING")
        connection.execute("DELETE FROM archived_partitions")
    (place.root.path / f"{partition.name}.2").rename(place.root.path / ".other")
    assert keeping.keep(place.settings, partition).archive.name == partition.name
    assert len(archived_rows(place, partition.name)) == 51


def test_an_archive_from_elsewhere_that_has_the_same_readings_is_taken(place: Place) -> None:
    """As after the readings were brought back, or the table was written anew."""
    store(place, readings.simple(50, BEGIN))
    partition = place.partition()
    kept = keeping.keep(place.settings, partition)
    with place.owner() as connection:
        connection.execute("DELETE FROM archived_partitions")
        connection.execute(f"VACUUM FULL {partition.name}".encode())
    again = keeping.keep(place.settings, partition)
    assert (again.made, again.archive) == (False, kept.archive)
    require_whole(place, partition)


def test_what_is_due(place: Place) -> None:
    store(place, readings.simple(50, BEGIN))
    assert keeping.due(place.settings) == []
    tomorrow = BEGIN + timedelta(days=1, hours=12)
    assert [one.name for one in keeping.due(place.settings, tomorrow)] == [f"metrics_p{BEGIN:%Y%m%d}"]
    keeping.keep(place.settings, place.partition())
    assert keeping.due(place.settings, tomorrow) == []
    late(place)
    assert keeping.due(place.settings, tomorrow) == [], "it is archived again when it goes"
    assert len(keeping.due(place.settings, tomorrow + timedelta(days=1))) == 1
    with pytest.raises(SettingError, match="no closed partition begins within"):
        keeping.archived(place.settings, BEGIN + timedelta(days=1), BEGIN + timedelta(days=2))


def test_the_commands(place: Place) -> None:
    store(place, readings.simple(50, BEGIN))
    name = place.partition().name
    ended = place.cli("archive", "list")
    assert (ended.returncode, ended.stdout.count("there is no archive yet")) == (0, 1)
    assert "nothing to do" in place.cli("archive", "make").stdout
    ended = place.cli("archive", "make", name, "--json")
    assert json.loads(ended.stdout)["archives"][0]["rows"] == 50
    assert name in place.cli("archive", "list").stdout
    (one,) = json.loads(place.cli("archive", "list", "--json").stdout)["archives"]
    assert (one["name"], one["table"], one["damage"]) == (name, "whole", None)
    assert "1 archives are as they were made" in place.cli("archive", "verify", name).stdout
    assert json.loads(place.cli("archive", "verify", "--json").stdout) == {"archives": 1, "damages": []}
    (place.root.path / name / "manifest.json").unlink()
    assert place.cli("archive", "list").returncode == 1
    ended = place.cli("archive", "verify", "--json")
    assert ended.returncode == 1
    assert [damage["archive"] for damage in json.loads(ended.stdout)["damages"]] == [name]
    for arguments, code, said in (
        (["make", "metrics_p1"], 2, "metrics_p1: there is no such partition; there are"),
        (["make", "metrics_after"], 2, "it takes the readings of the time to come"),
        (["verify", "metrics_p1"], 2, "metrics_p1: there is no such archive"),
        (["restore", "yesterday"], 2, "FROM 'yesterday': neither an archive nor a time"),
        (["restore", "2020-01-02", "2020-01-01"], 2, "is not before TO"),
        (["restore", "2020-01-01"], 2, "no archive holds readings from"),
    ):
        ended = place.cli("archive", *arguments)
        assert ended.returncode == code, ended.stderr
        assert said in ended.stderr
    ended = place.cli("archive", "list", environment={"METRICS_ARCHIVE": "/dev/null"})
    assert (ended.returncode, ended.stderr) == (2, "error: METRICS_ARCHIVE=/dev/null: is no folder\n")
    assert "METRICS_ARCHIVE is not set" in place.cli("archive", "list", environment={"METRICS_ARCHIVE": ""}).stderr


def earlier(place: Place, days: int) -> Partition:
    """A partition of a day that is over, as if the table were older."""
    low = BEGIN - timedelta(days=days)
    name = f"metrics_p{low:%Y%m%d}"
    with place.owner() as connection:
        for statement in (
            "ALTER TABLE metrics DETACH PARTITION metrics_before",
            f"ALTER TABLE metrics ATTACH PARTITION metrics_before FOR VALUES FROM (MINVALUE) TO ('{low}')",
            f"CREATE TABLE {name} PARTITION OF metrics FOR VALUES FROM ('{low}') TO ('{low + timedelta(days=1)}')",
        ):
            connection.execute(statement.encode())
    store(place, readings.simple(40, low))
    return place.partition(name)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as found:
        yield found


def shown(instance: dg.DagsterInstance) -> list[dg.AssetMaterialization]:
    """What the UI shows of the archive, newest first."""
    records = instance.fetch_materializations(dagster_archive.metrics_archive.key, limit=100).records
    return [event for record in records if (event := record.asset_materialization)]


def test_the_asset_of_dagster(place: Place, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    partition = earlier(place, 3)
    (key,) = dagster_archive.due_keys(place.settings)
    assert key == f"{partition.low:%Y-%m-%d}"

    def launched() -> Any:
        context = dg.build_schedule_context(instance=instance, resources={"pipeline": Pipeline()})
        return dagster_archive.archive_schedule(context)

    def archived() -> dg.ExecuteInProcessResult:
        job = defs.resolve_job_def("archive")
        return job.execute_in_process(partition_key=key, instance=instance, raise_on_error=False)

    assert "not provisioned yet" in launched().skip_message
    monkeypatch.setattr(dagster_archive, "not_provisioned", lambda _instance: None)
    assert [request.partition_key for request in launched()] == [key]
    for count in (1, 2):  # a backfill archives again
        assert archived().success
        event, *others = shown(instance)
        assert (event.partition, len(others)) == (key, count - 1)
        assert event.metadata["dagster/row_count"].value == 40
        assert event.metadata["checksum"].value == keeping.keep(place.settings, partition).archive.sha256
        assert event.metadata["folder"].value == str(place.root.path / partition.name)
    assert "each closed partition has its archive" in launched().skip_message
    # When the partition has gone, its archive is read.
    with place.owner() as connection:
        connection.execute(f"DROP TABLE {partition.name}".encode())
    assert archived().success
    (place.root.path / partition.name / "part-00000.parquet").unlink()
    assert not archived().success
    monkeypatch.setenv("METRICS_ARCHIVE", "")
    assert launched().skip_message == "METRICS_ARCHIVE is not set"


def test_dagster_is_told_of_archives_that_it_did_not_make(place: Place, instance: dg.DagsterInstance) -> None:
    partition = earlier(place, 3)
    key = f"{partition.low:%Y-%m-%d}"
    kept = keeping.make(place.settings, partition).archive
    for told in ([key], []):
        assert dagster_archive.report(instance, place.settings) == told
        assert [event.metadata["checksum"].value for event in shown(instance)] == [kept.sha256]
    # As retention does it when readings came late; then it has gone, and stays.
    store(place, [Stored(UUID(int=9), partition.low or BEGIN, 0, -0.0, ("late",), BEGIN)])
    retention.drop(place.settings, partition, keeping.keeper(place.settings))
    for told in ([key], []):
        assert dagster_archive.report(instance, place.settings) == told
        assert [event.metadata["dagster/row_count"].value for event in shown(instance)] == [41, 40]
    (place.root.path / partition.name / "manifest.json").write_text("{}")
    assert dagster_archive.report(instance, place.settings) == []


def test_the_partitions_of_the_asset_begin_with_those_there_are(place: Place, stack: RunningStack) -> None:
    assert keeping.first(place.settings) == BEGIN
    partition = earlier(place, 3)
    assert keeping.first(place.settings) == partition.low
    retention.drop(place.settings, partition, keeping.keeper(place.settings))
    assert keeping.first(place.settings) == partition.low, "its archive is there"
    monthly = place.settings.model_copy(update={"metrics_partition": "month"})
    assert keeping.first(monthly) == (BEGIN - timedelta(days=3)).replace(day=1)
    with own_database(stack.settings, migrated=False) as own:
        empty = own.model_copy(update={"metrics_archive": place.root.path.parent / "other"})
        assert keeping.first(empty) == BEGIN, "the first partition will be that of today"
    with pytest.raises(ServiceError):
        keeping.first(place.settings.model_copy(update={"postgres_db": "test_that_is_not_there"}))


def test_the_check_names_what_is_late_or_not_as_it_was(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    partition = earlier(place, 3)

    def said() -> tuple[bool, str]:
        result: Any = dagster_archive.archive_complete(Pipeline())
        return result.passed, str(result.description)

    closed = (partition.high or BEGIN) + partitions.GRACE["day"]
    assert keeping.behind(place.settings, closed + keeping.LATE["day"] - timedelta(seconds=1)) == []
    assert len(keeping.behind(place.settings, closed + keeping.LATE["day"])) == 1
    passed, text = said()
    assert not passed
    assert text.startswith(f"1 closed partitions have no archive yet, {partition.name} first")
    keeping.make(place.settings, partition)
    assert said() == (True, "as configured")
    path = place.root.path / partition.name / "part-00000.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    passed, text = said()
    assert not passed
    assert str(path) in text
    assert f"archive make {partition.name}" in text
    (path.parent / "manifest.json").unlink()
    assert "manifest.json: it cannot be read" in said()[1]
    monkeypatch.setenv("METRICS_ARCHIVE", "")
    assert said()[0]


def summaries_agree(place: Place) -> None:
    found = summaries.device_summary(place.settings)
    with place.owner() as connection:
        plain = connection.execute(postgres.query("device_summary_plain")).fetchall()
        kept = connection.execute("SELECT device_id, rows, first_seen, last_seen FROM device_summary ORDER BY 1")
        assert kept.fetchall() == plain
        assert found.rows == sum(row[1] for row in plain)


def test_a_stretch_goes_and_comes_back_to_the_last_bit(place: Place) -> None:
    partition = earlier(place, 3)
    store(place, readings.simple(20, BEGIN))
    summaries.device_summary(place.settings)
    before, some = stored_rows(place), stored_rows(place, partition.name)

    def kept(one: Partition) -> None:
        keeping.keep(place.settings, one)
        # It comes when the archive is whole, and before the partition has gone.
        store(place, [Stored(UUID(int=9), partition.low or BEGIN, 0, -0.0, ("late",), BEGIN)])

    retention.drop(place.settings, partition, kept)
    (late,) = stored_rows(place, partitions.FIRST)
    assert late[0] == str(UUID(int=9))
    assert len(stored_rows(place)) == len(before) - len(some) + 1
    summaries_agree(place)
    assert archived_rows(place, partition.name) == some
    assert [one.table for one in listing.listed(place.settings)] == ["gone"]

    ended = place.cli("archive", "restore", f"{partition.low:%Y-%m-%d}")
    assert ended.returncode == 0, ended.stderr
    assert f"{partition.name}: {len(some)} rows are in the table again" in ended.stdout
    # The late one is there, too, which the archive has not.
    whole = stored_rows(place, partition.name)
    assert [row for row in whole if row != late] == some
    assert late in whole
    summaries_agree(place)
    assert keeping.keep(place.settings, place.partition(partition.name)).made
    assert archived_rows(place, partition.name) == whole

    retention.drop(place.settings, place.partition(partition.name), keeping.keeper(place.settings))
    for _ in range(2):  # the second time all of it is there already
        assert place.cli("archive", "restore", partition.name).returncode == 0
        assert stored_rows(place, partition.name) == whole
        summaries_agree(place)
    # Nothing has to be archived anew: the archive is that of the partition.
    assert not keeping.keep(place.settings, place.partition(partition.name)).made
    require_whole(place, place.partition(partition.name))


def test_nothing_is_dropped_when_it_cannot_be_archived(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    partition = earlier(place, 3)
    rows = stored_rows(place)

    def full(*_: object, **__: object) -> None:
        raise ServiceError("no room")

    monkeypatch.setattr(parquet, "write", full)
    with pytest.raises(ServiceError, match="no room"):
        retention.drop(place.settings, partition, keeping.keeper(place.settings))
    assert stored_rows(place) == rows
    assert place.root.names() == []


def test_a_damaged_archive_is_not_restored(place: Place) -> None:
    partition = earlier(place, 3)
    retention.drop(place.settings, partition, keeping.keeper(place.settings))
    path = place.root.path / partition.name / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ended = place.cli("archive", "restore", partition.name)
    assert ended.returncode == 1
    assert f"nothing was restored: {path}: its bytes have changed" in ended.stderr
    assert stored_rows(place) == []


def test_retention_archives_before_it_drops(place: Place) -> None:
    partition = earlier(place, 3)
    settings = place.settings.model_copy(update={"metrics_retention": "2d"})
    rows = stored_rows(place, partition.name)
    gone = retention.run(settings, keep=keeping.keeper(settings))
    assert [one.name for one, _ in gone] == [partition.name]
    assert archived_rows(place, partition.name) == rows
    late_one = Stored(UUID(int=8), (partition.low or BEGIN) + timedelta(hours=1), 0, 1.5, (), BEGIN)
    store(place, [late_one])
    assert [one.name for one, _ in retention.run(settings, keep=keeping.keeper(settings))] == [partitions.FIRST]
    assert sorted(place.root.names()) == [partitions.FIRST, partition.name]
    store(place, [replace(late_one, metric_name=10)])
    retention.run(settings, keep=keeping.keeper(settings))
    assert sorted(place.root.names()) == [partitions.FIRST, f"{partitions.FIRST}.2", partition.name]
    assert checking.verify(place.root) == []
