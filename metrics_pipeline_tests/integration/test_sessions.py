"""What is stored and read is the same whatever a variable, a role or a database presets, for each program that opens a session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import psycopg
import pytest
from psycopg import sql

from metrics_pipeline import postgres
from metrics_pipeline.defs.storage import PipelineStorage
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.local.environment import replaced
from metrics_pipeline.settings import CONNECTOR, Role, Settings
from metrics_pipeline.sinks import connector
from metrics_pipeline.surroundings import LIBPQ
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.databases import own_database
from metrics_pipeline_tests.patience import patience

pytestmark = pytest.mark.integration

VARIABLES: Final = dict.fromkeys(LIBPQ, "/nowhere") | {
    "PGHOST": "127.0.0.9",
    "PGHOSTADDR": "127.0.0.9",
    "PGPORT": "1",
    "PGOPTIONS": "-c DateStyle=German -c default_transaction_read_only=on -c search_path=pg_catalog -c TimeZone=Asia/Tokyo",
    "PGTZ": "Asia/Tokyo",
    "PGDATESTYLE": "German",
    "PGCLIENTENCODING": "SQL_ASCII",
    "PGGEQO": "off",
    "PGSSLMODE": "verify-full",
    "PGSSLNEGOTIATION": "direct",
    "PGREQUIREAUTH": "none",
    "PGCHANNELBINDING": "require",
    "PGTARGETSESSIONATTRS": "standby",
    "PGLOADBALANCEHOSTS": "random",
    "PGCONNECT_TIMEOUT": "0",
    "PGGSSENCMODE": "require",
    "PGREQUIRESSL": "1",
}
"""Each variable of libpq, set to what would lead elsewhere or change what is read."""

TEXTS: Final = {
    "DateStyle": "German",
    "IntervalStyle": "iso_8601",
    "TimeZone": "Asia/Tokyo",
    "timezone_abbreviations": "India",
    "client_encoding": "LATIN1",
    "search_path": "pg_catalog",
    "role": "metrics_reader",
    "lc_messages": "C",
    "lc_monetary": "C",
    "lc_numeric": "C",
    "lc_time": "C",
    "restrict_nonsystem_relation_kind": "view",
    "default_table_access_method": "heap",
    "application_name": "somebody",
    "createrole_self_grant": "set",
    "default_text_search_config": "pg_catalog.german",
    "wal_consistency_checking": "",
    "debug_io_direct": "",
}
LEFT: Final = {
    "default_tablespace": "where files lie is the administrator's to say",
    "temp_tablespaces": "the same",
    "local_preload_libraries": "no session begins at all without the library",
    "session_preload_libraries": "the same",
    "dynamic_library_path": "where libraries lie",
    "session_authorization": "nobody can preset it",
    "backtrace_functions": "what the log holds",
    "log_connections": "the same",
    "log_min_messages": "the same",
    "output_plugin_libraries": "of logical replication",
    "max_stack_depth": "a superuser's limit: a statement that meets it fails, and says so",
    "temp_file_limit": "the same",
    "tcp_user_timeout": "how long a line that is cut is waited for is the administrator's to say",
}
"""Settings that are not turned, and why. A new one that is text is to be put into one of the two."""

REFUSED: Final = {"session_replication_role", "track_counts", "track_activities"}
"""Only a superuser can change them back: a session that has them otherwise is refused, by the setting's name."""

READ: Final = r"""
SELECT
  timestamptz '2026-11-22 01:02:03.456789+00', date '2026-11-02', interval '1 day 02:03:04.5', 0.1::float8 + 0.2, 1e300::float8,
  '\xdeadbeef'::bytea, 'ä日本', 'a\b', ARRAY['NULL', NULL]::text[], 1234.5::numeric, true,
  to_regclass('probe') IS NOT NULL, current_user, current_setting('transaction_read_only'),
  current_setting('transaction_isolation'), (timestamptz '2026-11-22 01:02:03.456789+00')::text, (date '2026-11-02')::text,
  (interval '1 day 02:03:04.5')::text, (0.1::float8 + 0.2)::text, ('\xdeadbeef'::bytea)::text,
  '02/03/2026'::date::text, '2026-11-22 01:02:03'::timestamptz::text
"""
ROW: Final = (
    datetime(2026, 11, 22, 1, 2, 3, 456789, tzinfo=UTC),
    date(2026, 11, 2),
    timedelta(days=1, seconds=7384.5),
    0.1 + 0.2,
    b"\xde\xad\xbe\xef",
    ["ä", "日本", "a\\b", "NULL", "'"],
)
COLUMNS: Final = "(moment timestamptz, day date, span interval, value float8, raw bytea, tags text[])"
WRITE: Final = "INSERT INTO probe VALUES (%s, %s, %s, %s, %s, %s)"


