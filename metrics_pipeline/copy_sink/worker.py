"""One worker: consumes its share of the partitions, decodes, and has a thread of its own write what was decoded.

Where a partition stands is known from the database alone. What this process remembers of it, its *place*, is an assumption
that the next transaction tests (compare-and-set); when it proves wrong, the place is forgotten and read again. Each place has an
epoch: a chunk consumed under a former epoch (before a rebalance, a fencing, a seek) is never written.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, Queue
from typing import Any, Final

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from metrics_pipeline import kafka
from metrics_pipeline.copy_sink.batch import Batch, BatchDecoder, Chunk, Part, column, runs_of
from metrics_pipeline.copy_sink.counts import WorkerReport
from metrics_pipeline.copy_sink.failpoint import Failpoints
from metrics_pipeline.copy_sink.log_watch import LogWatch
from metrics_pipeline.copy_sink.progress import Progress
from metrics_pipeline.copy_sink.store import FencedError, Offset, StandbyError, Store, Written, kind_of, reason_of
from metrics_pipeline.errors import PipelineError, ServiceError
from metrics_pipeline.settings import CONNECTOR_GROUP, COPY_GROUP, TOPIC, Settings

log = logging.getLogger(__name__)

CONSUMED_AT_ONCE: Final = 2000
POLL_SECONDS: Final = 0.05
BATCH_BYTES: Final = 16 << 20
"""Bytes of messages after which a batch is written, however few they are."""
BLOCKED_SECONDS: Final = 1.0
"""How long the reader waits for the writer before it pauses its partitions and only answers the group."""
DRAIN_SECONDS: Final = 20.0
"""How long a revocation or a stop waits for the batch that is being written."""
DRAIN_POLL_SECONDS: Final = 0.01
STANDBY_SECONDS: Final = 1.0
REST_SECONDS: Final = 2.0
"""How long the writer may have nothing to write before it asks PostgreSQL whether it is still its turn."""
STILL_SECONDS: Final = 5.0
"""How long a partition may rest with records waiting before it is sought again."""
LEAVE_SECONDS: Final = 8.0
"""How long a worker that ends waits until it has left the group."""
ANSWER_SECONDS: Final = 1.0
"""How long the broker may take to tell the end of a partition that rests."""
SETTLED_SECONDS: Final = 10.0
"""How long a worker without partitions must have gone on since it started over until the cause is taken to be gone."""
FIRST_DELAY: Final = 0.05
LONGEST_DELAY: Final = 5.0
TOO_MUCH: Final = (
    psycopg.errors.QueryCanceled,
    psycopg.errors.OutOfMemory,
    psycopg.errors.ConfigurationLimitExceeded,
    psycopg.errors.ProgramLimitExceeded,
)
"""What PostgreSQL says of a statement of which half may be done: a time limit, memory, a limit of temporary files."""
FEWEST: Final = 50
"""Readings that are not divided any more: it is not because of them."""
LARGEST: Final = 1 << 20
EVERYTHING: Final = 1 << 62
"""Readings that PostgreSQL takes in one statement, as long as it has not refused any."""
_NOWHERE: Final = 1 << 63
"""Beyond every offset."""
STAMPS: Final = 4
"""Messages of those consumed at once whose latency is observed."""


class _TooMuchError(Exception):
    """PostgreSQL did not do all of it at once; half of it, it may."""


@dataclass(slots=True)
class PartitionPlace:
    """Where a partition is consumed.

    Attributes:
        epoch: changes whenever the place is lost, so that chunks of before can be told.
        next: the offset behind the last message consumed; None until it has been read from the database.
        fresh: nothing has been consumed since it was sought, so that a gap before the first message is the topic's own.
        log: which log these offsets are of.
    """

    epoch: int
    next: int | None = None
    fresh: bool = True
    log: str = ""


def consumer_config(settings: Settings) -> dict[str, Any]:
    """What librdkafka is told for a worker."""
    return kafka.client_config(settings) | {
        "group.id": COPY_GROUP,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # The end of a partition is told, since an offset at its end may be no record but the mark of a transaction.
        "enable.partition.eof": True,
        # Never a silent jump: where to read is known from the database.
        "auto.offset.reset": "error",
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": 10_000,
        # How long a rebalance waits until every member has heard of it, twice over with cooperative assignment.
        "heartbeat.interval.ms": 100,
        "max.poll.interval.ms": 120_000,
        "fetch.min.bytes": 65_536,
        "fetch.wait.max.ms": 100,
        # Compressed bytes: what one answer unpacks to must not fill the memory.
        "fetch.message.max.bytes": 128 << 10,
        "queued.min.messages": 50_000,
        "queued.max.messages.kbytes": 16 << 10,
        # A broker that takes requests and does not answer is asked on a new connection sooner than after a minute.
        "socket.timeout.ms": 15_000,
        "socket.keepalive.enable": True,
        # After the queue was full, go on at once instead of a second later.
        "fetch.queue.backoff.ms": 20,
        # Partitions that are added, and a topic made anew, are seen as soon as this.
        "topic.metadata.refresh.interval.ms": 5000,
    }


class Partitions:
    """The partitions of this worker, shared by reader and writer."""

    def __init__(self) -> None:
        self._places: dict[int, PartitionPlace] = {}
        self._epoch = 0
        self._lock = threading.Lock()

    def gain(self, partitions: Iterable[int]) -> None:
        """These are ours from now on; where they stand is not known yet."""
        with self._lock:
            for number in partitions:
                self._epoch += 1
                self._places[number] = PartitionPlace(self._epoch)

    def lose(self, partitions: Iterable[int]) -> None:
        """These are ours no more: what was consumed of them and not written is forgotten."""
        with self._lock:
            for number in partitions:
                self._places.pop(number, None)

    def forget(self, partitions: Iterable[int]) -> None:
        """These stay ours, but where they stand must be read again."""
        self.gain([number for number in partitions if number in self._places])

    def unknown(self) -> list[int]:
        """Partitions whose place must be read from the database."""
        with self._lock:
            return sorted(number for number, place in self._places.items() if place.next is None)

    def all(self) -> list[int]:
        """Every partition of ours."""
        with self._lock:
            return sorted(self._places)

    def set(self, number: int, epoch: int, offset: int, *, log: str | None = None) -> bool:
        """Where a partition is consumed next, and in which log if it was just sought; False when it was lost or forgotten since that epoch."""
        with self._lock:
            place = self._places.get(number)
            if place is None or place.epoch != epoch:
                return False
            place.next, place.fresh = offset, log is not None
            if log is not None:
                place.log = log
            return True

    def get(self, number: int) -> PartitionPlace | None:
        """A copy of a place; None when the partition is not ours."""
        with self._lock:
            place = self._places.get(number)
            return replace(place) if place else None

    def stale(self, batch: Batch) -> list[int]:
        """Partitions of a batch that were lost or forgotten after it was consumed."""
        with self._lock:
            return [
                number
                for number, chunk in batch.chunks.items()
                if (place := self._places.get(number)) is None or place.epoch != chunk.epoch
            ]


class BatchReader:
    """Messages into batches, decoded as they come: what belongs to a place and where it moves it."""

    def __init__(self, places: Partitions) -> None:
        self._places = places
        self._decoder = BatchDecoder()
        self._parts: list[Part] = []
        self._chunks: dict[int, Chunk] = {}
        self._stamps: list[int] = []

    def add(self, messages: Sequence[Any]) -> None:
        """Decode what continues where the places stand, and move them; the messages themselves are not needed afterwards."""
        runs = runs_of(messages)
        first = {run.partition: run.offsets[0] for run in reversed(runs)}
        last = {run.partition: run.offsets[-1] for run in runs}
        behind = {run.partition: run.begin + len(run.offsets) - 1 for run in runs}
        moved: dict[int, Chunk] = {}
        begins: dict[int, int] = {}
        early = False
        for number, begin in first.items():
            place = self._places.get(number)
            if place is None or place.next is None:
                continue
            chunk = self._chunks.get(number)
            if chunk is not None and chunk.epoch != place.epoch:
                # Consumed before the place was lost: mixed with what comes after it, a gap between the two would go unnoticed.
                self.drop([number])
                chunk = None
            if chunk is None and begin > place.next and not place.fresh:
                # Records are missing in between. Read again from where we are: if it is the topic's own gap, it shows again.
                self._places.forget([number])
                continue
            if (stop := last[number] + 1) > place.next:
                start = chunk.start if chunk else place.next
                stamp = _stamp(messages[behind[number]])
                moved[number] = Chunk(number, place.epoch, start, stop, place.log, stamp)
                begins[number] = place.next
                early = early or begin < place.next
        if not moved:
            return
        if early or len(moved) < len(last):
            messages = [
                message for message in messages if message.offset() >= begins.get(message.partition(), _NOWHERE)
            ]
            runs = runs_of(messages)
        if not self._parts:
            self._decoder.forget()
        self._parts.append(self._decoder.part(messages, runs))
        for message in messages[:: max(1, len(messages) // STAMPS)]:
            kind, milliseconds = message.timestamp()
            if kind:
                self._stamps.append(milliseconds)
        for number, chunk in moved.items():
            self._chunks[number] = chunk
            self._places.set(number, chunk.epoch, chunk.stop)

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget what was added of these partitions and not yet taken."""
        gone = {number for number in partitions if self._chunks.pop(number, None) is not None}
        if gone:
            self._parts = [part.without(gone) for part in self._parts]

    def take(self) -> Batch | None:
        """Everything that was added since; None when there is nothing."""
        parts, chunks, stamps = self._parts, self._chunks, self._stamps
        self._parts, self._chunks, self._stamps = [], {}, []
        return replace(Batch.of(parts, chunks, self._decoder.tags), stamps=stamps) if chunks else None


