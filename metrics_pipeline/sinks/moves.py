"""The connector's offsets moved, because the topic's name stands for another log now, or because its partitions grew.

The connector is stopped, its consumer group's offsets are committed from outside once no member is left, and it goes on.
That it was stopped for this stands in the database (`connector_held`), so whoever looks next, after a crash at any point, does
it once more: reading again what is stored changes nothing. Why and from where stands in `topic_log`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import psycopg

from metrics_pipeline import kafka, postgres, topic_log
from metrics_pipeline.copy_sink.sweep import sweep
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.kafka import TopicLog
from metrics_pipeline.settings import CONNECTOR, CONNECTOR_GROUP, TOPIC, Settings
from metrics_pipeline.sinks import connector
from metrics_pipeline.sinks.connector import ConnectClient
from metrics_pipeline.topic_log import Growth

LEAVE_SECONDS: Final = 30.0
"""How long the group's members are waited for after the connector stopped; the next look goes on waiting."""
STANDS_STILL: Final = ("MISSING", "STOPPED")


@dataclass(frozen=True, slots=True)
class Move:
    """A move of the connector's offsets that is due.

    Attributes:
        reason: why, in one line.
        offsets: by partition, where it has to go on; the others stay.
        log: which log they are of.
        growth: the growth that this settles.
        held: the connector was stopped for a move before, which did not come to its end.
    """

    reason: str
    offsets: Mapping[int, int]
    log: TopicLog
    growth: Growth | None = None
    held: bool = False


def note(settings: Settings) -> str | None:
    """Note which log the topic's name stands for; what is new about it, or None.

    Raises:
        ServiceError: PostgreSQL or the broker cannot be used, or the topic does not exist.
    """
    log = kafka.topic_log(settings)
    with _database(settings) as connection:
        return topic_log.note(connection, log, settings.topic_refresh_seconds)


def other_log(settings: Settings, of: str) -> str | None:
    """Which log the topic's name stands for, when it is another one than `of`; nothing is noted.

    Raises:
        ServiceError: the broker cannot be used, or the topic does not exist.
    """
    if not of:
        return None
    present = kafka.topic_log(settings).id
    return None if of == present else present


def due(settings: Settings) -> Move | None:
    """The move that the connector needs now, if any.

    Raises:
        ServiceError: PostgreSQL or the broker cannot be used, or the topic does not exist.
    """
    log = kafka.topic_log(settings)
    with _database(settings) as connection:
        topic_log.note(connection, log, settings.topic_refresh_seconds)
        connection.execute("UPDATE sink_state SET connector_log = %s WHERE connector_log = ''", [log.id])
        of, held = connection.execute("SELECT connector_log, connector_held FROM sink_state").fetchone() or (
            log.id,
            False,
        )
        connection.commit()
        growth = topic_log.oldest_growth(connection, log)
        if of == log.id and growth is not None and not growth.passed:
            topic_log.measure(connection, settings, growth)
            growth = None
    if of != log.id:
        low = {number: first for number, (first, _) in kafka.watermarks(settings).items()}
        reason = f"topic {TOPIC} is another one: log {log.id}, before {of}; it is read from its beginning"
        return Move(reason, low, log, held=held)
    if growth is not None:
        commits = kafka.committed(settings, CONNECTOR_GROUP)
        low = {number: first for number, (first, _) in kafka.watermarks(settings).items()}
        if growth.reached(commits, low):
            begins = {number: max(begin, low.get(number, 0)) for number, begin in growth.added.items()}
            reason = f"{growth}: partitions {sorted(begins)} are read again, so that the newest value of each key is stored last"
            return Move(reason, begins, log, growth, held)
    return Move("its offsets were being moved", {}, log, held=True) if held else None


def move(settings: Settings, client: ConnectClient, what: Move, *, resume: bool = True) -> bool:
    """Stop the connector, move its offsets, and let it go on.

    Args:
        settings: where PostgreSQL and the broker are.
        client: Connect.
        what: the move.
        resume: whether it goes on; otherwise it stays stopped.

    Returns:
        False when the connector's consumers have not left their group yet: the same has to be done again.

    Raises:
        ServiceError: PostgreSQL, the broker or Connect cannot be used; the next look goes on from there.
    """
    if client.state(CONNECTOR).connector not in STANDS_STILL:
        if resume:
            with _database(settings) as connection:
                connection.execute("UPDATE sink_state SET connector_held = true")
        connector.await_stop(client)
    deadline = time.monotonic() + LEAVE_SECONDS
    while not kafka.commit(settings, what.offsets, CONNECTOR_GROUP):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
    if what.growth is not None and what.growth.mixed:
        _sweep(settings, what.growth, what.log)
    if resume:
        client.resume(CONNECTOR)
    with _database(settings) as connection:
        connection.execute("UPDATE sink_state SET connector_log = %s, connector_held = false", [what.log.id])
        if what.growth is not None:
            topic_log.settle(connection, what.growth)
    return True


def _sweep(settings: Settings, growth: Growth, log: TopicLog) -> None:
    """What has moved between old partitions, up to where the connector stands still."""
    low = {number: first for number, (first, _) in kafka.watermarks(settings).items()}
    commits = kafka.committed(settings, CONNECTOR_GROUP)
    try:
        sweep(settings, growth, log, low, lambda _session, number: commits.get(number, 0))
    except psycopg.Error as error:
        raise ServiceError(f"{growth}: what has moved cannot be stored again: {postgres.one_line(error)}") from error


def ensure(settings: Settings, client: ConnectClient) -> list[str]:
    """For provisioning, before it lets the connector run: do the move that is due, and leave the connector stopped.

    Returns:
        One line for what was done.

    Raises:
        ServiceError: PostgreSQL, the broker or Connect cannot be used, or the connector's consumers do not leave.
    """
    if (what := due(settings)) is None:
        return []
    if not move(settings, client, what, resume=False):
        raise ServiceError(
            f"{what.reason}: consumers of the group {CONNECTOR_GROUP} have not left it, although connector {CONNECTOR} is "
            "stopped: see `metrics-pipeline logs connect`, then run the job `provision` again"
        )
    return [what.reason]


@contextmanager
def _database(settings: Settings) -> Iterator[postgres.Connection]:
    with postgres.connect(settings, "metrics_writer", connect_timeout=5) as connection:
        try:
            yield connection
        except psycopg.Error as error:
            raise ServiceError(
                f"which log topic {TOPIC} is cannot be noted: {postgres.one_line(error)}: run the job `provision`"
            ) from error
