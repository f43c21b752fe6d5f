"""The table under measurement: emptied before, timed and compared after."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from metrics_pipeline import postgres
from metrics_pipeline.bench.readings import Reference, Sum, checksum
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import TOPIC, Settings, SinkKind
from metrics_pipeline.verification.comparison import Bounds, Comparison
from metrics_pipeline.verification.spill import ROW, Spill
from metrics_pipeline.verification.table_entries import read_rows, take_snapshot

VACUUM_SECONDS = 60.0
"""How long an autovacuum that is at work is waited for before a round begins."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a look at the table after a round found.

    Attributes:
        first_began: begin of the first transaction that stored a row (`created_at`).
        first_committed: the first commit; None where PostgreSQL does not keep commit times.
        last_committed: the last one; None likewise.
        rows: stored since.
        transactions: that stored them; a transaction with savepoints may count as several.
        rows_after_first: of the transactions that began after the first commit; None without commit times, or without any.
    """

    first_began: datetime
    first_committed: datetime | None
    last_committed: datetime | None
    rows: int
    transactions: int
    rows_after_first: int | None


@dataclass(frozen=True, slots=True)
class Checked:
    """How the table compares with the topic.

    Attributes:
        rows: in the table.
        equal: whether it holds exactly the topic's keys with their values and tags.
        compared: whether each key was compared, not only the checksum of all.
        findings: what is wrong, one line each.
    """

    rows: int
    equal: bool
    compared: bool
    findings: tuple[str, ...] = ()


def empty(connection: postgres.Connection) -> None:
    """Empty the table and what hangs on it, and let PostgreSQL finish what it still has to do for former rounds.

    A COPY sink that has nothing to do may go on running: its offsets stay.

    Args:
        connection: of the superuser, autocommit, to the database of the readings.
    """
    connection.execute("TRUNCATE metrics, summary_inserts, summary_changes, rejected_metrics")
    deadline = time.monotonic() + VACUUM_SECONDS
    while time.monotonic() < deadline:
        if connection.execute("SELECT count(*) FROM pg_stat_progress_vacuum").fetchone() == (0,):
            break
        time.sleep(0.2)
    settle(connection)


def settle(connection: postgres.Connection) -> None:
    """Let PostgreSQL clean up and write out what there is, so that the next measurement does not pay for it."""
    connection.execute("VACUUM (ANALYZE) metrics, summary_inserts, summary_changes, sink_offsets, sink_state")
    connection.execute("CHECKPOINT")


def start_sink_at(connection: postgres.Connection, offsets: Mapping[int, int]) -> None:
    """Let the COPY sink begin at these offsets of the topic."""
    with connection.transaction():
        connection.execute("DELETE FROM sink_offsets WHERE topic = %s", [TOPIC])
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO sink_offsets (topic, partition, next_offset) VALUES (%s, %s, %s)",
                [(TOPIC, partition, offset) for partition, offset in offsets.items()],
            )


def activate(connection: postgres.Connection, sink: SinkKind) -> None:
    """Say which sink stores."""
    connection.execute(postgres.query("sink_activate"), {"active": sink})


def pages(connection: postgres.Connection) -> int:
    """Bytes of the table's pages, all partitions together: cheap enough to be asked many times a second."""
    row: Any = connection.execute(postgres.query("bench_pages")).fetchone()
    return int(row[0])


def clock(connection: postgres.Connection) -> datetime:
    """The server's clock."""
    row: Any = connection.execute("SELECT clock_timestamp()").fetchone()
    now: datetime = row[0]
    return now


def stored(connection: postgres.Connection, since: datetime) -> Stored:
    """What was stored by transactions that began at `since` or later.

    Raises:
        ServiceError: nothing was.
    """
    row: Any = connection.execute(postgres.query("bench_stored"), {"since": since}).fetchone()
    if row is None or row[0] is None:
        raise ServiceError("nothing was stored: see the log of the sink")
    return Stored(*row)


