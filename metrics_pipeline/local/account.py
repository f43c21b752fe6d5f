"""The unprivileged account that PostgreSQL needs when the stack is run by root, and folders it can reach."""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from metrics_pipeline.errors import InstallError

SHARED_STATE = Path("/var/lib/metrics-pipeline")
"""Under root, where PostgreSQL's files go when the account cannot enter the data folder."""


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this machine to drop to."""

    name: str
    uid: int
    gid: int

    def as_arguments(self) -> dict[str, Any]:
        """What makes `subprocess` drop to this account."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def own(self, path: Path, mode: int) -> None:
        """Hand a file or folder to this account."""
        os.chown(path, self.uid, self.gid)
        path.chmod(mode)


def unprivileged() -> Account | None:
    """The account to run PostgreSQL as: None when this process is no root and can run it itself.

    Raises:
        InstallError: when root has no other account to drop to.
    """
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    raise InstallError(
        "PostgreSQL does not run as root and there is no account 'postgres' or 'nobody': run as an ordinary user"
    )


def reachable(path: Path) -> bool:
    """Whether every account may enter each folder down to `path` (which need not exist yet)."""
    return all(not folder.exists() or folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


def postgres_home(data_dir: Path, account: Account | None) -> Path:
    """Folder for PostgreSQL's binaries and data: in the data folder, or where the account can reach it."""
    if account is None or reachable(data_dir):
        return data_dir / "postgres"
    return SHARED_STATE / hashlib.sha256(bytes(data_dir)).hexdigest()[:12]


def claim_home(data_dir: Path, account: Account | None) -> Path:
    """Make that folder. One outside the data folder notes where it belongs; those of deleted temporary folders are removed."""
    home = postgres_home(data_dir, account)
    home.mkdir(parents=True, exist_ok=True)
    if account is not None:
        home.chmod(0o755)
    if home.parent == SHARED_STATE:
        SHARED_STATE.chmod(0o755)  # a strict umask would have closed it
        (home / "belongs-to").write_text(f"{data_dir}\n")
        _remove_orphans(home)
    return home


def _remove_orphans(claimed: Path) -> None:
    # Only of temporary stacks: any other data folder that cannot be seen may lie on a disk that is not mounted now.
    temporary = Path(tempfile.gettempdir()).resolve()
    for note in SHARED_STATE.glob("*/belongs-to"):
        if note.parent == claimed:
            continue
        folder = Path(note.read_text().strip())
        if folder.is_relative_to(temporary) and not folder.exists() and not _in_use(note.parent / "data"):
            shutil.rmtree(note.parent, ignore_errors=True)


def _in_use(data: Path) -> bool:
    try:
        return psutil.pid_exists(int((data / "postmaster.pid").read_text().split("\n", 1)[0]))
    except (OSError, ValueError):
        return False
