"""The broker: client settings, the topic (idempotent), offsets and lag."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from metrics_pipeline.change import Change
from metrics_pipeline.errors import DriftError, ServiceError
from metrics_pipeline.settings import CONNECTOR_GROUP, TOPIC, Settings

TIMEOUT_SECONDS = 8.0
"""How long one request may take; the broker stands on the same machine or near it."""

LEADER_SECONDS = 15.0
"""How long the leaders of a new topic's partitions are waited for."""

LIBRDKAFKA = logging.getLogger("metrics_pipeline.librdkafka")
# librdkafka repeats "Connection refused" several times a second: without a handler of somebody's own it stays silent.
LIBRDKAFKA.addHandler(logging.NullHandler())

UNREACHABLE = frozenset({"_TRANSPORT", "_TIMED_OUT", "_ALL_BROKERS_DOWN", "_RESOLVE"})
"""librdkafka's names for not getting an answer."""

HAS_MEMBERS = frozenset(
    {
        "UNKNOWN_MEMBER_ID",
        "ILLEGAL_GENERATION",
        "REBALANCE_IN_PROGRESS",
        "FENCED_INSTANCE_ID",
        "INCONSISTENT_GROUP_PROTOCOL",
        "STALE_MEMBER_EPOCH",
    }
)
"""What a broker answers to a commit from outside of a group that consumers belong to."""

UNSETTLED = frozenset(
    {
        "NOT_COORDINATOR",
        "COORDINATOR_NOT_AVAILABLE",
        "COORDINATOR_LOAD_IN_PROGRESS",
        "_WAIT_COORD",
        "NOT_LEADER_FOR_PARTITION",
        "LEADER_NOT_AVAILABLE",
        "REPLICA_NOT_AVAILABLE",
        "FENCED_LEADER_EPOCH",
        "UNKNOWN_LEADER_EPOCH",
        "OFFSET_NOT_AVAILABLE",
    }
)
"""What a broker answers about a group or a partition for a moment after it started, and after a change of leaders.

A new leader does not name the end of its log until it knows what the replicas have (KIP-207).
"""

MIB = 2**20
_URL_SAFE = str.maketrans("+/", "-_")
_T = TypeVar("_T")


@dataclass(frozen=True)
class TopicSpec:
    """A topic as the settings want it; `config` holds only what is set on purpose."""

    name: str
    partitions: int
    replication_factor: int
    config: Mapping[str, str]


@dataclass(frozen=True)
class Lag:
    """Records that a consumer group has still to read, per partition and in all."""

    total: int
    per_partition: dict[int, int]


@dataclass(frozen=True)
class TopicLog:
    """The log that the topic's name stands for now: another topic of that name, or another cluster, is another log.

    Attributes:
        id: the cluster's id, a slash, and the topic's id (KIP-516). A broker that does not know topic ids is told by its
            cluster alone.
        partitions: how many it has.
    """

    id: str
    partitions: int


def client_config(settings: Settings) -> dict[str, Any]:
    """Settings shared by every librdkafka client of ours; add what the client needs of its own."""
    return {
        "bootstrap.servers": settings.bootstrap_servers,
        "client.id": "metrics-pipeline",
        "reconnect.backoff.max.ms": 1000,
        "logger": LIBRDKAFKA,
    }


def cluster_id(settings: Settings) -> str:
    """The id of the Kafka cluster: what tells one from another at the same address, and whose a Kafka Connect is.

    Raises:
        ServiceError: the broker cannot be reached, or does not know it yet.
    """
    with _admin(settings) as admin:
        known: str | None = admin.list_topics(timeout=TIMEOUT_SECONDS).cluster_id
    if not known:
        raise ServiceError(f"Kafka broker {settings.bootstrap_servers} does not tell its cluster's id yet: try again")
    return known


