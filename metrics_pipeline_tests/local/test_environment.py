"""The env file that the first `up` writes, and what child processes get."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dotenv import dotenv_values

from metrics_pipeline.errors import InstallError
from metrics_pipeline.local.environment import (
    SECRETS,
    for_python,
    isolated,
    minimal,
    remember,
    replaced,
    write_secrets,
)
from metrics_pipeline.local.ports import is_free
from metrics_pipeline.settings import Settings, env_file


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "env"
    monkeypatch.setenv("PIPELINE_ENV_FILE", str(path))
    return path


def test_every_password_is_made_once_and_differs(file: Path) -> None:
    write_secrets()
    made = dotenv_values(file)
    assert set(made) == set(SECRETS)
    assert len(set(made.values())) == len(SECRETS)
    assert all(value and len(value) >= 32 for value in made.values())
    write_secrets()
    assert dotenv_values(file) == made


def test_only_the_owner_may_read_it(file: Path) -> None:
    write_secrets()
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    remember({"KAFKA_PORT": "1"})
    assert file.stat().st_mode & 0o777 == 0o600


def test_what_the_user_set_is_left_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = (
        "# mine\nPRODUCER_FLEET_SIZE=77   # more of them\n\nexport DAGSTER_PASSWORD='a b#c'\nMETRICS_OWNER_PASSWORD=\n"
    )
    file.write_text(mine)
    monkeypatch.setenv("METRICS_READER_PASSWORD", "from-the-environment")
    write_secrets()
    text = file.read_text()
    assert text.startswith(
        "# mine\nPRODUCER_FLEET_SIZE=77   # more of them\n\nexport DAGSTER_PASSWORD='a b#c'\nMETRICS_OWNER_PASSWORD="
    )
    assert "METRICS_READER_PASSWORD" not in text
    settings = Settings.load()
    assert settings.dagster_password.get_secret_value() == "a b#c"
    assert settings.metrics_reader_password.get_secret_value() == "from-the-environment"
    assert len(settings.metrics_owner_password.get_secret_value()) >= 32
    assert settings.producer_fleet_size == 77


@pytest.mark.parametrize("value", ["plain", "with space", "p'q\"r", "a#b", "$HOME", "back\\slash", "ünï"])
def test_a_value_comes_back_as_it_was(value: str, file: Path) -> None:
    remember({"DAGSTER_PASSWORD": value})
    assert Settings.load().dagster_password.get_secret_value() == value


def test_a_value_is_replaced_where_it_stands(file: Path) -> None:
    file.write_text("KAFKA_PORT=1\nLAG_LIMIT=5\n")
    remember({"KAFKA_PORT": "2"})
    assert [line.replace("'", "") for line in file.read_text().splitlines()] == ["KAFKA_PORT=2", "LAG_LIMIT=5"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_ENV_FILE", str(tmp_path / "no-such-folder" / "env"))
    with pytest.raises(InstallError, match=r"cannot write .*env: No such file or directory; .*PIPELINE_ENV_FILE"):
        write_secrets()


def test_python_children_get_the_chosen_ports_and_no_password_but_dagsters(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_secrets()
    monkeypatch.setenv("KAFKA_PORT", "1")
    settings = Settings.load(kafka_port=2, kafka_brokers=3, pipeline_data_dir=tmp_path / "data")
    variables = for_python(settings)
    assert variables["KAFKA_PORT"] == "2"
    assert (variables["KAFKA_BROKERS"], variables["CONNECT_WORKERS"]) == ("3", "1")
    assert variables["PIPELINE_ENV_FILE"] == str(file)
    assert variables["DAGSTER_HOME"] == str(tmp_path / "data" / "dagster_home")
    assert variables["PATH"] == os.environ["PATH"]
    for name in Settings.group("ports"):
        assert name.upper() in variables
    secret = {name: getattr(settings, name).get_secret_value() for name in Settings.group("secrets")}
    holding = {(name, key) for name, value in secret.items() for key, text in variables.items() if value in text}
    assert holding == {("dagster_password", "DAGSTER_POSTGRES_URL")}


def test_other_children_get_nothing_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert set(minimal()) == {"PATH", "LANG", "TZ"}


def test_an_isolated_stack_has_folder_and_ports_of_its_own(tmp_path: Path) -> None:
    variables = isolated(tmp_path)
    ports = {name for name in Settings.model_fields if name.endswith("_port")}
    assert set(variables) == {name.upper() for name in ports} | {"PIPELINE_ENV_FILE", "PIPELINE_DATA_DIR"}
    with replaced(variables):
        settings = Settings.load()
        assert env_file() == tmp_path / "env"
    assert settings.data_dir == tmp_path / "data"
    chosen = [getattr(settings, name) for name in ports]
    assert [variables[name.upper()] for name in ports] == [str(port) for port in chosen]
    assert len(set(chosen)) == len(ports)
    assert all(map(is_free, chosen))


def test_settings_are_replaced_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LAG_LIMIT", "1"), ("METRICS_READER_PASSWORD", "mine"), ("PIPELINE_CACHE_DIR", "/downloads")):
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    kept = {name: value for name, value in before.items() if name not in ("LAG_LIMIT", "METRICS_READER_PASSWORD")}
    with replaced({"LAG_LIMIT": "2", "SINK": "copy"}):
        assert dict(os.environ) == kept | {"LAG_LIMIT": "2", "SINK": "copy"}
    assert dict(os.environ) == before
    with pytest.raises(KeyError, match="on the way"), replaced({"LAG_LIMIT": "2"}):
        raise KeyError("on the way")
    assert dict(os.environ) == before
