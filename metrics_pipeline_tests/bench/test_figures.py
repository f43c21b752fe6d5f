"""Statistics, ratios, search and verdicts of the benchmarks, on made-up measurements."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics_pipeline.bench import cpu, live
from metrics_pipeline.bench.drain import chosen, order
from metrics_pipeline.bench.figures import Spread, quantile, quantiles, ratio_of_medians, ratios, slope
from metrics_pipeline.bench.live import Look
from metrics_pipeline.bench.load import Beat
from metrics_pipeline.bench.produce import figures
from metrics_pipeline.bench.stopwatch import Timed
from metrics_pipeline.bench.table import Stored
from metrics_pipeline.errors import ServiceError, SettingError

RATES = {"limit-2": [400.0, 500.0, 450.0], "copy-2": [200.0, 300.0, 180.0], "connect": [50.0, 40.0, 45.0]}


def test_a_spread_is_the_median_between_the_least_and_the_greatest() -> None:
    assert Spread.of([3.0, 9.0, 1.0, 5.0]) == Spread(4.0, 1.0, 9.0)
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


def test_ratios_of_medians() -> None:
    assert ratio_of_medians(RATES, "limit-2") == {"copy-2": pytest.approx(200 / 450), "connect": pytest.approx(0.1)}
    assert ratio_of_medians(RATES, "limit-1") == {}


def test_ratios_within_rounds_pair_what_ran_together() -> None:
    found = ratios(RATES, "limit-2")
    assert found["copy-2"] == Spread(0.5, 0.4, 0.6)
    assert "limit-2" not in found
    assert ratios(RATES, "connect-baseline") == {}


@pytest.mark.parametrize(("percent", "value"), [(50, 50), (95, 95), (99, 99), (100, 100), (0.5, 1)])
def test_quantiles_are_values_that_were_measured(percent: float, value: int) -> None:
    assert quantile(list(range(100, 0, -1)), percent) == value


def test_quantiles_of_nothing_and_of_one() -> None:
    assert quantiles([]) == {"p50": None, "p95": None, "p99": None}
    assert quantiles([7.0]) == {"p50": 7.0, "p95": 7.0, "p99": 7.0}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.sampled_from([50, 95, 99]))
def test_a_quantile_has_its_share_at_or_below(values: list[float], percent: int) -> None:
    found = quantile(values, percent)
    assert found is not None
    assert 100 * sum(value <= found for value in values) >= percent * len(values)
    assert 100 * sum(value < found for value in values) < percent * len(values)


def test_slope() -> None:
    assert slope([(1, 10), (2, 12), (3, 14)]) == pytest.approx(2)
    assert slope([(1, 10)]) == slope([]) == slope([(1, 3), (1, 9)]) == 0.0


def test_cpu_a_row_counts_what_was_used_between_two_readings() -> None:
    costs = cpu.per_row(
        {"postgres": 10.0, "bench": 1.0, "gone": 5.0}, {"postgres": 14.0, "bench": 1.5, "new": 9.0}, 1_000_000
    )
    assert costs == {"bench": pytest.approx(0.5), "postgres": pytest.approx(4.0), "total": pytest.approx(4.5)}


def test_every_path_takes_every_place_in_turn() -> None:
    names = ["a", "b", "c"]
    orders = [order(names, number) for number in range(3)]
    assert orders[0] == names
    for place in range(3):
        assert sorted(one[place] for one in orders) == names


def test_paths_are_known_and_named_once() -> None:
    assert chosen(["copy-4", "limit-2"]) == ("copy-4", "limit-2")
    for wrong in (["copy-0"], ["copy"], ["connect-2"], ["connect", "connect"], [""]):
        with pytest.raises(SettingError, match="--paths"):
            chosen(wrong)


def looks(*lags: int) -> list[Look]:
    return [Look(float(second), lag) for second, lag in enumerate(lags)]


STEADY = looks(3000, 5000, 2000, 4000, 3000, 5000, 2000, 4000)


def test_a_rate_is_sustained_when_all_of_it_is_published_and_stored() -> None:
    assert live.problem(10_000, 9_990, 9_950, STEADY) is None


@pytest.mark.parametrize(
    ("acknowledged", "stored", "seen", "reason"),
    [
        (9_000, 9_000, STEADY, "the producer reached 9,000"),
        (10_000, 9_000, STEADY, "9,000 rows/s were stored"),
        (10_000, 9_900, looks(0, 0, 60_000, 60_000, 60_000, 60_000), "60,000 records waited at the end"),
        (10_000, 9_900, looks(0, 0, 0, 1_000, 2_000, 3_000, 4_000, 5_000), "the lag grew by 1,000"),
    ],
)
def test_a_rate_is_not_sustained(acknowledged: float, stored: float, seen: list[Look], reason: str) -> None:
    assert reason in (live.problem(10_000, acknowledged, stored, seen) or "")


@given(st.integers(700, 900_000), st.sampled_from([20_000, 100_000]))
def test_the_highest_rate_is_found_within_its_precision(limit: int, first: int) -> None:
    tried = []

    def tries(rate: int) -> bool:
        tried.append(rate)
        return rate <= limit

    found = live.highest(tries, first)
    assert found <= limit <= found * (1 + live.PRECISION) + 100
    assert len(tried) < 25
    assert len(set(tried)) == len(tried)


def test_no_rate_holds_when_the_sink_stores_nothing() -> None:
    with pytest.raises(ServiceError, match="no rate holds"):
        live.highest(lambda _: False, 20_000)


@pytest.mark.parametrize("rate", [200_000, 100_000, 20_000, 2_000, 999, 3])
def test_rounds_of_a_producer_add_up_to_its_rate(rate: int) -> None:
    settings = live.paced(rate)
    assert settings["producer_min_metrics"] == settings["producer_max_metrics"]
    rounds = 1000 / settings["producer_publish_interval"]
    assert settings["producer_min_metrics"] * rounds == pytest.approx(rate, abs=rounds)


def test_a_producers_figures_leave_out_its_start_and_its_end() -> None:
    beats = [
        Beat(100.0, 0, 1.0),
        Beat(101.0, 5_000, 1.5),
        Beat(102.0, 205_000, 2.0),
        Beat(103.0, 425_000, 2.8),
        Beat(104.0, 605_000, 3.6),
        Beat(109.0, 605_000, 3.7, done=True),
    ]
    found = figures(beats)
    assert found["messages"] == 400_000
    assert found["messages_per_second"] == pytest.approx(200_000)
    assert found["cpu_us_per_message"] == pytest.approx(4.0)
    assert found["messages_per_second_of_a_second"] == {"median": 200_000, "low": 180_000, "high": 220_000}
    with pytest.raises(ServiceError, match="too short"):
        figures(beats[:3])


BEGAN = datetime(2026, 11, 22, 20, 0, tzinfo=UTC)


def after(seconds: float) -> datetime:
    return BEGAN + timedelta(seconds=seconds)


def test_the_clock_counts_what_began_after_the_first_commit() -> None:
    timed = Timed.of(Stored(BEGAN, after(0.5), after(9.5), 2_000_000, 40, 1_900_000), after(11), {})
    assert timed.rows_per_second == pytest.approx(1_900_000 / 9)
    assert timed.steady
    assert timed.by_commit_times


@pytest.mark.parametrize("counted", [None, 0, 90_000])
def test_the_clock_counts_everything_when_there_are_too_few_batches(counted: int | None) -> None:
    timed = Timed.of(Stored(BEGAN, after(0.5), after(2), 200_000, 4, counted), after(3), {})
    assert timed.rows_per_second == pytest.approx(200_000 / 2)
    assert not timed.steady


def test_the_clock_ends_when_all_is_seen_where_no_commit_times_are_kept() -> None:
    timed = Timed.of(Stored(BEGAN, None, None, 200_000, 4, None), after(4), {})
    assert timed.rows_per_second == pytest.approx(200_000 / 4)
    assert not timed.steady
    assert not timed.by_commit_times
