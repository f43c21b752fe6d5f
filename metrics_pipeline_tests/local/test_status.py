"""A sample has all its keys whatever the parts answer: what shows it must never fail."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.console import Console

from metrics_pipeline.errors import ServiceError
from metrics_pipeline.local import broker, live
from metrics_pipeline.local.status import Sample, Sampler, is_healthy
from metrics_pipeline.settings import Settings, SinkKind
from metrics_pipeline_tests.fake_http import Request, listening

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