@pytest.fixture(scope="module")
def database(started_stack: RunningStack) -> Iterator[Settings]:
    """A migrated database with a table that takes every kind of value."""
    with own_database(started_stack.settings) as settings:
        with postgres.connect_admin(settings, settings.metrics_database) as connection:
            connection.execute(f"CREATE TABLE public.probe {COLUMNS}")
            connection.execute("ALTER TABLE public.probe OWNER TO metrics_owner")
        yield settings


def by_psycopg(settings: Settings) -> Any:
    """What the owner's session reads, and what it stores."""
    with postgres.connect(settings, "metrics_owner") as connection:
        read = connection.execute(READ).fetchone()
        connection.execute("DELETE FROM probe")
        connection.execute(WRITE, ROW)
    return read, stored(settings)


def by_sqlalchemy(settings: Settings) -> Any:
    """The same by Dagster's storage, whose own database has no such table: it is pointed at ours."""
    from sqlalchemy import text

    url = settings.dagster_postgres_url.rpartition("/")[0] + f"/{settings.metrics_database}"
    storage: Any = PipelineStorage.from_config_value(None, {"postgres_url": url, "should_autocreate_tables": False})
    with storage.run_storage.connect() as connection:
        read = tuple(connection.execute(text(READ.replace(":", r"\:"))).fetchone())
        connection.execute(text("DELETE FROM probe"))
        columns = ("moment", "day", "span", "value", "raw", "tags")
        named = ", ".join(f":{name}" for name in columns)
        connection.execute(text(f"INSERT INTO probe VALUES ({named})"), dict(zip(columns, ROW, strict=True)))
        connection.commit()
    return [bytes(value) if isinstance(value, memoryview) else value for value in read], stored(settings)


def stored(settings: Settings) -> Any:
    """What is in the table, read by a session that nobody's presets reach."""
    with postgres.connect_admin(settings, settings.metrics_database) as connection:
        return connection.execute("SELECT probe::text FROM public.probe").fetchall()


PROGRAMS: Final[dict[str, tuple[str, Callable[[Settings], Any]]]] = {
    "psycopg": ("metrics_owner", by_psycopg),
    "Dagster": ("dagster", by_sqlalchemy),
}
"""Those that are tried with each setting by itself, and the role that they have."""


@pytest.fixture(scope="module")
def dagster_may(database: Settings) -> None:
    """Dagster's role can use the table, too."""
    with postgres.connect_admin(database, database.metrics_database) as connection:
        connection.execute(f"GRANT CONNECT ON DATABASE {database.metrics_database} TO dagster")
        connection.execute("GRANT USAGE ON SCHEMA public TO dagster")
        connection.execute("GRANT ALL ON public.probe TO dagster")


@contextmanager
def variables(**given: str) -> Iterator[None]:
    """Variables of this process, which libpq reads when it opens a session."""
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_variable_of_libpq_changes_what_is_read_or_stored(
    program: str, database: Settings, dagster_may: None
) -> None:
    _, run = PROGRAMS[program]
    expected = run(database)
    for name in sorted(VARIABLES):
        with variables(**{name: VARIABLES[name]}):
            assert run(database) == expected, name
    with variables(**VARIABLES):
        assert run(database) == expected


def test_the_variables_would_change_it_if_they_were_obeyed(database: Settings) -> None:
    """The asserter: by itself, psycopg obeys them."""
    url = database.role_url("metrics_owner")
    for name in ("PGOPTIONS", "PGHOSTADDR", "PGSSLMODE", "PGSERVICE", "PGTARGETSESSIONATTRS", "PGTZ", "PGDATESTYLE"):
        with variables(**{name: VARIABLES[name]}):
            try:
                with psycopg.connect(url) as connection:
                    shown = connection.execute("SELECT now()::text, current_setting('datestyle')").fetchone()
            except (psycopg.Error, NotImplementedError):
                continue
        assert shown is not None
        assert "+00" not in shown[0] or shown[1] != "ISO, MDY", name


