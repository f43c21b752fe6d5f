"""Stretches of a text as rows of eight-byte words, turned so that each word of all rows lies in one piece."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

WORD: Final = np.dtype("<u8")
"""The first character is the lowest byte."""
WORDS: Final = 15
"""Most words of a row."""
ALL: Final = np.uint64(0xFFFFFFFFFFFFFFFF)


def turned(text: bytes, starts: npt.NDArray[Any], words: int) -> npt.NDArray[Any]:
    """Rows of `words` words that begin at `starts`, as an array of shape (words, rows)."""
    size = 8 * words
    every: npt.NDArray[Any] = np.ndarray((len(text) - size + 1,), f"V{size}", text, strides=(1,))
    return np.ascontiguousarray(every[starts].view(WORD).reshape(-1, words).T)
