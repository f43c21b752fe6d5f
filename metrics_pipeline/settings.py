"""Every setting, once: the environment variable is the field's name in capitals.

Order of precedence: real environment (for secrets also a file that `X_PASSWORD_FILE` names), then the env file (`.env` in the checkout, without one in the current folder; or `PIPELINE_ENV_FILE`), then the default.
The tables of docs/settings.md and `.env.example` are tested against this file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote, urlsplit

from dotenv import dotenv_values
from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from metrics_pipeline.dotenv_file import problems
from metrics_pipeline.errors import SettingError
from metrics_pipeline.server_url import ServerUrl

_PACKAGE = Path(__file__).resolve().parent
CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "sql" / "migrations").is_dir() else None
"""The checkout that this package is part of; None when it was installed from a wheel."""
ROOT = CHECKOUT or _PACKAGE / "assets"
"""Where `sql/`, `connect/`, `dagster_home/` and `compose/jmx` stand: in the checkout, or in the package that a wheel installed."""

TOPIC = "metrics"
DEAD_LETTER_TOPIC = "metrics.dlq"
CONNECTOR = "metrics-postgres-sink"
CONNECTOR_GROUP = f"connect-{CONNECTOR}"
"""The consumer group that Kafka Connect derives from the connector's name."""
COPY_GROUP = "metrics-copy-sink"
"""The consumer group of the COPY sink's workers."""

SERVICE_URLS = {"postgres": "POSTGRES_URL", "kafka": "KAFKA_URL", "connect": "CONNECT_URL"}
"""Services that somebody else may run, and the variable that says where."""

Role = Literal["metrics_owner", "metrics_writer", "metrics_summarizer", "metrics_reader", "metrics_producer"]
"""The database roles; the superuser (`POSTGRES_USER`) only makes them."""

SinkKind = Literal["connect", "copy"]
"""Who stores the readings: Kafka Connect's connector, or the COPY sink."""

PartitionWidth = Literal["minute", "hour", "day", "month"]
"""How much time a partition of the table is for; a minute is for tests."""


def _is_postgres_url(url: str) -> str:
    if url:
        ServerUrl.parse(url, os.environ)
    return url


def _is_schema(name: str) -> str:
    # As PostgreSQL folds it, so that no program has to quote it; room for Dagster's beside it.
    if name and (not re.fullmatch(r"[a-z_][a-z0-9_]{0,47}", name) or name.startswith("pg_")):
        raise ValueError(
            "must be made of lower-case letters, digits and underscores, 48 at most, and not begin with pg_"
        )
    if name in ("public", "information_schema"):
        raise ValueError("must be a schema of the pipeline's own; without it, `public` is used")
    return name


def _is_archive(folder: Path | None) -> Path | None:
    # DuckDB and polars take these in a path for a pattern, and readers are told to use one.
    if set(str(folder or "")) & set("*?[]{}"):
        raise ValueError("must not hold any of *?[]{}, which readers of Parquet take for a pattern")
    if folder is None:
        return None
    path = workplace() / folder
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise ValueError("is no folder" if there == path else f"cannot be made: {there} is no folder")
    return folder


def _is_http_url(url: str) -> str:
    if url and urlsplit(url).scheme not in ("http", "https"):
        raise ValueError("must begin with http:// or https://")
    _check_port(url)
    return url.rstrip("/")


def _are_http_urls(urls: str) -> str:
    return ",".join(_is_http_url(url.strip()) for url in urls.split(","))


def _are_brokers(url: str) -> str:
    for broker in url.split(",") if url else ():
        if "://" in broker or not urlsplit(f"//{broker}").hostname or not _check_port(f"//{broker}"):
            raise ValueError("must be host:port, several of them separated by commas")
    return url


def _is_quorum(brokers: int) -> int:
    if brokers not in (1, 3):
        raise ValueError("must be 1 or 3: two brokers cannot lose one, and more gain nothing on one machine")
    return brokers