def presets(settings: Settings) -> dict[str, str]:
    """A value of its own for each setting that a role or a database can preset."""
    found = {"role": TEXTS["role"]}  # the view leaves it out
    with postgres.connect_admin(settings) as connection:
        rows = connection.execute(
            "SELECT name, vartype, setting, min_val, max_val, enumvals FROM pg_settings "
            "WHERE context IN ('user', 'superuser') ORDER BY name"
        ).fetchall()
    for name, kind, present, least, most, choices in rows:
        if name in LEFT:
            continue
        match kind:
            case "bool":
                found[name] = "off" if present == "on" else "on"
            case "enum":
                if others := [choice for choice in choices if choice != present]:
                    found[name] = others[0]
            case "integer" | "real":
                if name.endswith("_timeout"):
                    found[name] = "1"
                elif float(present) != float(least):
                    found[name] = least
                else:
                    found[name] = "1" if float(most) > 1 else most
            case _ if name in TEXTS:
                found[name] = TEXTS[name]
    return found


def test_every_setting_that_is_text_is_turned_or_left_for_a_reason(database: Settings) -> None:
    with postgres.connect_admin(database) as connection:
        rows = connection.execute(
            "SELECT name, setting FROM pg_settings WHERE context IN ('user', 'superuser') AND vartype = 'string'"
        ).fetchall()
    assert {name: setting for name, setting in rows if name not in TEXTS and name not in LEFT} == {}


@contextmanager
def preset(settings: Settings, roles: list[str], values: dict[str, str]) -> Iterator[list[str]]:
    """Presets of roles in the database, which go over those of a role, and those of a database; yields those that can be."""
    where = [
        sql.SQL("ROLE {} IN DATABASE {}").format(sql.Identifier(role), sql.Identifier(settings.metrics_database))
        for role in roles
    ]
    taken = []
    with postgres.connect_admin(settings) as connection:
        for name, value in values.items():
            try:
                for place in where:
                    connection.execute(
                        sql.SQL("ALTER {} SET {} TO {}").format(place, sql.Identifier(name), sql.Literal(value))
                    )
            except psycopg.Error:
                continue  # nobody can preset it
            taken.append(name)
    try:
        yield taken
    finally:
        with postgres.connect_admin(settings) as connection:
            for place in where:
                connection.execute(sql.SQL("ALTER {} RESET ALL").format(place))


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_preset_changes_what_is_read_or_stored(program: str, database: Settings, dagster_may: None) -> None:
    role, run = PROGRAMS[program]
    expected = run(database)
    tried = 0
    for name, value in presets(database).items():
        with preset(database, [role], {name: value}) as taken:
            if not taken:
                continue
            tried += 1
            if name in REFUSED and program == "psycopg":
                with pytest.raises(ServiceError, match=f"presets {name} = "):
                    run(database)
            else:
                assert run(database) == expected, f"{name} = {value}"
    assert tried > 150
    hostile = {name: value for name, value in presets(database).items() if name not in REFUSED}
    with preset(database, [role], hostile):
        assert run(database) == expected, "all of them at once"


ROLE_SETTINGS: Final[dict[Role, tuple[str, str]]] = {
    "metrics_reader": ("default_transaction_read_only", "on"),
    "metrics_producer": ("statement_timeout", "30s"),
    "metrics_owner": ("lock_timeout", "30s"),
    "metrics_writer": ("idle_in_transaction_session_timeout", "5min"),
    "metrics_summarizer": ("lock_timeout", "2min"),
}


@pytest.mark.parametrize("role", ROLE_SETTINGS)
def test_what_we_say_of_a_role_stands_over_its_presets(role: Role, database: Settings) -> None:
    name, value = ROLE_SETTINGS[role]
    with preset(database, [role], {name: "off" if value == "on" else "7s"}):
        with postgres.connect(database, role, autocommit=True) as connection:
            assert connection.execute("SELECT current_setting(%s)", [name]).fetchone() == (value,)
        with postgres.connect(
            database, role, autocommit=True, options=f"-c {name}={'off' if value == 'on' else '9s'}"
        ) as c:
            assert c.execute("SELECT current_setting(%s)", [name]).fetchone() == ("off" if value == "on" else "9s",)


def test_a_durability_that_somebody_preset_away_comes_back(database: Settings) -> None:
    for given, expected in (("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")):
        with (
            preset(database, ["metrics_writer"], {"synchronous_commit": given}),
            postgres.connect(database, "metrics_writer", autocommit=True) as connection,
        ):
            assert connection.execute("SHOW synchronous_commit").fetchone() == (expected,)


