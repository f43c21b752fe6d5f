"""The wheel, installed where there is no checkout, runs the pipeline in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from metrics_pipeline.local.account import postgres_home, unprivileged
from metrics_pipeline.local.environment import isolated
from metrics_pipeline.settings import ROOT
from metrics_pipeline_tests.integration.test_keeper import LOAD
from metrics_pipeline_tests.patience import deadline, patience

pytestmark = [pytest.mark.integration, pytest.mark.whole_stack]

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Installed:
    """The wheel in a virtual environment of its own.

    Attributes:
        bin: of that environment.
        folder: where it is run; empty at first.
        environment: ports of its own; `.env` and the data stand where they are by default.
    """

    bin: Path
    folder: Path
    environment: dict[str, str]

    def run(self, program: str, *arguments: str, timeout: float = 200) -> str:
        """What a program of it prints; it must succeed."""
        done = subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def rows(self) -> int:
        """How many are stored."""
        return int(self.run("metrics-pipeline", "sql", "--plain", "SELECT count(*) FROM metrics").split()[-1])


def install(wheel: Path, folder: Path) -> Path:
    """Make an environment that has the wheel, and of this one's packages all but ours; returns its `bin`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # A path that a .pth file adds has no .pth files of its own read, and such a file is how this checkout is installed.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    for program in BIN.iterdir():
        copy = folder / "bin" / program.name
        if copy.exists() or not program.is_file():
            continue
        text = program.read_bytes()
        if text.startswith(b"#!" + str(BIN).encode()):
            copy.write_bytes(text.replace(str(BIN).encode(), str(copy.parent).encode(), 1))
            copy.chmod(0o755)
        else:
            copy.symlink_to(program)
    (folder / "bin" / "metrics-pipeline").unlink()
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return folder / "bin"


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Installed]:
    """Built from this checkout."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    folder = tmp_path / "empty"
    folder.mkdir()
    own = {name: value for name, value in isolated(folder).items() if name.endswith("_PORT")}
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIPELINE_", "DAGSTER_", "PYTHON"))
    }
    made = Installed(install(wheel, tmp_path / "venv"), folder, clean | own | LOAD | {"PIPELINE_MEMORY_GB": "4"})
    try:
        yield made
    finally:
        stopped = subprocess.run([made.bin / "metrics-pipeline", "down"], cwd=folder, env=made.environment, check=False)
        shutil.rmtree(postgres_home(folder / ".local", unprivileged()), ignore_errors=True)
        assert stopped.returncode == 0


def test_the_wheel_does_the_main_job_in_an_empty_folder(installed: Installed) -> None:
    code = "import metrics_pipeline, metrics_pipeline.settings as s; print(metrics_pipeline.__file__, s.CHECKOUT)"
    assert installed.run("python", "-c", code).split() == [
        str(next((installed.bin.parent / "lib").glob("*/site-packages/metrics_pipeline/__init__.py"))),
        "None",
    ]
    installed.run("metrics-pipeline", "up", "--detach", timeout=patience(400))
    give_up = deadline(90)
    before = installed.rows()
    while (after := installed.rows()) <= before:
        assert time.monotonic() < give_up, f"{after} rows"
        time.sleep(1)
    assert "0 lost, 0 unexpected, 0 different" in installed.run("metrics-pipeline", "verify", timeout=patience(300))
    home = installed.folder / ".local" / "dagster_home"
    executed = Installed(installed.bin, installed.folder, installed.environment | {"DAGSTER_HOME": str(home)})
    executed.run("dagster", "job", "execute", "-m", "metrics_pipeline.definitions", "-j", "provision")
    assert {path.name for path in installed.folder.iterdir()} == {".env", ".local"}
