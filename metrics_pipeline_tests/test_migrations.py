"""The migration files as such; what they do is tested on PostgreSQL."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from metrics_pipeline import postgres
from metrics_pipeline.errors import SettingError
from metrics_pipeline.metric import MetricName
from metrics_pipeline.settings import ROOT, Settings

FILES = sorted(postgres.MIGRATIONS.glob("*.sql"))
QUERIES = sorted(postgres.QUERIES.glob("*.sql"))


def test_names_sort_by_a_timestamp_of_their_own() -> None:
    assert all(re.fullmatch(r"\d{14}_[a-z][a-z0-9_]*", path.stem) for path in FILES)
    versions = [path.stem.partition("_")[0] for path in FILES]
    assert len(set(versions)) == len(versions)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_goes_up_and_down_and_waits_for_no_lock_for_long(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^-- migrate:(.*)$", text, re.MULTILINE) == ["up", "down"]
    for section in text.split("-- migrate:")[1:]:
        assert "SET LOCAL lock_timeout" in section
        assert len([line for line in section.splitlines()[1:] if line and not line.startswith("--")]) > 2


def test_codes_are_those_of_the_wire() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in FILES)
    (check,) = re.findall(r"CHECK \(metric_name IN \(([^)]*)\)\)", text)
    assert [int(code) for code in check.split(",")] == sorted(MetricName)
    named = dict(re.findall(r"^    \((\d+), '(\w+)', '[^']+'\)", text, re.MULTILINE))
    assert {int(code): name for code, name in named.items()} == {name.value: name.name.lower() for name in MetricName}


def test_squawk_finds_nothing() -> None:
    command = [f"{sysconfig.get_path('scripts')}/squawk", "--config", str(ROOT / ".squawk.toml"), *map(str, FILES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", QUERIES, ids=lambda path: path.stem)
def test_each_query_says_first_what_it_answers(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"-- \S.{20,}[.?;)]", first), first
    assert postgres.query(path.stem) == path.read_text(encoding="utf-8")


def test_each_query_is_used() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "metrics_pipeline").rglob("*.py"))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "metrics_pipeline_tests").rglob("*.py"))
    assert [path.stem for path in QUERIES if not re.search(rf"['\"]{path.stem}['\"]", code + tests)] == []


def test_a_new_migration_is_a_file_to_fill_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(postgres, "MIGRATIONS", tmp_path)
    path = postgres.new_migration("add_device_names")
    assert re.fullmatch(r"\d{14}_add_device_names\.sql", path.name)
    assert re.findall(r"^-- migrate:(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) == ["up", "down"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["", "Add names", "1st", "../escape", "--help"])
def test_a_migration_needs_a_plain_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr(postgres, "MIGRATIONS", tmp_path)
    with pytest.raises(SettingError, match="cannot be a migration's name"):
        postgres.new_migration(name)
    assert list(tmp_path.iterdir()) == []


def test_every_role_has_a_password_setting() -> None:
    roles = re.findall(r"metrics_(?:owner|writer|summarizer|reader|producer)", " ".join(Settings.model_fields))
    assert set(roles) == set(postgres.ROLES)
