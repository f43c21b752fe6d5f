"""How far the sink was when: what bounds the search for the reading that a coerced record has overwritten."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

APART: Final = timedelta(seconds=5)
"""Between two samples that are kept."""
SAMPLES: Final = 20_000
"""About a day of them."""
SKEW: Final = timedelta(seconds=10)
"""By how much PostgreSQL's clock and ours may differ."""


class SinkProgress:
    """Committed offsets by time.

    A record is stored before its offset is committed. So what was stored first at a moment had not been committed before it: it
    stands at or behind what was committed then, and so does whatever came of the same key later.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[datetime, dict[int, int]]] = deque(maxlen=SAMPLES)

    def note(self, at: datetime, committed: Mapping[int, int]) -> None:
        """Remember how far the sink is now."""
        if not self._samples or at - self._samples[-1][0] >= APART:
            self._samples.append((at, dict(committed)))

    def before(self, moment: datetime) -> dict[int, int]:
        """Per partition an offset before which nothing was stored at this moment or later; empty when that is not known."""
        bound: dict[int, int] = {}
        for at, committed in reversed(self._samples):
            # The sink may have gone back since: the least of all is what counts.
            for number, offset in committed.items():
                bound[number] = min(offset, bound.get(number, offset))
            if at + SKEW <= moment:
                return {number: bound[number] for number in committed}
        return {}
