"""Markdown taken apart for tests."""

from __future__ import annotations

import re
from pathlib import Path

from metrics_pipeline.settings import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")] + PAGES
"""Everything that people read: each check of the documents covers all of it."""


def page(name: str) -> Path:
    """A page of `docs/` by its name without the ending."""
    return ROOT / "docs" / f"{name}.md"


def fences(path: Path, language: str) -> list[str]:
    """The contents of all fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def listings(path: Path) -> dict[str, str]:
    """Programs by their file's name, which a comment in their first line says."""
    text = path.read_text("utf-8")
    found = re.findall(r"^```\w+\n((?:#|//) (\w+\.\w+)\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return {name: program for program, name in found}


def prose(path: Path) -> str:
    """The text without fenced blocks and comments."""
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def inline(path: Path) -> list[str]:
    """Everything between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def anchors(path: Path) -> set[str]:
    """What links within a document may point at."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(path: Path, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    _, _, section = f"\n{path.read_text('utf-8')}".partition(f"\n{heading}\n")
    lines = []
    for line in section.splitlines():
        if line.startswith("|"):
            lines.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))])
        elif lines or line.startswith("#"):
            break
    return lines[2:]
