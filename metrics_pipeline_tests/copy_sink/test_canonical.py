"""The fast road and the strict decoder never disagree: what one gives the other gives, bit for bit, and what one refuses neither takes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics_pipeline import metric
from metrics_pipeline.copy_sink import canonical, tags
from metrics_pipeline.copy_sink.batch import LONGEST, Batch, BatchDecoder
from metrics_pipeline.copy_sink.canonical import ReadingColumns
from metrics_pipeline.copy_sink.tags import TagTable
from metrics_pipeline.errors import RecordError
from metrics_pipeline.metric import EPOCH, MetricName, Reading
from metrics_pipeline_tests.fake_sink import FakeMessage
from metrics_pipeline_tests.test_metric import ACCEPTED, KEY, REFUSED, VALUE, compact, readings, tags_strategy

Wire = tuple[bytes | None, bytes | None]
Stored = tuple[bytes, int, int, bytes, bytes]
"""Device, microseconds since 2000, code, the value's bits, the tags as PostgreSQL gets them."""


def strictly(key: bytes | None, value: bytes | None) -> Stored | str:
    """What `metric.decode` makes of a record, or why it refuses it."""
    try:
        reading = metric.decode(key, value)
    except RecordError as error:
        return error.reason
    since = reading.published_at - EPOCH
    return (
        reading.device_id.bytes,
        (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds,
        reading.metric_name,
        struct.pack(">d", reading.value),
        tags.encode_tags(reading.tags),
    )


def stored(columns: ReadingColumns, encoded: Sequence[bytes]) -> dict[int, Stored]:
    """Columns back into readings, by position in the batch."""
    rows = zip(
        columns.source.tolist(),
        columns.device_id,
        columns.published_at.tolist(),
        columns.metric_name.tolist(),
        columns.value.tolist(),
        columns.tags.tolist(),
        strict=True,
    )
    return {
        at: (device.tobytes(), time, code, struct.pack(">d", value), encoded[tag])
        for at, device, time, code, value, tag in rows
    }


def decoded(wires: Sequence[Wire], decoder: BatchDecoder | None = None) -> Batch:
    return (decoder or BatchDecoder()).decode([FakeMessage(0, at, *wire) for at, wire in enumerate(wires)], {})


def agree(wires: Sequence[Wire]) -> Batch:
    """Decode as the sink does, and by the strict decoder alone: the same, with every record accounted for."""
    batch = decoded(wires)
    found: dict[int, Stored | str] = {reject.at: reject.reason for reject in batch.rejects}
    found |= stored(batch.columns, batch.tags)
    expected = {at: strictly(*wire) for at, wire in enumerate(wires)}
    tombstones = [at for at, wire in enumerate(wires) if wire[1] is None]
    assert batch.tombstones == len(tombstones)
    assert found == {at: what for at, what in expected.items() if at not in tombstones}
    assert batch.columns.source.tolist() == sorted(set(batch.columns.source.tolist()))
    assert [reject.at for reject in batch.rejects] == sorted(reject.at for reject in batch.rejects)
    assert len(batch.columns) + len(batch.rejects) + batch.tombstones == len(wires)
    return batch


def fast(wires: Sequence[tuple[bytes, bytes]]) -> tuple[dict[int, Stored], list[int]]:
    """What the fast road alone takes, and what it leaves."""
    table = TagTable()
    keys, values = [key for key, _ in wires], [value for _, value in wires]
    key_lengths, lengths = (np.array([*map(len, texts)], np.int64) for texts in (keys, values))
    columns, others = canonical.parse(canonical.padded(keys), canonical.padded(values), key_lengths, lengths, table)
    taken = stored(columns, table.encoded)
    assert sorted([*taken, *others.tolist()]) == list(range(len(wires)))
    return taken, others.tolist()


# --- Valid readings, however they are written --------------------------------------------------------------------

moments = st.datetimes(timezones=st.just(UTC))
"""Years 1 to 9999."""
edges = st.sampled_from(
    [
        datetime(1, 1, 1, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC),
        datetime(1999, 12, 31, 23, 59, 59, 999_999, UTC),
        datetime(2000, 1, 1, tzinfo=UTC),
        datetime(2000, 2, 29, 12, tzinfo=UTC),
        datetime(1900, 2, 28, 23, 59, 59, 1, UTC),
        datetime(2026, 11, 22, 16, tzinfo=UTC),
    ]
)
digits = st.text("0123456789", min_size=1, max_size=25)
numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(-1e7, 1e7).map(lambda number: f"{number:.{random.Random(number).randrange(12)}f}"),
    st.integers(-(10**24), 10**24).map(str),
    st.builds(lambda sign, a, b: f"{sign}{int(a)}.{b}", st.sampled_from(["", "-"]), digits, digits),
    st.builds(lambda a, e: f"{a}e{e}", st.integers(-999, 999), st.integers(-320, 300)),
    st.builds(lambda a, b, e: f"{a}.{b}E{e:+d}", st.integers(-999, 999), digits, st.integers(-300, 300)),
    st.sampled_from(
        [
            *(
                "0",
                "-0",
                "0.0",
                "-0.0",
                "-0.00000000",
                "0.00000001",
                "9999999.99999999",
                "-9999999.99999999",
                "10000000",
            ),
            *("5e-324", "-5e-324", "2.2250738585072011e-308", "1.7976931348623157e308", "0.000000000000000000001"),
            *("9007199254740993", "9007199254740993.0", "18446744073709551616", "-18446744073709551617", "1e-400"),
            *("0.1", "45.2", "-40", "1234567.12345678", "12345678.1", "0.123456789", "4503599627370497.5", "1E2"),
        ]
    ),
)


