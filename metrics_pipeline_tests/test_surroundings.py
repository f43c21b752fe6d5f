"""Variables that programs obey unasked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from metrics_pipeline.settings import ROOT, Settings
from metrics_pipeline.surroundings import (
    LIBPQ,
    TRUST,
    for_children,
    forget_libpq,
    is_beside_us,
    is_loopback,
    needs_another_interpreter,
    without_local_proxy,
    without_python,
)


def test_every_variable_of_libpq_is_known() -> None:
    known = {default.envvar.decode() for default in psycopg.pq.Conninfo.get_defaults() if default.envvar}
    assert known <= LIBPQ
    # These are read without being a default of a parameter.
    assert {"PGTZ", "PGDATESTYLE", "PGGEQO", "PGSERVICEFILE", "PGSYSCONFDIR", "PGLOCALEDIR", "PGREQUIRESSL"} <= LIBPQ
    assert not LIBPQ & {name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("outside", [False, True])
def test_what_libpq_is_told_by_the_shell_is_forgotten(outside: bool) -> None:
    environment = dict.fromkeys(LIBPQ, "x") | {"PGADMIN_PORT": "1", "PATH": "/bin"}
    forget_libpq(environment, outside=outside)
    left = TRUST if outside else frozenset()
    assert environment == dict.fromkeys(left, "x") | {"PGADMIN_PORT": "1", "PATH": "/bin"}


def test_how_an_outside_server_is_trusted_is_the_users_to_say_and_nothing_else() -> None:
    assert {"PGSSLMODE", "PGSSLROOTCERT", "PGPASSFILE", "PGCHANNELBINDING", "PGREQUIREAUTH"} <= TRUST
    where = {
        "PGHOST",
        "PGHOSTADDR",
        "PGPORT",
        "PGUSER",
        "PGDATABASE",
        "PGSERVICE",
        "PGSERVICEFILE",
        "PGOPTIONS",
        "PGTZ",
    }
    assert not TRUST & (where | {"PGDATESTYLE", "PGCLIENTENCODING", "PGTARGETSESSIONATTRS", "PGLOADBALANCEHOSTS"})


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.2", "127.255.255.254", "::1", "[::1]", "localhost", "LOCALHOST.", "a.localhost", "0.0.0.0",
     "::ffff:127.0.0.1", "::ffff:7f00:2"],
)  # fmt: skip
def test_what_is_on_this_machine(host: str) -> None:
    assert is_loopback(host)
    assert is_beside_us(f"http://{f'[{host}]' if ':' in host and '[' not in host else host}:80/x")


@pytest.mark.parametrize("host", ["192.0.2.1", "connect", "localhost.example.org", "127.0.0.1.example.org", "::2", ""])
def test_what_is_not(host: str) -> None:
    assert not is_loopback(host)


def test_children_get_the_users_variables_and_none_that_changes_their_work() -> None:
    harmless = {
        "PATH": "/bin",
        "HOME": "/root",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PGADMIN_PORT": "8000",
        "AWS_REGION": "x",
    }
    given = harmless | {
        "PYTHONPATH": "/old/numpy", "PYTHONHOME": "/usr", "PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error", "PYTHONSTARTUP": "x",
        "VIRTUAL_ENV": "/other", "PIP_USER": "1", "PIP_TARGET": "/x", "PGOPTIONS": "-c x=y",
        "PGSERVICE": "x",
    }  # fmt: skip
    assert for_children(given, outside=False) == harmless
    assert without_python({"PYTHON_FROM_TOMORROW": "1"}) == {}


def test_what_is_on_this_machine_goes_through_no_proxy_whatever_the_user_excepted() -> None:
    assert without_local_proxy({"PATH": "/bin"}) == {}
    changed = without_local_proxy({"http_proxy": "http://proxy:1", "no_proxy": "intern.example, 10.0.0.0/8"})
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        assert changed[name].split(",")[:2] == ["intern.example", "10.0.0.0/8"]
        assert {"127.0.0.1", "localhost", "::1"} <= set(changed[name].split(","))
    assert without_local_proxy({"grpc_proxy": "http://proxy:1"})["no_grpc_proxy"].startswith("127.")
    assert without_local_proxy({"HTTPS_PROXY": "x", "NO_PROXY": "*"})["no_proxy"] == "*"
    assert changed == without_local_proxy(changed | {"http_proxy": "http://proxy:1"}), "again it changes nothing"


@pytest.mark.parametrize("name", ["PYTHONPATH", "PYTHONOPTIMIZE", "PYTHONWARNINGS"])
def test_what_has_changed_the_interpreter_calls_for_another_one(name: str, tmp_path: Path) -> None:
    assert needs_another_interpreter({name: str(tmp_path)}, ROOT / "metrics_pipeline")
    assert not needs_another_interpreter({name: ""}, ROOT / "metrics_pipeline")
    assert not needs_another_interpreter({"PATH": "/bin"}, ROOT / "metrics_pipeline")


def test_a_path_by_which_the_package_itself_is_found_stays() -> None:
    assert not needs_another_interpreter({"PYTHONPATH": f"/x:{ROOT}"}, ROOT / "metrics_pipeline")


@pytest.mark.parametrize("name", ["pydantic", "numpy", "typer"])
def test_a_command_is_immune_to_older_packages_on_the_path_and_to_warnings(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("raise ImportError('too old')")
    hostile = {
        "PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2", "PYTHONSTARTUP": "/nowhere",
        "PYTHONDONTWRITEBYTECODE": "1", "VIRTUAL_ENV": "/nowhere", "PYTHONINSPECT": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "metrics_pipeline", "sql", "--help"]
    done = subprocess.run(
        command, env=dict(os.environ) | hostile, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Run a query as the read-only role" in done.stdout
