"""The COPY sink as a part of the embedded stack: in Connect's place, handed over before Connect starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from metrics_pipeline import postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.local import copy_sink
from metrics_pipeline.local.budget import Budget
from metrics_pipeline.local.service import CancelledError, Service
from metrics_pipeline.local.stack import Stack, unused_ports
from metrics_pipeline.settings import Settings
from metrics_pipeline.sinks import active


def test_no_secret_stands_in_its_command() -> None:
    settings = Settings(sink="copy", sink_workers=3)
    service = copy_sink.service(settings)
    assert service.command == [sys.executable, "-m", "metrics_pipeline", "sink", "--workers", "3"]
    assert service.needs == ("databases", "broker")
    assert service.environment["SINK_PORT"] == str(settings.sink_port)


def test_ports_of_the_sink_that_is_not_used_may_be_anybodys() -> None:
    assert "sink_port" in unused_ports(Settings(sink="connect"))
    assert "connect_port" not in unused_ports(Settings(sink="connect"))
    assert "sink_port" not in unused_ports(Settings(sink="copy"))
    assert {"connect_port", "connect_2_port"} <= unused_ports(Settings(sink="copy"))


# --- Handing over before Connect starts --------------------------------------------------------------------------


class FakeService(Service):
    """Up as soon as it is started."""

    def start(self) -> None:
        STARTED.append(self.name)

    def wait_until_healthy(self, cancelled: object = None) -> None:
        """At once."""


STARTED: list[str] = []


def made(tmp_path: Path, sink_kind: str, *names: str) -> Stack:
    STARTED.clear()
    needs = {"connect": ("postgres", "broker"), "connect-2": ("postgres", "broker"), "sink": ("databases", "broker")}
    services: list[Service] = [
        FakeService(name, name, "", [], {}, tmp_path / f"{name}.log", lambda: None, needs.get(name, ()))
        for name in names
    ]
    settings = Settings(sink=sink_kind, pipeline_data_dir=tmp_path)
    return Stack(settings, services, frozenset(), Budget.of(settings))


@pytest.fixture(autouse=True)
def _nothing_real(monkeypatch: pytest.MonkeyPatch) -> None:
    def provision(_stack: Stack) -> str:
        STARTED.append("provision")
        return ""

    monkeypatch.setattr(postgres, "bootstrap", lambda _settings: STARTED.append("databases"))
    monkeypatch.setattr(Stack, "_provision", provision)


def test_offsets_are_handed_over_before_any_worker_of_connect_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(active, "position", lambda *_: active.Position("copy"))

    def hand_back(_settings: Settings) -> list[str]:
        STARTED.append("handed back")
        return ["now by Kafka Connect", "more"]

    monkeypatch.setattr(active, "hand_back", hand_back)
    said: list[str] = []
    made(tmp_path, "connect", "postgres", "broker", "connect", "connect-2").start(said.append)
    assert STARTED.index("handed back") > max(STARTED.index("databases"), STARTED.index("broker"))
    assert STARTED.index("handed back") < min(STARTED.index("connect"), STARTED.index("connect-2"))
    assert STARTED[-1] == "provision"
    assert any(line.startswith("now by Kafka Connect") for line in said)


def test_nothing_is_handed_over_by_the_connector_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "position", lambda *_: active.Position("connect"))
    monkeypatch.setattr(active, "hand_back", lambda _settings: pytest.fail("there is nothing to hand over"))
    made(tmp_path, "connect", "postgres", "broker", "connect").start(lambda _line: None)
    assert STARTED[-1] == "provision"


def test_the_stack_starts_when_nothing_can_be_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> active.Position:
        raise ServiceError("PostgreSQL at fake cannot be reached")

    monkeypatch.setattr(active, "position", away)
    made(tmp_path, "connect", "postgres", "broker", "connect").start(lambda _line: None)
    assert STARTED[-1] == "provision"


def test_the_copy_sink_stands_in_connects_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "position", lambda *_: pytest.fail("there is no Connect to hand over to"))
    made(tmp_path, "copy", "postgres", "broker", "sink").start(lambda _line: None)
    assert set(STARTED) == {"postgres", "broker", "databases", "sink", "provision"}
    assert STARTED[-1] == "provision"


def test_a_start_that_is_cancelled_ends_quietly_and_says_nothing_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = made(tmp_path, "copy", "postgres", "broker", "sink")

    def interrupted(service: FakeService, cancelled: object = None) -> None:
        stack.cancelled.set()
        raise CancelledError

    monkeypatch.setattr(FakeService, "wait_until_healthy", interrupted)
    said: list[str] = []
    stack.start(said.append)
    assert said == []
    assert "provision" not in STARTED


def test_provisioning_that_is_cancelled_is_ended_and_not_told_as_done(tmp_path: Path) -> None:
    stack = made(tmp_path, "copy", "postgres")
    (tmp_path / "dagster_home").mkdir()
    stack.cancelled.set()
    with pytest.raises(CancelledError):
        stack._run([sys.executable, "-c", "import time; time.sleep(60)"], "provision", "provisioning")
