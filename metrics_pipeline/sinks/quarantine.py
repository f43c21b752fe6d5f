"""The quarantine: a stretch of the topic that the connector cannot pass is stored and rejected in its place.

The good records become rows and the bad ones rejects, by the strict decoder and by what PostgreSQL refuses, as the COPY sink has
it; in the same transaction it is noted how far that is. Then the connector goes on behind it. In the database stands, too, that it
was the quarantine which stopped the connector: whoever finds that unfinished moves the offsets up to the note and lets the connector
go on. So it may die at any point. Its session holds a lock that lets nobody else do the same, and without its session it
stores nothing.

The offsets are moved by a commit in the connector's group, which is what Connect does when somebody PATCHes them, and like that one
is refused while the group has members. It also works while no worker of Connect answers.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import psycopg

from metrics_pipeline import kafka, postgres
from metrics_pipeline.copy_sink.batch import Batch
from metrics_pipeline.copy_sink.failpoint import Failpoints
from metrics_pipeline.copy_sink.store import RowWriter
from metrics_pipeline.copy_sink.stretch import Place, Stretch, batches
from metrics_pipeline.errors import BusyError, PipelineError, ServiceError
from metrics_pipeline.settings import CONNECTOR, CONNECTOR_GROUP, TOPIC, Settings
from metrics_pipeline.sinks import active, connector

log = logging.getLogger(__name__)

POLL_RECORDS: Final = 5000
"""What the connector takes at once (`max.poll.records`), and so how far behind a bad record it cannot come. Fewest that are taken."""
SEARCHED_RECORDS: Final = 4 * POLL_RECORDS
"""How far behind the connector's commit a bad record is looked for: it stores for up to a second before it commits."""
TRIED_RECORDS: Final = 500
"""Records of each partition with which PostgreSQL is tried before the connector is stopped."""
CLOSELY_SECONDS: Final = 60.0
"""How soon another quarantine has to follow one to take more at once."""
FACTOR: Final = 10
"""How much more that is: the third one takes about all that waits."""
MOST_RECORDS: Final = 10_000_000
STORE_SECONDS: Final = 20.0
"""How long one quarantine stores; what it has not reached by then is left to the connector, or to the next one."""
LOCK_SECONDS: Final = 5
PATIENCE_SECONDS: Final = 10.0
"""How long Connect is asked again while it rebalances."""

VARIABLE: Final = "METRICS_QUARANTINE_FAILPOINTS"
"""As for the COPY sink: for tests only, and nothing happens without it."""
PLACES: Final = ("looked", "noted", "stopped", "alone", "read", "stored", "committed", "moved", "resumed", "ended")
"""In the order in which a quarantine passes them; at `stored` a transaction is open."""


@dataclass(frozen=True)
class Taken:
    """What a quarantine did.

    Attributes:
        stretches: what the connector does not read any more; none when no bad record was found, and nothing was changed then.
        reasons: why records were rejected, and how many.
        searched: how many records of each partition were looked at.
        problem: why it could not do all of it.
    """

    stretches: tuple[Stretch, ...] = ()
    reasons: Mapping[str, int] = field(default_factory=dict)
    searched: int = SEARCHED_RECORDS
    problem: str = ""

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Unfinished:
    """A quarantine that has, or had, the connector stopped."""

    number: int
    log: str
    cause: str
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True)
class RecentQuarantines:
    """What was taken over lately.

    Attributes:
        count: how often.
        stored: records that became rows.
        rejected: records that were rejected.
        under_way: whether one has the connector stopped now.
    """

    count: int = 0
    stored: int = 0
    rejected: int = 0
    under_way: bool = False

    def __str__(self) -> str:
        """One line for people."""
        times = "one quarantine" if self.count == 1 else f"{self.count:,} quarantines"
        return f"{times} of records that stop the connector: {self.stored:,} stored, {self.rejected:,} rejected" + (
            ", one is under way" if self.under_way else ""
        )


