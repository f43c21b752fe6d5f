"""The topic is made what the settings say, drift is named, lag counts what is still to be read."""

from __future__ import annotations

from typing import Any

import pytest
from confluent_kafka import KafkaError, TopicPartition

from metrics_pipeline import kafka
from metrics_pipeline.errors import DriftError, ServiceError
from metrics_pipeline.settings import TOPIC, Settings
from metrics_pipeline_tests.fake_kafka import FakeBroker, FakeTopic


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> FakeBroker:
    broker = FakeBroker()
    monkeypatch.setattr(kafka, "AdminClient", broker.admin)
    monkeypatch.setattr(kafka, "Consumer", broker.consumer)
    return broker


def settings(**values: Any) -> Settings:
    return Settings(**{"topic_partitions_metrics": 3, "topic_retention_bytes": 3 * 2**30, **values})


def test_retention_is_shared_by_the_partitions_and_segments_are_a_quarter_of_it() -> None:
    spec = kafka.topic_spec(settings(topic_retention_bytes=3 * 400 * 2**20))
    assert spec.config["retention.bytes"] == str(400 * 2**20)
    assert spec.config["segment.bytes"] == str(100 * 2**20)
    assert spec.config["retention.ms"] == "-1"


@pytest.mark.parametrize(
    ("retention", "partitions", "segment"),
    [
        (2**40, 3, 256 * 2**20),  # a large segment would keep what retention should free
        (64 * 2**20, 64, 2 * 2**20),  # a small one could not hold the largest batch
    ],
)
def test_segments_have_bounds(retention: int, partitions: int, segment: int) -> None:
    spec = kafka.topic_spec(settings(topic_retention_bytes=retention, topic_partitions_metrics=partitions))
    assert spec.config["segment.bytes"] == str(segment)


@pytest.mark.parametrize(("replicas", "insync"), [(1, "1"), (2, "1"), (3, "2")])
def test_min_insync_lets_one_of_three_replicas_fail(replicas: int, insync: str) -> None:
    assert kafka.topic_spec(settings(topic_replication_factor=replicas)).config["min.insync.replicas"] == insync


def test_a_topic_is_created_once_and_then_left_alone(broker: FakeBroker) -> None:
    assert kafka.topic_drift(settings()) == [f"topic {TOPIC} does not exist"]
    assert kafka.ensure_topic(settings()).state == "created"
    assert len(broker.topics[TOPIC].offsets) == 3
    assert kafka.topic_drift(settings()) == []
    assert kafka.ensure_topic(settings()).state == "unchanged"


def test_a_log_is_a_topic_in_a_cluster(broker: FakeBroker) -> None:
    with pytest.raises(ServiceError, match=f"topic {TOPIC} does not exist"):
        kafka.topic_log(settings())
    kafka.ensure_topic(settings())
    logs = [kafka.topic_log(settings())]
    broker.topic_ids[TOPIC] = 2
    logs.append(kafka.topic_log(settings()))
    broker.cluster = "other"
    logs.append(kafka.topic_log(settings()))
    broker.topic_ids[TOPIC] = 0  # a broker that has none
    logs.append(kafka.topic_log(settings()))
    ids = ["fake/AAAAAAAAAAAAAAAAAAAAAQ", "fake/AAAAAAAAAAAAAAAAAAAAAg", "other/AAAAAAAAAAAAAAAAAAAAAg", "other/"]
    assert logs == [kafka.TopicLog(each, 3) for each in ids]


def test_partitions_grow_to_a_multiple_only(broker: FakeBroker) -> None:
    kafka.ensure_topic(settings())
    with pytest.raises(DriftError, match=r"to a multiple only.*set TOPIC_PARTITIONS_METRICS=6"):
        kafka.ensure_topic(settings(topic_partitions_metrics=5), grow=True)


