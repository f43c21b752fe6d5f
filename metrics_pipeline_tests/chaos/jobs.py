"""What Dagster's jobs do for the table, as a process of its own: again and again, until it is ended.

    python -m metrics_pipeline_tests.chaos.jobs NAME

NAME is `partitions`, `archive` or `summaries`, as in Dagster; each of them calls what the assets of that job call. For each run a
line is appended to `NAME.jsonl`: what was done, how long it took, and why it failed. `CHAOS_TICK` is the pause between two runs in seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from metrics_pipeline import partitions, retention, summaries
from metrics_pipeline.archive import keeping
from metrics_pipeline.errors import PipelineError
from metrics_pipeline.partitions import Partition
from metrics_pipeline.retention import Dropped
from metrics_pipeline.settings import Settings

TICK: Final = "CHAOS_TICK"

Done = dict[str, Any]


def _partitions(settings: Settings, done: Done) -> None:
    def dropped(partition: Partition, what: Dropped) -> None:
        done.setdefault("dropped", []).append((partition.name, what.rows))

    done["made"] = partitions.make(settings)
    retention.run(settings, keep=keeping.keeper(settings), report=dropped)


def _archive(settings: Settings, done: Done) -> None:
    for one in keeping.due(settings):
        if one.low and one.high:
            archives = keeping.archived(settings, one.low, one.high)
            done.setdefault("archived", []).extend((archive.name, archive.sums.rows) for archive in archives)


def _summaries(settings: Settings, done: Done) -> None:
    done["rows"] = summaries.ingestion_rate(settings).rows
    done["devices"] = summaries.device_summary(settings).devices


JOBS: Final[Mapping[str, Callable[[Settings, Done], None]]] = {
    "partitions": _partitions,
    "archive": _archive,
    "summaries": _summaries,
}


def notes(settings: Settings, name: str) -> list[Done]:
    """What a job noted."""
    path = _path(settings, name)
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def _path(settings: Settings, name: str) -> Path:
    return settings.data_dir / f"{name}.jsonl"


def main() -> None:
    """Run a job for ever; one that is asked to end finishes what it does."""
    settings, name = Settings.load(), sys.argv[1]
    pause, ended = float(os.environ.get(TICK, "10")), False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    while not ended:
        began, done = time.monotonic(), Done(at=time.time())
        try:
            JOBS[name](settings, done)
        except PipelineError as error:
            done["problem"] = str(error)
        done["seconds"] = round(time.monotonic() - began, 2)
        with _path(settings, name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(done) + "\n")
        until = time.monotonic() + pause
        while not ended and time.monotonic() < until:
            time.sleep(0.1)


if __name__ == "__main__":
    main()
