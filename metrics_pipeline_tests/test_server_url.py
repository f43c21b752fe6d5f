"""POSTGRES_URL by libpq's grammar, and what of it cannot be told to every program."""

from __future__ import annotations

import pytest
from psycopg.conninfo import conninfo_to_dict

from metrics_pipeline.errors import SettingError
from metrics_pipeline.local.connect_worker import sink_environment
from metrics_pipeline.server_url import ServerUrl, jdbc_parameters
from metrics_pipeline.settings import Settings
from metrics_pipeline.sinks.connector import connector_config
from metrics_pipeline.surroundings import TRUST


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://me:p%40ss@db.example:6000/my%20db", ("db.example", 6000, "me", "p@ss", "my db")),
        ("postgres://db.example", ("db.example", 5432, "", "", "")),
        ("postgresql://me@[::1]:6000/db", ("::1", 6000, "me", "", "db")),
        # libpq lets parameters say everything.
        (
            "postgresql:///?host=db.example&port=6001&user=me&password=x&dbname=other",
            ("db.example", 6001, "me", "x", "other"),
        ),
        ("postgresql://a.example:1/one?host=b.example&port=2", ("b.example", 2, "", "", "one")),
        ("postgresql://me@db.example:/db", ("db.example", 5432, "me", "", "db")),
        ("postgresql://db.example/db?target_session_attrs=read-write&gssencmode=disable", ("db.example", 5432, "", "", "db")),
    ],
)  # fmt: skip
def test_it_is_read_as_libpq_reads_it(url: str, expected: tuple[object, ...]) -> None:
    server = ServerUrl.parse(url)
    assert (server.host, server.port, server.user, server.password, server.database) == expected
    assert "p@ss" not in repr(server)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://a,b/db", "names several hosts"),
        ("postgresql://a:1,b:2/db", "names several hosts"),
        ("postgresql://a/db?host=a,b", "names several hosts"),
        ("postgresql:///db", "names no host"),
        ("postgresql:///db?host=/var/run/postgresql", "leads to a socket"),
        ("postgresql://%2Fvar%2Frun%2Fpostgresql/db", "leads to a socket"),
        ("postgresql:///db?host=@abstract", "leads to a socket"),
        ("postgresql://host/db?hostaddr=10.0.0.1", "hostaddr: write the address as the host: leave it out"),
        ("postgresql:///db?hostaddr=10.0.0.1", "hostaddr: write the address as the host"),
        ("postgresql://host/db?service=mine", "service: write out what the service file says"),
        ("postgresql://host/db?options=-c%20search_path%3Dx", "options: each session says its own settings"),
        ("postgresql://host/db?target_session_attrs=standby", "target_session_attrs=standby: not every program"),
        ("postgresql://host/db?load_balance_hosts=random", "load_balance_hosts=random: not every program"),
        ("postgresql://host/db?channel_binding=require", "channel_binding=require: not every program"),
        ("postgresql://host/db?gssencmode=require", "gssencmode=require: not every program"),
        ("postgresql://host/db?require_auth=md5", "require_auth: not every program"),
        ("postgresql://host/db?sslcert=/c&sslkey=/k", "sslcert: the pipeline's roles log in by password"),
        ("postgresql://host/db?connect_timeout=3", "connect_timeout: how long is waited is the same"),
        ("postgresql://host/db?application_name=x", "application_name: sessions are found by the names"),
        ("postgresql://host/db?sslmode=verify-full", "sslmode=verify-full needs sslrootcert=/PATH"),
        ("postgresql://host/db?sslmode=verify-ca&sslrootcert=here.pem", "sslmode=verify-ca needs sslrootcert=/PATH"),
        ("postgresql://host/db?sslmode=verify-full&sslrootcert=system", "sslmode=verify-full needs sslrootcert=/PATH"),
        ("postgresql://host/db?sslmode=sometimes", "sslmode=sometimes: must be one of"),
        ("postgresql://host/db?sslmod=require", "has a parameter that libpq does not know: sslmod"),
        ("postgresql://host:0/db", "the port must be a number up to 65535"),
        ("postgresql://ho st/db", "cannot be read"),
        ("postgresql://ho!st/db", "has a host that is no name"),
        ("POSTGRESQL://host/db", "must begin with postgresql://"),
        ("host=db.example dbname=db", "must begin with postgresql://"),
        ("postgresql://host/d%0Ab", "holds a character that cannot be seen"),
        ("postgresql://host/d%00b", "cannot be read"),
        # A password that was not escaped.
        ("postgresql://me:tell-nobody?x=1@host/db", ""),
        ("postgresql://me:tell-nobody@x@host/db", ""),
        ("postgresql://me:tell-nobody/x@host/db", ""),
        ("postgresql://me:tell-nobody[x@host/db", ""),
        ("postgresql://[me:tell-nobody@host/db", ""),
    ],
)  # fmt: skip
def test_what_not_every_program_can_be_told_is_refused(url: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", url)
    said = refusal()
    assert said.startswith(f"POSTGRES_URL: {reason}" if reason else "")
    assert not reason or said
    for part in ("\n", "tell", "nobody"):
        assert part not in said


def refusal() -> str:
    """What is said of the URL; nothing when it is taken."""
    try:
        Settings.load()
    except SettingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("query", "variables", "expected"),
    [
        ("", {}, {}),
        ("?sslmode=disable", {"PGSSLMODE": "require"}, {"sslmode": "disable"}),
        ("", {"PGSSLMODE": "require"}, {"sslmode": "require"}),
        ("?sslmode=verify-full&sslrootcert=/ca.pem", {}, {"sslmode": "verify-full", "sslrootcert": "/ca.pem"}),
        ("?sslmode=verify-full", {"PGSSLROOTCERT": "/ca.pem"}, {"sslmode": "verify-full", "sslrootcert": "/ca.pem"}),
        # libpq verifies when it is given a certificate; the others do not.
        ("?sslmode=require&sslrootcert=/ca.pem", {}, {"sslmode": "verify-ca", "sslrootcert": "/ca.pem"}),
        ("?ssl=true", {}, {"sslmode": "require"}),
        ("", {"PGHOST": "elsewhere", "PGSERVICE": "x", "PGOPTIONS": "-c a=b"}, {}),
    ],
)
def test_how_the_server_is_trusted(query: str, variables: dict[str, str], expected: dict[str, str]) -> None:
    assert ServerUrl.parse(f"postgresql://me@host/db{query}", variables).tls == expected


