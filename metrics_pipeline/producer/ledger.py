"""The producer's ledger: what each run was promised, kept apart from the topic, and the lock that lets one run at a time.

The topic cannot tell what it lost; the table `producer_runs` can. It is written about every second while a run lasts,
as well as PostgreSQL allows, and once more at its end. The lock belongs to the database session, so it ends with the
process however that ends.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal
from uuid import UUID

import psycopg

from metrics_pipeline import kafka, postgres
from metrics_pipeline.errors import BusyError, PipelineError, ServiceError
from metrics_pipeline.producer.deliveries import NO_PARTITION, DeliveryCounts, Ranges, Tally
from metrics_pipeline.settings import Settings

Source = str
"""By which way the readings of a run came: `simulated`, `replay`, or a word of one's own as `SOURCE_WORD` has it."""
SOURCE_WORD: Final = re.compile(r"[a-z][a-z0-9_-]{0,39}")
State = Literal["running", "finished", "stopped", "failed"]

LOCK_KEY: Final = int.from_bytes(b"producer", "big")
"""Key of the advisory lock in the database of the readings."""

WRITE_SECONDS: Final = 1.0
AGAIN_SECONDS: Final = 0.2
"""Between two attempts at the last write."""
GRACE_SECONDS: Final = 1.0
"""How much longer than its bound the last write is waited for: then PostgreSQL hangs."""

log = logging.getLogger(__name__)


