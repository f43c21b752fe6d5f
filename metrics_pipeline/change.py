"""What an idempotent step did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Change:
    """The outcome of bringing one thing to its configured state.

    Attributes:
        state: what happened.
        details: one line for each thing made or altered; empty when nothing was.
    """

    state: Literal["created", "changed", "unchanged"]
    details: list[str] = field(default_factory=list)

    def then(self, other: Change) -> Change:
        """Both as one: what was done first says whether the thing is new."""
        state = "changed" if self.state == "unchanged" and other.details else self.state
        return Change(state, [*self.details, *other.details])
