"""What is done to a deployment, and what has to be so afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import duckdb

from metrics_pipeline.local.environment import replaced
from metrics_pipeline.settings import ROOT, Settings
from metrics_pipeline_tests.containers import checks
from metrics_pipeline_tests.containers.deployment import (
    CLUSTER_OVERLAY,
    OVERLAY,
    Deployment,
    ProblemError,
    deployed,
    snapshot,
    wait_until,
)
from metrics_pipeline_tests.containers.engine import Engine
from metrics_pipeline_tests.containers.events import Events, listening

SMALL: Final = {"POSTGRES_MEMORY_GB": "2", "REDPANDA_MEMORY_GB": "1", "CONNECT_MEMORY_GB": "1", "REDPANDA_CORES": "1"}
"""The row of 8 GiB on the page."""
GENTLE: Final = {"PRODUCER_PUBLISH_INTERVAL": "1000"}
"""A quarter of the default rate: what is shown is not the speed."""
ACCOUNT: Final = 10001
"""Of our containers."""
CRASHED: Final = ("postgres", "redpanda", "connect", "code", "webserver", "daemon", "watcher")


@dataclass
class Run:
    """What scenarios share.

    Attributes:
        engine: where everything runs.
        stand_in: whether images are stood in for.
        seconds: of the load in `soak`.
        say: a line of the report.
        revision: the commit that runs; None for the checkout as it stands.
        typed: every command so far.
    """

    engine: Engine
    stand_in: bool
    seconds: float
    say: Callable[[str], None]
    revision: str | None = None
    typed: list[str] = field(default_factory=list)

    @contextmanager
    def deployment(self, revision: str | None = None, **settings: str) -> Iterator[tuple[Deployment, Events]]:
        """A clone that is gone afterwards, and nothing of it left."""
        with ExitStack() as stack:
            clone = deployed(
                self.engine,
                revision or snapshot(self.revision),
                stand_in=self.stand_in,
                settings=SMALL | GENTLE | settings,
            )
            made = stack.enter_context(clone)
            try:
                yield made, stack.enter_context(listening(made))
            finally:
                self.typed += made.typed

    def did(self, what: str, began: float) -> None:
        """Something held."""
        self.say(f"  {time.monotonic() - began:6.1f} s  {what}")

    def hold(self, what: str, check: Callable[[], Any]) -> Any:
        """Check it, and say so."""
        began = time.monotonic()
        answer = check()
        self.did(what if answer is None or answer == "" else f"{what}: {str(answer).strip().splitlines()[-1]}", began)
        return answer


def start(run: Run) -> None:
    """From nothing: built, started in order, healthy, hardened; and down again, in order and with the data kept."""
    with run.deployment() as (made, events):
        run.hold("`docker compose up -d` in a clean clone", lambda: f"{made.up():.0f} s")
        run.hold("every service is healthy", lambda: checks.healthy(made))
        run.hold("each started when what it needs was there", lambda: checks.order_of_start(events))
        run.hold("rows rise", lambda: checks.rows_rise(made))
        run.hold(
            "the UI answers, and a sensor launched the producer",
            lambda: checks.producer_was_launched_by_its_sensor(made),
        )
        run.hold("nothing was restarted", lambda: checks.nothing_was_restarted(made))
        run.hold("each service sees its own secrets and no others", lambda: checks.secrets(made))
        run.hold("capabilities, roots, limits and ports are as written", lambda: checks.hardened(made))
        run.hold("`status` is healthy inside", lambda: checks.status(made))
        made.type("docker compose ps")
        made.type("docker compose run --rm --no-deps code cat /run/metrics-secrets/metrics_reader_password")
        run.hold("`verify`", lambda: checks.verify(made))
        before, since = checks.rows(made), time.time_ns()
        run.hold("`docker compose down`", lambda: made.type("docker compose down") and None)
        run.hold("each ended by itself, before what it writes to", lambda: checks.order_of_stop(events, since))
        run.hold("up again", lambda: f"{made.up():.0f} s")
        run.hold("every service is healthy", lambda: checks.healthy(made))
        if (now := checks.rows(made)) < before:
            raise ProblemError(f"{before} rows before, {now} after")
        run.hold("rows rise", lambda: checks.rows_rise(made))
        run.hold("`verify`", lambda: checks.verify(made))
        _removed(run, made)


def crashes(run: Run) -> None:
    """Each service dies at once; then everything is well again, and nothing is lost."""
    with run.deployment() as (made, _):
        _up(run, made)
        for service in CRASHED:
            what = f"{service} crashed, was healed, and `verify` is clean"
            run.hold(what, partial(_crash, made, service))
        run.hold("every service is healthy", lambda: checks.healthy(made))
        _removed(run, made)


def _crash(made: Deployment, service: str) -> str:
    return f"healthy after {checks.crash(made, service):.0f} s"


def sinks(run: Run) -> None:
    """Profiles `copy` and `obs`: the change of sink both ways, three of them, targets, alerts and queries."""
    with run.deployment() as (made, _):
        _up(run, made)
        run.hold("`verify` with Kafka Connect", lambda: checks.verify(made))
        for command in ("echo SINK=copy >> .env", "echo COMPOSE_PROFILES=copy,obs >> .env"):
            made.type(command)
        run.hold("up with the profiles", lambda: f"{made.up():.0f} s")
        run.hold("every service is healthy", lambda: checks.healthy(made, checks.services_of(made)))
        run.hold("the COPY sink stores", lambda: _is_active(made, "copy"))
        run.hold("rows rise", lambda: checks.rows_rise(made))
        run.hold("`verify`", lambda: checks.verify(made))
        run.hold("three sinks", lambda: made.type("docker compose up -d --scale sink=3") and None)
        run.hold("every service is healthy", lambda: checks.healthy(made, checks.services_of(made)))
        if len(made.containers()["sink"]) != 3:
            raise ProblemError("there are not three sinks")
        run.hold("the COPY sink still stores", lambda: _is_active(made, "copy"))
        run.hold("rows rise", lambda: checks.rows_rise(made))
        run.hold("each service sees its own secrets and no others", lambda: checks.secrets(made))
        run.hold("a sink crashed", lambda: _crash(made, "sink"))
        run.hold("the exporter crashed", lambda: _crash(made, "exporter"))
        targets = {"producer", "sink", "exporter", "connect", "redpanda"}
        run.hold("every target of Prometheus is up", lambda: checks.every_target_is_up(made, targets))
        run.hold(
            "queries of the dashboard, and those with data",
            lambda: "{} and {}".format(*checks.every_query_is_answered(made)),
        )
        run.hold("no alert", lambda: checks.no_alert_fires(made))
        made.set(SINK="connect", COMPOSE_PROFILES="copy,obs")
        run.hold("back to Kafka Connect", lambda: f"{made.up():.0f} s")
        run.hold("Kafka Connect stores", lambda: _is_active(made, "connect"))
        run.hold("every service is healthy", lambda: checks.healthy(made, checks.services_of(made)))
        run.hold("rows rise", lambda: checks.rows_rise(made))
        run.hold("`verify`", lambda: checks.verify(made))
        log = made.compose("logs", "connect", "--no-color")
        handed = re.findall(
            r"the connector begins at offset \d+ of partition \d+", log + made.compose("logs", "provision")
        )
        if not handed:
            raise ProblemError(f"the COPY sink's offsets were not handed over: {log[-1500:]}")
        run.say(f"            offsets of {len(handed)} partitions were handed over")
        _removed(run, made)


def _is_active(made: Deployment, sink: str) -> None:
    wait_until(f"{sink} is active", lambda: made.sql("SELECT active FROM sink_state") == sink, 240)


def cluster(run: Run) -> None:
    """Three brokers and two Connect workers; a broker dies, and nothing is lost."""
    with run.deployment() as (made, _):
        _up_with(run, made, "three brokers and two workers", "cluster", OVERLAY, CLUSTER_OVERLAY)
        run.hold("every service is healthy", lambda: checks.healthy(made, set(made.containers())))
        run.hold("rows rise", lambda: checks.rows_rise(made))
        run.hold("`verify`", lambda: checks.verify(made))
        run.hold("a broker crashed, and `verify` is clean", lambda: _crash(made, "redpanda-2"))
        run.hold("a worker crashed, and `verify` is clean", lambda: _crash(made, "connect-2"))
        _removed(run, made)


OFFICE: Final = """[time]
columns = ["when"]
order = "dmy"

