"""The topic against the table, key by key and value by value over the offsets retained, and the producers' runs against both.

Works while producers and the sink run: what must be in the table is what the sink had committed before the table was read
in one snapshot; what arrived between that and the snapshot may be there or not. Records and rows are split by key
on disk and compared part by part, so memory stays bounded.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from metrics_pipeline import kafka, postgres
from metrics_pipeline.errors import InstallError, RecordError, ServiceError
from metrics_pipeline.metric import MetricName, decode
from metrics_pipeline.settings import TOPIC, Settings
from metrics_pipeline.sinks import active
from metrics_pipeline.topic import TopicReader
from metrics_pipeline.verification.claims import Claim, anomalies, unclaimed
from metrics_pipeline.verification.comparison import Bounds, Comparison, ComparisonCounts, KeyFinding
from metrics_pipeline.verification.spill import RECORD, ROW, Spill, buckets_for
from metrics_pipeline.verification.table_entries import read_rows, reading, take_snapshot
from metrics_pipeline.verification.topic_entries import TopicDecoder, dead_letters, rejected, together

EXAMPLES = 10
"""Keys named of each kind of finding."""

LEDGER_SECONDS = 3.0
"""By when a run has written down what it was acknowledged: it writes about every second."""

WATCHER_SECONDS = 60.0
"""By when the watcher has put right what Kafka Connect made of a bad record."""

ShowProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0: unknown)."""


@dataclass
class VerifyReport:
    """What `verify` found.

    Attributes:
        records: messages read from the topic.
        rows: rows in the table.
        counts: what the comparison of their keys and values found.
        tombstones: messages without a value, which the sinks skip.
        undecodable: messages that are not the wire format, by reason.
        unaccounted: such messages that the sink had passed and that stand neither among the dead letters nor the rejects.
        acknowledged: what the producers' runs counted, over all runs still in the ledger.
        unclaimed: records that no run wrote down: of other producers, or the last ones of a run that was killed.
        anomalies: signs that an acknowledged record is not in the topic.
        former: records that were acknowledged in a former log of the topic's name, which nothing can verify, by that log.
        growing: growths of partitions that the sink has not settled yet: until then an older value may stand in the table.
        retained: first offset and the offset after the last compared, per partition.
        examples: findings, up to ten of each kind, one line each.
        seconds: how long it took.
        strict: whether a lost sign of -0.0 counts as a difference.
    """

    records: int = 0
    rows: int = 0
    counts: ComparisonCounts = field(default_factory=ComparisonCounts)
    tombstones: int = 0
    undecodable: dict[str, int] = field(default_factory=dict)
    unaccounted: int = 0
    acknowledged: int = 0
    unclaimed: int = 0
    anomalies: list[str] = field(default_factory=list)
    former: dict[str, int] = field(default_factory=dict)
    growing: list[str] = field(default_factory=list)
    retained: dict[int, tuple[int, int]] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    seconds: float = 0.0
    strict: bool = False

    @property
    def clean(self) -> bool:
        """Whether nothing is lost, unexpected, different or unaccounted for."""
        counts = self.counts
        wrong = counts.lost + counts.unexpected + counts.different + self.unaccounted + len(self.anomalies)
        return not wrong and not (self.strict and counts.signless_zero)

    def document(self) -> dict[str, Any]:
        """The report as one JSON object."""
        document = asdict(self)
        return {"clean": self.clean, **document.pop("counts"), **document}

    def lines(self) -> list[str]:
        """The report for people: the verdict, the counts that matter, then each finding."""
        counts = self.counts
        verdict = "clean" if self.clean else "NOT CLEAN"
        lines = [
            f"{verdict}: {self.records:,} records, {self.rows:,} rows, {counts.compared:,} compared in {self.seconds:.1f} s",
            f"{counts.lost:,} lost, {counts.unexpected:,} unexpected, {counts.different:,} different",
            f"{self.unaccounted:,} records unaccounted for, {len(self.anomalies):,} anomalies in the ledger",
        ]
        notes = {
            "records of a time that has been dropped from the table (expired)": counts.expired,
            "rows older than the records retained, which nothing can verify": counts.unverifiable,
            "rows that hold 0.0 where the record says -0.0": counts.signless_zero,
            "valid records among the dead letters and rejects": counts.rejected,
            "messages that are not the wire format": sum(self.undecodable.values()),
            "tombstones": self.tombstones,
            "records that no producer run wrote down": self.unclaimed,
        }
        lines += [f"{count:,} {what}" for what, count in notes.items() if count]
        lines += [
            f"{count:,} records were acknowledged in log {log}, which has topic {TOPIC}'s name no more: nothing can verify them"
            for log, count in self.former.items()
        ]
        return lines + self.growing + self.anomalies[:EXAMPLES] + self.examples


