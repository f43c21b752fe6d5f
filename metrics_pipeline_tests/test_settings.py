"""Settings: where a value comes from, what is refused and how, and that no secret shows."""

from __future__ import annotations

import errno
import os
import re
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from psycopg.conninfo import conninfo_to_dict

import metrics_pipeline.settings
from metrics_pipeline.errors import SettingError
from metrics_pipeline.settings import (
    ROOT,
    SERVICE_URLS,
    Settings,
    env_file,
    external_services,
    producer_overrides,
    workplace,
)

AWKWARD = "p@ss/w:rd?#%&+ ä'\"\\"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "env"
    monkeypatch.setenv("PIPELINE_ENV_FILE", str(path))
    return path


def test_real_environment_wins_over_the_env_file_and_that_over_the_default(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Settings.load().producer_fleet_size == 50
    file.write_text("PRODUCER_FLEET_SIZE=60\n")
    assert Settings.load().producer_fleet_size == 60
    monkeypatch.setenv("PRODUCER_FLEET_SIZE", "70")
    assert Settings.load().producer_fleet_size == 70
    assert Settings.load(producer_fleet_size=80).producer_fleet_size == 80


def test_an_empty_variable_means_the_default(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("PRODUCER_MAX_DEVICES=\n")
    monkeypatch.setenv("PRODUCER_FLEET_SIZE", "")
    settings = Settings.load()
    assert (settings.producer_fleet_size, settings.producer_max_devices) == (50, 10)


def test_env_file_is_the_checkouts_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_ENV_FILE")
    assert env_file() == ROOT / ".env"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("PRODUCER_MIN_METRICS", "many", "valid integer"),
        ("PRODUCER_QUEUE_CONCURRENCY", "0", "greater than or equal to 1"),
        ("PRODUCER_PUBLISH_INTERVAL", "-1", "greater than or equal to 0"),
        ("KAFKA_MAX_IN_FLIGHT", "6", "less than or equal to 5"),
        ("PRODUCER_COMPRESSION", "gzip", "'lz4', 'zstd' or 'none'"),
        ("TOPIC_RETENTION_BYTES", "1000", "greater than or equal to 67108864"),
        ("POSTGRES_PORT", "65536", "less than or equal to 65535"),
        ("PIPELINE_MEMORY_GB", "0", "greater than 0"),
        ("DISK_FREE_LIMIT_GB", "-1", "greater than or equal to 0"),
        ("THROUGHPUT_FLOOR", "fast", "valid number"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_the_reason(
    name: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError) as caught:
        Settings.load()
    message = str(caught.value)
    assert message.startswith(f"{name}={value}: ")
    assert reason in message
    assert "\n" not in message


def test_every_bad_setting_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_PORT", "none")
    monkeypatch.setenv("LAG_LIMIT", "0")
    with pytest.raises(SettingError, match=r"POSTGRES_PORT=none: .*; LAG_LIMIT=0: "):
        Settings.load()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {"PRODUCER_MIN_METRICS": "8000"},
            "PRODUCER_MIN_METRICS is 8000, above PRODUCER_MAX_METRICS (7500): lower it or raise the other",
        ),
        (
            {"PRODUCER_MIN_DEVICES": "12", "PRODUCER_MAX_DEVICES": "11"},
            "PRODUCER_MIN_DEVICES is 12, above PRODUCER_MAX_DEVICES (11): lower it or raise the other",
        ),
        (
            {"PRODUCER_FLEET_SIZE": "9"},
            "PRODUCER_MAX_DEVICES is 10, above PRODUCER_FLEET_SIZE (9): lower it or raise the other",
        ),
    ],
)
def test_contradicting_settings_are_refused(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingError) as caught:
        Settings.load()
    assert str(caught.value) == says