_UNITS_OF_TIME = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_UNITS_OF_SIZE = {
    f"{prefix}{kind}": base**power
    for power, prefix in enumerate("MGT", 2)
    for kind, base in (("B", 1000), ("iB", 1024))
}


def _amount(text: str, units: Mapping[str, int]) -> int:
    """A whole number with its unit, in the least of them."""
    found = re.fullmatch(r"(\d{1,9}) ?([A-Za-z]+)", text.strip())
    amount = int(found[1]) * units.get(found[2], 0) if found else 0
    if not amount:
        raise ValueError(f"must be a number with one of the units {', '.join(units)}")
    return amount


def _is_age(text: str) -> str:
    if text and _amount(text, _UNITS_OF_TIME) > 1000 * 366 * 86_400:
        raise ValueError("must be 1000 years at most")
    return text


def _is_size(text: str) -> str:
    if text:
        _amount(text, _UNITS_OF_SIZE)
    return text


def _check_port(url: str) -> int | None:
    try:
        return urlsplit(url).port
    except ValueError:
        # Python's own message would repeat what stands there, a password if it was written in the wrong place.
        raise ValueError("the port must be a number up to 65535") from None


Port = Annotated[int, Field(ge=1, le=65535)]
Positive = Annotated[int, Field(ge=1)]


def _setting(default: Any, description: str, group: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"group": group}, **limits)


