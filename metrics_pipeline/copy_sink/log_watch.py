"""Whether the topic's name still stands for the log that a worker reads, and whether its partitions grew."""

from __future__ import annotations

import logging

import psycopg

from metrics_pipeline.copy_sink.store import Store
from metrics_pipeline.copy_sink.sweep import Sweeper
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.kafka import TopicLog, TopicWatch
from metrics_pipeline.settings import TOPIC, Settings

log = logging.getLogger(__name__)


class AnotherLogError(PipelineError):
    """The topic's name stands for another log than this consumer began with.

    It needs another consumer: what one knows of partitions, such as the epochs of their leaders, is of the former log.
    """


class LogWatch:
    """What a worker knows of the topic's log.

    Args:
        settings: where the broker is.
        store: of the worker's reader; used between its own questions.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._store = store
        self._sweeper = Sweeper(settings)
        self._watch = TopicWatch.of(settings)
        self._log: TopicLog | None = None
        self._settled: int | None = None

    def begin(self) -> None:
        """With a new consumer."""
        self._log = None
        self._watch.look()

    def present(self) -> str:
        """The id of the log that the topic's name stands for, asked now; the database knows it, too.

        Raises:
            AnotherLogError: it is another one than at first.
            KafkaException: the broker does not answer.
            PipelineError: the topic does not exist, or PostgreSQL cannot be reached.
            psycopg.Error: PostgreSQL cannot be used.
        """
        self._note(seen := self._watch.ask())
        self._same(seen)
        self._log = seen
        # Before offsets are read: what is set back after this shows.
        self._settled = self._store.last_settled()
        return self._log.id

    def moved(self) -> bool:
        """Whether all places must be read again, because offsets were set back. Never waits for the broker.

        What fails is left to the next look.

        Raises:
            AnotherLogError: another log has the name.
        """
        if (seen := self._watch.look()) is None:
            return False
        try:
            self._note(seen)
            self._same(seen)
            self._log = self._log or seen
            if done := self._store.settle_growth(seen, self._sweeper.begin):
                log.warning("%s", done)
            settled = self._store.last_settled()
        except AnotherLogError:
            raise
        except (psycopg.Error, PipelineError) as error:
            log.info("the topic's log is looked at later: %s", error)
            return False
        return settled != self._settled

    def _same(self, seen: TopicLog) -> None:
        if self._log is not None and seen.id != self._log.id:
            raise AnotherLogError(f"topic {TOPIC} is log {seen.id} now, before {self._log.id}: it is consumed anew")

    def _note(self, seen: TopicLog) -> None:
        if news := self._store.note(seen):
            log.error("%s", news)
