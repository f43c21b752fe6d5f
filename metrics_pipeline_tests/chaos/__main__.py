"""`make chaos`: every scenario at full length, each on a stack of its own; exit code 1 when one of them finds a problem."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from metrics_pipeline.errors import PipelineError
from metrics_pipeline.settings import SinkKind
from metrics_pipeline_tests.chaos import ageing, quarantine, scenarios, stalls, upgrade
from metrics_pipeline_tests.chaos.processes import VoidError
from metrics_pipeline_tests.chaos.scenarios import Outcome
from metrics_pipeline_tests.chaos.stack import Place, own_stack

BROKEN: Final = "metrics_pipeline_tests.broken_sink"
MEMORY_GB: Final = 6.0


def broken(place: Place, kills: int) -> Outcome:
    """The crash test on a sink that is wrong on purpose: a problem is that it finds none."""
    found = scenarios.crashes(place, kills, module=BROKEN)
    outcome = Outcome(found.facts | {"lost": found.report.counts.lost}, report=found.report)
    outcome.require(found.report.counts.lost > 0, "a sink that commits its offsets first was not caught")
    return outcome


def say(line: str) -> None:
    """To standard error: standard output is for `--json`."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="default: all of them")
    parser.add_argument("--kills", type=int, default=5, help="deaths at each failpoint")
    parser.add_argument("--restarts", type=int, default=3, help="of PostgreSQL and of the broker")
    parser.add_argument("--seconds", type=float, default=120, help="of workers coming and going")
    parser.add_argument("--zombies", type=int, default=3, help="workers stopped inside a transaction")
    parser.add_argument("--cuts", type=int, default=20, help="of the line, on each side of COMMIT")
    parser.add_argument("--stalls", type=int, default=2, help="rounds of everything that can stand still")
    parser.add_argument("--records", type=int, default=10_000_000, help="drained while memory is watched")
    parser.add_argument("--big", type=int, default=1_000, help="messages of 1 MB among them")
    parser.add_argument(
        "--bad-seconds", type=float, default=300, help="of one bad record in a thousand, by Kafka Connect"
    )
    parser.add_argument(
        "--sick-seconds", type=float, default=300, help="of each fault of PostgreSQL, with Kafka Connect"
    )
    parser.add_argument(
        "--ageing-seconds", type=float, default=600, help="of partitions that come, are archived and go, with each sink"
    )
    parser.add_argument("--rows", type=int, default=20_000_000, help="in the table that is upgraded, with each sink")
    parser.add_argument("--sink", choices=["copy", "connect"], help="of those two with each sink, only this one")
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    parser.add_argument("--keep", action="store_true", help="leave folders with data and logs there")
    chosen = parser.parse_args()
    known: dict[str, Callable[[Place], Outcome]] = {
        "crashes": lambda place: scenarios.crashes(place, chosen.kills),
        "broken": lambda place: broken(place, 1),
        "restarts": lambda place: scenarios.restarts(place, chosen.restarts),
        "comings-and-goings": lambda place: scenarios.comings_and_goings(place, chosen.seconds),
        "zombies": lambda place: scenarios.zombies(place, chosen.zombies),
        "lost-replies": lambda place: scenarios.lost_replies(place, chosen.cuts),
        "stalls": lambda place: stalls.stalls(place, chosen.stalls),
        "silent-end": stalls.silent_end,
        "memory": lambda place: scenarios.memory(place, chosen.records, chosen.big),
    }
    # With Kafka Connect as the sink.
    connected: dict[str, Callable[[Place], Outcome]] = {
        "bad-records": lambda place: quarantine.bad_one_in_a_thousand(place, chosen.bad_seconds),
        "deaths-in-quarantine": quarantine.deaths,
        "sick-database": lambda place: quarantine.sick_database(place, chosen.sick_seconds),
    }
    # With one after the other.
    either: dict[str, Callable[[Place], Outcome]] = {
        "ageing": lambda place: ageing.ageing(place, chosen.ageing_seconds),
        "upgrade": lambda place: upgrade.upgrade(place, chosen.rows),
    }
    known |= connected | either
    both: list[SinkKind] = [chosen.sink] if chosen.sink else ["copy", "connect"]
    if unknown := set(chosen.scenarios) - set(known):
        parser.error(f"no scenario {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    # However it ends, the services end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.getLogger("metrics_pipeline").setLevel(logging.CRITICAL)
    results: dict[str, Any] = {}
    for name in chosen.scenarios or known:
        sinks: list[SinkKind] = both if name in either else ["connect" if name in connected else "copy"]
        for sink in sinks:
            label = f"{name} ({sink})" if name in either else name
            began = time.monotonic()
            outcome = attempt(known[name], sink, keep=chosen.keep)
            say(f"{'FAILED' if outcome.problems else 'passed'}  {label} ({time.monotonic() - began:.0f} s)")
            for line in [f"{fact}: {value}" for fact, value in outcome.facts.items()] + outcome.problems:
                say(f"        {line}")
            results[label] = {"problems": outcome.problems, **outcome.facts}
    if chosen.json:
        sys.stdout.write(json.dumps(results, indent=2) + "\n")
    return 1 if any(result["problems"] for result in results.values()) else 0


def attempt(scenario: Callable[[Place], Outcome], sink: SinkKind, *, keep: bool) -> Outcome:
    """Run a scenario on a stack of its own; what stops it is its problem."""
    try:
        with own_stack(sink=sink, memory_gb=MEMORY_GB, keep=keep) as place:
            if keep:
                say(f"        data and logs: {place.settings.data_dir}")
            return scenario(place)
    except (PipelineError, VoidError) as error:
        return Outcome(problems=[str(error)])


if __name__ == "__main__":
    sys.exit(main())
