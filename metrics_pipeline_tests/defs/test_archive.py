"""The asset of the archive has a partition for each one of the table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.test_utils import create_run_for_test

from metrics_pipeline.archive import keeping
from metrics_pipeline.archive.manifest import Manifest, Sums
from metrics_pipeline.definitions import defs
from metrics_pipeline.defs import archive
from metrics_pipeline.defs.resources import Pipeline
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.partitions import bound_after
from metrics_pipeline.settings import PartitionWidth, Settings

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


def test_nobody_is_asked_where_there_is_no_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "first", lambda _settings: pytest.fail("asked"))
    assert archive._partitions().start == archive.BEGIN


def test_it_begins_where_it_is_known_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METRICS_ARCHIVE", str(tmp_path))
    begin = datetime(2026, 11, 3, tzinfo=UTC)
    monkeypatch.setattr(keeping, "first", lambda _settings: begin)
    assert archive._partitions().get_first_partition_key() == "2026-11-03"

    def unknown(_settings: Settings) -> datetime:
        raise ServiceError("PostgreSQL is away")

    monkeypatch.setattr(keeping, "first", unknown)
    assert archive._partitions().start == archive.BEGIN


def test_what_follows_each_other_is_one_run() -> None:
    keys = ["2026-02-01", "2026-02-27", "2026-02-28", "2026-03-01", "2026-03-03"]
    assert archive.stretches(keys) == [keys[:1], keys[1:4], keys[4:]]
    assert archive.stretches([]) == []
    one, several = map(archive._request, archive.stretches(keys)[:2])
    assert (one.partition_key, one.partition_key_range) == ("2026-02-01", None)
    assert several.partition_key is None
    assert several.partition_key_range == dg.PartitionKeyRange("2026-02-27", "2026-03-01")


class Reasons(Pipeline):
    """Settings that name an archive."""

    def load(self, **overrides: Any) -> Settings:
        return Settings(_env_file=None, metrics_archive=overrides.get("folder"))


def sums(rows: int) -> Manifest:
    low = datetime(2026, 2, 1, tzinfo=UTC)
    return Manifest("a", "a", low, low, low, low, "1", Sums(rows, 1, 2, 3, 4), (), low)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as found:
        yield found


def run(instance: dg.DagsterInstance, first: str, last: str) -> dg.ExecuteInProcessResult:
    """As a backfill does it."""
    ends = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    job = dg.Definitions([archive.metrics_archive], jobs=[archive.archive_job], resources={"pipeline": Reasons()})
    return job.resolve_job_def("archive").execute_in_process(instance=instance, tags=ends, raise_on_error=False)


def reason(done: dg.ExecuteInProcessResult) -> str | None:
    """What the UI says of a run that failed."""
    (failure,) = done.get_step_failure_events()
    data = failure.step_failure_data.user_failure_data
    return data.description if data else None


def test_a_backfill_is_one_run_that_shows_each_partition_by_itself(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def archived(_settings: Settings, low: datetime, _high: datetime) -> list[Manifest]:
        if low.day in (3, 4):
            raise ServiceError(f"no room for any of month {low.month}")
        if low.day == 5:
            raise ServiceError("damaged")
        return [sums(low.day * 100)]

    monkeypatch.setattr(keeping, "archived", archived)
    done = run(instance, "2026-02-01", "2026-02-06")
    assert not done.success
    assert instance.get_materialized_partitions(archive.metrics_archive.key) == {
        "2026-02-01",
        "2026-02-02",
        "2026-02-06",
    }
    events = instance.fetch_materializations(archive.metrics_archive.key, limit=10).records
    shown = [event.asset_materialization for event in events]
    rows = {one.partition: one.metadata["dagster/row_count"].value for one in shown if one}
    assert rows == {"2026-02-01": 100, "2026-02-02": 200, "2026-02-06": 600}
    assert reason(done) == (
        "3 of 6 partitions were not archived: 2026-02-03 and 1 more: no room for any of month 2; 2026-02-05: damaged"
    )
    found = instance.get_run_by_id(done.run_id)
    assert found
    assert found.tags[dg.MAX_RUNTIME_SECONDS_TAG] == str(6 * 86400)
    assert run(instance, "2026-02-01", "2026-02-02").success


def test_one_partition_fails_with_its_reason(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    def archived(*_: object) -> list[Manifest]:
        raise ServiceError("no room")

    monkeypatch.setattr(keeping, "archived", archived)
    assert reason(run(instance, "2026-02-01", "2026-02-01")) == "no room"


def test_a_tick_is_taken_as_dagster_takes_it(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several requests, of which each needs a key of its own."""
    monkeypatch.setattr(archive, "due_keys", lambda _settings: ["2026-02-01", "2026-02-03", "2026-02-04"])
    monkeypatch.setattr(archive, "report", lambda _instance, _settings: [])
    monkeypatch.setattr(archive, "not_provisioned", lambda _instance: None)
    monkeypatch.setenv("METRICS_ARCHIVE", "/nowhere")
    context = dg.build_schedule_context(
        instance,
        resources={"pipeline": Pipeline()},
        scheduled_execution_time=datetime.now(UTC),
        repository_def=defs.get_repository_def(),
    )
    requests = defs.resolve_schedule_def("archive_schedule").evaluate_tick(context).run_requests or []
    assert [request.run_key for request in requests] == ["2026-02-01", "2026-02-03"]
    tags = [{name.removeprefix("dagster/"): value for name, value in request.tags.items()} for request in requests]
    assert tags[0]["partition"] == "2026-02-01"
    assert tags[1]["asset_partition_range_end"] == "2026-02-04"


def test_a_backfill_of_the_ui_is_seen_by_the_schedule(instance: dg.DagsterInstance) -> None:
    def begun(job: str, *assets: str) -> str:
        selection = {dg.AssetKey(name) for name in assets} or None
        status = dg.DagsterRunStatus.STARTED
        return str(create_run_for_test(instance, job_name=job, status=status, asset_selection=selection).run_id)

    begun("__ASSET_JOB", "device_summary")
    begun("housekeeping")
    assert not archive.archiving(instance)
    for job, assets in (("__ASSET_JOB", ("metrics_archive", "device_summary")), ("archive", ())):
        run_id = begun(job, *assets)
        assert archive.archiving(instance)
        instance.delete_run(run_id)
        assert not archive.archiving(instance)
