"""Simulated readings: what each setting changes, keys that never repeat, and values that look like their metric."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics_pipeline.metric import MetricName, Reading, decode, encode
from metrics_pipeline.producer import generator as module
from metrics_pipeline.producer.generator import Fleet, Floats, Generator
from metrics_pipeline.settings import ProducerSettings

START = datetime(2026, 11, 22, 16, 0, 0, 0, UTC)
INTERVAL = timedelta(milliseconds=250)


def generator(start: datetime = START, **changes: Any) -> Generator:
    small = {"producer_min_metrics": 60, "producer_max_metrics": 120} | changes
    return Generator(ProducerSettings(**small), start)


def rounds(made: Generator, count: int, start: datetime = START, interval: timedelta = INTERVAL) -> list[list[Reading]]:
    return [[decode(*message) for message in made.round(start + interval * (n + 1))] for n in range(count)]


sizes = st.tuples(st.integers(1, 300), st.integers(1, 300)).map(sorted)


@settings(deadline=None)
@given(
    metrics=sizes,
    devices=st.tuples(st.integers(1, 50), st.integers(1, 50)).map(sorted),
    seed=st.integers(-5, 2**40),
    start=st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    gaps=st.lists(st.timedeltas(timedelta(0), timedelta(days=400)), min_size=1, max_size=4),
)
def test_every_message_is_on_the_wire_format_and_no_key_repeats(
    metrics: list[int], devices: list[int], seed: int, start: datetime, gaps: list[timedelta]
) -> None:
    made = generator(
        start,
        producer_min_metrics=metrics[0],
        producer_max_metrics=metrics[1],
        producer_min_devices=devices[0],
        producer_max_devices=devices[1],
        producer_seed=seed,
    )
    now, before, keys = start, start, set()
    for gap in gaps:
        now += gap
        messages = made.round(now)
        assert len(messages) == 0 or metrics[0] <= len(messages) <= metrics[1]
        for key, value in messages:
            reading = decode(key, value)
            assert encode(reading) == (key, value)  # byte for byte what every other producer writes
            assert before < reading.published_at <= now
            keys.add((reading.device_id, reading.published_at, reading.metric_name))
        if messages:
            before = now
            assert len(keys) >= len(messages)
            assert len({key for key, _ in messages}) == len(messages)


def test_keys_never_repeat_across_rounds_as_fast_as_they_come() -> None:
    start = datetime.now(UTC)
    made = generator(start, producer_min_metrics=2500, producer_max_metrics=7500)
    keys: set[bytes] = set()
    total = 0
    while total < 100_000:
        messages = made.round(datetime.now(UTC))
        total += len(messages)
        keys.update(key for key, _ in messages)
    assert len(keys) == total


def test_a_second_run_starts_after_the_first() -> None:
    first = [message for n in range(3) for message in generator().round(START + INTERVAL * (n + 1))]
    again = START + INTERVAL * 3
    second = generator(again).round(again + INTERVAL)
    assert max(decode(*message).published_at for message in first) < min(decode(*m).published_at for m in second)


def test_a_clock_that_stands_still_or_steps_back_gives_nothing() -> None:
    made = generator()
    assert made.round(START) == []
    assert made.round(START + INTERVAL)
    assert made.round(START + INTERVAL) == []
    assert made.round(START) == []
    assert made.round(START + INTERVAL * 2)


def test_a_round_that_is_too_early_does_not_redraw_its_size() -> None:
    """Or small rounds would be preferred when the producer is unthrottled."""
    patient, eager = generator(), generator()
    for _ in range(5):
        assert eager.round(START) == []
    assert eager.round(START + INTERVAL) == patient.round(START + INTERVAL)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (5, 5), (250, 250), (100, 200)])
def test_min_and_max_metrics_bound_a_round(low: int, high: int) -> None:
    counts = [len(r) for r in rounds(generator(producer_min_metrics=low, producer_max_metrics=high), 40)]
    assert low <= min(counts) <= max(counts) <= high
    assert len(set(counts)) > (1 if low < high else 0)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (7, 7), (50, 50), (2, 9)])
def test_min_and_max_devices_bound_a_round(low: int, high: int) -> None:
    made = generator(producer_min_devices=low, producer_max_devices=high)
    counts = [len({reading.device_id for reading in r}) for r in rounds(made, 40)]
    assert low <= min(counts) <= max(counts) <= high
    assert len(set(counts)) > (1 if low < high else 0)


def test_fleet_size_bounds_the_devices_of_a_run() -> None:
    made = generator(producer_fleet_size=12, producer_max_devices=5)
    seen = {reading.device_id for r in rounds(made, 60) for reading in r}
    assert seen == {device.device_id for device in Fleet(12, 1).devices}


def test_the_fleet_is_the_same_from_run_to_run_and_grows_at_its_end() -> None:
    assert Fleet(50, 1).devices == Fleet(50, 1).devices
    assert Fleet(80, 1).devices[:50] == Fleet(50, 1).devices
    assert str(Fleet(1, 1).devices[0].device_id) == "2a83c5e2-31f0-588b-bcd4-768a54290672"
    at = np.array([START.timestamp()])
    noise = np.zeros((6, 1))
    assert (Fleet(80, 1).measure(np.array([49]), at, noise) == Fleet(50, 1).measure(np.array([49]), at, noise)).all()


def test_the_seed_decides() -> None:
    def made(seed: int) -> list[tuple[bytes, bytes]]:
        source = generator(producer_seed=seed)
        return [message for n in range(5) for message in source.round(START + INTERVAL * (n + 1))]

    assert made(1) == made(1)
    assert made(1) != made(2)
    assert not {d.device_id for d in Fleet(50, 1).devices} & {d.device_id for d in Fleet(50, 2).devices}


def test_every_device_measures_everything_and_keeps_its_tags() -> None:
    tags = defaultdict(set)
    kinds: Counter[int] = Counter()
    for r in rounds(generator(producer_min_metrics=500, producer_max_metrics=500), 40):
        for reading in r:
            tags[reading.device_id].add(tuple(reading.tags))
            kinds[reading.metric_name] += 1
    assert set(kinds) == {int(name) for name in MetricName}
    assert min(kinds.values()) > 0.8 * max(kinds.values())
    assert {device.device_id: {device.tags} for device in Fleet(50, 1).devices}.items() >= tags.items()
    assert len({device.tags for device in Fleet(50, 1).devices}) == 20
    assert all(tag.startswith(("site:", "floor:")) for device in Fleet(50, 1).devices for tag in device.tags)


def day(fleet: Fleet, place: int, noise: float = 0.0) -> Floats:
    """One day of a device, a value a minute: shape (metrics, minutes)."""
    midnight = datetime(2026, 11, 22, tzinfo=UTC).timestamp()
    minutes = np.arange(24 * 60, dtype=np.float64)
    wobble = np.random.default_rng(0).standard_normal((6, minutes.size)) * noise
    return fleet.measure(np.full(minutes.size, place), minutes * 60 + midnight, wobble)


@pytest.mark.parametrize("place", range(0, 50, 7))
def test_values_look_like_their_metric(place: int) -> None:
    temperature, humidity, pressure, co2, light, sound = day(Fleet(50, 1), place, noise=1.0)
    hour = np.arange(24 * 60) / 60
    night = (hour < 6) | (hour > 18)
    assert 5 < temperature.min() < temperature.max() < 40
    assert 13 < hour[temperature.argmax()] < 17
    assert humidity.min() >= 0
    assert humidity.max() <= 100
    assert np.corrcoef(temperature, humidity)[0, 1] < -0.5  # warm air is drier
    assert 980 < pressure.min() < pressure.max() < 1040
    assert co2.min() >= 400
    assert co2.max() < 2500
    assert co2[(hour > 10) & (hour < 16)].mean() > co2[night].mean() + 100
    assert (light[night] == 0).all()
    assert light[720] > 100
    assert 20 <= sound.min() <= sound.max() <= 120


@pytest.mark.parametrize("extreme", [-50.0, 50.0])
def test_limits_hold_however_strong_the_noise(extreme: float) -> None:
    fleet = Fleet(50, 1)
    at: Floats = np.arange(50, dtype=np.float64) * 1800 + START.timestamp()
    _, humidity, _, co2, light, sound = fleet.measure(np.arange(50), at, np.full((6, 50), extreme))
    assert 0 <= humidity.min() <= humidity.max() <= 100
    assert co2.min() >= 400
    assert light.min() >= 0
    assert not np.signbit(light).any()  # the JDBC sink loses the sign of -0.0
    assert 20 <= sound.min() <= sound.max() <= 120


def test_devices_differ() -> None:
    means = np.array([day(Fleet(50, 1), place).mean(axis=1) for place in range(20)])
    assert (means.std(axis=0) > 0.1).all()


def test_values_have_two_decimals() -> None:
    for r in rounds(generator(), 5):
        assert all(len(repr(reading.value).partition(".")[2]) <= 2 for reading in r)


def test_it_is_fast_enough_to_feed_one_core() -> None:
    """About 1 µs a message on the machine it was written on; the bound leaves room for slow and busy ones."""
    made = Generator(ProducerSettings(), START)
    best = float("inf")
    now = START
    for _ in range(20):
        now += INTERVAL
        begun = time.process_time()
        count = len(made.round(now))
        best = min(best, (time.process_time() - begun) / count)
    assert best < 10e-6


def test_a_metric_without_a_formula_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wind: Any = IntEnum("wind", {"WIND": 60})
    monkeypatch.setattr(module, "_METRICS", (*MetricName, *wind))
    with pytest.raises(NotImplementedError, match=r"measures WIND: add a formula to Fleet\.measure"):
        generator().round(START + INTERVAL)