[device]
column = "who"

[[metrics]]
metric = "temperature"
column = "t"
unit = "degF"
"""
LINES: Final = 2_000_000
"""Of the file in whose middle the process dies."""
OLD: Final = 200_000
"""Readings from before all partitions."""


def replay(run: Run) -> None:
    """A folder of the host: what is put there is replayed once, by a recipe that lies in it, though its process dies."""
    with run.deployment() as (made, _):
        folder = _folder(made, "readings")
        made.set(REPLAY_FOLDER=str(folder), REPLAY_RECIPE="/replay/.office.toml")
        (folder / ".office.toml").write_text(OFFICE, "utf-8")
        _up_with(run, made, "up with a folder", "replay", OVERLAY)
        run.hold("every service is healthy", lambda: checks.healthy(made))
        good, bad = "24.12.2023 18:00:00;attic;50", "24.13.2023 18:00:00;attic;50"
        for name, lines in (("good.csv", [good]), ("bad.csv", [good, good, bad])):
            (folder / name).write_text("\n".join(["when;who;t", *lines, ""]), "utf-8")
        run.hold("a good file is done, a bad one failed", lambda: _moved(folder, "done/good.csv", "failed/bad.csv"))
        said = (folder / "failed" / "bad.csv.report.json").read_text("utf-8")
        if "bad.csv:4:" not in said or "24.13.2023" not in said:
            raise ProblemError(f"the report does not say which line is bad: {said}")
        began = datetime(2023, 1, 1, tzinfo=UTC)
        lines = [f"{began + timedelta(seconds=number):%d.%m.%Y %H:%M:%S};cellar;41" for number in range(LINES)]
        (folder / "big.csv").write_text("\n".join(["when;who;t", *lines, ""]), "utf-8")
        run.hold(
            "a file is under way", lambda: wait_until("it is published", lambda: _old(made) > 1, 240, 0.1) and None
        )
        if (folder / "done" / "big.csv").exists():
            raise ProblemError("void: it was done before its process could die")
        run.hold("its process crashed", lambda: _crash(made, "code"))
        run.hold("the file is done", lambda: _moved(folder, "done/big.csv"))
        wait_until("every line is stored once", lambda: _old(made) == 1 + LINES, 240)
        run.hold("degrees Fahrenheit became Celsius", lambda: _converted(made, 5, 10))
        run.hold("`verify`", lambda: checks.verify(made))
        _removed(run, made)


def _moved(folder: Path, *files: str) -> None:
    wait_until(f"{', '.join(files)} are there", lambda: all((folder / name).exists() for name in files), 420)


def _old(made: Deployment) -> int:
    return int(made.sql("SELECT count(*) FROM metrics WHERE published_at < '2025-01-01'"))


def _converted(made: Deployment, least: int, greatest: int) -> None:
    said = made.sql(
        "SELECT round(min(value)) || ' ' || round(max(value)) FROM metrics WHERE published_at < '2025-01-01'"
    )
    if said != f"{least} {greatest}":
        raise ProblemError(f"41 °F and 50 °F became {said} °C")


def archive(run: Run) -> None:
    """A folder of the host: old readings are archived there, read by somebody else, dropped, and brought back."""
    with run.deployment() as (made, _):
        folder = _folder(made, "archive")
        made.set(METRICS_ARCHIVE=str(folder))
        _up_with(run, made, "up with a folder", "archive", OVERLAY)
        run.hold("every service is healthy", lambda: checks.healthy(made))
        began = datetime(2023, 1, 1, tzinfo=UTC)
        lines = [f"{began + timedelta(seconds=number):%d.%m.%Y %H:%M:%S};cellar;41" for number in range(OLD)]
        (folder / ".office.toml").write_text(OFFICE, "utf-8")
        (folder / ".old.csv").write_text("\n".join(["when;who;t", *lines, ""]), "utf-8")
        made.inside("code", "metrics-pipeline", "replay", "/archive/.old.csv", "--recipe", "/archive/.office.toml")
        run.hold("old readings are stored", lambda: wait_until("they are", lambda: _old(made) == OLD, 240) and None)
        made.type("docker compose exec code metrics-pipeline archive make", 300)
        # What is before all partitions has an archive when it goes.
        words = ("metrics-pipeline", "partitions", "drop", "--yes", "--before", f"{datetime.now(UTC):%Y-%m-%d}")
        run.hold("they are dropped", lambda: made.inside("code", *words))
        if _old(made):
            raise ProblemError("old readings are still there")
        run.hold("`verify` counts them as expired", lambda: _expired(made))
        name = "metrics_before"
        if f"{name} " not in (said := made.type("docker compose exec code metrics-pipeline archive list")):
            raise ProblemError(f"{name} is not listed: {said}")
        made.type("docker compose exec code metrics-pipeline archive verify")
        run.hold("DuckDB reads the same on the host", lambda: _same(folder / name, OLD))
        run.hold("the code crashed", lambda: _crash(made, "code"))
        run.hold("they are brought back", lambda: made.inside("code", "metrics-pipeline", "archive", "restore", name))
        if (found := _old(made)) != OLD:
            raise ProblemError(f"{found} of {OLD} were brought back")
        run.hold("they are what they were", lambda: _converted(made, 5, 5))
        run.hold("`verify`", lambda: checks.verify(made))
        _removed(run, made)


def _expired(made: Deployment) -> str:
    said = checks.verify(made)
    if f"{OLD:,} records of a time that has been dropped" not in said:
        raise ProblemError(f"{OLD:,} expired ones are not told apart: {said}")
    return said


def _same(archived: Path, rows: int) -> str:
    with duckdb.connect() as reader:
        found = reader.execute("SELECT count(*) FROM read_parquet(?)", [f"{archived}/*.parquet"]).fetchone()
    if found != (rows,):
        raise ProblemError(f"{rows} rows in the table, {found} in the archive")
    return f"{rows} rows"


def upgrade(run: Run) -> None:
    """The images of the commit before, with its data; then `git pull`, build and up. Dagster's tables are migrated."""
    now = snapshot(run.revision)
    with run.deployment(f"{now}~1") as (made, _):
        _up(run, made, "the commit before")
        run.hold("`verify`", lambda: checks.verify(made))
        before = checks.rows(made)
        # As an older release of Dagster left them.
        newest = _revision(made)
        _revision(made, "7e2f3204cf8e")
        _push(made, now)
        made.type("git pull")
        run.hold("`docker compose build`", lambda: made.type("docker compose build") and None)
        run.hold("up with the new images", lambda: f"{made.up():.0f} s")
        run.hold("every service is healthy", lambda: checks.healthy(made))
        for name, ones in made.containers().items():
            image = made.engine.docker("image", "inspect", "--format", "{{.Id}}", ones[0]["Config"]["Image"]).strip()
            if ones[0]["Image"] != image:
                raise ProblemError(f"{name} still runs an old image")
        if checks.rows(made) < before:
            raise ProblemError("rows are gone")
        if _revision(made) != newest:
            raise ProblemError("Dagster's tables were not migrated")
        run.did("Dagster's tables were migrated", time.monotonic())
        run.hold("rows rise", lambda: checks.rows_rise(made))
        run.hold("`verify`", lambda: checks.verify(made))
        _removed(run, made)


