"""`make containers`, as far as it needs no engine: what it says where there is none, and that its checks can fail."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from metrics_pipeline.settings import ROOT
from metrics_pipeline_tests.compose_files import project
from metrics_pipeline_tests.containers import __main__ as program
from metrics_pipeline_tests.containers import bases, checks, faults, scenarios
from metrics_pipeline_tests.containers.deployment import ProblemError, overlays
from metrics_pipeline_tests.containers.engine import Engine
from metrics_pipeline_tests.containers.events import Events

RUN = scenarios.Run(Engine({}, own=True, version=""), stand_in=True, seconds=1, say=lambda _: None)


@pytest.mark.parametrize(("more", "code"), [([], 3), (["--if-possible"], 0)])
def test_it_says_clearly_where_it_cannot_run(
    more: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["containers", "--stand-in", "--cache", str(tmp_path), *more])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert program.main() == code
    said = capsys.readouterr().out
    assert said == "containers: NOT RUN: no container engine answers, and only root can start one\n"


def test_a_command_of_the_page_that_nothing_typed_is_named() -> None:
    assert "docker compose up -d --scale sink=3" in scenarios.untyped(RUN)
    assert not [command for command in scenarios.untyped(RUN) if "OWNER" in command]


def event(service: str, action: str, at: int, **more: str) -> str:
    about = {"com.docker.compose.service": service, **more}
    return json.dumps({"Action": action, "timeNano": at, "Actor": {"Attributes": about}})


def started(tmp_path: Path, *order: str) -> Events:
    """Services that start, and are healthy or end well, one after the other."""
    lines = []
    for number, name in enumerate(order):
        lines.append(event(name, "start", 10 * number))
        ready = event(name, "die", 10 * number + 5, exitCode="0")
        lines.append(ready if name in checks.ONE_SHOTS else event(name, "health_status: healthy", 10 * number + 5))
    file = tmp_path / "events"
    file.write_text("\n".join(lines))
    return Events(file)


GOOD = ("secrets", "postgres-conf", "postgres", "redpanda", "databases", "connect", "watcher", "code", "pgadmin")
LAST = ("console", "provision", "webserver", "daemon")


def test_the_order_of_start_is_looked_at(tmp_path: Path) -> None:
    checks.order_of_start(started(tmp_path, *GOOD, *LAST))
    with pytest.raises(ProblemError, match="connect started before redpanda was there"):
        checks.order_of_start(started(tmp_path, *(name for name in GOOD if name != "redpanda"), "redpanda", *LAST))


def stopped(tmp_path: Path, codes: dict[str, int], order: tuple[str, ...]) -> Events:
    file = tmp_path / "ends"
    file.write_text(
        "\n".join(event(name, "die", at, exitCode=str(codes.get(name, 0))) for at, name in enumerate(order))
    )
    return Events(file)


def test_the_order_of_stop_and_the_exit_codes_are_looked_at(tmp_path: Path) -> None:
    order = ("daemon", "webserver", "code", "watcher", "connect", "redpanda", "postgres")
    checks.order_of_stop(stopped(tmp_path, {"connect": 143}, order), 0)
    with pytest.raises(ProblemError, match=r"ended otherwise than by themselves: \{'daemon': 137\}"):
        checks.order_of_stop(stopped(tmp_path, {"daemon": 137}, order), 0)
    with pytest.raises(ProblemError, match="redpanda ended before code"):
        checks.order_of_stop(stopped(tmp_path, {}, ("daemon", "webserver", "redpanda", "code", *order[3:])), 0)


def test_commands_of_compose_run_are_no_services(tmp_path: Path) -> None:
    file = tmp_path / "events"
    file.write_text(event("code", "start", 1, **{"com.docker.compose.oneoff": "True"}))
    assert Events(file).all() == []


def test_faults_are_planted_in_what_the_files_have() -> None:
    for name, old, new in (*faults.OWNER, *faults.WIRING):
        assert (ROOT / name).read_text("utf-8").count(old) == 1, f"{name}: {old}"
        assert old != new


def test_a_fault_that_nothing_notices_is_a_failure() -> None:
    with pytest.raises(ProblemError, match="a fault was not noticed"):
        faults.caught(RUN, "a fault", lambda: None, "anything")

    def otherwise() -> None:
        raise ProblemError("something else")

    with pytest.raises(ProblemError, match="it fails, but for another reason: something else"):
        faults.caught(RUN, "a fault", otherwise, "this")


def test_every_image_of_others_has_a_stand_in_of_its_name() -> None:
    services = project()
    others = {one["image"] for one in services.values() if not one["image"].startswith("metrics-pipeline")}
    assert others <= {one.real for one in bases.stand_ins()}
    for one in bases.stand_ins():
        assert (bases.FOLDER / one.folder / "Dockerfile").is_file()


def test_a_digest_is_left_out_for_stand_ins(tmp_path: Path) -> None:
    for name in ("docker-compose.yaml", "compose.cluster.yaml", "compose", "Dockerfile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "Dockerfile").unlink()
    (tmp_path / "Dockerfile").write_text("ARG PYTHON=python:3.13.9@sha256:0\n")
    (tmp_path / "docker-compose.yaml").unlink()
    text = (ROOT / "docker-compose.yaml").read_text("utf-8")
    (tmp_path / "docker-compose.yaml").write_text(text.replace("-bookworm\n", "-bookworm@sha256:0\n"))
    main = overlays(tmp_path)["stand-in.yaml"]["services"]
    assert main["secrets"]["build"] == {"network": "host", "args": {"PYTHON": "python:3.13.9"}}
    assert main["postgres"]["image"].endswith("-bookworm")
