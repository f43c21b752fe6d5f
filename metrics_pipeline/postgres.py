"""PostgreSQL: connections by role, roles and databases, migrations, named queries.

Passwords never leave this process in the clear: roles get a SCRAM verifier made by libpq, and dbmate reads its URL from
the environment, because a command line can be read by every account of the machine.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus
from pydantic import SecretStr

from metrics_pipeline.data_folder import cluster_name, folder_id
from metrics_pipeline.errors import InstallError, ServiceError, SettingError
from metrics_pipeline.guest import COLLATION, Guest
from metrics_pipeline.settings import CHECKOUT, ROOT, Role, Settings
from metrics_pipeline.surroundings import forget_libpq, is_loopback

Connection = psycopg.Connection[tuple[Any, ...]]

MIGRATIONS = ROOT / "sql" / "migrations"
QUERIES = ROOT / "sql" / "queries"

CONNECT_SECONDS = 10
STATEMENT_SECONDS = 300
SESSION_LOOKS = 3
"""How often it is looked whether a pooler leaves a session its backend: once is enough unless others use the pool, too."""
OLDEST_VERSION = 17
"""Of the server: the settings of a session are those that it has."""

ROLES: tuple[Role, ...] = get_args(Role)
"""Those that use the database of the readings; `dagster` has its own."""
_ROLE_SETTINGS: dict[str, dict[str, str]] = {
    # A migration that waits for a lock makes every later query wait behind it.
    "metrics_owner": {"lock_timeout": "30s"},
    # A sink that hangs inside a transaction gives its row locks back; its batch is delivered again.
    "metrics_writer": {"idle_in_transaction_session_timeout": "5min"},
    "metrics_summarizer": {"idle_in_transaction_session_timeout": "5min", "lock_timeout": "2min"},
    "metrics_reader": {"default_transaction_read_only": "on", "idle_in_transaction_session_timeout": "1h"},
    "metrics_producer": {"idle_in_transaction_session_timeout": "1min", "statement_timeout": "30s"},
    "dagster": {},
}
_SESSION: dict[str, str] = {
    # First, since it decides what the others may be.
    "role": "none",
    # How values are written and read.
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "timezone_abbreviations": "Default",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "lc_monetary": "C",
    "lc_numeric": "C",
    "lc_time": "C",
    "xmlbinary": "base64",
    "xmloption": "content",
    # How statements are read.
    "search_path": "public",
    "standard_conforming_strings": "on",
    "backslash_quote": "safe_encoding",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "quote_all_identifiers": "off",
    "check_function_bodies": "on",
    "row_security": "on",
    "restrict_nonsystem_relation_kind": "",
    "default_table_access_method": "heap",
    # What a session may do, and for how long.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "transaction_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "exit_on_error": "off",
    "client_min_messages": "notice",
    "stats_fetch_consistency": "cache",
}
"""What every session of ours has, whatever a variable, a role, a database or the server presets; a role's own settings go over it.

