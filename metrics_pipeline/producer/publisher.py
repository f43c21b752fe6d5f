"""The publish loop: rounds of messages into the Kafka client, a bounded number at once, every one of them accounted for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol

from confluent_kafka import KafkaError, KafkaException

from metrics_pipeline import kafka
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.producer.deliveries import Deliveries
from metrics_pipeline.settings import TOPIC, Settings

Message = tuple[bytes, bytes]
"""Key and value."""

START_SECONDS: Final = 15.0
"""How long to wait for the broker and the topic at the start."""

TICK_SECONDS: Final = 0.1
"""Longest wait without a look at `stop`."""

CATCH_UP_SECONDS: Final = 10.0
"""How far a throttled run may fall behind and still make up for it."""

PURGE_SECONDS: Final = 5.0
RATE_SECONDS: Final = 10.0
SAMPLE_SECONDS: Final = 0.25


class KafkaClient(Protocol):
    """What is used of `confluent_kafka.Producer`."""

    def produce_batch(self, topic: str, messages: list[dict[str, Any]], *, on_delivery: Any) -> int:
        """Queue messages; how many of them were taken."""

    def poll(self, timeout: float) -> int:
        """Make the callbacks that are due, or wait so many seconds for one."""

    def purge(self, in_queue: bool, in_flight: bool, blocking: bool) -> None:
        """Give up messages; each is then reported as failed."""

    def list_topics(self, *, timeout: float) -> Any:
        """The cluster's metadata."""

    def close(self) -> Any:
        """End the client."""


def producer_config(settings: Settings) -> dict[str, Any]:
    """What librdkafka is told for a producer of ours."""
    outstanding = settings.producer_queue_concurrency * settings.kafka_batch_size
    return kafka.client_config(settings) | {
        "acks": "all",
        "enable.idempotence": True,
        "max.in.flight.requests.per.connection": settings.kafka_max_in_flight,
        "compression.type": settings.producer_compression,
        # As Java clients do it: one key, one partition, no matter who writes it.
        "partitioner": "murmur2_random",
        # Long enough to fill a request, short beside the broker's answer.
        "linger.ms": 5,
        "delivery.timeout.ms": 120_000,
        # The bound is ours; librdkafka's must not be the first to bite.
        "queue.buffering.max.messages": max(100_000, 2 * outstanding),
    }