@dataclass(frozen=True)
class Written:
    """A reading and one way to write it."""

    key: bytes
    value: bytes


@st.composite
def written(draw: st.DrawFn) -> Written:
    """A valid reading in one of the many forms that the wire allows."""
    reading = Reading(
        draw(st.uuids()),
        draw(moments | edges),
        int(draw(st.sampled_from(MetricName))),
        draw(st.floats(allow_nan=False, allow_infinity=False)),
        draw(tags_strategy | st.lists(st.sampled_from(["", "site:a", 'a "quoted" tag', "a,b", "{}", "\\", "é✓😀"]))),
    )
    key, value = metric.encode(reading)
    form = draw(st.integers(0, 5))
    if form < 2:
        return Written(key, value)
    moment = reading.published_at.replace(tzinfo=None).isoformat(
        timespec="seconds" if not reading.published_at.microsecond else "microseconds"
    )
    if "." in moment and draw(st.booleans()):
        moment = moment.rstrip("0")
    fields: dict[str, str] = {
        "device_id": json.dumps(draw(st.sampled_from([str(reading.device_id), str(reading.device_id).upper()]))),
        "published_at": json.dumps(moment + draw(st.sampled_from(["Z", "+00:00", "-00:00"]))),
        "metric_name": str(reading.metric_name),
    }
    document = fields | {
        "value": draw(numbers),
        "tags": json.dumps(
            reading.tags, ensure_ascii=draw(st.booleans()), separators=draw(st.sampled_from([None, (",", ":")]))
        ),
    }
    extra = {"extra": draw(st.sampled_from(["null", '[{"value":1}]', '"x"']))} if form > 3 else {}
    comma, colon = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:")])) if form > 2 else (",", ":")

    def text(document: dict[str, str]) -> bytes:
        entries = list(document.items())
        if form == 5:
            entries = draw(st.permutations(entries))
        return ("{" + comma.join(f'"{name}"{colon}{entry}' for name, entry in entries) + "}").encode()

    return Written(draw(st.sampled_from([key, text(fields | extra)])), text(document | extra))


@settings(deadline=None, max_examples=80)
@given(st.lists(written(), min_size=1, max_size=12))
def test_every_valid_form_is_stored_bit_for_bit(records: list[Written]) -> None:
    batch = agree([(record.key, record.value) for record in records])
    assert batch.rejects == []


@settings(deadline=None, max_examples=100)
@given(st.lists(readings, min_size=1, max_size=12))
def test_what_our_producers_write_is_stored_bit_for_bit(made: list[Reading]) -> None:
    wires = [metric.encode(reading) for reading in made]
    assert agree(list(wires)).rejects == []
    # And without the strict decoder's help, unless the number is one that the fast road leaves to it.
    _, others = fast(wires)
    for at in others:
        number = wires[at][1].split(b'"value":')[1].split(b',"tags":')[0]
        assert b"e" in number or len(number) > 22, wires[at]