class RunLedger:
    """The rows of one run in `producer_runs`, and the lock when the run has to be the only one of its kind.

    `open` once, then `start` a thread that writes, then `finish`. A failed write is tried again with the next one:
    counts are totals, and ranges are kept until a write that holds them was committed.
    """

    def __init__(
        self,
        settings: Settings,
        run_id: UUID,
        source: Source,
        *,
        connect: Callable[..., postgres.Connection] = postgres.connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is connected before `open`.

        Args:
            settings: where PostgreSQL is.
            run_id: names the run.
            source: a simulated run takes the lock, every other may run beside it.
            connect: how to connect; replaced by tests.
            clock: monotonic, in seconds.

        Raises:
            ValueError: the source is no `SOURCE_WORD`.
        """
        if not SOURCE_WORD.fullmatch(source):
            raise ValueError(
                f"a run's source is one word of up to 40 characters (a-z, 0-9, - and _, a letter first), not {source[:60]!r}"
            )
        self._settings = settings
        self._run_id = run_id
        self._source: Source = source
        self._connect = connect
        self._clock = clock
        self._connection: postgres.Connection | None = None
        self._locks = source == "simulated"
        self._started_at = datetime.now(UTC)
        self._written: dict[int, int] = {}  # ranges that are final and committed, by partition
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self._last: tuple[Tally, State, float] | None = None
        self._problem: str | None = "not written"
        self.log_id = ""
        """Which log the offsets are of; nothing while that is not known."""
        self.usurped: BusyError | None = None
        """Set when the lock was lost with a connection and somebody else has it: the run must end."""

    def open(self) -> None:
        """Take the lock and write the run's first row.

        Raises:
            BusyError: another producer runs.
            ServiceError: PostgreSQL cannot be used, or the schema is missing.
        """
        try:
            self.write({}, "running")
        except PipelineError:
            self.close()
            raise

    def write(self, tally: Tally, state: State) -> None:
        """Write totals, and the ranges that are not written yet, in one transaction.

        Raises:
            BusyError: somebody else has the lock meanwhile.
            ServiceError: PostgreSQL cannot be used; nothing was written, or it is not known.
        """
        connection = self._session()
        rows = [
            {
                "run_id": self._run_id,
                "partition": number,
                "log_id": self.log_id,
                "source": self._source,
                "state": state,
                "acknowledged": counts.acknowledged,
                "failed": counts.failed,
                "unknown": counts.unknown,
                "offsets": multirange(counts.ranges[self._written.get(number, 0) :]),
                "started_at": self._started_at,
            }
            for number, counts in {NO_PARTITION: DeliveryCounts(), **tally}.items()
        ]
        try:
            with connection.transaction():
                connection.cursor().executemany(postgres.query("record_run"), rows)
        except psycopg.Error as error:
            self.close()
            raise _failure("the ledger could not be written", error) from error
        # The last range may still grow: it is written again until another one follows it.
        self._written = {number: max(0, len(counts.ranges) - 1) for number, counts in tally.items()}

    def start(self, tally: Callable[[], Tally]) -> None:
        """Begin to write about every second what `tally` says."""
        self._thread = threading.Thread(target=self._keep, args=[tally], name="ledger", daemon=True)
        self._thread.start()

    def finish(self, tally: Tally, state: State, timeout: float) -> str | None:
        """Write for the last time and give the lock back; None when it is written, else what prevented it.

        Args:
            tally: the final counts.
            state: how the run ended.
            timeout: seconds in which PostgreSQL may come back.
        """
        self._last = tally, state, self._clock() + timeout
        self._ending.set()
        if self._thread is None:
            self.start(lambda: tally)
        if self._thread is not None:
            # A server that hangs would hold this thread for ever: its own limits do not count then.
            self._thread.join(timeout + GRACE_SECONDS)
            if self._thread.is_alive():
                return f"PostgreSQL did not answer within {timeout:g} s"
        self.close()
        return self._problem

    def close(self) -> None:
        """End the session, and with it the lock."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _keep(self, tally: Callable[[], Tally]) -> None:
        pause = WRITE_SECONDS
        while not self._ending.wait(pause):
            pause = self._keep_up(tally())
        while self._last is not None:
            final, state, deadline = self._last
            if self._try(final, state) is None or self._clock() > deadline:
                return
            time.sleep(AGAIN_SECONDS)

    def _keep_up(self, tally: Tally) -> float:
        """Write, and say how long to wait before the next time.

        Long lists of ranges, or a slow server, must not keep PostgreSQL busy with this.
        """
        begun = self._clock()
        self._try(tally, "running")
        return max(WRITE_SECONDS, 10 * (self._clock() - begun))

    def _try(self, tally: Tally, state: State) -> str | None:
        try:
            self.write(tally, state)
            self._problem = None
        except BusyError as error:
            # The run has to end, and what it was promised has to be written all the same.
            self.usurped, self._locks = error, False
            self._problem = str(error)
        except PipelineError as error:
            self._problem = str(error)
            log.debug("ledger: %s", error)
        return self._problem

    def _session(self) -> postgres.Connection:
        """The connection, made new when it was lost; a simulated run holds the lock in it."""
        if self._connection is None:
            self._connection = self._connect(
                self._settings,
                "metrics_producer",
                autocommit=True,
                connect_timeout=5,
                application_name=f"producer run {self._run_id}",
                # Without an answer a dead peer would be noticed after hours only.
                keepalives_idle=5,
                keepalives_interval=2,
                keepalives_count=3,
            )
            try:
                if self._locks:
                    self._take_lock(self._connection)
            except BaseException:
                self.close()
                raise
        return self._connection

    def _take_lock(self, connection: postgres.Connection) -> None:
        try:
            if connection.execute("SELECT pg_try_advisory_lock(%s)", [LOCK_KEY]).fetchone() != (True,):
                holder = connection.execute(postgres.query("producer_lock_holder"), {"key": LOCK_KEY}).fetchone()
                raise BusyError(_who(holder))
            connection.execute(postgres.query("end_abandoned_runs"), {"run_id": self._run_id})
        except psycopg.Error as error:
            raise _failure("the producer's lock could not be taken", error) from error


@dataclass(frozen=True, slots=True)
class Holder:
    """The database session that has the producer's lock.

    Attributes:
        name: of the session; a producer's holds its run's id.
        since: when it connected.
    """

    name: str
    since: datetime


def holder(settings: Settings) -> Holder | None:
    """Who has the producer's lock, or None.

    Raises:
        ServiceError: PostgreSQL cannot be used.
    """
    # A role of less rights would not be shown the names of the producer's sessions.
    with postgres.connect(settings, "metrics_producer", autocommit=True, connect_timeout=3) as connection:
        try:
            row = connection.execute(postgres.query("producer_lock_holder"), {"key": LOCK_KEY}).fetchone()
        except psycopg.Error as error:
            raise _failure("the holder of the producer's lock could not be read", error) from error
    return Holder(str(row[0]), row[2]) if row else None


def purge(settings: Settings) -> int:
    """Delete the runs that ended more than RUN_RETENTION_HOURS ago and of whose records the topic holds none any more.

    Returns:
        How many rows went.

    Raises:
        ServiceError: PostgreSQL or the broker cannot be used.
    """
    lows = {number: low for number, (low, _) in kafka.watermarks(settings).items()}
    values = {
        "log_id": kafka.topic_log(settings).id,
        "partitions": list(lows),
        "lows": list(lows.values()),
        "hours": settings.run_retention_hours,
    }
    with postgres.connect(settings, "metrics_owner", autocommit=True) as connection:
        try:
            return connection.execute(postgres.query("purge_producer_runs"), values).rowcount
        except psycopg.Error as error:
            raise _failure("the ledger could not be purged", error) from error


def _failure(what: str, error: psycopg.Error) -> ServiceError:
    if isinstance(error, psycopg.errors.UndefinedTable):
        return ServiceError("table producer_runs does not exist: run `metrics-pipeline migrate up`")
    return ServiceError(f"{what}: {postgres.one_line(error)}")


def _who(holder: tuple[object, ...] | None) -> str:
    since = ""
    if holder is not None and isinstance(holder[2], datetime):
        since = f" ({holder[0]}, connected since {holder[2].astimezone(UTC):%H:%M:%S} UTC)"
    return (
        f"another producer is running{since}, and there may be one at a time: "
        "let it end, or terminate its run in Dagster or its process"
    )


def multirange(ranges: Ranges) -> str:
    """PostgreSQL's text for an `int8multirange`."""
    return "{" + ",".join(f"[{start},{end})" for start, end in ranges) + "}"
