"""The live table goes on whatever a sample is, and whatever becomes of the terminal."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from rich.console import Console

from metrics_pipeline.local import live
from metrics_pipeline.local.live import LiveTable
from metrics_pipeline.local.status import Sample, _absent
from metrics_pipeline.settings import Settings

SAMPLE: Sample = {
    **{part: _absent(part) for part in ("postgres", "broker", "connect", "sink", "watcher", "producer", "dagster")},
    **dict.fromkeys(("rows", "rows_per_second", "acknowledged_per_second", "lag")),
    "latency_seconds": {"p50": None, "p99": None},
}
"""Of a stack of which nothing answers."""


class Scripted:
    """A sampler that fails first, then has a sample."""

    def __init__(self) -> None:
        self.outcomes: list[Sample | Exception] = [KeyError("workers"), AttributeError("a list"), SAMPLE]
        self.closed = threading.Event()
        self.taken = threading.Event()

    def sample(self) -> Sample:
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        self.taken.set()
        return outcome

    def close(self) -> None:
        self.closed.set()


def test_a_sample_that_fails_does_not_end_the_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sampler = Scripted()
    monkeypatch.setattr(live, "Sampler", lambda _settings: sampler)
    monkeypatch.setattr(live, "SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(live, "PLAIN_SECONDS", 0.0)
    out = io.StringIO()
    with LiveTable(Settings(pipeline_data_dir=tmp_path), Console(file=out, width=200)) as table:
        assert sampler.taken.wait(10)
        for _ in range(1000):
            table.show()
            if out.getvalue():
                break
            threading.Event().wait(0.01)
    assert "sink COPY" in out.getvalue()
    assert sampler.closed.wait(10)
