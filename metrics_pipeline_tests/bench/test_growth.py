"""What a growing table is planned to be: how readings are spread over partitions, and what disk it takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from metrics_pipeline.bench.growth import Plan, check_disk
from metrics_pipeline.bench.readings import Stream
from metrics_pipeline.errors import InstallError, SettingError
from metrics_pipeline.metric import decode
from metrics_pipeline.settings import Settings

NOW = datetime(2026, 11, 22, 20, 0, tzinfo=UTC)
GIB = 2**30


@pytest.fixture
def settings() -> Settings:
    return Settings(producer_min_metrics=100, producer_max_metrics=300, pipeline_memory_gb=24)


def test_an_hour_has_about_as_many_readings_as_a_partition_is_to_have(settings: Settings) -> None:
    plan = Plan("copy", 40_000, 4, partition_rows=8_000)
    begin = plan.begin(settings, NOW)
    stream = Stream(settings, begin, plan.round(settings))
    times = [decode(*pair).published_at for _ in range(4) for round_ in stream.take(plan.chunk) for pair in round_]
    assert begin < min(times) < max(times) < NOW
    hours = Counter(at.replace(minute=0, second=0, microsecond=0) for at in times)
    assert len(hours) in (5, 6, 7)
    inner = [hours[hour] for hour in sorted(hours)[1:-1]]
    assert all(6_500 < count < 9_500 for count in inner)


def test_the_tick_is_for_the_same_number_of_rows_at_each_size() -> None:
    assert Plan("copy", 100_000_000, 10).few == 1_000_000
    assert Plan("copy", 20_000_000, 4).few == 1_000_000
    assert Plan("copy", 1_000_000, 10).few == 50_000


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan("connect", 1_000_000, 10, "staging"), "--sink copy"),
        (Plan("copy", 100_000_000, 10, partition_rows=100_000), "more than 500 partitions"),
        (Plan("copy", 10_000, 1, partition_rows=150), "less than one round"),
        (Plan("copy", 10_000, 1, "plain", keep_rows=5_000), "no partitions"),
    ],
)
def test_what_cannot_be_is_refused(plan: Plan, reason: str, settings: Settings) -> None:
    with pytest.raises(SettingError, match=reason):
        plan.check(settings)
    Plan("copy", 100_000_000, 10).check(settings)


def test_a_disk_that_is_too_small_is_named_before_anything_begins(settings: Settings) -> None:
    plan = Plan("copy", 100_000_000, 10)
    with pytest.raises(
        InstallError, match=r"100,000,000 rows in 10 steps need about 3\d GiB .* has 25 GiB: give --rows \d+"
    ) as refused:
        check_disk(plan, settings, 25 * GIB)
    fitting = replace(plan, rows=int(str(refused.value).partition("--rows ")[2].split(",")[0]))
    assert 50_000_000 < fitting.rows < 100_000_000
    check_disk(fitting, settings, 25 * GIB)
    check_disk(plan, settings, 60 * GIB)


def test_what_is_needed_grows_with_what_is_kept(settings: Settings) -> None:
    plan = Plan("copy", 20_000_000, 10)
    assert replace(plan, layout="staging").needed(settings) > plan.needed(settings)
    assert replace(plan, steps=2).needed(settings) > plan.needed(settings)
    assert replace(plan, keep_rows=5_000_000, partition_rows=1_000_000).needed(settings) < plan.needed(settings)
    assert replace(plan, keep_rows=20_000_000).needed(settings) == plan.needed(settings)
    low = settings.model_copy(update={"disk_free_limit_gb": 1.0})
    assert plan.needed(settings) - plan.needed(low) == 4 * GIB


def test_the_clock_of_a_large_fleet_ends_soon_before_now() -> None:
    settings = Settings(producer_fleet_size=100_000, producer_min_devices=2_000, producer_max_devices=4_000)
    plan = Plan("copy", 100_000_000, 10)
    assert timedelta(hours=10) < NOW - plan.begin(settings, NOW) < timedelta(hours=10, minutes=30)
