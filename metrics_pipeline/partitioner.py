"""The partition of a key, as the Java client and our producer choose it: murmur2 of the key's bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.void]

_SEED = 0x9747B28C
_M = 0x5BD1E995
_MASK = 0xFFFFFFFF
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_SECOND = 1_000_000


def murmur2(data: bytes) -> int:
    """The 32-bit hash of Kafka's Java client (`Utils.murmur2`), unsigned."""
    mixed = _SEED ^ len(data)
    whole = len(data) & ~3
    for at in range(0, whole, 4):
        word = int.from_bytes(data[at : at + 4], "little") * _M & _MASK
        mixed = (mixed * _M & _MASK) ^ ((word ^ word >> 24) * _M & _MASK)
    if rest := data[whole:]:
        mixed = (mixed ^ int.from_bytes(rest, "little")) * _M & _MASK
    mixed = (mixed ^ mixed >> 13) * _M & _MASK
    return mixed ^ mixed >> 15


def partition(key: bytes, partitions: int) -> int:
    """The partition of a message with this key."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def homes(keys: Sequence[bytes], partitions: int) -> npt.NDArray[np.int64]:
    """The partition of each key as it stands in a message; many at once, quickest where many have the same length."""
    found = np.zeros(len(keys), np.int64)
    lengths = np.fromiter(map(len, keys), np.int64, len(keys))
    for length in np.unique(lengths):
        (places,) = np.nonzero(lengths == length)
        together = np.frombuffer(b"".join(keys[int(at)] for at in places), np.uint8).reshape(len(places), length)
        found[places] = (_murmur2_of_rows(together) & np.uint32(0x7FFFFFFF)) % np.uint32(partitions)
    return found


def partitions_of(keys: Rows, partitions: int) -> npt.NDArray[np.int64]:
    """The partition of each key, as `metric.encode` writes it; many at once.

    Args:
        keys: `spill.KEY` entries; those outside the years 1 to 9999, which no message can say, get any partition.
        partitions: how many the topic has.
    """
    homes = np.zeros(len(keys), np.int64)
    whole_second = keys["published_at"] % _SECOND == 0
    one_digit = keys["metric_name"] < 10
    for fraction in (False, True):
        for digits in (1, 2):
            which = (whole_second != fraction) & (one_digit == (digits == 1))
            if which.any():
                hashed = _murmur2_of_rows(_texts(keys[which], fraction, digits))
                homes[which] = (hashed & np.uint32(0x7FFFFFFF)) % np.uint32(partitions)
    return homes


def _texts(keys: Rows, fraction: bool, digits: int) -> npt.NDArray[np.uint8]:
    """The JSON of each key, one a row; all have the same length."""
    count = len(keys)
    device = np.ascontiguousarray(keys["device_id"]).view(np.uint8).reshape(count, 16)
    hexed = _HEX[np.stack([device >> 4, device & 15], axis=2)].reshape(count, 32)
    dash = _constant(b"-", count)
    moments = keys["published_at"].astype("<i8") + np.datetime64("2000-01-01", "us").astype(np.int64)
    text = np.datetime_as_string(moments.astype("datetime64[us]"), unit="us").astype("S26")
    moment = text.view(np.uint8).reshape(count, 26)[:, : 26 if fraction else 19]
    metric = keys["metric_name"].astype("<i8")
    places = [metric // 10, metric % 10][2 - digits :]
    return np.hstack(
        [
            _constant(b'{"device_id":"', count),
            *(hexed[:, :8], dash, hexed[:, 8:12], dash, hexed[:, 12:16], dash, hexed[:, 16:20], dash, hexed[:, 20:]),
            _constant(b'","published_at":"', count),
            moment,
            _constant(b'Z","metric_name":', count),
            np.stack(places, axis=1).astype(np.uint8) + np.uint8(ord("0")),
            _constant(b"}", count),
        ]
    )


def _constant(text: bytes, count: int) -> npt.NDArray[np.uint8]:
    return np.broadcast_to(np.frombuffer(text, np.uint8), (count, len(text)))


def _murmur2_of_rows(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    count, length = data.shape
    m = np.uint32(_M)
    whole = length & ~3
    words = np.ascontiguousarray(data[:, :whole]).view("<u4")
    mixed = np.full(count, _SEED ^ length, np.uint32)
    for column in words.T:
        word = column.astype(np.uint32) * m
        mixed = (mixed * m) ^ ((word ^ word >> np.uint32(24)) * m)
    if length > whole:
        rest = np.zeros(count, np.uint32)
        for at in range(length - 1, whole - 1, -1):
            rest = rest << np.uint32(8) | data[:, at]
        mixed = (mixed ^ rest) * m
    mixed = (mixed ^ mixed >> np.uint32(13)) * m
    return mixed ^ mixed >> np.uint32(15)
