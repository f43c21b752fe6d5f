"""The account that PostgreSQL runs as, and folders that it can reach."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest

from metrics_pipeline.errors import InstallError
from metrics_pipeline.local import account as module
from metrics_pipeline.local.account import Account, claim_home, postgres_home, reachable, unprivileged

SOMEBODY = Account("somebody", os.getuid(), os.getgid())


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    """A machine where this process is root; the dictionary holds its other accounts."""
    accounts: dict[str, SimpleNamespace] = {}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", accounts.__getitem__)
    return accounts


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files go that the account cannot reach; pytest's own folder is such a place."""
    folder = tmp_path / "shared"
    monkeypatch.setattr(module, "SHARED_STATE", folder)
    return folder


def private(tmp_path: Path) -> Path:
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    return folder / "data"


def test_an_ordinary_user_runs_postgresql_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert unprivileged() is None


def test_root_drops_to_the_first_account_there_is(as_root: dict[str, SimpleNamespace]) -> None:
    as_root["nobody"] = SimpleNamespace(pw_uid=65534, pw_gid=65533)
    found = unprivileged()
    assert found == Account("nobody", 65534, 65533)
    assert found.as_arguments() == {"user": 65534, "group": 65533, "extra_groups": []}
    as_root["postgres"] = SimpleNamespace(pw_uid=26, pw_gid=27)
    assert unprivileged() == Account("postgres", 26, 27)


def test_root_without_any_other_account_is_told_what_to_do(as_root: dict[str, SimpleNamespace]) -> None:
    with pytest.raises(InstallError, match="run as an ordinary user"):
        unprivileged()


def test_a_folder_is_reachable_when_every_folder_above_may_be_entered(tmp_path: Path) -> None:
    assert reachable(Path("/"))
    assert reachable(Path("/no-such-folder/below"))
    assert not reachable(private(tmp_path))


def test_files_lie_in_the_data_folder_for_an_ordinary_user(tmp_path: Path, shared: Path) -> None:
    data = private(tmp_path)
    assert postgres_home(data, None) == data / "postgres"
    assert claim_home(data, None) == data / "postgres"
    assert (data / "postgres").is_dir()
    assert not shared.exists()


def test_files_lie_elsewhere_when_the_account_cannot_reach_the_data_folder(tmp_path: Path, shared: Path) -> None:
    data = private(tmp_path)
    data.mkdir()
    home = claim_home(data, SOMEBODY)
    assert home == postgres_home(data, SOMEBODY)
    assert home.parent == shared
    assert home != postgres_home(data.with_name("other"), SOMEBODY)
    assert (home / "belongs-to").read_text() == f"{data}\n"


def test_a_strict_umask_does_not_close_the_folder_to_the_account(tmp_path: Path, shared: Path) -> None:
    before = os.umask(0o077)
    try:
        home = claim_home(private(tmp_path), SOMEBODY)
    finally:
        os.umask(before)
    assert home.stat().st_mode & 0o777 == 0o755
    assert shared.stat().st_mode & 0o777 == 0o755


def test_what_belongs_to_a_deleted_folder_is_removed_and_nothing_else(tmp_path: Path, shared: Path) -> None:
    folders = [tmp_path / "private" / name for name in ("kept", "deleted", "deleted but running", "killed and deleted")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    (tmp_path / "private").chmod(0o700)
    kept, deleted, running, killed = (claim_home(folder, SOMEBODY) for folder in folders)
    for home, pid in ((running, os.getpid()), (killed, 2**31 - 1)):
        (home / "data").mkdir()
        (home / "data" / "postmaster.pid").write_text(f"{pid}\n{home / 'data'}\n")
    for folder in folders[1:]:
        folder.rmdir()
    claim_home(folders[0], SOMEBODY)
    assert kept.exists()
    assert not deleted.exists()
    assert not killed.exists()
    assert running.exists()
