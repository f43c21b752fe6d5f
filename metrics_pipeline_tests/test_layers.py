"""The house: which package may import which. Arrows point one way, and only Dagster's rooms import Dagster."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

from metrics_pipeline.settings import ROOT

PACKAGE = ROOT / "metrics_pipeline"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

GROUND = {"errors", "settings", "change", "metric", "kafka", "topic", "postgres", "topic_log", "registry", "web"}
GROUND |= {"surroundings", "loopback", "data_folder", "answers", "dotenv_file", "server_url", "guest", "partitioner"}
"""Modules on the ground floor. Among themselves they have an order, too."""

MAY_IMPORT: Mapping[str, set[str]] = {
    # the ground
    "errors": set(),
    "surroundings": set(),
    "loopback": {"surroundings"},
    "dotenv_file": set(),
    "data_folder": {"settings"},
    "answers": {"settings", "data_folder", "loopback"},
    "server_url": set(),
    "settings": {"errors", "dotenv_file", "server_url", "guest"},
    "change": set(),
    "partitioner": set(),
    "web": {"errors", "data_folder"},
    "metric": {"errors", "settings"},
    "kafka": {"errors", "settings", "change"},
    "topic": {"errors", "settings", "kafka"},
    "guest": {"errors"},
    "postgres": {"errors", "settings", "surroundings", "data_folder", "guest"},
    "topic_log": {"settings", "kafka", "postgres"},
    "registry": {"errors", "settings", "change", "loopback"},
    # what is done with a reading
    "copy_sink": GROUND,
    "sinks": GROUND - {"web", "metric"} | {"copy_sink"},
    "producer": GROUND | {"sinks"},
    "replay": {"errors", "metric", "settings", "producer"},
    "watcher": GROUND | {"copy_sink"},
    "verification": GROUND | {"sinks"},
    "rejects": GROUND | {"producer"},
    "summaries": {"errors", "settings", "postgres"},
    "partitions": {"errors", "settings", "postgres", "summaries"},
    "retention": {"errors", "settings", "postgres", "summaries", "partitions"},
    "archive": {"errors", "settings", "postgres", "copy_sink", "partitions"},
    "exporter": GROUND | {"sinks", "summaries", "watcher"},
    # running it
    "local": GROUND | {"sinks", "summaries", "watcher", "replay", "archive"},
    "compose": GROUND | {"sinks", "local"},
    "bench": GROUND
    | {"sinks", "producer", "copy_sink", "verification", "summaries", "partitions", "retention", "local"},
    # people's entry points
    "cli": GROUND
    | {
        "sinks",
        "producer",
        "replay",
        "copy_sink",
        "watcher",
        "verification",
        "rejects",
        "partitions",
        "retention",
        "archive",
        "exporter",
        "local",
        "compose",
        "bench",
    },
    "reference": {"settings", "cli"},
    "__main__": {"cli", "surroundings"},
    # Dagster
    "defs": GROUND | {"sinks", "producer", "replay", "rejects", "summaries", "partitions", "retention", "archive"},
    "definitions": {"defs"},
}
"""Each package and each module beside them, and what it may import besides itself."""


def room(module: Path) -> str:
    """The package that a module stands in, or the module itself when it stands beside them."""
    return module.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(module: Path, text: str | None = None) -> set[str]:
    """Full names of what a module imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8") if text is None else text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(names: set[str]) -> set[str]:
    """The rooms of ours in which these names stand."""
    parts = (name.split(".") for name in names if name.startswith("metrics_pipeline."))
    return {words[1] for words in parts if words[1] in MAY_IMPORT}


def forbidden(module: Path, text: str | None = None) -> set[str]:
    """What a module imports and may not."""
    return rooms_of(imported(module, text)) - MAY_IMPORT[room(module)] - {room(module)}


def test_every_room_is_listed() -> None:
    assert {room(module) for module in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_room_may(module: Path) -> None:
    assert not forbidden(module)


def test_the_arrows_make_no_circle() -> None:
    left = {name: set(needs) for name, needs in MAY_IMPORT.items()}
    used: dict[str, set[str]] = defaultdict(set)
    for module in MODULES:
        used[room(module)] |= rooms_of(imported(module)) - {room(module)}
    left = {name: used[name] for name in left}
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize(
    ("place", "line", "found"),
    [
        ("local/live.py", "from metrics_pipeline.cli import app", {"cli"}),
        ("replay/cells.py", "from metrics_pipeline import kafka", {"kafka"}),
        ("copy_sink/batch.py", "from metrics_pipeline.verification.comparison import Bounds", {"verification"}),
        ("sinks/active.py", "def f():\n    from metrics_pipeline.producer import ledger", {"producer"}),
        ("kafka.py", "import metrics_pipeline.sinks.active", {"sinks"}),
    ],
)
def test_a_planted_import_is_found(place: str, line: str, found: set[str]) -> None:
    module = PACKAGE / place
    assert forbidden(module, f"{module.read_text('utf-8')}\n{line}\n") == found


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_only_the_definitions_import_dagster(module: Path) -> None:
    if room(module) not in ("definitions", "defs"):
        assert not {name for name in imported(module) if name.split(".")[0] == "dagster"}


def test_no_module_is_called_by_a_word_that_says_nothing() -> None:
    assert not {module.stem for module in MODULES} & {"utils", "util", "helpers", "common", "misc", "lib"}


def test_the_command_line_starts_without_dagster() -> None:
    """`import dagster` takes longer than most commands."""
    code = "import sys, metrics_pipeline.cli; sys.exit('dagster' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
