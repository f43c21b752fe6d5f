"""The repair of the connector as a process of its own, as the keeper runs it; it may stop itself at a place of a quarantine.

    python -m metrics_pipeline_tests.chaos.repairer NAME

It ticks until it is ended, and appends what was done to `repairs.jsonl`, by NAME, as the real ones do. In the environment:
`METRICS_QUARANTINE_FAILPOINTS` names the place at which it kills itself; `CHAOS_STOP_AT` the one at which it stops itself
(SIGSTOP), once, having noted that in the file `CHAOS_STOPPED`; `CHAOS_TICK` is the pause between two ticks in seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

from metrics_pipeline.copy_sink.failpoint import Failpoints
from metrics_pipeline.settings import Settings
from metrics_pipeline.sinks import quarantine, repair

STOP_AT: Final = "CHAOS_STOP_AT"
STOPPED: Final = "CHAOS_STOPPED"
TICK: Final = "CHAOS_TICK"
TICK_SECONDS: Final = 3.0
"""As the keeper has it."""


class Stopping(Failpoints):
    """Failpoints of which one stops the process once, so that something can be done to the others meanwhile."""

    def reach(self, name: str) -> None:
        """Die or stop here, if asked to."""
        super().reach(name)
        note = os.environ.get(STOPPED)
        if note and name == os.environ.get(STOP_AT) and not Path(note).exists():
            Path(note).write_text(f"{name}\n")
            os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    """Tick for ever."""
    settings, name = Settings.load(), sys.argv[1]
    stops = Stopping(variable=quarantine.VARIABLE, places=quarantine.PLACES)
    sink = repair.SinkRepair(settings, quarantine=quarantine.Quarantine(settings, stops))
    pause = float(os.environ.get(TICK, TICK_SECONDS))
    said = ""
    while True:
        tick = sink.tick()
        repair.record(settings, tick.events, name)
        if tick.message != said:
            said = tick.message
            sys.stdout.write(f"{time.time():.1f} {said}\n")
            sys.stdout.flush()
        time.sleep(pause)


if __name__ == "__main__":
    main()