PostgreSQL's defaults, but for the zone, the path and the locale. What only makes a statement slower or faster is not ours to say.
"""
_AS_IT_IS = {"synchronous_commit": ("on", "remote_write", "remote_apply")}
"""Presets that may stay as they are when they are one of these: the first of them is set otherwise."""

_TEMPORARY_TABLES: tuple[Role, ...] = ("metrics_owner", "metrics_writer", "metrics_summarizer")


class StandbyServerError(ServiceError):
    """The server takes no writes: another one does by now, or this one will."""


class NoDatabaseError(ServiceError):
    """The server has no database of that name."""


@dataclass(frozen=True)
class MigrationStatus:
    """Migrations by file name (`20261122000001_metrics`), oldest first.

    Attributes:
        applied: in the database and among the files.
        pending: among the files only.
        missing: versions in the database whose file is not there: the schema is newer than this version, or one is lost.
    """

    applied: list[str]
    pending: list[str]
    missing: list[str] = field(default_factory=list)

    @property
    def at_head(self) -> bool:
        """Whether the database has exactly the migrations of this version."""
        return not self.pending and not self.missing


@dataclass(frozen=True)
class Result:
    """What a statement returned; no columns when it returns no rows."""

    columns: list[str]
    rows: list[tuple[Any, ...]]


@cache
def query(name: str) -> str:
    """Text of `sql/queries/NAME.sql`."""
    return (QUERIES / f"{name}.sql").read_text(encoding="utf-8")


def connect(
    settings: Settings,
    role: Role,
    *,
    autocommit: bool = False,
    connect_timeout: int = CONNECT_SECONDS,
    application_name: str | None = None,
    **options: Any,
) -> Connection:
    """Connect to the database of the readings; the session is as `session_sql` has it.

    Args:
        settings: where PostgreSQL is, and the role's password.
        role: whom to connect as.
        autocommit: each statement by itself; otherwise psycopg opens a transaction with the first one.
        connect_timeout: seconds to wait for the server.
        application_name: what `pg_stat_activity` shows; default: the program's and the role's name.
        options: further arguments of `psycopg.connect`; those of the server (`options="-c NAME=VALUE"`) are set once connected.

    Raises:
        ServiceError: not reachable, password refused, or no such database; says which setting to look at.
    """
    password: SecretStr = getattr(settings, f"{role}_password")
    return _open(
        settings,
        user=role,
        password=password.get_secret_value(),
        dbname=settings.metrics_database,
        variable=f"{role.upper()}_PASSWORD",
        autocommit=autocommit,
        connect_timeout=connect_timeout,
        application_name=application_name or f"metrics-pipeline {role}",
        **options,
    )


@contextmanager
def impatient(connection: Connection, seconds: float) -> Iterator[None]:
    """Cut the line of a session whose server has not answered all that is asked within this block in time.

    Otherwise a backend that is stopped, or a line on which nothing comes back, would be waited for for ever. Who waits gets a
    `psycopg.OperationalError`.
    """
    patience = threading.Timer(seconds, _hang_up, [connection])
    patience.daemon = True
    patience.start()
    try:
        yield
    finally:
        patience.cancel()


def _hang_up(connection: Connection) -> None:
    with suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)


def connect_admin(settings: Settings, database: str = "postgres", **options: Any) -> Connection:
    """Connect as the superuser (or as the role that `POSTGRES_URL` names), autocommit.

    Raises:
        ServiceError: as `connect` does.
    """
    server = settings.postgres_server
    return _open(
        settings,
        user=settings.admin_user,
        password=server.password or settings.postgres_password.get_secret_value(),
        dbname=database,
        variable="POSTGRES_URL" if settings.postgres_url else "POSTGRES_PASSWORD",
        **{"autocommit": True, "connect_timeout": CONNECT_SECONDS, "application_name": "metrics-pipeline", **options},
        passfile=server.passfile or None,
    )


def connect_dagster(settings: Settings, **options: Any) -> Connection:
    """Connect to Dagster's own database as Dagster's role.

    Raises:
        ServiceError: as `connect` does.
    """
    return _open(
        settings,
        user="dagster",
        password=settings.dagster_password.get_secret_value(),
        dbname=settings.dagster_database,
        variable="DAGSTER_PASSWORD",
        **{"connect_timeout": CONNECT_SECONDS, "application_name": "metrics-pipeline dagster", **options},
    )


def session_settings(role: str, schema: str = "public") -> dict[str, str]:
    """What a session of a role has, whatever is preset for it; names mean what is in the schema."""
    return _SESSION | {"search_path": schema} | _ROLE_SETTINGS.get(role, {})


def session_options(settings: Mapping[str, str]) -> str:
    """Settings as the start-up parameter `options`, which not even a time limit of a thousandth of a second comes before."""
    return " ".join(f"-c {name}={value.replace(' ', chr(92) + ' ')}" for name, value in settings.items())


def session_sql(settings: Mapping[str, str]) -> str:
    """One statement that gives a session these settings, for a program of any kind to begin with.

    Unlike start-up parameters, no pooler in between refuses it.
    """
    return f"SELECT {_set_configs(settings)}"


def _set_configs(settings: Mapping[str, str]) -> str:
    calls = [f"set_config({_literal(name)}, {_literal(value)}, false)" for name, value in settings.items()]
    for name, good in _AS_IT_IS.items():
        present = f"current_setting({_literal(name)})"
        kept = f"CASE WHEN {present} IN ({', '.join(map(_literal, good))}) THEN {present} ELSE {_literal(good[0])} END"
        calls.append(f"set_config({_literal(name)}, {kept}, false)")
    return ", ".join(calls)


def _literal(value: str) -> str:
    """As SQL reads it whatever `standard_conforming_strings` is; of ours, none has a backslash."""
    return "'" + value.replace("'", "''") + "'"


def _open(settings: Settings, *, variable: str, autocommit: bool = False, **options: Any) -> Connection:
    host, port = settings.postgres_host, settings.postgres_host_port
    outside = bool(settings.postgres_url)
    forget_libpq(os.environ, outside=outside)
    # How an existing server is trusted holds for every role.
    extra = settings.postgres_server.tls if outside else _EMBEDDED
    wanted = session_settings(options["user"], _schema_of(settings, options["user"]))
    wanted |= _server_options(options.pop("options", ""))
    arguments = {**extra, "host": host, "port": port, "client_encoding": "utf8", **options}
    try:
        connection = _connect(arguments, wanted)
    except psycopg.OperationalError as error:
        absent = f'database "{options["dbname"]}" does not exist' in str(error)
        kind = NoDatabaseError if absent else ServiceError
        raise kind(_why(settings, error, arguments, variable)) from error
    except (psycopg.Error, *NO_DATABASE_ERRORS) as error:
        raise ServiceError(f"PostgreSQL at {host}:{port} cannot be used: {one_line(error)}") from error
    try:
        _require_version(settings, connection.info.server_version)
        _begin(settings, connection, wanted)
        connection.autocommit = autocommit
    except BaseException as error:
        connection.close()
        if isinstance(error, (psycopg.Error, *NO_DATABASE_ERRORS)):
            raise ServiceError(
                f"PostgreSQL at {host}:{port} does not give {options['user']} the session it needs: {one_line(error)}"
            ) from error
        raise
    return connection


def _schema_of(settings: Settings, role: str) -> str:
    """Where what a role asks for is; who only makes the others names each thing whole."""
    if role == "dagster":
        return settings.dagster_schema
    return settings.metrics_schema if role in ROLES else "public"


def _connect(arguments: dict[str, Any], wanted: dict[str, str]) -> Connection:
    """A session that has its settings from its first moment, where nobody in between refuses that."""
    place = (arguments["host"], arguments["port"])
    if place not in _POOLERS:
        given = f"{arguments.get('options', '')} {session_options(wanted)}".strip()
        try:
            return psycopg.connect(**{**arguments, "options": given}, autocommit=True)
        except psycopg.OperationalError as error:
            if "startup parameter" not in str(error):
                raise
            _POOLERS.add(place)
    return psycopg.connect(**arguments, autocommit=True)


_POOLERS: set[tuple[str, int]] = set()
"""Where a pooler refused start-up parameters (PgBouncer: «unsupported startup parameter»), so that nobody asks again."""

_EMBEDDED = {"sslmode": "disable", "gssencmode": "disable", "require_auth": "scram-sha-256"}
"""How the embedded server is met. By SCRAM it proves, too, that it knows the password: another one on its port does not."""


def _require_version(settings: Settings, number: int) -> None:
    if number < OLDEST_VERSION * 10_000:
        raise ServiceError(
            f"PostgreSQL at {settings.postgres_host}:{settings.postgres_host_port} is version {number // 10_000}, and the "
            f"pipeline needs {OLDEST_VERSION} or newer: name another server by POSTGRES_URL"
        )


def _begin(settings: Settings, connection: Connection, wanted: Mapping[str, str]) -> None:
    """Give a new session its settings, and see that the server is one that it can work with.

    Raises:
        ServiceError: it is another data folder's, a standby, behind a pooler that gives sessions away between transactions, holds
            no UTF-8, or presets what a role without superuser cannot change.
    """
    told = ", ".join(f"current_setting('{name}')" for name in ("cluster_name", "server_encoding", *_PRESET))
    asked = f"SELECT pg_backend_pid(), pg_is_in_recovery(), {told}, {_set_configs(wanted)}"
    backend, standby, *said = connection.execute(asked).fetchone() or (0, False)
    cluster, encoding, *presets = map(str, said[: 2 + len(_PRESET)])
    place = f"PostgreSQL at {settings.postgres_host}:{settings.postgres_host_port}"
    ours = "" if settings.postgres_url else folder_id(settings)
    if ours and cluster != cluster_name(ours):
        raise ServiceError(
            f"what answers at {settings.postgres_host}:{settings.postgres_host_port} is not the PostgreSQL of "
            f"{settings.data_dir}: start that with `metrics-pipeline up`, set POSTGRES_PORT to where it is, "
            "or name another server by POSTGRES_URL"
        )
    if standby and wanted["default_transaction_read_only"] != "on":
        raise StandbyServerError(
            f"{place} is a standby, which takes no writes: promote it, or let POSTGRES_URL lead to the server that can be written"
        )
    if backend != connection.info.backend_pid:
        _require_own_session(settings, connection, place)
    if connection.info.dbname not in (settings.metrics_database, settings.dagster_database):
        return  # only looked at by who makes the others
    if encoding != "UTF8":
        raise ServiceError(
            f"{place}: the encoding of database {connection.info.dbname} is {encoding}, and readings are UTF-8: make it anew "
            "with ENCODING 'UTF8', or set POSTGRES_DB to another one"
        )
    for (name, needed), preset in zip(_PRESET.items(), presets, strict=True):
        if preset != needed:
            raise ServiceError(
                f"{place} presets {name} = {preset} for {connection.info.user} in {connection.info.dbname}, without which "
                f"nothing would be counted: ALTER ROLE or ALTER DATABASE … RESET {name}, as superuser"
            )


_SESSION_MODE: set[tuple[str, int]] = set()
"""Poolers that were seen to leave a session its backend."""


def _require_own_session(settings: Settings, connection: Connection, place: str) -> None:
    """Behind a pooler, which answers with process ids of its own: see that a session keeps its backend between two transactions.

    Raises:
        ServiceError: it does not.
    """
    pooler = (settings.postgres_host, settings.postgres_host_port)
    if pooler in _SESSION_MODE:
        return
    server = settings.postgres_server
    refused = ServiceError(
        f"{place} is a pooler that hands a session's backend to others between its transactions (PgBouncer: pool_mode = "
        "transaction or statement): locks, temporary tables and the settings of a session would be lost or somebody else's. "
        "Let POSTGRES_URL lead to the server itself, or set pool_mode = session"
    )
    info = connection.info
    url = server.url(info.user, info.password, info.dbname)
    try:
        with (
            psycopg.connect(url, connect_timeout=CONNECT_SECONDS, client_encoding="utf8") as other,
            impatient(other, CONNECT_SECONDS),
        ):
            for _ in range(SESSION_LOOKS):
                own = _backend(connection)
                # In a transaction, which keeps it: the one that was just given back, if any was.
                if _backend(other) == own or _backend(connection) != own:
                    raise refused
                other.rollback()
    except psycopg.errors.ProtocolViolation as error:  # it knows no transactions at all
        raise refused from error
    except psycopg.OperationalError as error:
        raise ServiceError(
            f"{place} is a pooler that has no session left ({one_line(error)}): give it more of them, about 30 for each of "
            "its pools (PgBouncer: default_pool_size)"
        ) from error
    _SESSION_MODE.add(pooler)


def _backend(connection: Connection) -> int:
    (pid,) = connection.execute("SELECT pg_backend_pid()").fetchone() or (0,)
    return int(pid)


_PRESET = {"session_replication_role": "origin", "track_counts": "on", "track_activities": "on"}
"""What only a superuser may set, and what has to be so: triggers that fire, and counters that count."""


def _server_options(text: str) -> dict[str, str]:
    """`-c NAME=VALUE …` as a mapping."""
    given = (word for word in text.split() if word != "-c")
    return {name: value for name, _, value in (word.partition("=") for word in given)}


def _why(settings: Settings, error: psycopg.OperationalError, arguments: dict[str, Any], variable: str) -> str:
    """One line: what refused, why, and what to do. libpq gives no SQLSTATE for a refused connection, only text."""
    place = f"PostgreSQL at {settings.postgres_host}:{settings.postgres_host_port}"
    text = " ".join(str(error).split())
    user, database = arguments["user"], arguments["dbname"]
    where = "POSTGRES_URL" if settings.postgres_url else "POSTGRES_PORT"
    if "password authentication failed" in text or "no password supplied" in text:
        what = "no password given" if "no password supplied" in text else "password refused"
        return (
            f"{place}: {what} for {user}: correct {variable} (in the environment or in .env), "
            "or run `metrics-pipeline up`, which sets the roles' passwords to those in .env"
        )
    if re.search(rf'database "{re.escape(database)}" does not exist', text):
        return f"{place} has no database {database}: run `metrics-pipeline up`, which makes it, or correct POSTGRES_DB"
    if re.search(rf'role "{re.escape(user)}" does not exist', text):
        return f"{place} has no role {user}: run `metrics-pipeline up`, which makes it"
    if re.search(r"the database system is (starting up|shutting down|in recovery mode|not yet accepting)", text):
        return f"{place} is not ready yet ({text.rpartition('FATAL: ')[2].strip()}): try again in a few seconds"
    if re.search(r"permission denied for database", text):
        return f"{place}: {user} may not connect to database {database}: run `metrics-pipeline up`, which grants it"
    if "unrecognized configuration parameter" in text:
        return f"{place} is older than version {OLDEST_VERSION}, which the pipeline needs: name another server by POSTGRES_URL"
    reason = text.rpartition("failed: ")[2].split(" Is the server running")[0].split(" Multiple connection")[0]
    return f"{place} cannot be reached ({reason}): start it with `metrics-pipeline up`, or correct {where}"


def bootstrap(settings: Settings) -> None:
    """Make the roles, databases and schemas, set the roles' passwords, limits and rights; may be run again at any time.

    On a server of others (`POSTGRES_URL`) what is there already keeps its rights and its owner: only what is missing is added.

    Raises:
        SettingError: a role's password is empty.
        ServiceError: PostgreSQL is not reachable, a name of ours is somebody else's there, or rights are missing: says which.
    """
    roles: tuple[str, ...] = (*ROLES, "dagster")
    for role in roles:
        if not getattr(settings, f"{role}_password").get_secret_value():
            raise SettingError(
                f"{role.upper()}_PASSWORD is empty: run `metrics-pipeline up`, which writes one to .env, or set it"
            )
    if settings.postgres_url:
        _join(settings)
        return
    with connect_admin(settings) as conn, _statements(settings, "set up its roles and databases"):
        _serialise(conn)
        for role in roles:
            _role(conn, role, getattr(settings, f"{role}_password"))
        _database(conn, settings.metrics_database, "metrics_owner", ROLES)
        for role in _TEMPORARY_TABLES:
            _do(conn, "GRANT TEMPORARY ON DATABASE {} TO {}", settings.metrics_database, role)
        if not settings.postgres_schema:
            _database(conn, "dagster", "dagster", ("dagster",))
            return
        _do(conn, "GRANT CONNECT ON DATABASE {} TO {}", settings.metrics_database, "dagster")
    with (
        connect_admin(settings, settings.metrics_database) as conn,
        _statements(settings, f"make the schema {settings.postgres_schema}"),
    ):
        _serialise(conn)
        for schema, owner in ((settings.metrics_schema, "metrics_owner"), (settings.dagster_schema, "dagster")):
            _do(conn, "CREATE SCHEMA IF NOT EXISTS {} AUTHORIZATION {}", schema, owner)


def _join(settings: Settings) -> None:
    """Become a guest of a server that others run."""
    guest = Guest(
        database=settings.metrics_database,
        named=bool(settings.postgres_server.database),
        schema=settings.metrics_schema,
        dagster_database=settings.dagster_database,
        dagster_schema=settings.dagster_schema,
        passwords={role: getattr(settings, f"{role}_password").get_secret_value() for role in (*ROLES, "dagster")},
        temporary=_TEMPORARY_TABLES,
        settings=_ROLE_SETTINGS,
        folder=folder_id(settings),
    )
    with admin_somewhere(settings) as conn, _statements(settings, "set up its roles and databases"):
        _serialise(conn)
        place = f"PostgreSQL at {settings.postgres_host}:{settings.postgres_host_port}"
        guest.arrive(conn, place, partial(_opens, settings, conn.info.dbname), partial(connect_admin, settings))


def admin_somewhere(settings: Settings, **options: Any) -> Connection:
    """Connect as `connect_admin` does, where that may be: on a server of others to the database of the readings, once that is there.

    Raises:
        ServiceError: as `connect` does.
    """
    if settings.postgres_url:
        try:
            return connect_admin(settings, settings.metrics_database, **options)
        except NoDatabaseError:
            pass
    return connect_admin(settings, **options)


_REFUSALS = ("password authentication failed", "SASL authentication failed", "is not permitted to log in")


def _opens(settings: Settings, database: str, role: str) -> bool:
    """Whether the password of a role's setting is the one that it has on the server.

    Raises:
        ServiceError: that cannot be found out.
    """
    server = settings.postgres_server
    password = getattr(settings, f"{role}_password").get_secret_value()
    try:
        psycopg.connect(server.url(role, password, database), connect_timeout=CONNECT_SECONDS).close()
    except psycopg.OperationalError as error:
        text = " ".join(str(error).split())
        if "permission denied for database" in text or "does not have CONNECT privilege" in text:
            return True  # who is not known is not told what he may
        if any(said in text for said in _REFUSALS):
            return False
        raise ServiceError(
            f"PostgreSQL at {server.host}:{server.port} does not let {role} in ({text.rpartition('FATAL: ')[2].strip()})"
        ) from error
    return True


def _serialise(conn: Connection) -> None:
    """Two bootstraps at once would fail on each other's rows in the catalogue; the lock ends with the connection."""
    conn.execute("SELECT pg_advisory_lock(hashtext('metrics-pipeline bootstrap'))")