@settings(deadline=None, max_examples=150)
@given(st.lists(numbers, min_size=1, max_size=20))
def test_numbers_are_read_bit_for_bit(texts: list[str]) -> None:
    key, value = metric.encode(Reading(UUID(int=7), datetime(2026, 1, 1, tzinfo=UTC), 10, 1.5, []))
    agree([(key, value.replace(b"1.5", text.encode())) for text in texts])


def test_plain_records_take_the_fast_road() -> None:
    """The property tests above would also hold for a fast road that takes nothing."""
    generator = random.Random(1)
    wires = [
        metric.encode(
            Reading(
                UUID(int=generator.getrandbits(128)),
                datetime.fromtimestamp(generator.randrange(-(10**10), 10**11), UTC).replace(
                    microsecond=generator.choice([0, generator.randrange(10**6)])
                ),
                generator.choice([int(name) for name in MetricName]),
                round(generator.uniform(-1e6, 1e6), generator.randrange(9)),
                generator.choice([[], ["site:a"], ["é", 'a "b"', ""]]),
            )
        )
        for _ in range(2000)
    ]
    taken, others = fast(wires)
    assert others == []
    assert taken == {at: strictly(*wire) for at, wire in enumerate(wires)}


# --- Records with something changed ------------------------------------------------------------------------------

GOOD: Final = [
    metric.encode(Reading(UUID(int=n * 3**70), moment, code, number, labels))
    for n, (moment, code, number, labels) in enumerate(
        [
            (datetime(2026, 11, 22, 16, 0, 0, 123_456, UTC), 10, 45.2, ["site:a", "floor:2"]),
            (datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC), 0, -0.5, []),
            (datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC), 50, 123456.0, ["é✓", ""]),
            (datetime(1, 1, 1, tzinfo=UTC), 40, 0.0, ["x" * 200]),
            (datetime(2025, 2, 28, 0, 0, 0, 1, UTC), 20, 12345678.901234567, ['"', "\\", "a,b}"]),
        ],
        1,
    )
]
INTERESTING: Final = b'0123456789.-+eE,:"{}[]\\ \t\n\0ZTzaAfFgG\x7f\x80\xc3\xff/;@`'
PIECES: Final = [
    *(b"13", b"00", b"30", b"31", b"32", b"24", b"60", b"99", b"07", b"7", b"60,", b"5", b"05"),
    *(
        b"-0",
        b"1.",
        b".5",
        b"+1",
        b"1e5",
        b"NaN",
        b"Infinity",
        b"1" * 25,
        b"0" * 9,
        b"01.5",
        b"-",
        b"1.2.3",
        b"--1",
        b"1-",
    ),
    *(
        b'"value":1,',
        b'"tags":["b"],',
        b'"metric_name":20,',
        b',"tags":',
        b'"value":',
        b'"1.5"',
        b"null",
        b"true",
        b"1.5 ",
    ),
    *(
        b"]}",
        b"}",
        b"[]",
        b'["\\u0000"]',
        b'["\\ud800"]',
        b"[1]",
        b'[["a"]]',
        b'["a",]',
        b"{}",
        b"+00:00",
        b".1234567Z",
        b"z",
    ),
]
Change = Callable[[bytes, random.Random], bytes]


def flipped(text: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(text))
    return text[:at] + bytes([text[at] ^ (1 << chance.randrange(8))]) + text[at + 1 :]


def replaced(text: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(text))
    return text[:at] + bytes([chance.choice(INTERESTING)]) + text[at + 1 :]


def another_digit(text: bytes, chance: random.Random) -> bytes:
    places = [at for at, byte in enumerate(text) if 48 <= byte < 58] or [0]
    at = chance.choice(places)
    return text[:at] + bytes([chance.randrange(48, 58)]) + text[at + 1 :]


def deleted(text: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(text))
    return text[:at] + text[at + chance.choice([1, 1, 1, 2, 5, 20]) :]


def inserted(text: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(text) + 1)
    return text[:at] + chance.choice([bytes([chance.choice(INTERESTING)]), chance.choice(PIECES)]) + text[at:]


def swapped(text: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(text) - 1)
    return text[:at] + text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :]