def topic_log(settings: Settings) -> TopicLog:
    """The log that the topic's name stands for now.

    Raises:
        ServiceError: the broker cannot be reached, or the topic does not exist.
    """
    with _admin(settings) as admin:
        return TopicWatch(admin).ask()


class TopicWatch:
    """Looks again and again which log the topic's name stands for.

    Args:
        admin: asks the broker.
    """

    def __init__(self, admin: AdminClient) -> None:
        self._admin = admin
        self._asked: tuple[Future[Any], Future[Any]] | None = None

    @classmethod
    def of(cls, settings: Settings) -> TopicWatch:
        """One with a client of its own."""
        return cls(AdminClient(client_config(settings)))

    def ask(self) -> TopicLog:
        """The present one, asked now.

        Raises:
            KafkaException: the broker does not answer for eight seconds, or refuses.
            ServiceError: the topic does not exist.
        """
        return self._answer(self._ask())

    def look(self) -> TopicLog | None:
        """What the last question brought, without waiting; None while there is no answer, or no good one."""
        asked, answer = self._asked, None
        if asked is not None and all(future.done() for future in asked):
            with suppress(KafkaException, ServiceError):
                answer = self._answer(asked)
            asked = None
        self._asked = asked or self._ask()
        return answer

    def _ask(self) -> tuple[Future[Any], Future[Any]]:
        (topic,) = self._admin.describe_topics(TopicCollection([TOPIC]), request_timeout=TIMEOUT_SECONDS).values()
        return topic, self._admin.describe_cluster(request_timeout=TIMEOUT_SECONDS)

    @staticmethod
    def _answer(asked: tuple[Future[Any], Future[Any]]) -> TopicLog:
        topic, cluster = asked
        try:
            described = topic.result()
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise _no_topic() from error
            raise
        # What is all zeros is no id: the broker is of a kind that has none.
        known = described.topic_id is not None and (
            described.topic_id.get_most_significant_bits() or described.topic_id.get_least_significant_bits()
        )
        # Written as Kafka's own tools do.
        topic_id = str(described.topic_id).translate(_URL_SAFE).rstrip("=") if known else ""
        return TopicLog(f"{cluster.result().cluster_id or ''}/{topic_id}", len(described.partitions))


