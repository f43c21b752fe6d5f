"""A PostgreSQL that somebody else runs, with another application in it: what we need is listed, what is there stays as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import psycopg
import pytest

from metrics_pipeline import postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.servers import Server, own_server

pytestmark = pytest.mark.integration

ROLES: Final = (*postgres.ROLES, "dagster")
CATALOGS: Final = """
WITH things (kind, name, owner, rights) AS (
    SELECT 'database', datname::text, datdba, coalesce(datacl, acldefault('d', datdba)) FROM pg_database
    UNION ALL SELECT 'schema', nspname::text, nspowner, coalesce(nspacl, acldefault('n', nspowner)) FROM pg_namespace
    WHERE nspname !~ '^pg_(toast_)?temp_'
    UNION ALL SELECT 'relation', oid::regclass::text, relowner,
        coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))
    FROM pg_class WHERE relkind <> 'i'
    UNION ALL SELECT 'function', oid::regprocedure::text, proowner, coalesce(proacl, acldefault('f', proowner)) FROM pg_proc
)
SELECT t.kind, t.name, t.owner::regrole::text, concat(a.grantee::regrole, '=', a.privilege_type, a.is_grantable)
FROM things AS t, aclexplode(t.rights) AS a
UNION ALL SELECT 'role', rolname::text, concat(rolsuper, rolcreaterole, rolcreatedb, rolcanlogin), rolconfig::text FROM pg_roles
UNION ALL SELECT 'password', rolname::text, rolpassword, NULL FROM pg_authid
UNION ALL SELECT 'member', member::regrole::text, roleid::regrole::text, NULL FROM pg_auth_members
UNION ALL SELECT 'default', defaclrole::regrole::text, defaclobjtype::text, defaclacl::text FROM pg_default_acl
UNION ALL SELECT 'setting', setrole::regrole::text, setdatabase::text, setconfig::text FROM pg_db_role_setting
UNION ALL SELECT 'row', id::text, what, NULL FROM orders
"""
OURS: Final = re.compile(r"\b(metrics_(owner|writer|summarizer|reader|producer)|dagster|readings|readings_dagster)\b")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with own_server() as made:
        yield made


@pytest.fixture
def shop(server: Server) -> Iterator[Server]:
    """The server with another application: its role, its database with tables, a function and presets, and a role for us."""
    with server.admin() as boss:
        boss.execute("CREATE ROLE shop LOGIN PASSWORD 'x'")
        boss.execute("CREATE ROLE clerk LOGIN PASSWORD 'x'")
        boss.execute("CREATE DATABASE shop OWNER shop")
        boss.execute("ALTER ROLE clerk IN DATABASE shop SET work_mem = '8MB'")
        boss.execute("CREATE ROLE guest LOGIN PASSWORD 'g'")
    with psycopg.connect(server.url("shop", "shop", "x"), autocommit=True) as application:
        application.execute("CREATE TABLE orders (id int PRIMARY KEY, what text)")
        application.execute("INSERT INTO orders VALUES (1, 'bread'), (2, 'salt')")
        application.execute("GRANT SELECT ON orders TO PUBLIC")
        application.execute("CREATE FUNCTION total() RETURNS bigint LANGUAGE sql RETURN (SELECT count(*) FROM orders)")
    try:
        yield server
    finally:
        with server.admin() as boss:
            for database in ("shop", "readings", "metrics", "dagster"):
                boss.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
            for role in ("shop", "clerk", "guest", *ROLES):
                if boss.execute("SELECT FROM pg_roles WHERE rolname = %s", [role]).fetchone() is not None:
                    boss.execute(f"DROP OWNED BY {role} CASCADE")
            for role in ("shop", "clerk", "guest", *ROLES):
                boss.execute(f"DROP ROLE IF EXISTS {role}")


def load(server: Server, monkeypatch: pytest.MonkeyPatch, database: str = "shop", **settings: str) -> Settings:
    monkeypatch.setenv("POSTGRES_URL", server.url(database, "guest", "g").removesuffix("/"))
    for name, value in settings.items():
        monkeypatch.setenv(name.upper(), value)
    return Settings.load(**{f"{role}_password": f"secret of {role}" for role in ROLES})


def catalogs(server: Server, *, of_others: bool) -> list[str]:
    """Everything about names, owners and rights, seen from the application's database; without what has to do with us, or all.

    A right of a role of ours takes nothing from anybody. What others may, and PUBLIC (`-`), has to stay.
    """
    with server.admin("shop") as boss:
        found = sorted(map(str, boss.execute(CATALOGS)))
    return [row for row in found if not OURS.search(row)] if of_others else found


def statements(error: ServiceError | str) -> list[str]:
    _, _, listed = str(error).partition("run the same command again: ")
    return [statement.strip() for statement in listed.rpartition(";")[0].split(";")]


def works(settings: Settings) -> None:
    """Everything that is done there can be done."""
    applied = postgres.migrate(settings)
    assert applied
    assert postgres.migration_status(settings).at_head
    assert postgres.rollback(settings) == applied[-1]
    assert postgres.migrate(settings) == applied[-1:]
    with postgres.connect(settings, "metrics_writer") as writer:
        writer.execute(
            "INSERT INTO metrics (device_id, published_at, metric_name, value) VALUES (gen_random_uuid(), now(), 10, 1)"
        )
        writer.execute("CREATE TEMPORARY TABLE incoming (a int)")
        writer.execute("SELECT activate_connect()")
    with postgres.connect(settings, "metrics_reader") as reader:
        assert reader.execute("SELECT count(*) FROM metrics").fetchone() == (1,)
        assert reader.execute("SELECT metrics_source() IS NOT NULL").fetchone() == (True,)
    with postgres.connect(settings, "metrics_summarizer") as summarizer:
        summarizer.execute("SELECT count(*) FROM summary_inserts")
    with postgres.connect(settings, "metrics_producer") as producer:
        producer.execute("SELECT count(*) FROM producer_runs")
    with postgres.connect_dagster(settings) as dagster:
        dagster.execute("CREATE TABLE probe (a int)")
        dagster.execute("DROP TABLE probe")


@pytest.mark.parametrize("schema", ["", "readings"])
def test_a_role_that_may_nothing_is_told_what_is_missing_and_then_works(
    schema: str, shop: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(shop, monkeypatch, postgres_schema=schema)
    before, others = catalogs(shop, of_others=False), catalogs(shop, of_others=True)
    with pytest.raises(ServiceError, match=r"guest may not make all that the pipeline needs there") as caught:
        postgres.bootstrap(settings)
    assert "\n" not in str(caught.value)
    assert "secret of" not in str(caught.value)
    assert catalogs(shop, of_others=False) == before, "nothing was touched"
    listed = statements(caught.value)
    assert [one for one in listed if "SUPERUSER" in one or "CREATEROLE" in one or "CREATEDB" in one] == []
    with shop.admin("shop") as boss:
        for statement in listed:
            boss.execute(statement.encode())
    postgres.bootstrap(settings)
    works(settings)
    postgres.bootstrap(settings)
    assert catalogs(shop, of_others=True) == others
    with psycopg.connect(shop.url("shop", "clerk", "x")) as clerk:
        assert clerk.execute("SELECT total()").fetchone() == (2,)
    with shop.admin("shop") as boss:
        places = boss.execute(
            "SELECT DISTINCT relnamespace::regnamespace::text FROM pg_class WHERE pg_get_userbyid(relowner) ~ '^metrics_|^dagster$' "
            "AND relnamespace::regnamespace::text !~ '^pg_'"
        ).fetchall()
    assert {place for (place,) in places} <= ({schema, f"{schema}_dagster"} if schema else {"public"})


@pytest.mark.parametrize("schema", ["", "readings"])
def test_a_managed_servers_first_role_needs_no_help(schema: str, shop: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no superuser, and may make roles and databases."""
    with shop.admin() as boss:
        boss.execute("ALTER ROLE guest CREATEROLE CREATEDB")
    settings = load(shop, monkeypatch, "readings", postgres_schema=schema)
    others = catalogs(shop, of_others=True)
    postgres.bootstrap(settings)
    works(settings)
    postgres.bootstrap(settings)
    assert catalogs(shop, of_others=True) == others
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(shop.url("readings", "clerk", "x"))


