"""The asset of the archive has a partition for each one of the table."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from metrics_pipeline.defs import archive
from metrics_pipeline.partitions import bound_after
from metrics_pipeline.settings import PartitionWidth

NOW = datetime(2026, 11, 26, 10, 20, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("width", "key"),
    [("hour", "2026-11-26-10:00"), ("day", "2026-11-26"), ("month", "2026-11-01")],
)
def test_a_partition_of_the_table_is_one_of_the_asset(width: PartitionWidth, key: str) -> None:
    definition = archive.partitions_of(width)
    assert definition.get_partition_key_for_timestamp(NOW.timestamp()) == key
    window = definition.time_window_for_partition_key(key)
    assert window.end == bound_after(width, NOW)
    assert bound_after(width, window.start - timedelta(microseconds=1)) == window.start
    assert definition.timezone == "UTC"


def test_minutes_are_for_tests() -> None:
    now = datetime.now(UTC).replace(second=0, microsecond=0)
    definition = archive.partitions_of("minute")
    key = definition.get_partition_key_for_timestamp(now.timestamp())
    assert definition.time_window_for_partition_key(key).start == now
    assert len(definition.get_partition_keys()) <= 2 * 24 * 60


@pytest.mark.parametrize(
    ("given", "first"), [("hour", "2026-01-01-00:00"), ("day", "2026-01-01"), ("century", "2026-01-01")]
)
def test_the_setting_says_of_how_much_time(given: str, first: str) -> None:
    """A bad one is told by the run that needs it, not by definitions that do not load."""
    code = "from metrics_pipeline.defs.archive import PARTITIONS; print(PARTITIONS.get_first_partition_key())"
    environment = {**os.environ, "METRICS_PARTITION": given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == (first, 0), done.stderr
