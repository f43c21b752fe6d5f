"""What of the documentation is made from the code: `.env.example`, and tables on the pages of `docs/`.

`python -m metrics_pipeline.reference` writes them again; a test fails while one of them is stale.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from metrics_pipeline.cli import app
from metrics_pipeline.settings import ROOT, SERVICE_URLS, Settings

ENV_EXAMPLE: Final = ROOT / ".env.example"
PAGES: Final = sorted((ROOT / "docs").glob("*.md"))

GROUPS: Final = {
    "producer": "Producer",
    "topic": "Topic",
    "sink": "Sink",
    "table": "Table",
    "services": "Services",
    "ports": "Ports, all on 127.0.0.1",
    "stack": "Embedded stack",
    "compose": "Docker compose: ports on 127.0.0.1, and sizes",
    "replay": "Files that are put into a folder",
    "monitoring": "Monitoring",
    "secrets": "Passwords; `up` fills in those that are empty",
}
"""The groups of settings and their headings, in the order of the documentation."""

_HEADER = """\
# Every setting with its default. docs/settings.md explains how they are read.
# Write into `.env` (made by the first `up`, mode 0600) only what you want to change.
"""
_REGION = re.compile(r"(?P<begin><!-- made from the code: (?P<what>[a-z ]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def default(field: FieldInfo) -> str:
    """A setting's default as it would be written into an env file; empty for none."""
    value: Any = field.default
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def env_example() -> str:
    """The text of `.env.example`."""
    parts = [_HEADER]
    for group, title in GROUPS.items():
        parts.append(f"\n# {title}\n")
        for name in Settings.group(group):
            field = Settings.model_fields[name]
            # A service's URL counts in the real environment only, and an env file that sets it is refused.
            mark = "# " if name.upper() in SERVICE_URLS.values() else ""
            parts.append(f"# {field.description}\n{mark}{name.upper()}={default(field)}\n")
    return "".join(parts)


def settings_table(group: str) -> str:
    """The settings of a group as a Markdown table."""
    rows = [
        (f"`{name.upper()}`", f"`{text}`" if (text := default(field)) else "", field.description or "")
        for name in Settings.group(group)
        for field in [Settings.model_fields[name]]
    ]
    return _table(("name", "default", "meaning"), rows)


def commands() -> dict[str, TyperCommand]:
    """Every command of the program by the words that call it."""
    by_path: dict[str, TyperCommand] = {}

    def walk(node: object, path: str) -> None:
        if isinstance(node, TyperGroup):
            for name, child in node.commands.items():
                walk(child, f"{path} {name}".strip())
        elif isinstance(node, TyperCommand):
            by_path[path] = node

    walk(typer.main.get_command(app), "")
    return by_path


def commands_table() -> str:
    """The commands with their arguments and options as a Markdown table."""
    rows = []
    for name, command in commands().items():
        arguments = [_argument(given) for given in command.params if isinstance(given, TyperArgument)]
        options = [
            f"`{given.opts[0]}`" for given in command.params if isinstance(given, TyperOption) and given.name != "help"
        ]
        rows.append((f"`{' '.join([name, *arguments])}`", command.help or "", ", ".join(options)))
    return _table(("command", "what it does", "options"), rows)


def _argument(given: TyperArgument) -> str:
    word = (given.metavar or given.name or "").upper() + ("…" if given.nargs == -1 else "")
    return word if given.required else f"[{word}]"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) + " |\n" for line in lines
    )


def rewritten(page: str) -> str:
    """A page's text with every table that is made from the code brought up to date.

    A table stands between `<!-- made from the code: settings GROUP -->` or `… commands -->` and `<!-- end -->`.
    """

    def made(match: re.Match[str]) -> str:
        what, _, group = match["what"].partition(" ")
        text = settings_table(group) if what == "settings" else commands_table()
        return f"{match['begin']}\n{text}\n{match['end']}"

    return _REGION.sub(made, page)


if __name__ == "__main__":
    ENV_EXAMPLE.write_text(env_example(), "utf-8")
    for path in PAGES:
        path.write_text(rewritten(path.read_text("utf-8")), "utf-8")
