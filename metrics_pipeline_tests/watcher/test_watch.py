"""The watcher before there is anything to watch."""

from __future__ import annotations

import os
from typing import Any

import psycopg
import pytest

from metrics_pipeline import postgres
from metrics_pipeline.settings import Settings
from metrics_pipeline.watcher import watch
from metrics_pipeline.watcher.watch import Watcher


class EnoughError(Exception):
    """It has asked often enough."""


class FakeSession:
    """A database without tables."""

    def __init__(self, asked: list[FakeSession]) -> None:
        self._asked = asked

    def execute(self, *_: Any) -> None:
        self._asked.append(self)
        if len(self._asked) > 3:
            raise EnoughError
        raise psycopg.errors.UndefinedTable

    def close(self) -> None:
        pass


def test_without_tables_it_stays_connected_which_is_how_it_is_known_to_be_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[FakeSession] = []
    monkeypatch.setattr(postgres, "connect", lambda *_, **__: FakeSession(asked))
    monkeypatch.setattr(os, "nice", lambda _: 0)
    monkeypatch.setattr(watch, "RETRY_SECONDS", 0.001)
    with pytest.raises(EnoughError):
        Watcher(Settings(sink_watch=True)).run()
    assert len(asked) == 4
    assert len(set(asked)) == 1
