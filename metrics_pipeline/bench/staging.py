"""The COPY sink by way of a staging table, to be compared with the one that copies into `metrics`.

Its workers append to a table without an index (`staged_metrics`), with offsets and rejects in the same transaction as ever. A mover takes
all that stands there, whatever it is by then, and inserts it into `metrics` in the order of its keys; what comes meanwhile goes into a second
table, and so on in turn. Insert and TRUNCATE are one transaction, so a reading stands in one of the tables, never in none or two; a mover
that begins finishes what a former one has left. Both tables are logged: after a crash nothing is missing.

`python -m metrics_pipeline.bench.staging WORKERS` runs the workers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Final

import psycopg
from psycopg import errors as pg

from metrics_pipeline import postgres
from metrics_pipeline.bench.paths import CopyPath
from metrics_pipeline.bench.place import Place
from metrics_pipeline.copy_sink.canonical import ReadingColumns
from metrics_pipeline.copy_sink.failpoint import Failpoints
from metrics_pipeline.copy_sink.store import COPY, RowWriter, Store
from metrics_pipeline.copy_sink.supervisor import Supervisor
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import Settings

PAUSE_SECONDS: Final = 0.2
"""How long the mover waits for rows: as long as a worker of the sink does (SINK_FLUSH_MS)."""
MEMORY: Final = "256MB"
"""For sorting what is moved: about two million rows."""
_STAGE: Final = COPY.replace("COPY metrics ", "COPY staged_metrics ")


def most_bytes(connection: postgres.Connection) -> int:
    """Bytes of the largest table that was moved so far."""
    (size,) = connection.execute("SELECT most_bytes FROM staging_state").fetchone() or (0,)
    return int(size)


class StagingWriter(RowWriter):
    """Appends to the staging table: there is no key that could be there already, and what the checks refuse is rejected."""

    statement = _STAGE

    def _stage(self, session: postgres.Connection, columns: ReadingColumns, tags: Sequence[bytes]) -> None:
        self._copy(session, self.statement, columns, tags)


class StagingStore(Store):
    """A worker's session that stages readings."""

    def __init__(self, settings: Settings, name: str = "", failpoints: Failpoints | None = None) -> None:
        super().__init__(settings, name, failpoints)
        self._rows = StagingWriter(self._failpoints)


class Mover:
    """Moves what is staged, again and again.

    Args:
        settings: where PostgreSQL is.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def run(self, stop: threading.Event) -> None:
        """Move until `stop`.

        Raises:
            ServiceError: PostgreSQL is not reachable.
            psycopg.Error: it refused.
        """
        with postgres.connect(
            self._settings, "metrics_owner", application_name="metrics-pipeline bench mover"
        ) as connection:
            connection.execute(f"SET work_mem = '{MEMORY}'; SET statement_timeout = 0".encode())
            connection.commit()
            self.finish(connection)
            while not stop.wait(PAUSE_SECONDS):
                while self.take(connection):
                    self.finish(connection)

    def take(self, connection: postgres.Connection) -> bool:
        """Let what is staged be moved next; False when nothing has come since the last time."""
        known = connection.execute(
            "SELECT (SELECT coalesce(sum(next_offset), 0) FROM sink_offsets WHERE topic = 'metrics') > waiting "
            "FROM staging_state"
        ).fetchone()
        connection.rollback()
        if known != (True,):
            return False
        connection.execute(postgres.query("bench_staging_swap").encode())
        connection.commit()
        return True

    def finish(self, connection: postgres.Connection) -> None:
        """Move what was taken: all of it, or nothing when this is broken off."""
        try:
            connection.execute(postgres.query("bench_staging_move").encode())
        except pg.UniqueViolation:
            connection.rollback()
            connection.execute(postgres.query("bench_staging_upsert").encode())
        connection.execute("TRUNCATE moving_metrics")
        connection.execute("UPDATE staging_state SET moved = waiting")
        connection.commit()


class StagingPath(CopyPath):
    """The COPY sink into the staging table, and the mover from there into `metrics`."""

    def __init__(self, place: Place, workers: int) -> None:
        """Prepare; see `CopyPath`."""
        super().__init__(place, workers)
        self.name = f"staging-{workers}"
        self._command = [sys.executable, "-m", "metrics_pipeline.bench.staging", str(workers)]
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._mover = threading.Thread(target=self._move, name="mover", daemon=True)

    def start(self) -> None:
        """Begin to stage and to move."""
        super().start()
        self._mover.start()

    def passed(self) -> int:
        """The sum of the offsets whose rows have been moved."""
        if self._failure is not None:
            raise ServiceError(f"{self.name}: the mover failed: {self._failure}") from self._failure
        super().passed()  # raises when the sink has ended
        if self._connection is None:
            return 0
        (moved,) = self._connection.execute("SELECT moved FROM staging_state").fetchone() or (0,)
        return int(moved)

    def stop(self) -> None:
        """End the sink, and then the mover after what it is at."""
        super().stop()
        self._stop.set()
        if self._mover.ident:
            self._mover.join()

    def _move(self) -> None:
        try:
            Mover(self._place.settings).run(self._stop)
        except (psycopg.Error, ServiceError) as error:  # raised again by `passed`
            self._failure = error


def main(workers: int) -> int:
    """Run the workers until SIGTERM; the exit code."""
    # What a worker makes comes with numpy, before the worker can see to this.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return 0 if Supervisor(Settings.load(), workers, StagingStore).run(stop) else 1


if __name__ == "__main__":
    # A worker has to find the class by the name of this module.
    from metrics_pipeline.bench.staging import main as run_workers

    sys.exit(run_workers(int(sys.argv[1])))
