"""The watcher: reads what Kafka Connect reads, strictly, and notes what is no reading.

A plain consumer outside any group. Its place is stored in PostgreSQL with what it found, in one transaction. Everything it does may be
done twice, so it may be killed at any instruction.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from metrics_pipeline import kafka, postgres, topic_log
from metrics_pipeline.copy_sink.batch import BatchDecoder
from metrics_pipeline.errors import PipelineError, ServiceError
from metrics_pipeline.settings import DEAD_LETTER_TOPIC, TOPIC, Settings
from metrics_pipeline.watcher.coercion import CoercedRow, coerced_row
from metrics_pipeline.watcher.dead_letters import Reject, reject_of
from metrics_pipeline.watcher.mending import Mender
from metrics_pipeline.watcher.progress import SinkProgress
from metrics_pipeline.watcher.readings import consumer_config

SESSION: Final = "metrics-pipeline watcher"
"""What `pg_stat_activity` shows, and `status` looks for."""
AT_ONCE: Final = 5000
"""Records decoded in one piece, and let go."""
AT_ONCE_BYTES: Final = 32 << 20
"""Large ones are fewer at a time."""
WAIT_SECONDS: Final = 0.5
"""How long they are waited for, and how soon a signal is seen."""
TICK_SECONDS: Final = 2.0
"""Between two looks at the sink's offsets and at the rows that are due."""
PLACE_SECONDS: Final = 1.0
"""Between two notes of how far it is, when there was nothing to note but that it is further."""
SIGN_SECONDS: Final = 10.0
"""Between two signs of life, when there was nothing to read."""
TOPICS_SECONDS: Final = 20.0
"""Between two looks for new partitions, and for the dead letter topic, which Connect makes when it needs it."""
STANDBY_SECONDS: Final = 5.0
RETRY_SECONDS: Final = 2.0
REQUEST_SECONDS: Final = 2.0
"""Bound for a request to the broker: a signal waits for it."""
QUIET_SECONDS: Final = 30.0
"""Without a record, after which nothing more is expected before an end that was known."""
KEPT_SECONDS: Final = 86_400.0
"""How long settled records are remembered, in case the sink goes back."""
END_SECONDS: Final = 1.5
"""After a signal. Whatever is under way is done again by the next process."""

log = logging.getLogger(__name__)

Place = tuple[str, int]