def test_every_variable_of_trust_counts_or_is_refused() -> None:
    """None of them may reach libpq alone."""
    for name in TRUST - {"PGSSLMODE", "PGSSLROOTCERT", "PGPASSFILE", "PGREQUIRESSL"}:
        with pytest.raises(ValueError, match=f"^{name}"):
            ServerUrl.parse("postgresql://host/db", {name: "no value that is right"})


def test_every_program_is_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", "postgresql://me@[::1]:6000/a%2Fb?sslmode=verify-full&sslrootcert=/c%20a.pem")
    monkeypatch.setenv("METRICS_WRITER_PASSWORD", "x")
    monkeypatch.setenv("DAGSTER_PASSWORD", "y")
    settings = Settings.load()
    place = {"host": "::1", "port": "6000", "sslmode": "verify-full", "sslrootcert": "/c a.pem"}
    for url, user in (
        (settings.role_url("metrics_writer"), "metrics_writer"),
        (settings.dagster_postgres_url, "dagster"),
    ):
        told = conninfo_to_dict(url)
        assert {name: told[name] for name in place} == place
        assert told["user"] == user
    environment = sink_environment(settings)
    assert (environment["SINK_PG_HOST"], environment["SINK_PG_DB"]) == ("[::1]", "a%2Fb")
    assert connector_config(settings)["connection.url"].endswith("&sslmode=verify-full&sslrootcert=/c%20a.pem")
    assert jdbc_parameters({}) == ""
