"""Dagster's `dg` in a clean checkout: it finds the definitions, leaves nothing behind and tells nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dagster._cli.workspace.cli_target import workspace_opts_to_load_target
from dagster_shared.cli import WorkspaceOpts

from metrics_pipeline.definitions import defs
from metrics_pipeline.local.dagster import DEFINITIONS, LOCATION
from metrics_pipeline.settings import ROOT
from metrics_pipeline_tests.clean_checkout import CleanCheckout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> CleanCheckout:
    return CleanCheckout.make(tmp_path_factory.mktemp("dg"))


def in_silence(checkout: CleanCheckout, arguments: str) -> str:
    """What `dg` prints, which is no warning, when it leaves no file behind and asks nobody."""
    before = checkout.files()
    ended = checkout.dg(arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    assert checkout.files() == before
    assert checkout.contacted == []
    return ended.stdout


def test_check_defs(checkout: CleanCheckout) -> None:
    assert in_silence(checkout, "check defs").splitlines() == [
        "All component YAML validated successfully.",
        "All definitions loaded successfully.",
    ]


def test_check_defs_sees_what_does_not_load(tmp_path: Path) -> None:
    broken = CleanCheckout.make(tmp_path)
    module = broken.folder / "metrics_pipeline" / "definitions.py"
    module.write_text(module.read_text("utf-8") + "\nassert not defs.sensors, 'planted'\n", "utf-8")
    ended = broken.dg("check defs")
    assert ended.returncode != 0
    assert "planted" in ended.stdout + ended.stderr


def test_check_toml(checkout: CleanCheckout) -> None:
    assert "All TOML configuration files are valid." in in_silence(checkout, "check toml")


def test_list_defs_names_all_that_is_defined(checkout: CleanCheckout) -> None:
    listed = json.loads(in_silence(checkout, "list defs --json"))
    names = {
        kind: {item["asset_key"] if kind == "assets" else item.get("key") or item["name"] for item in listed[kind]}
        for kind in listed
    }
    graph = defs.resolve_asset_graph()
    assert names == {
        "assets": {key.to_user_string() for key in graph.get_all_asset_keys()},
        "asset_checks": {key.to_user_string() for key in graph.asset_check_keys},
        "jobs": {job.name for job in defs.resolve_all_job_defs() if not job.name.startswith("__")},
        "schedules": {schedule.name for schedule in defs.schedules or []},
        "sensors": {sensor.name for sensor in defs.sensors or []},
        "resources": set(defs.resources or {}),
    }


@pytest.mark.parametrize("options", [WorkspaceOpts(), WorkspaceOpts(workspace=[str(ROOT / "workspace.yaml")])])
def test_pyproject_and_workspace_name_the_location_that_up_serves(
    options: WorkspaceOpts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster's own commands take pyproject.toml, and workspace.yaml where it is named."""
    monkeypatch.chdir(ROOT)
    (origin,) = workspace_opts_to_load_target(options).create_origins()
    assert (origin.location_name, origin.loadable_target_origin.module_name) == (LOCATION, DEFINITIONS)


def test_a_word_to_the_network_would_be_seen(tmp_path: Path) -> None:
    checkout = CleanCheckout.make(tmp_path)
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **checkout.environment}, check=False)
    assert checkout.contacted == ["-c connect 192.0.2.1"]
