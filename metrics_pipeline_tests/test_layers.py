"""Dependencies point one way: definitions → defs → nouns → metric, settings, errors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from metrics_pipeline.settings import ROOT

PACKAGE = ROOT / "metrics_pipeline"
MODULES = sorted(PACKAGE.rglob("*.py"))
BASE = {"metric", "settings", "errors"}
ENTRY_POINTS = {"cli", "reference", "__main__", "bench"}
"""Read by people: they may use everything but Dagster's definitions."""


def layer(module: Path) -> str:
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ("definitions", "defs", "local"):
        return parts[0]
    if parts[0] == "compose":  # the same parts in containers
        return "local"
    if parts[0] == "status":  # of the embedded stack
        return "local"
    if parts[0] in BASE:
        return "base"
    return "entry point" if parts[0] in ENTRY_POINTS else "noun"


def imported(module: Path) -> set[str]:
    """Full names of what a module imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layers_of(names: set[str]) -> set[str]:
    """The layers that these names of ours lie in."""
    found = set()
    for name in names:
        if name.startswith("metrics_pipeline."):
            first = name.split(".")[1]
            if (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").exists():
                found.add(layer(PACKAGE / f"{first}.py"))
    return found


ALLOWED = {
    "definitions": {"defs"},
    "defs": {"defs", "noun", "base"},
    "local": {"local", "noun", "base"},
    "entry point": {"entry point", "local", "noun", "base"},
    "noun": {"noun", "base"},
    "base": {"base"},
}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_a_module_imports_only_from_the_layers_below(module: Path) -> None:
    assert layers_of(imported(module)) <= ALLOWED[layer(module)]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_only_the_definitions_import_dagster(module: Path) -> None:
    if layer(module) not in ("definitions", "defs"):
        assert not {name for name in imported(module) if name.split(".")[0] == "dagster"}


def test_the_test_sees_what_it_should() -> None:
    assert layers_of({"metrics_pipeline.defs.production.x", "metrics_pipeline.kafka", "dagster"}) == {"defs", "noun"}
    assert layers_of({"metrics_pipeline.settings.Settings"}) == {"base"}


def test_no_module_is_called_by_a_word_that_says_nothing() -> None:
    assert not {module.stem for module in MODULES} & {"utils", "util", "helpers", "common", "misc", "lib"}


def test_the_command_line_starts_without_dagster() -> None:
    """`import dagster` takes longer than most commands."""
    code = "import sys, metrics_pipeline.cli; sys.exit('dagster' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