def _role(conn: Connection, role: str, password: SecretStr) -> None:
    if conn.execute("SELECT FROM pg_roles WHERE rolname = %s", [role]).fetchone() is None:
        _do(conn, "CREATE ROLE {} LOGIN", role)
    verifier = conn.pgconn.encrypt_password(password.get_secret_value().encode(), role.encode(), b"scram-sha-256")
    statement = sql.SQL("ALTER ROLE {} LOGIN NOCREATEDB NOCREATEROLE PASSWORD {}")
    conn.execute(statement.format(sql.Identifier(role), sql.Literal(verifier.decode())))
    for name, value in _ROLE_SETTINGS[role].items():
        statement = sql.SQL("ALTER ROLE {} SET {} = {}")
        conn.execute(statement.format(sql.Identifier(role), sql.Identifier(name), sql.Literal(value)))


def _database(conn: Connection, database: str, owner: str, users: Sequence[str]) -> None:
    if conn.execute("SELECT FROM pg_database WHERE datname = %s", [database]).fetchone() is None:
        _do(conn, f"CREATE DATABASE {{}} OWNER {{}} {COLLATION}", database, owner)
    _do(conn, "REVOKE ALL ON DATABASE {} FROM PUBLIC", database)
    for user in users:
        _do(conn, "GRANT CONNECT ON DATABASE {} TO {}", database, user)


