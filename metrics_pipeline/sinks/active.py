"""The sink that stores the readings, Kafka Connect's or the COPY sink: which one it is, how far it is, and the change from one to the other.

The table `sink_state` says which one is active, whatever anybody's environment says: provisioning sets it, the COPY sink
obeys it in each transaction. While they change, both may store the same record, which alters nothing; no record is left out:
the one that takes over begins where the other one is known to have stored everything before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import psycopg

from metrics_pipeline import kafka, postgres
from metrics_pipeline.change import Change
from metrics_pipeline.errors import PipelineError, ServiceError
from metrics_pipeline.settings import CONNECTOR, CONNECTOR_GROUP, TOPIC, Role, Settings, SinkKind
from metrics_pipeline.sinks import connector, moves
from metrics_pipeline.sinks.connector import PATIENCE_SECONDS, AbsentError

WORKERS_SECONDS: Final = 60.0
"""How long provisioning waits for a process of the COPY sink."""
MEMBERS_SECONDS: Final = 60.0
"""How long it waits for consumers to leave the connector's group: Kafka drops a dead one after 45 s."""
QUIET_SECONDS: Final = 1.0
"""How long a Connect is asked for that need not be there."""
QUESTION_SECONDS: Final = 5
QUARANTINE_SECONDS: Final = 120
"""How long provisioning waits for a quarantine that is under way."""

NO_WORKER: Final = (
    "no process of the COPY sink is connected to PostgreSQL: start one with `metrics-pipeline sink`, "
    "or everything with `SINK=copy metrics-pipeline up`"
)
_NAMES: Final[dict[SinkKind, str]] = {"connect": "Kafka Connect", "copy": "the COPY sink"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """What the database says of the sinks.

    Attributes:
        active: the one that stores the readings.
        offsets: of the first record that the COPY sink has not stored or rejected, by partition.
        sessions: how many connections the COPY sink's processes have, also while they stand by.
        log: which log the topic's name stood for when it was last looked at; nothing when nobody did.
        connector_log: which log the connector's offsets are of; nothing when that was never noted.
    """

    active: SinkKind = "connect"
    offsets: Mapping[int, int] = field(default_factory=dict)
    sessions: int = 0
    log: str = ""
    connector_log: str = ""

    def is_former(self, settings: Settings) -> bool:
        """Whether the active sink's offsets are of another log than the topic's name stands for.

        Raises:
            ServiceError: the broker cannot be used, or the topic does not exist.
        """
        return moves.other_log(settings, self.log if self.active == "copy" else self.connector_log) is not None


def position(settings: Settings, role: Role = "metrics_reader") -> Position:
    """What the database says of the sinks; before the migrations, that the connector is active.

    Args:
        settings: where PostgreSQL is.
        role: who asks; a container of Kafka Connect has the password of `metrics_writer` alone.

    Raises:
        ServiceError: PostgreSQL cannot be used.
    """
    with (
        postgres.connect(
            settings,
            role,
            autocommit=True,
            connect_timeout=QUESTION_SECONDS,
            options=f"-c statement_timeout={QUESTION_SECONDS}s",
        ) as connection,
        postgres.impatient(connection, 2 * QUESTION_SECONDS),
    ):
        try:
            rows = connection.execute(postgres.query("sink_position"), {"topic": TOPIC}).fetchall()
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):
            return Position()
        except psycopg.Error as error:
            raise ServiceError(
                f"the table sink_state cannot be read: {postgres.one_line(error)}: see `metrics-pipeline status`"
            ) from error
    offsets = {number: offset for _, _, number, offset, *_ in rows if number is not None}
    return Position(rows[0][0], offsets, rows[0][1], *rows[0][4:]) if rows else Position()


def kind(settings: Settings) -> SinkKind:
    """Which sink stores the readings.

    Raises:
        ServiceError: PostgreSQL cannot be used.
    """
    return position(settings).active


def offsets(settings: Settings) -> dict[int, int]:
    """How far the active sink is: before this offset it has stored or rejected every record; by partition, if known.

    Raises:
        ServiceError: PostgreSQL or the broker cannot be used.
    """
    place = position(settings)
    if place.is_former(settings):
        return {}
    return dict(place.offsets) if place.active == "copy" else kafka.committed(settings, CONNECTOR_GROUP)


