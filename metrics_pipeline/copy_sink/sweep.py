"""What a growth moved between old partitions, stored once more: the newest record of each key is the last one that is stored.

A topic that grew to a number of partitions that is no multiple has keys that moved from one old partition to another. What both
hold of such a key is stored in any order by a sink that lags. Once it has passed all that is older, the records in the
partition that the key has come to are stored again, in their order and up to where the sink is; those in the partition that
it has left are older, and are passed over. Keys that somebody partitions by another hash are left alone: they do not move by this rule.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import psycopg

from metrics_pipeline import postgres, topic_log
from metrics_pipeline.copy_sink.store import RowWriter, set_back
from metrics_pipeline.copy_sink.stretch import batches
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.kafka import TopicLog
from metrics_pipeline.partitioner import homes
from metrics_pipeline.settings import TOPIC, Settings
from metrics_pipeline.topic_log import Growth

log = logging.getLogger(__name__)

PORTION: Final = 50_000
"""Offsets that are looked through in one transaction."""


def has_come(growth: Growth, messages: list[Any]) -> list[Any]:
    """Those of some messages that stand where their key is since a growth, and was not before."""
    keyed = [message for message in messages if message.key() is not None]
    keys = [message.key() for message in keyed]
    before, after = homes(keys, growth.before), homes(keys, growth.after)
    return [
        message
        for message, former, present in zip(keyed, before, after, strict=True)
        if message.partition() == present != former
    ]


def sweep(
    settings: Settings,
    growth: Growth,
    of: TopicLog,
    low: dict[int, int],
    end: Callable[[postgres.Connection, int], int | None],
    going_on: Callable[[], object] = lambda: None,
) -> bool:
    """Store what has come to old partitions once more. To do it again changes nothing.

    Args:
        settings: where PostgreSQL and the broker are.
        growth: that is to be settled; the sink has passed all that is older.
        of: the log.
        low: first offset of each partition that is retained.
        end: where the sink is in a partition, and stays until the session's transaction ends; None: it is not the sink's turn.
        going_on: called after each portion; what it raises ends it.

    Returns:
        False when it was not the sink's turn.

    Raises:
        psycopg.Error: PostgreSQL cannot be used.
        ServiceError: PostgreSQL or the broker cannot be used.
    """
    writer = RowWriter()
    with postgres.connect(settings, "metrics_writer", application_name="metrics-pipeline sweep") as session:
        for number, begin in growth.mixed.items():
            at = max(begin, low.get(number, 0))
            while (behind := end(session, number)) is not None and at < behind:
                session.rollback()  # the sink goes on while this is read
                stop = min(behind, at + PORTION)
                come = list(batches(settings, {number: (at, stop)}, of.id, keep=partial(has_come, growth)))
                if end(session, number) is None:
                    return False
                for batch in come:
                    writer.write(session, batch, upsert=True)
                session.commit()
                at = stop
                going_on()
            session.rollback()
            if behind is None:
                return False
    return True


class Sweeper:
    """Settles growths that need a sweep for the COPY sink, beside the workers. One of all workers does it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._thread: threading.Thread | None = None

    def begin(self, growth: Growth, of: TopicLog, low: dict[int, int]) -> None:
        """Begin with it, unless this is under way, here or in another worker."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._try, args=[growth, of, low], name="sweep", daemon=True)
            self._thread.start()

    def _try(self, growth: Growth, of: TopicLog, low: dict[int, int]) -> None:
        try:
            self.settle(growth, of, low)
        except (psycopg.Error, PipelineError) as error:
            log.info("%s: what has moved is stored again later: %s", growth, error)

    def settle(self, growth: Growth, of: TopicLog, low: dict[int, int]) -> bool:
        """Store again what has moved between old partitions, let the new ones be read again, and note it; whether it was done.

        Raises:
            psycopg.Error: PostgreSQL cannot be used.
            ServiceError: PostgreSQL or the broker cannot be used.
        """
        with postgres.connect(self._settings, "metrics_writer", application_name="metrics-pipeline growth") as guard:
            # Held to the end: nobody else sweeps this growth meanwhile, and the lock goes with this process.
            held = guard.execute(postgres.query("topic_growth_hold"), {"growth_id": growth.id}).fetchone()
            if held is None:
                return False

            def end(session: postgres.Connection, number: int) -> int | None:
                values = {"topic": TOPIC, "log_id": of.id, "partition": number}
                row = session.execute(postgres.query("sink_stay"), values).fetchone()
                return int(row[0]) if row else None

            done = (
                sweep(self._settings, growth, of, low, end, lambda: guard.execute("SELECT 1"))
                and topic_log.settle(guard, growth)
                and set_back(guard, growth, of, low)
            )
            (guard.commit if done else guard.rollback)()
        if done:
            log.warning(
                "%s: what has moved is stored again, so that the newest value of each key is stored last", growth
            )
        return done