def _do(conn: Connection, statement: str, *names: str) -> None:
    conn.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


@contextmanager
def _statements(settings: Settings, what: str) -> Iterator[None]:
    """Turn an error of a statement into one line that says what could not be done."""
    try:
        yield
    except (psycopg.Error, *NO_DATABASE_ERRORS) as error:
        place = f"PostgreSQL at {settings.postgres_host}:{settings.postgres_host_port}"
        raise ServiceError(f"{place} could not {what}: {one_line(error)}") from error


NO_DATABASE_ERRORS = (ValueError, LookupError, NotImplementedError, OverflowError)
"""What psycopg lets through of Python's own errors: text that is no UTF-8, an encoding or a date that Python does not have."""


def one_line(error: Exception) -> str:
    """The server's message with its detail and hint, without the statement; secrets are never among them."""
    if not isinstance(error, psycopg.Error):
        return " ".join(str(error).split()) or type(error).__name__
    parts = [error.diag.message_primary or str(error), error.diag.message_detail, error.diag.message_hint]
    return "; ".join(" ".join(part.split()) for part in parts if part) + (
        f" ({error.sqlstate})" if error.sqlstate else ""
    )


def migration_status(settings: Settings) -> MigrationStatus:
    """Compare the database with the files in `sql/migrations`; changes nothing.

    Raises:
        ServiceError: as `connect` does.
    """
    with connect(settings, "metrics_owner", autocommit=True) as conn, _statements(settings, "list its migrations"):
        return _status(conn)