def verify(
    settings: Settings, *, timeout: float = 120.0, strict: bool = False, progress: ShowProgress | None = None
) -> VerifyReport:
    """Compare the topic with the table.

    Args:
        settings: where broker and PostgreSQL are, and the data folder, which needs 130 bytes a record for the time it takes.
        timeout: seconds without progress after which waiting for the sink is given up.
        strict: count a lost sign of -0.0, which the JDBC sink does not keep, as a difference.
        progress: told how far it is.

    Raises:
        ServiceError: broker or PostgreSQL cannot be used, or the sink does not advance.
        InstallError: too little disk.
    """
    progress = progress or (lambda *_: None)
    started = time.monotonic()
    # In this order: a claim read first must lie below an end read later.
    log = kafka.topic_log(settings).id
    with postgres.connect(settings, "metrics_reader") as connection:
        claims, former = _of_log(read_claims(connection), log)
        noticed, others = _logs(connection, log)
        counts_of_partitions, growing = _growths(connection, log)
        begun = connection.execute("SELECT now()").fetchone()
    ends = {partition: high for partition, (_, high) in kafka.watermarks(settings).items()}
    written = time.monotonic() + LEDGER_SECONDS
    _wait_for_sink(settings, ends, timeout, progress)
    _wait_for_watcher(settings, ends)

    with ExitStack() as spills:
        with postgres.connect(settings, "metrics_reader") as connection:
            estimate, retained_from = take_snapshot(connection)
            # All that the snapshot shows is in the topic already.
            marks = kafka.watermarks(settings)
            low = {partition: first for partition, (first, _) in marks.items()}
            stop = {partition: end for partition, (_, end) in marks.items()}
            expected = sum(stop.values()) - sum(low.values())
            folder = _folder(settings, expected * RECORD.itemsize + estimate * ROW.itemsize)
            buckets = buckets_for(max(expected, estimate))
            rows = spills.enter_context(Spill(folder, ROW, buckets))
            for entries in read_rows(connection):
                rows.append(entries)
                progress("reading the table", rows.count, max(estimate, rows.count))
            # A record published again before `ends` was taken has to be in the table by that new record.
            refused = rejected(connection, log, begun[0] if begun else datetime.min.replace(tzinfo=UTC))

        records = spills.enter_context(Spill(folder, RECORD, buckets))
        reader, decoder, read = TopicReader(settings, TOPIC), TopicDecoder(), 0
        for messages in reader.read(low, stop):
            records.append(decoder.entries(messages))
            read += len(messages)
            progress("reading the topic", read, expected)

        dead = dead_letters(settings, noticed if others else None)
        end = {partition: ends.get(partition, 0) for partition in marks}
        bounds = Bounds(
            reader.low,
            end,
            together(dead, refused.waiting),
            bool(others or former),
            counts_of_partitions,
            retained_from,
        )
        comparison = spills.enter_context(Comparison(bounds, folder, EXAMPLES))
        for bucket in range(buckets):
            comparison.bucket(records.bucket(bucket), rows.bucket(bucket))
            progress("comparing", bucket + 1, buckets)
        counts = comparison.finish()

    missing = unaccounted(decoder.undecodable, bounds, together(dead, refused.every))
    return VerifyReport(
        records=read,
        rows=rows.count,
        counts=counts,
        tombstones=decoder.tombstones,
        undecodable=decoder.reasons,
        unaccounted=len(missing),
        acknowledged=sum(claim.acknowledged for claim in claims),
        unclaimed=_unclaimed(settings, log, reader.low, ends, written),
        anomalies=anomalies(claims, ends, reader.holes) + _another(settings, log),
        former=former,
        growing=growing,
        retained={partition: (reader.low[partition], stop[partition]) for partition in marks},
        examples=[_line(finding, settings) for finding in comparison.findings]
        + [_reason(reader, partition, offset) for partition, offset in missing[:EXAMPLES]],
        seconds=time.monotonic() - started,
        strict=strict,
    )


