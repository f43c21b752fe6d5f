"""The lock of a data folder: one keeper at a time, and who that is.

`flock` where the file system has it: it ends with its process. Elsewhere a file that only one can make, with who made it: one whose
process is gone counts for nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Final

import psutil

from metrics_pipeline.errors import BusyError, InstallError
from metrics_pipeline.local.processes import ProcessId, identify

FILE: Final = "keeper.lock"
OWNER: Final = "keeper.owner"
"""Made by one only, on a file system without `flock`."""

_NOT_THERE: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, errno.ENOLCK})
"""What a file system answers that has no `flock`, or no server for it (NFS without its lock daemon: ENOLCK)."""


class Lock:
    """Held until it is closed or the process ends."""

    def __init__(self, file: IO[str], owner: Path | None) -> None:
        self._file = file
        self._owner = owner

    def close(self) -> None:
        """Let the next one in."""
        if self._owner is not None:
            self._owner.unlink(missing_ok=True)
            self._owner = None
        self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def take(folder: Path) -> Lock:
    """The lock of a data folder.

    Raises:
        BusyError: somebody else has it.
        InstallError: it cannot be had here, for the reason that the system gives.
    """
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise InstallError(
            f"cannot write {path}: {error.strerror}; run as the user who owns it, or set PIPELINE_DATA_DIR to a folder you own"
        ) from error
    try:
        owner = _lock(file, folder)
        _sign(file)
    except OSError as error:
        file.close()
        raise InstallError(
            f"cannot lock {path}: {error.strerror}; set PIPELINE_DATA_DIR to a folder on a disk of this machine"
        ) from error
    except BaseException:
        file.close()
        raise
    return Lock(file, owner)


def holder(folder: Path) -> psutil.Process | None:
    """The process that has the lock, as far as it can be known; None when nobody has it, or somebody on another machine."""
    for name in (FILE, OWNER):
        if (who := _read(folder / name)) is not None and (process := who.find()) is not None:
            return process
    return _by_kernel(folder / FILE)


def _lock(file: IO[str], folder: Path) -> Path | None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(folder) from error
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return _own(folder)
    return None


def _own(folder: Path) -> Path:
    path = folder / OWNER
    mine = asdict(identify(psutil.Process())) | {"host": socket.gethostname()}
    for _ in range(2):
        try:
            with path.open("x", encoding="utf-8") as made:
                made.write(json.dumps(mine))
        except FileExistsError:
            if _is_held(path):
                raise _busy(folder) from None
            # Whoever sees this at the same time moves it aside as well: only one of them can.
            with contextlib.suppress(FileNotFoundError):
                path.replace(folder / f".{OWNER}.{os.getpid()}")
            (folder / f".{OWNER}.{os.getpid()}").unlink(missing_ok=True)
        else:
            return path
    raise _busy(folder)


def _is_held(path: Path) -> bool:
    try:
        written: dict[str, Any] = json.loads(path.read_text("utf-8"))
        who, host = ProcessId.parse(written), written["host"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        return True  # it is being written in this moment
    if host != socket.gethostname():
        return True  # nothing can be known of it from here
    return who.find() is not None


def _sign(file: IO[str]) -> None:
    """Write down who has it, for those who come later."""
    file.truncate(0)
    file.write(json.dumps(asdict(identify(psutil.Process()))))
    file.flush()


def _read(path: Path) -> ProcessId | None:
    try:
        return ProcessId.parse(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _by_kernel(path: Path) -> psutil.Process | None:
    """The holder as Linux lists it: also one of a version that did not sign."""
    with contextlib.suppress(OSError, psutil.Error, ValueError):
        inode = str(path.stat().st_ino)
        for line in Path("/proc/locks").read_text("ascii").splitlines():
            _, kind, _, _, pid, place, *_ = line.split()
            if kind == "FLOCK" and place.rpartition(":")[2] == inode:
                return psutil.Process(int(pid))
    return None


def _busy(folder: Path) -> BusyError:
    try:
        who = f" (pid {process.pid})" if (process := holder(folder)) is not None else ""
    except psutil.Error:
        who = ""
    where = "" if who else _elsewhere(folder)
    return BusyError(
        f"the pipeline in {folder} is running already{who or where}: see `metrics-pipeline status`, "
        "or stop it with `metrics-pipeline down`"
    )


def _elsewhere(folder: Path) -> str:
    path = folder / OWNER
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        host = json.loads(path.read_text("utf-8"))["host"]
        if host != socket.gethostname():
            return f" on {host} (if that is not so, delete {path})"
    return ""
