"""A sample has all its keys whatever the parts answer: what shows it must never fail."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from starlette.responses import JSONResponse
from starlette.routing import Route

from metrics_pipeline.data_folder import make_folder_id
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.local import broker, live
from metrics_pipeline.local.processes import identify
from metrics_pipeline.local.state import StackState
from metrics_pipeline.local.status import Sample, Sampler, is_healthy
from metrics_pipeline.settings import Settings, SinkKind
from metrics_pipeline.sinks.watch import copy_sink_problem
from metrics_pipeline.web import WebServer
from metrics_pipeline_tests.fake_http import Request, listening

pytestmark = pytest.mark.usefixtures("another_data_folder")

NOBODY = 1
"""A port on which nothing listens."""
ODD_ANSWERS = [b"[]", b'"text"', b"7", b"null", b"<html>", b'{"workers": [5]}', b'{"workers": {"a": 1}}', b"\xff"]
ODD_FIGURES: list[object] = [
    {"latency_seconds": 5},
    {"latency_seconds": {"p50": "fast"}},
    {"acknowledged_per_second": "many"},
    {"acknowledged_per_second": None},
    {"latency_seconds": {}},
]


@dataclass
class Parts:
    """One web server in the place of producer, COPY sink, Connect and Dagster; each answers what it is told to."""

    port: int = NOBODY
    answer: bytes = b"{}"
    status: int = 200
    asked: list[str] = field(default_factory=list)

    def settings(self, kind: SinkKind) -> Settings:
        ports: dict[str, Any] = dict.fromkeys(("sink_port", "producer_port", "connect_port", "dagster_port"), self.port)
        return Settings(sink=kind, postgres_port=NOBODY, dagster_code_port=NOBODY, **ports)

    def sample(self, kind: SinkKind) -> Sample:
        with closing(Sampler(self.settings(kind))) as sampler:
            return sampler.sample()


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, without_backoff: None) -> Iterator[Parts]:
    monkeypatch.setattr(broker, "look", lambda _settings: (False, "no answer"))
    made = Parts()

    def respond(request: Request) -> None:
        made.asked.append(request.path)
        request.reply(made.status, made.answer)

    with listening(respond) as server:
        made.port = server.server_port
        yield made


def shown(sample: Sample) -> str:
    """Everything that people see of a sample."""
    console = Console(width=250, file=io.StringIO(), record=True)
    console.print(live.table(sample))
    json.dumps(sample)
    return console.export_text() + live.line(sample)


@pytest.mark.parametrize("kind", ["connect", "copy"])
def test_with_nobody_there_every_part_says_so(parts: Parts, kind: SinkKind) -> None:
    """The keeper's line was a KeyError here, which took the whole stack down."""
    parts.port = NOBODY
    sample = parts.sample(kind)
    assert sample["sink"]["workers"] == (None if kind == "copy" else 0)
    text = shown(sample)
    assert "no answer" in text
    assert "not healthy: postgres, broker" in text
    assert not is_healthy(sample)


@pytest.mark.parametrize("kind", ["connect", "copy"])
@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("answer", ODD_ANSWERS)
def test_an_unexpected_answer_is_shown_as_the_part_s_problem(
    parts: Parts, kind: SinkKind, answer: bytes, status: int
) -> None:
    parts.answer, parts.status = answer, status
    sample = parts.sample(kind)
    assert parts.asked
    shown(sample)
    for part in ("connect" if kind == "connect" else "sink", "producer", "dagster"):
        assert sample[part]["healthy"] is False, part
        assert sample[part]["reason"], part


@pytest.mark.parametrize("figures", ODD_FIGURES)
def test_figures_that_are_none_do_not_reach_the_table(parts: Parts, figures: object) -> None:
    parts.answer = json.dumps(figures).encode()
    shown(parts.sample("copy"))


def test_a_part_that_fails_in_a_way_nobody_thought_of_is_not_healthy(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_settings: Settings) -> tuple[bool, str | None]:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(broker, "look", fail)
    sample = parts.sample("copy")
    assert sample["broker"]["healthy"] is False
    assert "nobody thought of this" in sample["broker"]["reason"]
    shown(sample)


