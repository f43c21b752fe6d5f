"""A COPY sink that is wrong on purpose: it commits the offsets first, and the readings in a transaction of their own.

    python -m metrics_pipeline_tests.broken_sink --workers N

As long as nobody dies in between, nobody notices. The crash test must.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

from metrics_pipeline import postgres
from metrics_pipeline.copy_sink.batch import Batch
from metrics_pipeline_tests.chaos import sink


class OffsetsFirst(sink.NotingStore):
    """Promises before it has kept."""

    def _advance(self, session: postgres.Connection, batch: Batch) -> None:
        super()._advance(session, batch)
        session.commit()


def work(name: str, pipe: Connection) -> None:
    """The body of a worker process."""
    sink.work(name, pipe, OffsetsFirst)


if __name__ == "__main__":
    sink.main(work)
