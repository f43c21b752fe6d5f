"""The id of a data folder, by which what was started for it is told from what was started for another one.

A port, a path or a name may be another stack's tomorrow. So our own servers answer with the id, the processes of a stack have it
in their environment, and the embedded PostgreSQL bears it as its cluster's name.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from metrics_pipeline.settings import Settings

VARIABLE: Final = "METRICS_PIPELINE_STACK"
"""In the environment of each process that was started for a data folder."""
HEADER: Final = "X-Metrics-Pipeline-Stack"
"""In each answer of our own servers; missing when their data folder has no id."""
_FILE: Final = "stack-id"


def folder_id(settings: Settings) -> str:
    """The id of the data folder; empty when no stack was ever started in it, as in containers."""
    return _read(settings.data_dir) or ""


def make_folder_id(folder: Path) -> str:
    """The id of a data folder, which gets one if it has none of its own; however many ask at once, all get the same.

    Raises:
        OSError: the folder cannot be written.
    """
    path = folder / _FILE
    while (known := _read(folder)) is None:
        scratch = folder / f".{_FILE}.{os.getpid()}.{secrets.token_hex(4)}"
        scratch.write_text(f"{secrets.token_hex(8)} {folder.stat().st_ino}\n", "ascii")
        try:
            if not path.exists():
                path.hardlink_to(scratch)  # unlike a rename, it never replaces what somebody else has just made
            elif _read(folder) is None:  # a copy's, or none that can be read
                scratch.replace(path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    return known


def _read(folder: Path) -> str | None:
    """The id that stands in a folder, unless the folder is a copy of the one that it was made for."""
    try:
        identity, _, inode = (folder / _FILE).read_text("ascii").strip().partition(" ")
        return identity if inode == str(folder.stat().st_ino) else None
    except (OSError, UnicodeDecodeError):
        return None


def cluster_name(identity: str) -> str:
    """What the embedded PostgreSQL of a data folder is called."""
    return f"metrics-pipeline {identity}"
