"""Whether the topic's name still stands for the log that a worker reads, and whether its partitions grew."""

from __future__ import annotations

import logging

import psycopg

from metrics_pipeline.copy_sink.store import Store
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.kafka import TopicLog, TopicWatch
from metrics_pipeline.settings import Settings

log = logging.getLogger(__name__)


class LogWatch:
    """What a worker knows of the topic's log.

    Args:
        settings: where the broker is.
        store: of the worker's reader; used between its own questions.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._watch: TopicWatch | None = None
        self._log: TopicLog | None = None
        self._settled: int | None = None

    def present(self) -> str:
        """The id of the log that the topic's name stands for, asked now; the database knows it, too.

        Raises:
            KafkaException: the broker does not answer.
            PipelineError: the topic does not exist, or PostgreSQL cannot be reached.
            psycopg.Error: PostgreSQL cannot be used.
        """
        self._watch = self._watch or TopicWatch.of(self._settings)
        self._log = self._watch.ask()
        self._note(self._log)
        # Before offsets are read: what is set back after this shows.
        self._settled = self._store.last_settled()
        return self._log.id

    def moved(self) -> bool:
        """Whether all places must be read again: another log has the name, or offsets were set back. Never waits for the broker.

        What fails is left to the next look.
        """
        if self._watch is None or self._log is None or (seen := self._watch.look()) is None:
            return False
        try:
            self._note(seen)
            if seen.id == self._log.id and (done := self._store.settle_growth(seen)):
                log.warning("%s", done)
            settled = self._store.last_settled()
        except (psycopg.Error, PipelineError) as error:
            log.info("the topic's log is looked at later: %s", error)
            return False
        return seen.id != self._log.id or settled != self._settled

    def _note(self, seen: TopicLog) -> None:
        if news := self._store.note(seen):
            log.error("%s", news)
