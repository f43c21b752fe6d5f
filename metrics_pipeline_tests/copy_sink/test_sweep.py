"""After a growth the newest value of each key stands, however a sink that lagged had stored the partitions."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from metrics_pipeline.copy_sink.batch import KeptMessage
from metrics_pipeline.copy_sink.sweep import has_come
from metrics_pipeline.partitioner import homes, partition
from metrics_pipeline.topic_log import Growth

KEYS = [b'{"device_id":"%d"}' % number for number in range(12)]


@given(st.lists(st.binary(max_size=40)), st.integers(1, 200))
def test_the_homes_of_many_keys_are_those_of_each(keys: list[bytes], partitions: int) -> None:
    assert homes(keys, partitions).tolist() == [partition(key, partitions) for key in keys]


@given(
    st.lists(st.sampled_from(KEYS)), st.lists(st.sampled_from(KEYS)), st.integers(1, 9), st.integers(1, 9), st.data()
)
def test_the_newest_value_is_stored_last(
    older: list[bytes], newer: list[bytes], before: int, added: int, data: st.DataObject
) -> None:
    """Nothing else is stored again, and a sink that stored each partition in its order has all of it by then."""
    growth = Growth(1, before, before + added, {}, dict.fromkeys(range(before + added), 0), due=True, noticed_at=0.0)
    logs: dict[int, list[Any]] = {number: [] for number in range(growth.after)}
    newest: dict[bytes, bytes] = {}
    for at, key in enumerate([*older, *newer]):
        number = partition(key, growth.before if at < len(older) else growth.after)
        logs[number].append(KeptMessage(number, len(logs[number]), key, b"%d" % at))
        newest[key] = b"%d" % at
    stored: dict[bytes, bytes] = {}
    for number in data.draw(st.permutations(range(growth.after))):
        stored |= {message.key(): message.value() for message in logs[number]}
    again = data.draw(st.permutations(range(growth.after)))
    come = {number: has_come(growth, logs[number]) for number in again if number in growth.mixed}
    for number in again:
        stored |= {message.key(): message.value() for message in come.get(number, logs[number])}
    assert stored == newest
    assert all(
        partition(message.key(), growth.before) != message.partition() == partition(message.key(), growth.after)
        for messages in come.values()
        for message in messages
    )


def test_a_message_without_a_key_and_one_of_another_hash_stay_as_they_are() -> None:
    growth = Growth(1, 6, 8, {}, dict.fromkeys(range(8), 0), due=True, noticed_at=0.0)
    key = next(key for key in KEYS if partition(key, 6) != partition(key, 8) < 6)
    elsewhere = next(number for number in range(6) if number not in (partition(key, 6), partition(key, 8)))
    here, other, none = (
        KeptMessage(partition(key, 8), 0, key, b"1"),
        KeptMessage(elsewhere, 0, key, b"1"),
        KeptMessage(0, 0, None, b"1"),
    )
    assert has_come(growth, [other, here, none]) == [here]
    assert has_come(growth, []) == []
