"""Delivery reports: offsets as ranges, and which errors mean failed and which mean that nobody knows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from confluent_kafka import KafkaError
from hypothesis import given
from hypothesis import strategies as st

from metrics_pipeline.producer.deliveries import NO_PARTITION, Deliveries, DeliveryCounts, Ranges, merged
from metrics_pipeline_tests.fakes import FakeMessage


def reported(*reports: tuple[int | None, int | None, int | None]) -> Deliveries:
    """Each report: partition, offset, error code."""
    deliveries = Deliveries()
    deliveries.handed_over = len(reports)
    for number, offset, code in reports:
        deliveries.report(None if code is None else KafkaError(code), FakeMessage(b"k", number, offset))
    return deliveries


def numbers(ranges: Ranges) -> Iterator[int]:
    for start, end in ranges:
        yield from range(start, end)


def test_consecutive_offsets_are_one_range() -> None:
    deliveries = reported((0, 5, None), (0, 6, None), (1, 0, None), (0, 7, None))
    assert deliveries.tally() == {0: DeliveryCounts(3, ranges=[(5, 8)]), 1: DeliveryCounts(1, ranges=[(0, 1)])}
    assert deliveries.acknowledged == 4
    assert deliveries.in_flight == 0


def test_a_gap_of_another_producer_begins_a_new_range() -> None:
    assert reported((0, 5, None), (0, 6, None), (0, 9, None)).tally() == {
        0: DeliveryCounts(3, ranges=[(5, 7), (9, 10)])
    }


@given(st.dictionaries(st.integers(0, 5), st.lists(st.integers(0, 50), max_size=60), max_size=4))
def test_every_offset_is_counted_exactly(offsets: dict[int, list[int]]) -> None:
    deliveries = reported(*((number, offset, None) for number, some in offsets.items() for offset in some))
    for number, counts in deliveries.tally().items():
        assert sorted(numbers(counts.ranges)) == sorted(offsets[number])
        assert counts.acknowledged == len(offsets[number])
        assert sorted(set(offsets[number])) == list(numbers(merged(counts.ranges)))
    assert deliveries.acknowledged == sum(map(len, offsets.values()))


def test_all_ranges_but_the_last_are_final() -> None:
    """The ledger relies on it: it writes a final range once."""
    deliveries = reported((0, 0, None), (0, 3, None))
    before = deliveries.tally()[0].ranges
    for offset in (4, 9, 10):
        deliveries.handed_over += 1
        deliveries.report(None, FakeMessage(b"k", 0, offset))
        after = deliveries.tally()[0].ranges
        assert after[: len(before) - 1] == before[:-1]
        before = after
    assert before == [(0, 1), (3, 5), (9, 11)]


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (KafkaError._MSG_TIMED_OUT, "unknown"),  # it may have been written before the answer got lost
        (KafkaError._PURGE_INFLIGHT, "unknown"),
        (KafkaError.REQUEST_TIMED_OUT, "unknown"),
        (KafkaError._TRANSPORT, "unknown"),
        (KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND, "unknown"),
        (KafkaError.UNKNOWN, "unknown"),
        (KafkaError._PURGE_QUEUE, "failed"),  # it never left this process
        (KafkaError.MSG_SIZE_TOO_LARGE, "failed"),
        (KafkaError._UNKNOWN_TOPIC, "failed"),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, "failed"),
    ],
)
def test_errors(code: int, what: str) -> None:
    deliveries = reported((2, None, code))
    assert deliveries.tally() == {2: DeliveryCounts(failed=int(what == "failed"), unknown=int(what == "unknown"))}
    assert deliveries.first_error is not None
    assert deliveries.first_error.startswith(KafkaError(code).name())


def test_a_queued_message_may_have_been_sent_before_a_connection_broke() -> None:
    deliveries = Deliveries()
    deliveries.connection_was_lost = True
    deliveries.handed_over = 1
    deliveries.report(KafkaError(KafkaError._PURGE_QUEUE), FakeMessage(b"k", 0, None))
    assert deliveries.tally() == {0: DeliveryCounts(unknown=1)}


def test_an_acknowledgement_without_an_offset_is_unknown() -> None:
    """What librdkafka reports after DUPLICATE_SEQUENCE_NUMBER; a claim needs a place where it can be checked."""
    assert reported((0, None, None)).tally() == {0: DeliveryCounts(unknown=1)}


def test_messages_without_a_partition_are_counted_apart() -> None:
    deliveries = reported((None, None, KafkaError._PURGE_QUEUE))
    deliveries.refuse(3, KafkaError(KafkaError.MSG_SIZE_TOO_LARGE))
    deliveries.handed_over += 2
    deliveries.abandon()
    assert deliveries.tally() == {NO_PARTITION: DeliveryCounts(failed=4, unknown=2)}
    assert deliveries.in_flight == 0


@pytest.mark.parametrize(
    ("code", "stops"),
    [
        (KafkaError._UNKNOWN_TOPIC, True),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, True),
        (KafkaError.MSG_SIZE_TOO_LARGE, False),
        (KafkaError._MSG_TIMED_OUT, False),
    ],
)
def test_only_what_every_message_would_meet_is_a_refusal(code: int, stops: bool) -> None:
    assert (reported((0, None, code)).refusal is not None) == stops


def test_one_key_is_sampled_when_it_is_asked_for() -> None:
    sampled: list[bytes] = []
    deliveries = Deliveries(lambda key, _: sampled.append(key))
    deliveries.handed_over = 5
    deliveries.report(None, FakeMessage(b"before", 0, 0))
    deliveries.sample()
    deliveries.report(KafkaError(KafkaError._MSG_TIMED_OUT), FakeMessage(b"failed", 0, None))
    deliveries.report(None, FakeMessage(b"first", 1, 0))  # the first of a range, too
    deliveries.report(None, FakeMessage(b"next", 0, 1))
    assert sampled == [b"first"]
