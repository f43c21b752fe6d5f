"""The COPY sink as the tests run it: its workers may die at a named place, one place after another, and note what they try to write.

    python -m metrics_pipeline_tests.chaos.sink --workers N

It is the real command with the real workers; only what is patched below differs, and what is in the environment:
`CHAOS_FOLDER` takes the notes, `CHAOS_PLACES` names the failpoints to use, separated by commas (none: nobody dies),
`CHAOS_SESSION_MS` is how long the group waits for a dead worker, and `CHAOS_GROUP` is another group.
"""

from __future__ import annotations

import fcntl
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from metrics_pipeline import cli
from metrics_pipeline.copy_sink import failpoint, supervisor, worker
from metrics_pipeline.copy_sink.batch import Batch
from metrics_pipeline.copy_sink.store import Store, Written

FOLDER: Final = "CHAOS_FOLDER"
PLACES: Final = "CHAOS_PLACES"
SESSION: Final = "CHAOS_SESSION_MS"
GROUP: Final = "CHAOS_GROUP"
MARKS: Final = "marks"
TRIES: Final = "tries"

CHANCES: Final = defaultdict(lambda: 0.3, polled=0.05, copying=0.15)
"""How likely a worker dies when it reaches its place: some are passed many times a batch."""
LONGEST_PAUSE: Final = 0.2
"""Seconds before a worker is replaced: the real supervisor takes its time with one that dies again and again."""

_work = supervisor.work


class NotingStore(Store):
    """A store that notes what it is about to write, so that what was delivered twice can be told."""

    def write(self, batch: Batch) -> Written:
        with (Path(os.environ[FOLDER]) / TRIES).open("a") as file:
            file.writelines(
                f"{os.getpid()} {chunk.partition} {chunk.start} {chunk.stop}\n" for chunk in batch.chunks.values()
            )
        return super().write(batch)


def work(name: str, pipe: Connection, store: type[Store] = NotingStore) -> None:
    """The body of a worker process."""
    folder = Path(os.environ[FOLDER])
    if places := os.environ.get(PLACES):
        place = _next_place(folder, places.split(","))
        os.environ[failpoint.VARIABLE] = f"{place}={CHANCES[place]}"
        os.environ[failpoint.MARKS] = str(folder / MARKS)
    changes: dict[str, Any] = {}
    if session := os.environ.get(SESSION):
        changes |= {"session.timeout.ms": int(session), "heartbeat.interval.ms": int(session) // 4}
    if group := os.environ.get(GROUP):
        changes["group.id"] = group
    plain = worker.consumer_config
    worker.consumer_config = lambda settings: plain(settings) | changes
    _work(name, pipe, store)


def _next_place(folder: Path, places: Iterable[str]) -> str:
    """The place that the fewest workers were given so far."""
    with (folder / "lives").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        given = Counter(file.read().split())
        place = min(places, key=lambda name: (given[name], random.random()))
        file.write(f"{place}\n")
    return place


def deaths(folder: Path) -> Counter[str]:
    """How many workers died at each place."""
    marks = folder / MARKS
    return Counter(marks.read_text().split() if marks.exists() else [])


def delivered_again(folder: Path) -> int:
    """Records that more than one process tried to write, each counted as often as it was too much."""
    tries: dict[int, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    if (folder / TRIES).exists():
        for line in (folder / TRIES).read_text().splitlines():
            process, partition, start, stop = line.split()
            tries[int(partition)][process].append((int(start), int(stop)))
    return sum(
        sum(map(covered, processes.values())) - covered([span for spans in processes.values() for span in spans])
        for processes in tries.values()
    )


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """How many numbers lie in at least one of these half-open spans."""
    total, end = 0, -1
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def main(body: Callable[[str, Connection], None] = work) -> None:
    """Run the command `sink` with other workers."""
    supervisor.work = body  # type: ignore[assignment]
    supervisor.LONGEST_PAUSE = LONGEST_PAUSE  # type: ignore[misc]
    cli.app(["sink", *sys.argv[1:]])


if __name__ == "__main__":
    main()
