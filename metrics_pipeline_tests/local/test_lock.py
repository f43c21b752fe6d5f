"""One keeper at a time, and every answer of the system means what it says."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from metrics_pipeline.errors import BusyError, InstallError
from metrics_pipeline.local import lock
from metrics_pipeline.local.processes import identify

HOLD = "import pathlib, sys; from metrics_pipeline.local import lock; held = lock.take(pathlib.Path(sys.argv[1])); print('ok', flush=True); input()"
WITHOUT_FLOCK = f"import errno, fcntl\ndef flock(*_): raise OSError(errno.ENOSYS, 'no')\nfcntl.flock = flock\n{HOLD}"

Answers = Callable[[int], None]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Let the file system answer this to `flock`."""

    def set_(number: int) -> None:
        def flock(_file: Any, _operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return set_


def held(folder: Path, code: str = HOLD) -> subprocess.Popen[bytes]:
    """A process that holds the lock."""
    keeper = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert keeper.stdout is not None
    assert keeper.stdout.readline() == b"ok\n"
    return keeper


def test_a_second_keeper_is_told_what_to_do(tmp_path: Path) -> None:
    first = lock.take(tmp_path / "data")
    with pytest.raises(
        BusyError, match=rf"is running already \(pid {os.getpid()}\): see `metrics-pipeline status`, or stop it with"
    ):
        lock.take(tmp_path / "data")
    first.close()
    lock.take(tmp_path / "data").close()


@pytest.mark.parametrize("code", [HOLD, WITHOUT_FLOCK], ids=["flock", "without flock"])
def test_the_lock_of_a_killed_keeper_is_free(tmp_path: Path, code: str, answers: Answers) -> None:
    if code == WITHOUT_FLOCK:
        answers(errno.ENOSYS)
    keeper = held(tmp_path, code)
    try:
        with pytest.raises(BusyError, match=f"pid {keeper.pid}"):
            lock.take(tmp_path)
        assert lock.holder(tmp_path) == psutil.Process(keeper.pid)
    finally:
        keeper.kill()
        keeper.communicate()
    assert lock.holder(tmp_path) is None
    with lock.take(tmp_path):
        assert lock.holder(tmp_path) == psutil.Process()
    lock.take(tmp_path).close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_flock_has_a_lock_all_the_same(number: int, tmp_path: Path, answers: Answers) -> None:
    answers(number)
    first = lock.take(tmp_path)
    with pytest.raises(BusyError, match=f"running already .pid {os.getpid()}"):
        lock.take(tmp_path)
    first.close()
    assert not (tmp_path / lock.OWNER).exists()
    lock.take(tmp_path).close()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EWOULDBLOCK])
def test_only_a_lock_that_somebody_has_is_called_that(number: int, tmp_path: Path, answers: Answers) -> None:
    answers(number)
    with pytest.raises(BusyError):
        lock.take(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE])
def test_any_other_answer_is_told_as_it_is(number: int, tmp_path: Path, answers: Answers) -> None:
    answers(number)
    with pytest.raises(InstallError, match=rf"cannot lock .*keeper.lock: {os.strerror(number)}; set PIPELINE_DATA_DIR"):
        lock.take(tmp_path)


def test_a_folder_that_cannot_be_written_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InstallError, match=r"cannot write .*keeper.lock: Not a directory"):
        lock.take(tmp_path / "file" / "data")


def test_without_flock_another_machines_keeper_is_named_and_let_be(tmp_path: Path, answers: Answers) -> None:
    answers(errno.ENOSYS)
    (tmp_path / lock.OWNER).write_text(json.dumps({"pid": 1, "started": "boot:1", "host": "elsewhere"}))
    with pytest.raises(BusyError, match=r"running already on elsewhere \(if that is not so, delete .*keeper.owner\)"):
        lock.take(tmp_path)


def test_without_flock_what_a_keeper_of_an_earlier_boot_left_counts_for_nothing(
    tmp_path: Path, answers: Answers
) -> None:
    answers(errno.ENOSYS)
    import socket

    me = identify(psutil.Process())
    owner = {"pid": me.pid, "started": "earlier:1", "host": socket.gethostname()}
    (tmp_path / lock.OWNER).write_text(json.dumps(owner))
    lock.take(tmp_path).close()


def test_the_holder_is_known_though_it_did_not_sign(tmp_path: Path) -> None:
    keeper = held(tmp_path)
    try:
        (tmp_path / lock.FILE).write_text("")  # as versions before this one left it
        assert lock.holder(tmp_path) == psutil.Process(keeper.pid)
    finally:
        keeper.kill()
        keeper.communicate()
