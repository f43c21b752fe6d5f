"""Random secrets, made once and shared out: each container gets a folder with those that it needs, and no others."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from metrics_pipeline.errors import InstallError
from metrics_pipeline.settings import Settings

PIPELINE_UID: Final = 10001
"""The account of our own image (Dockerfile)."""
PGADMIN_UID: Final = 5050
"""The account of pgAdmin's image: https://www.pgadmin.org/docs/pgadmin4/9.16/container_deployment.html"""
STORE: Final = "store"
"""Folder of the originals, which only the service `secrets` mounts."""
OF_COMPOSE: Final = ("pgadmin_password", "grafana_password")
"""Secrets that only containers have; nobody needs to know them, except who wants to change dashboards in Grafana."""
DATABASE_HOST: Final = "postgres"
"""PostgreSQL's name among the containers."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one kind of container may read.

    Attributes:
        names: its secrets, each a file of that name.
        uid: who owns `pgpass`, which libpq takes only from its owner.
        roles: whose passwords `pgpass` holds; no file without.
    """

    names: tuple[str, ...]
    uid: int | None = None
    roles: tuple[str, ...] = ()


SHARES: Final = {
    "postgres": Share(("postgres_password",)),
    "connect": Share(("metrics_writer_password",)),
    "pipeline": Share(tuple(Settings.group("secrets")), PIPELINE_UID, ("dagster",)),
    "pgadmin": Share(("pgadmin_password",), PGADMIN_UID, ("metrics_reader",)),
    "grafana": Share(("grafana_password",)),
}
"""By folder."""


def share_out(folder: Path) -> list[str]:
    """Write every secret that is missing, and every share again; a secret in the environment wins over the stored one.

    Returns:
        The names of the secrets that are new or were changed by the environment.

    Raises:
        InstallError: the folder cannot be written.
    """
    store = folder / STORE
    changed, values = [], {}
    try:
        for share in (STORE, *SHARES):
            (folder / share).mkdir(parents=True, exist_ok=True)
        for name in (*Settings.group("secrets"), *OF_COMPOSE):
            file = store / name
            known = file.read_text("utf-8") if file.exists() else ""
            values[name] = os.environ.get(name.upper()) or known or secrets.token_urlsafe(24)
            if values[name] != known:
                _write(file, values[name], 0o400)
                changed.append(name)
        for share, what in SHARES.items():
            for name in what.names:
                # Whoever mounts the volume may read it: images run under accounts of their own.
                _write(folder / share / name, values[name], 0o444)
            if what.roles:
                lines = [
                    f"{DATABASE_HOST}:5432:*:{role}:{_escaped(values[f'{role}_password'])}\n" for role in what.roles
                ]
                _write(folder / share / "pgpass", "".join(lines), 0o400, what.uid)
    except OSError as error:
        raise InstallError(
            f"cannot write {error.filename or folder}: {error.strerror}; mount a writable volume there"
        ) from error
    return changed


def missing(folder: Path) -> list[str]:
    """Files that `share_out` writes and that are not there."""
    files = [
        Path(share) / name
        for share, what in SHARES.items()
        for name in (*what.names, *(["pgpass"] if what.roles else []))
    ]
    return [str(file) for file in files if not (folder / file).is_file()]


def _escaped(password: str) -> str:
    """As pgpass wants it: https://www.postgresql.org/docs/17/libpq-pgpass.html."""
    return password.replace("\\", "\\\\").replace(":", "\\:")


def _write(path: Path, text: str, mode: int, uid: int | None = None) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask
        if uid is not None and os.geteuid() == 0:
            os.fchown(file.fileno(), uid, uid)
        file.write(text)
    scratch.replace(path)