class Writer:
    """Batches into the store, tried again until they are in it, or have turned out to be somebody else's."""

    def __init__(
        self,
        store: Store,
        places: Partitions,
        report: WorkerReport,
        *,
        sleep: Callable[[float], object] = time.sleep,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress or Progress()
        self._store = store
        self._places = places
        self._report = report
        self._sleep = sleep
        self._failing_since: float | None = None
        self._asked = time.monotonic()
        self._delay = FIRST_DELAY
        self._most = EVERYTHING

    def rest(self) -> None:
        """With nothing to write: now and then ask whether it is still our turn, which connects again if need be.

        The producer waits for a sink that is connected. One that connected again only to write would wait for the producer.

        Raises:
            StandbyError: another sink is the active one.
        """
        now = time.monotonic()
        if now - self._asked < REST_SECONDS:
            return
        self._asked = now
        self._progress.at("writer", "ask")
        try:
            active = self._store.active()
        except (psycopg.Error, PipelineError) as error:
            self._failed(error, "PostgreSQL is asked again")
            return
        finally:
            self._progress.at("writer", "wait")
        self._works()
        if not active:
            raise StandbyError

    def write(self, batch: Batch, give_up: Callable[[], bool] = lambda: False) -> Batch | None:
        """Write what is still ours of a batch.

        Args:
            batch: what was consumed.
            give_up: asked after each failure; the batch is then left to the next owner of its partitions.

        Returns:
            The part that is in the database now, or None.

        Raises:
            StandbyError: another sink is the active one.
        """
        waiting, chunks = self._portions(batch), dict[int, Chunk]()
        while waiting:
            portion = waiting.pop()
            try:
                written = self._write_portion(portion, give_up)
            except _TooMuchError:
                waiting += reversed(portion.halves() or (portion,))
                continue
            if written is None and give_up():
                break
            for number, chunk in written.chunks.items() if written is not None else ():
                chunks[number] = replace(chunk, start=chunks[number].start) if number in chunks else chunk
        return replace(batch, chunks=chunks) if chunks else None

    def _portions(self, batch: Batch) -> list[Batch]:
        """A batch in pieces of what PostgreSQL took lately in one statement, the first one last."""
        if len(batch.columns) <= self._most:
            return [batch]
        halves = batch.halves()
        return [portion for half in reversed(halves) for portion in self._portions(half)] if halves else [batch]

    def _write_portion(self, batch: Batch, give_up: Callable[[], bool]) -> Batch | None:
        """What is still ours of a batch, in one transaction.

        Raises:
            StandbyError: another sink is the active one.
            _TooMuchError: PostgreSQL may take half of it.
        """
        counts, begun = self._report.counts, time.monotonic()
        while True:
            if stale := self._places.stale(batch):
                batch = batch.without(stale)
            if not batch.chunks:
                return None
            try:
                written = self._store.write(batch)
            except FencedError as fenced:
                counts.fenced += 1
                log.warning("%s: where they stand is read again", fenced)
                self._places.forget(fenced.partitions)
                continue
            except (psycopg.Error, PipelineError) as error:
                self._failed(error, "a batch is tried again", begun)
                if give_up():
                    return None
                self._progress.at("writer", "retry")
                self._sleep(self._delay * random.uniform(0.5, 1.0))  # noqa: S311  # jitter is no secret
                self._delay = min(self._delay * 2, LONGEST_DELAY)
                if isinstance(error, TOO_MUCH) and len(batch.columns) > FEWEST and batch.halves() is not None:
                    # None of it is in the database: it was refused before COMMIT.
                    self._most = len(batch.columns) // 2
                    raise _TooMuchError from error
                if self._is_written(batch):
                    # Only the answer to COMMIT was lost; what it said of rejects is lost with it, so these are counted as decoded.
                    written = Written(len(batch.columns), "none", batch.rejects)
                else:
                    continue
            self._done(batch, written)
            return batch

    def _is_written(self, batch: Batch) -> bool:
        self._progress.at("writer", "ask")
        try:
            return self._store.written(batch)
        except (psycopg.Error, PipelineError) as error:
            self._failed(error, "a batch is tried again")
            return False

    def _failed(self, error: BaseException, what_next: str, since: float | None = None) -> None:
        report = self._report
        now = time.monotonic()
        self._failing_since = self._failing_since or since or now
        report.counts.retries[kind_of(error)] += 1
        report.state, report.reason = "waiting", reason_of(error)
        report.waiting_seconds = now - self._failing_since
        self._progress.fails("PostgreSQL", report.reason, self._failing_since)
        log.warning("%s: %s", what_next, report.reason)

    def _works(self) -> None:
        report = self._report
        self._failing_since, self._asked, self._delay = None, time.monotonic(), FIRST_DELAY
        report.state, report.reason, report.waiting_seconds = "running", "", 0.0
        self._progress.works("PostgreSQL")

    def _done(self, batch: Batch, written: Written) -> None:
        counts = self._report.counts
        self._works()
        if self._most < EVERYTHING and len(batch.columns) * 2 > self._most:
            self._most = self._most * 2 if self._most < LARGEST else EVERYTHING
        counts.rows += written.rows
        counts.tombstones += batch.tombstones
        counts.batches[written.path] += 1
        for reject in written.rejects:
            counts.rejected[reject.reason] += 1
        now = time.time()
        for milliseconds in batch.stamps:
            counts.observe(max(0.0, now - milliseconds / 1000))


class CopyWorker:
    """A consumer of the group with a reader's loop and a writer's thread.

    Args:
        settings: where everything is.
        name: of the worker, as `pg_stat_activity` and logs show it.
        new_store: makes what stores; a benchmark has one of its own.
    """

    def __init__(self, settings: Settings, name: str, new_store: Callable[..., Store] = Store) -> None:
        self._settings = settings
        self._new_store = new_store
        self._progress = Progress(time.monotonic)
        # Those of the reader and of the writer: who passes a place is who notes it.
        self._failpoints = Failpoints(at=self._at)
        self.report = WorkerReport()
        self._name = name
        self._store = new_store(settings, name, self._failpoints)
        # The reader's own session: it must not wait for a transaction of the writer.
        self._places_store = Store(settings, f"{name} places")
        self._log = LogWatch(settings, self._places_store)
        self._places = Partitions()
        self._writer = self._new_writer()
        self._queue: Queue[Batch] = Queue(maxsize=1)
        self._ends: dict[int, int] = {}
        self._heard = time.monotonic()
        self._still: dict[int, tuple[int, float]] = {}
        self._proven: dict[int, Offset] = {}
        self._written: deque[dict[int, Chunk]] = deque()
        self._standby = threading.Event()
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def stop(self) -> None:
        """Let `run` finish what is consumed and return."""
        self._stop.set()

    def current(self) -> WorkerReport:
        """The report as it is at this moment; may be asked by another thread."""
        report = replace(self.report, moment=self._progress.moment())
        if report.state not in ("running", "waiting"):
            return report
        if (trouble := self._progress.trouble()) is None:
            return replace(report, state="running", reason="", waiting_seconds=0.0)
        return replace(report, state="waiting", reason=trouble[0], waiting_seconds=trouble[1])

    def run(self) -> None:
        """Store until `stop`; survives PostgreSQL and the broker going away, and stands by while another sink is active."""
        delay = FIRST_DELAY
        while not self._stop.is_set():
            self._progress.at("reader", "offsets")
            try:
                if not self._places_store.active():
                    self._state("standing by", "another sink is active: `provision` with SINK=copy chooses this one")
                    self._stop.wait(STANDBY_SECONDS)
                    continue
                self._session()
                delay = FIRST_DELAY
                self._progress.works("worker")
            except StandbyError:
                continue
            except psycopg.errors.UndefinedTable:
                self._state("standing by", "no schema yet: run the `provision` job")
                self._stop.wait(STANDBY_SECONDS)
            except (psycopg.Error, PipelineError, KafkaException) as error:
                self._state("waiting", _reason(error))
                self.report.counts.retries[kind_of(error)] += 1
                self._progress.fails("worker", self.report.reason)
                self._progress.at("reader", "wait")
                log.warning("starting over: %s", self.report.reason)
                self._stop.wait(delay * random.uniform(0.5, 1.0))  # noqa: S311  # jitter is no secret
                delay = min(delay * 2, LONGEST_DELAY)
        self._state("stopped", "")
        self._store.close()
        self._places_store.close()

    def _session(self) -> None:
        """From joining the group to leaving it."""
        self._standby.clear()
        self._failure = None
        over = threading.Event()
        self._log.begin()
        consumer = Consumer(consumer_config(self._settings) | {"error_cb": self._on_error})
        writer = threading.Thread(target=self._write, args=(over,), name="writer", daemon=True)
        writer.start()
        try:
            consumer.subscribe([TOPIC], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)
            self._state("running", "")
            self._read(consumer)
            self._drain()
            self._commit(consumer)
        finally:
            self._progress.at("reader", "writer")
            over.set()
            self._places.lose(self._places.all())
            with suppress(Empty):
                self._queue.get_nowait()
                self._queue.task_done()
            writer.join(DRAIN_SECONDS)
            if writer.is_alive():
                # PostgreSQL does not answer it. It keeps what it has; two on one connection would mix up their transactions.
                self._store = self._new_store(self._settings, self._name, self._failpoints)
                self._writer = self._new_writer()
                self._queue = Queue(maxsize=1)
            self._leave(consumer)
            self.report.lag = {}
        if self._failure is not None:
            raise self._failure

    def _leave(self, consumer: Consumer) -> None:
        """Leave the group; one that is to end waits for a broker that does not answer for a few seconds only."""
        self._progress.at("reader", "leave")
        if not self._stop.is_set():
            consumer.close()
            return
        # While a request to join is under way, the client would wait for its answer, for minutes. The group notices by itself.
        leaving = threading.Thread(target=consumer.close, name="leaves", daemon=True)
        leaving.start()
        leaving.join(LEAVE_SECONDS)

    def _read(self, consumer: Consumer) -> None:
        reader = BatchReader(self._places)
        count, size, due, at_once = 0, 0, 0.0, CONSUMED_AT_ONCE
        looked, began = 0.0, time.monotonic()
        limit, linger = self._settings.sink_flush_rows, self._settings.sink_flush_ms / 1000
        while not self._stop.is_set():
            if self._standby.is_set() or self._failure is not None:
                return
            reader.drop(self._resolve(consumer))
            self._commit(consumer)
            now = time.monotonic()
            if now - looked > 1.0:
                looked = now
                self._look(consumer)
                self._progress.at("reader", "offsets")
                if self._log.moved():
                    self._places.forget(self._places.all())
                    continue
                if now - began > SETTLED_SECONDS or (self._heard > began and not self._places.unknown()):
                    self._progress.works("worker")
            self._progress.at("reader", "fetch")
            wait = POLL_SECONDS if not count else max(0.0, min(POLL_SECONDS, due - now))
            messages = consumer.consume(min(at_once, limit - count), wait)
            if messages:
                self._failpoints.reach("polled")
                if not count:
                    due = time.monotonic() + linger
                got = self._good(messages)
                self.report.counts.polled += len(got)
                largest = max((len(message.value() or b"") for message in got[:: max(1, len(got) // 50)]), default=1)
                added = sum(map(_size, got)) if largest > 10_000 else largest * len(got)
                # A burst of large messages must not fill the memory before it is looked at.
                at_once = max(10, min(CONSUMED_AT_ONCE, (BATCH_BYTES // 4) // max(1, added // max(1, len(got)))))
                if got:
                    reader.add(got)
                count += len(got)
                size += added
                del messages, got  # before the next ones come: to have many of them alive costs time
            if count and (count >= limit or size >= BATCH_BYTES or time.monotonic() >= due):
                count = size = 0
                if (batch := reader.take()) is not None:
                    self._failpoints.reach("decoded")
                    self._hand_over(consumer, batch)
                del batch  # the writer's now
        if (batch := reader.take()) is not None:
            self._hand_over(consumer, batch)

    def _hand_over(self, consumer: Consumer, batch: Batch) -> None:
        """Give a batch to the writer; while that takes long, go on answering the group."""
        self._progress.at("reader", "writer")
        if self._offer(batch, BLOCKED_SECONDS):
            return
        ours = [TopicPartition(TOPIC, number) for number in self._places.all()]
        consumer.pause(ours)
        try:
            deadline = time.monotonic() + DRAIN_SECONDS
            while True:
                # Nothing comes of paused partitions, but rebalances are answered.
                self._places.forget({message.partition() or 0 for message in self._good(consumer.consume(1, 0.1))})
                gone = self._standby.is_set() or self._failure is not None
                if self._offer(batch, 0.0) or gone or (self._stop.is_set() and time.monotonic() > deadline):
                    return
        finally:
            self._still.clear()
            resolved = set(self._places.all()) - set(self._places.unknown())
            consumer.resume([TopicPartition(TOPIC, number) for number in sorted(resolved)])

    def _offer(self, batch: Batch, seconds: float) -> bool:
        """Hand over once the batch before is written, so that there are never more than two: one decoded, one being written."""
        with self._queue.all_tasks_done:
            if not self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, seconds):
                return False
        self._queue.put_nowait(batch)
        return True

    def _good(self, messages: list[Any]) -> list[Any]:
        """Messages without the errors among them."""
        if not any(column(messages, "error")):
            if messages:
                self._hears()
            return messages
        good = []
        for message in messages:
            error = message.error()
            if error is None:
                good.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  # librdkafka's own code
                self._ends[message.partition()] = message.offset()
                self._hears()
            elif error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):  # noqa: SLF001  # librdkafka's own codes
                self._places.forget([message.partition()])
            elif error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise ServiceError(f"topic {TOPIC} does not exist: run the `provision` job")
            elif error.code() == KafkaError._MAX_POLL_EXCEEDED or error.fatal():  # noqa: SLF001  # librdkafka's own codes
                raise KafkaException(error)
            else:
                log.warning("consumer: %s", error.str())
        return good

    def _resolve(self, consumer: Consumer) -> set[int]:
        """Read where the partitions stand that are new or were forgotten, and consume from there; which were sought."""
        sought: set[int] = set()
        unknown = self._places.unknown()
        if not unknown:
            return sought
        # Before the offsets: what is consumed under the id of a log that is gone by then is read again as the new one's.
        self._progress.at("reader", "ends")
        log_id = self._log.present()
        commits: dict[int, int] | None = None
        for number in unknown:
            place = self._places.get(number)
            if place is None:
                continue
            target = TopicPartition(TOPIC, number)
            self._progress.at("reader", "ends")
            low, high = kafka.ends(consumer, target)
            self._hears()
            self._progress.at("reader", "offsets")
            at = self._places_store.offsets([number]).get(number)
            if at is None:
                # Never written: where the connector stands, else the earliest.
                commits = self._connector_commits(log_id) if commits is None else commits
                self._progress.at("reader", "offsets")
                first = commits.get(number, low)
                self._places_store.begin(number, Offset(log_id, first if low <= first <= high else low))
                continue  # the next round reads what is there now, ours or another worker's
            if at.log != log_id or not low <= at.next <= high:
                self._missing(number, at, log_id, low, high)
                continue
            if at.next > low and not self._proves(number, at):
                continue
            target.offset = at.next
            try:
                consumer.seek(target)
            except KafkaException as error:
                # Right after an assignment librdkafka may not be ready for it.
                log.debug("partition %s cannot be sought yet: %s", number, error)
                continue
            sought.add(number)
            self._ends.pop(number, None)
            if self._places.set(number, place.epoch, at.next, log=log_id):
                consumer.resume([TopicPartition(TOPIC, number)])
        return sought

    def _connector_commits(self, log_id: str) -> dict[int, int]:
        """What the connector committed, if it is of this log."""
        if self._places_store.connector_log() not in ("", log_id):
            return {}
        return kafka.committed(self._settings, CONNECTOR_GROUP)

    def _missing(self, number: int, at: Offset, log_id: str, low: int, high: int) -> None:
        """An offset that the log does not have, or that is of another log of the same name."""
        if not at.log:
            # From before there were such notes: of the log that is seen first.
            self._places_store.move(number, at, Offset(log_id, at.next))
        elif at.log != log_id:
            if self._places_store.move(number, at, Offset(log_id, low)):
                log.error(
                    "partition %s: offset %s is of log %s, and topic %s is now log %s: reading it from its beginning",
                    number,
                    at.next,
                    at.log,
                    TOPIC,
                    log_id,
                )
        elif at.next < low:
            lost = low - at.next
            if self._places_store.move(number, at, Offset(log_id, low)):
                self.report.counts.lost_to_retention += lost
                log.error(
                    "partition %s: %s records up to offset %s were deleted by retention before they were stored: "
                    "raise TOPIC_RETENTION_BYTES, or lower PRODUCER_MAX_LAG",
                    number,
                    lost,
                    low,
                )
        elif self._places_store.move(number, at, Offset(log_id, low)):
            log.error(
                "partition %s ends at offset %s, and %s were stored: the log was restored from before; "
                "reading it from its beginning",
                number,
                high,
                at.next,
            )

    def _proves(self, number: int, at: Offset) -> bool:
        """Whether the last record that was stored is still the log's; if not, the partition is read from its beginning."""
        if at.stamp is None or self._proven.get(number) == at:
            return True
        stands = {
            n: place
            for n, place in self._places_store.offsets(self._places.unknown()).items()
            if place.stamp is not None
        }
        asked = {n: place.next - 1 for n, place in stands.items() if self._proven.get(n) != place}
        self._progress.at("reader", "ends")
        found = kafka.stamps(self._settings, asked)
        self._progress.at("reader", "offsets")
        # A record that is not there any more (compacted, deleted) proves nothing, and is no reason to begin again.
        self._proven |= {n: stands[n] for n in asked if found.get(n, stands[n].stamp) == stands[n].stamp}
        if self._proven.get(number) == at:
            return True
        if stands.get(number) == at:
            low = kafka.watermarks(self._settings)[number][0]
            if self._places_store.move(number, at, Offset(at.log, low)):
                log.error(
                    "partition %s: offset %s was stored, and is another record now: the log was restored from before; "
                    "reading it from its beginning",
                    number,
                    at.next - 1,
                )
        return False

    def _look(self, consumer: Consumer) -> None:
        """How far the partitions are from their ends; one that rests although records wait is sought again."""
        lag, now = {}, time.monotonic()
        ours = self._places.all()
        self._progress.keep(set(ours))
        # A broker that is silent is to be known as the cause before the worker is taken for stuck.
        still = min(STILL_SECONDS, self._settings.sink_stall_seconds / 2)
        silent = not ours and now - self._heard > still and self._end(consumer, 0, self._heard) is None
        for number in ours:
            place = self._places.get(number)
            if place is None or place.next is None:
                self._progress.place(number, None, waiting=True)
                continue
            at, since = self._still.get(number, (-1, now))
            if at != place.next:
                at, since = place.next, now
            # What the client knows comes with what it fetches: of a partition that rests, the broker is asked. Once a time is
            # enough to learn that it does not answer.
            rests = now - since > still and not silent
            high: int | None = -1
            if rests:
                high = self._end(consumer, number, since)
                silent = high is None
            else:
                with suppress(KafkaException):
                    _, high = consumer.get_watermark_offsets(TopicPartition(TOPIC, number), cached=True)
            if high is None:
                lag[number] = self.report.lag.get(number, 0)
            else:
                lag[number] = max(0, high - max(place.next, self._ends.get(number, 0))) if high >= 0 else 0
            self._progress.place(number, place.next, waiting=lag.get(number, 0) > 0)
            if rests:
                since = now
                if lag.get(number):
                    log.warning(
                        "partition %s rests at offset %s with %s records waiting: sought again", number, at, lag[number]
                    )
                    self._places.forget([number])
            self._still[number] = at, since
        self.report.lag = lag

    def _end(self, consumer: Consumer, number: int, since: float) -> int | None:
        """Where a partition ends: the broker is asked; -1 when it does not know at present, None when it does not answer.

        Args:
            consumer: that asks.
            number: of the partition.
            since: when nothing more came.
        """
        self._progress.at("reader", "ends")
        high = -1
        try:
            _, high = consumer.get_watermark_offsets(TopicPartition(TOPIC, number), timeout=ANSWER_SECONDS)
        except KafkaException as error:
            if error.args[0].name() in kafka.UNREACHABLE:
                reason = f"Kafka broker {self._settings.bootstrap_servers} does not answer ({error.args[0].str()})"
                self._progress.fails("broker", reason, since)
                return None
        self._hears()
        return high

    def _hears(self) -> None:
        """The broker has answered."""
        self._heard = time.monotonic()
        self._progress.works("broker")

    def _commit(self, consumer: Consumer) -> None:
        """Tell the group what is in the database: for lag displays only, so that failures do not matter."""
        offsets: dict[int, int] = {}
        while self._written:
            for number, chunk in self._written.popleft().items():
                offsets[number] = chunk.stop
        ours = set(self._places.all())
        places = [TopicPartition(TOPIC, number, offset) for number, offset in offsets.items() if number in ours]
        if places:
            with suppress(KafkaException):
                consumer.commit(offsets=places, asynchronous=True)

    def _drain(self) -> None:
        """Wait until nothing is queued or being written any more."""
        self._progress.at("reader", "writer")
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline and not self._standby.is_set() and self._failure is None:
            if not self._queue.unfinished_tasks:
                return
            time.sleep(DRAIN_POLL_SECONDS)

    def _write(self, over: threading.Event) -> None:
        queue, writer = self._queue, self._writer
        while not over.is_set():
            self._progress.at("writer", "wait")
            try:
                batch = queue.get(timeout=0.1)
            except Empty:
                batch = None
            try:
                if batch is None:
                    writer.rest()
                elif (done := writer.write(batch, give_up=over.is_set)) is not None:
                    self._written.append(done.chunks)
            except StandbyError:
                self._standby.set()
                return
            except BaseException as error:
                log.exception("the writer failed")
                if not over.is_set():
                    self._failure = error
                return
            finally:
                self._progress.at("writer", "wait")
                taken = batch is not None
                del batch  # tens of MB, which must not outlive the wait for the next one
                if taken:
                    queue.task_done()

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        numbers = [partition.partition for partition in partitions]
        log.info("assigned: %s", numbers)
        # Paused until it is known where they stand. Not an offset of our own: one that is out of range would end the fetching.
        consumer.incremental_assign([TopicPartition(TOPIC, number, OFFSET_BEGINNING) for number in numbers])
        consumer.pause([TopicPartition(TOPIC, number) for number in numbers])
        self._places.gain(numbers)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        numbers = [partition.partition for partition in partitions]
        log.info("revoked: %s", numbers)
        # What is queued may still go in: the next owner then begins behind it.
        self._drain()
        self._commit(consumer)
        self._places.lose(numbers)
        self._progress.at("reader", "fetch")
        consumer.incremental_unassign(partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        numbers = [partition.partition for partition in partitions]
        log.warning("lost: %s", numbers)
        self._places.lose(numbers)
        consumer.incremental_unassign(partitions)

    def _on_error(self, error: KafkaError) -> None:
        log.info("broker: %s", error.str())
        if error.code() == KafkaError._ALL_BROKERS_DOWN:  # noqa: SLF001  # librdkafka's own code
            # Whatever is there when it comes back has to prove that it is what was read before.
            self._proven.clear()
            self._places.forget(self._places.all())

    def _new_writer(self) -> Writer:
        return Writer(self._store, self._places, self.report, sleep=self._sleep, progress=self._progress)

    def _at(self, step: str) -> None:
        self._progress.at("reader" if step == "decode" else "writer", step)

    def _sleep(self, seconds: float) -> None:
        if self._stop.is_set():
            time.sleep(min(seconds, 0.1))
        else:
            self._stop.wait(seconds)

    def _state(self, state: str, reason: str) -> None:
        if (state, reason) != (self.report.state, self.report.reason):
            log.info("%s%s", state, f": {reason}" if reason else "")
        self.report.state, self.report.reason = state, reason


def _stamp(message: Any) -> int | None:
    kind, milliseconds = message.timestamp()
    return milliseconds if kind else None


def _size(message: Any) -> int:
    return len(message.value() or b"") + len(message.key() or b"")


def _reason(error: BaseException) -> str:
    if isinstance(error, KafkaException):
        problem = error.args[0]
        return f"broker: {problem.str() if isinstance(problem, KafkaError) else problem}"
    return reason_of(error)