def test_equal_minimum_and_maximum_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PRODUCER_MIN_METRICS", "PRODUCER_MAX_METRICS"):
        monkeypatch.setenv(name, "100")
    assert Settings.load().producer_min_metrics == 100


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("POSTGRES_URL", "mysql://me:tell-nobody@host/db", "must begin with postgresql://"),
        ("POSTGRES_URL", "postgresql://me:host:tell-nobody/db", "the port must be a number up to 65535"),
        ("POSTGRES_URL", "postgresql://me:tell-nobody@host:99999/db", "the port must be a number up to 65535"),
        ("CONNECT_URL", "ftp://me:tell-nobody@host", "must begin with http:// or https://"),
        ("CONNECT_URL", "http://me:tell-nobody@host:port", "the port must be a number up to 65535"),
        ("KAFKA_URL", "tell-nobody", "must be host:port"),
        ("KAFKA_URL", "host:9092,tell-nobody", "must be host:port"),
        ("KAFKA_URL", "PLAINTEXT://tell-nobody:9092", "must be host:port"),
    ],
)
def test_a_bad_url_is_named_and_not_repeated(
    name: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError) as caught:
        Settings.load()
    assert str(caught.value).startswith(f"{name}: {reason}")
    # Dagster writes causes down as well.
    cause: BaseException | None = caught.value
    while cause is not None:
        assert "tell-nobody" not in f"{cause} {cause!r}"
        cause = cause.__cause__


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("", None),
        ("90d", timedelta(days=90)),
        ("36h", timedelta(hours=36)),
        ("10m", timedelta(minutes=10)),
        ("52 w", timedelta(weeks=52)),
    ],
)
def test_an_age_has_a_unit(text: str, age: timedelta | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METRICS_RETENTION", text)
    assert Settings.load().retention_age == age
    assert Settings.load().retention_bytes is None


@pytest.mark.parametrize(
    ("text", "size"),
    [("", None), ("500GB", 500 * 10**9), ("1 TiB", 2**40), ("64MiB", 64 * 2**20), ("3TB", 3 * 10**12)],
)
def test_a_size_has_a_unit(text: str, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METRICS_RETENTION_SIZE", text)
    assert Settings.load().retention_bytes == size


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("METRICS_RETENTION", "90"),
        ("METRICS_RETENTION", "0d"),
        ("METRICS_RETENTION", "-1d"),
        ("METRICS_RETENTION", "1.5d"),
        ("METRICS_RETENTION", "3 months"),
        ("METRICS_RETENTION", "500GB"),
        ("METRICS_RETENTION", "999999999w"),
        ("METRICS_RETENTION_SIZE", "500"),
        ("METRICS_RETENTION_SIZE", "500gb"),
        ("METRICS_RETENTION_SIZE", "90d"),
        ("METRICS_RETENTION_SIZE", "0GB"),
    ],
)
def test_what_would_drop_the_wrong_readings_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=rf"^{name}=.*: must be "):
        Settings.load()


def test_no_secret_shows_in_a_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.group("secrets"):
        monkeypatch.setenv(name.upper(), f"tell-nobody-{name}")
    monkeypatch.setenv("POSTGRES_URL", "postgresql://me:tell-nobody@host/db")
    settings = Settings.load()
    assert settings.metrics_reader_password.get_secret_value() == "tell-nobody-metrics_reader_password"
    assert "tell-nobody" not in f"{settings!r} {settings}"


def test_every_password_is_a_secret_and_every_setting_is_described() -> None:
    assert [name for name in Settings.model_fields if "password" in name] == Settings.group("secrets")
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert isinstance(field.json_schema_extra, dict), name


def test_only_the_real_environment_makes_a_service_external(monkeypatch: pytest.MonkeyPatch) -> None:
    assert external_services() == frozenset()
    monkeypatch.setenv("KAFKA_URL", "broker.example:9092")
    assert external_services() == {"kafka"}
    assert Settings.load().bootstrap_servers == "broker.example:9092"
    monkeypatch.setenv("CONNECT_URL", "http://connect.example:8083/")
    monkeypatch.setenv("POSTGRES_URL", "postgresql://me@db.example/readings")
    assert external_services() == {"postgres", "kafka", "connect"}
    assert Settings.load().connect_rest == "http://connect.example:8083"


@pytest.mark.parametrize("name", SERVICE_URLS.values())
def test_a_service_url_in_the_env_file_is_refused(name: str, file: Path) -> None:
    file.write_text(f"{name}=postgresql://me:tell-nobody@host:5432/db\n")
    with pytest.raises(SettingError, match=rf"^{name} stands in .*set it in the environment") as caught:
        Settings.load()
    assert "tell-nobody" not in str(caught.value)
    file.write_text(f"{name}=\n")
    Settings.load()


def test_an_env_file_that_may_not_be_read_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    file.touch()
    monkeypatch.setattr(metrics_pipeline.settings, "dotenv_values", refuse)  # root may read every real file
    with pytest.raises(SettingError, match=r"cannot read .*env: Permission denied; run as"):
        Settings.load()


def test_an_env_file_that_is_no_text_is_named(file: Path) -> None:
    file.write_bytes(b"LAG_LIMIT=\xff\xfe\n")
    with pytest.raises(SettingError, match=r"cannot read .*env: it is not UTF-8 text"):
        Settings.load()


def test_role_url_survives_special_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METRICS_READER_PASSWORD", AWKWARD)
    monkeypatch.setenv("POSTGRES_DB", "my db/ü")
    settings = Settings.load()
    assert conninfo_to_dict(settings.role_url("metrics_reader")) == {
        "user": "metrics_reader",
        "password": AWKWARD,
        "host": "127.0.0.1",
        "port": "5432",
        "dbname": "my db/ü",
    }


