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
from metrics_pipeline.settings import ROOT, Settings


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


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://d:x@h:1/dagster", ("postgresql://d:x@h:1/dagster", "public")),
        ("postgresql://d:x@h:1/a%2Fb?sslmode=require", ("postgresql://d:x@h:1/a%2Fb?sslmode=require", "public")),
        ("postgresql://d:x@h:1/db?options=-c%20search_path%3Dr_dagster", ("postgresql://d:x@h:1/db", "r_dagster")),
        (
            "postgresql://d:x@h:1/db?sslmode=verify-ca&sslrootcert=/c%20a&options=-c%20search_path%3Dr_dagster",
            ("postgresql://d:x@h:1/db?sslmode=verify-ca&sslrootcert=/c%20a", "r_dagster"),
        ),
    ],
)
def test_the_schema_is_told_by_the_url(url: str, expected: tuple[str, str]) -> None:
    assert storage.without_options(url) == expected


def test_the_url_that_up_writes_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", "postgresql://me@db.example/shop?sslmode=require")
    monkeypatch.setenv("POSTGRES_SCHEMA", "readings")
    url, schema = storage.without_options(Settings.load(dagster_password="x").dagster_postgres_url)
    assert (url, schema) == ("postgresql://dagster:x@db.example:5432/shop?sslmode=require", "readings_dagster")
