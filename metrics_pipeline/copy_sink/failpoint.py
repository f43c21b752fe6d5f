"""The places that a batch passes: each is noted, and a sink under test kills itself there, to show that none is a bad one to die at."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from metrics_pipeline.errors import SettingError

VARIABLE: Final = "METRICS_SINK_FAILPOINTS"
"""`NAME=PROBABILITY[,NAME=PROBABILITY…]`; for tests only, and nothing happens without it."""

MARKS: Final = "METRICS_SINK_FAILPOINT_MARKS"
"""A file to which a process that kills itself first appends the name of the place."""

PLACES: Final = ("polled", "decoded", "locked", "advanced", "copying", "copied", "committing", "committed")
"""In the order in which a batch passes them; from `locked` to `committing` a transaction is open."""

STEPS: Final[Mapping[str, str]] = {
    "polled": "decode",
    "locked": "lock",
    "advanced": "COPY",
    "copying": "COPY",
    "copied": "COPY",
    "committing": "COMMIT",
    "committed": "wait",
}
"""What follows each of them, if it is a step of its own."""


def _nobody(_: str) -> None:
    """Nobody wants to know."""


class Failpoints:
    """Tells where a batch is, and kills the process (SIGKILL) at named places.

    Args:
        text: what the variable holds.
        at: told of each step that begins, or gets ahead.
        variable: which one that is.
        places: the names that there are.

    Raises:
        SettingError: a name is not among the places, or a probability is no number.
    """

    def __init__(
        self,
        text: str | None = None,
        *,
        at: Callable[[str], object] = _nobody,
        variable: str = VARIABLE,
        places: tuple[str, ...] = PLACES,
    ) -> None:
        self._at = at
        self._chances: dict[str, float] = {}
        for entry in filter(None, (os.environ.get(variable, "") if text is None else text).split(",")):
            name, _, chance = entry.partition("=")
            if name not in places:
                raise SettingError(f"{variable}: there is no place {name!r}, only {', '.join(places)}")
            try:
                self._chances[name] = float(chance)
            except ValueError as error:
                raise SettingError(f"{variable}: {entry!r} must be NAME=PROBABILITY") from error
        self._random = random.Random()  # noqa: S311  # when it dies is no secret

    def begin(self, step: str) -> None:
        """A step begins in which nobody dies."""
        self._at(step)

    def reach(self, name: str) -> None:
        """Die here, now and then, if asked to."""
        if step := STEPS.get(name):
            self._at(step)
        if self._chances and self._random.random() < self._chances.get(name, 0.0):
            if marks := os.environ.get(MARKS):
                with Path(marks).open("a") as file:
                    file.write(f"{name}\n")
            os.kill(os.getpid(), signal.SIGKILL)
