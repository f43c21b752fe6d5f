"""A producer run as a process of its own, which tells each second how far it is, as lines of JSON.

It is the real producer: the same loop, ledger and delivery reports. Only the keys whose path into the table is watched are
sampled more often, because a benchmark lasts a minute and not a day.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from metrics_pipeline.bench.paths import end
from metrics_pipeline.bench.place import Place
from metrics_pipeline.errors import PipelineError, ServiceError
from metrics_pipeline.local.service import tail
from metrics_pipeline.producer.endpoints import Snapshot
from metrics_pipeline.producer.latency import LatencyProbe
from metrics_pipeline.producer.run import Producer, RunReport
from metrics_pipeline.settings import Settings

SAMPLE_SECONDS: Final = 0.05
"""Mean time between two sampled keys."""

READY_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Beat:
    """How far a producer is.

    Attributes:
        at: its monotonic clock, in seconds.
        acknowledged: messages so far.
        cpu: seconds that its process used so far.
        latencies: seconds from acknowledged to visible of the keys seen since the beat before.
        done: whether the run has ended.
        failed: messages certainly not in the topic.
        unknown: messages that nobody answered for.
        error: what ended it too early.
    """

    at: float
    acknowledged: int
    cpu: float
    latencies: list[float] = field(default_factory=list)
    done: bool = False
    failed: int = 0
    unknown: int = 0
    error: str | None = None


class _SampledProducer(Producer):
    """A producer whose acknowledged keys are sampled when somebody says so."""

    def sample(self) -> None:
        self._deliveries.sample()


class _DeafProbe(LatencyProbe):
    """Watches nothing: without a sink every key would be looked for until the end."""

    def offer(self, key: bytes, acknowledged_at: float) -> None:
        del key, acknowledged_at


def produce(settings: Settings, say: Callable[[Beat], None], *, watch: bool) -> RunReport:
    """Run the producer in this process, until its time is up or SIGTERM comes.

    Args:
        settings: of the producer and the services.
        say: told how far it is, about every second.
        watch: whether to measure latencies.
    """
    latencies: list[float] = []
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def beat(snapshot: Snapshot) -> None:
        seen = latencies[:]
        del latencies[: len(seen)]
        say(Beat(time.monotonic(), snapshot.acknowledged, time.process_time(), seen))

    probe = LatencyProbe(settings, latencies.append) if watch else _DeafProbe(settings)
    # No guard by the lag: it is what is measured.
    producer = _SampledProducer(settings, stop=stop, on_progress=beat, serve=False, probe=probe)
    ended = threading.Event()

    def sample() -> None:
        chance = random.Random(1)  # noqa: S311  # only so that samples do not keep time with the sink's flushes
        while not ended.wait(chance.uniform(0.5, 1.5) * SAMPLE_SECONDS):
            producer.sample()

    if watch:
        threading.Thread(target=sample, name="sampling", daemon=True).start()
    try:
        return producer.run()
    finally:
        ended.set()
        report = producer.report
        say(
            Beat(
                time.monotonic(),
                report.acknowledged,
                time.process_time(),
                latencies,
                done=True,
                failed=report.failed,
                unknown=report.unknown,
            )
        )


class Load:
    """A producer in a child process.

    Attributes:
        beats: what it told so far.
    """

    def __init__(self, place: Place, overrides: Mapping[str, Any], *, watch: bool) -> None:
        """Start it.

        Args:
            place: where the broker is.
            overrides: settings of the producer for this run, by field name.
            watch: whether to measure latencies.
        """
        self.beats: list[Beat] = []
        self._log = place.settings.data_dir / "logs" / "bench-producer.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        variables = {name.upper(): str(value) for name, value in overrides.items()}
        with self._log.open("ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "metrics_pipeline.bench.load", *(["--watch"] if watch else [])],
                env={**place.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, name="producer-beats", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.child.stdout or ():
            self.beats.append(Beat(**json.loads(line)))

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.child.poll() is None

    def wait_until_publishing(self) -> Beat:
        """The first beat with an acknowledged message.

        Raises:
            ServiceError: it ended, or none came within a minute.
        """
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            for beat in list(self.beats):
                if beat.acknowledged and not beat.done:
                    return beat
            if not self.alive():
                break
            time.sleep(0.05)
        raise ServiceError(f"the producer published nothing: {self.words()}")

    def wait(self) -> Beat:
        """Its last beat, once it has ended by itself.

        Raises:
            ServiceError: it failed, or a message was not acknowledged.
        """
        self.child.wait()
        self._reader.join()
        last = self.beats[-1] if self.beats else None
        if last is None or not last.done or last.error or self.child.returncode:
            raise ServiceError(f"the producer failed: {last.error if last and last.error else self.words()}")
        if last.failed or last.unknown:
            raise ServiceError(f"the producer: {last.failed:,} messages failed, {last.unknown:,} are unknown")
        return last

    def words(self) -> str:
        """The end of what it wrote on standard error."""
        return (tail(self._log, 1) or ["it said nothing"])[-1][:300]

    def close(self) -> None:
        """End it, if it still runs."""
        end(self.child)
        self._reader.join()
        if self.child.stdout is not None:
            self.child.stdout.close()


@contextmanager
def running(place: Place, overrides: Mapping[str, Any], *, watch: bool = False) -> Iterator[Load]:
    """A `Load` that has ended when the block does."""
    load = Load(place, overrides, watch=watch)
    try:
        yield load
    finally:
        load.close()


def main() -> int:
    """Entry point of the child process."""

    def say(beat: Beat) -> None:
        sys.stdout.write(json.dumps(asdict(beat)) + "\n")
        sys.stdout.flush()

    try:
        return 0 if produce(Settings.load(), say, watch="--watch" in sys.argv[1:]).clean else 1
    except PipelineError as error:
        say(Beat(time.monotonic(), 0, 0.0, done=True, error=str(error)))
        return 1


if __name__ == "__main__":
    sys.exit(main())
