"""Variables of the surroundings that programs obey unasked: libpq's, Python's, pip's, and those that name a proxy.

They were set for something else. None of them may decide where our sessions lead, how they read a date, or which numpy is loaded.
Only what says how an outside server is trusted, and how the outside is reached, is the user's to say.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

LIBPQ: Final = frozenset(
    [
        "PGAPPNAME",
        "PGCHANNELBINDING",
        "PGCLIENTENCODING",
        "PGCONNECT_TIMEOUT",
        "PGDATABASE",
        "PGDATESTYLE",
        "PGGEQO",
        "PGGSSDELEGATION",
        "PGGSSENCMODE",
        "PGGSSLIB",
        "PGHOST",
        "PGHOSTADDR",
        "PGKRBSRVNAME",
        "PGLOADBALANCEHOSTS",
        "PGLOCALEDIR",
        "PGMAXPROTOCOLVERSION",
        "PGMINPROTOCOLVERSION",
        "PGOPTIONS",
        "PGPASSFILE",
        "PGPASSWORD",
        "PGPORT",
        "PGREQUIREAUTH",
        "PGREQUIREPEER",
        "PGREQUIRESSL",
        "PGSERVICE",
        "PGSERVICEFILE",
        "PGSSLCERT",
        "PGSSLCERTMODE",
        "PGSSLCOMPRESSION",
        "PGSSLCRL",
        "PGSSLCRLDIR",
        "PGSSLKEY",
        "PGSSLMAXPROTOCOLVERSION",
        "PGSSLMINPROTOCOLVERSION",
        "PGSSLMODE",
        "PGSSLNEGOTIATION",
        "PGSSLROOTCERT",
        "PGSSLSNI",
        "PGSYSCONFDIR",
        "PGTARGETSESSIONATTRS",
        "PGTZ",
        "PGUSER",
    ]
)
"""What libpq reads. Not by their first two letters: PGADMIN_PORT is a setting of ours, PGDATA one of the server's tools."""

TRUST: Final = frozenset(
    name
    for name in LIBPQ
    if name.startswith(("PGSSL", "PGGSS", "PGREQUIRE", "PGCHANNEL", "PGKRB", "PGMAXPROTO", "PGMINPROTO", "PGPASSFILE"))
) - {"PGREQUIRESSL"}
"""Of these, what says how a server that somebody else runs is trusted, and who we are there; `server_url` refuses what only libpq would obey."""

HARMLESS: Final = frozenset(
    {"PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHON"}
)
"""Python's variables that change neither which modules are found nor what they do; the last one is our Makefile's."""

DECIDING: Final = frozenset(
    {
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONPLATLIBDIR",
        "PYTHONOPTIMIZE",
        "PYTHONWARNINGS",
        "PYTHONDEVMODE",
        "PYTHONINSPECT",
    }
    | {"PYTHONCASEOK", "PYTHONIOENCODING", "PYTHONUTF8", "PYTHONCOERCECLOCALE"}
)
"""Of these, what has changed an interpreter by the time that it can look: only a new one is without."""

LOCAL: Final = ("127.0.0.0/8", "127.0.0.1", "localhost", "::1")
_EXCEPTIONS: Final = ("no_proxy", "NO_PROXY", "no_grpc_proxy")


def is_loopback(host: str) -> bool:
    """Whether an address or a name is this machine's own."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        address = ip_address(name.partition("%")[0])
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def is_beside_us(url: str) -> bool:
    """Whether a URL leads to this machine."""
    return is_loopback(urlsplit(url).hostname or "")


def forget_libpq(environment: MutableMapping[str, str], *, outside: bool) -> None:
    """Take libpq's variables out of an environment.

    Args:
        environment: to change; a process's own before it opens a session, since libpq looks there for whatever it is not told.
        outside: whether PostgreSQL is one that a setting names; then what says how it is trusted stays.
    """
    for name in LIBPQ & environment.keys() - (TRUST if outside else frozenset()):
        environment.pop(name, None)


def for_children(environment: Mapping[str, str], *, outside: bool) -> dict[str, str]:
    """What Python programs of ours get of an environment: the user's own variables, none of them one that changes their work.

    Args:
        environment: of this process.
        outside: as in `forget_libpq`.
    """
    cleaned = without_python(environment)
    forget_libpq(cleaned, outside=outside)
    return cleaned | without_local_proxy(cleaned)


def without_python(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what Python and pip obey."""
    return {
        name: value
        for name, value in environment.items()
        if name in HARMLESS
        or not (name.startswith(("PYTHON", "PIP_")) or name in ("VIRTUAL_ENV", "__PYVENV_LAUNCHER__"))
    }


def without_local_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep what is on this machine from being asked through a proxy, beside the user's own exceptions.

    For programs that are not ours, such as Dagster's: their gRPC knows addresses and no ranges, and only lower-case names.
    """
    if not any(name.lower().endswith("_proxy") for name in environment):
        return {}
    known = next((environment[name] for name in _EXCEPTIONS if environment.get(name)), "")
    changed = {}
    for name in _EXCEPTIONS:
        given = environment.get(name) or known
        if given.strip() == "*":
            changed[name] = given
            continue
        entries = [entry.strip() for entry in given.split(",") if entry.strip()]
        changed[name] = ",".join(entries + [entry for entry in LOCAL if entry not in entries])
    return changed


def needs_another_interpreter(environment: Mapping[str, str], package: Path) -> bool:
    """Whether this interpreter began with variables that may have changed what it loads or how it warns.

    A PYTHONPATH by which this very package is found stays: without it there would be none.
    """
    given = {name for name in DECIDING if environment.get(name)}
    return bool(given) and not _leads_to(environment.get("PYTHONPATH", ""), package)


def _leads_to(path: str, package: Path) -> bool:
    folders: Iterable[Path] = (Path(folder).resolve() for folder in path.split(os.pathsep) if folder)
    return any(package.is_relative_to(folder) for folder in folders)