def truncated(text: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(text))
    return text[at:] if chance.random() < 0.2 else text[:at]


def doubled(text: bytes, chance: random.Random) -> bytes:
    fields = text[1:-1].split(b',"')
    at = chance.randrange(len(fields))
    fields.insert(chance.randrange(len(fields) + 1), fields[at])
    return b"{" + b',"'.join(fields) + b"}"


def field_replaced(text: bytes, chance: random.Random) -> bytes:
    """Another text where a number or a time stands."""
    if chance.random() < 0.5:
        at = text.find(b'"metric_name":') if chance.random() < 0.4 else text.find(b'"value":')
        at = text.find(b":", max(at, 0)) + 1
        end = min((found for found in (text.find(b",", at), text.find(b"}", at)) if found >= 0), default=len(text))
        return text[:at] + chance.choice(PIECES) + text[end:]
    at = text.find(b"T") + chance.choice([-10, -8, -6, -5, -3, -2, 1, 2, 4, 5, 7, 8, 9, 10, 12])
    return text[: max(at, 0)] + chance.choice(PIECES[:13]) + text[max(at, 0) + 2 :]


def spliced(text: bytes, chance: random.Random) -> bytes:
    other = chance.choice(chance.choice(GOOD))
    begin, end = sorted(chance.randrange(len(other) + 1) for _ in range(2))
    at, after = sorted(chance.randrange(len(text) + 1) for _ in range(2))
    return chance.choice([text[:at] + other[begin:end] + text[after:], text[:at] + other[at:], other[:at] + text[at:]])


CHANGES: Final[list[Change]] = [
    *(flipped, replaced, another_digit, another_digit, deleted, inserted, swapped, truncated, doubled, field_replaced),
    *(field_replaced, spliced),
]


def changed(wire: tuple[bytes, bytes], chance: random.Random) -> tuple[bytes, bytes]:
    """Key, value or both of them with a change or a few; the same change in both now and then, so that they still fit together."""
    key, value = wire
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        change, which, seed = chance.choice(CHANGES), chance.randrange(4), chance.getrandbits(32)
        if which == 0:
            if len(key) > 2:
                key = change(key, random.Random(seed))
        elif which == 3 and value.startswith(key[:-1]) and len(key) > 2:
            rest = value[len(key) - 1 :]
            key = change(key, random.Random(seed))
            value = key[:-1] + rest
        elif len(value) > 2:
            value = change(value, random.Random(seed))
    return key, value


