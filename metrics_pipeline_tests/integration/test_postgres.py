"""Roles, rights, migrations and statements on a real server."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from pydantic import SecretStr

from metrics_pipeline import postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.producer import ledger
from metrics_pipeline.settings import Role, Settings
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.databases import own_database
from metrics_pipeline_tests.fakes import until
from metrics_pipeline_tests.patience import patience

pytestmark = pytest.mark.integration

READING = (
    "INSERT INTO metrics (device_id, published_at, metric_name, value, tags) "
    "VALUES ('0f8fad5b-d9cb-469f-a165-70867728950e', '2026-11-22 16:00+00', 10, 45.2, '{site:a}')"
)


@pytest.fixture(scope="module")
def database(stack: RunningStack) -> Iterator[Settings]:
    with own_database(stack.settings) as own:
        yield own


@pytest.fixture
def empty(stack: RunningStack) -> Iterator[Settings]:
    """A database without a schema."""
    with own_database(stack.settings, migrated=False) as own:
        yield own


def attempt(database: Settings, role: Role, statement: str, *parameters: Any) -> None:
    """Run a statement as a role; what it did is rolled back."""
    with postgres.connect(database, role) as conn, conn.transaction(force_rollback=True):
        conn.execute(statement, parameters)


def refused(database: Settings, role: Role, statement: str, *parameters: Any) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        attempt(database, role, statement, *parameters)


def test_the_readings_are_as_designed(database: Settings) -> None:
    with postgres.connect(database, "metrics_reader") as conn:
        columns = conn.execute(
            "SELECT attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid) "
            "FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum "
            "WHERE attrelid = 'metrics'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
        ).fetchall()
        key = conn.execute(
            "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'metrics_pkey'"
        ).fetchall()
        names = conn.execute("SELECT code, name FROM metric_names ORDER BY code").fetchall()
    assert columns == [
        ("device_id", "uuid", True, None),
        ("published_at", "timestamp with time zone", True, None),
        ("metric_name", "smallint", True, None),
        ("value", "double precision", True, None),
        ("tags", "text[]", True, "'{}'::text[]"),
        ("created_at", "timestamp with time zone", True, "now()"),
    ]
    assert key == [("PRIMARY KEY (device_id, published_at, metric_name)",)]
    assert names == [(0, "temperature"), (10, "humidity"), (20, "pressure"), (30, "co2"), (40, "light"), (50, "sound")]


@pytest.mark.parametrize(
    ("column", "value", "constraint"),
    [
        ("value", "NaN", "metrics_value_is_finite"),
        ("value", "Infinity", "metrics_value_is_finite"),
        ("value", "-Infinity", "metrics_value_is_finite"),
        ("metric_name", "5", "metrics_metric_name_is_known"),
        ("published_at", "infinity", "metrics_published_at_has_four_digit_year"),
        ("published_at", "0001-01-01 00:00:00+00 BC", "metrics_published_at_has_four_digit_year"),
        ("published_at", "10000-01-01 00:00:00+00", "metrics_published_at_has_four_digit_year"),
        ("created_at", "-infinity", "metrics_created_at_has_four_digit_year"),
    ],
)
def test_what_no_reading_can_be(database: Settings, column: str, value: str, constraint: str) -> None:
    row = {"device_id": str(UUID(int=1)), "published_at": "2026-01-01 00:00+00", "metric_name": "10", "value": "1"}
    row[column] = value
    statement = f"INSERT INTO metrics ({', '.join(row)}) VALUES ({', '.join(['%s'] * len(row))})"
    with pytest.raises(psycopg.errors.CheckViolation, match=constraint):
        attempt(database, "metrics_owner", statement, *row.values())


def test_extreme_readings_are_stored(database: Settings) -> None:
    for value, year in (
        ("5e-324", "0001-01-01 00:00:00+00"),
        ("1.7976931348623157e308", "9999-12-31 23:59:59.999999+00"),
    ):
        attempt(
            database,
            "metrics_writer",
            "INSERT INTO metrics (device_id, published_at, metric_name, value, tags) VALUES (%s, %s, 0, %s, %s)",
            UUID(int=1),
            year,
            value,
            ["a,b", '"', "{}", "\\", "\N{GRINNING FACE}"],
        )


def test_the_writer_writes_readings_and_nothing_else(database: Settings) -> None:
    role: Role = "metrics_writer"
    attempt(database, role, READING)
    attempt(
        database,
        role,
        READING + " ON CONFLICT (device_id, published_at, metric_name) DO UPDATE SET value = excluded.value",
    )
    attempt(database, role, "CREATE TEMP TABLE stage (LIKE metrics INCLUDING DEFAULTS)")
    attempt(database, role, "SELECT * FROM metrics NATURAL JOIN (SELECT code AS metric_name FROM metric_names) AS n")
    attempt(database, role, "SELECT activate_connect()")
    refused(database, role, READING.replace("tags)", "tags, created_at)").replace("'{site:a}')", "'{site:a}', now())"))
    for statement in (
        "DELETE FROM metrics",
        "TRUNCATE metrics",
        "SELECT * FROM summary_inserts",
        "DELETE FROM summary_changes",
        "SELECT * FROM producer_runs",
        "UPDATE metric_names SET unit = 'K'",
        "CREATE TABLE mine (a int)",
        "CREATE SCHEMA mine",
        "SELECT refresh_created_at_index()",
        "SELECT log_inserts()",
        "ALTER TABLE metrics DISABLE TRIGGER metrics_2_log_change",
        "UPDATE sink_state SET active = 'copy'",
    ):
        refused(database, role, statement)


def test_the_reader_reads_everything_and_writes_nothing(database: Settings) -> None:
    with postgres.connect(database, "metrics_owner") as conn:
        tables = [row[0] for row in conn.execute("SELECT relname FROM pg_stat_user_tables ORDER BY 1").fetchall()]
    assert {"metrics_before", "metrics_after", "metric_names", "producer_runs", "device_slots"} <= set(tables)
    for table in set(tables) - {"schema_migrations"} | {"metrics", "device_summary", "device_metric_summary"}:
        attempt(database, "metrics_reader", f"SELECT * FROM {table} LIMIT 1")
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        attempt(database, "metrics_reader", READING)
    # Its session may switch that off, and still has no right to write.
    refused(database, "metrics_reader", "SET transaction_read_only = off; " + READING)
    refused(database, "metrics_reader", "SET transaction_read_only = off; CREATE TEMP TABLE mine (a int)")


def test_a_later_table_can_be_read_by_the_reader_alone(database: Settings) -> None:
    with postgres.connect(database, "metrics_owner", autocommit=True) as conn:
        conn.execute("CREATE TABLE later (a int)")
    try:
        attempt(database, "metrics_reader", "SELECT * FROM later")
        refused(database, "metrics_writer", "SELECT * FROM later")
    finally:
        with postgres.connect(database, "metrics_owner", autocommit=True) as conn:
            conn.execute("DROP TABLE later")


def test_the_producer_keeps_its_ledger_and_lock(database: Settings) -> None:
    run = (
        "INSERT INTO producer_runs (run_id, partition, source, state, started_at, updated_at, acknowledged, offsets) "
        "VALUES (%s, 0, 'simulated', 'running', now(), now(), 3, '{[0,3)}')"
    )
    attempt(database, "metrics_producer", run, UUID(int=1))
    attempt(database, "metrics_producer", "UPDATE producer_runs SET state = 'finished'")
    attempt(database, "metrics_producer", "SELECT pg_try_advisory_lock(1), count(*) FROM metrics")
    refused(database, "metrics_producer", "DELETE FROM producer_runs")
    refused(database, "metrics_producer", READING)


def test_the_summarizer_cannot_touch_readings(database: Settings) -> None:
    for statement in (
        READING,
        "UPDATE metrics SET value = 1",
        "DELETE FROM metrics",
        "LOCK TABLE metrics IN SHARE MODE",
    ):
        refused(database, "metrics_summarizer", statement)


def test_databases_are_closed_to_other_roles(database: Settings, stack: RunningStack) -> None:
    for role, dbname in (("metrics_reader", "dagster"), ("dagster", database.metrics_database)):
        password = getattr(database, f"{role}_password").get_secret_value()
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(
                host=database.postgres_host,
                port=database.postgres_host_port,
                user=role,
                password=password,
                dbname=dbname,
            )


def test_roles_are_plain_and_their_passwords_scram(stack: RunningStack) -> None:
    with stack.admin() as conn:
        found = conn.execute(
            "SELECT rolname, rolcanlogin, rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls, "
            "split_part(rolpassword, '$', 1) FROM pg_authid WHERE rolname = ANY(%s) ORDER BY 1",
            [[*postgres.ROLES, "dagster"]],
        ).fetchall()
        memberships = conn.execute(
            "SELECT count(*) FROM pg_auth_members WHERE member::regrole::text = ANY(%s)", [[*postgres.ROLES, "dagster"]]
        ).fetchone()
    assert found == [(role, True, False, "SCRAM-SHA-256") for role in sorted([*postgres.ROLES, "dagster"])]
    assert memberships == (0,)


def test_bootstrap_again_keeps_everything(database: Settings) -> None:
    with postgres.connect(database, "metrics_writer") as conn:
        conn.execute(READING)
    threads = [threading.Thread(target=postgres.bootstrap, args=[database]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with postgres.connect(database, "metrics_writer", autocommit=True) as conn:
        assert conn.execute("SELECT count(*) FROM metrics").fetchone() == (1,)
    with postgres.connect_admin(database, database.metrics_database) as conn:
        conn.execute("TRUNCATE metrics")


def test_bootstrap_sets_a_changed_password(database: Settings) -> None:
    changed = database.model_copy(update={"metrics_reader_password": SecretStr("p'w\\%:/@ é")})
    with pytest.raises(ServiceError, match="METRICS_READER_PASSWORD"):
        postgres.connect(changed, "metrics_reader")
    try:
        postgres.bootstrap(changed)
        postgres.connect(changed, "metrics_reader").close()
        # As a URL, for clients that take one.
        psycopg.connect(changed.role_url("metrics_reader")).close()
    finally:
        postgres.bootstrap(database)
    postgres.connect(database, "metrics_reader").close()


def test_a_wrong_password_is_one_line_with_the_next_step(database: Settings) -> None:
    wrong = database.model_copy(update={"metrics_reader_password": SecretStr("wrong-and-secret")})
    with pytest.raises(ServiceError) as caught:
        postgres.run_sql(wrong, "SELECT 1")
    text = str(caught.value)
    assert "METRICS_READER_PASSWORD" in text
    assert "metrics-pipeline up" in text
    assert "\n" not in text
    assert "wrong-and-secret" not in text + repr(caught.value.__cause__)


def test_a_missing_database_is_one_line_with_the_next_step(database: Settings) -> None:
    missing = database.model_copy(update={"postgres_db": "nowhere"})
    with pytest.raises(ServiceError, match="has no database nowhere: run `metrics-pipeline up`"):
        postgres.connect(missing, "metrics_reader")


def test_a_superuser_without_rights_is_told_so(database: Settings) -> None:
    password = database.metrics_summarizer_password
    powerless = database.model_copy(
        update={"postgres_user": "metrics_summarizer", "postgres_password": password, "postgres_db": "postgres"}
    )
    with pytest.raises(ServiceError, match=r"could not set up its roles and databases: permission denied"):
        postgres.bootstrap(powerless)


def test_sessions_are_in_utc_and_named(database: Settings) -> None:
    with postgres.connect(database, "metrics_reader", options="-c lock_timeout=7s") as conn:
        assert conn.execute(
            "SELECT current_setting('TimeZone'), application_name, current_setting('lock_timeout') "
            "FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        ).fetchone() == ("UTC", "metrics-pipeline metrics_reader", "7s")


def test_migrations_go_up_down_and_up_again(empty: Settings) -> None:
    names = sorted(path.stem for path in postgres.MIGRATIONS.glob("*.sql"))
    assert postgres.migration_status(empty) == postgres.MigrationStatus(applied=[], pending=names)
    assert not postgres.migration_status(empty).at_head
    assert postgres.rollback(empty) is None
    assert postgres.migrate(empty) == names
    assert postgres.migrate(empty) == []
    before = catalogue(empty)
    for name in reversed(names):
        assert postgres.rollback(empty) == name
    assert postgres.rollback(empty) is None
    assert [name for name, _ in catalogue(empty)] == ["schema_migrations", "schema_migrations_pkey"]
    assert postgres.migrate(empty) == names
    assert catalogue(empty) == before
    assert postgres.migration_status(empty).at_head


def catalogue(database: Settings) -> list[Any]:
    with postgres.connect_admin(database, database.metrics_database) as conn:
        return conn.execute(
            "SELECT relname::text, relacl::text FROM pg_class WHERE relnamespace = 'public'::regnamespace "
            "UNION ALL SELECT proname, proacl::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1"
        ).fetchall()


def test_two_migrations_at_once_wait_for_each_other(empty: Settings) -> None:
    applied: list[list[str]] = []
    threads = [threading.Thread(target=lambda: applied.append(postgres.migrate(empty))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(applied) == 3
    assert postgres.migration_status(empty).at_head


def test_an_applied_migration_without_a_file_is_named(empty: Settings) -> None:
    postgres.migrate(empty)
    with postgres.connect(empty, "metrics_owner") as conn:
        conn.execute("INSERT INTO schema_migrations VALUES ('20990101000000')")
    status = postgres.migration_status(empty)
    assert (status.missing, status.pending, status.at_head) == (["20990101000000"], [], False)


def test_a_failing_migration_is_named_with_the_reason(
    empty: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(postgres, "MIGRATIONS", tmp_path)
    (tmp_path / "20260101000000_good.sql").write_text("-- migrate:up\nCREATE TABLE good (a int);\n-- migrate:down\n")
    (tmp_path / "20260102000000_bad.sql").write_text(
        "-- migrate:up\nCREATE TABLE half (a int);\nCREATE TABEL bad (a int);\n-- migrate:down\n"
    )
    with pytest.raises(ServiceError, match=r"migration 20260102000000_bad\.sql failed: .*syntax error") as caught:
        postgres.migrate(empty)
    assert empty.metrics_owner_password.get_secret_value() not in str(caught.value)
    assert postgres.migration_status(empty).applied == ["20260101000000_good"]
    with postgres.connect(empty, "metrics_owner") as conn:
        assert conn.execute("SELECT to_regclass('good') IS NOT NULL, to_regclass('half') IS NULL").fetchone() == (
            True,
            True,
        )


def test_no_password_in_a_command_line(empty: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    run = subprocess.run

    def record(command: list[str], **options: Any) -> Any:
        seen.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", record)
    postgres.migrate(empty)
    assert seen
    password = empty.metrics_owner_password.get_secret_value()
    assert not [part for command in seen for part in command if password in part or "postgres://" in part]


def test_no_password_in_the_server_log_or_its_views(database: Settings, stack: RunningStack) -> None:
    """Even with every statement logged, the server sees verifiers only."""
    secret = "seen-by-nobody"
    changed = database.model_copy(update={"metrics_reader_password": SecretStr(secret)})
    with stack.admin() as conn:
        conn.execute("ALTER ROLE CURRENT_USER SET log_statement = 'all'")
    try:
        postgres.bootstrap(changed)
    finally:
        with stack.admin() as conn:
            conn.execute("ALTER ROLE CURRENT_USER RESET log_statement")
        postgres.bootstrap(database)
    logs = [path for path in stack.settings.data_dir.rglob("*") if path.is_file() and "log" in str(path)]
    text = b"".join(path.read_bytes() for path in logs)
    assert b"SCRAM-SHA-256$" in text, "the log was looked for in the wrong place"
    assert secret.encode() not in text


def test_sql_gives_columns_and_rows(database: Settings) -> None:
    result = postgres.run_sql(database, "SELECT 1 AS one, 'é' AS text, now() AS time; SELECT 2 AS two, NULL AS nothing")
    assert (result.columns, result.rows) == (["two", "nothing"], [(2, None)])
    (row,) = postgres.run_sql(database, "-- 100% a comment\nSELECT '%s', now()").rows
    assert row[0] == "%s"
    assert row[1].tzinfo is not None
    assert abs((row[1] - datetime.now(UTC)).total_seconds()) < 60
    assert postgres.run_sql(database, "SET lock_timeout = '1s'") == postgres.Result([], [])
    assert postgres.run_sql(database, "  ") == postgres.Result([], [])


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("SELECT 1\nFROM nowhere", r'SQL failed at line 2: relation "nowhere" does not exist \(42P01\)$'),
        ("SELEC 1", r"SQL failed at line 1: syntax error"),
        ("SELECT 1/0", r"SQL failed: division by zero"),
        ("DELETE FROM metrics", r"SQL refused: cannot execute DELETE in a read-only transaction"),
        ("COPY metric_names TO STDOUT", r"SQL refused: COPY"),
    ],
)
def test_sql_that_cannot_be_run_is_one_line(database: Settings, statement: str, message: str) -> None:
    with pytest.raises(ServiceError, match=message) as caught:
        postgres.run_sql(database, statement)
    assert "\n" not in str(caught.value)


def test_sql_that_takes_too_long_is_stopped(database: Settings) -> None:
    with pytest.raises(ServiceError, match=r"SQL stopped after 0\.2 s"):
        postgres.run_sql(database, "SELECT pg_sleep(30)", timeout_seconds=0.2)


@pytest.mark.parametrize(
    ("rows", "hours_ago", "stays"),
    [
        pytest.param([(0, "{[10,100)}"), (1, "{[0,50)}")], 25, False, id="the-topic-holds-none-of-it"),
        pytest.param([(0, "{}")], 25, False, id="nothing-was-acknowledged"),
        pytest.param([(-1, "{}"), (0, "{[10,20)}")], 25, False, id="with-records-that-reached-no-partition"),
        pytest.param([(0, "{[10,100)}"), (1, "{[0,50)}")], 23, True, id="too-young"),
        pytest.param([(0, "{[10,100)}"), (1, "{[0,51)}")], 25, True, id="one-record-is-still-there"),
        pytest.param([(0, "{[10,20),[90,101)}")], 25, True, id="the-last-of-several-ranges"),
        pytest.param([(9, "{[0,1)}")], 25, True, id="of-a-partition-that-nobody-knows"),
    ],
)
def test_the_ledger_is_purged_of_what_nothing_can_be_compared_with(
    database: Settings, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[int, str]], hours_ago: int, stays: bool
) -> None:
    monkeypatch.setattr("metrics_pipeline.producer.ledger.kafka.watermarks", lambda _: {0: (100, 200), 1: (50, 60)})
    settings = database.model_copy(update={"run_retention_hours": 24})
    with postgres.connect(database, "metrics_owner", autocommit=True) as conn:
        conn.execute("DELETE FROM producer_runs")
        for partition, offsets in rows:
            conn.execute(
                "INSERT INTO producer_runs (run_id, partition, source, state, started_at, updated_at, acknowledged, offsets) "
                "SELECT %s, %s, 'mqtt', 'finished', t, t, 3, %s FROM (SELECT now() - %s * interval '1 hour' AS t) AS at",
                [UUID(int=1), partition, offsets, hours_ago],
            )
    assert ledger.purge(settings) == (0 if stays else len(rows))
    with postgres.connect(database, "metrics_owner", autocommit=True) as conn:
        assert conn.execute("DELETE FROM producer_runs").rowcount == (len(rows) if stays else 0)


@pytest.mark.parametrize(
    ("source", "minutes_ago", "state"),
    [
        pytest.param("simulated", 0, "failed", id="its-lock-is-free"),
        pytest.param("replay", 61, "failed", id="said-nothing-for-an-hour"),
        pytest.param("replay", 59, "running", id="may-live"),
    ],
)
def test_runs_that_never_said_how_they_ended(database: Settings, source: str, minutes_ago: int, state: str) -> None:
    with postgres.connect(database, "metrics_producer", autocommit=True) as conn, conn.transaction(force_rollback=True):
        conn.execute(
            "INSERT INTO producer_runs (run_id, partition, source, state, started_at, updated_at, acknowledged, offsets) "
            "SELECT %s, 0, %s, 'running', t, t, 3, '{[0,3)}' FROM (SELECT now() - %s * interval '1 minute' AS t) AS at",
            [UUID(int=1), source, minutes_ago],
        )
        conn.execute(postgres.query("end_abandoned_runs"), {"run_id": UUID(int=2)})
        assert conn.execute("SELECT state FROM producer_runs WHERE run_id = %s", [UUID(int=1)]).fetchone() == (state,)


def test_the_rows_of_a_table_of_more_than_2_gib_are_estimated(database: Settings) -> None:
    with postgres.connect_admin(database, database.metrics_database) as conn, conn.transaction(force_rollback=True):
        conn.execute("TRUNCATE metrics")
        conn.execute(
            "INSERT INTO metrics (device_id, published_at, metric_name, value) "
            "SELECT gen_random_uuid(), '2001-01-01 00:00:00+00', 10, n FROM generate_series(1, 1000) AS n"
        )
        conn.execute("UPDATE pg_class SET relpages = 300000, reltuples = 18e6 WHERE relname = 'metrics_before'")
        (stored,) = conn.execute("SELECT pg_relation_size('metrics_before')").fetchone() or (0,)
        assert stored > 0
        (estimate, *_) = conn.execute(postgres.query("verify_size")).fetchone() or (0,)
        assert estimate == round(stored / (8192 * 300000 / 18e6))


def test_who_holds_a_lock_is_who_waits_for_nobody(database: Settings) -> None:
    """Of those that wait for one row the first one holds the queue; to name it would lead to one that only waits itself."""
    wanted = "SELECT FROM sink_offsets WHERE topic = 'of-test-postgres' FOR UPDATE"
    names = ["metrics-pipeline sink a/1", "metrics-pipeline sink a/2"]

    def wait(name: str) -> None:
        with postgres.connect(database, "metrics_writer", application_name=name) as session:
            session.execute(wanted)

    with (
        postgres.connect(database, "metrics_owner", autocommit=True) as owner,
        postgres.connect(database, "metrics_writer", autocommit=True) as looks,
        postgres.connect(database, "metrics_writer", application_name="a person") as holder,
        ThreadPoolExecutor() as pool,
    ):
        owner.execute("INSERT INTO sink_offsets (topic, partition, next_offset) VALUES ('of-test-postgres', 0, 0)")

        def seen() -> list[tuple[str, list[str]]]:
            rows = looks.execute(postgres.query("sink_sessions"), {"names": names}).fetchall()
            return [(name, holders) for name, _, _, _, holders in rows if holders]

        try:
            holder.execute(wanted)
            waiting = [pool.submit(wait, names[0])]
            assert until(lambda: len(seen()) == 1, 20)
            waiting.append(pool.submit(wait, names[1]))
            assert until(lambda: len(seen()) == 2, 20)
            said = f"pid {holder.info.backend_pid} (a person, role metrics_writer)"
            assert seen() == [(name, [said]) for name in names]
        finally:
            holder.rollback()
        for one in waiting:
            one.result(patience(20))
        owner.execute("DELETE FROM sink_offsets WHERE topic = 'of-test-postgres'")


def test_who_produces_is_asked_by_an_index(database: Settings) -> None:
    """Every few seconds, by the time of the last sign of life."""
    with postgres.connect(database, "metrics_owner") as conn:
        conn.execute("SET LOCAL enable_seqscan = off")
        plan = conn.execute("EXPLAIN " + postgres.query("status"), {"seconds": 5}).fetchall()
    assert "producer_runs_updated_at_idx" in str(plan)
