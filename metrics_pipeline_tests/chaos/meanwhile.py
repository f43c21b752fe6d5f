"""What goes on beside a scenario about the table, in threads: readings of every time, long transactions, ticks of the summaries."""

from __future__ import annotations

import math
import random
import threading
import time
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Final, Self
from uuid import UUID, uuid4

from confluent_kafka import Producer

from metrics_pipeline import kafka, postgres, summaries
from metrics_pipeline.metric import Reading, encode
from metrics_pipeline.settings import TOPIC, Settings
from metrics_pipeline_tests.chaos.processes import VoidError
from metrics_pipeline_tests.chaos.stack import Place
from metrics_pipeline_tests.chaos.waits import OURS
from metrics_pipeline_tests.summary_pairs import PAIRS

TICK_SECONDS: Final = 10.0
"""Between two ticks."""
YEAR: Final = timedelta(days=365)
MINUTE: Final = timedelta(minutes=1)
KEPT: Final = ("device_metric_totals", "device_deltas")
"""Pairs of tables that a tick has to compare by itself, since both of them are its own."""


class Meanwhile:
    """Something that is done again and again until its block ends."""

    pause: float

    def __init__(self, name: str) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._problem: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(120)

    def check(self) -> None:
        """It goes on.

        Raises:
            VoidError: it does not.
        """
        if self._problem is not None:
            raise VoidError(f"{self._thread.name} ended: {self._problem!r}") from self._problem

    def _run(self) -> None:
        try:
            while not self._stop.wait(self.pause):
                self.once()
        except Exception as error:  # told by `check`, in the thread that can do something about it
            self._problem = error

    def once(self) -> None:
        """What is done."""
        raise NotImplementedError


class Stream(Meanwhile):
    """Publishes readings of the present, the same ones again with other values, late ones, and some ahead of their time.

    Attributes:
        counts: how many of which.
    """

    pause = 0.25

    def __init__(self, place: Place) -> None:
        super().__init__("stream")
        self._producer = Producer(kafka.client_config(place.settings) | {"linger.ms": 5})
        self._retained = place.settings.retention_age or MINUTE
        self._device, self._random = uuid4(), random.Random(11)
        self._times: list[datetime] = []
        self._failed: list[Any] = []
        self.counts = {"of the present": 0, "again": 0, "late": 0, "ahead": 0}

    def once(self) -> None:
        now = datetime.now(UTC)
        self._times.append(now)
        for metric in (0, 10, 20):
            self._publish("of the present", self._device, now, metric)
        again = self._random.choice(self._times)
        # Those of odd minutes stay as they were when they are gone: so one of these may be brought back.
        if again.minute % 2 == 0 or now - again < self._retained / 2:
            for metric in (0, 10):
                self._publish("again", self._device, again, metric)
        for _ in range(5):
            self._publish("late", uuid4(), now - self._far(), 30)
        self._publish("ahead", uuid4(), now + self._far(), 40)
        self._producer.poll(0)
        if self._failed:
            raise VoidError(f"a message was not acknowledged: {self._failed[0]}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._producer.flush(30)

    def _far(self) -> timedelta:
        """From a minute to a year, each order of magnitude as likely."""
        least, most = math.log(60), math.log(YEAR.total_seconds())
        return timedelta(seconds=math.exp(self._random.uniform(least, most)))

    def _publish(self, kind: str, device: UUID, at: datetime, metric: int) -> None:
        key, value = encode(Reading(device, at, metric, round(self._random.uniform(0, 99), 2), [kind]))
        self._producer.produce(TOPIC, key=key, value=value, on_delivery=self._delivered)
        self.counts[kind] += 1

    def _delivered(self, error: Any, _message: Any) -> None:
        if error is not None:
            self._failed.append(error)


class LongSession(Meanwhile):
    """Stores readings in transactions that stay open for as long as several ticks, and publishes them, too, when it commits.

    Attributes:
        ended: how many transactions ended how.
    """

    pause = 3.0

    def __init__(self, place: Place) -> None:
        super().__init__("long session")
        self._settings = place.settings
        self._producer = Producer(kafka.client_config(place.settings) | {"linger.ms": 0})
        self._random = random.Random(12)
        self.ended = {"committed": 0, "rolled back": 0, "of an old snapshot": 0}

    def once(self) -> None:
        seconds, device = self._random.uniform(5, 18), uuid4()
        now, kind = datetime.now(UTC), self._random.choice(["plain", "old", "back"])
        readings = [
            Reading(device, now - timedelta(seconds=2.5 * number), 50, float(number), ["long"]) for number in range(80)
        ]
        with postgres.connect(self._settings, "metrics_writer", application_name=OURS) as connection:
            if kind == "old":
                connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                connection.execute("SELECT now()")
                self._stop.wait(seconds)
                self._store(connection, readings)
            else:
                self._store(connection, readings)
                self._stop.wait(seconds)
            if kind == "back":
                connection.rollback()
                self.ended["rolled back"] += 1
                return
            # The record is there when the row can be seen, and no sink waits for the row for longer than this takes.
            for key, value in map(encode, readings):
                self._producer.produce(TOPIC, key=key, value=value)
            if self._producer.flush(30):
                raise VoidError("messages were not acknowledged")
            connection.commit()
            self.ended["of an old snapshot" if kind == "old" else "committed"] += 1

    def _store(self, connection: postgres.Connection, readings: list[Reading]) -> None:
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO metrics (device_id, published_at, metric_name, value, tags) VALUES (%s, %s, %s, %s, %s)",
                [(one.device_id, one.published_at, int(one.metric_name), one.value, one.tags) for one in readings],
            )


class Ticks(Meanwhile):
    """Ticks of the summaries, each compared with a count over all readings of the same snapshot.

    Attributes:
        compared: how many.
        longest: seconds that one took, without the comparison.
        differences: what was not equal.
    """

    pause = TICK_SECONDS

    def __init__(self, settings: Settings) -> None:
        super().__init__("ticks")
        self._settings = settings
        self.compared, self.longest = 0, 0.0
        self.differences: list[str] = []

    def once(self) -> None:
        self.tick()

    def tick(self) -> None:
        """One tick."""
        with (
            postgres.connect(self._settings, "metrics_summarizer", autocommit=True) as ticking,
            postgres.connect(self._settings, "metrics_summarizer", application_name="chaos count") as plain,
        ):
            began, kept = time.monotonic(), dict[str, Any]()
            summaries._refresh_index(ticking)
            with summaries._tick(ticking):
                summaries._absorb(ticking)
                self.longest = max(self.longest, time.monotonic() - began)
                for table, (statement, count) in PAIRS.items():
                    kept[table] = ticking.execute(statement).fetchall()
                    if table in KEPT:
                        self._compare(table, kept[table], ticking.execute(count).fetchall())
                plain.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                exported = ticking.execute("SELECT pg_export_snapshot()").fetchone() or ("",)
                plain.execute(f"SET TRANSACTION SNAPSHOT '{exported[0]}'".encode())
                # No partition of this snapshot goes before it was counted.
                plain.execute("LOCK TABLE metrics IN ACCESS SHARE MODE")
            for table, (_, count) in PAIRS.items():
                if table not in KEPT:
                    self._compare(table, kept[table], plain.execute(count.encode()).fetchall())
            self.compared += 1

    def _compare(self, table: str, kept: list[Any], counted: list[Any]) -> None:
        if kept != counted:
            example = next((pair for pair in zip(kept, counted, strict=False) if pair[0] != pair[1]), "one is longer")
            self.differences.append(f"tick {self.compared + 1}: {table} is not what the readings add up to: {example}")
