"""How long a test waits for what is to come: limits stand as for an idle machine, and a busy one gets several times that.

They bound how long a failure takes. What a test claims of speed it measures by itself, against what the machine does at that time.
"""

from __future__ import annotations

import time

FACTOR = 5
"""Two cores with five other things to do, as continuous integration may have."""


def patience(seconds: float) -> float:
    """Seconds that a wait may take on any machine, of those that it may take on an idle one."""
    return seconds * FACTOR


def deadline(seconds: float) -> float:
    """The time of the monotonic clock when to give up a wait that takes at most so many seconds on an idle machine."""
    return time.monotonic() + patience(seconds)