def _revision(made: Deployment, to: str = "") -> str:
    statement = f"UPDATE alembic_version SET version_num = '{to}'" if to else "SELECT version_num FROM alembic_version"
    return made.as_superuser(statement, database="dagster")


def _push(made: Deployment, commit: str) -> None:
    origin = made.checkout.parent / "origin.git"
    subprocess.run(["git", "push", "--quiet", str(origin), f"{commit}:refs/heads/main"], cwd=ROOT, check=True)


ENV: Final = """# how it may be written
PRODUCER_SEED=7 # after a value
 PRODUCER_FLEET_SIZE = 60
export KAFKA_BATCH_SIZE=300
PRODUCER_COMPRESSION="zstd"
SINK='copy'
SINK_WATCH=off
LAG_LIMIT=
PRODUCER_RUN_SECONDS=600
PRODUCER_RUN_SECONDS=700
METRICS_OWNER_PASSWORD='a$b c#d'
METRICS_PRODUCER_PASSWORD=x#y
METRICS_SUMMARIZER_PASSWORD=a\\nb
PRODUCER_FLUSH_SECONDS=${PRODUCER_SEED}0
DAGSTER_PASSWORD="a\\"b\\\\c"
"""
"""Comments, quotes, spaces, escapes, a name that comes twice, one that is empty, and a value in a value."""