def _status(conn: Connection) -> MigrationStatus:
    files = {path.stem.partition("_")[0]: path.stem for path in sorted(MIGRATIONS.glob("*.sql"))}
    versions: list[str] = []
    if conn.execute("SELECT to_regclass('schema_migrations')").fetchone() != (None,):
        versions = [row[0] for row in conn.execute("SELECT version FROM schema_migrations ORDER BY version")]
    return MigrationStatus(
        applied=[files[version] for version in versions if version in files],
        pending=[name for version, name in files.items() if version not in versions],
        missing=[version for version in versions if version not in files],
    )


def migrate(settings: Settings) -> list[str]:
    """Apply what is pending, each file in a transaction of its own, and return the names that were applied.

    Two at once wait for each other.

    Raises:
        ServiceError: PostgreSQL is not reachable, or a migration failed (those before it stay applied).
    """
    return _change(settings, "migrate", "--strict")[1]


def rollback(settings: Settings) -> str | None:
    """Undo the newest migration and return its name; None when there is none.

    Raises:
        ServiceError: PostgreSQL is not reachable, or the migration could not be undone.
    """
    gone, _ = _change(settings, "rollback")
    return gone[0] if gone else None


def new_migration(name: str) -> Path:
    """Write `sql/migrations/TIMESTAMP_NAME.sql` with an up and a down section to fill in, and return its path.

    Raises:
        SettingError: the name is not made of lower-case letters, digits and underscores, or this is no checkout.
    """
    if CHECKOUT is None:
        raise SettingError(
            "a migration is written in a checkout of metrics-pipeline, and this one was installed from a wheel"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise SettingError(
            f"{name!r} cannot be a migration's name: use lower-case letters, digits and underscores, "
            "such as add_device_names"
        )
    before = set(MIGRATIONS.iterdir())
    _dbmate({}, "--migrations-dir", str(MIGRATIONS), "new", name)
    (path,) = set(MIGRATIONS.iterdir()) - before
    return path


def _change(settings: Settings, *command: str) -> tuple[list[str], list[str]]:
    """Run dbmate and return which migrations are gone and which are new."""
    with connect(settings, "metrics_owner", autocommit=True) as conn, _statements(settings, "list its migrations"):
        before = _status(conn)
        if command[0] == "rollback" and not before.applied and not before.missing:
            return [], []
        # It has no way to begin a session with a statement.
        begin = session_settings("metrics_owner", settings.metrics_schema)
        # A pooler that does not refuse `options` passes over them.
        pooled = (settings.postgres_host, settings.postgres_host_port) in _POOLERS | _SESSION_MODE
        url = _for_dbmate(settings, conn) + ("" if pooled else f"&options={quote(session_options(begin))}")
        with _migrations(settings, conn, session_sql(begin) if pooled else "") as folder:
            _dbmate(
                {"METRICS_MIGRATION_URL": url},
                "--env=METRICS_MIGRATION_URL",
                f"--migrations-dir={folder}",
                f"--migrations-table={settings.metrics_schema}.schema_migrations",
                "--no-dump-schema",
                "--migration-lock",
                *command,
            )
        after = _status(conn)
    old, new = (status.applied + status.missing for status in (before, after))
    return [name for name in old if name not in new], [name for name in new if name not in old]


@contextmanager
def _migrations(settings: Settings, conn: Connection, begin: str) -> Iterator[Path]:
    """The folder of the migrations: as they are, or as they have to be on this server."""
    schema = settings.metrics_schema
    row = conn.execute(
        "SELECT pg_has_role(nspowner, 'USAGE') FROM pg_namespace WHERE nspname = %s", [schema]
    ).fetchone()
    ours = row is None or bool(row[0])
    if schema == "public" and ours and not begin:
        yield MIGRATIONS
        return
    with tempfile.TemporaryDirectory(prefix="metrics-pipeline-") as folder:
        for path in MIGRATIONS.glob("*.sql"):
            text = migration_in(path.read_text("utf-8"), schema, ours=ours, begin=begin)
            (Path(folder) / path.name).write_text(text, "utf-8")
        yield Path(folder)


def migration_in(text: str, schema: str, *, ours: bool = True, begin: str = "") -> str:
    """A migration for another schema than `public`, or for one whose rights are not ours to change.

    Args:
        text: of the file, which writes `public.` before a name where the search path does not reach: in bodies of functions.
        schema: where its objects go.
        ours: whether the schema belongs to the pipeline; what PUBLIC may do in another one stays as it is.
        begin: a statement to begin with, where a session cannot be begun with its settings.
    """
    text = re.sub(r"\bpublic\.(?=\w)", f"{schema}.", text)
    text = re.sub(r"\bSCHEMA public\b", f"SCHEMA {schema}", text)
    if not ours:
        text = re.sub(rf"(?m)^(?:REVOKE|GRANT) \w+ ON SCHEMA {schema} (?:FROM|TO) PUBLIC;\n", "", text)
    return (
        re.sub(r"(?m)^(-- migrate:(?:up|down)\b.*\n)", lambda found: f"{found[1]}{begin};\n", text) if begin else text
    )


def _for_dbmate(settings: Settings, conn: Connection) -> str:
    """The owner's URL, with a mode of TLS: dbmate's driver insists on it unless told otherwise, and knows no mode in between."""
    server = settings.postgres_server
    tls = server.tls
    if tls.get("sslmode", "prefer") in ("allow", "prefer"):
        # What the server offers is known by a connection of libpq's.
        encrypted = conn.pgconn.ssl_in_use and not is_loopback(settings.postgres_host)
        tls = {"sslmode": "require" if encrypted else "disable"}
    password = settings.metrics_owner_password.get_secret_value()
    return replace(server, tls=tls).url("metrics_owner", password, settings.metrics_database)


def _dbmate(environment: dict[str, str], *arguments: str) -> None:
    binary = shutil.which("dbmate", path=sysconfig.get_path("scripts")) or shutil.which("dbmate")
    if binary is None:
        raise InstallError(
            "dbmate is not installed beside this Python: install metrics-pipeline again with its dependencies (in a checkout: `make up`)"
        )
    done = subprocess.run(
        # Otherwise it reads the `.env` of whatever folder it is started in.
        [binary, f"--env-file={os.devnull}", *arguments],
        env={"PATH": os.defpath, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        begun = [line.removeprefix("Applying: ") for line in lines if line.startswith(("Applying: ", "Rolling back: "))]
        reason = next((line for line in lines if line.startswith("Error: ")), lines[-1] if lines else "no output")
        raise ServiceError(
            f"migration {begun[-1] if begun else '(none begun)'} failed: {reason.removeprefix('Error: ')}: "
            "correct the file in sql/migrations or the database, then run `metrics-pipeline migrate up` again"
        )


def run_sql(settings: Settings, statement: str, *, timeout_seconds: float = STATEMENT_SECONDS) -> Result:
    """Run a statement, or several separated by semicolons, as the read-only role, and return what the last one gave.

    Raises:
        ServiceError: PostgreSQL is not reachable, or refused the statement; the message says where in the text.
    """
    with connect(settings, "metrics_reader", autocommit=True) as conn:
        conn.execute("SELECT set_config('statement_timeout', %s, false)", [f"{round(timeout_seconds * 1000)}ms"])
        try:
            cursor = conn.execute(statement)
            while cursor.nextset():
                pass
            columns = [column.name for column in cursor.description or []]
            return Result(columns, cursor.fetchall() if columns else [])
        except psycopg.errors.QueryCanceled as error:
            raise ServiceError(
                f"SQL stopped after {timeout_seconds:g} s: narrow it, for example by created_at"
            ) from error
        except psycopg.errors.ReadOnlySqlTransaction as error:
            raise ServiceError(f"SQL refused: {one_line(error)}: this command only reads") from error
        except psycopg.Error as error:
            if error.sqlstate is None and conn.info.transaction_status == TransactionStatus.ACTIVE:
                conn.close()
                raise ServiceError("SQL refused: COPY cannot be run here: write a SELECT, and choose --csv") from error
            at = _line(statement, error.diag.statement_position)
            raise ServiceError(f"SQL failed{at}: {one_line(error)}") from error
        except NO_DATABASE_ERRORS as error:
            raise ServiceError(
                f"SQL gave a value that cannot be shown ({one_line(error)}): cast it to text in the query"
            ) from error


def _line(statement: str, position: str | None) -> str:
    if position is None:
        return ""
    return f" at line {statement.count(chr(10), 0, int(position) - 1) + 1}"
