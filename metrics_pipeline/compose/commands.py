"""`metrics-pipeline container …`: what docker-compose.yaml runs. Nobody needs these by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metrics_pipeline.settings import Settings

container = typer.Typer(help="What the containers of docker-compose.yaml run.", no_args_is_help=True)


@container.command("secrets")
def share_secrets(
    directory: Annotated[Path, typer.Option("--directory", help="where the volumes are mounted")],
    check: Annotated[bool, typer.Option("--check", help="only say whether all are there")] = False,
) -> None:
    """Write random passwords once, and give each container those that it needs."""
    from metrics_pipeline.compose import secrets

    if check:
        raise typer.Exit(1 if secrets.missing(directory) else 0)
    new = secrets.share_out(directory)
    typer.echo(f"new: {', '.join(new)}" if new else "every secret is there")


@container.command("postgres-conf")
def postgres_conf(
    file: Annotated[Path, typer.Option("--file", help="what to write")],
    check: Annotated[bool, typer.Option("--check", help="only say whether it is there")] = False,
) -> None:
    """Write PostgreSQL's settings, sized by POSTGRES_MEMORY_GB."""
    from metrics_pipeline.local.budget import GIB, postgres_memory
    from metrics_pipeline.local.postgres import render, server_settings

    if check:
        raise typer.Exit(0 if file.is_file() else 1)
    settings = Settings.load()
    text = render(server_settings(postgres_memory(settings.postgres_memory_gb * GIB)) | CONTAINER)
    scratch = file.with_suffix(".tmp")
    scratch.write_text(f"include_if_exists = '{INITDB_CONF}'\n{text}", "utf-8")
    scratch.chmod(0o644)
    scratch.replace(file)
    typer.echo(f"wrote {file} for {settings.postgres_memory_gb} GiB")


INITDB_CONF = "/var/lib/postgresql/data/postgresql.conf"
"""What initdb wrote stands first, as in the embedded stack: locale and platform."""
CONTAINER = {"listen_addresses": "'*'", "port": "5432", "unix_socket_directories": "'/var/run/postgresql'"}
"""What differs from the embedded stack: where PostgreSQL listens."""


@container.command("databases")
def databases() -> None:
    """Make roles, databases and Dagster's tables."""
    from metrics_pipeline.compose.databases import prepare

    for line in prepare(Settings.load()):
        typer.echo(line)


@container.command("code")
def run_code() -> None:
    """Serve Dagster's definitions; ends the runs before itself."""
    from metrics_pipeline.compose import code

    raise typer.Exit(code.run(Settings.load()))


@container.command("fetch")
def fetch() -> None:
    """Fetch the locked jars of the Connect image."""
    from metrics_pipeline.compose import connect_worker

    connect_worker.fetch(Settings.load())


@container.command("connect")
def run_connect(
    jmx_port: Annotated[int, typer.Option("--jmx-port", help="where Prometheus finds the worker's figures")] = 9404,
) -> None:
    """Become a Kafka Connect worker."""
    from metrics_pipeline.compose import connect_worker

    connect_worker.run(Settings.load(), jmx_port=jmx_port)
