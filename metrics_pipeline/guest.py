"""The pipeline as a guest of a PostgreSQL that others run: what it needs there, what is missing, and what is left alone.

Each need is a question and a statement. What is there already is not touched; what is not is made, if that may be done; and what
cannot be made is listed, so that somebody who may can do it. Nothing is revoked from anybody in what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from psycopg import sql

from metrics_pipeline.errors import ServiceError

Connection = psycopg.Connection[tuple[Any, ...]]

COLLATION: Final = "TEMPLATE template0 ENCODING 'UTF8' LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8' LOCALE 'C'"
"""Of a database that is made here: the same order of text on every platform."""
MARK: Final = "metrics-pipeline"
"""What the comment of a role says that is ours; the id of the data folder follows, where there is one (there is none in containers)."""
OWNER: Final = "metrics_owner"
DAGSTER: Final = "dagster"


_NOT_THERE: Final = (
    psycopg.errors.UndefinedObject,
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.InvalidCatalogName,
)
"""A role, a schema or a database is not there yet."""


@dataclass(frozen=True, slots=True)
class Need:
    """Something that has to be there.

    Attributes:
        met: a question that is answered by true when it is there.
        statement: what makes it.
        owner: whose it is to be.
    """

    met: sql.Composed
    statement: sql.Composed
    owner: str = ""


@dataclass(slots=True)
class Guest:
    """What the pipeline needs of a server.

    Attributes:
        database: of the readings.
        named: whether somebody named that database, rather than it being the one that is meant when nobody does.
        schema: of everything of ours there.
        dagster_database: of Dagster's tables.
        dagster_schema: of Dagster's tables.
        passwords: by role; all the roles that there are.
        temporary: roles that make temporary tables.
        settings: what is preset for a role that is made here.
        folder: id of the data folder; nothing where there is none.
    """

    database: str
    named: bool
    schema: str
    dagster_database: str
    dagster_schema: str
    passwords: Mapping[str, str] = field(repr=False)
    temporary: Sequence[str]
    settings: Mapping[str, Mapping[str, str]]
    folder: str

    @property
    def _readers(self) -> list[str]:
        """The roles that use the database of the readings."""
        return [role for role in self.passwords if role != DAGSTER or self.dagster_database == self.database]

    def arrive(
        self, conn: Connection, place: str, opens: Callable[[str], bool], connect: Callable[[str], Connection]
    ) -> None:
        """See to it that everything is there.

        Args:
            conn: a session of whoever `POSTGRES_URL` names, autocommit.
            place: the server, for people.
            opens: whether a role's password is the one that we have.
            connect: to another database as the same role.

        Raises:
            ServiceError: a name is somebody else's, or something is missing that this role cannot make.
        """
        lacking = self._roles(conn, place, opens)
        for database in dict.fromkeys((self.database, self.dagster_database)):
            lacking += self._database(conn, place, database, connect)
        if lacking:
            raise ServiceError(
                f"{place}: {conn.info.user} may not make all that the pipeline needs there. Let somebody who may run this in "
                f"database {conn.info.dbname}, and then run the same command again: "
                + " ".join(f"{statement};" for statement in lacking)
            )

    # roles

    def _roles(self, conn: Connection, place: str, opens: Callable[[str], bool]) -> list[str]:
        """Make the roles; what makes those that cannot be made here."""
        there = {
            name: (comment or "")
            for name, comment in conn.execute(
                "SELECT rolname, shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = ANY (%s)",
                [list(self.passwords)],
            )
        }
        opened = {role for role in there if opens(role)}
        mark = f"{MARK} {self.folder}".strip()
        strangers = sorted(role for role in there.keys() - opened if there[role] != mark)
        if strangers:
            role = strangers[0]
            raise ServiceError(
                f"{place} has a role {' and a role '.join(strangers)} already, with another password than the pipeline's: "
                f"it may be somebody else's and is left alone. If it is the pipeline's, set {role.upper()}_PASSWORD to its "
                "password; if not, use another server"
            )
        missing = []
        for role, password in self.passwords.items():
            marking = _composed("COMMENT ON ROLE {} IS {}", sql.Identifier(role), sql.Literal(mark))
            if role in opened:
                if not there[role]:  # so that its password can be changed by whoever knows it now
                    self._try(conn, marking)
                continue
            verifier = conn.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
            verb = "ALTER" if role in there else "CREATE"
            statement = _composed(f"{verb} ROLE {{}} LOGIN PASSWORD {{}}", sql.Identifier(role), sql.Literal(verifier))
            if not self._try(conn, statement):
                missing.append(statement.as_string(conn))
            elif verb == "CREATE":
                self._try(conn, marking)
                for name, value in self.settings.get(role, {}).items():
                    preset = _composed(
                        "ALTER ROLE {} SET {} = {}", sql.Identifier(role), sql.Identifier(name), sql.Literal(value)
                    )
                    self._try(conn, preset)
        return missing

    # databases

    def _database(self, conn: Connection, place: str, database: str, connect: Callable[[str], Connection]) -> list[str]:
        """Make a database, or what is missing in it; what makes the rest."""
        owner = OWNER if database == self.database else DAGSTER
        row = conn.execute(
            "SELECT pg_get_userbyid(datdba), pg_encoding_to_char(encoding) FROM pg_database WHERE datname = %s",
            [database],
        ).fetchone()
        if row is None:
            if not self._make_database(conn, database, owner):
                return [_create_database(database, owner).as_string(conn)]
            row = (owner, "UTF8")
        keeper, encoding = row
        if encoding != "UTF8":
            raise ServiceError(
                f"{place}: the encoding of database {database} is {encoding}, and readings are UTF-8: name another one in POSTGRES_URL"
            )
        meant = self.named if database == self.database else False
        if keeper != owner and not meant and not _may(conn, owner, database):
            raise ServiceError(
                f"{place} has a database {database} already, which is {keeper}'s and is left alone: "
                + (
                    "if it is the one for the readings, name it in POSTGRES_URL; else set POSTGRES_DB to another one"
                    if database == self.database
                    else "set POSTGRES_SCHEMA, and Dagster's tables get a schema in the database of the readings"
                )
            )
        if database == conn.info.dbname:
            return self._fill(conn, place, database)
        with connect(database) as other:
            return self._fill(other, place, database)

    def _make_database(self, conn: Connection, database: str, owner: str) -> bool:
        self._act_as(conn, owner)
        if not self._try(conn, _create_database(database, owner)):
            return False
        # It is ours alone: nobody else has it in use.
        conn.execute(_composed("REVOKE ALL ON DATABASE {} FROM PUBLIC", sql.Identifier(database)))
        return True

    def _fill(self, conn: Connection, place: str, database: str) -> list[str]:
        """Schemas and rights within a database."""
        self._require_names(conn, place, database)
        lacking = []
        for need in self._needs(database):
            if _met(conn, need):
                continue
            if need.owner:
                for role in (OWNER, need.owner):  # the database may be the first one's
                    self._act_as(conn, role)
            self._try(conn, need.statement)
            if not _met(conn, need):
                lacking.append(need.statement.as_string(conn))
        return lacking

    def _require_names(self, conn: Connection, place: str, database: str) -> None:
        """Nothing in our schema may have a name of ours and be somebody else's."""
        schema, owner = (self.schema, OWNER) if database == self.database else (self.dagster_schema, DAGSTER)
        names = TABLES if owner == OWNER else DAGSTER_TABLES
        found = conn.execute(
            "SELECT relname, pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = to_regnamespace(%s) "
            "AND relname = ANY (%s) AND pg_get_userbyid(relowner) <> %s ORDER BY 1",
            [f'"{schema}"', list(names), owner],
        ).fetchall()
        if found:
            which = ", ".join(f"{name} ({keeper}'s)" for name, keeper in found)
            raise ServiceError(
                f"{place}: in database {database}, schema {schema}, there is already {which}, which is left alone: set "
                "POSTGRES_SCHEMA to a schema of the pipeline's own"
            )

    def _needs(self, database: str) -> list[Need]:
        """What has to be there in a database: rights of the roles, and the schemas."""
        needs = []
        if database == self.database:
            needs += [_privilege("DATABASE", "CONNECT", database, role) for role in self._readers]
            needs += [_privilege("DATABASE", "TEMPORARY", database, role) for role in self.temporary]
            needs += self._schema_needs(self.schema, OWNER, [role for role in self.passwords if role != DAGSTER])
        if database == self.dagster_database:
            if database != self.database:
                needs.append(_privilege("DATABASE", "CONNECT", database, DAGSTER))
            needs += self._schema_needs(self.dagster_schema, DAGSTER, [DAGSTER])
        return needs

    @staticmethod
    def _schema_needs(schema: str, owner: str, users: Sequence[str]) -> list[Need]:
        needs = []
        if schema != "public":
            there = _composed("SELECT to_regnamespace({}) IS NOT NULL", sql.Literal(f'"{schema}"'))
            needs.append(
                Need(
                    there,
                    _composed("CREATE SCHEMA {} AUTHORIZATION {}", sql.Identifier(schema), sql.Identifier(owner)),
                    owner,
                )
            )
        else:
            needs += [_privilege("SCHEMA", "USAGE", schema, role) for role in users]
        return [*needs, _privilege("SCHEMA", "CREATE", schema, owner)]

    @staticmethod
    def _act_as(conn: Connection, owner: str) -> None:
        """Who may make roles without being superuser has to be able to act as the owner of what he makes for him."""
        able = Need(
            _composed("SELECT pg_has_role(current_user, {}, 'SET')", sql.Literal(owner)),
            _composed("GRANT {} TO CURRENT_USER", sql.Identifier(owner)),
        )
        if not _met(conn, able):
            Guest._try(conn, able.statement)

    @staticmethod
    def _try(conn: Connection, statement: sql.Composed) -> bool:
        """Whether it could be done; a right that cannot be given away is a warning only, and a role may not be there yet."""
        with suppress(psycopg.errors.InsufficientPrivilege, *_NOT_THERE):
            conn.execute(statement)
            return True
        return False


