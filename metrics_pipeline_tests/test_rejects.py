"""What was rejected is shown so that it does nothing to a terminal; which records are meant must be said."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from metrics_pipeline import rejects
from metrics_pipeline.cli import app
from metrics_pipeline.errors import SettingError
from metrics_pipeline.rejects import Reject, Replayed, Selection, printable

WHEN = datetime(2026, 11, 22, 16, tzinfo=UTC)


@given(st.binary(max_size=200))
def test_any_bytes_are_shown_in_one_printable_line(data: bytes) -> None:
    assert printable(data).isprintable()


def test_text_stays_text() -> None:
    assert printable('{"tags":["größe ✓"]}'.encode()) == '{"tags":["größe ✓"]}'
    assert printable(b"a\x1b[31m\n\x00\xff") == "a\\x1b[31m\\n\\x00\\xff"
    assert printable(None) == "null"
    assert printable(b"") == ""
    assert printable(b"x" * 3000, 10) == "xxxxxxxxxx… (2,990 more bytes)"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say which records"),
        (["--all", "--reason", "no_key"], "say which records"),
        (["--all", "--partition", "0", "--offset", "1"], "say which records"),
        (["--partition", "0"], "together"),
        (["--offset", "0"], "together"),
    ],
)
def test_a_replay_needs_to_know_which(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["rejects", "replay", *arguments])
    assert isinstance(done.exception, SettingError)
    assert says in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "selection"),
    [
        (["--all"], Selection()),
        (["--reason", "bad_value"], Selection("bad_value")),
        (["--partition", "0", "--offset", "0"], Selection(None, 0, 0)),
        (["--reason", "bad_value", "--partition", "2", "--offset", "5"], Selection("bad_value", 2, 5)),
    ],
)
def test_a_replay_is_of_what_was_named(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], selection: Selection
) -> None:
    asked: list[Selection] = []

    def replay(_settings: object, selection: Selection, **_options: Any) -> Replayed:
        asked.append(selection)
        return Replayed(0, {"no_key": 1200})

    monkeypatch.setattr(rejects, "replay", replay)
    done = CliRunner().invoke(app, ["rejects", "replay", *arguments])
    assert asked == [selection]
    assert done.exit_code == 1, "what ended without a report was not published"


def test_the_list_cuts_and_escapes_details(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Reject(3, 1234, "bad_json", "value: \x1b[2J" + "x" * 300, WHEN, None, 17)]
    monkeypatch.setattr(rejects, "newest", lambda _settings, **_options: found)
    monkeypatch.setattr(rejects, "by_reason", lambda _settings, **_options: {"bad_json": 1001})
    shown = CliRunner().invoke(app, ["rejects", "list"]).stdout
    assert "\x1b" not in shown
    assert "1,001 bad_json" in shown
    document = json.loads(CliRunner().invoke(app, ["rejects", "list", "--json"]).stdout)
    assert document["by_reason"] == {"bad_json": 1001}
    assert document["rejects"][0] | {"detail": ""} == {
        "partition": 3,
        "offset": 1234,
        "reason": "bad_json",
        "detail": "",
        "rejected_at": "2026-11-22T16:00:00+00:00",
        "replayed_at": None,
        "bytes": 17,
    }


def test_an_empty_list_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejects, "newest", lambda _settings, **_options: [])
    monkeypatch.setattr(rejects, "by_reason", lambda _settings, **_options: {})
    assert CliRunner().invoke(app, ["rejects", "list"]).stdout == "no record is among the rejects\n"
