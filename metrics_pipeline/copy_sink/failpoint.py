"""Places where a sink under test kills itself, to show that no instruction is a bad one to die at."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Final

from metrics_pipeline.errors import SettingError

VARIABLE: Final = "METRICS_SINK_FAILPOINTS"
"""`NAME=PROBABILITY[,NAME=PROBABILITY…]`; for tests only, and nothing happens without it."""

MARKS: Final = "METRICS_SINK_FAILPOINT_MARKS"
"""A file to which a process that kills itself first appends the name of the place."""

PLACES: Final = ("polled", "decoded", "locked", "advanced", "copying", "copied", "committing", "committed")
"""In the order in which a batch passes them; from `locked` to `committing` a transaction is open."""


class Failpoints:
    """Kills the process (SIGKILL) at named places.

    Args:
        text: what the variable holds.

    Raises:
        SettingError: a name is not among `PLACES`, or a probability is no number.
    """

    def __init__(self, text: str | None = None) -> None:
        self._chances: dict[str, float] = {}
        for entry in filter(None, (os.environ.get(VARIABLE, "") if text is None else text).split(",")):
            name, _, chance = entry.partition("=")
            if name not in PLACES:
                raise SettingError(f"{VARIABLE}: there is no place {name!r}, only {', '.join(PLACES)}")
            try:
                self._chances[name] = float(chance)
            except ValueError as error:
                raise SettingError(f"{VARIABLE}: {entry!r} must be NAME=PROBABILITY") from error
        self._random = random.Random()  # noqa: S311  # when it dies is no secret

    def reach(self, name: str) -> None:
        """Die here, now and then, if asked to."""
        if self._chances and self._random.random() < self._chances.get(name, 0.0):
            if marks := os.environ.get(MARKS):
                with Path(marks).open("a") as file:
                    file.write(f"{name}\n")
            os.kill(os.getpid(), signal.SIGKILL)
