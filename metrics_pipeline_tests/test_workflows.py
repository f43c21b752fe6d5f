"""The public CI and the release: valid by schema, on the Pythons that the project names, with no more rights than needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from metrics_pipeline.settings import ROOT
from metrics_pipeline_tests.compose_files import FILES, project

WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHON = "Programming Language :: Python :: "


def jobs(name: str) -> dict[str, Any]:
    """The jobs of a workflow."""
    return dict(yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yaml").read_text("utf-8"))["jobs"])


def pythons() -> list[str]:
    """The minor versions that the classifiers name, oldest first."""
    found = [text.removeprefix(PYTHON) for text in PROJECT["classifiers"] if re.fullmatch(rf"{PYTHON}3\.\d+", text)]
    return sorted(found, key=lambda version: int(version.partition(".")[2]))


def step(name: str) -> str:
    """The script of a named step of the release."""
    (found,) = [step["run"] for job in jobs("release").values() for step in job["steps"] if step.get("name") == name]
    return str(found)


def test_there_are_three() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yaml", "compose.yaml", "release.yaml"]


def valid(file: Path, schema: str = "vendor.github-workflows") -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("check-jsonschema")
    return subprocess.run([tool, "--builtin-schema", schema, file], capture_output=True, text=True, check=False)


def test_each_is_what_the_schema_says() -> None:
    for path in WORKFLOWS:
        assert valid(path).returncode == 0, valid(path).stdout


def test_the_bot_that_pins_images_is_told_so_by_its_schema_and_finds_every_file() -> None:
    file = ROOT / ".github" / "renovate.json"
    assert valid(file, "vendor.renovate").returncode == 0, valid(file, "vendor.renovate").stdout
    told = json.loads(file.read_text("utf-8"))
    assert "docker:pinDigests" in told["extends"]
    patterns = [pattern.strip("/") for pattern in told["docker-compose"]["managerFilePatterns"]]
    for path in FILES:
        assert any(re.search(pattern, path.relative_to(ROOT).as_posix()) for pattern in patterns), path


def test_the_schema_would_refuse_a_wrong_one(tmp_path: Path) -> None:
    wrong = tmp_path / "ci.yaml"
    wrong.write_text((ROOT / ".github/workflows/ci.yaml").read_text("utf-8").replace("runs-on:", "runs_on:"), "utf-8")
    assert "runs_on" in valid(wrong).stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_each_says_what_it_may_and_when_it_ends(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert set(workflow["permissions"].items()) <= {("contents", "read")}
    assert workflow["concurrency"]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        for each in job["steps"]:
            if each.get("uses", "").startswith("actions/checkout@"):
                assert each["with"]["persist-credentials"] is False, name


def test_every_action_is_pinned_by_commit_with_its_version_beside_it() -> None:
    seen: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for line in path.read_text("utf-8").splitlines():
            if "uses:" in line:
                action = re.fullmatch(r"\s*(?:- )?uses: ([\w./-]+)@([0-9a-f]{40}  # v\d+\.\d+\.\d+)", line)
                assert action, f"{path.name}: {line}"
                seen.setdefault(action[1], set()).add(action[2])
    assert seen
    for name, pins in seen.items():
        assert len(pins) == 1, f"{name} differs between workflows"


def test_classifiers_name_what_requires_python_admits() -> None:
    found = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"])
    assert found
    assert pythons() == [f"3.{minor}" for minor in range(int(found[1]), int(found[2]))]


def test_every_python_is_checked_and_the_oldest_and_the_newest_run_the_stack() -> None:
    ci = jobs("ci")
    assert ci["check"]["strategy"]["matrix"]["python"] == pythons()
    assert ci["integration"]["strategy"]["matrix"]["python"] == [pythons()[0], pythons()[-1]]


def test_the_jobs_run_together_what_make_test_runs() -> None:
    (tested,) = re.findall(r"^test: ([a-z ]+?) *##", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    ci = jobs("ci")
    runs = [step["run"] for job in (ci["check"], ci["integration"]) for step in job["steps"] if "run" in step]
    assert " ".join(run.removeprefix("make ") for run in runs) == tested


def test_only_publishing_may_ask_who_it_is_and_only_after_the_build() -> None:
    release = jobs("release")
    rights = {name: job["permissions"] for name, job in release.items()}
    assert rights == {
        "build": {"contents": "read"},
        "publish": {"id-token": "write"},
        "images": {"contents": "read", "packages": "write"},
    }
    assert (release["publish"]["needs"], release["publish"]["environment"]) == ("build", "pypi")
    assert release["images"]["needs"] == "build"
    assert not any("run" in step for step in release["publish"]["steps"])


def test_the_images_that_are_published_are_those_that_compose_asks_for(tmp_path: Path) -> None:
    """Both targets, by the names that PIPELINE_IMAGE gives, with the release's version as the tag."""
    told = tmp_path / "docker"
    told.write_text('#!/bin/sh\necho "$@" >> "$LOG"\n')
    told.chmod(0o755)
    log = tmp_path / "log"
    variables = {
        "GITHUB_ACTOR": "me",
        "GITHUB_REPOSITORY": "Me/Metrics-Pipeline",
        "GITHUB_REF_NAME": "v0.1.0",
        "TOKEN": "t",
    }
    (script,) = [each["run"] for each in jobs("release")["images"]["steps"] if "TOKEN" in each.get("env", {})]
    subprocess.run(
        ["bash", "-eu", "-c", script],
        env={
            **variables,
            "GITHUB_SERVER_URL": "",
            "GITHUB_SHA": "",
            "LOG": str(log),
            "PATH": f"{tmp_path}:/usr/bin:/bin",
        },
        check=True,
    )
    pushed = dict(re.findall(r"--push --target (\w+) .*--tag (\S+) \.$", log.read_text(), re.MULTILINE))
    services = project(variables={"PIPELINE_IMAGE": "ghcr.io/me/metrics-pipeline"})
    assert pushed == {"pipeline": services["code"]["image"], "connect": services["connect"]["image"]}
    assert log.read_text().count("--sbom=true --provenance=mode=max") == 2
    assert log.read_text().count("--platform linux/amd64,linux/arm64") == 2
    assert not re.search(r"\bt\b", log.read_text()), "the token stands in a command"


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A checkout of version 1.2.3, as far as the release looks at it."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-11-22\n")
    return tmp_path


def tagged(folder: Path, tag: str) -> subprocess.CompletedProcess[str]:
    """What the release says to a tag; GitHub runs a step with these options."""
    return subprocess.run(
        ["bash", "-e", "-c", step("The tag names the version")],
        cwd=folder,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "GITHUB_REF_NAME": tag},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_tag_that_names_the_version_is_released(released: Path) -> None:
    ended = tagged(released, "v1.2.3")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize("tag", ["v1.2.4", "v1.2.30", "1.2.3", "v1.2.3-rc1"])
def test_another_tag_is_refused_and_told_why(released: Path, tag: str) -> None:
    ended = tagged(released, tag)
    assert ended.returncode == 1
    assert f"the tag is {tag} and pyproject.toml says 1.2.3: delete the tag" in ended.stdout


def test_a_version_without_its_heading_in_the_changelog_is_refused(released: Path) -> None:
    (released / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n")
    ended = tagged(released, "v1.2.3")
    assert ended.returncode == 1
    assert "there is no heading for 1.2.3" in ended.stdout