def test_settings_changed_by_hand_are_named_and_brought_back(broker: FakeBroker) -> None:
    kafka.ensure_topic(settings())
    broker.topics[TOPIC].config["retention.bytes"] = "1000"
    assert kafka.topic_drift(settings()) == [f"retention.bytes is 1000, configured {2**30}"]
    change = kafka.ensure_topic(settings())
    assert (change.state, change.details) == ("changed", [f"retention.bytes: 1000 → {2**30}"])
    assert kafka.topic_drift(settings()) == []


def test_a_setting_that_the_broker_does_not_know_is_no_drift(broker: FakeBroker) -> None:
    kafka.ensure_topic(settings())
    del broker.topics[TOPIC].config["min.insync.replicas"]
    assert kafka.topic_drift(settings()) == []


def test_created_by_somebody_else_at_the_same_moment_is_brought_to_the_configuration(broker: FakeBroker) -> None:
    broker.created_by_another = FakeTopic(1, dict.fromkeys(range(3), (0, 0)), {})
    broker.defaults |= dict(kafka.topic_spec(settings()).config) | {"retention.ms": "5"}
    change = kafka.ensure_topic(settings())
    assert (change.state, change.details) == ("changed", ["retention.ms: 5 → -1"])


def test_partitions_grow_only_when_asked(broker: FakeBroker) -> None:
    kafka.ensure_topic(settings())
    more = settings(topic_partitions_metrics=6)
    assert "partitions is 3, configured 6" in kafka.topic_drift(more)
    with pytest.raises(
        DriftError, match=r"has 3 partitions, TOPIC_PARTITIONS_METRICS is 6: set .*=3, or .*grow_partitions"
    ):
        kafka.ensure_topic(more)
    assert "partitions: 3 → 6" in kafka.ensure_topic(more, grow=True).details
    assert kafka.topic_drift(more) == []


def test_partitions_never_shrink(broker: FakeBroker) -> None:
    kafka.ensure_topic(settings())
    with pytest.raises(DriftError, match="has 3 partitions, TOPIC_PARTITIONS_METRICS is 2: partitions never shrink"):
        kafka.ensure_topic(settings(topic_partitions_metrics=2), grow=True)
    assert len(broker.topics[TOPIC].offsets) == 3


def test_replicas_are_not_changed_in_silence(broker: FakeBroker) -> None:
    kafka.ensure_topic(settings())
    assert "replicas is 1, configured 3" in kafka.topic_drift(settings(topic_replication_factor=3))
    with pytest.raises(DriftError, match="set TOPIC_REPLICATION_FACTOR=1"):
        kafka.ensure_topic(settings(topic_replication_factor=3))


@pytest.mark.parametrize(
    ("low_high", "commit", "lag"),
    [
        ((0, 100), 40, 60),
        ((20, 100), None, 80),  # never committed: what is retained is still to be read
        ((50, 100), 40, 50),  # retention overtook the group: what is gone cannot be read any more
        ((0, 100), 100, 0),
        ((0, 10), 40, 0),  # the topic was made anew under an old commit
        ((0, 100), -1001, 100),  # librdkafka's way to say "none"
    ],
)
def test_lag_of_a_partition(broker: FakeBroker, low_high: tuple[int, int], commit: int | None, lag: int) -> None:
    broker.add(TOPIC, FakeTopic(1, {0: low_high}, {}))
    broker.commits["g"] = [TopicPartition("other", 0, 5)]
    if commit is not None:
        broker.commits["g"].append(TopicPartition(TOPIC, 0, commit))
    assert kafka.consumer_lag(settings(), "g") == kafka.Lag(lag, {0: lag})


def test_lag_of_a_group_that_is_not_there_is_all_that_is_retained(broker: FakeBroker) -> None:
    broker.add(TOPIC, FakeTopic(1, {0: (5, 10), 1: (0, 3)}, {}))
    assert kafka.committed(settings(), "nobody") == {}
    assert kafka.consumer_lag(settings(), "nobody") == kafka.Lag(8, {0: 5, 1: 3})
    assert kafka.watermarks(settings()) == {0: (5, 10), 1: (0, 3)}


