"""Dagster's storage, as far as it goes without PostgreSQL."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import (
    GrpcServerCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, SensorInstigatorData
from dagster._daemon.sensor import is_under_min_interval
from dagster._time import get_current_timestamp

from metrics_pipeline.defs import storage
from metrics_pipeline.settings import ROOT


def sensor(ticked: float) -> InstigatorState:
    """The state of a sensor that was last looked at then."""
    repository = RemoteRepositoryOrigin(GrpcServerCodeLocationOrigin("127.0.0.1", 1), "repository")
    data = SensorInstigatorData(
        last_tick_timestamp=ticked, last_tick_start_timestamp=ticked, cursor="c", min_interval=5, last_run_key="k"
    )
    origin = RemoteInstigatorOrigin(repository, "sensor")
    return InstigatorState(origin, InstigatorType.SENSOR, InstigatorStatus.RUNNING, data)


@pytest.mark.parametrize(("ahead", "due"), [(-6, True), (-1, False), (2, False), (3600, True)])
def test_a_sensor_does_not_rest_until_a_clock_that_was_set_back_is_there_again(ahead: float, due: bool) -> None:
    now = get_current_timestamp()
    state = storage.steady(sensor(now + ahead), now)
    remote: Any = SimpleNamespace(min_interval_seconds=5)
    assert is_under_min_interval(state, remote) is not due
    assert isinstance(state.instigator_data, SensorInstigatorData)
    assert (state.instigator_data.cursor, state.instigator_data.last_run_key) == ("c", "k")


def test_by_itself_dagster_lets_it_rest() -> None:
    """The asserter."""
    remote: Any = SimpleNamespace(min_interval_seconds=5)
    assert is_under_min_interval(sensor(get_current_timestamp() + 3600), remote)


def test_dagsters_configuration_names_it() -> None:
    named = yaml.safe_load((ROOT / "dagster_home" / "dagster.yaml").read_text("utf-8"))["storage"]["custom"]
    assert (named["module"], named["class"]) == (storage.__name__, storage.PipelineStorage.__name__)