def lag(settings: Settings) -> kafka.Lag:
    """Records retained that the active sink has still to store.

    Raises:
        ServiceError: PostgreSQL or the broker cannot be used, or the topic does not exist.
    """
    return lag_at(settings, position(settings))


def lag_at(settings: Settings, place: Position) -> kafka.Lag:
    """The same for a position that is known already; PostgreSQL is not asked.

    Raises:
        ServiceError: the broker cannot be used, or the topic does not exist.
    """
    if place.is_former(settings):
        return kafka.lag_from(settings, {})
    if place.active == "copy":
        return kafka.lag_from(settings, place.offsets)
    return kafka.consumer_lag(settings, CONNECTOR_GROUP)


class LagMeter:
    """The active sink's lag for those who ask again and again, known while PostgreSQL is away, too.

    Without PostgreSQL no sink gets ahead, so the last position known stands: the lag that grows meanwhile is what holds a
    producer back before retention overtakes the sink.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._last: Position | None = None

    def total(self) -> int:
        """The lag now, over all partitions.

        Raises:
            ServiceError: the broker cannot be used, or the position was never known.
        """
        try:
            self._last = position(self._settings)
        except ServiceError:
            if self._last is None:
                raise
        return lag_at(self._settings, self._last).total


def sink_problem(settings: Settings) -> str | None:
    """Why the active sink does not store readings now, or None when it does.

    Raises:
        ServiceError: PostgreSQL or Connect cannot be used.
    """
    place = position(settings)
    if place.active == "copy":
        return None if place.sessions else NO_WORKER
    state = connector.sink_state(settings)
    return None if state.running else "; ".join(state.problems)


def ensure_sink(settings: Settings, patience: float = PATIENCE_SECONDS) -> Change:
    """Let the configured sink be the one that stores the readings, from where the other one stood.

    The other one goes on until the new one is known to be there.

    Raises:
        ServiceError: PostgreSQL, the broker or Connect cannot be used, or the configured sink does not run.
    """
    # A quarantine stops the connector, and lets it go on: not in the middle of this.
    with postgres.connect(
        settings, "metrics_reader", autocommit=True, options=f"-c lock_timeout={QUARANTINE_SECONDS}s"
    ) as session:
        try:
            session.execute(postgres.query("sinks_lock"))
        except psycopg.errors.LockNotAvailable as error:
            raise ServiceError(
                "a quarantine, or another provisioning, holds the sinks: see `metrics-pipeline status`, then provision again"
            ) from error
        return _ensure_copy(settings, patience) if settings.sink == "copy" else _ensure_connect(settings, patience)


def sink_drift(settings: Settings) -> list[str]:
    """Each difference between what stores the readings and what is configured to; empty when all is well.

    Raises:
        ServiceError: PostgreSQL, the broker or Connect cannot be used.
    """
    place = position(settings)
    differences = []
    if place.active != settings.sink:
        differences.append(f"the readings are stored by {_NAMES[place.active]}, configured {_NAMES[settings.sink]}")
    if settings.sink == "connect":
        with suppress(ServiceError):  # a broker that is away is the topic's check's to name
            if (log := moves.other_log(settings, place.connector_log)) is not None:
                differences.append(
                    f"topic {TOPIC} is another one: log {log}, and the connector's offsets are of {place.connector_log}"
                )
        return differences + connector.connector_drift(settings)
    if not place.sessions:
        differences.append(NO_WORKER)
    state = _connector_if_any(settings, PATIENCE_SECONDS if settings.connect_url else QUIET_SECONDS)
    if state not in (None, "MISSING", "STOPPED"):
        differences.append(f"connector {CONNECTOR} is {state} beside the COPY sink, configured STOPPED")
    if (log := moves.other_log(settings, place.log)) is not None:
        differences.append(
            f"topic {TOPIC} is another one: log {log}, and the COPY sink's offsets are of {place.log}: "
            "a process of it that runs begins at the start"
        )
    for number, (_, high) in kafka.watermarks(settings).items():
        if log is None and place.offsets.get(number, 0) > high:
            differences.append(
                f"the COPY sink's offset in partition {number} is {place.offsets[number]}, and the topic ends at {high}: "
                "it was restored from before, and a process of the COPY sink that runs begins at its start"
            )
    return differences


def hand_back(settings: Settings) -> list[str]:
    """Let the connector be the active sink, and begin where the COPY sink stands; only while the connector does not run.

    The commit in Kafka is made while the COPY sink is held back, and before the database says that its time is over: a
    crash at any point leaves one of the two with everything before it stored.

    Returns:
        One line for each thing done.

    Raises:
        ServiceError: PostgreSQL or the broker cannot be used; nothing was changed in the database.
    """
    with postgres.connect(settings, "metrics_writer") as connection:
        try:
            connection.execute(postgres.query("sink_activate_connect"))
            rows = connection.execute(postgres.query("sink_hand_back"), {"topic": TOPIC}).fetchall()
            moved = _hand_offsets(settings, connection, rows)
        except psycopg.Error as error:
            raise _refused(error) from error
    return [
        "the readings are stored by Kafka Connect, before by the COPY sink",
        *(f"the connector begins at offset {offset} of partition {number}" for number, offset in moved.items()),
    ]


def hand_over(settings: Settings) -> list[str]:
    """Before Connect starts: a connector that was replaced by the COPY sink goes on where that one stands, if it can be done.

    It needs the role `metrics_writer` alone, which the connector has, too.

    Returns:
        One line for each thing done.
    """
    try:
        return hand_back(settings) if position(settings, "metrics_writer").active == "copy" else []
    except PipelineError as error:
        # The connector then stores once more what is stored; provisioning makes it the active one.
        log.warning("the connector begins at its own offsets: %s", error)
        return []


def _hand_offsets(
    settings: Settings, connection: postgres.Connection, rows: Sequence[tuple[int, int, str]]
) -> dict[int, int]:
    """Move the connector's committed offsets up to the COPY sink's, never back, and never beyond the topic's end.

    Commits of another log say nothing, and then the connector begins where the COPY sink stands, or at the earliest.
    """
    log = kafka.topic_log(settings).id
    (of,) = connection.execute("SELECT connector_log FROM sink_state").fetchone() or ("",)
    wanted = {number: offset for number, offset, its in rows if its in ("", log)}
    marks = kafka.watermarks(settings)
    if of in ("", log):
        present = kafka.committed(settings, CONNECTOR_GROUP) if wanted else {}
        moved = {n: offset for n, offset in wanted.items() if n in marks and present.get(n, -1) < offset <= marks[n][1]}
    else:
        moved = {n: wanted[n] if low <= wanted.get(n, -1) <= high else low for n, (low, high) in marks.items()}
    if not kafka.commit(settings, moved, CONNECTOR_GROUP):
        # Members of the group would go on from their own offsets: they store again what is stored, and leave nothing out.
        # Where these are of another log, the repair moves them.
        return {}
    connection.execute("UPDATE sink_state SET connector_log = %s", [log])
    return moved


def _ensure_connect(settings: Settings, patience: float) -> Change:
    details = []
    if kind(settings) == "copy":
        client = connector.client(settings, patience)
        client.version()
        if client.state(CONNECTOR).connector in ("MISSING", "STOPPED"):
            details = hand_back(settings)
        else:
            # It ran beside the COPY sink, and may have put old values over newer ones: it has to pass these itself.
            _activate(settings, "connect")
            details = [
                "the readings are stored by Kafka Connect, before by the COPY sink; the connector goes on where it is"
            ]
    details += moves.ensure(settings, connector.client(settings, patience))
    change = connector.ensure_connector(settings, patience)
    return Change("changed", details + change.details) if details else change


def _ensure_copy(settings: Settings, patience: float) -> Change:
    before = _wait_for_workers(settings)
    state = _connector_if_any(settings, patience if settings.connect_url else QUIET_SECONDS)
    ran = state not in (None, "MISSING", "STOPPED")
    if ran:
        connector.stop_connector(settings, patience)
    elif before.active == "copy":
        return Change("unchanged")
    commits = final_commits(settings, seconds=MEMBERS_SECONDS if ran else 0.0)[0]
    moved = _take_over(settings, commits, back=before.active == "copy")
    details = []
    if before.active != "copy":
        details.append(f"the readings are stored by the COPY sink, before by {_NAMES[before.active]}")
    if ran:
        details.append(f"connector {CONNECTOR} is stopped, was {state}")
    elif state is None:
        details.append(f"no Kafka Connect of this pipeline answers at {settings.connect_rest}: no connector to stop")
    details += [f"the COPY sink goes on at offset {offset} of partition {number}" for number, offset in moved.items()]
    return Change("changed", details)


def _wait_for_workers(settings: Settings) -> Position:
    deadline = time.monotonic() + WORKERS_SECONDS
    while True:
        place = position(settings)
        if place.sessions:
            return place
        if time.monotonic() >= deadline:
            raise ServiceError(f"{NO_WORKER}; {_NAMES[place.active]} stays the one that stores the readings")
        time.sleep(0.5)


def _connector_if_any(settings: Settings, patience: float) -> str | None:
    """The connector's state; None when there is no Connect of ours, which is no error unless CONNECT_URL names one.

    Raises:
        ServiceError: CONNECT_URL names one that is not there, or whether ours is there could not be found out.
    """
    try:
        return connector.client(settings, patience).state(CONNECTOR).connector
    except AbsentError:
        if settings.connect_url:
            raise
        return None


def final_commits(
    settings: Settings, *, seconds: float, begin: Mapping[int, int] | None = None
) -> tuple[dict[int, int], bool]:
    """The connector's committed offsets, and whether its consumers have left the group by then.

    Args:
        settings: where the broker is.
        seconds: how long they are waited for.
        begin: where the partitions begin that have no commit yet; they have one then.

    Raises:
        ServiceError: the broker cannot be used.
    """
    deadline = time.monotonic() + seconds
    commits = {**(begin or {}), **kafka.committed(settings, CONNECTOR_GROUP)}
    # Nobody but a member may commit while there are any: that this commit of nothing new is taken shows that there are none.
    while not (alone := kafka.commit(settings, commits, CONNECTOR_GROUP)) and time.monotonic() < deadline:
        time.sleep(0.5)
        commits |= kafka.committed(settings, CONNECTOR_GROUP)
    return kafka.committed(settings, CONNECTOR_GROUP), alone


def _take_over(settings: Settings, commits: Mapping[int, int], *, back: bool) -> dict[int, int]:
    """Make the COPY sink the active one, beginning at the connector's commits.

    The connector's commits are taken even where the COPY sink was further once: what the connector stored since then may
    be older than what stood there, and only passing the same records again makes it right.

    Args:
        settings: where PostgreSQL is.
        commits: of the connector, by partition. A partition without one keeps its offset; the COPY sink begins at the
            earliest record where there is none either.
        back: whether the connector ran beside an active COPY sink, whose offsets then move back only.

    Returns:
        The offsets that were changed.
    """
    log = kafka.topic_log(settings).id
    with postgres.connect(settings, "metrics_owner") as connection:
        try:
            (of,) = connection.execute("SELECT connector_log FROM sink_state").fetchone() or ("",)
            if of not in ("", log):
                commits = {}  # of another log: the COPY sink begins at the earliest record of this one
            values = {
                "topic": TOPIC,
                "log_id": log,
                "partitions": list(commits),
                "offsets": list(commits.values()),
                "back": back,
            }
            rows = connection.execute(postgres.query("sink_take_over"), values).fetchall()
            connection.execute(postgres.query("sink_activate"), {"active": "copy"})
        except psycopg.Error as error:
            raise _refused(error) from error
    return dict(sorted(rows))


def _activate(settings: Settings, kind: SinkKind) -> None:
    with postgres.connect(settings, "metrics_owner") as connection:
        try:
            connection.execute(postgres.query("sink_activate"), {"active": kind})
        except psycopg.Error as error:
            raise _refused(error) from error


def _refused(error: psycopg.Error) -> ServiceError:
    return ServiceError(
        f"the sinks could not be changed: {postgres.one_line(error)}: nothing was changed; run the job `provision` again"
    )
