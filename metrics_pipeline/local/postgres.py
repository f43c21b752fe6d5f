"""The embedded PostgreSQL 17: its cluster, its configuration, its process."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from metrics_pipeline import postgres as database
from metrics_pipeline.data_folder import cluster_name, folder_id
from metrics_pipeline.errors import InstallError, PipelineError
from metrics_pipeline.local.account import Account, claim_home, unprivileged
from metrics_pipeline.local.budget import Budget
from metrics_pipeline.local.environment import minimal
from metrics_pipeline.local.jars import postgres_tree, unpack_postgres
from metrics_pipeline.local.service import Service
from metrics_pipeline.settings import Settings

CONFIGURATION = "metrics-pipeline.conf"


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where PostgreSQL's files lie.

    Attributes:
        home: folder of everything below.
        binaries: folder of `postgres`, `pg_ctl` and `initdb`.
        data: the cluster (`PGDATA`).
        account: who owns it, when that is not the user of this process.
    """

    home: Path
    binaries: Path
    data: Path
    account: Account | None


def cluster(settings: Settings, archive: Path | None) -> Cluster:
    """Unpack the binaries if need be and say where everything is; without an archive, only say where."""
    account = unprivileged()
    home = claim_home(settings.data_dir, account)
    binaries = postgres_tree(home) if archive is None else unpack_postgres(archive, home)
    return Cluster(home, binaries / "bin", home / "data", account)


def configuration(settings: Settings, budget: Budget) -> dict[str, str]:
    """Every PostgreSQL setting that differs from the default."""
    place = {
        "listen_addresses": "'127.0.0.1'",
        "port": str(settings.postgres_port),
        "unix_socket_directories": "''",
    }
    if identity := folder_id(settings):
        place["cluster_name"] = f"'{cluster_name(identity)}'"  # by which a session knows where it is
    return place | server_settings(budget.postgres)


def render(values: Mapping[str, str]) -> str:
    """Settings as a configuration file."""
    lines = [f"{name} = {value}\n" for name, value in values.items()]
    return "".join(["# Written at every start; change settings, not this file.\n", *lines])


def server_settings(memory: Mapping[str, str]) -> dict[str, str]:
    """The settings that every stack has, embedded or in containers. Durability settings stay on."""
    return {
        "password_encryption": "'scram-sha-256'",
        "max_connections": "100",
        # A query that says no time locks each partition and its two indexes.
        "max_locks_per_transaction": "256",
        **memory,
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "data_sync_retry": "off",
        "timezone": "'UTC'",
        "log_timezone": "'UTC'",
        "log_checkpoints": "on",
        "log_line_prefix": "'%m [%p] %q%u@%d %a '",
        # A parameter may be a reading, a statement may hold a password: neither belongs into a log.
        "log_parameter_max_length_on_error": "0",
        "log_min_error_statement": "panic",
        # The table only grows: vacuum by inserts keeps the visibility map and BRIN summaries current.
        "autovacuum_vacuum_insert_scale_factor": "0.05",
        "random_page_cost": "1.1",
        "max_parallel_workers_per_gather": "2",
    }


def server_problem(settings: Settings) -> str | None:
    """None when PostgreSQL lets the superuser in (or whom `POSTGRES_URL` names), and is the one that is meant; else why not."""
    try:
        database.admin_somewhere(settings, connect_timeout=3).close()
    except PipelineError as error:
        return str(error)
    return None


def service(settings: Settings, budget: Budget, place: Cluster) -> Service:
    """PostgreSQL as a child of the keeper."""

    def prepare() -> None:
        if not (place.data / "PG_VERSION").exists():
            _initialise(settings, place)
        _write(place, place.data / CONFIGURATION, render(configuration(settings, budget)))

    def find() -> psutil.Process | None:
        # Also the way to a postmaster that somebody restarted by `pg_ctl`.
        try:
            pid = int((place.data / "postmaster.pid").read_text().split("\n", 1)[0])
            process = psutil.Process(pid)
            if process.name().startswith("postgres") and str(place.data) in " ".join(process.cmdline()):
                return process
        except (OSError, ValueError, psutil.Error):
            pass
        return None

    def check() -> str | None:
        return server_problem(settings)

    return Service(
        name="postgres",
        title="PostgreSQL",
        url=f"postgresql://127.0.0.1:{settings.postgres_port}/{settings.postgres_db}",
        command=[str(place.binaries / "postgres"), "-D", str(place.data)],
        environment=minimal(),
        log=settings.data_dir / "logs" / "postgres.log",
        check=check,
        prepare=prepare,
        find=find,
        account=place.account,
        # "Fast" shutdown: sessions are ended, the checkpoint is written.
        stop_signal=signal.SIGINT,
        stop_seconds=60,
        start_seconds=300,  # crash recovery may have gigabytes of WAL to read
    )


def _initialise(settings: Settings, place: Cluster) -> None:
    place.data.mkdir(parents=True, exist_ok=True)
    if any(place.data.iterdir()):
        raise InstallError(
            f"{place.data} is no PostgreSQL cluster and not empty: move it away, or run `metrics-pipeline reset`"
        )
    who = place.account.as_arguments() if place.account else {}
    with tempfile.NamedTemporaryFile("w", dir=place.home) as password:
        password.write(settings.postgres_password.get_secret_value() + "\n")
        password.flush()
        if place.account:
            place.account.own(place.data, 0o700)
            place.account.own(Path(password.name), 0o400)
        command = [str(place.binaries / "initdb"), "-D", str(place.data), "-U", settings.postgres_user]
        command += [
            "--auth=scram-sha-256",
            f"--pwfile={password.name}",
            "--data-checksums",
            "--encoding=UTF8",
            "--no-locale",
        ]
        done = subprocess.run(command, env=minimal(), cwd="/", capture_output=True, text=True, check=False, **who)
    if done.returncode != 0:
        raise InstallError(f"initdb failed in {place.data}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    main = place.data / "postgresql.conf"
    _write(place, main, main.read_text() + f"\ninclude_if_exists = '{CONFIGURATION}'\n")


def _write(place: Cluster, path: Path, text: str) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    if place.account:
        place.account.own(scratch, 0o600)
    scratch.replace(path)