def test_offsets_of_a_missing_topic_say_how_to_make_it(broker: FakeBroker) -> None:
    with pytest.raises(ServiceError, match=r"topic metrics does not exist: .*provision"):
        kafka.watermarks(settings())


def test_an_unreachable_broker_is_named_with_the_reason_and_the_setting(broker: FakeBroker) -> None:
    broker.down = True
    with pytest.raises(ServiceError, match=r"broker here:1 cannot be reached \(Connection refused\): .*KAFKA_URL"):
        kafka.ensure_topic(settings(kafka_url="here:1"))


def test_a_real_client_gives_up_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka, "TIMEOUT_SECONDS", 0.5)
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:1 cannot be reached \(Connection refused\)"):
        kafka.topic_drift(settings(kafka_url="127.0.0.1:1"))


def test_a_new_topic_is_there_when_its_leaders_answer(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata name a leader before that broker knows it."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    broker.leaderless = 3
    assert kafka.ensure_topic(settings()).state == "created"
    assert broker.leaderless == 0
    assert kafka.watermarks(settings())
    broker.leaderless = 10**9
    monkeypatch.setattr(kafka, "LEADER_SECONDS", 0.0)
    with pytest.raises(ServiceError, match=r"topic metrics does not answer \(Broker: Not leader"):
        kafka.await_topic(settings(), TOPIC, 1)
    broker.leaderless = 0
    with pytest.raises(ServiceError, match=r"topic other does not answer \(0 of 2 partitions are there"):
        kafka.await_topic(settings(), "other", 2)


def test_a_broker_that_has_just_started_is_asked_again(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers that it does not coordinate the group, until its leaders are elected."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    broker.add(TOPIC, FakeTopic(1, {0: (0, 9)}, {}))
    broker.unsettled = 3
    assert kafka.committed(settings(), "g") == {}
    broker.unsettled = 3
    assert kafka.commit(settings(), {0: 5}, "g")
    assert kafka.committed(settings(), "g") == {0: 5}
    broker.unsettled = 10**9
    monkeypatch.setattr(kafka, "TIMEOUT_SECONDS", 0.0)
    with pytest.raises(ServiceError, match="Not coordinator"):
        kafka.committed(settings(), "g")


@pytest.mark.parametrize("reason", [KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.OFFSET_NOT_AVAILABLE])
def test_a_new_leader_is_asked_again(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    """It does not name the end of its log until it knows what the replicas have."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    broker.add(TOPIC, FakeTopic(3, {0: (2, 9)}, {}))
    broker.leaderless, broker.leaderless_because = 3, reason
    assert kafka.watermarks(settings()) == {0: (2, 9)}
    broker.leaderless = 10**9
    monkeypatch.setattr(kafka, "TIMEOUT_SECONDS", 0.0)
    with pytest.raises(ServiceError, match=r"Kafka broker .* refused: Broker: (Not leader|Leader high watermark)"):
        kafka.watermarks(settings())
    broker.leaderless_because = KafkaError.TOPIC_AUTHORIZATION_FAILED
    monkeypatch.setattr(kafka, "TIMEOUT_SECONDS", 10**9)
    with pytest.raises(ServiceError, match="refused: Broker: Topic authorization failed"):
        kafka.watermarks(settings())


def test_a_group_with_members_is_left_to_them(broker: FakeBroker) -> None:
    broker.add(TOPIC, FakeTopic(1, {0: (0, 9)}, {}))
    broker.members = {"g"}
    assert not kafka.commit(settings(), {0: 5}, "g")
    assert kafka.committed(settings(), "g") == {}


def test_a_cluster_is_known_by_its_id_or_not_at_all(broker: FakeBroker) -> None:
    assert kafka.cluster_id(settings()) == "fake"
    for unknown in ("", None):
        broker.cluster = unknown
        with pytest.raises(ServiceError, match="does not tell its cluster's id yet"):
            kafka.cluster_id(settings())