def read_claims(connection: postgres.Connection) -> list[Claim]:
    """What the producers' runs wrote down.

    Raises:
        ServiceError: there is no such table, or PostgreSQL broke off.
    """
    with reading("producer_runs"):
        rows = connection.execute(postgres.query("verify_claims").encode()).fetchall()
    return [
        Claim(run_id, partition, acknowledged, [(start, end) for start, end in ranges], log)
        for run_id, partition, log, acknowledged, ranges in rows
    ]


def _of_log(claims: Sequence[Claim], log: str) -> tuple[list[Claim], dict[str, int]]:
    """The claims whose offsets are of this log, and how many records the others are about, by their log."""
    former: dict[str, int] = {}
    for claim in claims:
        if claim.acknowledged and claim.log not in ("", log):
            former[claim.log] = former.get(claim.log, 0) + claim.acknowledged
    return [claim for claim in claims if claim.log in ("", log)], former


def _logs(connection: postgres.Connection, log: str) -> tuple[datetime | None, list[str]]:
    """When this log was noticed, and the other ones that had the topic's name."""
    with reading("topic_logs"):
        rows = connection.execute(postgres.query("verify_logs"), {"topic": TOPIC}).fetchall()
    return next((at for of, at in rows if of == log), None), [of for of, _ in rows if of != log]


def _growths(connection: postgres.Connection, log: str) -> tuple[list[int], list[str]]:
    """The numbers of partitions by which keys were placed, as far as the sink has settled that, and what it has not."""
    counts: list[int] = []
    growing: list[str] = []
    with reading("topic_growths"):
        rows = connection.execute(postgres.query("verify_growths"), {"topic": TOPIC, "log_id": log}).fetchall()
    for before, after, settled in rows:
        if not settled:
            growing.append(
                f"topic {TOPIC} grew from {before} to {after} partitions, and the sink has not yet read again what came since: "
                "until then the table may hold older values of keys that moved"
            )
        counts = [*(counts or [before]), after]
    return [] if growing else counts, growing


def _another(settings: Settings, log: str) -> list[str]:
    """A sign that the topic was made anew while it was read: what was compared is of two logs."""
    present = kafka.topic_log(settings).id
    return (
        []
        if present == log
        else [f"topic {TOPIC} became another one meanwhile (log {log}, now {present}): verify again"]
    )


def _unclaimed(settings: Settings, log: str, low: Mapping[int, int], ends: Mapping[int, int], until: float) -> int:
    """Records below `ends` that no run wrote down, even after a run that still writes had until then to do so.

    The claims that `anomalies` looks at are too old for this: what was acknowledged in the second before `ends` was taken
    stood in no ledger then.
    """
    while True:
        with postgres.connect(settings, "metrics_reader") as connection, reading("producer_runs"):
            runs = connection.execute(postgres.query("exporter_producer"), {"seconds": LEDGER_SECONDS}).fetchone()
            count = unclaimed(_of_log(read_claims(connection), log)[0], low, ends)
        if not count or runs != (True,) or time.monotonic() > until:
            return count
        time.sleep(0.2)


