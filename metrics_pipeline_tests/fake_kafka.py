"""A broker in memory, with the answers of `confluent_kafka.admin.AdminClient` and of a consumer asked for offsets."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicPartition, Uuid
from confluent_kafka.admin import ConfigResource, NewPartitions, NewTopic


@dataclass
class FakeTopic:
    """Offsets are (low, high) by partition."""

    replicas: int
    offsets: dict[int, tuple[int, int]]
    config: dict[str, str]


@dataclass
class FakeBroker:
    """The cluster behind every FakeAdmin.

    `created_by_another` is a topic that appears when we want to create it, `members` are groups that consumers belong to,
    `unsettled` is how often a question for a group comes too early, `leaderless` how often one for offsets does, and
    `leaderless_because` what the answer then is.
    """

    topics: dict[str, FakeTopic] = field(default_factory=dict)
    commits: dict[str, list[TopicPartition]] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=lambda: {"retention.bytes": "-1", "retention.ms": "604800000"})
    created_by_another: FakeTopic | None = None
    down: bool = False
    members: set[str] = field(default_factory=set)
    unsettled: int = 0
    leaderless: int = 0
    leaderless_because: int = KafkaError.NOT_LEADER_FOR_PARTITION
    cluster: str | None = "fake"
    topic_ids: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, topic: FakeTopic) -> None:
        """Have a topic, its settings laid over the defaults."""
        topic.config = self.defaults | topic.config
        self.topics[name] = topic

    def admin(self, config: dict[str, Any]) -> FakeAdmin:
        """Stands in for the class AdminClient."""
        return FakeAdmin(self, config)

    def consumer(self, config: dict[str, Any]) -> FakeConsumer:
        """Stands in for the class Consumer."""
        return FakeConsumer(self, config)


class FakeAdmin:
    """One client."""

    def __init__(self, broker: FakeBroker, config: dict[str, Any]) -> None:
        self._broker = broker
        self._config = config

    def poll(self, timeout: float = -1) -> int:
        if self._broker.down:
            self._config["error_cb"](
                KafkaError(KafkaError._TRANSPORT, "broker: Connect to x failed: Connection refused (after 0ms)")
            )
        return 0

    def list_topics(self, timeout: float = -1) -> Any:
        if self._broker.down:
            raise KafkaException(KafkaError(KafkaError._TRANSPORT, "Failed to get metadata"))
        return SimpleNamespace(
            cluster_id=self._broker.cluster,
            topics={
                name: SimpleNamespace(
                    error=None,
                    partitions={
                        number: SimpleNamespace(id=number, leader=1, replicas=list(range(topic.replicas)))
                        for number in topic.offsets
                    },
                )
                for name, topic in self._broker.topics.items()
            },
        )

    def create_topics(self, topics: list[NewTopic]) -> dict[str, Future[None]]:
        (new,) = topics
        if self._broker.created_by_another:
            self._broker.add(new.topic, self._broker.created_by_another)
            error = KafkaException(KafkaError(KafkaError.TOPIC_ALREADY_EXISTS, "Topic exists"))
            return {new.topic: _failed(error)}
        offsets = dict.fromkeys(range(new.num_partitions), (0, 0))
        self._broker.add(new.topic, FakeTopic(new.replication_factor, offsets, dict(new.config or {})))
        return {new.topic: _done(None)}

    def create_partitions(self, partitions: list[NewPartitions]) -> dict[str, Future[None]]:
        (new,) = partitions
        topic = self._broker.topics[new.topic]
        for number in range(len(topic.offsets), new.new_total_count):
            topic.offsets[number] = (0, 0)
        return {new.topic: _done(None)}

    def describe_topics(self, topics: Any, **_: Any) -> dict[str, Future[Any]]:
        (name,) = topics.topic_names
        if self._broker.down:
            return {name: _failed(KafkaException(KafkaError(KafkaError._TRANSPORT, "Failed to get metadata")))}
        if name not in self._broker.topics:
            return {name: _failed(KafkaException(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)))}
        topic_id = Uuid(0, self._broker.topic_ids.get(name, 1))
        return {name: _done(SimpleNamespace(topic_id=topic_id, partitions=list(self._broker.topics[name].offsets)))}

    def describe_cluster(self, **_: Any) -> Future[Any]:
        return _done(SimpleNamespace(cluster_id=self._broker.cluster))

    def describe_configs(self, resources: list[ConfigResource]) -> dict[ConfigResource, Future[Any]]:
        (resource,) = resources
        config = self._broker.topics[resource.name].config
        return {resource: _done({name: SimpleNamespace(value=value) for name, value in config.items()})}

    def incremental_alter_configs(self, resources: list[ConfigResource]) -> dict[ConfigResource, Future[None]]:
        (resource,) = resources
        for entry in resource.incremental_configs:
            self._broker.topics[resource.name].config[entry.name] = str(entry.value)
        return {resource: _done(None)}


class FakeConsumer(FakeAdmin):
    """A consumer that is only asked for offsets."""

    def get_watermark_offsets(self, place: TopicPartition, timeout: float = -1) -> tuple[int, int]:
        if self._broker.leaderless:
            self._broker.leaderless -= 1
            raise KafkaException(KafkaError(self._broker.leaderless_because))
        return self._broker.topics[place.topic].offsets[place.partition]

    def committed(self, places: list[TopicPartition], timeout: float = -1) -> list[TopicPartition]:
        self._settle()
        known = {place.partition: place for place in self._broker.commits.get(self._config["group.id"], [])}
        return [known.get(place.partition, TopicPartition(place.topic, place.partition, -1001)) for place in places]

    def commit(self, *, offsets: list[TopicPartition], asynchronous: bool) -> list[TopicPartition]:
        assert not asynchronous
        self._settle()
        group = self._config["group.id"]
        if group in self._broker.members:
            raise KafkaException(KafkaError(KafkaError.UNKNOWN_MEMBER_ID, "Broker: Unknown member"))
        known = {place.partition: place for place in self._broker.commits.get(group, [])}
        self._broker.commits[group] = list((known | {place.partition: place for place in offsets}).values())
        return offsets

    def close(self) -> None:
        return None

    def _settle(self) -> None:
        if self._broker.unsettled:
            self._broker.unsettled -= 1
            raise KafkaException(KafkaError(KafkaError.NOT_COORDINATOR, "Broker: Not coordinator"))


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