@settings(deadline=None, max_examples=120)
@given(st.randoms(use_true_random=False), st.integers(1, 60), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_the_fast_road_never_takes_what_the_strict_decoder_refuses(
    chance: random.Random, size: int, share: float
) -> None:
    wires = []
    for _ in range(size):
        wire = chance.choice(GOOD)
        wires.append(changed(wire, chance) if chance.random() < share else wire)
    taken, _ = fast(wires)
    for at, what in taken.items():
        assert what == strictly(*wires[at]), wires[at]
    agree([*wires])


def test_many_changed_records_of_a_fixed_seed() -> None:
    """Ten thousand in batches that mix them with good ones: some are still valid, some are taken by the fast road."""
    chance = random.Random(20261122)
    valid = refused = quick = 0
    for _ in range(10):
        wires = [changed(wire, chance) if at % 50 else wire for at, wire in enumerate(GOOD * 200)]
        batch = agree([*wires])
        quick += len(fast(wires)[0])
        valid += len(batch.columns)
        refused += len(batch.rejects)
    assert refused > 5_000
    assert valid > 500
    assert quick > 300


def every_byte(wire: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Each byte of the value, of the key, and of both, replaced by each interesting one; cut and doubled at each place."""
    key, value = wire
    found = []
    for at in range(len(value)):
        for byte in INTERESTING:
            one = bytes([byte])
            other = value[:at] + one + value[at + 1 :]
            found.append((key, other))
            if at < len(key) - 1:
                other_key = key[:at] + one + key[at + 1 :]
                found += [(other_key, value), (other_key, other)]
        found += [(key, value[:at]), (key, value[:at] + value[at + 1 :]), (key, value[: at + 1] + value[at:])]
    found += [(key[:at], value) for at in range(len(key))]
    return found


@pytest.mark.parametrize("wire", GOOD[:2])
def test_each_byte_matters(wire: tuple[bytes, bytes]) -> None:
    wires = every_byte(wire)
    assert len(agree([*wires]).rejects) > len(wires) // 2


@pytest.mark.parametrize("neighbour", [b'"tags":[]}', b',"tags":[]}', b'gs":[]}', b"0", b"5", b"", b"}"])
def test_a_record_cut_off_does_not_borrow_from_the_next(neighbour: bytes) -> None:
    key, value = GOOD[0]
    for at in range(len(value) + 1):
        agree([(key, value[:at]), (neighbour, neighbour), (key, value), (key[:-1], value[:at]), (key[at:], value[at:])])


# --- Known cases, and records that are no text at all ------------------------------------------------------------


@pytest.mark.parametrize("name", [*ACCEPTED, *REFUSED])
@pytest.mark.parametrize("others", [0, 3, 300])
def test_known_cases_among_good_ones(name: str, others: int) -> None:
    wire: Wire = ACCEPTED[name] if name in ACCEPTED else REFUSED[name][1:]
    good: list[Wire] = [*GOOD]
    batch = agree([*(good * others)[: others // 2], wire, *(good * others)[: others - others // 2]])
    if name in ACCEPTED:
        assert batch.rejects == []
    elif wire[1] is not None:
        (reject,) = batch.rejects
        assert (reject.at, reject.reason) == (others // 2, REFUSED[name][0])
        assert 0 < len(reject.detail) <= 2000
        assert "\0" not in reject.detail


def test_large_records_stay_where_they_are() -> None:
    key, value = GOOD[0]
    large = value.replace(b"{", b'{"x":"' + b"y" * (LONGEST + 1) + b'",', 1)
    long_key = key.replace(b"{", b'{"x":"' + b"y" * (LONGEST + 1) + b'",', 1)
    agree([(key, large), (key, value), (long_key, value), (b"x" * 10**6, b"y" * 10**6), (None, large), *GOOD])
    agree([(key, large)])
    agree([])


def test_only_tombstones_and_nulls() -> None:
    key, value = GOOD[0]
    batch = agree([(None, None), (key, None), (None, value), (b"", b"")])
    assert [reject.reason for reject in batch.rejects] == ["no_key", "bad_json"]
    assert len(agree([(key, None)] * 3).columns) == 0


# --- Tags that are forgotten -------------------------------------------------------------------------------------


def test_forgetting_tags_does_not_disturb_batches_made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tags, "LARGEST", 20)
    decoder, chance, made = BatchDecoder(), random.Random(5), []
    for number in range(12):
        wires: list[Wire] = [
            (compact(KEY), compact({**VALUE, "tags": [f"t{number}", f"u{chance.randrange(1000)}"]})) for _ in range(10)
        ]
        wires.append((compact(KEY), json.dumps({**VALUE, "tags": [f"of the strict decoder {number}"]}).encode()))
        made.append((wires, decoded(wires, decoder)))
    assert len({id(batch.tags) for _, batch in made}) > 2, "nothing was forgotten"
    for wires, batch in made:
        assert stored(batch.columns, batch.tags) == {at: strictly(*wire) for at, wire in enumerate(wires)}


def test_texts_of_the_same_tags_share_one_encoding() -> None:
    table = TagTable()
    numbers = {table.numbers[text] for text in (b'["a"]}', b'[ "a" ]}', b'["\\u0061"]}')}
    assert len(numbers) == 1
    assert len(table.encoded) == 1
    assert table.numbers[b'["a"] }'] == table.numbers[b'["a"]'] == table.numbers[b""] == table.numbers[b"]}"] == -1
    long = b'["' + b"x" * 200 + b'","' + b"y" * 200 + b'","' + b"z" * 200 + b'"]}'
    assert table.numbers[long] == table.numbers[long]
    assert long not in table.numbers


# --- Batches that lose a part ------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["good", "bad", "tombstone"])), max_size=30), st.data())
@settings(deadline=None, max_examples=60)
def test_without_partitions_everything_of_the_others_stays(records: list[tuple[int, str]], data: st.DataObject) -> None:
    key, value = GOOD[0]
    payload: dict[str, bytes | None] = {"good": value, "bad": b"{", "tombstone": None}
    messages = [FakeMessage(number, at, key, payload[kind]) for at, (number, kind) in enumerate(records)]
    batch: Any = BatchDecoder().decode(messages, dict.fromkeys(range(4)))  # type: ignore[arg-type]  # no chunk is looked into
    gone: set[int] = set()
    for _ in range(data.draw(st.integers(1, 3))):
        gone |= (dropped := data.draw(st.sets(st.integers(0, 3), max_size=3)))
        batch = batch.without(dropped)
        left = [(at, kind) for at, (number, kind) in enumerate(records) if number not in gone]
        assert set(batch.chunks) == set(range(4)) - gone
        assert batch.columns.source.tolist() == [at for at, kind in left if kind == "good"]
        assert [reject.at for reject in batch.rejects] == [at for at, kind in left if kind == "bad"]
        assert batch.tombstones == sum(kind == "tombstone" for _, kind in left)


# --- Parts, and what is kept of messages that were let go --------------------------------------------------------


kept = st.sampled_from(["good", "odd", "bad", "large", "tombstone", "no key"])


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 2), kept, st.integers(1, 3)), min_size=1, max_size=12), max_size=6),
    st.sets(st.integers(0, 2), max_size=2),
)
@settings(deadline=None, max_examples=100)
def test_parts_make_the_same_batch_and_give_back_each_message(
    made: list[list[tuple[int, str, int]]], gone: set[int]
) -> None:
    """Topics have gaps: the offsets of a partition grow, but not by one."""
    key, value = GOOD[0]
    wires: dict[str, Wire] = {
        "good": (key, value),
        "odd": (key, b" " + value),
        "bad": (key, b"{"),
        "large": (key, value[:-1] + b" " * LONGEST + b"}"),
        "tombstone": (key, None),
        "no key": (None, value),
    }
    at = dict.fromkeys(range(3), 0)
    groups: list[list[FakeMessage]] = []
    for group in made:
        groups.append([])
        for number, kind, step in group:
            at[number] += step
            groups[-1].append(FakeMessage(number, at[number], *wires[kind]))
    messages = [message for group in groups for message in group]
    decoder = BatchDecoder()
    parts = [decoder.part(group) for group in groups]
    chunks: Any = dict.fromkeys(range(3))
    joined, whole = Batch.of(parts, chunks, decoder.tags), BatchDecoder().decode(messages, chunks)
    again = [(one.partition(), one.offset(), one.key(), one.value()) for one in joined.messages]
    assert again == [(one.number, one.at, one.key_bytes, one.value_bytes) for one in messages]
    assert len(joined.messages) == len(messages)
    fewer = Batch.of([part.without(gone) for part in parts], chunks, decoder.tags)
    for ours, theirs in ((joined, whole), (fewer, whole.without(gone)), (joined.without(gone), whole.without(gone))):
        assert stored(ours.columns, ours.tags) == stored(theirs.columns, theirs.tags)
        assert (ours.rejects, list(ours.empty)) == (theirs.rejects, list(theirs.empty))


# --- Tags found by their words -----------------------------------------------------------------------------------


@given(
    st.lists(
        st.one_of(
            tags_strategy.map(lambda labels: json.dumps(labels, ensure_ascii=False).encode() + b"}"),
            st.binary(max_size=80),
            st.sampled_from([b'["a"]}', b'["a"]}\0', b'["a"] }', b"", b"[]}", b'["' + b"x" * 60 + b'"]}']),
        ),
        min_size=1,
        max_size=30,
    ),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=150)
def test_tags_by_their_words_are_those_by_their_text(tails: list[bytes], bits: int) -> None:
    """However few slots there are for them, and however often each is seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tags, "_SLOT_BITS", bits)
        by_words, by_text = TagTable(), TagTable()
        chosen = tails * 3
        text = b"".join([*chosen, bytes(canonical.PADDING)])
        ends = np.cumsum([len(tail) for tail in chosen])
        begins = ends - [len(tail) for tail in chosen]
        for _ in range(2):
            found = by_words.numbers_of(text, begins, ends)
            assert found.tolist() == [by_text.numbers[tail] for tail in chosen]
            assert by_words.encoded == by_text.encoded
        assert by_words.numbers_of(text, ends, begins - 1).tolist() == [-1] * len(chosen)
