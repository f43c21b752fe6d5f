"""Somebody else's PostgreSQL fails in its own ways under load; the sink names it, and goes on by itself when it is over."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from metrics_pipeline.local.status import Sampler
from metrics_pipeline.settings import ROOT
from metrics_pipeline_tests.chaos.processes import Load, Repair, Sink, until
from metrics_pipeline_tests.chaos.stack import Place, own_stack
from metrics_pipeline_tests.patience import patience
from metrics_pipeline_tests.servers import Server, own_server, until_streams

pytestmark = pytest.mark.integration

RATE: Final = 1500
GOES_ON_SECONDS: Final = 60.0
TABLES_MB: Final = 220
"""Of the file system that fills: room for the catalogs of five databases, and for what is stored before it fills."""


class Address:
    """What the pipeline is told: it leads to one server, and later to another."""

    def __init__(self, server: Server) -> None:
        self.target = server.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._pass, args=(client, server), daemon=True).start()

    @staticmethod
    def _pass(client: socket.socket, server: socket.socket) -> None:
        """What each side says to the other, until one of them ends."""
        with client, server, suppress(OSError):
            while True:
                for source in select.select([client, server], [], [])[0]:
                    piece = source.recv(1 << 16)
                    if not piece:
                        return
                    (server if source is client else client).sendall(piece)


@dataclass
class Work:
    """A COPY sink under load.

    Attributes:
        place: broker and settings.
        server: PostgreSQL.
        address: through which it is reached.
        sink: that is tried.
        load: on it.
    """

    place: Place
    server: Server
    address: Address
    sink: Sink
    load: Load

    def stored(self) -> int:
        """Rows that the sink has stored since it began."""
        return int(self.sink.status()["rows"])

    def goes_on(self) -> float:
        """Wait until it stores again; the seconds that took."""
        rows = self.stored()
        return until(lambda: self.stored() > rows + RATE, GOES_ON_SECONDS, "the sink stores again")

    def shown(self) -> dict[str, Any]:
        """The sink in `status`."""
        settings = self.place.settings.model_copy(update={"sink_port": int(self.sink.http.rpartition(":")[2])})
        with closing(Sampler(settings)) as sampler:
            return dict(sampler.sample()["sink"])

    def named(self, *words: str) -> dict[str, int]:
        """Wait until `status` shows it as a fault and says one of these words; what it counted of retries."""
        seen: list[str] = []

        def said() -> bool:
            shown = self.shown()
            seen.append(str(shown.get("reason")))
            return not shown["healthy"] and any(word in seen[-1] for word in words)

        until(said, patience(45), f"status says {words}: {seen[-3:]}")
        return dict(self.sink.status()["retries"])

    def is_patient(self, seconds: float = 8.0) -> None:
        """Nothing is tried at full speed: each worker pauses ever longer."""
        before = sum(self.sink.status()["retries"].values())
        time.sleep(seconds)
        assert sum(self.sink.status()["retries"].values()) - before <= 2 * self.sink.workers * (2 + seconds / 2)

    def verify(self) -> None:
        """After the load has ended: all of it is there."""
        self.load.end()
        verify(self.place)


def verify(place: Place) -> None:
    """All of it is there."""
    done = subprocess.run(
        [sys.executable, "-m", "metrics_pipeline", "verify", "--json"],
        env=dict(place.environment), cwd=ROOT, capture_output=True, text=True, timeout=patience(300), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def through(address: Address, server: Server) -> dict[str, str]:
    """What the pipeline is told of a server."""
    url = server.url("metrics").replace(f":{server.port}/", f":{address.port}/")
    return {"POSTGRES_URL": url, "SINK_STALL_SECONDS": "20"}


@contextmanager
def work(server: Server) -> Iterator[Work]:
    address = Address(server)
    try:
        with (
            own_stack(variables=through(address, server)) as place,
            Sink(place, workers=2) as sink,
            Load(place, RATE) as load,
        ):
            sink.ready()
            working = Work(place, server, address, sink, load)
            until(lambda: working.stored() > RATE, GOES_ON_SECONDS, "it stores")
            yield working
    finally:
        address.close()


def test_a_standby_is_promoted_and_the_former_server_demoted() -> None:
    """Twice in order, by which nothing is lost; then the server dies, with it what its standby had not got, offsets included."""
    with two_servers() as (first, second), work(first) as at:
        here, there = first, second
        for _ in range(2):
            until_streams_about(here)
            here.stop()
            at.address.target = there.port
            at.named("is a standby, which takes no writes", "cannot be reached")
            until(lambda: "standby" in str(at.shown().get("reason")), patience(45), "the standby is named")
            at.is_patient()
            there.promote()
            at.goes_on()
            here.follow(there)
            here.start()
            until_streams_about(there)
            here, there = there, here
        here.stop("immediate")
        at.address.target = there.port
        there.promote()
        at.goes_on()
        at.verify()


@contextmanager
def two_servers() -> Iterator[tuple[Server, Server]]:
    """One that takes writes, and its standby."""
    with own_server(wal_keep_size="'512MB'", wal_log_hints="on", hot_standby="on", max_wal_senders="4") as first:
        first.stop()
        second = first.copy("second")
        first.start()
        second.follow(first)
        second.start()
        until_streams(first)
        yield first, second


def until_streams_about(primary: Server) -> None:
    """Wait until a standby follows, under load."""
    with primary.admin() as connection:

        def follows() -> bool:
            row = connection.execute("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'").fetchone()
            return bool(row and row[0])

        until(follows, patience(60), "the standby follows")


@pytest.fixture(scope="module")
def at() -> Iterator[Work]:
    with own_server() as server, work(server) as working:
        yield working


def test_statements_that_take_long_are_ended_for_ten_seconds(at: Work) -> None:
    """By a time limit that the server presets, which is none for us; and by somebody who ends them, for whom batches are divided."""
    with at.server.admin() as boss:
        boss.execute("ALTER SYSTEM SET statement_timeout = '50ms'")
        boss.execute("SELECT pg_reload_conf()")
    at.goes_on()
    with at.server.admin("metrics") as boss:
        boss.execute("SELECT set_config('statement_timeout', '0', false)")
        boss.execute("ALTER SYSTEM RESET statement_timeout")
        boss.execute("SELECT pg_reload_conf()")
        # As a table with costly triggers would: 50 readings take longer than they may.
        boss.execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.001); RETURN NEW; END'"
        )
        boss.execute("CREATE TRIGGER z_slow BEFORE INSERT ON metrics FOR EACH ROW EXECUTE FUNCTION slow()")
        over = time.monotonic() + 10
        ended = 0
        while time.monotonic() < over:
            row = boss.execute(
                "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE usename = 'metrics_writer' "
                "AND state = 'active' AND clock_timestamp() - query_start > interval '50 ms'"
            ).fetchone()
            ended += row[0] if row else 0
            time.sleep(0.01)
        boss.execute("DROP TRIGGER z_slow ON metrics")
    assert ended > 3
    assert at.sink.status()["retries"]["57014"] > 0
    assert at.goes_on() < 30


def test_a_right_that_was_taken_away(at: Work) -> None:
    with at.server.admin("metrics") as boss:
        boss.execute("REVOKE INSERT (device_id) ON metrics FROM metrics_writer")
        try:
            retries = at.named("permission denied for table metrics")
            assert retries["42501"]
            at.is_patient()
        finally:
            boss.execute("GRANT INSERT (device_id) ON metrics TO metrics_writer")
    at.goes_on()


def test_everything_that_this_server_stored_is_right(at: Work) -> None:
    at.goes_on()
    at.verify()


@contextmanager
def small_file_system() -> Iterator[Path]:
    """A folder that has little room, and which every account may enter."""
    folder = Path(tempfile.mkdtemp(prefix="metrics-pipeline-tables-"))
    folder.chmod(0o755)
    command = ["mount", "-t", "tmpfs", "-o", f"size={TABLES_MB}m", "tmpfs", str(folder)]
    try:
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    finally:
        folder.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system that is small")
def test_the_disk_is_full_for_a_while() -> None:
    with small_file_system() as tables, own_server(tables=tables) as server, work(server) as at:
        ballast = tables / "ballast"
        fill(ballast)
        try:
            retries = at.named("No space left on device")
            assert retries["53100"]
            at.is_patient()
        finally:
            ballast.unlink()
        at.goes_on()
        at.verify()


def fill(path: Path) -> None:
    """Write until nothing more goes in."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 20)):
            pass