def test_a_known_error_keeps_its_text(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_settings: Settings, **_: object) -> object:
        raise ServiceError("Kafka Connect at fake cannot be reached")

    monkeypatch.setattr("metrics_pipeline.local.status.sink_state", fail)
    assert parts.sample("connect")["connect"]["reason"] == "Kafka Connect at fake cannot be reached"


@pytest.mark.parametrize("theirs", ["", "another"])
def test_another_stacks_producer_and_sink_are_never_shown_as_ours(
    theirs: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without_backoff: None
) -> None:
    """The real servers, of another data folder: ours was started once, and theirs has our ports."""
    figures = {
        "state": "running",
        "acknowledged_per_second": 5,
        "latency_seconds": {"p50": 1, "p99": 2},
        "paused": None,
    }
    figures |= {"workers": [{"state": "running"}]}

    async def answer(_: object) -> JSONResponse:
        return JSONResponse(figures)

    monkeypatch.setattr(broker, "look", lambda _settings: (False, "no answer"))
    routes = [Route("/status", answer), Route("/health", answer)]
    ours = make_folder_id(tmp_path)
    for identity, shown_as_ours in ((theirs, False), (ours, True)):
        server = WebServer(routes, 0, "X", identity=identity)
        server.start()
        try:
            settings = Settings(
                sink="copy", pipeline_data_dir=tmp_path, postgres_port=NOBODY, dagster_port=NOBODY,
                dagster_code_port=NOBODY, producer_port=server.port, sink_port=server.port,
            )  # fmt: skip
            with closing(Sampler(settings)) as sampler:
                sample = sampler.sample()
            problem = copy_sink_problem(settings)
        finally:
            server.stop()
        assert sample["producer"]["healthy"] is shown_as_ours
        assert (sample["acknowledged_per_second"], sample["latency_seconds"]["p50"]) == (
            (5, 1) if shown_as_ours else (0, None)
        )
        assert sample["sink"]["healthy"] is shown_as_ours
        if not shown_as_ours:
            whose = "that of another data folder" if theirs else "not of this pipeline"
            assert f"what answers on 127.0.0.1:{server.port} is {whose}" in sample["producer"]["reason"]
            assert whose in str(problem)


@pytest.mark.parametrize(("seconds", "healthy"), [(0.2, True), (3.0, False), (30.0, False)])
def test_a_sink_that_cannot_store_is_not_shown_as_well(seconds: float, healthy: bool, parts: Parts) -> None:
    """Its own health has more patience, since it is restarted by that."""
    worker = {"name": "w", "state": "waiting", "waiting_seconds": seconds, "reason": "disk full (53100)"}
    parts.answer = json.dumps({"workers": [worker]}).encode()
    sampler = Sampler(parts.settings("copy"))
    with closing(sampler):
        sink = sampler.sample()["sink"]
    assert sink["healthy"] is healthy
    assert sink["state"] == "waiting"
    assert ("disk full" in sink.get("reason", "")) is not healthy


def test_a_webserver_that_is_not_our_child_is_not_ours(parts: Parts, tmp_path: Path) -> None:
    parts.answer = b'{"data": {"instance": {"daemonHealth": {"allDaemonStatuses": []}}}}'
    settings = parts.settings("copy").model_copy(update={"pipeline_data_dir": tmp_path})
    with closing(Sampler(settings)) as sampler:
        said = sampler.sample()["dagster"]["reason"]
        assert said.startswith(f"what answers on 127.0.0.1:{parts.port} is not the webserver of {tmp_path} (")
        assert f"pid {os.getpid()}" in said
        named = Sampler(settings.model_copy(update={"dagster_url": settings.dagster_http}))
        with closing(named):
            assert "what answers" not in named.sample()["dagster"]["reason"], "as in containers"
        StackState(children={"webserver": identify(psutil.Process())}).write(tmp_path)
        assert "webserver" not in sampler.sample()["dagster"]["reason"]