class _SecretFiles(PydanticBaseSettingsSource):
    """Secrets out of files, as containers get them: `X_PASSWORD_FILE` names the file that holds `X_PASSWORD`."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        path = os.environ.get(f"{field_name.upper()}_FILE") if field.annotation is SecretStr else None
        if not path:
            return None, field_name, False
        try:
            return Path(path).read_text("utf-8").strip(), field_name, False
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise SettingError(
                f"{field_name.upper()}_FILE: cannot read {path}: {reason}; correct the path, or set {field_name.upper()}"
            ) from error

    def __call__(self) -> dict[str, Any]:
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value}


class ProducerSettings(BaseSettings):
    """What the producer publishes, and how fast. The Dagster job takes the same fields as its run config."""

    producer_queue_concurrency: Positive = _setting(8, "Kafka batches in flight (unacknowledged) at once", "producer")
    producer_min_metrics: Positive = _setting(2500, "fewest readings in a publish round", "producer")
    producer_max_metrics: Positive = _setting(7500, "most readings in a publish round", "producer")
    producer_min_devices: Positive = _setting(3, "fewest devices in a publish round", "producer")
    producer_max_devices: Positive = _setting(10, "most devices in a publish round", "producer")
    kafka_batch_size: Positive = _setting(250, "messages handed to the Kafka client at a time", "producer")
    kafka_max_in_flight: Annotated[int, Field(ge=1, le=5)] = _setting(
        5, "produce requests in flight on one connection (idempotence allows at most 5)", "producer"
    )
    producer_publish_interval: Annotated[int, Field(ge=0)] = _setting(
        250, "milliseconds between publish rounds; 0 publishes as fast as the broker acknowledges", "producer"
    )
    producer_fleet_size: Positive = _setting(50, "simulated devices there are, the same from run to run", "producer")
    producer_run_seconds: Positive = _setting(
        300, "seconds a producer run lasts before the next one starts", "producer"
    )
    producer_seed: int = _setting(1, "seed of the simulated fleet and its readings", "producer")
    producer_compression: Literal["lz4", "zstd", "none"] = _setting(
        "lz4", "compression of the message batches", "producer"
    )
    producer_flush_seconds: Positive = _setting(
        30, "seconds a stopping producer waits for outstanding acknowledgements", "producer"
    )
    producer_stall_seconds: Positive = _setting(
        15, "seconds without an acknowledgement after which `/health` answers 503", "producer"
    )
    producer_max_lag: Positive = _setting(
        20_000_000,
        "consumer lag in records at which the producer pauses, so that retention cannot overtake the sink",
        "producer",
    )

    @model_validator(mode="after")
    def _minimum_is_below_maximum(self) -> Self:
        for what in ("metrics", "devices"):
            low, high = getattr(self, f"producer_min_{what}"), getattr(self, f"producer_max_{what}")
            if low > high:
                raise ValueError(
                    f"PRODUCER_MIN_{what.upper()} is {low}, above PRODUCER_MAX_{what.upper()} ({high}): lower it or raise the other"
                )
        if self.producer_max_devices > self.producer_fleet_size:
            raise ValueError(
                f"PRODUCER_MAX_DEVICES is {self.producer_max_devices}, above PRODUCER_FLEET_SIZE ({self.producer_fleet_size}): "
                "lower it or raise the other"
            )
        return self


class Settings(ProducerSettings):
    """All settings of the pipeline."""

    # A URL may hold a password: no error, and no error's cause, repeats what was given.
    model_config = SettingsConfigDict(
        extra="ignore", env_ignore_empty=True, env_file_encoding="utf-8", hide_input_in_errors=True
    )

    topic_partitions_metrics: Positive = _setting(
        6, "partitions of the topic; growing an existing topic needs `provision` to be asked for it", "topic"
    )
    topic_refresh_seconds: Annotated[int, Field(ge=1)] = _setting(
        300,
        "seconds after which every producer knows of added partitions: the longest `metadata.max.age.ms` (Java) or "
        "`topic.metadata.refresh.interval.ms` (librdkafka) of yours, which both are 300 s if not set",
        "topic",
    )
    topic_replication_factor: Positive = _setting(
        1, "replicas of each partition; 3 when `KAFKA_BROKERS` is 3 and this is not set", "topic"
    )
    topic_retention_bytes: Annotated[int, Field(ge=64 * 2**20)] = _setting(
        10 * 2**30, "bytes the topic may hold, all partitions together; the oldest segments go first", "topic"
    )
    schema_registry_url: Annotated[str, AfterValidator(_is_http_url)] = _setting(
        "",
        "a schema registry (Confluent's API, which Redpanda has too) at which provisioning registers the JSON Schemas",
        "topic",
        repr=False,
    )

    sink: SinkKind = _setting(
        "connect", "who stores the readings: Kafka Connect's JDBC sink, or the native `copy` sink", "sink"
    )
    sink_quarantine: bool = _setting(
        True,
        "`on` or `off`: whether records that stop Kafka Connect are rejected, and those around them stored in its place",
        "sink",
    )
    sink_workers: Positive = _setting(2, "processes of the COPY sink on this machine", "sink")
    sink_flush_rows: Annotated[int, Field(ge=1, le=1_000_000)] = _setting(
        50_000, "records after which a worker of the COPY sink writes", "sink"
    )
    sink_flush_ms: Annotated[int, Field(ge=1, le=60_000)] = _setting(
        200, "milliseconds after which a worker of the COPY sink writes what it has", "sink"
    )
    sink_stall_seconds: Annotated[int, Field(ge=5, le=3600)] = _setting(
        75,
        "seconds without progress, with records waiting, after which a sink is stuck: it is named, and restarted",
        "sink",
    )
    sink_watch: bool = _setting(
        True,
        "whether what Kafka Connect reads is decoded strictly beside it, so that what it stores in another form is named and put right",
        "sink",
    )

    metrics_partition: PartitionWidth = _setting(
        "day",
        "`hour`, `day` or `month` (`minute` for tests): how much time a partition of the table is for; `hour` where a day's keys do not fit "
        "into memory and old partitions go",
        "table",
    )
    metrics_archive: Annotated[Path | None, AfterValidator(_is_archive)] = _setting(
        None,
        "a folder in which each partition that is closed is kept as Parquet, and before it is dropped; off while empty",
        "table",
    )
    metrics_retention: Annotated[str, AfterValidator(_is_age)] = _setting(
        "",
        "an age such as `90d` or `36h`: partitions whose readings were all taken before that are dropped; off while empty",
        "table",
    )
    metrics_retention_size: Annotated[str, AfterValidator(_is_size)] = _setting(
        "",
        "a size such as `500GB`: while all partitions with their indexes are larger, the oldest is dropped; off while empty",
        "table",
    )

    postgres_db: str = _setting("metrics", "database of the readings", "services")
    postgres_user: str = _setting("postgres", "superuser, used only to make roles and databases", "services")
    postgres_url: Annotated[str, AfterValidator(_is_postgres_url)] = _setting(
        "",
        "an existing PostgreSQL 17 or newer; set in the real environment, none is started",
        "services",
        repr=False,
    )
    postgres_schema: Annotated[str, AfterValidator(_is_schema)] = _setting(
        "",
        "schema of everything that is the pipeline's, with Dagster's tables in `NAME_dagster` beside it; "
        "default: `public`, and a database `dagster`",
        "services",
    )
    kafka_url: Annotated[str, AfterValidator(_are_brokers)] = _setting(
        "", "an existing broker, host:port[,host:port…]; set in the real environment, none is started", "services"
    )
    connect_url: Annotated[str, AfterValidator(_are_http_urls)] = _setting(
        "",
        "an existing Kafka Connect (4.2 or newer), http://host:port[,http://host:port…]; set in the real environment, "
        "none is started",
        "services",
    )

    postgres_port: Port = _setting(5432, "PostgreSQL", "ports")
    kafka_port: Port = _setting(19092, "broker", "ports")
    kafka_controller_port: Port = _setting(19093, "the broker's KRaft controller", "ports")
    kafka_2_port: Port = _setting(19094, "second broker, when there are three", "ports")
    kafka_2_controller_port: Port = _setting(19095, "its KRaft controller", "ports")
    kafka_3_port: Port = _setting(19096, "third broker", "ports")
    kafka_3_controller_port: Port = _setting(19097, "its KRaft controller", "ports")
    connect_port: Port = _setting(8083, "Kafka Connect REST", "ports")
    connect_2_port: Port = _setting(8084, "second Connect worker, when there are two", "ports")
    connect_3_port: Port = _setting(8085, "third Connect worker", "ports")
    producer_port: Port = _setting(3000, "producer's `/health` and `/metrics`", "ports")
    sink_port: Port = _setting(3002, "COPY sink's `/health` and `/metrics`", "ports")
    dagster_port: Port = _setting(3070, "Dagster UI", "ports")
    dagster_code_port: Port = _setting(3071, "Dagster code server (gRPC)", "ports")
    exporter_port: Port = _setting(9187, "exporter's `/metrics` and `/health`", "ports")

    listen_host: str = _setting(
        "127.0.0.1",
        "address on which producer, COPY sink and exporter listen; another one only inside a container",
        "compose",
    )
    dagster_url: Annotated[str, AfterValidator(_is_http_url)] = _setting(
        "", "where a container finds the Dagster UI; compose sets it", "compose"
    )
    pipeline_image: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._/:-]*$")] = _setting(
        "metrics-pipeline",
        "our images' name without tag and `-connect`; of published ones, with the registry",
        "compose",
    )
    console_port: Port = _setting(9090, "Redpanda Console", "compose")
    pgadmin_port: Port = _setting(8000, "pgAdmin", "compose")
    redpanda_admin_port: Port = _setting(9644, "Redpanda's admin API and metrics", "compose")
    schema_registry_port: Port = _setting(8081, "Redpanda's schema registry", "compose")
    prometheus_port: Port = _setting(9091, "Prometheus, profile `obs`", "compose")
    grafana_port: Port = _setting(3001, "Grafana, profile `obs`", "compose")
    sink_ports: Annotated[str, Field(pattern=r"^[0-9]+-[0-9]+$")] = _setting(
        "3002-3011", "COPY sinks, profile `copy`: each container takes a free one of these", "compose"
    )
    postgres_memory_gb: Positive = _setting(
        4, "GiB of PostgreSQL's container; its memory settings are sized by it", "compose"
    )
    redpanda_memory_gb: Positive = _setting(2, "GiB of each Redpanda container; four fifths are Redpanda's", "compose")
    redpanda_cores: Positive = _setting(1, "cores that each Redpanda uses", "compose")
    connect_memory_gb: Positive = _setting(2, "GiB of each Kafka Connect container; half is the JVM's heap", "compose")

    kafka_brokers: Annotated[int, AfterValidator(_is_quorum)] = _setting(
        1, "brokers of the embedded stack, 1 or 3; three of them keep each record three times", "stack"
    )
    connect_workers: Annotated[int, Field(ge=1, le=3)] = _setting(
        1, "Kafka Connect workers of the embedded stack, 1 to 3, in one group", "stack"
    )
    exporter: bool = _setting(
        False, "whether the embedded stack runs `metrics-pipeline exporter` (about 80 MB of memory)", "stack"
    )
    pipeline_data_dir: Path = _setting(Path(".local"), "where the embedded stack keeps its data and logs", "stack")
    pipeline_cache_dir: Path | None = _setting(
        None, "where downloaded jars are kept; default: the user's cache folder", "stack"
    )
    pipeline_memory_gb: Annotated[float, Field(gt=0)] | None = _setting(
        None, "memory budget in GiB; default: what this process may use (cgroup limit included)", "stack"
    )
    disk_free_limit_gb: Annotated[float, Field(ge=0)] = _setting(
        5.0, "GiB of free disk below which the producer stops", "stack"
    )

    replay_folder: Path | None = _setting(
        None,
        "a folder whose new files are replayed, each once, and moved to `done` or `failed` in it; off while empty",
        "replay",
    )
    replay_recipe: str = _setting(
        "", "the recipe for them: a preset's name, or the path of a recipe file; default: what fits by itself", "replay"
    )
    replay_on_error: Literal["stop", "skip"] = _setting(
        "stop",
        "when a line of such a file is bad: `stop` publishes nothing of it, `skip` leaves the line out",
        "replay",
    )

    throughput_floor: Annotated[float, Field(ge=0)] = _setting(
        1.0, "stored rows/s below which the `throughput` check fails while the producer runs", "monitoring"
    )
    lag_limit: Positive = _setting(200_000, "consumer lag in records above which `consumer_lag` fails", "monitoring")
    freshness_limit_seconds: Positive = _setting(
        60, "age of the newest row above which `freshness` fails while the producer runs", "monitoring"
    )
    run_retention_hours: Positive = _setting(
        24, "hours that Dagster's runs and their logs are kept, and the producers' runs at least", "monitoring"
    )

    postgres_password: SecretStr = _setting(SecretStr(""), "of the superuser", "secrets")
    metrics_owner_password: SecretStr = _setting(
        SecretStr(""), "of the role that owns the tables and runs migrations", "secrets"
    )
    metrics_writer_password: SecretStr = _setting(SecretStr(""), "of the sinks' role", "secrets")
    metrics_summarizer_password: SecretStr = _setting(SecretStr(""), "of the role that writes summaries", "secrets")
    metrics_reader_password: SecretStr = _setting(SecretStr(""), "of the read-only role", "secrets")
    metrics_producer_password: SecretStr = _setting(
        SecretStr(""), "of the producer's role (its lock and its ledger)", "secrets"
    )
    dagster_password: SecretStr = _setting(SecretStr(""), "of Dagster's own database", "secrets")

    @model_validator(mode="after")
    def _a_cluster_replicates(self) -> Self:
        if "topic_replication_factor" not in self.model_fields_set:
            self.topic_replication_factor = self.kafka_brokers
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the real environment, then the files it names, then the env file."""
        del file_secret_settings
        return init_settings, env_settings, _SecretFiles(settings_cls), dotenv_settings

    @classmethod
    def group(cls, name: str) -> list[str]:
        """Names of the settings of one group (`producer`, `topic`, `sink`, `services`, `ports`, `stack`, `replay`, `monitoring`, `secrets`)."""
        extras = {field: info.json_schema_extra for field, info in cls.model_fields.items()}
        return [field for field, extra in extras.items() if isinstance(extra, dict) and extra.get("group") == name]

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """Read the environment and the env file.

        Raises:
            SettingError: naming each bad setting and what is wrong with it.
        """
        _refuse_services_in(env_file())
        try:
            return cls(_env_file=env_file(), **overrides)
        except ValidationError as error:
            raise SettingError(explain(error)) from error

    @property
    def data_dir(self) -> Path:
        """The data folder, absolute; a relative setting counts from the workplace."""
        return (workplace() / self.pipeline_data_dir).resolve()

    @property
    def replay_path(self) -> Path | None:
        """The folder of files to replay, absolute; a relative setting counts from the workplace."""
        return None if self.replay_folder is None else (workplace() / self.replay_folder).resolve()

    @property
    def retention_age(self) -> timedelta | None:
        """How old readings become; None: as old as they like."""
        return timedelta(seconds=_amount(self.metrics_retention, _UNITS_OF_TIME)) if self.metrics_retention else None

    @property
    def retention_bytes(self) -> int | None:
        """How large the table may become, with its indexes; None: as large as it likes."""
        return _amount(self.metrics_retention_size, _UNITS_OF_SIZE) if self.metrics_retention_size else None

    @property
    def archive_path(self) -> Path | None:
        """The folder of the archive, absolute; a relative setting counts from the workplace."""
        return None if self.metrics_archive is None else (workplace() / self.metrics_archive).resolve()

    @property
    def bootstrap_servers(self) -> str:
        """What Kafka clients connect to."""
        return self.kafka_url or ",".join(f"127.0.0.1:{port}" for port, _ in self.broker_ports)

    @property
    def broker_ports(self) -> list[tuple[int, int]]:
        """Port and controller's port of each embedded broker; the first is node 1."""
        ports = [
            (self.kafka_port, self.kafka_controller_port),
            (self.kafka_2_port, self.kafka_2_controller_port),
            (self.kafka_3_port, self.kafka_3_controller_port),
        ]
        return ports[: self.kafka_brokers]

    @property
    def connect_rest(self) -> str:
        """Base URL of Kafka Connect's REST API (the first worker's), without a trailing slash."""
        return self.connect_urls[0]

    @property
    def connect_urls(self) -> tuple[str, ...]:
        """Base URL of each Connect worker's REST API; any of them answers for the group."""
        if self.connect_url:
            return tuple(self.connect_url.split(","))
        ports = (self.connect_port, self.connect_2_port, self.connect_3_port)
        return tuple(f"http://127.0.0.1:{port}" for port in ports[: self.connect_workers])

    @property
    def producer_http(self) -> str:
        """Base URL of the producer's health and metrics endpoints."""
        return f"http://127.0.0.1:{self.producer_port}"

    @property
    def sink_http(self) -> str:
        """Base URL of the COPY sink's health and metrics endpoints."""
        return f"http://127.0.0.1:{self.sink_port}"

    @property
    def exporter_http(self) -> str:
        """Base URL of the exporter."""
        return f"http://127.0.0.1:{self.exporter_port}"

    @property
    def dagster_http(self) -> str:
        """Base URL of the Dagster UI."""
        return self.dagster_url or f"http://127.0.0.1:{self.dagster_port}"

    @property
    def postgres_server(self) -> ServerUrl:
        """Where PostgreSQL is, for every program that opens a session there."""
        if self.postgres_url:
            return ServerUrl.parse(self.postgres_url, os.environ)
        return ServerUrl("127.0.0.1", self.postgres_port)

    @property
    def postgres_host(self) -> str:
        """Host of PostgreSQL."""
        return self.postgres_server.host

    @property
    def postgres_host_port(self) -> int:
        """Port of PostgreSQL."""
        return self.postgres_server.port

    @property
    def metrics_database(self) -> str:
        """Name of the database of the readings: the URL's, when one is set."""
        return self.postgres_server.database or self.postgres_db

    @property
    def metrics_schema(self) -> str:
        """Schema of everything of ours in that database."""
        return self.postgres_schema or "public"

    @property
    def dagster_database(self) -> str:
        """Name of the database of Dagster's tables."""
        return self.metrics_database if self.postgres_schema else "dagster"

    @property
    def dagster_schema(self) -> str:
        """Schema of Dagster's tables."""
        return f"{self.postgres_schema}_dagster" if self.postgres_schema else "public"

    def role_url(self, role: Role) -> str:
        """`postgresql://` URL of a role, password included: hand it to clients, never to a log."""
        return self._url(role, getattr(self, f"{role}_password"), self.metrics_database)

    @property
    def admin_user(self) -> str:
        """Who makes roles and databases: the superuser, or the role that `POSTGRES_URL` names."""
        return self.postgres_server.user or self.postgres_user

    def admin_url(self, database: str = "postgres") -> str:
        """`postgresql://` URL of the superuser, or of the role that `POSTGRES_URL` names.

        That role's password is `POSTGRES_PASSWORD` when the URL has none.
        """
        given = self.postgres_server.password
        return self._url(self.admin_user, SecretStr(given) if given else self.postgres_password, database)

    @property
    def dagster_postgres_url(self) -> str:
        """`postgresql://` URL of Dagster's own database; its storage reads there in which schema it is."""
        url = self._url("dagster", self.dagster_password, self.dagster_database)
        if not self.postgres_schema:
            return url
        return f"{url}{'&' if '?' in url else '?'}options={quote(f'-c search_path={self.dagster_schema}')}"

    def _url(self, user: str, password: SecretStr, database: str) -> str:
        return self.postgres_server.url(user, password.get_secret_value(), database)