TABLES: Final = (
    "schema_migrations",
    "metrics",
    "metric_names",
    "producer_runs",
    "sink_state",
    "sink_offsets",
    "rejected_metrics",
    "summary_state",
)
"""Of ours, those whose names others may have had."""
DAGSTER_TABLES: Final = (
    "alembic_version",
    "runs",
    "event_logs",
    "jobs",
    "job_ticks",
    "kvs",
    "snapshots",
    "instance_info",
)


def _create_database(database: str, owner: str) -> sql.Composed:
    return _composed(f"CREATE DATABASE {{}} OWNER {{}} {COLLATION}", sql.Identifier(database), sql.Identifier(owner))


def _privilege(kind: str, right: str, name: str, role: str) -> Need:
    met = _composed(
        f"SELECT has_{kind.lower()}_privilege({{}}, {{}}, {{}})",
        sql.Literal(role),
        sql.Literal(name),
        sql.Literal(right),
    )
    return Need(met, _composed(f"GRANT {right} ON {kind} {{}} TO {{}}", sql.Identifier(name), sql.Identifier(role)))


def _met(conn: Connection, need: Need) -> bool:
    try:
        return conn.execute(need.met).fetchone() == (True,)
    except _NOT_THERE:
        return False


def _may(conn: Connection, owner: str, database: str) -> bool:
    """Whether somebody has given the owner more than others have in a database: then it is meant."""
    return _met(conn, _privilege("DATABASE", "CREATE", database, owner))


def _composed(text: str, *parts: sql.Composable) -> sql.Composed:
    return sql.SQL(text).format(*parts)
