"""Secrets of the containers: random once, shared out to those that need them, and read from files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import psycopg
import pytest

from metrics_pipeline.compose import secrets
from metrics_pipeline.errors import InstallError, SettingError
from metrics_pipeline.settings import Settings


def share(folder: Path, name: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / name).iterdir()}


def test_every_secret_is_random_and_made_once(tmp_path: Path) -> None:
    assert len(secrets.share_out(tmp_path)) == len(Settings.group("secrets")) + len(secrets.OF_COMPOSE)
    first = share(tmp_path, secrets.STORE)
    assert len(set(first.values())) == len(first)
    assert all(len(value) >= 32 for value in first.values())
    assert secrets.share_out(tmp_path) == []
    assert share(tmp_path, secrets.STORE) == first
    assert secrets.missing(tmp_path) == []


def test_what_the_environment_sets_wins_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets.share_out(tmp_path)
    monkeypatch.setenv("METRICS_WRITER_PASSWORD", "mine")
    monkeypatch.setenv("METRICS_READER_PASSWORD", "")
    assert secrets.share_out(tmp_path) == ["metrics_writer_password"]
    monkeypatch.delenv("METRICS_WRITER_PASSWORD")
    assert secrets.share_out(tmp_path) == []
    for name in ("connect", "pipeline"):
        assert share(tmp_path, name)["metrics_writer_password"] == "mine"


def test_nobody_gets_more_than_he_needs(tmp_path: Path) -> None:
    secrets.share_out(tmp_path)
    assert set(share(tmp_path, "postgres")) == {"postgres_password"}
    assert set(share(tmp_path, "connect")) == {"metrics_writer_password"}
    assert set(share(tmp_path, "pgadmin")) == {"pgadmin_password", "pgpass"}
    assert set(share(tmp_path, "grafana")) == {"grafana_password"}
    assert [line.split(":")[3] for line in share(tmp_path, "pgadmin")["pgpass"].splitlines()] == ["metrics_reader"]


def test_modes_hold_whatever_the_umask(tmp_path: Path) -> None:
    former = os.umask(0o077)
    try:
        secrets.share_out(tmp_path)
        secrets.share_out(tmp_path)
    finally:
        os.umask(former)
    modes = {
        path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    for name, mode in modes.items():
        private = name.startswith(secrets.STORE) or name.endswith("pgpass")
        assert mode == (0o400 if private else 0o444), name
    if os.geteuid() == 0:
        assert (tmp_path / "pipeline/pgpass").stat().st_uid == secrets.PIPELINE_UID
        assert (tmp_path / "pgadmin/pgpass").stat().st_uid == secrets.PGADMIN_UID


def test_libpq_reads_awkward_passwords_from_pgpass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_PASSWORD", r"a:b\c d")
    secrets.share_out(tmp_path)
    (line,) = (tmp_path / "pipeline/pgpass").read_text().splitlines()
    assert line == r"postgres:5432:*:dagster:a\:b\\c d"
    # libpq resolves the password before it connects: an address that nobody answers on is enough to see it.
    conn = psycopg.pq.PGconn.connect_start(
        f"hostaddr=127.0.0.1 host=postgres port=5432 user=dagster dbname=x passfile={tmp_path}/pipeline/pgpass".encode()
    )
    assert conn.password == rb"a:b\c d"
    conn.finish()


def test_missing_files_are_named(tmp_path: Path) -> None:
    secrets.share_out(tmp_path)
    (tmp_path / "pipeline/dagster_password").unlink()
    assert secrets.missing(tmp_path) == ["pipeline/dagster_password"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InstallError, match="mount a writable volume there"):
        secrets.share_out(tmp_path / "file")


def test_a_setting_may_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.group("secrets"):
        file = tmp_path / name
        file.write_text(f"of {name}\n")
        monkeypatch.setenv(f"{name.upper()}_FILE", str(file))
    settings = Settings.load()
    for name in Settings.group("secrets"):
        assert getattr(settings, name).get_secret_value() == f"of {name}"


def test_environment_wins_over_the_file_and_that_over_the_env_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("of the file")
    (tmp_path / "env").write_text("DAGSTER_PASSWORD=of the env file\n")
    monkeypatch.setenv("PIPELINE_ENV_FILE", str(tmp_path / "env"))
    monkeypatch.setenv("DAGSTER_PASSWORD_FILE", str(tmp_path / "secret"))
    assert Settings.load().dagster_password.get_secret_value() == "of the file"
    monkeypatch.setenv("DAGSTER_PASSWORD", "of the environment")
    assert Settings.load().dagster_password.get_secret_value() == "of the environment"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METRICS_OWNER_PASSWORD_FILE", str(tmp_path / "none"))
    with pytest.raises(SettingError, match=r"^METRICS_OWNER_PASSWORD_FILE: cannot read .*none: No such file"):
        Settings.load()


def test_only_secrets_are_read_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("copy")
    monkeypatch.setenv("SINK_FILE", str(tmp_path / "file"))
    assert Settings.load().sink == "connect"


def test_a_url_without_a_password_takes_the_superuser_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", "postgresql://boss@postgres:5432/metrics")
    monkeypatch.setenv("POSTGRES_PASSWORD", "p@ss")
    assert Settings.load().admin_url() == "postgresql://boss:p%40ss@postgres:5432/postgres"
    assert Settings.load().admin_url("metrics").endswith("@postgres:5432/metrics")
    monkeypatch.setenv("POSTGRES_URL", "postgresql://boss:p%40ss@postgres:5432/metrics")
    monkeypatch.setenv("POSTGRES_PASSWORD", "another")
    assert Settings.load().admin_url() == "postgresql://boss:p%40ss@postgres:5432/postgres"