def env(run: Run) -> None:
    """Compose and the embedded stack read one `.env` the same way."""
    with run.deployment() as (made, _):
        file = made.checkout / ".env"
        file.write_text(f"COMPOSE_PROJECT_NAME={made.name}\n{ENV}", "utf-8")
        services = json.loads(made.compose("-f", "docker-compose.yaml", "config", "--format", "json"))["services"]
        given = {
            name: value.replace("$$", "$")
            for one in ("secrets", "code")
            for name, value in services[one]["environment"].items()
            if not name.endswith(("_FILE", "_URL")) and value
        }
        with replaced({"PIPELINE_ENV_FILE": str(file)}):
            embedded = Settings.load()
        with replaced(given | {"PIPELINE_ENV_FILE": str(made.checkout / "none")}):
            contained = Settings.load()
        names = [
            name for group in ("producer", "topic", "sink", "monitoring", "secrets") for name in Settings.group(group)
        ]
        other = {name for name in names if getattr(embedded, name) != getattr(contained, name)}
        if other:
            raise ProblemError(f"Compose and the embedded stack read otherwise: {', '.join(sorted(other))}")
        changed = sum(getattr(embedded, name) != Settings.model_fields[name].default for name in names)
        run.say(f"            {len(names)} settings agree, {changed} of them set")


