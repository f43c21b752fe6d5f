"""The fast road: readings in the form that our own producers write, tested and taken apart by columns.

A record is *canonical* when its value is byte for byte

    {"device_id":"<uuid>","published_at":"<YYYY-MM-DDThh:mm:ss[.ffffff]Z>","metric_name":<code>,"value":<number>,"tags":[…]}

with a decimal number of limited length, and its key is the value's first three fields. Everything else, good or bad, is
left to the strict decoder (`metric.decode`): this module only ever says yes to what that one would give the same answer for.

All columns are numpy arrays over a few thousand records. What is looked at of a record is a row of eight-byte words, turned so that
each word of all records lies in one piece: a step of the work is then one operation on such pieces, eight characters a word
(SIMD within a register). There is no work in Python per record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from metrics_pipeline.copy_sink.tags import TagTable
from metrics_pipeline.copy_sink.words import ALL, WORD, WORDS, turned
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
_LEAD: Final = 2
"""Bytes before a record with which its row begins, so that the words of device and time lie well in it."""
_HEAD: Final = 120
"""Bytes of a row: all up to behind the metric code, in whole words."""
_NUMBER: Final = 24
"""Longest text of a number, with the comma behind it, that the fast road takes."""
PADDING: Final = _HEAD + 8 * WORDS
"""Bytes before and after the texts that `parse` takes, so that nothing beyond them is looked at."""
_PADDING: Final = bytes(PADDING)
SHORTEST: Final = _TIME_AT + 20 + len(_THIRD) + len(b'0,"value":0,"tags":[]}')

_BYTE: Final = np.uint64(255)
_ONES: Final = np.uint64(0x0101010101010101)
_SIXES: Final = _ONES * np.uint64(6)
_NIBBLES: Final = _ONES * np.uint64(15)
_SIXTEENS: Final = _ONES * np.uint64(16)
_POINTS: Final = _ONES * np.uint64(ord("."))
_COMMAS: Final = _ONES * np.uint64(ord(","))
_ZEROS: Final = _ONES * np.uint64(ord("0"))
_HIGHS: Final = _ONES * np.uint64(128)
_BITS: Final = np.arange(8, dtype=np.uint64) * np.uint64(8)
"""Bits of as many bytes."""
_BRACE_SECOND: Final = np.uint64(ord("}") << 8)
_BRACE_THIRD: Final = np.uint64(ord("}") << 16)
_FRACTION_WORD: Final = (_LEAD + _FRACTION_AT) // 8
_FRACTION_SHIFT: Final = np.uint64((_LEAD + _FRACTION_AT) % 8 * 8)
_EPOCH_DAY: Final = EPOCH.toordinal()


def _word(text: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(text, "little"))


_VALUE_MARK: Final = _word(b'"value":')
_TAGS_MARK: Final = _word(b',"tags":')


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
        template: the words of a row up to there, zero where they vary.
        fixed: masks of what does not vary in them.
        key_mask: masks of what they have in common with the key: everything up to the code.
        code_word: which word the code begins in.
        code_shift: bits of that word before it.
        fraction: whether the time has microseconds.
    """

    metric_at: int
    template: Array
    fixed: Array
    key_mask: Array
    code_word: int
    code_shift: np.uint64
    fraction: bool


