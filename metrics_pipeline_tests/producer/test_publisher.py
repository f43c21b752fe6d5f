"""The publish loop on a Kafka client in memory: bounds, batches, pace, and an account of every message.

Time goes on only while the loop waits, so nothing here is slow, and every pace is exact.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import KafkaError
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics_pipeline.errors import RecordError, ServiceError
from metrics_pipeline.producer import publisher
from metrics_pipeline.producer.deliveries import Deliveries
from metrics_pipeline.producer.publisher import Message, Publisher, producer_config
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.fakes import FakeClock, FakeTopic


def messages(count: int, first: int = 0) -> list[Message]:
    return [(b"key %d" % n, b"value") for n in range(first, first + count)]


def endless(count: int = 10) -> Iterator[list[Message]]:
    for round_ in itertools.count():
        yield messages(count, round_ * count)


class Run:
    """A publisher over a topic in memory, with what it did."""

    def __init__(
        self,
        source: Iterable[list[Message]],
        topic: FakeTopic | None = None,
        clock: FakeClock | None = None,
        **options: Any,
    ) -> None:
        names = {name: options.pop(name) for name in list(options) if name.startswith(("producer_", "kafka_"))}
        self.clock = clock or FakeClock()
        self.topic = topic or FakeTopic()
        self.topic.clock, self.topic.sleep = self.clock, self.clock.sleep
        self.deliveries = Deliveries()
        self.stop = threading.Event()
        self.publisher = Publisher(
            Settings(kafka_url="broker:1", **names),
            source,
            self.deliveries,
            self.topic.client,
            stop=self.stop.is_set,
            clock=self.clock,
            **options,
        )

    def run(self) -> Run:
        self.publisher.run()
        return self

    @property
    def client(self) -> Any:
        return self.topic.clients[0]

    @property
    def times(self) -> list[float]:
        """When the client was given messages, from the begin on."""
        return [moment - self.clock.begun for moment in self.client.times]

    def total(self, what: str) -> int:
        return sum(getattr(counts, what) for counts in self.deliveries.tally().values())

    def accounted(self) -> dict[str, int]:
        return {what: self.total(what) for what in ("acknowledged", "failed", "unknown") if self.total(what)}


def test_everything_is_published_in_order_and_the_client_closed() -> None:
    run = Run([messages(700), messages(300, 700)]).run()
    assert run.accounted() == {"acknowledged": 1000}
    assert sorted(run.topic.stored) == sorted(key for key, _ in messages(1000))
    for keys in run.topic.log.values():
        assert [int(key.split()[1]) for key in keys] == sorted(int(key.split()[1]) for key in keys)
    assert run.client.closed
    assert run.publisher.stalled_seconds() == 0


# --- A test a setting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("concurrency", "size"), [(1, 250), (8, 250), (3, 100), (1, 1)])
def test_queue_concurrency_times_batch_size_bounds_what_is_in_flight(concurrency: int, size: int) -> None:
    run = Run(
        [messages(concurrency * size * 3)],
        FakeTopic(latency=0.1),
        producer_queue_concurrency=concurrency,
        kafka_batch_size=size,
    ).run()
    assert run.client.most_outstanding == concurrency * size
    assert run.total("failed") == 0


@pytest.mark.parametrize("size", [1, 100, 250, 1000])
def test_batch_size_is_what_the_client_gets_at_a_time(size: int) -> None:
    run = Run([messages(2050)], kafka_batch_size=size).run()
    assert run.client.batches == [size] * (2050 // size) + ([2050 % size] if 2050 % size else [])


@pytest.mark.parametrize("interval", [0.02, 0.05])
def test_publish_interval_is_the_time_from_round_to_round(interval: float) -> None:
    run = Run([messages(10)] * 6, round_seconds=interval).run()
    assert run.times == pytest.approx([n * interval for n in range(6)])


def test_a_late_round_does_not_shift_the_ones_after_it() -> None:
    clock = FakeClock()

    def source() -> Iterator[list[Message]]:
        for n in range(9):
            if n == 2:
                clock.sleep(0.45)  # three rounds are late
            yield messages(1)

    run = Run(source(), clock=clock, round_seconds=0.15).run()
    assert run.times == pytest.approx([0, 0.15, 0.75, 0.75, 0.75, 0.75, 0.9, 1.05, 1.2])


def test_catching_up_has_a_limit() -> None:
    clock, late = FakeClock(), publisher.CATCH_UP_SECONDS + 6

    def source() -> Iterator[list[Message]]:
        for n in range(8):
            if n == 1:
                clock.sleep(late)
            yield messages(1)

    run = Run(source(), clock=clock, round_seconds=4).run()
    # What is due ten seconds before, six and two are made up for; the first ten seconds' worth is not.
    begin = 4 + late
    assert run.times == pytest.approx([0, begin, begin, begin, begin, begin + 2, begin + 6, begin + 10])


def test_interval_zero_does_not_wait() -> None:
    run = Run([messages(1)] * 200).run()
    assert run.times == [0] * 200


def test_run_seconds_end_the_run() -> None:
    run = Run(endless(5), round_seconds=0.01, run_seconds=0.305).run()
    assert 0.305 <= run.clock.passed < 0.305 + 0.01
    assert run.accounted() == {"acknowledged": 31 * 5}


def test_messages_per_second_bounds_a_replay() -> None:
    run = Run([messages(60)], messages_per_second=200).run()
    assert run.times == pytest.approx([0, 0.1, 0.2])
    assert run.client.batches == [20] * 3  # a tick's worth, so that the pace is even
    assert run.accounted() == {"acknowledged": 60}


def test_flush_seconds_bound_the_wait_for_outstanding_acknowledgements() -> None:
    run = Run([messages(10)], FakeTopic(answering=False), producer_flush_seconds=7).run()
    assert 7 <= run.clock.passed < 7.2
    assert run.accounted() == {"unknown": 10}
    assert run.client.closed


def test_client_settings_follow_ours() -> None:
    made = Run(
        [],
        kafka_max_in_flight=3,
        producer_compression="zstd",
        producer_queue_concurrency=1000,
        kafka_batch_size=1000,
    ).run()
    config = made.client.config
    assert config["max.in.flight.requests.per.connection"] == 3
    assert config["compression.type"] == "zstd"
    assert config["queue.buffering.max.messages"] >= 1_000_000
    assert config["bootstrap.servers"] == "broker:1"


def test_the_promise_rests_on_these_client_settings() -> None:
    config = producer_config(Settings())
    assert config["enable.idempotence"] is True
    assert config["acks"] == "all"
    assert config["partitioner"] == "murmur2_random"
    assert config["delivery.timeout.ms"] == 120_000
    confluent_kafka.Producer(config).close()  # librdkafka knows them all


# --- What may go wrong -------------------------------------------------------------------------------------------


def test_a_queue_that_takes_a_part_gets_exactly_the_rest_again() -> None:
    run = Run([messages(1000)], FakeTopic(capacity=70, latency=0.001), kafka_batch_size=250).run()
    assert run.accounted() == {"acknowledged": 1000}
    assert sorted(run.topic.stored) == sorted(key for key, _ in messages(1000))
    assert max(run.client.batches) == 250
    assert len(run.client.batches) > 4


def test_a_message_that_the_client_refuses_is_failed_and_the_others_are_not() -> None:
    large = [*messages(5), (b"large", b"x" * 200), *messages(5, 5)]
    run = Run([large], FakeTopic(largest=100)).run()
    assert run.accounted() == {"acknowledged": 10, "failed": 1}
    assert b"large" not in run.topic.stored
    assert run.deliveries.first_error is not None
    assert run.deliveries.first_error.startswith("MSG_SIZE_TOO_LARGE")


def test_delivery_failures_are_counted_and_the_run_goes_on() -> None:
    topic = FakeTopic(errors={b"key 3": KafkaError(KafkaError._MSG_TIMED_OUT)})
    run = Run([messages(10), messages(10, 10)], topic).run()
    assert run.accounted() == {"acknowledged": 19, "unknown": 1}


def test_a_topic_that_is_gone_ends_the_run() -> None:
    topic = FakeTopic(errors={b"key 50": KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)})
    run = Run(endless(), topic, round_seconds=0.001)
    with pytest.raises(ServiceError, match=r"takes no more messages for topic metrics.*UNKNOWN_TOPIC_OR_PART"):
        run.run()
    assert run.client.closed


def test_a_fatal_error_of_the_client_ends_the_run() -> None:
    topic = FakeTopic()

    def source() -> Iterator[list[Message]]:
        yield messages(10)
        topic.fatal = KafkaError(KafkaError._FATAL, "sequence desynchronised", True)
        while True:
            yield messages(1)

    with pytest.raises(ServiceError, match="sequence desynchronised"):
        Run(source(), topic, round_seconds=0.001).run()


def test_what_the_source_raises_ends_the_run_after_a_flush() -> None:
    closed = []

    def source() -> Iterator[list[Message]]:
        try:
            yield messages(300)
            raise RecordError("bad_value", "value: 'x' is not a number")
        finally:
            closed.append(True)

    run = Run(source(), FakeTopic(latency=0.1))
    with pytest.raises(RecordError, match="bad_value"):
        run.run()
    assert run.accounted() == {"acknowledged": 300}
    assert closed


def test_a_stopped_run_closes_its_source() -> None:
    closed = []

    def source() -> Iterator[list[Message]]:
        try:
            while True:
                yield messages(10)
        finally:
            closed.append(True)

    run = Run(source(), round_seconds=0.01)
    run.clock.at(0.055, run.stop.set)
    run.run()
    assert closed
    assert run.accounted() == {"acknowledged": 60}


def test_what_watch_raises_ends_the_run_and_the_rest_of_the_round_is_failed() -> None:
    def watch() -> None:
        if run.total("acknowledged") >= 100:
            raise ServiceError("enough")

    run = Run([messages(500)], FakeTopic(latency=0.3), watch=watch, kafka_batch_size=50, producer_queue_concurrency=2)
    with pytest.raises(ServiceError, match="enough"):
        run.run()
    assert run.total("failed") > 0
    assert run.total("acknowledged") + run.total("failed") == 500


@pytest.mark.parametrize(("connected", "what"), [(True, "unknown"), (False, "failed")])
def test_purged_in_flight_is_unknown_and_purged_from_the_queue_is_failed(connected: bool, what: str) -> None:
    topic = FakeTopic(answering=False, connected=connected)
    run = Run([messages(10)], topic, producer_flush_seconds=1).run()
    assert run.accounted() == {what: 10}


def test_a_purge_without_reports_leaves_unknown() -> None:
    run = Run([messages(10)], FakeTopic(answering=False, purges=False), producer_flush_seconds=1).run()
    assert run.accounted() == {"unknown": 10}


def test_a_stop_publishes_what_was_taken_and_takes_no_more() -> None:
    taken = []

    def source() -> Iterator[list[Message]]:
        while True:
            taken.append(1000)
            yield messages(1000)

    run = Run(source(), FakeTopic(latency=0.01), round_seconds=0.05, kafka_batch_size=100, producer_queue_concurrency=1)
    run.clock.at(0.125, run.stop.set)  # in the middle of the second round
    run.run()
    assert taken == [1000, 1000]
    assert run.accounted() == {"acknowledged": 2000}


def test_a_stop_while_the_broker_is_silent_ends_within_the_bound() -> None:
    run = Run([messages(10_000)], FakeTopic(answering=False), producer_flush_seconds=1)
    run.clock.at(30, run.stop.set)
    run.run()
    assert 31 <= run.clock.passed < 31.5
    # The broker may have the 2,000 that were sent; the 8,000 never left.
    assert run.accounted() == {"unknown": 2000, "failed": 8000}


@settings(deadline=None, max_examples=25)
@given(
    rounds=st.lists(st.integers(0, 40), max_size=6),
    size=st.integers(1, 20),
    concurrency=st.integers(1, 4),
    capacity=st.integers(1, 50),
    bad=st.sets(st.integers(0, 239)),
    large=st.sets(st.integers(0, 239)),
)
def test_every_message_taken_is_accounted_for(
    rounds: list[int], size: int, concurrency: int, capacity: int, bad: set[int], large: set[int]
) -> None:
    total = sum(rounds)
    numbered = [(b"%d" % n, b"x" * (200 if n in large else 10)) for n in range(total)]
    source = [[numbered.pop(0) for _ in range(count)] for count in rounds]
    topic = FakeTopic(
        capacity=capacity, largest=100, errors={b"%d" % n: KafkaError(KafkaError._MSG_TIMED_OUT) for n in bad}
    )
    run = Run(source, topic, kafka_batch_size=size, producer_queue_concurrency=concurrency).run()
    refused = {n for n in large if n < total}
    assert run.total("failed") == len(refused)
    assert run.total("unknown") == len({n for n in bad - large if n < total})
    assert run.total("acknowledged") == len(topic.stored) == total - run.total("failed") - run.total("unknown")
    assert len(set(topic.stored)) == len(topic.stored)
    assert run.deliveries.in_flight == 0


def test_an_empty_round_is_asked_for_again_soon() -> None:
    rounds = iter([[], [], messages(3)])
    run = Run(rounds, round_seconds=0.5).run()
    assert run.accounted() == {"acknowledged": 3}
    assert run.times == pytest.approx([0.002])  # an empty round is none


def test_paused_publishes_nothing_until_it_is_over() -> None:
    clock = FakeClock()
    run = Run([messages(10)] * 3, clock=clock, paused=lambda: clock.passed < 20)
    seen: list[tuple[str, int, float]] = []
    clock.at(
        19, lambda: seen.append((run.publisher.state, len(run.topic.stored), run.publisher.stalled_seconds()))
    )  # the broker owes nothing
    run.run()
    assert seen == [("running", 0, 0)]
    assert run.times[0] == pytest.approx(20, abs=publisher.TICK_SECONDS)
    assert len(run.topic.stored) == 30


def test_a_paused_run_can_be_stopped() -> None:
    run = Run([messages(10)] * 3, paused=lambda: True)
    run.clock.at(20, run.stop.set)
    run.run()
    assert run.topic.stored == []
    assert run.clock.passed == pytest.approx(20, abs=2 * publisher.TICK_SECONDS)


# --- The start, and what can be seen from outside ----------------------------------------------------------------


def test_an_unreachable_broker_is_named_with_the_setting() -> None:
    run = Run([messages(1)], FakeTopic(reachable=False))
    with pytest.raises(
        ServiceError, match=r"broker:1 cannot be reached \(Connection refused\): .*KAFKA_URL.*KAFKA_PORT"
    ):
        run.run()
    assert run.clock.passed == pytest.approx(publisher.START_SECONDS, abs=2 * publisher.TICK_SECONDS)
    assert run.client.closed


def test_a_broker_that_comes_up_is_waited_for() -> None:
    topic = FakeTopic(reachable=False)
    run = Run([messages(1)], topic)
    seen: list[tuple[str, float]] = []

    def come_up() -> None:
        seen.append((run.publisher.state, run.publisher.stalled_seconds()))
        topic.reachable = True

    run.clock.at(12, come_up)
    run.run()
    assert seen == [("starting", 12)]
    assert run.accounted() == {"acknowledged": 1}


def test_a_missing_topic_is_named_with_the_next_step() -> None:
    with pytest.raises(ServiceError, match=r"topic metrics does not exist on broker:1: run .*provision"):
        Run([messages(1)], FakeTopic(partitions=0)).run()


def test_a_stop_before_the_broker_answers_is_heard() -> None:
    run = Run([messages(1)], FakeTopic(reachable=False))
    run.clock.at(2, run.stop.set)
    run.run()
    assert run.clock.passed == pytest.approx(2, abs=publisher.TICK_SECONDS)
    assert run.accounted() == {}


def test_a_stall_counts_from_the_first_message_without_an_answer() -> None:
    topic = FakeTopic(answering=False)
    run = Run([messages(10)], topic, producer_flush_seconds=50)
    seen: list[float] = []
    for moment in (3, 30):
        run.clock.at(moment, lambda: seen.append(run.publisher.stalled_seconds()))
    run.clock.at(40, lambda: setattr(topic, "answering", True))
    run.run()
    assert seen == [3, 30]
    assert run.publisher.stalled_seconds() == 0


def test_a_stall_counts_from_the_last_answer() -> None:
    topic = FakeTopic(latency=0.5)  # so that something is always on its way
    run = Run(endless(), topic, round_seconds=0.1, run_seconds=30, producer_flush_seconds=1)
    seen: list[float] = []
    run.clock.at(4, lambda: seen.append(run.publisher.stalled_seconds()))
    run.clock.at(5, lambda: setattr(topic, "answering", False))
    run.clock.at(25, lambda: seen.append(run.publisher.stalled_seconds()))
    run.run()
    assert seen == pytest.approx([0, 20], abs=0.11)


def test_acknowledged_per_second_is_that_of_the_last_ten_seconds() -> None:
    def source() -> Iterator[list[Message]]:
        for n in range(200):
            yield messages(100 if n < 100 else 20)

    run = Run(source(), round_seconds=0.1)
    seen: list[float] = []
    for moment in (1, 9.95, 19.95):
        run.clock.at(moment, lambda: seen.append(run.publisher.acknowledged_per_second()))
    run.run()
    assert seen == pytest.approx([1000, 1000, 200], rel=0.15)


def test_on_librdkafka_itself() -> None:
    """Its own mock broker stands in for the cluster: the real client, callbacks, partitions and offsets."""

    def client(config: dict[str, Any]) -> Any:
        real = confluent_kafka.Producer(config | {"test.mock.num.brokers": 1})
        real.list_topics("metrics", timeout=5)
        return real

    deliveries = Deliveries()
    Publisher(
        Settings(kafka_url="127.0.0.1:1"),
        [messages(5000), messages(5000, 5000)],
        deliveries,
        client,
        stop=lambda: False,
    ).run()
    tally = deliveries.tally()
    assert sum(counts.acknowledged for counts in tally.values()) == 10_000
    assert len(tally) > 1
    for counts in tally.values():
        assert counts.ranges == [(0, counts.acknowledged)]
