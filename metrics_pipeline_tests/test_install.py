"""What the Makefile installs with is immune to what pip and Python are told in general, but for where packages come from."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from metrics_pipeline.settings import ROOT

SCRIPT = ROOT / "requirements" / "pip.py"
CONF = """\
[global]
index-url = https://packages.example/simple
user = true
target = /elsewhere
require-virtualenv = true
quiet = 3
proxy = http://proxy.example:3128
[install]
extra-index-url =
    https://one.example/simple
    https://two.example/simple
no-binary = :all:
constraint = /nowhere
"""


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_pip", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(made: dict[str, str]) -> dict[str, str]:
    """What it would tell pip, beside what it always does."""
    fixed = {"PIP_CONFIG_FILE", "PIP_DISABLE_PIP_VERSION_CHECK"}
    return {name: value for name, value in made.items() if name.startswith("PIP_") and name not in fixed}


@pytest.fixture
def bare() -> dict[str, str]:
    """An environment that says nothing to pip; files of this machine may."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}


def test_files_say_where_packages_come_from_and_nothing_else(
    script: ModuleType, bare: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "pip.conf").write_text(CONF)
    before = options(script.environment(dict(bare)))
    made = options(script.environment(bare | {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}))
    assert made == before | {
        "PIP_INDEX_URL": "https://packages.example/simple",
        "PIP_PROXY": "http://proxy.example:3128",
        "PIP_EXTRA_INDEX_URL": made["PIP_EXTRA_INDEX_URL"],
    }
    assert made["PIP_EXTRA_INDEX_URL"].split() == ["https://one.example/simple", "https://two.example/simple"]


def test_variables_go_over_files(script: ModuleType, bare: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text(CONF)
    given = {
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "PIP_INDEX_URL": "https://mine.example", "PIP_CERT": "/cert.pem",
        "PIP_USER": "1", "PIP_TARGET": "/x", "PIP_PREFIX": "/x", "PIP_REQUIRE_HASHES": "1", "PIP_CONSTRAINT": "/nowhere",
        "PIP_DRY_RUN": "1", "PIP_REQUIRE_VIRTUALENV": "1", "PYTHONPATH": "/old", "VIRTUAL_ENV": "/other",
        "https_proxy": "http://proxy.example:3128",
    }  # fmt: skip
    made = script.environment(bare | given)
    assert made["PIP_INDEX_URL"] == "https://mine.example"
    assert made["PIP_CERT"] == "/cert.pem"
    assert made["https_proxy"] == "http://proxy.example:3128"
    names = {"PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_HASHES", "PIP_CONSTRAINT", "PIP_DRY_RUN"}
    assert not made.keys() & (names | {"PIP_REQUIRE_VIRTUALENV", "PYTHONPATH", "VIRTUAL_ENV"})


def test_a_package_lands_in_the_environment_whatever_pip_is_told(bare: dict[str, str], tmp_path: Path) -> None:
    """With pip itself, and a package of our own, so that nothing is fetched."""
    source = tmp_path / "source"
    (source / "a_test_package").mkdir(parents=True)
    (source / "a_test_package" / "__init__.py").touch()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "a-test-package"\nversion = "1"\n'
    )
    (tmp_path / "pip.conf").write_text("[global]\nuser = true\n[install]\nuser = true\ntarget = /nowhere/at/all\n")
    report = tmp_path / "report.json"
    hostile = {
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"),
        "PIP_USER": "1",
        "PIP_TARGET": "/x",
        "PIP_REQUIRE_HASHES": "1",
    }
    arguments = ["--quiet", "--no-deps", "--no-build-isolation", "--dry-run", "--report", str(report), str(source)]
    by_itself = [sys.executable, "-m", "pip", "install", *arguments]
    ours = [sys.executable, str(SCRIPT), "install", *arguments]
    assert subprocess.run(by_itself, env=bare | hostile, capture_output=True, check=False).returncode != 0
    done = subprocess.run(ours, env=bare | hostile, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [found["metadata"]["name"] for found in json.loads(report.read_text())["install"]] == ["a-test-package"]


@pytest.mark.parametrize(
    "name", ["PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "VIRTUAL_ENV"]
)
def test_make_hands_on_nothing_that_changes_an_interpreter(name: str, tmp_path: Path) -> None:
    """Its own recipe for the environment's shell, in a copy that only shows what it would get."""
    text = (ROOT / "Makefile").read_text("utf-8") + f"\nshown:\n\t@printf '%s' \"$${{{name}-unset}}\"\n"
    (tmp_path / "Makefile").write_text(text)
    done = subprocess.run(
        ["make", "-s", "-C", str(tmp_path), "shown"],
        env=dict(os.environ) | {name: "x"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "unset"


def test_everything_is_installed_that_way() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "-m pip" not in makefile
    assert makefile.count("$(PIP) install") == 3