def _shape(length: int) -> _Shape:
    text = _BEGIN + b"00000000-0000-0000-0000-000000000000" + _SECOND + _TIME_SHAPES[length] + _THIRD
    metric_at = len(text)
    row = np.zeros(_HEAD, np.uint8)
    row[_LEAD : _LEAD + metric_at] = np.frombuffer(text, np.uint8)
    common = (np.arange(_HEAD) >= _LEAD) & (np.arange(_HEAD) < _LEAD + metric_at)
    fixed = np.where(common & (row != ord("0")), 255, 0).astype(np.uint8)
    key = np.where(common, 255, 0).astype(np.uint8)
    code_word, code_byte = divmod(_LEAD + metric_at, 8)
    return _Shape(
        metric_at,
        (row & fixed).view(WORD)[:, None].copy(),
        fixed.view(WORD)[:, None].copy(),
        key.view(WORD)[:, None].copy(),
        code_word,
        np.uint64(8 * code_byte),
        length > min(_TIME_SHAPES),
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
            # One copy a row instead of one a byte.
            self.device_id.view("V16")[which].view(np.uint8),
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


def padded(texts: Sequence[bytes]) -> bytes:
    """Texts one after another, as `parse` takes them."""
    return b"".join([_PADDING, *texts, _PADDING])


def parse(
    keys: bytes, values: bytes, key_lengths: Array, lengths: Array, tags: TagTable
) -> tuple[ReadingColumns, Array]:
    """Take apart the canonical ones among some records.

    Args:
        keys: of the messages, `padded`.
        values: of the same messages, likewise.
        key_lengths: of the keys, in bytes.
        lengths: of the values, in bytes.
        tags: gives each text of tags a number, -1 for one that is not strictly an array of storable strings.

    Returns:
        The readings, in order, and the positions of the records that are not canonical.
    """
    count = len(lengths)
    records = _Records(
        keys,
        values,
        PADDING + np.cumsum(key_lengths) - key_lengths,
        key_lengths,
        PADDING + np.cumsum(lengths) - lengths,
        lengths,
    )
    words = turned(values, records.starts - _LEAD, _HEAD // 8)
    fractions = (words[_FRACTION_WORD] >> _FRACTION_SHIFT) & _BYTE == ord(".")
    long_enough = lengths >= SHORTEST
    parts, refused = [], [np.flatnonzero(~long_enough)]
    for shape, chosen in ((_SHAPES[27], fractions & long_enough), (_SHAPES[20], ~fractions & long_enough)):
        which = np.flatnonzero(chosen)
        if 2 * len(which) > count:  # the usual case: looking at some in vain costs less than copying the others
            part, good = _rows(shape, words, records, tags)
            good &= chosen
            part.source = np.arange(count)
            refused.append(np.flatnonzero(chosen & ~good))
        elif len(which):
            part, good = _rows(shape, words[:, which], records.take(which), tags)
            part.source = which
            refused.append(which[~good])
        else:
            continue
        parts.append(part if good.all() else part.take(good))
    columns = ReadingColumns.joined(parts) if parts else EMPTY
    if len(parts) > 1:
        columns = columns.take(np.argsort(columns.source, kind="stable"))
    return columns, np.sort(np.concatenate(refused))


@dataclass(frozen=True, slots=True)
class _Records:
    """Where some records lie in the text of all."""

    keys: bytes
    values: bytes
    key_starts: Array
    key_lengths: Array
    starts: Array
    lengths: Array

    def take(self, which: Array) -> _Records:
        return _Records(
            self.keys,
            self.values,
            self.key_starts[which],
            self.key_lengths[which],
            self.starts[which],
            self.lengths[which],
        )


def _rows(shape: _Shape, words: Array, records: _Records, tags: TagTable) -> tuple[ReadingColumns, Array]:
    """The columns of values whose time has this shape, and which of them are canonical; the others' entries mean nothing."""
    with np.errstate(over="ignore"):
        key_words = turned(records.keys, records.key_starts - _LEAD, _HEAD // 8)
        differs, other = words ^ shape.template, words ^ key_words
        differs &= shape.fixed
        other &= shape.key_mask
        differs |= other
        wrong = np.bitwise_or.reduce(differs, axis=0)

        device_id, wrong_device = _devices(words)
        wrong |= wrong_device
        bad = wrong != 0
        published_at, wrong_time = _times(shape, words)
        bad |= wrong_time

        # One digit or two, then a comma here and a brace in the key.
        three = words[shape.code_word] >> shape.code_shift
        first, second, third = (three >> np.uint64(8 * at) & _BYTE for at in range(3))
        single = second == ord(",")
        ones, tens = second - np.uint64(48), first - np.uint64(48)
        code = np.where(single, tens, tens * np.uint64(10) + ones)
        bad |= (
            ~(single | ((third == ord(",")) & (tens - np.uint64(1) < _MOST_TENS) & (ones < 10)))
            | ~_KNOWN[np.minimum(code, np.uint64(255))]
            | (single & (tens > 9))
        )
        key_three = key_words[shape.code_word] >> shape.code_shift
        bad |= np.where(
            single,
            key_three & _BOTTOM[2] != first | _BRACE_SECOND,
            key_three & _BOTTOM[3] != three & _BOTTOM[2] | _BRACE_THIRD,
        )
        code_end = shape.metric_at + 2 - single.astype(np.int64)
        bad |= records.key_lengths != code_end + 1

        at = records.starts + code_end + 1
        mark, number = turned(records.values, at, 2)
        bad |= mark != _VALUE_MARK
        at += 8
        value, number_end, wrong_number = _short_numbers(number)
        # A record that is wrong already may have anything there.
        long = np.flatnonzero((number_end > 7) & ~bad)
        if len(long):
            text = np.frombuffer(records.values, np.uint8)
            value[long], number_end[long], wrong_number[long] = _numbers(text, at[long])
        bad |= wrong_number
        at += number_end
        (mark,) = turned(records.values, at, 1)
        bad |= mark != _TAGS_MARK
        tag = tags.numbers_of(records.values, at + 8, records.starts + records.lengths)
        bad |= tag < 0
    columns = ReadingColumns(np.empty(0, np.int64), device_id, published_at, code.astype(np.int16), value, tag)
    return columns, ~bad


def _devices(words: Array) -> tuple[Array, Array]:
    """The 16 bytes of each device's UUID, and what is not 0 where a digit is none."""
    digits = np.empty((4, words.shape[1]), WORD)
    digits[0] = words[2]
    digits[1] = words[3] >> _BITS[1] & _BOTTOM[4] | (words[3] >> _BITS[6]) << _BITS[4] | words[4] << _BITS[6]
    digits[2] = words[4] >> _BITS[3] & _BOTTOM[4] | words[5] << _BITS[4]
    digits[3] = words[5] >> _BITS[4] | words[6] << _BITS[4]
    # Letters have this bit, figures have not; what the value found stands for is then written again, and must be what was read.
    letters = digits >> np.uint64(6) & _ONES
    values = (digits & _NIBBLES) + letters * np.uint64(9)
    again = values + _ZEROS + letters * np.uint64(7) + (digits & letters << np.uint64(5))
    wrong = again ^ digits
    wrong |= ((values + _SIXES) >> np.uint64(4) ^ letters) & _ONES
    wrong |= values & _SIXTEENS
    packed = (values << np.uint64(4) | values >> np.uint64(8)) & np.uint64(0x00FF00FF00FF00FF)
    packed = (packed | packed >> np.uint64(8)) & np.uint64(0x0000FFFF0000FFFF)
    packed = (packed | packed >> np.uint64(16)) & _BOTTOM[4]
    device_id = np.empty((words.shape[1], 2), WORD)
    device_id[:, 0] = packed[0] | packed[1] << _BITS[4]
    device_id[:, 1] = packed[2] | packed[3] << _BITS[4]
    return device_id.view(np.uint8), np.bitwise_or.reduce(wrong, axis=0)


def _times(shape: _Shape, words: Array) -> tuple[Array, Array]:
    """Microseconds since 2000, and where the digits are no time of the years 1 to 9999."""
    day_text = words[8] >> _BITS[6] | (words[9] & _BOTTOM[2]) << _BITS[2]
    day_text |= (words[9] >> _BITS[3] & _BOTTOM[2]) << _BITS[4] | (words[9] >> _BITS[6]) << _BITS[6]
    time_text = words[10] >> _BITS[1] & _BOTTOM[2] | (words[10] >> _BITS[4] & _BOTTOM[2]) << _BITS[2]
    time_text |= (words[10] >> _BITS[7]) << _BITS[4] | (words[11] & _BYTE) << _BITS[5] | _ZEROS & _TOP[2]
    right = _are_digits(day_text) & _are_digits(time_text)
    micro: Array | int = 0
    if shape.fraction:
        micro_text = words[11] & _TOP[6] | _ZEROS & _BOTTOM[2]
        right &= _are_digits(micro_text)
        micro = _number(micro_text).view(np.int64)
    days, times = _pairs(day_text).view(np.int64), _pairs(time_text).view(np.int64)
    month, day = days >> 32 & 255, days >> 48
    hour, minute, second = times & 255, times >> 16 & 255, times >> 32 & 255
    month_at = np.where(right, ((days & 255) * 100 + (days >> 16 & 255)) * 16 + np.minimum(month, 15), 0)
    right &= (day >= 1) & (day <= _DAYS[month_at]) & (hour <= 23) & (minute <= 59) & (second <= 59)
    seconds = ((_DAY_BEFORE[month_at] + day) * 24 + hour) * 3600 + minute * 60 + second
    return seconds * 1_000_000 + micro, ~right


def _short_numbers(words: Array) -> tuple[Array, Array, Array]:
    """As `_numbers`, of numbers that end within their first word; of others the length is 8, and nothing else is told."""
    length, point = _first(words, _COMMAS), _first(words, _POINTS)
    has_point = point < length
    negative = words & _BYTE == ord("-")
    sign = negative.astype(np.uint64)
    words = words >> (sign << np.uint64(3))
    whole = np.where(has_point, point, length) - sign
    decimals = np.where(has_point, length - point - np.uint64(1), np.uint64(0))
    bits, decimal_bits = whole << np.uint64(3), decimals << np.uint64(3)
    before = words << (np.uint64(64) - bits) | _ZEROS >> bits
    behind = words >> bits >> np.uint64(8) & ~(ALL << decimal_bits) | _ZEROS << decimal_bits
    wrong = ~(_are_digits(before) & _are_digits(behind)) | (whole - np.uint64(1) > np.uint64(6))
    wrong |= has_point & (decimals == 0)
    wrong |= (whole > 1) & (words & _BYTE == ord("0"))
    scaled = _number(before) * np.uint64(100_000_000) + _number(behind)
    value = scaled.astype(np.float64) / 1e8
    value[negative] *= -1.0
    # Whether `-0` is a float or an integer is the strict decoder's business.
    wrong |= negative & ~has_point & (scaled == 0)
    return value, length.view(np.int64), wrong


def _first(words: Array, wanted: np.uint64) -> Array:
    """Where the first byte is that is as in `wanted`; 8 where none is."""
    found = words ^ wanted
    found = (found - _ONES) & ~found & _HIGHS
    below = np.bitwise_count((found - np.uint64(1)) & ~found)
    return below.astype(np.uint64) >> np.uint64(3)


def _windows(text: Array, width: int) -> Array:
    """Every stretch of `width` bytes as a row; nothing is copied until rows are chosen."""
    return np.lib.stride_tricks.as_strided(text, (len(text) - width + 1, width), (1, 1), writeable=False)


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
    before = eights[np.where(short, begin + whole - 8, 0)].view(WORD)[:, 0]
    behind = eights[np.where(short, begin + whole + 1, 0)].view(WORD)[:, 0]
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
    words = _pairs(words) * np.uint64(6553601) >> np.uint64(16)
    return (words & np.uint64(0x0000FFFF0000FFFF)) * np.uint64(42949672960001) >> np.uint64(32)


def _pairs(words: Array) -> Array:
    """Eight decimal digits as four numbers of 16 bits, of two digits each."""
    return (words & _NIBBLES) * np.uint64(2561) >> np.uint64(8) & np.uint64(0x00FF00FF00FF00FF)
