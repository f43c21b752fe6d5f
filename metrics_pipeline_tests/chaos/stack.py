"""PostgreSQL and a broker on free ports in a temporary folder: the COPY sink the active one and not running, or Kafka Connect running."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from metrics_pipeline import kafka, postgres
from metrics_pipeline.bench.table import activate
from metrics_pipeline.local import account, environment
from metrics_pipeline.local.stack import Stack, build
from metrics_pipeline.settings import Settings, SinkKind
from metrics_pipeline.sinks import connector


@dataclass(frozen=True)
class Place:
    """Running services.

    Attributes:
        settings: of these services.
        environment: for child processes, so that they meet the same ones.
        services: the embedded stack itself, to stop or kill parts of it.
    """

    settings: Settings
    environment: Mapping[str, str]
    services: Stack

    @property
    def logs(self) -> Path:
        """Folder of all logs."""
        return self.settings.data_dir / "logs"

    def one(self, statement: str, *parameters: Any) -> Any:
        """The first column of a statement's first row, asked by the superuser."""
        with psycopg.connect(self.settings.admin_url(self.settings.metrics_database), autocommit=True) as connection:
            row = connection.execute(statement.encode(), parameters).fetchone()
        return row[0] if row else None

    def offsets(self) -> dict[int, int]:
        """Where the sink is, by partition."""
        with psycopg.connect(self.settings.admin_url(self.settings.metrics_database), autocommit=True) as connection:
            return dict(connection.execute("SELECT partition, next_offset FROM sink_offsets").fetchall())

    def kill(self, name: str, number: signal.Signals) -> None:
        """End a service by a signal, and start it again at once."""
        service = self.services.service(name)
        assert service.process is not None
        service.process.send_signal(number)
        service.process.wait(30)
        service.start()
        service.wait_until_healthy()


@contextmanager
def own_stack(
    *, sink: SinkKind = "copy", memory_gb: float = 4, keep: bool = False, variables: Mapping[str, str] | None = None
) -> Iterator[Place]:
    """Services that are gone when the block ends.

    Args:
        sink: which one is active. Kafka Connect runs then; nobody repairs it.
        memory_gb: what they may use.
        keep: leave the folder with data and logs there.
        variables: settings besides, such as the `POSTGRES_URL` of a server of one's own.
    """
    folder = Path(tempfile.mkdtemp(prefix="metrics-pipeline-chaos-")).resolve()
    embedded: Stack | None = None
    try:
        own = environment.isolated(folder) | {"PIPELINE_MEMORY_GB": str(memory_gb), "SINK": sink}
        with environment.replaced(own | dict(variables or {})):
            environment.write_secrets()
            settings = Settings.load()
            embedded = build(settings, with_dagster=False, quiet=True)
            if sink == "copy":
                embedded.services.remove(embedded.service("sink"))
            embedded.start(lambda _line: None, provision=False)
            postgres.migrate(settings)
            kafka.ensure_topic(settings)
            if sink == "copy":
                with postgres.connect_admin(settings, settings.metrics_database) as connection:
                    activate(connection, "copy")
            else:
                connector.ensure_connector(settings)
            place = Place(settings, environment.for_python(settings), embedded)
        yield place
    finally:
        if embedded is not None:
            embedded.stop(lambda _line: None)
        if not keep:
            shutil.rmtree(account.postgres_home(folder / "data", account.unprivileged()), ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
