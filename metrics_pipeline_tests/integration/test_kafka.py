"""The topic on a real broker. What is changed here is a topic of its own, never the stack's."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from metrics_pipeline import kafka
from metrics_pipeline.errors import DriftError
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.fakes import until
from metrics_pipeline_tests.patience import patience

pytestmark = pytest.mark.integration

OURS = "metrics.of-test-kafka"


@pytest.fixture
def settings(stack: RunningStack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setattr(kafka, "TOPIC", OURS)
    yield stack.settings
    admin = AdminClient(kafka.client_config(stack.settings))
    for future in admin.delete_topics([OURS]).values():
        future.result(patience(10))


def alter(settings: Settings, name: str, value: str) -> None:
    """A person's hand."""
    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    admin = AdminClient(kafka.client_config(settings))
    resource = ConfigResource(ResourceType.TOPIC, OURS, incremental_configs=[entry])
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(patience(10))


def test_made_once_and_mended_when_changed_by_hand(settings: Settings) -> None:
    assert kafka.topic_drift(settings) == [f"topic {OURS} does not exist"]
    assert kafka.ensure_topic(settings).state == "created"
    assert kafka.topic_drift(settings) == []
    assert kafka.ensure_topic(settings).state == "unchanged"
    alter(settings, "retention.bytes", "1000")
    alter(settings, "message.timestamp.type", "CreateTime")
    assert sorted(kafka.topic_drift(settings)) == [
        "message.timestamp.type is CreateTime, configured LogAppendTime",
        f"retention.bytes is 1000, configured {settings.topic_retention_bytes // 6}",
    ]
    assert kafka.ensure_topic(settings).state == "changed"
    assert kafka.topic_drift(settings) == []


def test_partitions_grow_only_when_asked_and_never_shrink(settings: Settings) -> None:
    kafka.ensure_topic(settings)
    more = settings.model_copy(update={"topic_partitions_metrics": 12})
    with pytest.raises(DriftError, match="has 6 partitions, TOPIC_PARTITIONS_METRICS is 12"):
        kafka.ensure_topic(more)
    assert "partitions: 6 → 12" in kafka.ensure_topic(more, grow=True).details
    assert len(kafka.watermarks(settings)) == 12
    with pytest.raises(DriftError, match="never shrink"):
        kafka.ensure_topic(settings, grow=True)


def test_lag_is_what_a_group_has_still_to_read(settings: Settings) -> None:
    kafka.ensure_topic(settings)
    group = "group-of-test-kafka"
    assert kafka.committed(settings, group) == {}
    producer = Producer(kafka.client_config(settings))
    for number in range(10):
        producer.produce(OURS, value=b"x", partition=number % 2)
    assert producer.flush(patience(10)) == 0
    assert kafka.consumer_lag(settings, group).total == 10
    consumer = Consumer(kafka.client_config(settings) | {"group.id": group})
    consumer.commit(offsets=[TopicPartition(OURS, 0, 3)], asynchronous=False)
    consumer.close()
    assert kafka.committed(settings, group) == {0: 3}
    assert kafka.consumer_lag(settings, group) == kafka.Lag(7, {0: 2, 1: 5, 2: 0, 3: 0, 4: 0, 5: 0})
    assert kafka.watermarks(settings)[1] == (0, 5)


def test_the_mark_of_a_transaction_is_no_record(settings: Settings) -> None:
    kafka.ensure_topic(settings)
    producer = Producer(kafka.client_config(settings) | {"transactional.id": "of-test-kafka"})
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(OURS, value=b"x", partition=0)
    producer.commit_transaction(30)
    # The mark is written after the producer has its answer.
    assert until(lambda: kafka.watermarks(settings)[0] == (0, 2), 30)
    assert kafka.holds_record(settings, 0, 0)
    assert not kafka.holds_record(settings, 0, 1), "there is only the mark"
    assert not kafka.holds_record(settings, 1, 0), "there is nothing"


def test_stamps_of_records_and_of_what_is_none(settings: Settings) -> None:
    kafka.ensure_topic(settings)
    producer = Producer(kafka.client_config(settings) | {"transactional.id": "of-test-stamps"})
    producer.init_transactions(30)
    producer.begin_transaction()
    told: dict[int, int] = {}
    for _ in range(3):
        producer.produce(
            OURS,
            value=b"x",
            partition=0,
            on_delivery=lambda _, message: told.update({message.offset() or 0: message.timestamp()[1]}),
        )
    producer.produce(OURS, value=b"x", partition=1)
    producer.commit_transaction(30)
    began = time.monotonic()
    # A record; the mark at an end; what is beyond the end; an empty partition.
    assert kafka.stamps(settings, {0: 1, 1: 1, 2: 5, 3: 0}) == {0: told[1]}
    assert kafka.stamps(settings, {}) == {}
    assert time.monotonic() - began < kafka.TIMEOUT_SECONDS, "it waited for what never comes"