def test_admin_and_dagster_urls_of_the_embedded_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_USER", "super user")
    monkeypatch.setenv("POSTGRES_PASSWORD", AWKWARD)
    monkeypatch.setenv("DAGSTER_PASSWORD", "x")
    monkeypatch.setenv("POSTGRES_PORT", "6000")
    settings = Settings.load()
    found = conninfo_to_dict(settings.admin_url())
    assert (found["user"], found["password"], found["port"], found["dbname"]) == (
        "super user",
        AWKWARD,
        "6000",
        "postgres",
    )
    assert settings.dagster_postgres_url == "postgresql://dagster:x@127.0.0.1:6000/dagster"


def test_urls_of_an_existing_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", "postgresql://me:p%40ss@[::1]:6000/my%20db?sslmode=require")
    monkeypatch.setenv("METRICS_OWNER_PASSWORD", "x")
    settings = Settings.load()
    assert (settings.postgres_host, settings.postgres_host_port, settings.metrics_database) == ("::1", 6000, "my db")
    assert conninfo_to_dict(settings.role_url("metrics_owner")) == {
        "user": "metrics_owner",
        "password": "x",
        "host": "::1",
        "port": "6000",
        "dbname": "my db",
        "sslmode": "require",
    }
    assert conninfo_to_dict(settings.admin_url("dagster")) == {
        "user": "me",
        "password": "p@ss",
        "host": "::1",
        "port": "6000",
        "dbname": "dagster",
        "sslmode": "require",
    }


def test_an_existing_server_without_port_and_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", "postgresql://me@db.example")
    settings = Settings.load()
    assert (settings.postgres_host, settings.postgres_host_port, settings.metrics_database) == (
        "db.example",
        5432,
        "metrics",
    )


@pytest.mark.parametrize(
    "name", ["Readings", "a b", 'a"b', "1st", "pg_mine", "public", "information_schema", "x" * 49, "ä"]
)
def test_a_schema_that_somebody_would_have_to_quote_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_SCHEMA", name)
    with pytest.raises(SettingError, match=r"^POSTGRES_SCHEMA=.*: must be "):
        Settings.load()


def test_a_schema_of_our_own_holds_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Settings.load()
    assert (plain.metrics_schema, plain.dagster_database, plain.dagster_schema) == ("public", "dagster", "public")
    monkeypatch.setenv("POSTGRES_SCHEMA", "readings")
    own = Settings.load()
    assert (own.metrics_schema, own.dagster_database, own.dagster_schema) == ("readings", "metrics", "readings_dagster")


def test_overrides_are_producer_settings_only() -> None:
    assert producer_overrides(None) == {}
    assert producer_overrides(["PRODUCER_FLEET_SIZE=5", "producer_fleet_size=6"]) == {"producer_fleet_size": "6"}
    with pytest.raises(SettingError) as caught:
        producer_overrides(["POSTGRES_PORT=3"])
    assert (
        str(caught.value) == "--set POSTGRES_PORT=3: there is no producer setting 'POSTGRES_PORT'; see docs/settings.md"
    )


def test_data_folder_is_absolute_and_counts_from_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Settings.load().data_dir == (ROOT / ".local").resolve()
    monkeypatch.setenv("PIPELINE_DATA_DIR", str(tmp_path))
    assert Settings.load().data_dir == tmp_path.resolve()


def test_addresses_of_the_embedded_services_are_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.group("ports"):
        monkeypatch.setenv(name.upper(), str(20000 + len(name)))
    settings = Settings.load()
    for url in (settings.connect_rest, settings.producer_http, settings.dagster_http):
        assert urlsplit(url).hostname == "127.0.0.1"
    assert settings.bootstrap_servers == f"127.0.0.1:{settings.kafka_port}"
    assert settings.connect_rest.endswith(f":{settings.connect_port}")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("file", "is no folder"),
        ("file/below", "cannot be made: .*file is no folder"),
        ("some*", "must not hold any of"),
        ("a[1]", "must not hold any of"),
    ],
)
def test_a_bad_archive_is_named(value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("METRICS_ARCHIVE", str(tmp_path / value))
    with pytest.raises(SettingError, match=rf"^METRICS_ARCHIVE=.*{re.escape(value)}: {said}"):
        Settings.load()


def test_the_archive_may_be_a_folder_that_is_still_to_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().archive_path is None
    monkeypatch.setenv("METRICS_ARCHIVE", str(tmp_path / "some" / "where"))
    assert Settings.load().archive_path == tmp_path / "some" / "where"
    monkeypatch.setenv("METRICS_ARCHIVE", "archive")
    assert Settings.load().archive_path == workplace() / "archive"