def topic_spec(settings: Settings) -> TopicSpec:
    """The topic of the readings as configured."""
    partitions = settings.topic_partitions_metrics
    retention = settings.topic_retention_bytes // partitions
    replicas = settings.topic_replication_factor
    return TopicSpec(
        TOPIC,
        partitions,
        replicas,
        {
            "cleanup.policy": "delete",
            "message.timestamp.type": "LogAppendTime",
            "min.insync.replicas": "1" if replicas < 3 else "2",
            "retention.bytes": str(retention),
            # By bytes only: a record that the sink has not read yet must not go because a clock says so.
            "retention.ms": "-1",
            # Only closed segments are deleted; one must still hold the largest batch (1 MiB).
            "segment.bytes": str(max(2 * MIB, min(256 * MIB, retention // 4))),
        },
    )


def ensure_topic(settings: Settings, grow: bool = False) -> Change:
    """Create the topic or bring its settings back; partitions grow only when asked.

    Args:
        settings: where the broker is and what the topic should be.
        grow: add partitions when there are fewer than configured. Keys then move to other partitions.

    Raises:
        ServiceError: the broker cannot be reached or refuses.
        DriftError: partitions or replicas differ in a way that is not mended without being asked.
    """
    spec = topic_spec(settings)
    with _admin(settings) as admin:
        if _partitions(admin, spec.name) is None and _create(settings, admin, spec):
            await_topic(settings, spec.name, spec.partitions)
            return Change("created", [f"topic {spec.name} with {spec.partitions} partitions"])
        details = []
        existing, replicas = _shape(admin)
        if replicas != spec.replication_factor:
            raise DriftError(
                f"topic {spec.name} has {replicas} replicas, TOPIC_REPLICATION_FACTOR is {spec.replication_factor}: "
                f"set TOPIC_REPLICATION_FACTOR={replicas}, or move the replicas with kafka-reassign-partitions"
            )
        if existing > spec.partitions:
            raise DriftError(
                f"topic {spec.name} has {existing} partitions, TOPIC_PARTITIONS_METRICS is {spec.partitions}: "
                f"partitions never shrink; set TOPIC_PARTITIONS_METRICS={existing}"
            )
        if existing < spec.partitions:
            if not grow:
                raise DriftError(
                    f"topic {spec.name} has {existing} partitions, TOPIC_PARTITIONS_METRICS is {spec.partitions}: "
                    f"set TOPIC_PARTITIONS_METRICS={existing}, or launch the `provision` job with grow_partitions: true"
                )
            if spec.partitions % existing:
                raise DriftError(
                    f"topic {spec.name} has {existing} partitions, TOPIC_PARTITIONS_METRICS is {spec.partitions}: "
                    "partitions grow to a multiple only, so that a key stays or moves to a new partition; "
                    f"set TOPIC_PARTITIONS_METRICS={existing * -(-spec.partitions // existing)}"
                )
            _done(admin.create_partitions([NewPartitions(spec.name, spec.partitions)]))
            await_topic(settings, spec.name, spec.partitions)
            details.append(f"partitions: {existing} → {spec.partitions}")
        wrong = _config_drift(admin, spec)
        if wrong:
            resource = ConfigResource(
                ResourceType.TOPIC,
                spec.name,
                incremental_configs=[
                    ConfigEntry(name, spec.config[name], incremental_operation=AlterConfigOpType.SET) for name in wrong
                ],
            )
            _done(admin.incremental_alter_configs([resource]))
            details += [f"{name}: {present} → {spec.config[name]}" for name, present in wrong.items()]
    return Change("changed" if details else "unchanged", details)


def await_topic(settings: Settings, name: str, partitions: int) -> None:
    """Wait until every partition of a topic that was just made, or grew, answers.

    The cluster's metadata name a partition's leader a moment before that broker knows that it is the one.

    Args:
        settings: where the broker is.
        name: of the topic.
        partitions: how many it has at least.

    Raises:
        ServiceError: the broker cannot be reached, or a partition does not answer for a quarter of a minute.
    """
    deadline = time.monotonic() + LEADER_SECONDS
    with _consumer(settings) as consumer:
        while True:
            numbers = _partitions(consumer, name) or {}
            problem = f"{len(numbers)} of {partitions} partitions are there"
            try:
                for number in numbers:
                    consumer.get_watermark_offsets(TopicPartition(name, number), timeout=TIMEOUT_SECONDS)
                if len(numbers) >= partitions:
                    return
            except KafkaException as error:
                if error.args[0].name() in UNREACHABLE:
                    raise
                problem = error.args[0].str()
            if time.monotonic() >= deadline:
                raise ServiceError(f"topic {name} does not answer ({problem}): see `metrics-pipeline logs broker`")
            time.sleep(0.1)


def topic_drift(settings: Settings) -> list[str]:
    """Each difference between the topic and its configuration; empty when there is none.

    Raises:
        ServiceError: the broker cannot be reached.
    """
    spec = topic_spec(settings)
    with _admin(settings) as admin:
        if _partitions(admin, spec.name) is None:
            return [f"topic {spec.name} does not exist"]
        partitions, replicas = _shape(admin)
        differences = []
        if partitions != spec.partitions:
            differences.append(f"partitions is {partitions}, configured {spec.partitions}")
        if replicas != spec.replication_factor:
            differences.append(f"replicas is {replicas}, configured {spec.replication_factor}")
        differences += [
            f"{name} is {is_}, configured {spec.config[name]}" for name, is_ in _config_drift(admin, spec).items()
        ]
    return differences


def watermarks(settings: Settings) -> dict[int, tuple[int, int]]:
    """First offset retained and the offset after the last record, per partition of the topic.

    Raises:
        ServiceError: the broker cannot be reached, or the topic does not exist.
    """
    with _consumer(settings) as consumer:
        return _watermarks(consumer)


def ends(consumer: Consumer, place: TopicPartition) -> tuple[int, int]:
    """First offset retained and the offset after the last record of one partition, whose leader may have just changed.

    Raises:
        KafkaException: nobody answers for eight seconds, or the broker refuses.
    """
    return _settled(lambda: consumer.get_watermark_offsets(place, timeout=TIMEOUT_SECONDS))


def offsets_at(settings: Settings, milliseconds: int) -> dict[int, int]:
    """Per partition the offset of the first record that was appended at this time (since 1970) or later, else the end.

    Raises:
        ServiceError: the broker cannot be reached, or the topic does not exist.
    """
    with _consumer(settings) as consumer:
        marks = _watermarks(consumer)
        asked = [TopicPartition(TOPIC, number, milliseconds) for number in marks]
        found = _settled(lambda: _each_good(consumer.offsets_for_times(asked, timeout=TIMEOUT_SECONDS)))
        return {place.partition: place.offset if place.offset >= 0 else marks[place.partition][1] for place in found}


def first_append(settings: Settings, partitions: Iterable[int]) -> float | None:
    """When the first record that is still there was appended to any of these partitions: seconds since 1970; None if never.

    Raises:
        ServiceError: the broker cannot be reached, or the topic does not exist.
    """
    with _consumer(settings) as consumer:
        marks = _watermarks(consumer)
        asked = {
            number: marks[number][0] for number in partitions if number in marks and marks[number][1] > marks[number][0]
        }
        consumer.assign([TopicPartition(TOPIC, number, low) for number, low in asked.items()])
        times: list[float] = []
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while asked and time.monotonic() < deadline:
            message = consumer.poll(0.2)
            if message is None or message.error() is not None or (number := message.partition()) is None:
                continue
            if asked.pop(number, None) is not None:
                times.append(message.timestamp()[1] / 1000)
                consumer.pause([TopicPartition(TOPIC, number)])
        return min(times, default=None)


def stamps(settings: Settings, offsets: Mapping[int, int]) -> dict[int, int]:
    """The timestamp of the record at an offset of each partition, in milliseconds since 1970; those without one are left out.

    Raises:
        ServiceError: the broker cannot be reached.
    """
    with _consumer(settings, config={"enable.partition.eof": True, "auto.offset.reset": "error"}) as consumer:
        asked, found = dict(offsets), dict[int, int]()
        consumer.assign([TopicPartition(TOPIC, number, offset) for number, offset in asked.items()])
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while asked and time.monotonic() < deadline:
            message = consumer.poll(0.2)
            if message is None or (number := message.partition()) is None or number not in asked:
                continue
            # An end, an offset that is not there, or the next record, are all that there is to hear.
            offset = asked.pop(number)
            if message.error() is None:
                consumer.pause([TopicPartition(TOPIC, number)])
                kind, milliseconds = message.timestamp()
                if kind and message.offset() == offset:
                    found[number] = milliseconds
        return found


def committed(settings: Settings, group: str = CONNECTOR_GROUP) -> dict[int, int]:
    """Offset that a consumer group committed in each partition of the topic; partitions without one are left out.

    Raises:
        ServiceError: the broker cannot be reached.
    """
    with _consumer(settings, group) as consumer:
        return _committed(consumer, sorted(_existing(consumer)))


def consumer_lag(settings: Settings, group: str = CONNECTOR_GROUP) -> Lag:
    """Records retained that a consumer group has not committed; a partition without a commit counts from its start.

    Raises:
        ServiceError: the broker cannot be reached, or the topic does not exist.
    """
    with _consumer(settings, group) as consumer:
        # Commits first: asked the other way round, a busy consumer could seem to be ahead of the log's end.
        offsets = _committed(consumer, sorted(_existing(consumer)))
        return _lag(offsets, _watermarks(consumer))


def lag_from(settings: Settings, offsets: Mapping[int, int]) -> Lag:
    """Records retained from these offsets on; a partition without one counts from its start.

    Raises:
        ServiceError: the broker cannot be reached, or the topic does not exist.
    """
    return _lag(offsets, watermarks(settings))


def holds_record(settings: Settings, partition: int, offset: int) -> bool:
    """Whether there is a record at this offset or behind it: what lies before a partition's end may be the mark of a transaction.

    Whoever reads records only stays before such a mark for ever, and has nothing to read. In doubt there is one.
    """
    own = {"group.id": CONNECTOR_GROUP, "enable.auto.commit": False, "enable.partition.eof": True}
    consumer = Consumer(_config(settings, []) | own)
    try:
        consumer.assign([TopicPartition(TOPIC, partition, offset)])
        message = consumer.poll(TIMEOUT_SECONDS)
        error = message.error() if message is not None else None
        return error is None or error.code() != KafkaError._PARTITION_EOF  # noqa: SLF001  # librdkafka's own code
    finally:
        consumer.close()


def commit(settings: Settings, offsets: Mapping[int, int], group: str) -> bool:
    """Set the committed offsets of a consumer group that nobody is a member of.

    Args:
        settings: where the broker is.
        offsets: by partition of the topic; the others stay as they are.
        group: the consumer group.

    Returns:
        False when the group has members: only they may commit, and nothing was changed.

    Raises:
        ServiceError: the broker cannot be reached, or refuses.
    """
    if not offsets:
        return True
    places = [TopicPartition(TOPIC, number, offset) for number, offset in sorted(offsets.items())]
    with _consumer(settings, group) as consumer:
        try:
            _settled(lambda: _each_good(consumer.commit(offsets=places, asynchronous=False)))
        except KafkaException as error:
            if error.args[0].name() in HAS_MEMBERS:
                return False
            raise
    return True


@contextmanager
def _admin(settings: Settings) -> Iterator[AdminClient]:
    """An AdminClient that lives until its futures are done, and whose errors say where it wanted to go."""
    reasons: list[str] = []
    admin = AdminClient(_config(settings, reasons))
    with _explained(settings, reasons, lambda: admin.poll(0)):
        yield admin


@contextmanager
def _consumer(
    settings: Settings, group: str = CONNECTOR_GROUP, config: Mapping[str, Any] | None = None
) -> Iterator[Consumer]:
    """A consumer that joins no group: it only asks for offsets, which it does more safely than an AdminClient.

    The AdminClient's requests to a group's coordinator abort the whole process when the broker goes away at the wrong
    moment (confluentinc/librdkafka#4605).
    """
    reasons: list[str] = []
    consumer = Consumer(
        _config(settings, reasons) | {"group.id": group, "enable.auto.commit": False} | dict(config or {})
    )
    try:
        with _explained(settings, reasons, lambda: None):
            yield consumer
    finally:
        consumer.close()


def _config(settings: Settings, reasons: list[str]) -> dict[str, Any]:
    return client_config(settings) | {
        "socket.timeout.ms": int(TIMEOUT_SECONDS * 1000),
        "error_cb": lambda error: reasons.append(error.str()),
    }


@contextmanager
def _explained(settings: Settings, reasons: list[str], serve: Callable[[], object]) -> Iterator[None]:
    """Errors that say which broker was meant and why it did not answer."""
    try:
        yield
    except KafkaException as error:
        serve()
        problem = error.args[0]
        if problem.name() in UNREACHABLE:
            refused = next((reason for reason in reasons if "failed: " in reason), problem.str())
            refused = refused.split("failed: ")[-1].split(" (after")[0]
            raise ServiceError(
                f"Kafka broker {settings.bootstrap_servers} cannot be reached ({refused}): "
                "start it with `metrics-pipeline up`, or correct KAFKA_URL (or KAFKA_PORT)"
            ) from error
        raise ServiceError(f"Kafka broker {settings.bootstrap_servers} refused: {problem.str()}") from error
    finally:
        serve()


def _done(futures: Mapping[Any, Future[_T]]) -> dict[Any, _T]:
    # librdkafka ends each request by itself after socket.timeout.ms.
    return {key: future.result() for key, future in futures.items()}


def _partitions(admin: AdminClient | Consumer, name: str) -> dict[int, Any] | None:
    """Metadata of a topic's partitions; None when there is no such topic."""
    # Asking for all topics: naming one that does not exist makes some brokers create it.
    topic = admin.list_topics(timeout=TIMEOUT_SECONDS).topics.get(name)
    return dict(topic.partitions) if topic is not None and topic.error is None else None


def _existing(admin: AdminClient | Consumer) -> dict[int, Any]:
    partitions = _partitions(admin, TOPIC)
    if partitions is None:
        raise _no_topic()
    return partitions


def _no_topic() -> ServiceError:
    return ServiceError(
        f"topic {TOPIC} does not exist: run `dagster job execute -m metrics_pipeline.definitions -j provision`"
    )


def _shape(admin: AdminClient) -> tuple[int, int]:
    partitions = _existing(admin)
    return len(partitions), max(len(partition.replicas) for partition in partitions.values())


def _create(settings: Settings, admin: AdminClient, spec: TopicSpec) -> bool:
    """False when somebody else created it at the same moment."""
    topic = NewTopic(spec.name, spec.partitions, spec.replication_factor, config=dict(spec.config))
    try:
        _done(admin.create_topics([topic]))
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise
        await_topic(settings, spec.name, 1)
        return False
    return True


def _config_drift(admin: AdminClient, spec: TopicSpec) -> dict[str, str]:
    """Name and present value of each setting that is not as configured."""
    resource = ConfigResource(ResourceType.TOPIC, spec.name)
    (entries,) = _done(admin.describe_configs([resource])).values()
    # A broker that does not report a setting does not know it (Redpanda: min.insync.replicas).
    return {
        name: str(entries[name].value)
        for name, wanted in spec.config.items()
        if name in entries and entries[name].value != wanted
    }


def _lag(offsets: Mapping[int, int], marks: Mapping[int, tuple[int, int]]) -> Lag:
    lag = {partition: max(0, high - max(low, offsets.get(partition, low))) for partition, (low, high) in marks.items()}
    return Lag(sum(lag.values()), lag)


def _watermarks(consumer: Consumer) -> dict[int, tuple[int, int]]:
    marks = {}
    for number in sorted(_existing(consumer)):
        low, high = ends(consumer, TopicPartition(TOPIC, number))
        marks[number] = (min(low, high), high)
    return marks


def _settled(ask: Callable[[], _T]) -> _T:
    """The answer of a group's coordinator or a partition's leader, asked again while the brokers settle who that is."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        try:
            return ask()
        except KafkaException as error:
            if error.args[0].name() not in UNSETTLED or time.monotonic() >= deadline:
                raise
        time.sleep(0.2)


def _each_good(places: list[TopicPartition] | None) -> list[TopicPartition]:
    """Answers by partition; an error in one of them is raised like one of the whole request."""
    for place in places or []:
        if place.error is not None:
            raise KafkaException(place.error)
    return places or []


def _committed(consumer: Consumer, partitions: list[int]) -> dict[int, int]:
    asked = [TopicPartition(TOPIC, number) for number in partitions]
    places = _settled(lambda: _each_good(consumer.committed(asked, timeout=TIMEOUT_SECONDS)))
    return {place.partition: place.offset for place in places if place.offset >= 0}
