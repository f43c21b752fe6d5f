"""The watcher as a part of the embedded stack, beside Kafka Connect."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psycopg

from metrics_pipeline import postgres
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.local.environment import for_python
from metrics_pipeline.local.service import Service
from metrics_pipeline.settings import Settings
from metrics_pipeline.watcher.state import NO_SESSION

SIGN_SECONDS = 10.0
"""By when a watcher that gets on has touched its file again."""


def service(settings: Settings) -> Service:
    """`metrics-pipeline watch` as a child of the keeper. It may be up before there is a schema or a topic."""
    alive = settings.data_dir / "watcher-is-alive"
    return Service(
        name="watcher",
        title="Watcher",
        url="",
        command=[sys.executable, "-m", "metrics_pipeline", "watch", "--alive", str(alive)],
        # One heap for all its threads: with glibc's default each keeps what it once needed.
        environment={"MALLOC_ARENA_MAX": "2", **for_python(settings)},
        log=settings.data_dir / "logs" / "watcher.log",
        check=lambda: watcher_problem(settings),
        answers=lambda: no_sign_of_life(alive),
        needs=("databases", "broker"),
        cwd=settings.data_dir,
        stop_seconds=5,
    )


def watcher_problem(settings: Settings) -> str | None:
    """None when a watcher has its session in PostgreSQL, else why it is not known to."""
    try:
        with postgres.connect(settings, "metrics_reader", autocommit=True, connect_timeout=5) as connection:
            row = connection.execute(postgres.query("watcher_sessions")).fetchone()
    except (psycopg.Error, PipelineError) as error:
        return str(error).strip().splitlines()[0]
    return None if row and row[0] else NO_SESSION


def no_sign_of_life(alive: Path) -> str | None:
    """None when the watcher touched its file just now, else since when it did not."""
    try:
        age = time.time() - alive.stat().st_mtime
    except FileNotFoundError:
        return f"{alive.name} is not there"
    # One from further ahead is from before the clock was set back.
    return None if -SIGN_SECONDS < age <= SIGN_SECONDS else f"no sign of life for {age:.0f} s"
