"""A database of a test's own on the server of the stack: same roles, migrated, gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from psycopg import sql

from metrics_pipeline import postgres
from metrics_pipeline.settings import Settings


@contextmanager
def own_database(settings: Settings, *, migrated: bool = True) -> Iterator[Settings]:
    """Settings that point at a new database; the connector and the other tests do not see it."""
    own = settings.model_copy(update={"postgres_db": f"test_{uuid4().hex[:12]}"})
    postgres.bootstrap(own)
    try:
        if migrated:
            postgres.migrate(own)
        yield own
    finally:
        with postgres.connect_admin(own) as conn:
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(own.postgres_db)))
