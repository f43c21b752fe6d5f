"""Summaries show plain numbers; checks are red for the right reason and green with a note for the others."""

from __future__ import annotations

import re
import sys
from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID
from xml.etree import ElementTree as ET

import dagster as dg
import pytest

from metrics_pipeline import postgres, rejects, summaries
from metrics_pipeline.definitions import defs
from metrics_pipeline.defs import chart, monitoring
from metrics_pipeline.defs.provisioning import metrics_schema, metrics_sink_connector, metrics_topic
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.kafka import Lag
from metrics_pipeline.rejects import Recent, Reject
from metrics_pipeline.sinks import active as sinks
from metrics_pipeline.sinks import quarantine
from metrics_pipeline.sinks.quarantine import RecentQuarantines
from metrics_pipeline.sinks.watch import ProgressWatch
from metrics_pipeline.summaries import DeviceSummaries, DeviceSummary, IngestionRate, MetricSummary, Minute

START = datetime(2026, 11, 22, 16, 0, tzinfo=UTC)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def run(instance: dg.DagsterInstance, job: str) -> dg.ExecuteInProcessResult:
    return defs.resolve_job_def(job).execute_in_process(instance=instance, raise_on_error=False)


# --- Summaries ---------------------------------------------------------------------------------------------------


@pytest.fixture
def rate(monkeypatch: pytest.MonkeyPatch) -> None:
    minutes = [Minute(START + timedelta(minutes=number), 100 * number) for number in range(10)]
    found = IngestionRate(minutes, 4500, 800 / 60, START + timedelta(minutes=9, seconds=5), 10_000)
    monkeypatch.setattr(summaries, "ingestion_rate", lambda _settings: found)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(number: int) -> DeviceSummary:
        metrics = [MetricSummary("humidity", 7, 0.5, 40.25, 99.0), MetricSummary("sound", 3, 1.0, 2.0, 3.0)]
        return DeviceSummary(UUID(int=number << 96), 10 * number, START, START + timedelta(days=1), metrics)

    def device_summary(settings: object, *, limit: int) -> DeviceSummaries:
        return DeviceSummaries(100_000, 275, [device(number) for number in range(120, 0, -1)][:limit])

    monkeypatch.setattr(summaries, "device_summary", device_summary)


def shown(result: dg.ExecuteInProcessResult, asset: str) -> Any:
    (event,) = result.asset_materializations_for_node(asset)
    return event.metadata


def image(metadata: Any) -> ET.Element:
    found = re.fullmatch(r"!\[[^\]]+\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", metadata["chart"].value)
    assert found
    return ET.fromstring(b64decode(found[1]))


def test_ingestion_rate_shows_numbers_a_table_and_a_chart(
    instance: dg.DagsterInstance, rate: None, devices: None
) -> None:
    metadata = shown(run(instance, "summaries"), "ingestion_rate")
    assert metadata["rows_per_second"] == dg.MetadataValue.float(800 / 60)
    assert metadata["rows_last_10_minutes"] == dg.MetadataValue.int(4500)
    assert metadata["rows"] == dg.MetadataValue.int(10_000)
    records = metadata["minutes"].value.records
    assert [record.data["rows"] for record in records] == [100 * number for number in range(10)]
    assert records[0].data["minute"] == "2026-11-22 16:00:00+00:00"
    texts = [element.text for element in image(metadata).iter("{http://www.w3.org/2000/svg}text")]
    assert {"16:00", "16:09", "900"} <= set(texts)


def test_device_summary_shows_the_busiest_devices_by_metric(
    instance: dg.DagsterInstance, rate: None, devices: None
) -> None:
    metadata = shown(run(instance, "summaries"), "device_summary")
    assert metadata["devices"] == dg.MetadataValue.int(100_000)
    assert metadata["rows"] == dg.MetadataValue.int(275)
    records = [record.data for record in metadata["busiest_devices"].value.records]
    assert len(records) == 200
    assert records[0] == {
        "device_id": "00000078-0000-0000-0000-000000000000",
        "first_seen": "2026-11-22 16:00:00+00:00",
        "last_seen": "2026-11-23 16:00:00+00:00",
        "metric": "humidity",
        "rows": 7,
        "min": 0.5,
        "mean": 40.25,
        "max": 99.0,
    }
    assert len(list(image(metadata).iter("{http://www.w3.org/2000/svg}rect"))) == 10