def soak(run: Run) -> None:
    """The sizes of the 8 GiB row at the default rate: no container dies for want of memory; what each takes, with either sink."""
    with run.deployment(PRODUCER_PUBLISH_INTERVAL="") as (made, events):
        _up(run, made)
        run.hold("every service is healthy", lambda: checks.healthy(made))
        _load(run, made, run.seconds)
        run.hold("nothing was restarted", lambda: checks.nothing_was_restarted(made))
        run.hold("`verify`", lambda: checks.verify(made))
        made.set(SINK="copy", COMPOSE_PROFILES="copy")
        run.hold("up with the COPY sink", lambda: f"{made.up():.0f} s")
        _is_active(made, "copy")
        _load(run, made, run.seconds / 4)
        run.hold("`verify`", lambda: checks.verify(made))
        if [event for event in events.all() if event.action == "oom"]:
            raise ProblemError("a container was short of memory")
        _removed(run, made)


def _load(run: Run, made: Deployment, seconds: float) -> None:
    """Rows and memory while the producer runs."""
    first, began = checks.rows(made), time.monotonic()
    most: dict[str, float] = {}
    while (passed := time.monotonic() - began) < seconds:
        for name, mib in _memory(made).items():
            most[name] = max(most.get(name, 0.0), mib)
        time.sleep(min(5, max(seconds - passed, 0)))
    last, passed = checks.rows(made), time.monotonic() - began
    run.say(f"            {(last - first) / passed:,.0f} rows/s stored for {passed:.0f} s")
    for name, mib in sorted(most.items()):
        limit = made.container(name)["HostConfig"]["Memory"] / 2**20
        run.say(f"            {name:12} {mib:6.0f} MiB at most, of {limit:.0f}")


def _memory(made: Deployment) -> dict[str, float]:
    """MiB of each service now, as `docker stats` has it."""
    units = {"B": 2**-20, "KiB": 2**-10, "MiB": 1.0, "GiB": 1024.0}
    services = {
        one["Id"][:12]: name for name, ones in made.containers().items() for one in ones if one["State"]["Running"]
    }
    found = {}
    for line in made.engine.docker("stats", "--no-stream", "--format", "{{.ID}} {{.MemUsage}}").splitlines():
        number, used, *_ = line.split()
        if number[:12] in services and (match := re.fullmatch(r"([\d.]+)([KMG]?i?B)", used)):
            found[services[number[:12]]] = float(match[1]) * units[match[2]]
    return found


def untyped(run: Run) -> list[str]:
    """Commands of the page on containers that no scenario has typed; a published image is at a registry."""
    text = (ROOT / "docs" / "containers.md").read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    return [line for line in commands if line not in run.typed and "ghcr.io" not in line]


def _folder(made: Deployment, name: str) -> Path:
    """One of the host that a container writes in, as the page says; without root it has to be writable for everybody."""
    folder = made.checkout.parent / name
    folder.mkdir()
    if os.getuid() == 0:
        os.chown(folder, ACCOUNT, ACCOUNT)
    else:
        folder.chmod(0o777)
    return folder


def _up_with(run: Run, made: Deployment, what: str, overlay: str, *stand_ins: str) -> None:
    """The page's command for an overlay; from then on every command means all the files."""
    command = f"docker compose -f docker-compose.yaml -f compose.{overlay}.yaml up -d"
    run.hold(what, lambda: f"{made.up(command):.0f} s")
    files = command.split()[3:-2:2]
    made.set(COMPOSE_FILE=":".join([*files, *(stand_ins if run.stand_in else ())]))


def _up(run: Run, made: Deployment, what: str = "up") -> None:
    run.hold(what, lambda: f"{made.up():.0f} s")
    run.hold("rows rise", lambda: checks.rows_rise(made))


def _removed(run: Run, made: Deployment) -> None:
    made.type("docker compose down --volumes")
    run.hold("`docker compose down --volumes` left nothing", lambda: checks.nothing_is_left(made))


ALL: Final[dict[str, Callable[[Run], None]]] = {
    "env": env,
    "start": start,
    "crashes": crashes,
    "sinks": sinks,
    "cluster": cluster,
    "replay": replay,
    "archive": archive,
    "upgrade": upgrade,
    "soak": soak,
}
