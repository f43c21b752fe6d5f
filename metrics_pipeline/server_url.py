"""`POSTGRES_URL`, read once by libpq's own grammar, for every program that opens a session there.

psycopg and Dagster speak libpq; dbmate and Kafka Connect's JDBC have drivers of their own. What one of them cannot be told as the
others are is refused here, by name: otherwise one server would be checked, and another one changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict

SHAPE: Final = "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"

_VERIFYING: Final = ("verify-ca", "verify-full")
_SSLMODES: Final = ("disable", "allow", "prefer", "require", *_VERIFYING)
_AS_EVERYBODY: Final = {
    # A server that cannot be written is refused anyway, one host has no balance, and all text is UTF-8.
    "target_session_attrs": ("any", "read-write", "primary"),
    "load_balance_hosts": ("disable",),
    "client_encoding": ("utf8", "UTF8", "utf-8", "UTF-8", "auto"),
    "gssencmode": ("disable", "prefer"),
    "channel_binding": ("disable", "prefer"),
    "sslnegotiation": ("postgres",),
    "sslcompression": ("0",),
    "sslcertmode": ("disable", "allow"),
    "sslsni": ("1",),
}
"""What is what every program does anyway."""
_REASONS: Final = {
    "hostaddr": "write the address as the host",
    "service": "write out what the service file says",
    "servicefile": "write out what the service file says",
    "options": "each session says its own settings",
    "replication": "sessions of the pipeline are plain ones",
    "sslcert": "the pipeline's roles log in by password",
    "sslkey": "the pipeline's roles log in by password",
    "sslpassword": "the pipeline's roles log in by password",
    "application_name": "sessions are found by the names that the pipeline gives them",
    "fallback_application_name": "sessions are found by the names that the pipeline gives them",
    "connect_timeout": "how long is waited is the same for every program",
    "keepalives": "how long is waited is the same for every program",
    "keepalives_idle": "how long is waited is the same for every program",
    "keepalives_interval": "how long is waited is the same for every program",
    "keepalives_count": "how long is waited is the same for every program",
    "tcp_user_timeout": "how long is waited is the same for every program",
}
_VARIABLES: Final = {
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslcrl": "PGSSLCRL",
    "sslcrldir": "PGSSLCRLDIR",
    "sslcertmode": "PGSSLCERTMODE",
    "sslcompression": "PGSSLCOMPRESSION",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslsni": "PGSSLSNI",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "gssencmode": "PGGSSENCMODE",
    "gssdelegation": "PGGSSDELEGATION",
    "gsslib": "PGGSSLIB",
    "krbsrvname": "PGKRBSRVNAME",
    "channel_binding": "PGCHANNELBINDING",
    "require_auth": "PGREQUIREAUTH",
    "requirepeer": "PGREQUIREPEER",
    "min_protocol_version": "PGMINPROTOCOLVERSION",
    "max_protocol_version": "PGMAXPROTOCOLVERSION",
}
"""libpq's variables that say how a server is trusted: they count like the URL's parameter, which goes over them."""


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """Where PostgreSQL is and how it is trusted, as every program can be told.

    Attributes:
        host: a name or an address.
        port: of the server.
        user: who makes roles and databases; empty when the URL names nobody.
        password: that role's; empty when the URL has none.
        database: of the readings; empty when the URL names none.
        tls: `sslmode`, and `sslrootcert` where certificates are verified; empty when neither URL nor variables say.
        passfile: where libpq looks for that role's password; empty for its usual place.
    """

    host: str
    port: int
    user: str = ""
    password: str = field(default="", repr=False)
    database: str = ""
    tls: Mapping[str, str] = field(default_factory=dict)
    passfile: str = ""

    @staticmethod
    def parse(url: str, environment: Mapping[str, str] | None = None) -> ServerUrl:
        """Read a URL.

        Args:
            url: as libpq reads it.
            environment: where libpq's variables stand that say how the server is trusted.

        Raises:
            ValueError: libpq cannot read it, or one of the programs could not be told; no message repeats a secret.
        """
        return _read(url, tuple(sorted(_trusted(environment or {}).items())))

    def url(self, user: str, password: str, database: str) -> str:
        """A URL of this server for a role, with its password: hand it to clients, never to a log."""
        host = f"[{self.host}]" if ":" in self.host else quote(self.host, safe="")
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in self.tls.items())
        place = f"postgresql://{quote(user, safe='')}:{quote(password, safe='')}@{host}:{self.port}"
        return f"{place}/{quote(database, safe='')}{'?' if query else ''}{query}"


def _trusted(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: environment[variable] for name, variable in _VARIABLES.items() if environment.get(variable)}


@lru_cache(maxsize=8)
def _read(url: str, trusted: tuple[tuple[str, str], ...]) -> ServerUrl:
    given = _libpq(url)
    for name, value in trusted:
        if name not in given:
            _check(name, value, _VARIABLES[name])
    for name, value in given.items():
        _check(name, value, name)
    return ServerUrl(
        host=given["host"],
        port=int(given.get("port") or 5432),
        user=given.get("user", ""),
        password=given.get("password", ""),
        database=given.get("dbname", ""),
        tls=_tls({**dict(trusted), **given}),
        passfile=given.get("passfile", ""),
    )


def _libpq(url: str) -> dict[str, str]:
    if not url.startswith(("postgresql://", "postgres://")):
        raise ValueError(f"must begin with postgresql://, as {SHAPE}")
    try:
        given = {name: str(value) for name, value in conninfo_to_dict(url).items() if value not in (None, "")}
    except psycopg.ProgrammingError as error:
        # libpq quotes the piece that it cannot read, which may be of the password: only a parameter's name is told, and only
        # where no password can stand.
        found = re.search(r'invalid URI query parameter: "([a-z_]+)"', str(error))
        known = found and "@" not in url.partition("?")[2]
        raise ValueError(
            f"has a parameter that libpq does not know: {found[1]}"
            if found and known
            else f"cannot be read: write {SHAPE}"
        ) from None
    if not given.get("host"):
        if "hostaddr" in given:
            _check("hostaddr", given["hostaddr"], "hostaddr")
        raise ValueError(f"names no host: write {SHAPE}")
    if "," in given["host"] or "," in given.get("port", ""):
        raise ValueError(
            "names several hosts, and not every program would choose the same: name the one that can be written, or an address "
            "that follows it"
        )
    if given["host"].startswith(("/", "@")):
        raise ValueError("leads to a socket in a folder, where JDBC cannot go: name a host")
    if not re.fullmatch(r"[A-Za-z0-9._:%-]+", given["host"]):
        raise ValueError(f"has a host that is no name and no address: write {SHAPE}")
    port = given.get("port") or "5432"
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ValueError("the port must be a number up to 65535")
    if any(not character.isprintable() for value in given.values() for character in value):
        raise ValueError("holds a character that cannot be seen: write such a one of a password as %XX")
    return given


def _check(name: str, value: str, called: str) -> None:
    """Refuse what one of the programs cannot be told."""
    if name in ("host", "port", "user", "password", "dbname", "passfile", "sslrootcert"):
        return
    if name == "sslmode":
        if value not in _SSLMODES:
            raise ValueError(f"{called}={value}: must be one of {', '.join(_SSLMODES)}")
        return
    if value in _AS_EVERYBODY.get(name, ()):
        return
    if name in _AS_EVERYBODY:
        raise ValueError(
            f"{called}={value}: not every program can be told so (dbmate, JDBC): leave it out, or write "
            f"{' or '.join(_AS_EVERYBODY[name])}"
        )
    raise ValueError(f"{called}: {_REASONS.get(name, 'not every program can be told so (dbmate, JDBC)')}: leave it out")


def _tls(given: Mapping[str, str]) -> dict[str, str]:
    mode, root = given.get("sslmode", ""), given.get("sslrootcert", "")
    if root and mode == "require":
        mode = "verify-ca"  # what libpq makes of it, and nobody else
    if mode not in _VERIFYING:
        return {"sslmode": mode} if mode else {}
    if not root.startswith("/"):
        raise ValueError(
            f"sslmode={mode} needs sslrootcert=/PATH, the file of the authority's certificate, by its whole path"
        )
    return {"sslmode": mode, "sslrootcert": root}


def jdbc_parameters(tls: Mapping[str, str]) -> str:
    """How JDBC is told the same: more parameters for its URL, each with its `&`."""
    return "".join(f"&{name}={quote(value, safe='/')}" for name, value in tls.items())
