"""`make containers`: docker-compose.yaml on a container engine, from a clean clone; the last line says what ran and on what."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from platformdirs import user_cache_dir

from metrics_pipeline_tests.containers import bases, engine, scenarios
from metrics_pipeline_tests.containers.deployment import ProblemError
from metrics_pipeline_tests.containers.engine import Engine, UnavailableError
from metrics_pipeline_tests.containers.faults import faults

NOT_RUN: Final = 3
"""Exit code when no engine, no Compose or no stand-ins can be had, unless --if-possible makes it 0."""
LONGEST_SECONDS: Final = 420.0
"""What a scenario takes at most on a machine of two cores that does nothing else."""
PLUGINS: Final = (
    "~/.docker",
    "/usr/local/lib/docker",
    "/usr/local/libexec/docker",
    "/usr/lib/docker",
    "/usr/libexec/docker",
)


def say(line: str) -> None:
    """At once, also into a file."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="make containers", description=__doc__)
    known = scenarios.ALL | {"faults": faults}
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--stand-in", action="store_true", help="make the images out of Debian's packages: no registry")
    parser.add_argument("--if-possible", action="store_true", help="exit code 0 where it cannot be run")
    parser.add_argument("--within", type=float, default=1e9, help="seconds after which no further scenario begins")
    parser.add_argument("--revision", help="a commit to run in place of the checkout")
    parser.add_argument("--seconds", type=float, default=60, help="of load in `soak`")
    parser.add_argument("--cache", type=Path, default=Path(user_cache_dir("metrics-pipeline")) / "containers")
    given = parser.parse_args()
    if unknown := set(given.scenarios) - set(known):
        parser.error(f"no scenario {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    given.cache.mkdir(parents=True, exist_ok=True)
    try:
        with _engine(given.cache, stand_in=given.stand_in) as where:
            made = bases.make(where, given.cache) if given.stand_in else []
            compose = _compose(where, given.cache)
            say(f"{where.version}, {compose}; ready after {time.monotonic() - began:.0f} s")
            run = scenarios.Run(where, given.stand_in, given.seconds, say, given.revision)
            failed, late = [], []
            for name in given.scenarios or known:
                # As long as the longest of them takes.
                if time.monotonic() - began + LONGEST_SECONDS > given.within:
                    late.append(name)
                elif not _held(run, name, known[name]):
                    failed.append(name)
            if not given.scenarios and not failed and (untyped := scenarios.untyped(run)):
                say(f"FAILED: commands of the page that nothing typed: {untyped}")
                failed.append("page")
    except UnavailableError as error:
        say(f"containers: NOT RUN: {error}")
        return 0 if given.if_possible else NOT_RUN
    took = time.monotonic() - began
    stood = "; ".join(f"{one.real} by {one.what}" for one in made)
    real = f"{where.version}, {compose}, our images built by the Dockerfile"
    if late:
        say(f"containers: NOT RUN for want of time: {', '.join(late)}")
    say(f"containers: {'FAILED: ' + ', '.join(failed) if failed else 'all held'} in {took:.0f} s. Real: {real}. "
        f"Stood in for: {stood or 'nothing, every image is the one that the files name'}.")  # fmt: skip
    return 1 if failed else 0


def _held(run: scenarios.Run, name: str, scenario: Callable[[scenarios.Run], None]) -> bool:
    began = time.monotonic()
    say(f"{name}: {(scenario.__doc__ or '').splitlines()[0]}")
    try:
        scenario(run)
    except (ProblemError, RuntimeError, LookupError, ValueError, subprocess.SubprocessError, OSError) as error:
        say(f"  FAILED after {time.monotonic() - began:.0f} s: {error}")
        return False
    say(f"  held in {time.monotonic() - began:.0f} s, at a load of {os.getloadavg()[1]:.0f}")
    return True


@contextmanager
def _engine(cache: Path, *, stand_in: bool) -> Iterator[Engine]:
    found = None if stand_in else engine.found()
    if found:
        yield found
    else:
        with engine.own(cache) as own:
            yield own


def _compose(where: Engine, cache: Path) -> str:
    """Its version; Debian's is fetched where there is none."""
    config = where.environment.get("DOCKER_CONFIG")
    if config and where.own:
        plugins = Path(config) / "cli-plugins"
        plugins.mkdir(exist_ok=True)
        places = (Path(place).expanduser() / "cli-plugins" / "docker-compose" for place in PLUGINS)
        known = next((place for place in places if os.access(place, os.X_OK)), None)
        (plugins / "docker-compose").symlink_to(known or bases.compose(where, cache))
    done = subprocess.run(
        ["docker", "compose", "version", "--short"], env=where.environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise UnavailableError("there is no `docker compose`")
    return f"Compose {done.stdout.strip()}"


if __name__ == "__main__":
    sys.exit(main())