class Publisher:
    """Publishes what a source gives, until the source ends, the time is up or `stop` says so.

    Everything happens in the thread that calls `run`, which must not be the main one: an exception out of a signal
    handler could end a delivery report half-way. The attributes may be read from any thread.
    """

    def __init__(
        self,
        settings: Settings,
        source: Iterable[list[Message]],
        deliveries: Deliveries,
        make_client: Callable[[dict[str, Any]], KafkaClient],
        *,
        stop: Callable[[], bool],
        watch: Callable[[], None] = lambda: None,
        paused: Callable[[], bool] = lambda: False,
        round_seconds: float = 0.0,
        run_seconds: float = float("inf"),
        messages_per_second: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is connected before `run`.

        Args:
            settings: everything that can be set.
            source: lists of keys and values; an empty one means that it is too early to ask.
            deliveries: counts.
            make_client: makes the Kafka client out of its configuration.
            stop: whether to end.
            watch: called a few times a second; what it raises ends the run.
            paused: whether to publish nothing for now.
            round_seconds: from the begin of one list to the begin of the next.
            run_seconds: when to end.
            messages_per_second: bound; the lists of the source are cut into smaller ones to keep to it.
            clock: monotonic, in seconds; the client's `poll` is what lets time pass.
        """
        self.state = "starting"
        """starting, running or stopping."""
        self._settings = settings
        self._source: Iterator[list[Message]] = iter(source)
        self._deliveries = deliveries
        self._make_client = make_client
        self._stop = stop
        self._watch = watch
        self._paused = paused
        self._round_seconds = round_seconds
        self._messages_per_second = messages_per_second
        self._clock = clock
        self._run_seconds = run_seconds
        self._run_until = float("inf")
        self._begun = self._owed_since = self._acknowledged_at = self._clock()
        self._flush_until: float | None = None
        self._acknowledged = 0
        self._counted: deque[tuple[float, int]] = deque()
        self._next_look = 0.0
        self._fatal: KafkaError | None = None
        self._client_error = "no answer"

    def stalled_seconds(self) -> float:
        """How long the broker has been owing an answer; 0 when it owes none."""
        if self.state == "starting":
            return self._clock() - self._begun
        if self._deliveries.in_flight > 0:
            return self._clock() - max(self._owed_since, self._acknowledged_at)
        return 0.0

    def acknowledged_per_second(self) -> float:
        """Over the last ten seconds."""
        since, before = self._counted[0] if self._counted else (self._begun, 0)
        return (self._deliveries.acknowledged - before) / max(self._clock() - since, 0.001)

    def run(self) -> None:
        """Publish, then wait for the outstanding acknowledgements within PRODUCER_FLUSH_SECONDS.

        Raises:
            ServiceError: the broker does not answer, has no such topic, or takes no more messages.
            PipelineError: what `watch` or the source raised.
        """
        self._begun = self._owed_since = self._acknowledged_at = self._clock()
        self._run_until = self._begun + self._run_seconds
        self._client = self._make_client(producer_config(self._settings) | {"error_cb": self._on_error})
        try:
            self._await_topic()
            self.state = "running"
            self._publish()
        finally:
            self.state = "stopping"
            self._drain()
            if close := getattr(self._source, "close", None):
                close()

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._fatal = error
        if "failed: " in error.str():
            self._client_error = error.str().split("failed: ")[-1].split(" (after")[0]
        self._deliveries.connection_was_lost |= error.name() in kafka.UNREACHABLE

    def _await_topic(self) -> None:
        """Wait until the topic can be written.

        Raises:
            ServiceError: the broker does not answer, or there is no such topic.
        """
        servers = self._settings.bootstrap_servers
        deadline = self._clock() + START_SECONDS
        while not self._stop():
            self._client.poll(0)
            try:
                # All topics: naming one that does not exist makes some brokers create it.
                topic = self._client.list_topics(timeout=1.0).topics.get(TOPIC)
            except KafkaException:
                self._client.poll(0)  # hands over the reason
                problem = (
                    f"Kafka broker {servers} cannot be reached ({self._client_error}): "
                    "start it with `metrics-pipeline up`, or correct KAFKA_URL (or KAFKA_PORT)"
                )
            else:
                if topic is None or topic.error is not None:
                    raise ServiceError(
                        f"topic {TOPIC} does not exist on {servers}: "
                        "run `dagster job execute -m metrics_pipeline.definitions -j provision`"
                    )
                if topic.partitions and all(partition.leader >= 0 for partition in topic.partitions.values()):
                    return
                problem = f"topic {TOPIC} has partitions without a leader: see `metrics-pipeline logs broker`"
            if self._clock() > deadline:
                raise ServiceError(problem)
            self._client.poll(TICK_SECONDS)

    def _publish(self) -> None:
        due = self._clock()
        while not self._ending():
            if self._paused():
                due = self._clock()
                self._poll(TICK_SECONDS)
                continue
            wait = due - self._clock()
            if wait > 0:
                self._poll(min(wait, TICK_SECONDS))
                continue
            messages = next(self._source, None)
            if messages is None:
                return
            if not messages:
                self._poll(0.001)
                continue
            if self._messages_per_second:
                self._keep_to_rate(messages, self._messages_per_second)
            else:
                self._hand_over(messages)
            due = max(due + self._round_seconds, self._clock() - CATCH_UP_SECONDS)

    def _keep_to_rate(self, messages: list[Message], rate: float) -> None:
        """Hand over pieces of at most a tick's worth; without delay once the run ends."""
        size = max(1, int(rate * TICK_SECONDS))
        for start in range(0, len(messages), size):
            piece = messages[start : start + size]
            due = self._clock() + len(piece) / rate
            self._hand_over(piece)
            while (wait := due - self._clock()) > 0 and not self._ending():
                self._poll(min(wait, TICK_SECONDS))

    def _ending(self) -> bool:
        """Whether to take no more from the source; the first time, the time for flushing begins."""
        if not self._stop() and self._clock() < self._run_until:
            return False
        if self._flush_until is None:
            self._flush_until = self._clock() + self._settings.producer_flush_seconds
        return True

    def _out_of_time(self) -> bool:
        return self._ending() and self._flush_until is not None and self._clock() > self._flush_until

    def _hand_over(self, messages: list[Message]) -> None:
        """Give messages to the Kafka client, batch by batch, never more at once than the bound.

        What was taken from the source is published even while the run ends, as long as there is time; what is left
        then counts as failed.
        """
        size = self._settings.kafka_batch_size
        bound = self._settings.producer_queue_concurrency * size
        deliveries = self._deliveries
        left = len(messages)
        try:
            for start in range(0, len(messages), size):
                batch: list[dict[str, Any]] = [
                    {"key": key, "value": value} for key, value in messages[start : start + size]
                ]
                while batch:
                    while deliveries.in_flight + len(batch) > bound:
                        if self._out_of_time():
                            return
                        self._poll(TICK_SECONDS)
                    if deliveries.in_flight == 0:
                        self._owed_since = self._clock()
                    accepted = self._client.produce_batch(TOPIC, batch, on_delivery=deliveries.report)
                    deliveries.handed_over += accepted
                    left -= accepted
                    if accepted == len(batch):
                        break
                    batch, refused = self._again(batch)
                    left -= refused
                    if batch:
                        if self._out_of_time():
                            return
                        self._poll(TICK_SECONDS)
                self._poll(0)
        finally:
            if left:
                deliveries.refuse(left)

    def _again(self, batch: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
        """Of a batch taken in part: the messages for which there was no room, and how many were refused for good.

        The client leaves an `_error` in each message that it did not take.
        """
        again, refused = [], 0
        for message in batch:
            error: KafkaError | None = message.pop("_error", None)
            if error is None:
                continue
            if error.code() == KafkaError._QUEUE_FULL:  # noqa: SLF001  # librdkafka's own codes have this prefix
                again.append(message)
            else:
                refused += 1
                self._deliveries.refuse(1, error)
        return again, refused

    def _poll(self, timeout: float) -> None:
        """Serve delivery reports, and look after everything else now and then.

        Raises:
            PipelineError: the run cannot go on.
        """
        self._client.poll(timeout)
        now = self._clock()
        acknowledged = self._deliveries.acknowledged
        if acknowledged != self._acknowledged:
            self._acknowledged, self._acknowledged_at = acknowledged, now
        if now < self._next_look:
            return
        self._next_look = now + SAMPLE_SECONDS
        self._deliveries.sample()
        self._counted.append((now, acknowledged))
        while self._counted[0][0] < now - RATE_SECONDS:
            self._counted.popleft()
        if self.state == "running":
            self._look()

    def _look(self) -> None:
        error = self._fatal if self._fatal is not None else self._deliveries.refusal
        if error is not None:
            raise ServiceError(
                f"the broker takes no more messages for topic {TOPIC} ({error.name()}: {error.str()}): "
                "see `metrics-pipeline status`, then start the producer again"
            )
        self._watch()

    def _drain(self) -> None:
        """Wait for the outstanding reports within the bound, give up the rest, and close the client."""
        until = self._flush_until or self._clock() + self._settings.producer_flush_seconds
        while self._deliveries.in_flight and self._clock() < until:
            self._poll(TICK_SECONDS)
        if self._deliveries.in_flight:
            # In confluent-kafka 2.16 `blocking` means its opposite; the reports are waited for here either way.
            self._client.purge(in_queue=True, in_flight=True, blocking=False)
            until = self._clock() + PURGE_SECONDS
            while self._deliveries.in_flight and self._clock() < until:
                self._poll(TICK_SECONDS)
        self._deliveries.abandon()
        # It flushes without a limit of its own.
        closing = threading.Thread(target=self._client.close, name="kafka-close", daemon=True)
        closing.start()
        closing.join(PURGE_SECONDS)
