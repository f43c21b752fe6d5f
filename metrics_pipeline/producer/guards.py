"""What holds a producer back: a consumer that lags too far behind, and a disk that is nearly full."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from confluent_kafka import KafkaException

from metrics_pipeline.errors import InstallError, ServiceError
from metrics_pipeline.kafka import TopicWatch
from metrics_pipeline.settings import TOPIC

LAG_SECONDS: Final = 3.0
"""Time between two questions for the lag."""

log = logging.getLogger(__name__)


def check_disk(folder: Path, limit_gb: float) -> None:
    """Refuse to go on when the disk is nearly full, while PostgreSQL and the broker can still end well.

    Args:
        folder: where the data lies; it need not exist yet.
        limit_gb: GiB that have to stay free.

    Raises:
        InstallError: less is free.
    """
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free / 2**30
    if free < limit_gb:
        raise InstallError(
            f"{free:.1f} GiB are free in {there}, below DISK_FREE_LIMIT_GB={limit_gb:g}: the producer stops. "
            "Free some space (`metrics-pipeline reset` removes all data), or lower DISK_FREE_LIMIT_GB"
        )


class LogGuard:
    """Ends a run whose topic is another one than when it began: what it was promised is of one log.

    Args:
        watch: looks which log the topic's name stands for.
    """

    def __init__(self, watch: TopicWatch) -> None:
        self._watch = watch
        self.log_id = ""
        """Of the log in which the run publishes; nothing while that is not known."""

    def begin(self) -> None:
        """Learn it, if the broker tells now."""
        try:
            self.log_id = self._watch.ask().id
        except (KafkaException, ServiceError) as error:
            log.debug("the topic's log is not known yet: %s", error)

    def check(self) -> None:
        """Look without waiting.

        Raises:
            ServiceError: it is another one by now.
        """
        if (seen := self._watch.look()) is None or seen.id == self.log_id:
            return
        if self.log_id:
            raise ServiceError(
                f"topic {TOPIC} is another one than when this run began: log {seen.id}, before {self.log_id}. What was "
                "acknowledged before stood in the former one; begin a new run"
            )
        self.log_id = seen.id


class LagWatch:
    """Asks for the consumer lag in a thread of its own, because the answer may take seconds."""

    def __init__(self, lag: Callable[[], int], limit: int) -> None:
        """Prepare.

        Args:
            lag: records between the end of the topic and what the sink committed; may raise.
            limit: records from which the producer pauses.
        """
        self._lag = lag
        self._limit = limit
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lag-watch", daemon=True)
        self.paused: str | None = None
        """Why to pause, or None."""

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; an answer that is still due is not waited for."""
        self._stop.set()
        self._thread.join(0.5)

    def _run(self) -> None:
        while True:
            try:
                behind = self._lag()
            except Exception as error:  # whatever it is, the last answer stands
                log.debug("consumer lag is not known: %s", error)
            else:
                self.paused = (
                    f"consumer lag is {behind:,} records, PRODUCER_MAX_LAG is {self._limit:,}: waiting for the sink"
                    if behind >= self._limit
                    else None
                )
            if self._stop.wait(LAG_SECONDS):
                return
