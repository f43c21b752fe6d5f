"""`up --detach`: the keeper in the background, watched until it is up."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from metrics_pipeline.errors import PipelineError
from metrics_pipeline.local import lock
from metrics_pipeline.local.stack import require_paths
from metrics_pipeline.local.state import StackState
from metrics_pipeline.settings import Settings

START_SECONDS: Final = 900.0
"""How long the start is watched: the first one may fetch 130 MB by a slow line. It goes on afterwards, unwatched."""
POLL_SECONDS: Final = 0.3
COMMAND: Final = (sys.executable, "-m", "metrics_pipeline", "up")


class LogFollower:
    """The lines of a file as they come, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0
        self._rest = b""
        self.last = ""

    def lines(self) -> list[str]:
        """The lines that were finished since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._place)
            text = self._rest + file.read()
            self._place = file.tell()
        *whole, self._rest = text.split(b"\n")
        lines = [line.decode(errors="replace") for line in whole]
        self.last = next((line for line in reversed(lines) if line.strip()), self.last)
        return lines


def start(settings: Settings, options: Sequence[str], say: Callable[[str], None]) -> None:
    """Start `metrics-pipeline up` in a session of its own and show what it says until everything is up.

    Args:
        settings: whose data folder holds the log.
        options: of `up`.
        say: shows a line.

    Raises:
        BusyError: it runs already.
        PipelineError: it ended, for the reason that it gave, or is not up in time.
        KeyboardInterrupt: Ctrl-C; what was started has been stopped by then.
    """
    require_paths(settings)
    lock.take(settings.data_dir).close()
    log = settings.data_dir / "logs" / "keeper.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*COMMAND, *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    follower = LogFollower(log)
    try:
        _watch(settings, child, follower, say)
    except KeyboardInterrupt:
        child.terminate()
        while child.poll() is None:
            _show(follower, say)
            time.sleep(POLL_SECONDS)
        _show(follower, say)
        raise
    say(
        f"Running in the background (pid {child.pid}, log {log}). `metrics-pipeline status` looks, "
        "`metrics-pipeline down` stops it."
    )


def _watch(
    settings: Settings, child: subprocess.Popen[bytes], follower: LogFollower, say: Callable[[str], None]
) -> None:
    log = settings.data_dir / "logs" / "keeper.log"
    deadline = time.monotonic() + START_SECONDS
    while True:
        # In this order: what it says before it ends is shown, too.
        ended, state = child.poll() is not None, StackState.read(settings.data_dir)
        _show(follower, say)
        if ended:
            reason = follower.last.removeprefix("error: ") or "no output"
            raise PipelineError(f"the pipeline did not start: {reason} (log: {log})")
        if state.ready and state.keeper and state.keeper.pid == child.pid:
            return
        if time.monotonic() > deadline:
            raise PipelineError(
                f"the pipeline is not up after {START_SECONDS:.0f} s and goes on starting in the background "
                f"(pid {child.pid}): see `metrics-pipeline logs`, or end it with `metrics-pipeline down`"
            )
        time.sleep(POLL_SECONDS)


def _show(follower: LogFollower, say: Callable[[str], None]) -> None:
    for line in follower.lines():
        say(line)