def test_kafka_connect_goes_on_by_itself_too() -> None:
    """Its tasks fail, and are restarted when that can help."""
    with two_servers() as (first, second):
        address = Address(first)
        try:
            with (
                own_stack(sink="connect", variables=through(address, first)) as place,
                Repair(place),
                Load(place, RATE) as load,
            ):
                stores(place)
                until_streams_about(first)
                first.stop()
                address.target = second.port
                until(lambda: not shown(place)["healthy"], patience(60), "status shows it")
                second.promote()
                stores(place)
                with second.admin("metrics") as boss:
                    boss.execute("REVOKE INSERT (device_id) ON metrics FROM metrics_writer")
                    until(
                        lambda: "permission denied" in str(shown(place).get("reason")), patience(60), "status names it"
                    )
                    boss.execute("GRANT INSERT (device_id) ON metrics TO metrics_writer")
                stores(place)
                load.end()
                verify(place)
        finally:
            address.close()


def shown(place: Place) -> dict[str, Any]:
    """The sink in `status`."""
    with closing(Sampler(place.settings)) as sampler:
        return dict(sampler.sample()["sink"])


def stores(place: Place) -> None:
    """Wait until more rows come."""
    rows = 0

    def count() -> int:
        with suppress(psycopg.Error):
            return int(place.one("SELECT count(*) FROM metrics"))
        return 0

    until(lambda: count() > 0, patience(120), "rows can be counted")
    rows = count()
    until(lambda: count() > rows + RATE, patience(120), "more rows are stored")