def test_an_empty_table_has_summaries_too(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    minutes = [Minute(START + timedelta(minutes=number), 0) for number in range(10)]
    monkeypatch.setattr(summaries, "ingestion_rate", lambda _settings: IngestionRate(minutes, 0, 0.0, None, 0))
    monkeypatch.setattr(summaries, "device_summary", lambda _settings, limit: DeviceSummaries(0, 0, []))
    result = run(instance, "summaries")
    assert result.success
    assert shown(result, "ingestion_rate")["newest"].value == "none"


def test_an_error_is_one_line(instance: dg.DagsterInstance, rate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(settings: object, limit: int) -> None:
        raise ServiceError("PostgreSQL at x cannot be reached")

    monkeypatch.setattr(summaries, "device_summary", away)
    data = run(instance, "summaries").failure_data_for_node("device_summary")
    assert data is not None
    assert data.user_failure_data is not None
    assert data.user_failure_data.description == "PostgreSQL at x cannot be reached"


@pytest.mark.parametrize(
    "values",
    [
        [],
        [("a", 0.0)],
        [("<b>&", 1.0)],
        [(f"{number:02}:00", float(number) * 123456) for number in range(24)],
    ],
)
def test_a_chart_is_small_well_formed_and_within_its_frame(values: list[tuple[str, float]]) -> None:
    svg = chart.bars("a <title>", values)
    assert len(chart.image("t", values)) < 7000
    bars = list(ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect"))
    assert len(bars) == len(values)
    for bar in bars:
        top, height = float(bar.attrib["y"]), float(bar.attrib["height"])
        left, width = float(bar.attrib["x"]), float(bar.attrib["width"])
        assert 0 <= top <= top + height <= chart.HEIGHT
        assert 0 <= left < left + width <= chart.WIDTH
    if bars and values[-1][1]:
        heights = [float(bar.attrib["height"]) for bar in bars]
        assert heights == sorted(heights)


# --- Checks ------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """What the checks look at. `producing` is how long a producer has been meant to run."""

    instance: dg.DagsterInstance
    producing: float | None = 1000.0
    rows: int = 1_200_000
    age: float | None = 0.5
    lag: int = 1000
    resting: str | None = None
    quarantines: RecentQuarantines = field(default_factory=RecentQuarantines)
    rejects: Recent = field(default_factory=lambda: Recent(0, {}, []))
    away: str = ""

    def check(self, name: str) -> dg.AssetCheckEvaluation:
        result = run(self.instance, "check_throughput")
        (found,) = [check for check in result.get_asset_check_evaluations() if check.check_name == name]
        return found


@pytest.fixture
def world(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(instance)

    def recent(settings: object, seconds: float) -> tuple[int, float | None]:
        if world.away:
            raise ServiceError(world.away)
        return world.rows, world.age

    monkeypatch.setattr(monitoring, "_recent", recent)
    monkeypatch.setattr(monitoring, "producing", lambda _instance, _settings: world.producing)
    monkeypatch.setattr(sinks, "lag", lambda _settings: Lag(world.lag, {0: world.lag}))
    monkeypatch.setattr(ProgressWatch, "wait", lambda _watch: world.resting)
    monkeypatch.setattr(rejects, "recent", lambda _settings, _seconds, _limit: world.rejects)
    monkeypatch.setattr(quarantine, "recent", lambda _settings, _seconds: world.quarantines)
    return world


def test_all_is_well(world: World) -> None:
    assert run(world.instance, "check_throughput").success
    found = world.check("throughput")
    assert (found.passed, found.description) == (True, "20,000.0 rows/s over the last minute")
    assert found.metadata["rows_per_second"] == dg.MetadataValue.float(20000.0)


def test_no_rows_while_a_producer_is_meant_to_run_is_an_error(world: World) -> None:
    """So it is when the producer hangs: its run is active, or it still holds the lock."""
    world.rows, world.age = 0, None
    found = world.check("throughput")
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert (
        found.description
        == "0.0 rows/s over the last minute, THROUGHPUT_FLOOR is 1, although a producer is meant to run"
    )
    stale = world.check("freshness")
    assert (stale.passed, stale.description) == (False, "nothing was stored for 60 s")


def test_a_floor_of_zero_does_not_make_nothing_enough(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THROUGHPUT_FLOOR", "0")
    world.rows = 0
    assert not world.check("throughput").passed


def test_few_rows_are_a_warning(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THROUGHPUT_FLOOR", "30000")
    found = world.check("throughput")
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)


def test_without_a_producer_nothing_is_expected(world: World) -> None:
    world.producing, world.rows, world.age = None, 0, None
    assert world.check("throughput").description == "0.0 rows/s over the last minute; no producer is meant to run"
    assert world.check("throughput").passed
    assert world.check("freshness").passed


@pytest.mark.parametrize(("seconds", "passed"), [(10.0, True), (59.0, True), (61.0, False)])
def test_a_producer_that_was_just_started_has_a_minute(world: World, seconds: float, passed: bool) -> None:
    world.producing, world.rows, world.age = seconds, 0, None
    assert world.check("throughput").passed is passed
    assert world.check("freshness").passed is passed


@pytest.mark.parametrize(("lag", "passed"), [(200_000, True), (200_001, False)])
def test_lag_has_a_limit(world: World, lag: int, passed: bool) -> None:
    world.lag = lag
    found = world.check("consumer_lag")
    assert found.passed is passed
    assert found.description == ("200,000 records" if passed else "200,001 records, LAG_LIMIT is 200,000")


def test_a_lag_that_does_not_move_fails_the_check_with_what_hangs(world: World) -> None:
    world.lag, world.resting = 7, "nothing is stored for 80 s: session 7 hangs"
    found = world.check("consumer_lag")
    assert (found.passed, found.description) == (False, "7 records; nothing is stored for 80 s: session 7 hangs")
    world.lag = 0
    assert world.check("consumer_lag").passed, "with nothing to store, nothing rests"


def test_rejects_are_a_warning_that_names_the_newest(world: World) -> None:
    assert world.check("rejects").description == "0 within 10 minutes"
    assert world.check("rejects").passed
    newest = [
        Reject(3, 12, "bad_value", "value: …", START, None, 5),
        Reject(0, 7, "no_key", "key: null", START, None, 9),
    ]
    world.rejects = Recent(1000, {"bad_value": 999, "no_key": 1}, newest)
    found = world.check("rejects")
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert (
        found.description == "1,000 within 10 minutes; partition 3, offset 12: bad_value; partition 0, offset 7: no_key"
    )
    assert found.metadata["by_reason"].value == {"bad_value": 999, "no_key": 1}
    assert found.metadata["quarantines"].value == 0


def test_records_that_stopped_the_connector_are_a_warning_too(world: World) -> None:
    world.quarantines = RecentQuarantines(2, 12_000, 3)
    found = world.check("rejects")
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert found.description == (
        "0 within 10 minutes; 2 quarantines of records that stop the connector: 12,000 stored, 3 rejected"
    )
    assert found.metadata["quarantines"].value == 2
    world.quarantines = RecentQuarantines(1, 0, 0, True)
    assert (world.check("rejects").description or "").endswith("0 stored, 0 rejected, one is under way")


def test_a_service_that_is_away_is_red_with_its_reason(world: World) -> None:
    world.away = "PostgreSQL at x cannot be reached"
    for name in ("throughput", "freshness"):
        found = world.check(name)
        assert (found.passed, found.description) == (False, "PostgreSQL at x cannot be reached")


# --- Housekeeping ------------------------------------------------------------------------------------------------


def test_old_runs_and_their_logs_go_except_those_that_provisioned(monkeypatch: pytest.MonkeyPatch) -> None:
    purged: list[object] = []

    class Connection:
        def __enter__(self) -> Connection:
            return self

        def __exit__(self, *_error: object) -> None:
            """Nothing to close."""

        def execute(self, statement: str, parameters: dict[str, object]) -> None:
            assert "asset_check_executions" in statement
            purged.append(parameters)

    monkeypatch.setattr(postgres, "connect_dagster", lambda _settings: Connection())
    monkeypatch.setattr(monitoring, "datetime", _Later)
    monkeypatch.setattr("metrics_pipeline.defs.monitoring.ledger.purge", lambda _settings: purged.append("ledger"))
    with dg.instance_for_test() as instance:
        keys = [metrics_schema.key, metrics_topic.key, metrics_sink_connector.key]
        old, provisioned, other = (
            _materialize(instance, keys),
            _materialize(instance, keys),
            _materialize(instance, ["x"]),
        )
        active = instance.create_run_for_job(defs.resolve_job_def("housekeeping"), status=dg.DagsterRunStatus.STARTED)
        logs = Path(instance.storage_directory())
        assert {old, provisioned, other} <= {folder.name for folder in logs.iterdir()}
        result = run(instance, "housekeeping")
        assert result.success
        assert {left.run_id for left in instance.get_runs()} == {provisioned, active.run_id, result.run_id}
        assert {folder.name for folder in logs.iterdir()} & {old, provisioned, other} == {provisioned}
        latest = instance.get_latest_materialization_event(keys[0])
        assert latest is not None
        assert latest.run_id == provisioned
        assert instance.all_logs(old) == []
    assert purged in ([{"hours": 24}, "ledger"], ["ledger", {"hours": 24}])


class _Later(datetime):
    """25 hours from now."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.now(tz) + timedelta(hours=25)


def _materialize(instance: dg.DagsterInstance, keys: Sequence[dg.AssetKey | str]) -> str:
    """A run with a line of log that makes these assets."""

    def asset(key: dg.AssetKey | str) -> dg.AssetsDefinition:
        @dg.asset(key=key)
        def made() -> None:
            sys.stdout.write("a line of log")

        return made

    return dg.materialize([asset(key) for key in keys], instance=instance).run_id
