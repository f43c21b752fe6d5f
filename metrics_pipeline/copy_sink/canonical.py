"""The fast road: readings in the form that our own producers write, tested and taken apart by columns.

A record is *canonical* when its value is byte for byte

    {"device_id":"<uuid>","published_at":"<YYYY-MM-DDThh:mm:ss[.ffffff]Z>","metric_name":<code>,"value":<number>,"tags":[…]}

with a decimal number of limited length, and its key is the value's first three fields. Everything else, good or bad, is
left to the strict decoder (`metric.decode`): this module only ever says yes to what that one would give the same answer for.

All columns are numpy arrays over a batch; the only work in Python per record is the slice that holds its tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from metrics_pipeline.copy_sink.tags import TagTable
from metrics_pipeline.metric import EPOCH, MetricName

Array = npt.NDArray[Any]

_BEGIN: Final = b'{"device_id":"'
_SECOND: Final = b'","published_at":"'
_THIRD: Final = b'","metric_name":'
_FOURTH: Final = b',"value":'
_UUID_AT: Final = len(_BEGIN)
_TIME_AT: Final = _UUID_AT + 36 + len(_SECOND)
_TIME_SHAPES: Final = {20: b"0000-00-00T00:00:00Z", 27: b"0000-00-00T00:00:00.000000Z"}
_FRACTION_AT: Final = _TIME_AT + 19
_HEAD: Final = 120
"""Bytes of a value that are looked at as one row of a matrix: all up to behind the metric code, in whole words."""
_NUMBER: Final = 24
"""Longest text of a number, with the comma behind it, that the fast road takes."""
PADDING: Final = _HEAD + 64
"""Bytes that must follow the texts given to `parse`, so that none is looked at beyond its end."""
SHORTEST: Final = _TIME_AT + 20 + len(_THIRD) + len(b'0,"value":0,"tags":[]}')

_WORD: Final = np.dtype("<u8")
_ZEROS: Final = np.uint64(0x3030303030303030)
_DASHES: Final = (8, 13, 18, 23)
_HEX_AT: Final = np.array([_UUID_AT + at for at in range(36) if at not in _DASHES])
_EPOCH_DAY: Final = EPOCH.toordinal()


def _word(text: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(text, "little"))


_VALUE_MARK: Final = _word(b'"value":')
_TAGS_MARK: Final = _word(b',"tags":')


def _hex_table() -> Array:
    table = np.full(256, 0xF0, np.uint8)
    for digit in b"0123456789abcdefABCDEF":
        table[digit] = int(chr(digit), 16)
    return table


def _calendar() -> tuple[Array, Array]:
    """Days from 2000-01-01 to the day before each month, and the month's length; index year * 16 + month."""
    before, length = np.zeros(10_000 * 16, np.int32), np.zeros(10_000 * 16, np.int32)
    for year in range(1, 10_000):
        for month in range(1, 13):
            first = date(year, month, 1).toordinal()
            after = (
                date(year + month // 12, month % 12 + 1, 1).toordinal() if (year, month) != (9999, 12) else first + 31
            )
            before[year * 16 + month] = first - _EPOCH_DAY - 1
            length[year * 16 + month] = after - first
    return before, length


_MOST_TENS: Final = max(MetricName) // 10


def _codes() -> Array:
    known = np.zeros(256, np.bool_)
    known[[int(name) for name in MetricName]] = True
    return known


_HEX: Final = _hex_table()
_DAY_BEFORE, _DAYS = _calendar()
_KNOWN: Final = _codes()
_TOP: Final = np.array(
    [0] + [(0xFFFFFFFFFFFFFFFF << (64 - 8 * count)) & 0xFFFFFFFFFFFFFFFF for count in range(1, 9)], np.uint64
)
"""Masks for the last `index` bytes of a word as they stand in memory."""
_BOTTOM: Final = np.array([(1 << (8 * count)) - 1 for count in range(9)], np.uint64)
"""Masks for the first `index` bytes."""


@dataclass(frozen=True)
class _Shape:
    """What is the same for all values whose time has the same length.

    Attributes:
        metric_at: where the code begins.
        template: the words up to there, zero where they vary.
        fixed: masks of what does not vary in them.
        key_mask: masks of what they have in common with the key: everything up to the code.
        digits_at: columns of the time's digits.
        weights: from digits to year, month, day, hour, minute, second, microsecond.
    """

    metric_at: int
    template: Array
    fixed: Array
    key_mask: Array
    digits_at: Array
    weights: Array


def _shape(length: int) -> _Shape:
    text = bytearray(_BEGIN + b"00000000-0000-0000-0000-000000000000" + _SECOND + _TIME_SHAPES[length] + _THIRD)
    metric_at = len(text)
    open_ = np.zeros(_HEAD, np.bool_)
    open_[metric_at:] = True
    digits = [at for at in range(metric_at) if text[at : at + 1] == b"0"]
    open_[digits] = True
    template = np.zeros(_HEAD, np.uint8)
    template[:metric_at] = np.frombuffer(bytes(text), np.uint8)
    fixed = np.where(open_, 0, 255).astype(np.uint8)
    key = np.where(np.arange(_HEAD) < metric_at, 255, 0).astype(np.uint8)
    times = [at for at in digits if at >= _TIME_AT]
    weights = np.zeros((len(times), 7), np.float32)
    widths = [4, 2, 2, 2, 2, 2, 6][: 7 if length == 27 else 6]
    row = 0
    for field, width in enumerate(widths):
        for place in range(width):
            weights[row, field] = 10 ** (width - 1 - place)
            row += 1
    words = (metric_at + 7) // 8
    return _Shape(
        metric_at,
        (template & fixed).view(_WORD)[:words].copy(),
        fixed.view(_WORD)[:words].copy(),
        key.view(_WORD)[:words].copy(),
        np.array(times),
        weights,
    )


_SHAPES: Final = {length: _shape(length) for length in _TIME_SHAPES}


@dataclass
class ReadingColumns:
    """Readings by columns, all of the same length.

    Attributes:
        source: position of each reading's record in the batch.
        device_id: 16 bytes each, shape (n, 16).
        published_at: microseconds since 2000-01-01 UTC, as PostgreSQL counts.
        metric_name: codes.
        value: the values.
        tags: numbers of entries in the tag table.
    """

    source: Array
    device_id: Array
    published_at: Array
    metric_name: Array
    value: Array
    tags: Array

    def __len__(self) -> int:
        return len(self.source)

    def take(self, which: Array) -> ReadingColumns:
        """The readings at these positions, or where this mask is true."""
        return ReadingColumns(
            self.source[which],
            self.device_id[which],
            self.published_at[which],
            self.metric_name[which],
            self.value[which],
            self.tags[which],
        )

    @staticmethod
    def joined(parts: Sequence[ReadingColumns]) -> ReadingColumns:
        """Several after one another."""
        if len(parts) == 1:
            return parts[0]
        return ReadingColumns(
            np.concatenate([part.source for part in parts]),
            np.concatenate([part.device_id for part in parts]),
            np.concatenate([part.published_at for part in parts]),
            np.concatenate([part.metric_name for part in parts]),
            np.concatenate([part.value for part in parts]),
            np.concatenate([part.tags for part in parts]),
        )


EMPTY: Final = ReadingColumns(
    np.empty(0, np.int64),
    np.empty((0, 16), np.uint8),
    np.empty(0, np.int64),
    np.empty(0, np.int16),
    np.empty(0, np.float64),
    np.empty(0, np.int64),
)


def key_of(value: bytes) -> bytes:
    """The key of a record that is canonical, by its value."""
    return value[: value.index(_FOURTH)] + b"}"


def parse(
    keys: bytes, values: bytes, key_lengths: Array, lengths: Array, tags: TagTable
) -> tuple[ReadingColumns, Array]:
    """Take apart the canonical ones among some records.

    Args:
        keys: of the messages, one after another, and `PADDING` bytes.
        values: of the same messages, likewise.
        key_lengths: of the keys, in bytes.
        lengths: of the values, in bytes.
        tags: gives each text of tags a number, -1 for one that is not strictly an array of storable strings.

    Returns:
        The readings, in order, and the positions of the records that are not canonical.
    """
    count = len(lengths)
    text = np.frombuffer(values, np.uint8)
    key_text = np.frombuffer(keys, np.uint8)
    starts = np.cumsum(lengths) - lengths
    key_starts = np.cumsum(key_lengths) - key_lengths
    heads = _windows(text, _HEAD)[starts]

    fractions = heads[:, _FRACTION_AT] == ord(".")
    long_enough = lengths >= SHORTEST
    parts, refused = [], [np.flatnonzero(~long_enough)]
    for shape, chosen in ((_SHAPES[27], fractions & long_enough), (_SHAPES[20], ~fractions & long_enough)):
        which = np.flatnonzero(chosen)
        if 2 * len(which) > count:  # the usual case: looking at some in vain costs less than copying the others
            part, good = _rows(shape, heads, text, starts, lengths, key_text, key_starts, key_lengths, values, tags)
            good &= chosen
            part.source = np.arange(count)
            refused.append(np.flatnonzero(chosen & ~good))
        elif len(which):
            part, good = _rows(
                shape,
                heads[which],
                text,
                starts[which],
                lengths[which],
                key_text,
                key_starts[which],
                key_lengths[which],
                values,
                tags,
            )
            part.source = which
            refused.append(which[~good])
        else:
            continue
        parts.append(part if good.all() else part.take(good))
    columns = ReadingColumns.joined(parts) if parts else EMPTY
    if len(parts) > 1:
        columns = columns.take(np.argsort(columns.source, kind="stable"))
    return columns, np.sort(np.concatenate(refused))


def _rows(
    shape: _Shape,
    heads: Array,
    text: Array,
    starts: Array,
    lengths: Array,
    key_text: Array,
    key_starts: Array,
    key_lengths: Array,
    values: bytes,
    tags: TagTable,
) -> tuple[ReadingColumns, Array]:
    """The columns of values whose time has this shape, and which of them are canonical; the others' entries mean nothing."""
    with np.errstate(over="ignore"):
        words = heads.view(_WORD)[:, : len(shape.template)]
        key_words = _windows(key_text, _HEAD)[key_starts].view(_WORD)[:, : len(shape.template)]
        differs, other = words ^ shape.template, words ^ key_words
        differs &= shape.fixed
        other &= shape.key_mask
        differs |= other
        bad = np.bitwise_or.reduce(differs, axis=1) != 0

        nibbles = _HEX.take(heads.take(_HEX_AT, axis=1))
        bad |= (np.bitwise_or.reduce(nibbles.view(_WORD), axis=1) & np.uint64(0xF0F0F0F0F0F0F0F0)) != 0
        device_id = (nibbles[:, 0::2] << 4) | (nibbles[:, 1::2] & 15)

        published_at, wrong = _times(shape, heads)
        bad |= wrong

        # One digit or two, then a comma here and a brace in the key.
        first, second, third = (heads[:, shape.metric_at + at] for at in range(3))
        single = second == ord(",")
        ones, tens = second - np.uint8(48), first - np.uint8(48)
        code = np.where(single, tens, tens * np.uint8(10) + ones)
        bad |= (
            ~(single | ((third == ord(",")) & (tens - np.uint8(1) < _MOST_TENS) & (ones < 10)))
            | ~_KNOWN[code]
            | (single & (tens > 9))
        )
        code_end = np.where(single, shape.metric_at + 1, shape.metric_at + 2)
        bad |= key_lengths != code_end + 1
        bad |= key_text[key_starts + code_end] != ord("}")
        key_starts = key_starts + shape.metric_at
        bad |= (key_text[key_starts] != first) | (~single & (key_text[key_starts + 1] != second))
        eights = _windows(text, 8)
        at = starts + code_end
        bad |= eights[at + 1].view(_WORD)[:, 0] != _VALUE_MARK
        at += 9

        value, number_end, wrong = _numbers(text, at)
        bad |= wrong
        at += number_end
        bad |= eights[at].view(_WORD)[:, 0] != _TAGS_MARK
        tails = map(values.__getitem__, map(slice, (at + 8).tolist(), (starts + lengths).tolist()))
        tag = np.fromiter(map(tags.numbers.__getitem__, tails), np.int64, len(at))
        bad |= tag < 0
    columns = ReadingColumns(np.empty(0, np.int64), device_id, published_at, code.astype(np.int16), value, tag)
    return columns, ~bad


def _windows(text: Array, width: int) -> Array:
    """Every stretch of `width` bytes as a row; nothing is copied until rows are chosen."""
    return np.lib.stride_tricks.as_strided(text, (len(text) - width + 1, width), (1, 1), writeable=False)


def _times(shape: _Shape, heads: Array) -> tuple[Array, Array]:
    """Microseconds since 2000, and where the digits are no time of the years 1 to 9999."""
    digits = heads.take(shape.digits_at, axis=1) - np.uint8(48)
    wrong = digits.max(axis=1) > 9
    # Whole numbers below 2**24 are exact in float32.
    fields = (digits.astype(np.float32) @ shape.weights).astype(np.int64)
    year, month, day, hour, minute, second, micro = fields.T
    month_at = np.where(wrong, 0, year * 16 + np.minimum(month, 15))
    wrong |= (day < 1) | (day > _DAYS[month_at]) | (hour > 23) | (minute > 59) | (second > 59)
    seconds = ((_DAY_BEFORE[month_at] + day) * 24 + hour) * 3600 + minute * 60 + second
    return seconds * 1_000_000 + micro, wrong


def _numbers(text: Array, at: Array) -> tuple[Array, Array, Array]:
    """Values of the numbers that begin at `at`, their lengths, and where there is none that the fast road takes.

    A number of up to 7 digits before and 8 behind the point is a whole number below 2**53 divided by 10**8: both are exact, so
    the quotient is the nearest double (W. D. Clinger, How to read floating point numbers accurately, 1990).
    """
    cells = _windows(text, _NUMBER)[at]
    commas = cells == ord(",")
    length = commas.argmax(axis=1)
    points = cells == ord(".")
    point = points.argmax(axis=1)
    rows = np.arange(len(at))
    wrong = ~commas[rows, length]
    has_point = points[rows, point] & (point < length)
    negative = cells[:, 0] == ord("-")
    whole = np.where(has_point, point, length) - negative
    decimals = np.where(has_point, length - point - 1, 0)
    begin = at + negative
    wrong |= (whole < 1) | (has_point & (decimals < 1))
    wrong |= (whole > 1) & (text[begin] == ord("0"))

    eights = _windows(text, 8)
    short = (whole <= 7) & (decimals <= 8) & ~wrong
    before = eights[np.where(short, begin + whole - 8, 0)].view(_WORD)[:, 0]
    behind = eights[np.where(short, begin + whole + 1, 0)].view(_WORD)[:, 0]
    keep, keep_behind = _TOP[np.where(short, whole, 0)], _BOTTOM[np.where(short, decimals, 0)]
    before = (before & keep) | (_ZEROS & ~keep)
    behind = (behind & keep_behind) | (_ZEROS & ~keep_behind)
    wrong |= short & ~(_are_digits(before) & _are_digits(behind))
    scaled = _number(before) * np.uint64(100_000_000) + _number(behind)
    value = scaled.astype(np.float64) / 1e8
    value = np.where(negative, -value, value)
    # Whether `-0` is a float or an integer is the strict decoder's business.
    wrong |= short & negative & ~has_point & (scaled == 0)

    others = np.flatnonzero(~short & ~wrong)
    if len(others):
        text_of, good = _long_numbers(cells[others], length[others], point[others], has_point[others], negative[others])
        value[others[good]] = text_of[good].astype(np.float64)
        wrong[others[~good]] = True
    return value, length, wrong


def _long_numbers(cells: Array, length: Array, point: Array, has_point: Array, negative: Array) -> tuple[Array, Array]:
    """Texts of decimal numbers without an exponent, and which of them are nothing else."""
    places = np.arange(_NUMBER)
    inside = places < length[:, None]
    allowed: Array = ((cells - np.uint8(48)) < 10) | ~inside
    rows = np.arange(len(cells))
    allowed[rows[has_point], point[has_point]] = True
    allowed[negative, 0] = True
    texts = np.ascontiguousarray(np.where(inside, cells, 0).astype(np.uint8)).view(f"S{_NUMBER}")[:, 0]
    return texts, np.asarray(allowed.all(axis=1))


def _are_digits(words: Array) -> Array:
    """Whether all eight bytes are decimal digits: a digit's high half is 3, and stays so when 6 is added to the low half.

    https://lemire.me/blog/2018/09/30/quickly-identifying-a-sequence-of-digits-in-a-string-of-characters/
    """
    high = np.uint64(0xF0F0F0F0F0F0F0F0)
    over = ((words + np.uint64(0x0606060606060606)) & high) >> np.uint64(4)
    digits: Array = ((words & high) | over) == np.uint64(0x3333333333333333)
    return digits


def _number(words: Array) -> Array:
    """Eight decimal digits, the first in the lowest byte, as a whole number: pairs, then fours, then all eight.

    Each factor is 10^n · 2^(8n) + 1 for halves of n digits, so that `(a + 2^(8n) · b) · factor` has `10^n · a + b` in its
    upper half: https://johnnylee-sde.github.io/Fast-numeric-string-to-int/, as in simdjson and fast_float.
    """
    words = (words & np.uint64(0x0F0F0F0F0F0F0F0F)) * np.uint64(2561) >> np.uint64(8)
    words = (words & np.uint64(0x00FF00FF00FF00FF)) * np.uint64(6553601) >> np.uint64(16)
    return (words & np.uint64(0x0000FFFF0000FFFF)) * np.uint64(42949672960001) >> np.uint64(32)
