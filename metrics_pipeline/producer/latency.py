"""End-to-end latency: from the broker's acknowledgement of a sampled key to the first SELECT that sees it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import psycopg

from metrics_pipeline import postgres
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.settings import Settings

POLL_SECONDS: Final = 0.05
"""Resolution of a measurement."""

WINDOW_SECONDS: Final = 60.0
WAITING_COUNTS_AFTER: Final = 5.0
"""Age from which a key that is still not visible counts with its age: or a sink that stands still would look fast."""

MOST_WAITING: Final = 64
RETRY_SECONDS: Final = 2.0

_SESSION: Final = (
    # The table grows by orders of magnitude while this session lives: never scan it, whatever the statistics say.
    "-c plan_cache_mode=force_custom_plan -c enable_seqscan=off -c enable_hashjoin=off -c enable_mergejoin=off"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Latency:
    """Quantiles over the last minute, in seconds; None while nothing was measured."""

    p50: float | None
    p99: float | None


class _Key(msgspec.Struct):
    device_id: str
    published_at: str
    metric_name: int


_key_of: Final = msgspec.json.Decoder(_Key).decode


class LatencyProbe:
    """A thread that watches sampled keys until they can be read. PostgreSQL's errors only cost samples."""

    def __init__(
        self,
        settings: Settings,
        observe: Callable[[float], None] = lambda _: None,
        *,
        connect: Callable[..., postgres.Connection] = postgres.connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare.

        Args:
            settings: where PostgreSQL is.
            observe: gets each latency, in seconds.
            connect: how to connect; replaced by tests.
            clock: that of the acknowledgements, in seconds.
        """
        self._settings = settings
        self._observe = observe
        self._connect = connect
        self._clock = clock
        self._connection: postgres.Connection | None = None
        self._offered: deque[tuple[bytes, float]] = deque()
        self._waiting: list[tuple[_Key, float]] = []
        self._measured: deque[tuple[float, float]] = deque()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="latency-probe", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a PostgreSQL that hangs is not waited for."""
        self._stop.set()
        self._thread.join(2)

    def offer(self, key: bytes, acknowledged_at: float) -> None:
        """Watch a key from now on, unless many are watched already.

        Args:
            key: as it was published.
            acknowledged_at: monotonic time of the broker's acknowledgement.
        """
        if len(self._offered) + len(self._waiting) < MOST_WAITING:
            self._offered.append((key, acknowledged_at))

    def latency(self) -> Latency:
        """The median and the 99th percentile over the last minute."""
        now = self._clock()
        with self._lock:
            while self._measured and self._measured[0][0] < now - WINDOW_SECONDS:
                self._measured.popleft()
            ages = [now - since for _, since in self._waiting if now - since > WAITING_COUNTS_AFTER]
            values = sorted([latency for _, latency in self._measured] + ages)
        if not values:
            return Latency(None, None)
        return Latency(values[(len(values) - 1) // 2], values[-(len(values) // 100) - 1])

    def look(self) -> float:
        """See once which of the keys can be read; the thread that was started does it again and again.

        Returns:
            Seconds until the next look.
        """
        with self._lock:
            while self._offered:
                key, since = self._offered.popleft()
                self._waiting.append((_key_of(key), since))
        if not self._waiting:
            return POLL_SECONDS
        try:
            visible = self._visible([key for key, _ in self._waiting])
        except (PipelineError, psycopg.Error) as error:
            log.debug("latency samples dropped: %s", error)
            self._disconnect()
            with self._lock:
                self._waiting.clear()
            return RETRY_SECONDS
        now = self._clock()
        with self._lock:
            seen = [now - since for place, (_, since) in enumerate(self._waiting) if place in visible]
            self._measured.extend((now, latency) for latency in seen)
            self._waiting = [waiting for place, waiting in enumerate(self._waiting) if place not in visible]
        for latency in seen:
            self._observe(latency)
        return POLL_SECONDS

    def _run(self) -> None:
        pause = POLL_SECONDS
        while not self._stop.wait(pause):
            pause = self.look()
        self._disconnect()

    def _visible(self, keys: list[_Key]) -> set[int]:
        if self._connection is None:
            self._connection = self._connect(
                self._settings,
                "metrics_producer",
                autocommit=True,
                connect_timeout=5,
                application_name="producer latency probe",
                prepare_threshold=None,
                options=_SESSION,
            )
        arrays: dict[str, Any] = {
            "devices": [key.device_id for key in keys],
            "times": [key.published_at for key in keys],
            "metrics": [key.metric_name for key in keys],
        }
        return {row[0] - 1 for row in self._connection.execute(postgres.query("visible_keys"), arrays)}

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