def unaccounted(
    undecodable: Mapping[int, Sequence[int]], bounds: Bounds, known: Mapping[int, npt.NDArray[np.int64]]
) -> list[tuple[int, int]]:
    """Partition and offset of each undecodable record that the sink had passed and that is not known as such."""
    return [
        (partition, offset)
        for partition, offsets in sorted(undecodable.items())
        for offset in np.setdiff1d(offsets, known.get(partition, [])).astype(int).tolist()
        if bounds.low[partition] <= offset < bounds.end[partition]
    ]


def _wait_for_sink(settings: Settings, ends: Mapping[int, int], timeout: float, progress: ShowProgress) -> None:
    """Return once the active sink's offsets have reached `ends`."""
    best, since = -1, time.monotonic()
    while True:
        offsets = active.offsets(settings)
        low = {partition: first for partition, (first, _) in kafka.watermarks(settings).items()}
        behind = {
            partition: end - max(offsets.get(partition, 0), low.get(partition, 0))
            for partition, end in ends.items()
            if end > offsets.get(partition, 0) and end > low.get(partition, 0)
        }
        if not behind:
            return
        done = sum(ends.values()) - sum(behind.values())
        progress("waiting for the sink", done, sum(ends.values()))
        if done > best:
            best, since = done, time.monotonic()
        elif time.monotonic() - since > timeout:
            raise ServiceError(
                f"the sink ({active.kind(settings)}) has not advanced for {timeout:.0f} s and is {sum(behind.values()):,} records "
                "behind: see `metrics-pipeline status`, then verify again"
            )
        time.sleep(0.2)


def _wait_for_watcher(settings: Settings, ends: Mapping[int, int]) -> None:
    """Return once the watcher beside Kafka Connect has noted and put right what is bad before `ends`; it is not waited for long."""
    deadline = time.monotonic() + WATCHER_SECONDS
    values = {"topic": TOPIC, "partitions": list(ends), "ends": list(ends.values())}
    while active.kind(settings) == "connect" and time.monotonic() < deadline:
        with postgres.connect(settings, "metrics_reader", autocommit=True) as connection, reading("watcher_offsets"):
            if connection.execute(postgres.query("verify_watched").encode(), values).fetchone() != (True,):
                return
        time.sleep(0.2)


def _folder(settings: Settings, needed: int) -> Path:
    """The folder for what does not fit in memory, when its disk has room."""
    folder = settings.data_dir
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InstallError(
            f"{folder}: comparing topic and table takes about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free: "
            "free some, or set PIPELINE_DATA_DIR to a larger disk"
        )
    return folder


def _line(finding: KeyFinding, settings: Settings) -> str:
    """One finding for people: the key, where its record is, and both values."""
    name = MetricName(finding.metric_name).name.lower()
    text = (
        f"{finding.kind}: device_id {finding.device_id}, published_at {finding.published_at}, "
        f"metric_name {finding.metric_name} ({name}), partition {finding.partition}"
    )
    if finding.offset is not None:
        text += f", offset {finding.offset}: record {finding.record_value!r}"
    else:
        text += ": no record"
    text += ", no row" if finding.row_value is None else f", row {finding.row_value!r}"
    if finding.tags_differ and finding.offset is not None:
        message = TopicReader(settings, TOPIC).one(finding.partition, finding.offset)
        key = (finding.device_id, finding.published_at, finding.metric_name)
        with postgres.connect(settings, "metrics_reader") as connection:
            row = connection.execute(postgres.query("verify_tags").encode(), key).fetchone()
        tags = decode(message.key(), message.value()).tags if message else "no longer retained"
        text += f"; tags: record {tags}, row {row[0] if row else 'deleted since'}"
    return text


def _reason(reader: TopicReader, partition: int, offset: int) -> str:
    message = reader.one(partition, offset)
    try:
        reason = "no longer retained" if message is None else str(decode(message.key(), message.value()))
    except RecordError as error:
        reason = str(error)
    return f"unaccounted: partition {partition}, offset {offset}: {reason}; neither among the dead letters nor among the rejects"
