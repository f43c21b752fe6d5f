"""docs/add-a-metric.md, followed to the letter in a copy of the checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metrics_pipeline.settings import ROOT
from metrics_pipeline_tests.documents import fences, page

PAGE = page("add-a-metric")
STEP = re.compile(
    r"^In `(?P<file>[^`]+)`, behind `(?P<anchor>[^\n]+)`:\n\n```python\n(?P<lines>.*?)^```$", re.MULTILINE | re.DOTALL
)

SHARE = """
from collections import Counter
from datetime import UTC, datetime, timedelta
import numpy as np
from metrics_pipeline.copy_sink import canonical
from metrics_pipeline.copy_sink.tags import TagTable
from metrics_pipeline.metric import MetricName, decode
from metrics_pipeline.producer.generator import Generator
from metrics_pipeline.settings import ProducerSettings

start = datetime(2026, 1, 1, tzinfo=UTC)
wires = Generator(ProducerSettings(), start).round(start + timedelta(seconds=1))
keys, values = zip(*wires)
lengths = (np.array([*map(len, texts)]) for texts in (keys, values))
columns, others = canonical.parse(canonical.padded(keys), canonical.padded(values), *lengths, TagTable())
counts = Counter(columns.metric_name.tolist())
assert sorted(counts) == sorted(MetricName), counts
assert [decode(key, value).metric_name for key, value in wires] == columns.metric_name.tolist()
print(f"{len(columns)} of {len(wires)} on the fast road, {counts[60]} of them wind")
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What git tracks, and what it would."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def follow(folder: Path) -> None:
    """Every step of the page that changes a file."""
    steps = list(STEP.finditer(PAGE.read_text("utf-8")))
    assert len(steps) == 3
    for step in steps:
        file = folder / step["file"]
        text = file.read_text("utf-8")
        assert text.count(f"{step['anchor']}\n") == 1, step["anchor"]
        file.write_text(text.replace(f"{step['anchor']}\n", f"{step['anchor']}\n{step['lines']}"), "utf-8")
    (migration,) = fences(PAGE, "sql")
    (folder / "sql" / "migrations" / "20990101000001_add_metric_wind.sql").write_text(migration, "utf-8")


def test_the_page_gives_a_metric_that_takes_the_fast_road(copy: Path) -> None:
    follow(copy)
    for line in "".join(fences(PAGE, "sh")).splitlines():
        if line.startswith("python "):
            run(copy, *line.split()[1:])
    assert '"enum": [' in (copy / "connect" / "schemas" / "metric-key.json").read_text("utf-8")
    told = run(copy, "-c", SHARE)
    print(told)  # noqa: T201  # the share, for whoever runs it with -s
    found = re.fullmatch(r"(\d+) of (\d+) on the fast road, (\d+) of them wind\n", told)
    assert found is not None
    assert found[1] == found[2]
    assert int(found[3]) > 100
    assert "60" in (copy / "connect" / "schemas" / "metric-value.json").read_text("utf-8")


def test_a_step_that_is_left_out_is_named(copy: Path) -> None:
    follow(copy)
    generator = copy / "metrics_pipeline" / "producer" / "generator.py"
    generator.write_text(re.sub(r".*MetricName\.WIND.*\n", "", generator.read_text("utf-8")), "utf-8")
    with pytest.raises(AssertionError, match=r"no simulated device measures WIND"):
        run(copy, "-c", SHARE)
