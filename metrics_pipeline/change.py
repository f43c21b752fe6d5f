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
