"""What of an env file every reader reads the same way: we and Dagster by python-dotenv, the containers by Docker Compose.

The two differ in what a `$` and a backslash mean, in `NAME: value`, and in what may follow a quote. A setting that they would read
differently is refused by its name, with the way to write it: a stack and its containers must not have two passwords.
"""

from __future__ import annotations

import io
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Final

from dotenv.parser import Binding, parse_stream

_NAME: Final = re.compile(
    r"\s*(?:export\s+)?['\"]?(?P<name>[A-Za-z_][A-Za-z0-9_]*)['\"]?\s*(?P<sign>[=:]?)[^\S\r\n]*(?P<rest>.*)", re.DOTALL
)
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./:@%+-]*")
_DOLLAR: Final = re.compile(r"\$(?!\{)[A-Za-z_$]|\\\$|\$\{[^}]*[^A-Za-z0-9_}:](?<!:-)[^}]*\}")
"""Compose replaces `$NAME` and reads `$$` as `$`; python-dotenv replaces `${NAME}` and `${NAME:-default}` alone."""


def problems(path: Path, names: Container[str]) -> list[str]:
    """One line for each of these names that an env file sets in a way that is read in two ways.

    Args:
        path: of the file.
        names: others are nobody's business.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    found = []
    for binding in parse_stream(io.StringIO(path.read_text("utf-8"))):
        for name, problem in _look(binding):
            if name in names:
                found.append(f"{name} in line {binding.original.line} of {path}: {problem}")
    return found


def can_hold(value: str) -> bool:
    """Whether a value can be written, in single quotes, so that every reader reads it as it is."""
    return not ("${" in value or "\\\\" in value or value.endswith("\\") or "\\'" in value)


def written(value: str) -> str:
    """A value as it is written behind `NAME=`; python-dotenv's own way doubles backslashes, which Compose keeps double."""
    return value if _PLAIN.fullmatch(value) else "'" + value.replace("'", "\\'") + "'"


def _look(binding: Binding) -> Iterator[tuple[str, str]]:
    # A line that python-dotenv cannot read comes with what stands before it.
    text = binding.original.string.lstrip()
    match = _NAME.match(text)
    if match is None:
        return
    name, sign, rest = match["name"], match["sign"], match["rest"].rstrip()
    if binding.error or sign == ":":
        way = (
            f"write {name}=VALUE, the value in single quotes if need be"
            if sign == ":"
            else "close its quotes, and write nothing after them"
        )
        yield name, f"it is no NAME=VALUE: {way}"
    elif text[0] in "'\"":
        yield name, "its name stands in quotes: write it without"
    elif rest.startswith("'"):
        if "${" in rest:
            yield name, "it holds ${…}, which no quotes keep: choose another value, or set it in the environment"
        elif "\\\\" in rest:
            yield name, "it holds two backslashes in single quotes: write one, or choose another value"
    elif rest.startswith('"') and "\\'" in rest:
        yield name, "a quote is escaped in double quotes, which needs no backslash: remove it"
    elif "${" in rest and "PASSWORD" in name:
        yield name, "it holds ${…}, which is replaced: choose another value, or set it in the environment"
    elif _DOLLAR.search(_value(rest)):
        yield name, "it holds a $, which Docker Compose replaces: write the value in single quotes"


def _value(rest: str) -> str:
    """What stands before a comment."""
    return rest if rest.startswith('"') else re.split(r"\s#", rest, maxsplit=1)[0]
