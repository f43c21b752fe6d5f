"""The fakes keep their contract: the Kafka client's is checked on librdkafka, too, against its own mock broker."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import confluent_kafka
import psycopg
import pytest
from confluent_kafka import KafkaError, KafkaException

from metrics_pipeline.errors import ServiceError
from metrics_pipeline.producer.publisher import KafkaClient, producer_config
from metrics_pipeline.settings import TOPIC, Settings
from metrics_pipeline_tests.fakes import FakePostgres, FakeTopic, offsets_of
from metrics_pipeline_tests.patience import deadline

Make = Callable[..., KafkaClient]


@pytest.fixture(params=["fake", "librdkafka"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes a client: `capacity` messages at most, nothing acknowledged before `delay` seconds, or never."""

    def made(capacity: int = 100_000, answering: bool = True) -> KafkaClient:
        if request.param == "fake":
            return FakeTopic(capacity=capacity, answering=answering, latency=0.01).client({"error_cb": lambda _: None})
        config = producer_config(Settings(kafka_url="127.0.0.1:1")) | {
            "queue.buffering.max.messages": capacity,
            # Longer than a test: nothing leaves the queue.
            **({} if answering else {"linger.ms": 60_000}),
        }
        real = confluent_kafka.Producer(config | {"test.mock.num.brokers": 1})
        real.list_topics(TOPIC, timeout=5)  # the mock broker makes a topic when it is asked for it
        return real

    return made


def batch(count: int, size: int = 10) -> list[dict[str, Any]]:
    return [{"key": b"%d" % n, "value": b"x" * size} for n in range(count)]


def wait(client: KafkaClient, reports: list[Any], count: int) -> None:
    give_up = deadline(10)
    while len(reports) < count and time.monotonic() < give_up:
        client.poll(0.1)
    assert len(reports) == count


def test_everything_is_reported_once_at_consecutive_offsets(make: Make) -> None:
    client, reports = make(), list[tuple[Any, Any]]()
    assert client.produce_batch(TOPIC, batch(100), on_delivery=lambda *report: reports.append(report)) == 100
    wait(client, reports, 100)
    assert all(error is None for error, _ in reports)
    assert {message.key() for _, message in reports} == {b"%d" % n for n in range(100)}
    for number in {message.partition() for _, message in reports}:
        offsets = [message.offset() for _, message in reports if message.partition() == number]
        assert offsets == list(range(len(offsets)))
    client.close()


def test_a_full_queue_takes_a_part_and_marks_the_rest(make: Make) -> None:
    client, reports, messages = make(capacity=60, answering=False), list[Any](), batch(100)
    assert client.produce_batch(TOPIC, messages, on_delivery=lambda *report: reports.append(report)) == 60
    marked = [message for message in messages if "_error" in message]
    assert len(marked) == 40
    assert {message["_error"].code() for message in marked} == {KafkaError._QUEUE_FULL}
    client.purge(in_queue=True, in_flight=True, blocking=False)
    wait(client, reports, 60)  # none for those that were not taken
    client.close()


def test_an_oversized_message_is_refused_alone(make: Make) -> None:
    client, reports = make(), list[Any]()
    messages = [*batch(2), *batch(1, size=2_000_000)]
    assert client.produce_batch(TOPIC, messages, on_delivery=lambda *report: reports.append(report)) == 2
    assert [message.get("_error") and message["_error"].code() for message in messages] == [
        None,
        None,
        KafkaError.MSG_SIZE_TOO_LARGE,
    ]
    wait(client, reports, 2)
    client.close()


def test_a_purge_reports_what_waits(make: Make) -> None:
    client, reports = make(answering=False), list[Any]()
    assert client.produce_batch(TOPIC, batch(5), on_delivery=lambda *report: reports.append(report)) == 5
    client.poll(0)
    assert not reports
    client.purge(in_queue=True, in_flight=True, blocking=False)
    wait(client, reports, 5)
    assert {error.code() for error, _ in reports} <= {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}
    client.close()


def test_the_topic_is_listed_with_its_leaders(make: Make) -> None:
    client = make()
    topic = client.list_topics(timeout=1).topics[TOPIC]
    assert topic.error is None
    assert all(partition.leader >= 0 for partition in topic.partitions.values())
    client.close()


def test_an_unreachable_broker_raises_and_tells_the_error_callback() -> None:
    for unreachable in ("fake", "librdkafka"):
        told: list[KafkaError] = []
        client: Any
        if unreachable == "fake":
            client = FakeTopic(reachable=False).client({"error_cb": told.append})
        else:
            client = confluent_kafka.Producer(
                producer_config(Settings(kafka_url="127.0.0.1:1")) | {"error_cb": told.append}
            )
        give_up = deadline(5)
        while not any("failed: " in error.str() for error in told) and time.monotonic() < give_up:
            with pytest.raises(KafkaException):
                client.list_topics(timeout=0.2)
            client.poll(0)
        assert any("failed: Connection refused" in error.str() for error in told)
        client.close()


def test_the_lock_of_the_fake_postgres_has_one_holder() -> None:
    server = FakePostgres()
    first, second = (server.connect(None, "metrics_producer", application_name=name) for name in ("first", "second"))
    asked = "SELECT pg_try_advisory_lock(1)"
    assert first.execute(asked).fetchone() == (True,)
    assert second.execute(asked).fetchone() == (False,)
    first.close()
    assert second.execute(asked).fetchone() == (True,)
    server.restart()
    with pytest.raises(psycopg.OperationalError):
        second.execute(asked)
    server.down = True
    with pytest.raises(ServiceError):
        server.connect(None, "metrics_producer", application_name="third")


def test_offsets_of_a_multirange() -> None:
    assert offsets_of("{}") == set()
    assert offsets_of("{[3,5),[7,8)}") == {3, 4, 7}