def test_what_a_password_does_not_open_is_somebody_elses(shop: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with shop.admin() as boss:
        boss.execute("CREATE ROLE metrics_reader LOGIN PASSWORD 'theirs'")
        boss.execute("ALTER ROLE guest SUPERUSER")
    settings = load(shop, monkeypatch)
    before = catalogs(shop, of_others=False)
    with pytest.raises(
        ServiceError, match=r"has a role metrics_reader already, .* left alone.*set METRICS_READER_PASSWORD"
    ):
        postgres.bootstrap(settings)
    assert catalogs(shop, of_others=False) == before


def test_a_password_that_was_lost_is_set_again_by_the_folder_that_set_it(
    shop: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from metrics_pipeline.data_folder import make_folder_id

    make_folder_id(tmp_path)
    with shop.admin() as boss:
        boss.execute("ALTER ROLE guest CREATEROLE CREATEDB")
    settings = load(shop, monkeypatch, "readings", pipeline_data_dir=str(tmp_path))
    postgres.bootstrap(settings)
    changed = Settings.load(**{f"{role}_password": f"another of {role}" for role in ROLES})
    postgres.bootstrap(changed)
    works(changed)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    make_folder_id(elsewhere)
    with pytest.raises(ServiceError, match=r"has a role dagster and a role metrics_owner and .* already, .*left alone"):
        postgres.bootstrap(settings.model_copy(update={"pipeline_data_dir": elsewhere}))


def test_containers_which_have_no_data_folder_change_passwords_too(
    shop: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shop.admin() as boss:
        boss.execute("ALTER ROLE guest SUPERUSER")
    first = load(shop, monkeypatch, "readings", pipeline_data_dir="/nowhere")
    postgres.bootstrap(first)
    with shop.admin() as boss:  # as a former version left it
        boss.execute("COMMENT ON ROLE metrics_reader IS NULL")
    postgres.bootstrap(first)
    changed = Settings.load(**{f"{role}_password": f"another of {role}" for role in ROLES})
    postgres.bootstrap(changed)
    postgres.connect(changed, "metrics_reader").close()
    with pytest.raises(ServiceError, match="password refused"):
        postgres.connect(first, "metrics_reader")


def test_a_database_or_a_table_of_the_same_name_is_left_alone(shop: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with shop.admin() as boss:
        boss.execute("ALTER ROLE guest SUPERUSER")
        boss.execute("CREATE DATABASE metrics OWNER shop")
        boss.execute("CREATE DATABASE dagster OWNER shop")
    with pytest.raises(
        ServiceError, match=r"has a database metrics already, which is shop's and is left alone.*POSTGRES_URL"
    ):
        postgres.bootstrap(load(shop, monkeypatch, ""))
    settings = load(shop, monkeypatch, "metrics")
    with pytest.raises(ServiceError, match=r"has a database dagster already, which is shop's.*set POSTGRES_SCHEMA"):
        postgres.bootstrap(settings)
    settings = load(shop, monkeypatch, "metrics", postgres_schema="readings")
    postgres.bootstrap(settings)
    works(settings)
    with psycopg.connect(shop.url("shop", "shop", "x"), autocommit=True) as application:
        application.execute("CREATE TABLE metrics (mine int)")
    monkeypatch.delenv("POSTGRES_SCHEMA")
    with pytest.raises(ServiceError, match=r"schema public, there is already metrics \(shop's\), which is left alone"):
        postgres.bootstrap(load(shop, monkeypatch, "shop"))


def test_migrations_are_the_same_in_another_schema(shop: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with shop.admin() as boss:
        boss.execute("ALTER ROLE guest SUPERUSER")
    plain = load(shop, monkeypatch, "readings")
    postgres.bootstrap(plain)
    postgres.migrate(plain)
    other = load(shop, monkeypatch, "shop", postgres_schema="readings")
    postgres.bootstrap(other)
    postgres.migrate(other)
    assert made(shop, "readings", "public") == made(shop, "shop", "readings")


def made(server: Server, database: str, schema: str) -> list[str]:
    """Everything in a schema, by its definition."""
    query = """
    SELECT 'column', table_name::text || '.' || column_name, data_type || coalesce(column_default, '') || is_nullable
    FROM information_schema.columns WHERE table_schema = %(schema)s
    UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace = %(schema)s::regnamespace
    UNION ALL SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = %(schema)s
    UNION ALL SELECT 'function', proname, pg_get_functiondef(oid) || coalesce(proacl::text, '') FROM pg_proc
    WHERE pronamespace = %(schema)s::regnamespace
    UNION ALL SELECT 'trigger', tgname, pg_get_triggerdef(t.oid) FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = tgrelid
    WHERE NOT tgisinternal AND relnamespace = %(schema)s::regnamespace
    UNION ALL SELECT 'rights', relname, relacl::text FROM pg_class WHERE relnamespace = %(schema)s::regnamespace AND relkind = 'r'
    """
    with server.admin(database) as boss:
        boss.execute("SELECT set_config('search_path', '', false)")
        return sorted(str(row).replace(f"{schema}.", "S.") for row in boss.execute(query, {"schema": schema}))