class Watcher:
    """Watches until `stop`.

    Args:
        settings: where everything is.
        alive: touched about every second while it gets on, for health checks.
    """

    def __init__(self, settings: Settings, alive: Path | None = None) -> None:
        self._settings = settings
        self._alive = alive
        self._stop = threading.Event()
        self._progress = SinkProgress()
        self._mender = Mender(settings, self._progress)
        self._decoder = BatchDecoder()
        self._said = ""
        self._places: dict[Place, int] = {}
        self._passed: dict[int, int] = {}
        self._log = ""

    def stop(self) -> None:
        """Let `run` return; the process ends soon in any case."""
        self._stop.set()
        timer = threading.Timer(END_SECONDS, os._exit, [0])
        timer.daemon = True
        timer.start()

    def run(self) -> None:
        """Watch until `stop`, whatever is away meanwhile."""
        # Behind the sink and PostgreSQL, when all want the same core.
        os.nice(10)
        if not self._settings.sink_watch:
            self._say("SINK_WATCH is off: standing by")
        while not self._stop.is_set():
            self._beat()
            if not self._settings.sink_watch:
                self._stop.wait(STANDBY_SECONDS)
                continue
            try:
                with closing(self._connect()) as connection:
                    self._await_tables(connection)
            except (PipelineError, KafkaException, psycopg.Error) as error:
                self._say(f"trying again: {str(error).strip()}")
            self._stop.wait(RETRY_SECONDS)

    def _connect(self) -> postgres.Connection:
        # Nobody waits long for it: neither the sink for a lock, nor a signal for a statement.
        return postgres.connect(
            self._settings,
            "metrics_writer",
            autocommit=True,
            connect_timeout=5,
            application_name=SESSION,
            options="-c lock_timeout=5s -c statement_timeout=60s",
        )

    def _await_tables(self, connection: postgres.Connection) -> None:
        """Watch once there are the tables. It is connected meanwhile: that is how it is known to be up."""
        while not self._stop.is_set():
            try:
                self._session(connection)
            except psycopg.errors.UndefinedTable:
                self._say("waiting for the tables: run the job `provision`", logging.INFO)
                self._beat()
                self._stop.wait(RETRY_SECONDS)

    def _session(self, connection: postgres.Connection) -> None:
        """Everything that one connection to PostgreSQL lasts for."""
        self._log = topic_log.present(connection)
        values = {"topic": TOPIC, "log_id": self._log}
        rows = connection.execute(postgres.query("watcher_places"), values).fetchall()
        self._places = {(row[0], row[1]): row[2] for row in rows}
        self._passed = {row[1]: row[3] for row in rows if row[0] == TOPIC and row[3] is not None}
        while not self._stop.is_set():
            if self._active(connection)[0] == "connect":
                self._read(connection, None)
            else:
                self._stand_by(connection)

    def _stand_by(self, connection: postgres.Connection) -> None:
        """While the COPY sink is active: finish what Connect may have stored, then follow that sink's offsets."""
        with closing(Consumer(consumer_config(self._settings))) as consumer:
            partitions = self._partitions(consumer)
            marks = {
                number: kafka.ends(consumer, TopicPartition(TOPIC, number))
                for topic, number in partitions
                if topic == TOPIC
            }
        self._read(connection, {number: high for number, (low, high) in marks.items() if low < high})
        # From here on that sink has rejected what is to be rejected.
        self._say("the COPY sink stores the readings: standing by", logging.INFO)
        while not self._stop.is_set():
            self._beat()
            active, offsets = self._active(connection)
            if active == "connect":
                return
            self._look(connection, offsets)
            self._places |= {
                (TOPIC, number): max(offset, self._places.get((TOPIC, number), 0)) for number, offset in offsets.items()
            }
            self._advance(connection, {})
            self._stop.wait(STANDBY_SECONDS)

    def _read(self, connection: postgres.Connection, ends: dict[int, int] | None) -> None:
        """Read and note; with `ends` up to these, without as long as Kafka Connect is the active sink."""
        consumer = Consumer(
            consumer_config(self._settings)
            | {
                # Few large answers instead of many small ones: nobody waits for a reject as for a reading.
                "fetch.min.bytes": 1 << 20,
                "fetch.wait.max.ms": 1000,
                "fetch.message.max.bytes": 1 << 20,
                "queued.min.messages": 20_000,
                "enable.partition.eof": True,
            }
        )
        with closing(consumer):
            assigned: set[Place] = set()
            topics = tick = noted = 0.0
            at_once, moved = AT_ONCE, False
            heard = time.monotonic()
            while not self._stop.is_set():
                self._beat()
                now = time.monotonic()
                if now >= topics:
                    assigned = self._assign(consumer, assigned)
                    topics = now + (TOPICS_SECONDS if assigned else RETRY_SECONDS)
                    connection.execute(postgres.query("watcher_forget"), {"seconds": KEPT_SECONDS})
                if now >= tick:
                    active, offsets = self._active(connection)
                    if active == "connect":
                        offsets = self._committed(consumer, assigned)
                    elif ends is None:
                        return
                    self._look(connection, offsets)
                    tick = time.monotonic() + TICK_SECONDS
                messages = consumer.consume(at_once, WAIT_SECONDS) if assigned else self._pause()
                found = self._examine(messages)
                if messages:
                    heard, moved, at_once = time.monotonic(), True, _at_once(messages)
                del messages
                if found or now - noted >= (PLACE_SECONDS if moved else SIGN_SECONDS):
                    self._note(connection, found, self._waiting(consumer, assigned))
                    noted, moved = now, False
                if ends is not None and (
                    all(self._places.get((TOPIC, number), 0) >= end for number, end in ends.items())
                    or now - heard > QUIET_SECONDS  # retention was faster
                ):
                    return

    def _active(self, connection: postgres.Connection) -> tuple[str, dict[int, int]]:
        """The active sink, and the COPY sink's offsets.

        Raises:
            ServiceError: the topic's name stands for another log than when the session began.
        """
        if (present := topic_log.present(connection)) != self._log:
            raise ServiceError(f"topic {TOPIC} is another one: log {present}, before {self._log or 'unknown'}")
        rows = connection.execute(postgres.query("watcher_sink"), {"topic": TOPIC}).fetchall()
        return rows[0][0] if rows else "connect", {row[1]: row[2] for row in rows if row[1] is not None}

    def _committed(self, consumer: Consumer, assigned: set[Place]) -> dict[int, int]:
        """How far the connector is; nothing when the broker does not tell."""
        asked = [TopicPartition(TOPIC, number) for topic, number in assigned if topic == TOPIC]
        with suppress(KafkaException):
            places = consumer.committed(asked, timeout=REQUEST_SECONDS) if asked else []
            return {place.partition: place.offset for place in places if place.error is None and place.offset >= 0}
        return {}

    def _look(self, connection: postgres.Connection, passed: dict[int, int]) -> None:
        """Look at the rows that are due, the sink being so far."""
        if not passed:
            return
        self._progress.note(datetime.now(UTC), passed)
        for number, offset in passed.items():
            if offset < self._passed.get(number, 0):
                connection.execute(
                    postgres.query("watcher_reopen"), {"topic": TOPIC, "partition": number, "offset": offset}
                )
        self._passed |= passed
        try:
            self._mender.look(connection, passed)
        except (PipelineError, psycopg.Error) as error:
            # A lock that is not to be had, or a broker that is slow, keeps no record from being noted.
            if connection.broken:
                raise
            self._say(f"rows that Kafka Connect made of bad records wait: {str(error).strip()}")

    def _partitions(self, consumer: Consumer) -> set[Place]:
        """The partitions that there are, of the topic and of the dead letters."""
        topics = consumer.list_topics(timeout=REQUEST_SECONDS).topics
        return {
            (name, number)
            for name in (TOPIC, DEAD_LETTER_TOPIC)
            if name in topics and topics[name].error is None
            for number in topics[name].partitions
        }

    def _assign(self, consumer: Consumer, assigned: set[Place]) -> set[Place]:
        """Read all partitions, each from where it stands, and say which these are."""
        try:
            partitions = self._partitions(consumer)
        except KafkaException:  # the broker is away
            return assigned
        if not partitions:  # it has just begun: it may know them in a moment
            return assigned
        if new := partitions - assigned:
            consumer.incremental_assign(
                [TopicPartition(*place, self._places.get(place, OFFSET_BEGINNING)) for place in sorted(new)]
            )
        if gone := assigned - partitions:
            consumer.incremental_unassign([TopicPartition(*place) for place in sorted(gone)])
            for place in gone:
                self._places.pop(place, None)
        self._said = ""
        return partitions

    def _pause(self) -> list[Any]:
        self._say("waiting for the topic: run the job `provision`", logging.INFO)
        self._stop.wait(WAIT_SECONDS)
        return []

    def _examine(self, consumed: Sequence[Any]) -> list[tuple[Reject, CoercedRow | None]]:
        """The bad ones of some messages; moves the places."""
        messages: list[Any] = []
        found: list[tuple[Reject, CoercedRow | None]] = []
        for message in consumed:
            error = message.error()
            if error is not None:
                if error.name() == "_PARTITION_EOF":  # also when retention took what was left
                    place = message.topic(), message.partition()
                    self._places[place] = max(message.offset(), self._places.get(place, 0))
                else:
                    log.debug("%s", error)
                continue
            if message.topic() == TOPIC:
                messages.append(message)
            else:
                self._places[DEAD_LETTER_TOPIC, message.partition()] = message.offset() + 1
                if (reject := reject_of(message)) is not None:
                    found.append((reject, None))  # Connect has stored nothing of it
        if messages:
            for bad in self._decoder.decode(messages, {}).rejects:
                message = messages[bad.at]
                key, value = message.key(), message.value()
                reject = Reject(TOPIC, message.partition(), message.offset(), bad.reason, bad.detail, key, value)
                found.append((reject, coerced_row(key, value)))
            for message in messages:
                self._places[TOPIC, message.partition()] = message.offset() + 1
        return found

    def _waiting(self, consumer: Consumer, assigned: set[Place]) -> dict[Place, int]:
        """How many records there are behind each place, as far as the client knows."""
        waiting = {}
        for place in assigned:
            with suppress(KafkaException):
                _, high = consumer.get_watermark_offsets(TopicPartition(*place), cached=True)
                waiting[place] = max(0, high - self._places.get(place, 0))
        return waiting

    def _note(
        self,
        connection: postgres.Connection,
        found: Sequence[tuple[Reject, CoercedRow | None]],
        waiting: dict[Place, int],
    ) -> None:
        """What was found and how far it is, in one transaction."""
        with connection.transaction(), connection.cursor() as cursor:
            if found:
                cursor.executemany(postgres.query("watcher_note"), [(self._log, *reject) for reject, _ in found])
            if coerced := [(reject, row) for reject, row in found if row is not None]:
                cursor.executemany(
                    postgres.query("watcher_note_coerced"),
                    [
                        (*reject[:3], row.device_id, row.published_at, row.metric_name, row.value, row.tags)
                        for reject, row in coerced
                    ],
                )
            self._advance(connection, waiting)

    def _advance(self, connection: postgres.Connection, waiting: dict[Place, int]) -> None:
        with connection.cursor() as cursor:
            cursor.executemany(
                postgres.query("watcher_advance"),
                [
                    (
                        *place,
                        self._log,
                        offset,
                        waiting.get(place, 0),
                        self._passed.get(place[1]) if place[0] == TOPIC else None,
                    )
                    for place, offset in sorted(self._places.items())
                ],
            )

    def _beat(self) -> None:
        if self._alive is not None:
            self._alive.touch()

    def _say(self, text: str, level: int = logging.WARNING) -> None:
        """Once, until something else is said."""
        if text != self._said:
            self._said = text
            log.log(level, text)


def _at_once(messages: Sequence[Any]) -> int:
    """How many messages to take at a time, if the next ones are as large as some of these."""
    largest = max(len(message.value() or b"") for message in messages[:: max(1, len(messages) // 50)])
    return max(10, min(AT_ONCE, AT_ONCE_BYTES // max(1, largest)))
