"""The page on the archive: its programs read an archive as it lies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from metrics_pipeline.archive.folder import ArchiveFolder
from metrics_pipeline.archive.parquet import SCHEMA
from metrics_pipeline.settings import ROOT
from metrics_pipeline_tests.archive.test_checking import archived
from metrics_pipeline_tests.documents import fences, table

PAGE = ROOT / "docs" / "archive.md"
PROGRAMS = fences(PAGE, "python")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda text: text.split()[1])
def test_the_programs_run_as_they_are_printed(program: str, tmp_path: Path) -> None:
    archived(ArchiveFolder(tmp_path / "archive"))
    # What is being made, or was left, is not read.
    (tmp_path / "archive" / ".making-metrics_p20261127").mkdir()
    (tmp_path / "archive" / ".making-metrics_p20261127" / "part-00000.parquet").write_bytes(b"PAR1")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "temperature" in done.stdout or "2026-11-26" in done.stdout


def test_both_readers_have_a_program() -> None:
    assert [program.split()[1] for program in PROGRAMS] == ["duckdb", "datetime"]


def test_the_columns_are_those_of_the_files() -> None:
    assert [row[0].strip("`") for row in table(PAGE, "## Read it")] == list(SCHEMA)
