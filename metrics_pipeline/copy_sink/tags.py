"""Tags, strictly checked and encoded once per distinct text: devices keep theirs from reading to reading."""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from metrics_pipeline.errors import RecordError
from metrics_pipeline.metric import check_tags

LARGEST: Final = 1 << 15
"""Distinct texts that are remembered; beyond it everything is forgotten and learnt again."""
LONGEST: Final = 512
"""Bytes of a text that is worth remembering."""

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
        self.encoded: list[bytes] = []
        self.numbers = _Numbers(self)
        self._known: dict[tuple[str, ...], int] = {}

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
            self.encoded = []
            self.numbers = _Numbers(self)
            self._known = {}


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
