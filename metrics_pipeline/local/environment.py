"""The env file that the first `up` writes, and the environments of child processes and of isolated stacks."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dotenv import dotenv_values, set_key

from metrics_pipeline.dotenv_file import can_hold, written
from metrics_pipeline.errors import InstallError
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.settings import Settings, env_file
from metrics_pipeline.surroundings import for_children

SECRETS = tuple(name.upper() for name in Settings.group("secrets"))


def write_secrets() -> None:
    """Give each secret that neither the environment nor the env file sets a random value, in the env file (mode 0600).

    Raises:
        InstallError: the file cannot be written.
    """
    known = dotenv_values(env_file()) if env_file().exists() else {}
    missing = {name: secrets.token_urlsafe(24) for name in SECRETS if not (os.environ.get(name) or known.get(name))}
    remember(missing)


def remember(values: dict[str, str]) -> None:
    """Set variables in the env file, leaving the user's own lines alone.

    Raises:
        InstallError: the file cannot be written.
    """
    path = env_file()
    known = dotenv_values(path) if path.exists() else {}
    for name, value in values.items():
        if not can_hold(value):
            raise InstallError(
                f"{name} cannot be written to {path} so that everybody reads it as it is: choose another value"
            )
    try:
        path.touch(mode=0o600)
        path.chmod(0o600)
        for name, value in values.items():
            if known.get(name) != value:
                set_key(path, name, written(value), quote_mode="never")
        path.chmod(0o600)
    except OSError as error:
        raise InstallError(
            f"cannot write {path}: {error.strerror}; make the folder writable, or set PIPELINE_ENV_FILE to a file elsewhere"
        ) from error


def dagster_home(settings: Settings) -> Path:
    """Dagster's folder of this stack; its `dagster.yaml` is ours."""
    return settings.data_dir / "dagster_home"


def for_python(settings: Settings) -> dict[str, str]:
    """Environment of our own Python processes (Dagster's among them): ports, folders and numbers of parts as this stack chose them.

    Passwords are read from the env file, except the one in Dagster's own URL, which `dagster.yaml` refers to.
    """
    parts = {name.upper(): str(getattr(settings, name)) for name in ("kafka_brokers", "connect_workers")}
    ports = {name.upper(): str(getattr(settings, name)) for name in Settings.model_fields if name.endswith("_port")}
    return (
        for_children(os.environ, outside=bool(settings.postgres_url))
        | ports
        | parts
        | {
            "PIPELINE_ENV_FILE": str(env_file().absolute()),
            "PIPELINE_DATA_DIR": str(settings.data_dir),
            "DAGSTER_HOME": str(dagster_home(settings)),
            "DAGSTER_POSTGRES_URL": settings.dagster_postgres_url,
            "PYTHONUNBUFFERED": "1",
        }
    )


def isolated(folder: Path) -> dict[str, str]:
    """Variables of a stack that meets no other one: its env file and its data in this folder, every port free now."""
    names = [name.upper() for name in Settings.model_fields if name.endswith("_port")]
    ports = dict(zip(names, map(str, free_ports(len(names))), strict=True))
    return ports | {"PIPELINE_ENV_FILE": str(folder / "env"), "PIPELINE_DATA_DIR": str(folder / "data")}


@contextmanager
def replaced(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables instead of every setting in this process's environment, which comes back at the end.

    Only `PIPELINE_CACHE_DIR` stays: what was downloaded once serves every stack.
    """
    before = dict(os.environ)
    try:
        for name in Settings.model_fields:
            if name != "pipeline_cache_dir":
                os.environ.pop(name.upper(), None)
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def minimal() -> dict[str, str]:
    """Environment of processes that need nothing of the user's."""
    return {"PATH": os.defpath, "LANG": "C.UTF-8", "TZ": "UTC"}
