"""Settings that no developer's environment can touch, and the embedded stack, started once for a whole run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import psycopg
import pytest
import stamina

from metrics_pipeline.settings import ROOT, Settings
from metrics_pipeline_tests.patience import deadline, patience

for _name in [*Settings.model_fields, "dagster_home", "dagster_postgres_url"]:
    os.environ.pop(_name.upper(), None)
os.environ["PIPELINE_ENV_FILE"] = str(Path(tempfile.gettempdir()) / "metrics-pipeline-tests-have-no-env-file")

# A shell starts what runs in the background with SIGINT ignored. Dagster makes SIGTERM do what SIGINT does, and every child
# would inherit both: services could only be killed.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# How long an example takes says how busy the machine is, not whether it holds.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


OCCUPANCY = ROOT.parent / "shared" / "data" / "occupancy"


@pytest.fixture(scope="session")
def occupancy() -> list[Path]:
    """Real readings, which the project does not carry."""
    files = sorted(OCCUPANCY.glob("*.txt"))
    if not files:
        pytest.skip("the occupancy data set is not beside this checkout")
    return files


@pytest.fixture
def another_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not that of this checkout, whose stack may run or have run."""
    monkeypatch.setenv("PIPELINE_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def without_backoff() -> Iterator[None]:
    """A request to a Connect that is away is tried three times, and at once."""
    with stamina.set_testing(True, attempts=3):
        yield


@dataclass(frozen=True)
class RunningStack:
    """PostgreSQL, broker and Connect on free ports in a temporary folder: migrated, topic and connector there.

    Attributes:
        settings: of this stack.
        environment: for child processes, so that commands meet this stack.
        services: the embedded stack itself, to stop or kill parts of it.
    """

    settings: Settings
    environment: Mapping[str, str]
    services: Any

    def cli(self, *arguments: str, timeout: float = 300, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run `metrics-pipeline …` against this stack."""
        command = [sys.executable, "-m", "metrics_pipeline", *arguments]
        return subprocess.run(
            command,
            env=dict(self.environment),
            cwd=self.settings.data_dir,
            capture_output=True,
            text=True,
            timeout=patience(timeout),
            check=check,
        )

    def admin(self, database: str = "metrics") -> psycopg.Connection[Any]:
        """A superuser's connection: the hand that changes things behind the pipeline's back."""
        return psycopg.connect(self.settings.admin_url(database), autocommit=True)


WORTH_CLEARING = 20_000
"""Records that each `verify` of the next module would read once more."""


@pytest.fixture(scope="module")
def stack(started_stack: RunningStack) -> RunningStack:
    """The stack that all modules share; what those before stored is gone when it is much, so that no `verify` reads it again."""
    from metrics_pipeline import kafka
    from metrics_pipeline.bench.place import clear
    from metrics_pipeline.sinks import active

    settings = started_stack.settings
    if sum(high - low for low, high in kafka.watermarks(settings).values()) > WORTH_CLEARING:
        give_up = deadline(60)
        while left := active.lag(settings).total:
            assert time.monotonic() < give_up, f"{left} records are not stored"
            time.sleep(0.2)
        clear(settings)
    return started_stack


@pytest.fixture(scope="session")
def started_stack() -> Iterator[RunningStack]:
    """The real parts, without Dagster: its jobs are run against this stack by the tests that need them."""
    from metrics_pipeline import kafka, partitions, postgres
    from metrics_pipeline.local import account, dagster, environment
    from metrics_pipeline.local.stack import build
    from metrics_pipeline.sinks import connector

    folder = Path(tempfile.mkdtemp(prefix="metrics-pipeline-"))
    own = environment.isolated(folder) | {"PIPELINE_MEMORY_GB": "4"}
    with environment.replaced(own):
        environment.write_secrets()
        settings = Settings.load()
        embedded = build(settings, with_dagster=False, quiet=True)
    try:
        with environment.replaced(own):
            embedded.start(lambda _line: None, provision=False)
            dagster.prepare_home(settings)
            postgres.migrate(settings)
            partitions.make(settings)
            kafka.ensure_topic(settings)
            connector.ensure_connector(settings)
            variables = environment.for_python(settings)
        yield RunningStack(settings, variables, embedded)
    finally:
        embedded.stop(lambda _line: None)
        home = account.postgres_home(settings.data_dir, account.unprivileged())
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