class Quarantine:
    """Takes what the connector cannot pass. Only while the connector is the active sink.

    Args:
        settings: where everything is.
        failpoints: for tests.
    """

    def __init__(self, settings: Settings, failpoints: Failpoints | None = None) -> None:
        self._settings = settings
        self._failpoints = failpoints or Failpoints(variable=VARIABLE, places=PLACES)
        self._writer = RowWriter()

    def unfinished(self) -> int | None:
        """The number of the quarantine that has the connector stopped, or was about to.

        Raises:
            ServiceError: PostgreSQL cannot be used.
        """
        with postgres.connect(self._settings, "metrics_reader", autocommit=True, connect_timeout=5) as session:
            found = _unfinished(session)
        return found.number if found else None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else stops or starts the connector within this.

        Raises:
            BusyError: somebody else does so now.
            ServiceError: PostgreSQL cannot be used.
        """
        with self._session():
            yield

    def followed_closely(self) -> bool:
        """Whether one has ended just now, whoever did it.

        Raises:
            ServiceError: PostgreSQL cannot be used.
        """
        return recent(self._settings, CLOSELY_SECONDS).count > 0

    def finish(self) -> Taken | None:
        """End a quarantine that somebody left: move the offsets up to what it noted, and let the connector go on.

        Raises:
            BusyError: it is under way.
            ServiceError: something is away: try again.
        """
        with self._session() as session:
            found = _unfinished(session)
            session.commit()
            return self._finish(session, found) if found else None

    def take(self, partitions: Iterable[int] | None, cause: str, *, though_good: bool = False) -> Taken:
        """Store and reject the records that the connector cannot pass, and let it go on behind them.

        Args:
            partitions: where it is stuck; None: wherever records wait.
            cause: why, as the connector says it.
            though_good: store the next records in its place even if none of them is bad: it may be that they come together that
                the connector cannot bear, such as one key in two spellings in a batch.

        Raises:
            BusyError: another quarantine, or provisioning, is under way.
            ServiceError: a part is away, or PostgreSQL could not store for a reason that lies in no record: nothing was
                rejected for that. Where the connector was stopped by then, it goes on as soon as that can be asked of it.
        """
        with self._session() as session:
            if found := _unfinished(session):
                session.commit()
                return self._finish(session, found)
            if not self._is_active(session):
                raise ServiceError(
                    "the COPY sink stores the readings, and no record stops it: there is nothing to take over"
                )
            log = kafka.topic_log(self._settings).id
            places = self._places(partitions)
            bad = self._look(session, places, log)
            self._failpoints.reach("looked")
            if not bad and though_good:
                bad = {number: at for number, (at, _) in places.items()}
            if not bad:
                return Taken()
            records = self._records(session)
            number = self._begin(session, log, cause, records)
            self._failpoints.reach("noted")
            try:
                return self._take(session, number, log, bad, records)
            except (psycopg.Error, PipelineError) as error:
                # What is noted counts, whatever happened after it. Without PostgreSQL the next repair ends it.
                with suppress(psycopg.Error, PipelineError):
                    session.rollback()
                    if (found := _unfinished(session)) is not None:
                        session.commit()
                        done = self._finish(session, found)
                        if done.stretches:
                            return replace(done, problem=_reason(error))
                raise _as_ours(error) from error

    @contextmanager
    def _session(self) -> Iterator[postgres.Connection]:
        """A session that nobody else has at the same time: the lock ends with it, and so does what it could still store."""
        with postgres.connect(
            self._settings,
            "metrics_writer",
            application_name="metrics-pipeline quarantine",
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=30_000,
            options=f"-c lock_timeout={LOCK_SECONDS}s",
        ) as session:
            try:
                row = session.execute(postgres.query("sinks_try_lock").encode()).fetchone()
                session.commit()
                if not (row and row[0]):
                    raise BusyError("a quarantine or a provisioning is under way: the connector is left to it")
                yield session
            except psycopg.Error as error:
                raise _as_ours(error) from error

    @staticmethod
    def _is_active(session: postgres.Connection) -> bool:
        row = session.execute("SELECT active = 'connect' FROM sink_state").fetchone()
        session.commit()
        return bool(row and row[0])

    def _places(self, partitions: Iterable[int] | None) -> dict[int, Place]:
        """Where the connector stands and where the records end, for each partition with records that wait."""
        committed = kafka.committed(self._settings, CONNECTOR_GROUP)
        marks = kafka.watermarks(self._settings)
        chosen = set(marks if partitions is None else partitions)
        places = {number: (max(low, committed.get(number, low)), high) for number, (low, high) in marks.items()}
        return {number: (at, end) for number, (at, end) in places.items() if number in chosen and at < end}

    def _look(self, session: postgres.Connection, places: Mapping[int, Place], log: str) -> dict[int, int]:
        """The first bad record of each partition that has one soon, and that PostgreSQL stores what is good. Changes nothing."""
        bad: dict[int, int] = {}
        for batch in batches(self._settings, places, log, SEARCHED_RECORDS):
            _first_rejects(batch, batch.rejects, bad)
        records = TRIED_RECORDS if bad else POLL_RECORDS
        try:
            for batch in batches(self._settings, {number: places[number] for number in bad} or places, log, records):
                written = self._writer.write(session, batch, upsert=True)
                _first_rejects(batch, written.rejects, bad)
        finally:
            session.rollback()
        return bad

    def _records(self, session: postgres.Connection) -> int:
        values = {
            "topic": TOPIC,
            "closely": CLOSELY_SECONDS,
            "factor": FACTOR,
            "fewest": POLL_RECORDS,
            "most": MOST_RECORDS,
        }
        row = session.execute(postgres.query("quarantine_records").encode(), values).fetchone()
        session.commit()
        return int(row[0]) if row else POLL_RECORDS

    def _begin(self, session: postgres.Connection, log: str, cause: str, records: int) -> int:
        """Before the connector is stopped: afterwards nobody could tell who did it."""
        values = {"topic": TOPIC, "log_id": log, "cause": cause.replace("\0", "\\0"), "records": records}
        row = session.execute(postgres.query("quarantine_begin").encode(), values).fetchone()
        session.commit()
        assert row is not None  # noqa: S101  # RETURNING
        return int(row[0])

    def _take(self, session: postgres.Connection, number: int, log: str, bad: Mapping[int, int], records: int) -> Taken:
        connector.stop_connector(self._settings, PATIENCE_SECONDS)
        self._failpoints.reach("stopped")
        marks = kafka.watermarks(self._settings)
        begin = {partition: low for partition, (low, _) in marks.items() if partition in bad}
        commits, alone = active.final_commits(self._settings, seconds=active.MEMBERS_SECONDS, begin=begin)
        if not alone:
            raise ServiceError(
                f"the connector's consumers have not left its group after {active.MEMBERS_SECONDS:.0f} s"
            )
        self._failpoints.reach("alone")
        # Where the tasks have passed the bad record after all there is nothing to take.
        places = {
            partition: (at, min(marks[partition][1], max(first + 1, at + records)))
            for partition, first in bad.items()
            if (at := max(marks[partition][0], commits[partition])) <= first
        }
        reasons: Counter[str] = Counter()
        begun = time.monotonic()
        left = set(places)
        for batch in batches(self._settings, places, log):
            self._failpoints.reach("read")
            written = self._store(session, number, batch)
            reasons.update(reject.reason for reject in written)
            left -= {partition for partition in left if (c := batch.chunks.get(partition)) and c.stop > bad[partition]}
            if not left and time.monotonic() - begun > STORE_SECONDS:
                break
        found = _unfinished(session)
        session.commit()
        return replace(self._finish(session, found), reasons=dict(reasons)) if found else Taken()

    def _store(self, session: postgres.Connection, number: int, batch: Batch) -> list[Any]:
        """One transaction: the rows, the rejects, and how far they are."""
        written = self._writer.write(session, batch, upsert=True)
        rejected = Counter(batch.messages[reject.at].partition() for reject in written.rejects)
        messages = Counter(message.partition() for message in batch.messages if message.value() is not None)
        chunks = list(batch.chunks.values())
        session.execute(
            postgres.query("quarantine_note").encode(),
            {
                "quarantine": number,
                "partitions": [chunk.partition for chunk in chunks],
                "starts": [chunk.start for chunk in chunks],
                "stops": [chunk.stop for chunk in chunks],
                "stored": [messages[chunk.partition] - rejected[chunk.partition] for chunk in chunks],
                "rejected": [rejected[chunk.partition] for chunk in chunks],
            },
        )
        self._failpoints.reach("stored")
        session.commit()
        self._failpoints.reach("committed")
        return written.rejects

    def _finish(self, session: postgres.Connection, found: Unfinished) -> Taken:
        """Offsets up to the note, and the connector on its way, if it is still ours."""
        client = connector.client(self._settings, PATIENCE_SECONDS)
        stretches: tuple[Stretch, ...] = ()
        if client.state(CONNECTOR).connector == "STOPPED":
            stretches = self._move(found)
            self._failpoints.reach("moved")
            if self._is_active(session):
                client.resume(CONNECTOR)
        self._failpoints.reach("resumed")
        session.execute("UPDATE quarantines SET ended_at = clock_timestamp() WHERE number = %s", [found.number])
        session.commit()
        self._failpoints.reach("ended")
        return Taken(stretches)

    def _move(self, found: Unfinished) -> tuple[Stretch, ...]:
        """The connector's offsets up to the note: never back, and only where they are still what they were."""
        if kafka.topic_log(self._settings).id != found.log:
            return ()  # the offsets noted are of a topic that exists no more
        marks = kafka.watermarks(self._settings)
        committed = kafka.committed(self._settings, CONNECTOR_GROUP)

        def stands(stretch: Stretch) -> bool:
            low, high = marks.get(stretch.partition, (0, 0))
            # At its end it was moved by somebody who then died.
            return stretch.next <= high and max(low, committed.get(stretch.partition, low)) in (
                stretch.first,
                stretch.next,
            )

        # A partition in which it has gone on since, or was set back, may hold older values by now: it has to pass the newer ones, too.
        moved = tuple(stretch for stretch in found.stretches if stands(stretch))
        if not kafka.commit(self._settings, {stretch.partition: stretch.next for stretch in moved}, CONNECTOR_GROUP):
            return ()  # somebody let the connector go on
        return moved


