"""Simulated devices: a fleet that stays the same from run to run, and what it measures at a given time.

Seeded, with the clock passed in, and no I/O. A message costs about a microsecond: values are computed as numpy
columns, and the bytes are put together from pieces that are made once a device or once an instant.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import cycle
from typing import Final
from uuid import UUID, uuid5

import numpy as np
from numpy.typing import NDArray

from metrics_pipeline.metric import MetricName
from metrics_pipeline.settings import ProducerSettings

Floats = NDArray[np.float64]

_NAMESPACE: Final = UUID("5d0e5a2c-6b0f-5d0a-9c1e-1f6f8f6f3c55")
_METRICS: Final = tuple(MetricName)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_SITES: Final = ("north", "east", "south", "west")
_FLOORS: Final = 5
_DAY: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Device:
    """A simulated device.

    Attributes:
        device_id: the same for a given seed and place in the fleet.
        tags: where it stands; every reading carries them.
    """

    device_id: UUID
    tags: tuple[str, ...]


class Fleet:
    """All simulated devices there are; the first ones stay the same when the fleet grows.

    They stand on one campus whose local time is UTC.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.devices = [
            Device(
                device_id=uuid5(_NAMESPACE, f"{seed}/{number}"),
                tags=(f"site:{_SITES[number % len(_SITES)]}", f"floor:{number // len(_SITES) % _FLOORS}"),
            )
            for number in range(size)
        ]
        # A generator for each device, or a larger fleet would change the character of the devices before.
        self._character = np.array([np.random.default_rng([abs(seed), number]).random(8) for number in range(size)])

    def __len__(self) -> int:
        return len(self.devices)

    def measure(self, devices: NDArray[np.int64], seconds: Floats, noise: Floats) -> Floats:
        """What devices measure.

        Args:
            devices: places in the fleet, one an instant.
            seconds: the instants, in seconds since 1970.
            noise: normally distributed numbers, shape (metrics, instants).

        Returns:
            Values in the order of `MetricName`, shape (metrics, instants), rounded to two decimals.
        """
        own = self._character[devices].T
        hour = seconds % _DAY / 3600
        warmth = np.sin((hour - 9) * (np.pi / 12))  # warmest at 15:00, coldest at 3:00
        sun = np.maximum(0.0, np.sin((hour - 6) * (np.pi / 12)))  # up from 6:00 to 18:00
        people = np.where((hour > 8) & (hour < 18), np.sin((hour - 8) * (np.pi / 10)), 0.0)
        weather = np.sin(seconds * (2 * np.pi / (5 * _DAY)) + 0.2 * own[2])
        wobble = dict(zip(_METRICS, noise, strict=True))
        formulas = {
            MetricName.TEMPERATURE: lambda noise: 19 + 4 * own[0] + (2 + 3 * own[1]) * warmth + 0.1 * noise,
            MetricName.HUMIDITY: lambda noise: np.clip(
                45 + 15 * own[3] - 10 * warmth - 5 * weather + 0.5 * noise, 0, 100
            ),
            MetricName.PRESSURE: lambda noise: 1013 - 4 * own[4] + 8 * weather + 0.05 * noise,
            MetricName.CO2: lambda noise: np.maximum(
                400.0, 415 + 25 * own[5] + (200 + 500 * own[5]) * people + 4 * noise
            ),
            MetricName.LIGHT: lambda noise: np.maximum(0.0, sun * (200 + 800 * own[6]) * (1 + 0.02 * noise)),
            MetricName.SOUND: lambda noise: np.clip(32 + 6 * own[7] + 22 * people + 2 * noise, 20, 120),
        }
        if missing := [name.name for name in _METRICS if name not in formulas]:
            raise NotImplementedError(
                f"no simulated device measures {', '.join(missing)}: add a formula to Fleet.measure in "
                "metrics_pipeline/producer/generator.py"
            )
        # Plus zero, because rounding leaves -0.0, whose sign the JDBC sink loses.
        return np.round(np.stack([formulas[name](wobble[name]) for name in _METRICS]), 2) + 0.0


class Generator:
    """The readings of a fleet, round by round, as keys and values ready to publish.

    Instants lie between the round before and now, and no two devices or rounds share one, so no two readings of a
    device and metric ever do: keys are unique as long as the clock does not step back between two runs.
    """

    def __init__(self, settings: ProducerSettings, start: datetime) -> None:
        """Prepare the fleet.

        Args:
            settings: sizes and seed.
            start: aware; every instant lies after it, so a run should pass the time at which it begins.
        """
        self.fleet = Fleet(settings.producer_fleet_size, settings.producer_seed)
        self._settings = settings
        self._random = np.random.default_rng(abs(settings.producer_seed))
        self._last = _microseconds(start)
        self._heads = [f'{{"device_id":"{device.device_id}","published_at":"' for device in self.fleet.devices]
        self._tails = [f',"tags":{json.dumps(device.tags, separators=(",", ":"))}}}' for device in self.fleet.devices]
        self._codes = [str(int(name)) for name in _METRICS]
        self._size = self._draw_size()

    def round(self, now: datetime) -> list[tuple[bytes, bytes]]:
        """The readings since the round before, oldest first.

        An empty list while the clock has not moved far enough to give each instant a microsecond of its own: ask again later.

        Args:
            now: the time, aware; no reading lies after it.
        """
        end = _microseconds(now)
        kinds = len(_METRICS)
        count, members = self._size
        # A device measures everything at one instant. The last instants may stay incomplete.
        instants = -(-count // (kinds * members)) * members
        if end - self._last < instants:
            return []
        chosen = self._random.choice(len(self.fleet), members, replace=False)
        moments = self._last + np.arange(1, instants + 1) * (end - self._last) // instants
        self._last, self._size = end, self._draw_size()

        at = np.arange(count)
        instant = at // (kinds * members) * members + at % members
        kind = at // members % kinds
        noise = self._random.standard_normal((kinds, instants))
        devices = np.resize(chosen, instants)
        values = self.fleet.measure(devices, moments / 1e6, noise)[kind, instant]
        bodies = self._bodies(chosen.tolist(), moments)
        tails = [self._tails[place] for place in devices.tolist()]
        codes = self._codes
        readings = []
        for i, k, value in zip(instant.tolist(), kind.tolist(), values.tolist(), strict=True):
            key = f"{bodies[i]}{codes[k]}"
            readings.append((f"{key}}}".encode(), f'{key},"value":{value!r}{tails[i]}'.encode()))
        return readings

    def _draw_size(self) -> tuple[int, int]:
        """Readings and devices of the next round."""
        limits, draw = self._settings, self._random.integers
        count = int(draw(limits.producer_min_metrics, limits.producer_max_metrics, endpoint=True))
        members = int(draw(limits.producer_min_devices, limits.producer_max_devices, endpoint=True))
        return count, min(members, count)

    def _bodies(self, chosen: list[int], moments: NDArray[np.int64]) -> list[str]:
        """The JSON of each instant up to the metric's code."""
        seconds, micros = np.divmod(moments, 1_000_000)
        texts = {
            second: (_EPOCH + timedelta(seconds=second)).replace(tzinfo=None).isoformat()
            for second in np.unique(seconds).tolist()
        }
        heads = cycle([self._heads[place] for place in chosen])
        return [
            # As `metric.encode` writes it: no decimals for a whole second.
            f'{head}{texts[second]}.{micro:06d}Z","metric_name":'
            if micro
            else f'{head}{texts[second]}Z","metric_name":'
            for head, second, micro in zip(heads, seconds.tolist(), micros.tolist(), strict=False)
        ]


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND
