"""`metrics-pipeline …`: every command of the pipeline."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from metrics_pipeline.bench.cli import bench
from metrics_pipeline.compose.commands import container
from metrics_pipeline.errors import BusyError, PipelineError, SettingError
from metrics_pipeline.settings import Settings, producer_overrides

if TYPE_CHECKING:  # it brings the HTTP server, which most commands need not load
    from metrics_pipeline.producer.endpoints import Snapshot

app = typer.Typer(
    name="metrics-pipeline",
    help="Sensor readings through Kafka into PostgreSQL, run by Dagster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
migrations = typer.Typer(help="The database schema: sql/migrations, applied by dbmate.", no_args_is_help=True)
app.add_typer(migrations, name="migrate")
app.add_typer(bench, name="bench")
app.add_typer(container, name="container")
refused = typer.Typer(help="The records that were rejected.", no_args_is_help=True)
app.add_typer(refused, name="rejects")
parted = typer.Typer(help="The partitions of the table of the readings.", no_args_is_help=True)
app.add_typer(parted, name="partitions")
archived = typer.Typer(help="Partitions that are kept as Parquet in METRICS_ARCHIVE.", no_args_is_help=True)
app.add_typer(archived, name="archive")

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


class OnError(StrEnum):
    """What a replay does at a bad line."""

    stop = "stop"
    skip = "skip"


def main() -> None:
    """Entry point: errors that people can act on become one line and an exit code."""
    logging.basicConfig(
        level=os.environ.get("LOG_LEVEL", "WARNING"), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # What librdkafka says of each lost connection is said again, once and with its next step, by the command itself.
    logging.getLogger("metrics_pipeline.librdkafka").setLevel(logging.CRITICAL)
    try:
        app()
    except PipelineError as error:
        err.print("[bold red]error:[/]", Text(str(error)))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _say(text: str) -> None:
    out.print(text, markup=False)


def _version(asked: bool) -> None:
    if asked:
        _say(f"metrics-pipeline {metadata.version('metrics-pipeline')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="the installed version")
    ] = False,
) -> None:
    """What stands before the command."""


@app.command()
def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="run in the background; `down` ends it")] = False,
    free_ports: Annotated[bool, typer.Option("--free-ports", help="move busy ports to free ones")] = False,
    brokers: Annotated[
        int | None, typer.Option("--brokers", help="1, or 3 that keep each record three times; kept in the env file")
    ] = None,
    connect_workers: Annotated[
        int | None, typer.Option("--connect-workers", help="Connect workers in one group; kept in the env file")
    ] = None,
    exporter: Annotated[
        bool | None, typer.Option("--exporter/--no-exporter", help="run the exporter, too; kept in the env file")
    ] = None,
) -> None:
    """Start everything, provision it, and keep it running until Ctrl-C."""
    from metrics_pipeline.local import background
    from metrics_pipeline.local.keeper import Keeper
    from metrics_pipeline.local.live import LiveTable

    given = {"KAFKA_BROKERS": brokers, "CONNECT_WORKERS": connect_workers, "EXPORTER": exporter}
    chosen = {name: str(value).lower() for name, value in given.items() if value is not None}
    # An option is a variable for this process and its children; the keeper notes it for other terminals.
    os.environ.update(chosen)
    settings = Settings.load()
    if detach:
        options = [f"--brokers={brokers}"] if brokers is not None else []
        options += [f"--connect-workers={connect_workers}"] if connect_workers is not None else []
        options += ["--exporter" if exporter else "--no-exporter"] if exporter is not None else []
        background.start(settings, [*options, *(["--free-ports"] if free_ports else [])], _say)
        return
    with Keeper(settings, _say, free_ports=free_ports, chosen=chosen) as keeper:
        keeper.start()
        if keeper.stopping:
            raise typer.Exit(keeper.exit_code)
        settings = keeper.settings
        sink = (
            f"Connect: {settings.connect_rest}" if settings.sink == "connect" else f"sink: {settings.sink_http}/health"
        )
        _say(
            f"\nThe pipeline runs. Dagster UI: {settings.dagster_http}   producer: {settings.producer_http}/health   {sink}"
        )
        _say(f"Data and logs: {settings.data_dir}. Ctrl-C stops everything in order; the data stays.\n")
        with LiveTable(settings, out) as live:
            keeper.run(live.show)
    _say("Everything has stopped; nothing was lost. `metrics-pipeline up` goes on where it ended.")


@app.command()
def down() -> None:
    """Stop everything that `up` started, in order."""
    from metrics_pipeline.local.keeper import stop_running

    _say("Stopped." if stop_running(Settings.load(), _say) else "Nothing was running.")


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False) -> None:
    """What runs and how fast; exit code 0 only when all is healthy."""
    from metrics_pipeline.local.live import table
    from metrics_pipeline.local.status import Sampler, is_healthy

    sampler = Sampler(Settings.load())
    sampler.sample()
    time.sleep(2)
    sample = sampler.sample()
    if as_json:
        print(json.dumps(sample))  # noqa: T201  # machines read it: no markup, no wrapping
    else:
        out.print(table(sample))
    raise typer.Exit(0 if is_healthy(sample) else 1)


@app.command()
def logs(
    service: Annotated[
        str | None,
        typer.Argument(
            help="postgres, broker, connect, sink, watcher, code, webserver, daemon, provision, keeper; default: all"
        ),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="lines from each")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on as new lines come")] = False,
) -> None:
    """The end of the services' logs."""
    from metrics_pipeline.local.service import tail

    folder = Settings.load().data_dir / "logs"
    names = sorted(path.stem for path in folder.glob("*.log"))
    if service is not None and service not in names:
        raise SettingError(f"no log of {service!r} in {folder}: there are {', '.join(names) or 'none yet'}")
    chosen = [service] if service else names
    for name in chosen:
        for line in tail(folder / f"{name}.log", lines):
            _say(line if service else f"{name}: {line}")
    if follow:
        _follow({name: folder / f"{name}.log" for name in chosen}, prefix=service is None)


def _follow(paths: dict[str, Path], *, prefix: bool) -> None:
    places = {name: path.stat().st_size for name, path in paths.items()}
    while True:
        for name, path in paths.items():
            size = path.stat().st_size
            if size < places[name]:  # rotated
                places[name] = 0
            with path.open("rb") as file:
                file.seek(places[name])
                text = file.read()
            places[name] += len(text)
            for line in text.decode(errors="replace").splitlines():
                _say(f"{name}: {line}" if prefix else line)
        time.sleep(0.5)


@app.command()
def doctor() -> None:
    """What this machine has, what the stack would use, and what is in the way."""
    from metrics_pipeline.local.doctor import examine

    settings = Settings.load()
    findings = examine(settings)
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark = {True: "[green]ok[/]", False: "[red]no[/]", None: "  "}[finding.ok]
        out.print(f"{mark}  {finding.what:<{width}} ", Text(finding.value))
    raise typer.Exit(1 if any(finding.ok is False for finding in findings) else 0)


@app.command()
def reset(yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False) -> None:
    """Delete all data and logs of this stack. Settings and downloaded jars stay."""
    from metrics_pipeline.local import lock
    from metrics_pipeline.local.account import postgres_home, unprivileged
    from metrics_pipeline.local.keeper import leftovers
    from metrics_pipeline.local.state import StackState

    settings = Settings.load()
    if not settings.data_dir.exists():
        _say(f"There is nothing to delete: {settings.data_dir} does not exist.")
        return
    with lock.take(settings.data_dir):
        if left := leftovers(settings, StackState.read(settings.data_dir)):
            raise BusyError(f"services of this stack still run ({', '.join(left)}): `metrics-pipeline down` first")
        home = postgres_home(settings.data_dir, unprivileged())
        folders = [settings.data_dir]
        if home.exists() and not home.is_relative_to(settings.data_dir):
            folders.append(home)
        if not yes and not typer.confirm(f"Delete {' and '.join(map(str, folders))} with all stored readings?"):
            raise typer.Exit(1)
        for folder in folders:
            shutil.rmtree(folder)
    _say("Deleted. `metrics-pipeline up` starts afresh.")


@migrations.command("up")
def migrate_up() -> None:
    """Apply the migrations that are not applied yet."""
    from metrics_pipeline import postgres

    applied = postgres.migrate(Settings.load())
    _say(f"applied {', '.join(applied)}" if applied else "nothing to apply: the schema is at its newest migration")


@migrations.command("new")
def migrate_new(name: Annotated[str, typer.Argument(help="what it does: add_humidity_index")]) -> None:
    """Write a migration file to fill in."""
    from metrics_pipeline import postgres

    _say(f"fill in {postgres.new_migration(name)}")


@migrations.command("status")
def migrate_status() -> None:
    """Which migrations are applied; exit code 1 when some are not, or the database has some that are not here."""
    from metrics_pipeline import postgres

    state = postgres.migration_status(Settings.load())
    for version in state.applied:
        _say(f"applied  {version}")
    for version in state.pending:
        _say(f"pending  {version}")
    for version in state.missing:
        _say(f"unknown  {version}: applied by a newer metrics-pipeline; use that one")
    raise typer.Exit(0 if state.at_head else 1)


@migrations.command("rollback")
def migrate_rollback() -> None:
    """Undo the newest migration."""
    from metrics_pipeline import postgres

    undone = postgres.rollback(Settings.load())
    _say(f"rolled back {undone}" if undone else "nothing to roll back: no migration is applied")


@app.command()
def sql(
    query: Annotated[str | None, typer.Argument(help="a query")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="a file with a query")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="rows separated by tabs, nothing else")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV with a header")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="an array of objects")] = False,
) -> None:
    """Run a query as the read-only role."""
    from metrics_pipeline import postgres

    if (query is None) == (file is None):
        raise SettingError("give either a query or --file")
    if plain + as_csv + as_json > 1:
        raise SettingError("give one of --plain, --csv and --json")
    try:
        text = query if query is not None else file.read_text("utf-8") if file else ""
    except OSError as error:
        raise SettingError(f"--file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"--file {file}: it is not UTF-8 text") from error
    result = postgres.run_sql(Settings.load(), text)
    if plain:
        for row in result.rows:
            sys.stdout.write("\t".join("" if value is None else str(value) for value in row) + "\n")
    elif as_csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(result.columns)
        writer.writerows(result.rows)
    elif as_json:
        objects = [dict(zip(result.columns, row, strict=True)) for row in result.rows]
        sys.stdout.write(json.dumps(objects, default=str, indent=1) + "\n")
    else:
        grid = Table(*result.columns)
        for row in result.rows:
            grid.add_row(*(Text("" if value is None else str(value)) for value in row))
        out.print(grid)
        out.print(f"{len(result.rows)} row{'' if len(result.rows) == 1 else 's'}")


@parted.command("list")
def partitions_list(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """The partitions, oldest first: bounds in UTC, readings (about), bytes with indexes, and which have expired."""
    from metrics_pipeline import partitions, retention

    settings = Settings.load()
    found = partitions.every(settings)
    expired = {one.name for one in retention.expired(settings)}
    if as_json:
        document = [one.document() | {"expired": one.name in expired} for one in found]
        sys.stdout.write(json.dumps({"partitions": document}) + "\n")
        return
    grid = Table("partition", "from", "to", "readings", "MiB", "")
    for one in found:
        low, high = (f"{bound:%Y-%m-%d %H:%M}" if bound else "" for bound in (one.low, one.high))
        mebibytes = f"{one.bytes / 2**20:,.1f}"
        grid.add_row(one.name, low, high, f"{one.rows:,}", mebibytes, "expired" if one.name in expired else "")
    out.print(grid)


@parted.command("make")
def partitions_make() -> None:
    """Make the partitions of the time to come, as the job `partitions` does."""
    from metrics_pipeline import partitions

    made = partitions.make(Settings.load(), report=lambda name: _say(f"made {name}"))
    if not made:
        _say("all of them are there")


@parted.command("drop")
def partitions_drop(
    before: Annotated[
        datetime,
        typer.Option("--before", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"], help="those that end then or earlier, in UTC"),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Drop all partitions that end by a time, oldest first, whatever METRICS_RETENTION says; each is archived before, if METRICS_ARCHIVE is set."""
    from metrics_pipeline import partitions, retention
    from metrics_pipeline.archive import keeping

    settings = Settings.load()
    edge = before.replace(tzinfo=UTC)
    wanted = [one for one in partitions.every(settings) if one.high is not None and one.high <= edge]
    _say(f"{len(wanted)} partitions, {sum(one.bytes for one in wanted) / 2**20:,.1f} MiB")
    if not wanted:
        return
    if not yes and not typer.confirm("Drop them with their readings?"):
        raise typer.Exit(1)
    for one in wanted:
        dropped = retention.drop(settings, one, keeping.keeper(settings))
        _say(f"dropped {one.name}: {dropped.rows:,} readings")


@refused.command("list")
def rejects_list(
    reason: Annotated[str | None, typer.Option("--reason", help="of this reason only")] = None,
    limit: Annotated[int, typer.Option("--limit", help="how many to show", min=0)] = 20,
    every: Annotated[bool, typer.Option("--all", help="also those that were published again")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """The records that were rejected, newest first, and how many there are of each reason."""
    from metrics_pipeline import rejects

    settings = Settings.load()
    records = rejects.newest(settings, reason=reason, limit=limit, every=every)
    counts = rejects.by_reason(settings, reason=reason, every=every)
    if as_json:
        document = {"rejects": [one.document() for one in records], "by_reason": counts}
        sys.stdout.write(json.dumps(document) + "\n")
        return
    grid = Table("partition", "offset", "reason", "rejected", "detail")
    for one in records:
        when = f"{one.rejected_at:%Y-%m-%d %H:%M:%S}" + (" (replayed)" if one.replayed_at else "")
        detail = rejects.printable(one.detail.encode(errors="backslashreplace"), 100)
        grid.add_row(str(one.partition), str(one.offset), Text(one.reason), when, Text(detail))
    if records:
        out.print(grid)
    for name, count in counts.items():
        _say(f"{count:,} {name}")
    _say(f"{sum(counts.values()):,} in all" if counts else "no record is among the rejects")


@refused.command("show")
def rejects_show(
    partition: Annotated[int, typer.Argument(help="of the topic")],
    offset: Annotated[int, typer.Argument(help="in the partition")],
    raw: Annotated[bool, typer.Option("--raw", help="nothing but the payload's bytes, as they are")] = False,
) -> None:
    """One rejected record: why, when, and its bytes with what is not printable escaped."""
    from metrics_pipeline import rejects

    reject, key, payload = rejects.one(Settings.load(), partition, offset)
    if raw:
        sys.stdout.buffer.write(payload or b"")
        return
    _say(f"partition {reject.partition}, offset {reject.offset}: {reject.reason}")
    _say(f"detail    {rejects.printable(reject.detail.encode(errors='backslashreplace'))}")
    _say(f"rejected  {reject.rejected_at.isoformat()}")
    _say(f"replayed  {reject.replayed_at.isoformat() if reject.replayed_at else 'no'}")
    _say(f"key       {rejects.printable(key)}")
    _say(f"payload   {rejects.printable(payload)}")


@refused.command("replay")
def rejects_replay(
    reason: Annotated[str | None, typer.Option("--reason", help="those of this reason")] = None,
    partition: Annotated[int | None, typer.Option("--partition", help="with --offset: one record")] = None,
    offset: Annotated[int | None, typer.Option("--offset", help="with --partition: one record")] = None,
    every: Annotated[bool, typer.Option("--all", help="all that wait")] = False,
) -> None:
    """Publish again the rejected records that have become valid readings; exit code 0 only when all were acknowledged."""
    from metrics_pipeline import rejects

    if (partition is None) != (offset is None):
        raise SettingError("give --partition and --offset together")
    if every == (reason is not None or partition is not None):
        raise SettingError("say which records: --reason, or --partition and --offset, or --all")
    with _stop_on_signals() as stop, _counter() as count:
        done = rejects.replay(
            Settings.load(), rejects.Selection(reason, partition, offset), stop=stop, on_progress=count
        )
    _say(f"{done.published:,} published again")
    for name, number in sorted(done.bad.items()):
        _say(f"{number:,} stay: {name}")
    complete = done.report is not None and done.report.clean and done.published == done.report.acknowledged
    if done.report is not None and not complete:
        _say(f"{done.report.summary()}; nothing was noted: replay again, which changes no row twice")
    raise typer.Exit(0 if complete else 1)


@refused.command("quarantine")
def rejects_quarantine(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Let a connector that a record has stopped go on: store the good records there, and reject the bad ones."""
    from metrics_pipeline.sinks import repair

    taken = repair.quarantine_once(Settings.load())
    if as_json:
        sys.stdout.write(json.dumps(taken.document()) + "\n")
    else:
        for stretch in taken.stretches:
            _say(str(stretch))
        for name, number in sorted(taken.reasons.items()):
            _say(f"{number:,} {name}")
        if not taken.stretches:
            _say(f"none of the next {taken.searched:,} records of a partition is bad; nothing was changed")
        if taken.problem:
            _say(f"not all of it: {taken.problem}")
    raise typer.Exit(0 if taken.stretches and not taken.problem else 1)


@refused.command("purge")
def rejects_purge(
    before: Annotated[datetime, typer.Option("--before", help="rejected before this day or time (UTC)")],
) -> None:
    """Delete old rejected records, except those whose record the topic still holds."""
    from metrics_pipeline import rejects

    deleted, kept = rejects.purge(Settings.load(), before if before.tzinfo else before.replace(tzinfo=UTC))
    _say(f"{deleted:,} deleted" + (f", {kept:,} kept: the topic still holds their records" if kept else ""))


@archived.command("list")
def archive_list(as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False) -> None:
    """The archives there are, and of which partitions; exit code 1 when the manifest of one is damaged."""
    from metrics_pipeline.archive import listing

    found = listing.listed(Settings.load())
    if as_json:
        sys.stdout.write(json.dumps({"archives": [one.document() for one in found]}) + "\n")
    elif not found:
        _say("there is no archive yet: `metrics-pipeline archive make` makes those of the closed partitions")
    else:
        grid = Table(Column("archive", no_wrap=True), "from (UTC)", "to", "rows", "bytes", "made", "in the table")
        for one in found:
            grid.add_row(*(Text(cell) for cell in one.cells()))
        out.print(grid)
    raise typer.Exit(1 if any(one.damage for one in found) else 0)


@archived.command("verify")
def archive_verify(
    names: Annotated[list[str] | None, typer.Argument(help="of archives; default: all")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Read archives and compare them with their manifests; exit code 0 only when no byte has changed and no file is missing."""
    from metrics_pipeline.archive import checking
    from metrics_pipeline.archive.folder import ArchiveFolder

    folder = ArchiveFolder.of(Settings.load())
    with _bar() as show:
        damages = checking.verify(folder, names or [], show)
    count = len(names or folder.names())
    if as_json:
        document = {"archives": count, "damages": [one.document() for one in damages]}
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        for one in damages:
            _say(str(one))
        bad = len({one.archive for one in damages})
        _say(
            f"{count:,} archives read, {bad:,} of them damaged" if bad else f"{count:,} archives are as they were made"
        )
    raise typer.Exit(1 if damages else 0)


@archived.command("make")
def archive_make(
    names: Annotated[
        list[str] | None, typer.Argument(help="of partitions; default: those that are closed and have no archive")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Archive partitions; those that are named also when they have an archive already."""
    from metrics_pipeline.archive import keeping

    settings = Settings.load()
    with _bar() as show:
        chosen = keeping.named(settings, names) if names else keeping.due(settings)
        keep = keeping.make if names else keeping.keep
        kept = [keep(settings, partition, show) for partition in chosen]
    if as_json:
        sys.stdout.write(json.dumps({"archives": [one.archive.document() for one in kept]}) + "\n")
        return
    for one in kept:
        _say(f"{one.archive.name}: {one.archive.sums.rows:,} rows in {one.archive.bytes:,} bytes")
    if not kept:
        _say("nothing to do: each closed partition has its archive")


@archived.command("restore")
def archive_restore(
    begin: Annotated[str, typer.Argument(metavar="FROM|NAME", help="a day or time (UTC), or the name of an archive")],
    end: Annotated[
        str | None, typer.Argument(metavar="TO", help="the day or time before which it ends; default: one day")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Bring readings back into the table, with the same bits: all of each archive that has some of this stretch of time."""
    from metrics_pipeline.archive import restoring

    settings = Settings.load()
    if end is None and (named := restoring.named(settings, begin)):
        chosen = [named]
    else:
        low = _moment("FROM", begin)
        chosen = restoring.between(settings, low, _moment("TO", end) if end else low + timedelta(days=1))
    with _bar() as show:
        for archive in chosen:
            restoring.restore(settings, archive, show)
    if as_json:
        sys.stdout.write(json.dumps({"archives": [archive.document() for archive in chosen]}) + "\n")
        return
    for archive in chosen:
        _say(f"{archive.name}: {archive.sums.rows:,} rows are in the table again")


def _moment(what: str, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise SettingError(
            f"{what} {text!r}: neither an archive nor a time such as 2026-11-27 or 2026-11-27T08:00"
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@app.command()
def verify(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="a lost sign of -0.0 counts as a difference too")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", help="seconds without progress of the sink before giving up")
    ] = 120,
) -> None:
    """Compare topic and table, key by key and value by value; exit code 0 only when nothing is lost, added or changed."""
    from metrics_pipeline.verification.verify import verify as compare

    with _bar() as show:
        report = compare(Settings.load(), timeout=timeout, strict=strict, progress=show)
    if as_json:
        sys.stdout.write(json.dumps(report.document()) + "\n")
    else:
        for line in report.lines():
            _say(line)
    raise typer.Exit(0 if report.clean else 1)


@app.command()
def produce(
    seconds: Annotated[int | None, typer.Option("--seconds", help="how long; default PRODUCER_RUN_SECONDS")] = None,
    changed: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="another setting of the producer for this run; repeatable"),
    ] = None,
) -> None:
    """Publish simulated readings in this process; exit code 0 only when all of them were acknowledged."""
    from metrics_pipeline.producer.run import run_producer

    overrides: dict[str, Any] = {} if seconds is None else {"producer_run_seconds": seconds}
    overrides |= producer_overrides(changed, see="`metrics-pipeline produce --help` and docs/settings.md")
    settings = Settings.load(**overrides)
    with _stop_on_signals() as stop, _counter() as count:
        report = run_producer(settings, stop=stop, on_progress=count)
    _say(report.summary())
    raise typer.Exit(0 if report.clean else 1)


@app.command()
def replay(
    files: Annotated[
        list[Path] | None, typer.Argument(help="CSV, JSON or Parquet, also compressed by gzip, zstd, xz, bz2 or zip")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="read everything and show what would be published, and publish nothing")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="write what was understood as a recipe, for editing and keeping; publish nothing"),
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="FILE|PRESET|list", help="what the files mean; `list` shows the presets"),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="device of all readings: a UUID, or a name")] = None,
    device_column: Annotated[str | None, typer.Option("--device-column", help="column that holds the device")] = None,
    time_column: Annotated[
        list[str] | None,
        typer.Option("--time", help="column that holds the time; twice: the day's, and the time of day's"),
    ] = None,
    time_format: Annotated[
        list[str] | None, typer.Option("--time-format", help="of times, as strptime has it: %d.%m.%Y %H:%M; repeatable")
    ] = None,
    time_unit: Annotated[
        str | None, typer.Option("--time-unit", help="what numbers that are times count: s, ms, us, ns, excel, date")
    ] = None,
    date_order: Annotated[
        str | None, typer.Option("--date-order", help="of dates such as 01/02/2024: dmy, mdy, ymd")
    ] = None,
    tz: Annotated[
        str | None, typer.Option("--tz", help="zone of times that name none: Europe/Berlin, +01:00; default UTC")
    ] = None,
    ignore_offset: Annotated[
        bool, typer.Option("--ignore-offset", help="take all times in --tz, whatever zone they name")
    ] = False,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="COLUMN=METRIC", help="a column (or a name, in a long file) not named as its metric is"
        ),
    ] = None,
    unit: Annotated[
        list[str] | None,
        typer.Option(
            "--unit", metavar="METRIC=UNIT", help="unit of a metric or a column: temperature=degF, pressure=Pa"
        ),
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option("--scale", metavar="METRIC=FACTOR", help="multiply a metric or a column by this first"),
    ] = None,
    missing: Annotated[
        list[str] | None, typer.Option("--missing", help="a value that means none: -200; repeatable")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="COLUMN=VALUE", help="only records with this value; repeatable"),
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option("--leave-out", help="a column not to look at; repeatable")
    ] = None,
    long_names: Annotated[
        str | None,
        typer.Option("--names", help="in a file with one reading a line: column that says what was measured"),
    ] = None,
    long_values: Annotated[str | None, typer.Option("--values", help="and the column with the value")] = None,
    decimal: Annotated[str | None, typer.Option("--decimal", help="mark before decimals: , or .")] = None,
    separator: Annotated[
        str | None, typer.Option("--separator", help="between cells: a character, tab, or blanks")
    ] = None,
    header: Annotated[
        int | None, typer.Option("--header", help="line with the names of the columns; 0: there is none")
    ] = None,
    encoding: Annotated[str | None, typer.Option("--encoding", help="of text: utf-8, cp1252, utf-16, …")] = None,
    records: Annotated[
        str | None, typer.Option("--records", help="where in a JSON document the records are: data.rows")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option("--select", metavar="SQL", help="a query over the table `input`, whose result is replayed"),
    ] = None,
    allow_implausible: Annotated[
        bool, typer.Option("--allow-implausible", help="publish values that are not possible for their metric, too")
    ] = False,
    on_error: Annotated[
        OnError, typer.Option("--on-error", help="when a line is bad: publish nothing, or leave it out and count it")
    ] = OnError.stop,
    rate: Annotated[float | None, typer.Option("--rate", help="messages a second; default: as fast as it goes")] = None,
) -> None:
    """Publish readings out of files; exit code 0 only when all of them were acknowledged."""
    from metrics_pipeline.replay.publishing import listed_presets, prepared, publish
    from metrics_pipeline.replay.recipe import checked_recipe, find_recipe, parse_mapping, parse_pairs, written

    if recipe == "list":
        for line in listed_presets():
            _say(line)
        return

    def floats(pairs: dict[str, str]) -> dict[str, float]:
        try:
            return {left: float(right) for left, right in pairs.items()}
        except ValueError as error:
            raise SettingError(f"--scale: {error}") from error

    conditions: dict[str, list[str]] = {}
    for text in where or []:
        for left, right in parse_pairs("--where", [text], "COLUMN=VALUE").items():
            conditions.setdefault(left, []).append(right)
    said = {
        "file": {
            "encoding": encoding,
            "separator": separator,
            "header": header,
            "decimal": decimal,
            "records": records,
        },
        "time": {
            "columns": time_column or [],
            "formats": time_format or [],
            "unit": time_unit,
            "order": date_order,
            "zone": tz,
            "ignore_offset": ignore_offset or None,
        },
        "device": {"name": device, "column": device_column},
        "long": {"names": long_names, "values": long_values},
        "metrics": [part.model_dump(exclude_unset=True) for part in parse_mapping(mapping or [])],
        "units": parse_pairs("--unit", unit or [], "METRIC=UNIT"),
        "scales": floats(parse_pairs("--scale", scale or [], "METRIC=FACTOR")),
        "missing": missing or [],
        "where": conditions,
        "leave_out": leave_out or [],
    }
    if device is not None and device_column is not None:
        raise SettingError("--device and --device-column exclude each other: give one")
    meant = checked_recipe(said | ({"select": select} if select else {}), "options")
    if recipe is not None:
        meant = meant.over(find_recipe(recipe))
    settings = Settings.load()
    with prepared(
        settings, files or [], meant, skip_bad=on_error is OnError.skip, allow_implausible=allow_implausible
    ) as source:
        if plan:
            for one in source.recipes()[:1]:
                sys.stdout.write(written(one))
            return
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with (
            _stop_on_signals() as stop,
            Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress,
        ):
            task = progress.add_task("looking", total=source.total_bytes)

            def looking() -> bool:
                progress.update(task, completed=source.bytes_read)
                return stop.is_set()

            found = source.look(looking)
            for line in found.summary():
                _say(line)
            if stop.is_set():
                raise KeyboardInterrupt
            if dry_run:
                for line in found.text():
                    _say(line)
                source.refuse()
                return
            source.refuse()

            def show(snapshot: Snapshot) -> None:
                progress.update(
                    task, completed=source.bytes_read, description=f"{snapshot.acknowledged:,} acknowledged"
                )

            progress.update(task, description="replaying", completed=0)
            report = publish(settings, source, stop=stop, on_progress=show, messages_per_second=rate)
    for line in found.text():
        _say(line)
    _say(report.summary())
    raise typer.Exit(0 if report.clean else 1)


@app.command()
def sink(
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="processes that share the partitions; default SINK_WORKERS")
    ] = None,
) -> None:
    """Run the COPY sink until Ctrl-C; it stores while `provision` has made it the active one (SINK=copy)."""
    from metrics_pipeline.copy_sink.supervisor import Supervisor

    settings = Settings.load()
    with _stop_on_signals() as stop:
        supervisor = Supervisor(settings, workers or settings.sink_workers)
        clean = supervisor.run(stop)
    total, _ = supervisor.report()
    _say(
        f"{total.rows:,} rows stored, {sum(total.rejected.values()):,} records rejected, {total.tombstones:,} tombstones"
    )
    raise typer.Exit(0 if clean else 1)


@app.command()
def watch(
    alive: Annotated[
        Path | None, typer.Option("--alive", help="a file that is touched while it gets on, for health checks")
    ] = None,
) -> None:
    """Name what Kafka Connect stores in another form than it has, and put it right, until Ctrl-C."""
    # Before numpy is there: its matrices are small, and threads of its own would only take turns with ours.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from metrics_pipeline.watcher.watch import Watcher

    watcher = Watcher(Settings.load(), alive)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: watcher.stop())
    watcher.run()


@app.command()
def exporter() -> None:
    """Serve Prometheus metrics of PostgreSQL, lag, table sizes, Dagster's runs and each part's health, until Ctrl-C."""
    from metrics_pipeline.exporter import Exporter

    server = Exporter(Settings.load())
    server.start()
    try:
        with _stop_on_signals() as stop:
            _say(f"http://127.0.0.1:{server.port}/metrics")
            stop.wait()
    finally:
        server.stop()


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal acts as ever."""
    stop = threading.Event()
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        for number, handler in former.items():
            signal.signal(number, handler)

    for number in former:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """Shows what is done and how far it is, of a total that may not be known yet."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("looking")

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total or None)

        yield show


@contextmanager
def _counter() -> Iterator[Callable[[Snapshot], None]]:
    """Shows a producer's snapshots on the terminal, in one line that stays up to date."""
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), console=err, transient=True, disable=not err.is_terminal
    ) as progress:
        task = progress.add_task("starting")

        def show(snapshot: Snapshot) -> None:
            text = f"{snapshot.acknowledged:,} acknowledged, {snapshot.acknowledged_per_second:,.0f}/s, {snapshot.in_flight:,} in flight"
            progress.update(task, description=text + (f"; paused: {snapshot.paused}" if snapshot.paused else ""))

        yield show
