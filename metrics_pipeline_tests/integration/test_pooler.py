"""PgBouncer before somebody else's PostgreSQL: it works where sessions keep their backend, and is refused where they do not."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import pytest

from metrics_pipeline import postgres
from metrics_pipeline.defs.storage import PipelineStorage
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.local.environment import minimal
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.integration.test_guest import ROLES, works
from metrics_pipeline_tests.integration.test_keeper import own_pipeline
from metrics_pipeline_tests.patience import deadline
from metrics_pipeline_tests.servers import PASSWORD, Server, own_server

PGBOUNCER: Final = os.environ.get("PGBOUNCER") or shutil.which("pgbouncer", path=f"{os.defpath}:/usr/sbin")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.whole_stack,
    pytest.mark.skipif(PGBOUNCER is None, reason="no pgbouncer on this machine (PGBOUNCER names one elsewhere)"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with own_server() as made:
        with made.admin() as boss:
            boss.execute("CREATE ROLE guest LOGIN PASSWORD 'g' CREATEROLE CREATEDB")
        yield made


@contextmanager
def pooler(server: Server, mode: str, **settings: str) -> Iterator[str]:
    """PgBouncer with the server's roles and databases; the URL of a role that may make both."""
    (port,) = free_ports(1)
    users, file = server.folder / "users.txt", server.folder / "pgbouncer.ini"
    users.write_text(f'"boss" "{PASSWORD}"\n')
    lines = {
        "listen_addr": "127.0.0.1",
        "listen_port": str(port),
        "unix_socket_dir": "",
        "auth_type": "scram-sha-256",
        "auth_file": str(users),
        "auth_user": "boss",
        "auth_query": "SELECT usename, passwd FROM pg_shadow WHERE usename = $1",
        "pool_mode": mode,
        "default_pool_size": "30",
        "max_client_conn": "200",
        **settings,
    }
    file.write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port}\n[pgbouncer]\n"
        + "".join(f"{name} = {value}\n" for name, value in lines.items())
    )
    for path in (users, file):
        server.own(path, 0o600)
    who = server.account.as_arguments() if server.account else {}
    with subprocess.Popen([str(PGBOUNCER), "-q", str(file)], env=minimal(), cwd="/", **who) as process:
        try:
            give_up = deadline(10)
            while True:
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                assert time.monotonic() < give_up
                assert process.poll() is None
                time.sleep(0.05)
            yield f"postgresql://guest:g@127.0.0.1:{port}"
        finally:
            process.kill()


def load(monkeypatch: pytest.MonkeyPatch, url: str) -> Settings:
    monkeypatch.setenv("POSTGRES_URL", url)
    return Settings.load(**{f"{role}_password": f"secret of {role}" for role in ROLES})


@pytest.fixture
def readings(server: Server) -> Iterator[None]:
    """A database for them, in which PgBouncer can ask for passwords; gone with all of ours afterwards."""
    with server.admin() as boss:
        boss.execute("CREATE DATABASE readings OWNER guest")
    yield
    with server.admin() as boss:
        for database in ("readings", "dagster"):
            boss.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
        for role in ROLES:
            boss.execute(f"DROP ROLE IF EXISTS {role}")


@pytest.mark.usefixtures("readings")
@pytest.mark.parametrize(
    ("ignored", "schema"),
    [
        ("", "ours"),
        ("options,extra_float_digits", ""),
        pytest.param("", "", marks=pytest.mark.long),
        pytest.param("options,extra_float_digits", "ours", marks=pytest.mark.long),
    ],
)
def test_a_pooler_that_leaves_sessions_alone_works(
    ignored: str, schema: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it refuses the settings of a session that is about to begin, or passes over them."""
    monkeypatch.setenv("POSTGRES_SCHEMA", schema)
    with pooler(server, "session", ignore_startup_parameters=ignored) as url:
        settings = load(monkeypatch, f"{url}/readings")
        postgres.bootstrap(settings)
        works(settings)
        with postgres.connect(settings, "metrics_writer", options="-c lock_timeout=7s", autocommit=True) as writer:
            shown = writer.execute(
                "SELECT current_setting('lock_timeout'), current_setting('TimeZone'), current_setting('search_path')"
            ).fetchone()
            assert shown == ("7s", "UTC", schema or "public")
        config = {"postgres_url": settings.dagster_postgres_url, "should_autocreate_tables": True}
        storage = PipelineStorage.from_config_value(None, config)
        assert storage.run_storage.get_runs_count() == 0
    with server.admin("readings") as boss:
        places = boss.execute(
            "SELECT DISTINCT relnamespace::regnamespace::text FROM pg_class WHERE relname IN ('metrics', 'schema_migrations')"
        ).fetchall()
        assert places == [(schema or "public",)]


@pytest.mark.usefixtures("readings")
@pytest.mark.parametrize("ignored", ["", "options,extra_float_digits"])
@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_a_pooler_that_gives_sessions_away_is_refused_with_the_reason(
    mode: str, ignored: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pooler(server, mode, ignore_startup_parameters=ignored) as url:
        settings = load(monkeypatch, f"{url}/readings")
        with pytest.raises(
            ServiceError, match=r"is a pooler that hands a session's backend to others.*pool_mode = session"
        ):
            postgres.bootstrap(settings)
    with server.admin() as boss:
        roles = boss.execute("SELECT count(*) FROM pg_roles WHERE rolname = ANY (%s)", [list(ROLES)]).fetchone()
        assert roles == (0,), "nothing was touched"


@pytest.mark.usefixtures("readings")
def test_a_pooler_without_a_session_left_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "CONNECT_SECONDS", 2)
    with pooler(server, "session", default_pool_size="1") as url:
        settings = load(monkeypatch, f"{url}/readings")
        with pytest.raises(ServiceError, match=r"is a pooler that has no session left .*default_pool_size"):
            postgres.bootstrap(settings)


@pytest.mark.usefixtures("readings")
@pytest.mark.parametrize("sink", ["connect", pytest.param("copy", marks=pytest.mark.long)])
def test_the_whole_pipeline_runs_behind_it(sink: str, server: Server) -> None:
    with (
        pooler(server, "session") as url,
        own_pipeline(POSTGRES_URL=f"{url}/readings", SINK=sink) as place,
    ):
        started = place.cli("up", "--detach", timeout=400)
        assert started.returncode == 0, started.stdout + started.stderr
        place.wait(
            "storing",
            lambda s: (
                all(s[part]["healthy"] for part in ("postgres", "broker", "sink", "watcher", "producer", "dagster"))
                and (s["rows_per_second"] or 0) > 0
            ),
        )
        place.verify()
