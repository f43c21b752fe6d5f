"""Which log the topic's name stands for, as the database has it, and what a growth of its partitions asks of the sinks.

An offset means nothing without the log that it is of. So each note of an offset carries the log's id, and whoever finds
that the name stands for another log now begins at that log's earliest record: storing again what is stored changes nothing.

Partitions that are added move keys. Records of one key then stand in two partitions, and a sink that lags may store the newer
one first. What follows from that, for a growth from n to m partitions where m is a multiple of n, the only growth that
`provision` makes:

- A key stays where it is, or moves to a new partition: its hash modulo m is, modulo n, its hash modulo n.
- So once no producer partitions by n any more, all that is older lies in the old partitions before their ends of that
  moment (`passed`), and all that is newer of a key that moved lies in the new ones.
- When the sink has passed those ends, everything older is stored. It then reads the new partitions once more from their
  beginning: the newest record of each key is the last one that it stores.

A producer may know the former count for as long as it does not ask for metadata: TOPIC_REFRESH_SECONDS. So a growth is settled
twice, at once for nearly all keys, and once more when that time is over. Growths are settled in the order in which they
came, since what the first one reads again may be older than what the second one moved.

A growth by somebody else to a number that is no multiple moves keys between old partitions, too. There the records of former and
of new partitions of a key stand side by side, so to read them again would not do. Instead those that stand where their key has come to
(`sweep`) are stored once more, from where the new partitions began (`begins`), a minute before that to be sure. For as long as a producer
goes on by the former count, newer records of a key that it writes lose against older ones of others: which is why `provision` refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from metrics_pipeline import kafka, postgres
from metrics_pipeline.kafka import TopicLog
from metrics_pipeline.settings import TOPIC, Settings

MARGIN_SECONDS: Final = 60.0
"""How long before the first record in a new partition others may have been partitioned by the new count already."""
STAYS: Final = -1
"""Stands for the offset of a partition that is not read again."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Partitions that were added, and what is known of it.

    Attributes:
        id: in the order in which they came.
        before: partitions that there were.
        after: and that there are.
        passed: by partition of before, the offset that the sink has to have reached; empty until it is due.
        begins: by partition, the offset from which it is read, or looked through, again; those that stay are left out.
        due: whether `passed` may be noted.
        noticed_at: seconds since 1970.
    """

    id: int
    before: int
    after: int
    passed: Mapping[int, int]
    begins: Mapping[int, int]
    due: bool
    noticed_at: float

    @property
    def added(self) -> dict[int, int]:
        """Of `begins`, the partitions that were added: they are read again."""
        return {number: begin for number, begin in self.begins.items() if number >= self.before}

    @property
    def mixed(self) -> dict[int, int]:
        """Of `begins`, the former ones, to which keys have come from each other: what has come is stored again."""
        return {number: begin for number, begin in self.begins.items() if number < self.before}

    def __str__(self) -> str:
        return f"topic {TOPIC} grew from {self.before} to {self.after} partitions"

    def reached(self, offsets: Mapping[int, int], low: Mapping[int, int]) -> bool:
        """Whether a sink that stands at these offsets has stored everything older than the growth."""
        return bool(self.passed) and all(
            max(offsets.get(number, 0), low.get(number, 0)) >= end for number, end in self.passed.items()
        )


def note(connection: postgres.Connection, log: TopicLog, refresh_seconds: float) -> str | None:
    """Note that the topic's name stands for this log, with so many partitions, and commit.

    Args:
        connection: of the role `metrics_writer`.
        log: as the broker told just now.
        refresh_seconds: how long a producer may go on with the former number of partitions.

    Returns:
        What is new about it, or None.

    Raises:
        psycopg.Error: PostgreSQL cannot be used.
    """
    news = None
    present = connection.execute(postgres.query("topic_log_present"), {"topic": TOPIC}).fetchone()
    if present is None or present[0] != log.id:
        connection.execute("SELECT note_topic_log(%s, %s, %s)", [TOPIC, log.id, log.partitions])
        if present is not None:
            news = f"topic {TOPIC} is another one: log {log.id}, before {present[0]}"
        present = connection.execute(postgres.query("topic_log_present"), {"topic": TOPIC}).fetchone()
    if present is not None and present[0] == log.id and present[1] < log.partitions:
        values = {
            "topic": TOPIC,
            "log_id": log.id,
            "before": present[1],
            "after": log.partitions,
            "seconds": refresh_seconds,
        }
        if connection.execute(postgres.query("topic_growth_note"), values).rowcount:
            news = f"topic {TOPIC} grew from {present[1]} to {log.partitions} partitions"
    connection.commit()
    return news


def present(connection: postgres.Connection) -> str:
    """The id of the log that the topic's name stood for when it was last looked at; nothing when nobody did.

    Raises:
        psycopg.Error: PostgreSQL cannot be used.
    """
    row = connection.execute(postgres.query("topic_log_present"), {"topic": TOPIC}).fetchone()
    return str(row[0]) if row else ""


def oldest_growth(connection: postgres.Connection, log: TopicLog) -> Growth | None:
    """The growth that is to be settled next, if there is one.

    Raises:
        psycopg.Error: PostgreSQL cannot be used.
    """
    row = connection.execute(postgres.query("topic_growth_oldest"), {"topic": TOPIC, "log_id": log.id}).fetchone()
    if row is None:
        return None
    number, before, after, passed, begins, due, noticed_at = row
    return Growth(
        number,
        before,
        after,
        dict(enumerate(passed or [])),
        {at: begin for at, begin in enumerate(begins or []) if begin != STAYS},
        due,
        noticed_at,
    )


def measure(connection: postgres.Connection, settings: Settings, growth: Growth) -> None:
    """Note, once a growth is due, what the sink has to pass, and from where it then reads again; and commit.

    Raises:
        psycopg.Error: PostgreSQL cannot be used.
        ServiceError: the broker cannot be used.
    """
    if growth.passed or not growth.due:
        return
    marks = kafka.watermarks(settings)
    begins = [STAYS] * growth.before
    if growth.after % growth.before:
        first = kafka.first_append(settings, range(growth.before, growth.after))
        since = min(growth.noticed_at, first if first is not None else growth.noticed_at) - MARGIN_SECONDS
        found = kafka.offsets_at(settings, int(since * 1000))
        begins = [found[number] for number in range(growth.before)]
    begins += [marks[number][0] if number in marks else 0 for number in range(growth.before, growth.after)]
    passed = [marks[number][1] for number in range(growth.before)]
    connection.execute(
        postgres.query("topic_growth_measure"), {"growth_id": growth.id, "passed": passed, "begins": begins}
    )
    connection.commit()


def settle(connection: postgres.Connection, growth: Growth) -> bool:
    """Note that a growth is settled, in the connection's transaction; False when it was already.

    Raises:
        psycopg.Error: PostgreSQL cannot be used.
    """
    return connection.execute(postgres.query("topic_growth_settle"), {"growth_id": growth.id}).rowcount == 1