def stored_between(connection: postgres.Connection, begin: datetime, end: datetime) -> int:
    """Rows stored by transactions that began in that time; the end excluded."""
    row: Any = connection.execute(
        "SELECT count(*) FROM metrics WHERE created_at >= %s AND created_at < %s", [begin, end]
    ).fetchone()
    return int(row[0])


def size(connection: postgres.Connection) -> dict[str, int]:
    """Bytes of the table (`heap_bytes`) and of its indexes (`index_bytes`)."""
    heap, index = connection.execute(postgres.query("bench_size")).fetchone() or (0, 0)
    return {"heap_bytes": heap, "index_bytes": index}


def summary_size(connection: postgres.Connection) -> int:
    """Bytes of the tables that the summaries are kept in."""
    (size,) = connection.execute(postgres.query("bench_summary_size")).fetchone() or (0,)
    return int(size)


def check(settings: Settings, reference: Reference, *, full: bool) -> Checked:
    """Compare the table with the topic: by a checksum over all rows, and key by key when asked or when that differs.

    Each bad record of the topic must have become a reject.
    """
    found = Sum()
    with ExitStack() as spills:
        kept = spills.enter_context(Spill(_folder(settings), ROW, reference.records.buckets)) if full else None
        with postgres.connect(settings, "metrics_reader") as connection:
            take_snapshot(connection)
            (rejects,) = connection.execute("SELECT count(*) FROM rejected_metrics").fetchone() or (0,)
            for entries in read_rows(connection):
                found += Sum(len(entries), checksum(entries))
                if kept is not None:
                    kept.append(entries)
        if rejects != reference.bad:
            wrong = f"{rejects:,} rejects, expected {reference.bad:,}"
            return Checked(found.count, False, compared=False, findings=(wrong,))
        expected = Sum(reference.count, reference.checksum)
        if kept is None:
            equal = found == expected
            return Checked(found.count, True, compared=False) if equal else check(settings, reference, full=True)
        findings = _findings(reference, kept, _folder(settings))
    if not findings:
        findings = differences(found, expected)
    return Checked(found.count, not findings, compared=True, findings=findings)


def sum_of(
    settings: Settings, progress: Callable[[int], None] = lambda _: None, *, before: datetime | None = None
) -> Sum:
    """The sum of all rows of the table, or of those that were published before."""
    found = Sum()
    with postgres.connect(settings, "metrics_reader") as connection:
        take_snapshot(connection)
        for entries in read_rows(connection, before):
            found += Sum(len(entries), checksum(entries))
            progress(found.count)
    return found


def differences(found: Sum, expected: Sum) -> tuple[str, ...]:
    """What of the table's sum is not as that of the topic: nothing when they are equal."""
    if found == expected:
        return ()
    rows = f"{found.count:,} rows with checksum {found.checksum:x}"
    return (f"{rows}, expected {expected.count:,} with {expected.checksum:x}",)


def _folder(settings: Settings) -> Path:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    return settings.data_dir


def _findings(reference: Reference, rows: Spill, folder: Path) -> tuple[str, ...]:
    with Comparison(Bounds(reference.low, reference.ends), folder) as comparison:
        for number in range(rows.buckets):
            comparison.bucket(reference.records.bucket(number), rows.bucket(number))
        counts = comparison.finish()
    wrong = {"lost": counts.lost, "unexpected": counts.unexpected, "different": counts.different}
    # Where retention deleted records, or another sink wrote before: here neither may be.
    wrong |= {"unverifiable": counts.unverifiable, "signless_zero": counts.signless_zero}
    totals = tuple(f"{count:,} {what}" for what, count in wrong.items() if count)
    examples = tuple(
        f"{finding.kind}: device_id {finding.device_id}, published_at {finding.published_at}, "
        f"metric_name {finding.metric_name}: record {finding.record_value!r}, row {finding.row_value!r}"
        for finding in comparison.findings[:3]
    )
    return totals + examples if totals else ()