def recent(settings: Settings, seconds: float) -> RecentQuarantines:
    """What was taken over from the connector within the last seconds; nothing before the migrations.

    Raises:
        ServiceError: PostgreSQL cannot be used.
    """
    with postgres.connect(settings, "metrics_reader", autocommit=True, connect_timeout=5) as session:
        try:
            return recent_in(session, seconds)
        except psycopg.errors.UndefinedTable:
            return RecentQuarantines()
        except psycopg.Error as error:
            raise _as_ours(error) from error


def recent_in(session: postgres.Connection, seconds: float) -> RecentQuarantines:
    """The same by a session that is there already.

    Raises:
        psycopg.Error: PostgreSQL refuses.
    """
    values = {"topic": TOPIC, "seconds": seconds}
    row = session.execute(postgres.query("quarantines_recent").encode(), values).fetchone()
    return RecentQuarantines(*row) if row else RecentQuarantines()


def _unfinished(session: postgres.Connection) -> Unfinished | None:
    try:
        rows = session.execute(postgres.query("quarantine_unfinished").encode(), {"topic": TOPIC}).fetchall()
    except psycopg.errors.UndefinedTable:
        return None
    except psycopg.Error as error:
        raise _as_ours(error) from error
    if not rows:
        return None
    stretches = tuple(Stretch(*row[3:]) for row in rows if row[3] is not None)
    return Unfinished(rows[0][0], rows[0][1], rows[0][2], stretches)


def _first_rejects(batch: Batch, rejects: Iterable[Any], found: dict[int, int]) -> None:
    for reject in rejects:
        message = batch.messages[reject.at]
        number, offset = message.partition(), message.offset()
        found[number] = min(offset, found.get(number, offset))


def _reason(error: BaseException) -> str:
    return postgres.one_line(error) if isinstance(error, psycopg.Error) else str(error)


def _as_ours(error: BaseException) -> PipelineError:
    if isinstance(error, PipelineError):
        return error
    return ServiceError(f"PostgreSQL could not store: {_reason(error)}")