def producer_overrides(assignments: Sequence[str] | None, see: str = "docs/settings.md") -> dict[str, Any]:
    """Producer settings out of `NAME=VALUE`, by field name, for `Settings.load`, which checks the values.

    Args:
        assignments: what `--set` was given; the last one of a name counts.
        see: where the error says that the names are to be found.

    Raises:
        SettingError: there is no such producer setting.
    """
    overrides = {}
    for assignment in assignments or ():
        name, _, value = assignment.partition("=")
        if name.lower() not in ProducerSettings.model_fields:
            raise SettingError(f"--set {assignment}: there is no producer setting {name!r}; see {see}")
        overrides[name.lower()] = value
    return overrides


_IN_ENV_FILE = frozenset(name.upper() for name in Settings.model_fields) | {"DAGSTER_HOME", "DAGSTER_POSTGRES_URL"}


def workplace() -> Path:
    """Where `.env` and the data stand unless a setting says otherwise: the checkout, or the folder one is in."""
    return CHECKOUT or Path.cwd()


def env_file() -> Path:
    """The file that holds what `up` generated and what the user set for good."""
    return Path(os.environ.get("PIPELINE_ENV_FILE") or workplace() / ".env")


def _refuse_services_in(path: Path) -> None:
    """A URL there would be met by clients, while `up`, which looks at the environment, starts a service of its own.

    Nor may a setting of ours stand there in a way that the embedded stack and the containers would read differently.
    """
    try:
        known = dotenv_values(path) if path.is_file() else {}
        unclear = problems(path, _IN_ENV_FILE) if known or path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingError(
            f"cannot read {path}: {reason}; run as the user who owns it, or set PIPELINE_ENV_FILE to a file of your own"
        ) from error
    if unclear:
        raise SettingError("; ".join(unclear))
    for name in SERVICE_URLS.values():
        if known.get(name):
            raise SettingError(
                f"{name} stands in {path}, which is the embedded stack's own file: "
                "to use a service that exists, set it in the environment (`export`) and remove it there"
            )


def explain(error: ValidationError) -> str:
    """One line per bad setting: its name, the value given (secrets left out) and the reason."""
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        name = "_".join(str(part) for part in problem["loc"]).upper()
        reason = problem["msg"].removeprefix("Value error, ")
        if not name:
            lines.append(reason)
        elif "PASSWORD" in name or "URL" in name:
            lines.append(f"{name}: {reason}")
        else:
            lines.append(f"{name}={problem['input']!s}: {reason}")
    return "; ".join(lines)


def external_services() -> frozenset[str]:
    """Which of postgres, kafka and connect the real environment points elsewhere. The env file never does: it is ours."""
    return frozenset(name for name, variable in SERVICE_URLS.items() if os.environ.get(variable))
