"""Tags, strictly checked and encoded once per distinct text: devices keep theirs from reading to reading."""

from __future__ import annotations

import struct
from hashlib import sha256
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from metrics_pipeline.copy_sink.words import ALL, WORD, turned
from metrics_pipeline.errors import RecordError
from metrics_pipeline.metric import check_tags

LARGEST: Final = 1 << 15
"""Distinct texts that are remembered; beyond it everything is forgotten and learnt again."""
LONGEST: Final = 512
"""Bytes of a text that is worth remembering."""

_SHORT: Final = 8
"""Words of a text that is found without a look at it in Python."""
_SLOT_BITS: Final = 14
_FACTORS: Final = np.array(
    [int.from_bytes(sha256(bytes([number])).digest()[:8], "little") | 1 for number in range(_SHORT + 1)], WORD
)
"""Odd numbers without a pattern, to mix the words of a text."""
_TEXT_OID: Final = 25
_decode: Final = msgspec.json.Decoder(list[str]).decode
_int32: Final = struct.Struct(">i").pack
_header: Final = struct.Struct(">iiiii").pack


class TagTable:
    """Gives each array of tags a number.

    Attributes:
        numbers: by the text that ends a value, closing brace included (`["site:a"]}`); -1 for what is no such text. A
            look-up adds what is not there yet.
        encoded: by number, the array as PostgreSQL receives it in binary, without the length before it.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.encoded: list[bytes] = []
        self.numbers = _Numbers(self)
        self._known: dict[tuple[str, ...], int] = {}
        # Texts by a hash, each slot with the last one seen.
        self._slot_words = np.zeros((_SHORT, 1 << _SLOT_BITS), WORD)
        self._slot_lengths = np.zeros(1 << _SLOT_BITS, np.int64)
        self._slot_numbers = np.zeros(1 << _SLOT_BITS, np.int64)

    def numbers_of(self, text: bytes, begins: npt.NDArray[Any], ends: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The numbers of many texts that end a value, as `numbers` has them.

        Args:
            text: in which they stand; at least 64 bytes follow the last one.
            begins: where each begins.
            ends: where each ends; when that is not behind its begin, it is no text of tags.
        """
        lengths = np.maximum(ends - begins, 0)
        count = min(max(1, -(-int(lengths.max(initial=0)) // 8)), _SHORT)
        words = turned(text, begins, count)
        hashed = lengths.astype(WORD)
        with np.errstate(over="ignore"):
            for at in range(count):
                # A shift by 64 bits leaves nothing, so that a mask of eight bytes is whole.
                words[at] &= ~(ALL << (np.clip(lengths - 8 * at, 0, 8).astype(WORD) << np.uint64(3)))
                hashed = (hashed ^ words[at]) * _FACTORS[at]
                hashed ^= hashed >> np.uint64(32)
            slots = (hashed * _FACTORS[_SHORT] >> np.uint64(64 - _SLOT_BITS)).view(np.int64)
        found = (self._slot_lengths[slots] == lengths) & (lengths > 0) & (lengths <= 8 * _SHORT)
        for at in range(count):
            found &= self._slot_words[at][slots] == words[at]
        numbers: npt.NDArray[Any] = self._slot_numbers[slots]
        if not found.all():
            others = np.flatnonzero(~found)
            tails = map(text.__getitem__, map(slice, begins[others].tolist(), ends[others].tolist()))
            numbers[others] = np.fromiter(map(self.numbers.__getitem__, tails), np.int64, len(others))
            others = others[(numbers[others] >= 0) & (lengths[others] <= 8 * _SHORT)]
            _, firsts = np.unique(slots[others], return_index=True)
            kept = others[firsts]
            self._slot_words[:, slots[kept]] = 0
            self._slot_words[:count, slots[kept]] = words[:, kept]
            self._slot_lengths[slots[kept]] = lengths[kept]
            self._slot_numbers[slots[kept]] = numbers[kept]
        return numbers

    def number_of(self, tags: list[str]) -> int:
        """The number of an array that has been checked."""
        key = tuple(tags)
        number = self._known.get(key)
        if number is None:
            number = self._known[key] = len(self.encoded)
            self.encoded.append(encode_tags(tags))
        return number

    def forget(self) -> None:
        """Start over when too much is remembered. Batches made before keep the list that their numbers count in."""
        if len(self.encoded) > LARGEST or len(self.numbers) > LARGEST:
            self._begin()


class _Numbers(dict[bytes, int]):
    def __init__(self, table: TagTable) -> None:
        super().__init__()
        self._table = table

    def __missing__(self, tail: bytes) -> int:
        number = -1
        if tail.endswith(b"]}"):
            try:
                tags = _decode(tail[:-1])
                check_tags(tags)
                number = self._table.number_of(tags)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, RecordError):
                pass
        if len(tail) <= LONGEST:
            self[tail] = number
        return number


def encode_tags(tags: list[str]) -> bytes:
    """A one-dimensional text[] in PostgreSQL's binary format (array_send); an empty one has no dimensions."""
    if not tags:
        return struct.pack(">iii", 0, 0, _TEXT_OID)
    texts = [tag.encode() for tag in tags]
    return _header(1, 0, _TEXT_OID, len(texts), 1) + b"".join(_int32(len(text)) + text for text in texts)
