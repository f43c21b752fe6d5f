"""Messages."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FakeMessage:
    """`confluent_kafka.Message`."""

    number: int
    at: int
    key_bytes: bytes | None
    value_bytes: bytes | None
    problem: Any = None

    def key(self) -> bytes | None:
        return self.key_bytes

    def value(self) -> bytes | None:
        return self.value_bytes

    def partition(self) -> int:
        return self.number

    def offset(self) -> int:
        return self.at

    def error(self) -> Any:
        return self.problem

    def timestamp(self) -> tuple[int, int]:
        return 1, 0


def copied(data: bytes) -> list[tuple[bytes, ...]]:
    """The fields of each row of a binary COPY."""
    header = b"PGCOPY\n\xff\r\n\0" + bytes(8)
    assert data.startswith(header)
    rows, at = [], len(header)
    while (count := struct.unpack_from(">h", data, at)[0]) >= 0:
        at += 2
        fields = []
        for _ in range(count):
            (size,) = struct.unpack_from(">i", data, at)
            fields.append(data[at + 4 : at + 4 + size])
            at += 4 + size
        rows.append(tuple(fields))
    assert data[at:] == b"\xff\xff"
    return rows