CATALOG: Final = """
SELECT 'column', table_name || '.' || column_name, data_type || coalesce(column_default, '') || is_nullable
FROM information_schema.columns WHERE table_schema = 'public'
UNION ALL SELECT 'constraint', conrelid::regclass::text || '.' || conname, pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL SELECT 'function', p.oid::regprocedure::text, md5(prosrc) || array_to_string(proconfig, ',')
FROM pg_proc AS p WHERE pronamespace = 'public'::regnamespace
UNION ALL SELECT 'trigger', tgrelid::regclass::text || '.' || tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
UNION ALL SELECT 'version', version, '' FROM public.schema_migrations
"""


def test_neither_changes_what_dbmate_makes(database: Settings) -> None:
    def catalog(settings: Settings) -> Any:
        with postgres.connect_admin(settings, settings.metrics_database) as connection:
            # Their columns have collations of their own, by which no common order is known to PostgreSQL.
            return sorted(map(str, connection.execute(CATALOG)))

    hostile = {name: value for name, value in presets(database).items() if name not in REFUSED}
    with own_database(database, migrated=False) as plain, own_database(database, migrated=False) as other:
        postgres.migrate(plain)
        assert postgres.rollback(plain) is not None
        postgres.migrate(plain)
        with preset(other, ["metrics_owner"], hostile) as taken, variables(**VARIABLES):
            assert len(taken) > 150
            assert postgres.migration_status(other).pending
            postgres.migrate(other)
            assert postgres.migration_status(other).at_head
            assert postgres.rollback(other) is not None
            postgres.migrate(other)
        assert catalog(other) == catalog(plain)


def test_neither_changes_what_connect_stores(stack: RunningStack) -> None:
    hostile = {
        name: value
        for name, value in presets(stack.settings).items()
        # What its driver or its pool cannot bear before the first statement comes.
        if name not in REFUSED and not name.endswith("_timeout")
    }
    hostile |= {"statement_timeout": "50ms", "lock_timeout": "1ms"}
    rest = connector.client(stack.settings)
    with preset(stack.settings, ["metrics_writer"], hostile) as taken, variables(**VARIABLES):
        assert "default_transaction_read_only" in taken
        rest.restart(CONNECTOR, only_failed=False)
        connector.ensure_connector(stack.settings)
        produced = stack.cli("produce", "--seconds", "3")
        assert produced.returncode == 0, produced.stdout + produced.stderr
        verified = stack.cli("verify", "--json")
        assert verified.returncode == 0, verified.stdout + verified.stderr
    rest.restart(CONNECTOR, only_failed=False)
    connector.ensure_connector(stack.settings)


@pytest.mark.parametrize(
    "arguments", [("verify",), ("migrate", "status"), ("sql", "SELECT now()"), ("rejects", "list")]
)
def test_no_command_is_changed_by_the_shell(arguments: tuple[str, ...], stack: RunningStack) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "metrics_pipeline", *arguments],
        env=dict(stack.environment) | VARIABLES,
        cwd=stack.settings.data_dir,
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_database_that_holds_no_utf8_is_refused_in_one_line(started_stack: RunningStack) -> None:
    settings = started_stack.settings
    with postgres.connect_admin(settings) as connection:
        connection.execute("CREATE DATABASE ascii_only TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
        try:
            with pytest.raises(
                ServiceError, match=r"the encoding of database ascii_only is SQL_ASCII, and readings are UTF-8"
            ):
                postgres.connect(settings.model_copy(update={"postgres_db": "ascii_only"}), "metrics_owner")
        finally:
            connection.execute("DROP DATABASE ascii_only")


@pytest.mark.parametrize("value", ["'infinity'::timestamptz", "'0044-03-15 BC'::date", "'294276-01-01'::timestamptz"])
def test_a_value_that_python_does_not_have_is_one_line(value: str, stack: RunningStack) -> None:
    done = stack.cli("sql", f"SELECT {value}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: SQL ")


def test_a_server_of_another_data_folder_is_known_by_its_name(stack: RunningStack, tmp_path: Any) -> None:
    from metrics_pipeline.data_folder import make_folder_id

    make_folder_id(tmp_path)
    with replaced({**stack.environment, "PIPELINE_DATA_DIR": str(tmp_path)}):
        other = Settings.load()
    with pytest.raises(ServiceError, match=rf"is not the PostgreSQL of {tmp_path}: "):
        postgres.connect(other, "metrics_reader")
