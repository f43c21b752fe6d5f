"""How many messages a second one producer gets acknowledged, and what a message costs it, with no sink at work."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from metrics_pipeline.bench import cpu, load, surroundings
from metrics_pipeline.bench.figures import Spread
from metrics_pipeline.bench.load import Beat
from metrics_pipeline.bench.place import Place
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.verification.verify import ShowProgress

FAST: Final[Mapping[str, Any]] = {
    "producer_publish_interval": 0,
    "kafka_batch_size": 500,
    "producer_queue_concurrency": 40,
}
"""As fast as the broker acknowledges: what differs from the defaults when nothing else is asked for."""


def steady(beats: Sequence[Beat]) -> list[Beat]:
    """The beats between the first acknowledgement and the end, without the second in which it began.

    Raises:
        ServiceError: too few to say anything.
    """
    kept = [beat for beat in beats if beat.acknowledged and not beat.done][1:]
    if len(kept) < 2:
        raise ServiceError("the producer ran too short to be measured: give it at least 5 seconds")
    return kept


def figures(beats: Sequence[Beat]) -> dict[str, Any]:
    """Messages a second, their spread over the seconds, and CPU microseconds a message, of a run's beats.

    Raises:
        ServiceError: there are too few.
    """
    kept = steady(beats)
    first, last = kept[0], kept[-1]
    messages = last.acknowledged - first.acknowledged
    each = [(b.acknowledged - a.acknowledged) / (b.at - a.at) for a, b in pairwise(kept)]
    spread = Spread.of(each)
    return {
        "messages_per_second": messages / (last.at - first.at),
        "messages_per_second_of_a_second": {"median": spread.median, "low": spread.low, "high": spread.high},
        "seconds": last.at - first.at,
        "messages": messages,
        "cpu_us_per_message": (last.cpu - first.cpu) * 1e6 / messages if messages else 0.0,
    }


def produce(place: Place, seconds: int, changed: Mapping[str, Any], progress: ShowProgress) -> dict[str, Any]:
    """Run one producer for some seconds; the result is one JSON object.

    Args:
        place: where the broker is.
        seconds: how long.
        changed: the user's own changes of producer settings, by field name; they win over `FAST`.
        progress: told how far it is.

    Raises:
        PipelineError: the producer failed, or a message was not acknowledged.
    """
    overrides = {**FAST, **changed, "producer_run_seconds": seconds}
    document = surroundings.describe(place)
    meter = cpu.CpuMeter(place.processes)
    with load.running(place, overrides) as running:
        running.wait_until_publishing()
        before, begun = meter.read(), time.monotonic()
        counted = running.beats[-1].acknowledged
        while running.alive():
            progress("producing", min(seconds, int(time.monotonic() - begun)), seconds)
            time.sleep(0.2)
        after = meter.read()
        last = running.wait()
        measured = figures(running.beats)
    services = cpu.per_row(before, after, last.acknowledged - counted)
    services.pop("total")
    # The meter also knows the bench itself, which only waits here.
    services.pop("bench", None)
    document["settings"] |= {name.upper(): value for name, value in overrides.items()}
    return {
        "bench": "produce",
        "correct": True,
        **document,
        **measured,
        "acknowledged": last.acknowledged,
        "cpu_us_per_message_by_part": {"producer": measured["cpu_us_per_message"], **services},
        "points": [
            {
                "seconds": round(b.at - running.beats[0].at, 3),
                "messages_per_second": (b.acknowledged - a.acknowledged) / (b.at - a.at),
            }
            for a, b in pairwise(steady(running.beats))
        ],
    }
