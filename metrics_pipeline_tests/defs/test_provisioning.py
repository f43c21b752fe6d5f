"""Schema, topic, sink: in order, idempotent, each gated by a check that names drift."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pytest

from metrics_pipeline import kafka, partitions, postgres, retention
from metrics_pipeline.definitions import defs
from metrics_pipeline.defs import provisioning
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.partitions import Partition
from metrics_pipeline.postgres import MigrationStatus
from metrics_pipeline.retention import Dropped
from metrics_pipeline.settings import CONNECTOR, TOPIC, Settings
from metrics_pipeline.sinks import connector
from metrics_pipeline_tests import fake_registry
from metrics_pipeline_tests.fake_connect import FakeConnect, serving
from metrics_pipeline_tests.fake_kafka import FakeBroker
from metrics_pipeline_tests.fake_sinks import FakeSinkTables

SECRET = "s3cret-of-nobody"


@dataclass
class FakeSchema:
    """Migrations as `postgres` tells of them; `broken` is why it cannot."""

    files: list[str] = field(default_factory=lambda: ["1_metrics", "2_summaries"])
    applied: list[str] = field(default_factory=list)
    broken: str = ""

    def status(self, settings: Settings) -> MigrationStatus:
        if self.broken:
            raise ServiceError(self.broken)
        return MigrationStatus(
            applied=list(self.applied), pending=[name for name in self.files if name not in self.applied]
        )

    def migrate(self, settings: Settings) -> list[str]:
        new = self.status(settings).pending
        self.applied += new
        return new


@dataclass
class FakePartitions:
    """Partitions as `partitions` tells of them."""

    wanted: list[str] = field(default_factory=lambda: ["metrics_p20261126", "metrics_p20261127"])
    made: list[str] = field(default_factory=list)
    old: list[str] = field(default_factory=list)

    def make(self, settings: Settings) -> list[str]:
        new = [name for name in self.wanted if name not in self.made]
        self.made += new
        return new

    def every(self, settings: Settings) -> list[Partition]:
        low = datetime(2026, 11, 26, tzinfo=UTC)
        return [Partition(name, None if at == 0 else low, low, 8192, at) for at, name in enumerate(self.made)]

    def missing(self, settings: Settings) -> list[str]:
        return [f"{name} is missing" for name in self.wanted if name not in self.made]

    def run(self, settings: Settings, *, keep: object) -> list[tuple[Partition, Dropped]]:
        gone = [(Partition(name, None, None, 300, 20), Dropped(20, 300)) for name in self.old]
        self.old.clear()
        return gone

    def behind(self, settings: Settings) -> list[str]:
        return [f"{name} should be gone" for name in self.old]


@dataclass
class Parts:
    """Everything that is provisioned, and Dagster's memory of it."""

    schema: FakeSchema
    broker: FakeBroker
    connect: FakeConnect
    instance: dg.DagsterInstance
    partitions: FakePartitions
    tables: FakeSinkTables = field(default_factory=FakeSinkTables)

    def run(self, job: str = "provision", **config: Any) -> dg.ExecuteInProcessResult:
        definition = defs.resolve_job_def(job)
        return definition.execute_in_process(instance=self.instance, raise_on_error=False, run_config=config)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    schema, broker = FakeSchema(), FakeBroker()
    monkeypatch.setattr(postgres, "migration_status", schema.status)
    monkeypatch.setattr(postgres, "migrate", schema.migrate)
    monkeypatch.setattr(kafka, "AdminClient", broker.admin)
    monkeypatch.setattr(kafka, "Consumer", broker.consumer)
    monkeypatch.setattr(connector, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(connector, "FAILED_GRACE_SECONDS", 0.0)
    monkeypatch.setenv("POSTGRES_PASSWORD", SECRET)
    with serving() as fake, dg.DagsterInstance.ephemeral() as instance:
        monkeypatch.setenv("CONNECT_URL", fake.url)
        parts = Parts(schema, broker, fake, instance, FakePartitions())
        monkeypatch.setattr(partitions, "make", parts.partitions.make)
        monkeypatch.setattr(partitions, "every", parts.partitions.every)
        monkeypatch.setattr(partitions, "missing", parts.partitions.missing)
        monkeypatch.setattr(retention, "run", parts.partitions.run)
        monkeypatch.setattr(retention, "behind", parts.partitions.behind)
        monkeypatch.setattr(postgres, "connect", parts.tables.connect)
        yield parts


def states(result: dg.ExecuteInProcessResult) -> list[tuple[str, object]]:
    """Name and state of each asset, in the order in which they were made."""
    return [
        (event.materialization.asset_key.to_user_string(), event.materialization.metadata["state"].value)
        for event in result.get_asset_materialization_events()
    ]


def red(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """Name and description of each check that failed."""
    found = result.get_asset_check_evaluations()
    return {check.check_name: check.description or "" for check in found if not check.passed}


ALL = ["metrics_schema", "metrics_partitions", "metrics_topic", "metrics_sink_connector"]


def test_created_in_order_and_then_left_alone(parts: Parts) -> None:
    first = parts.run()
    assert first.success
    assert states(first) == [(name, "changed" if name == "metrics_partitions" else "created") for name in ALL]
    assert len(first.get_asset_check_evaluations()) == 4
    assert red(first) == {}
    second = parts.run()
    assert states(second) == [(name, "unchanged") for name in ALL]


def test_a_new_migration_is_a_change_that_names_it(parts: Parts) -> None:
    parts.run()
    parts.schema.files.append("3_more")
    assert red(parts.run("check_provisioning")) == {"schema_at_head": "migration 3_more is not applied"}
    result = parts.run()
    assert states(result) == [("metrics_schema", "changed"), *[(name, "unchanged") for name in ALL[1:]]]
    details = result.asset_materializations_for_node("metrics_schema")[0].metadata["details"].value
    assert details == ["applied 3_more"]


def test_partitions_are_missing_until_they_are_made(parts: Parts) -> None:
    parts.run()
    parts.partitions.wanted.append("metrics_p20261128")
    assert red(parts.run("check_provisioning")) == {"partitions_ahead": "metrics_p20261128 is missing"}
    result = parts.run("partitions")
    assert states(result) == [("metrics_partitions", "changed"), ("retained_readings", "unchanged")]
    details = result.asset_materializations_for_node("metrics_partitions")[0].metadata["details"].value
    assert details == ["made metrics_p20261128"]
    assert red(result) == {}


def test_the_partitions_that_there_are_are_shown_newest_first(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.partitions.wanted.append("metrics_p20261128")
    for shown in (3, 2):
        monkeypatch.setattr(provisioning, "PARTITIONS_SHOWN", shown)
        metadata = parts.run("partitions").asset_materializations_for_node("metrics_partitions")[0].metadata
        assert (metadata["partitions"].value, metadata["bytes"].value) == (3, 3 * 8192)
        newest = metadata["newest"]
        assert isinstance(newest, dg.TableMetadataValue)
        rows = [record.data for record in newest.records]
        assert [str(row["partition"])[-2:] for row in rows] == ["28", "27", "26"][:shown]
        assert rows[0] == {
            "partition": "metrics_p20261128",
            "from": "2026-11-26 00:00",
            "to": "2026-11-26 00:00",
            "rows": 2,
            "bytes": 8192,
        }
    assert rows[-1]["from"] == "2026-11-26 00:00"


def test_what_retention_should_have_dropped_is_red_until_it_is_gone(parts: Parts) -> None:
    parts.run()
    parts.partitions.old += ["metrics_p20260901", "metrics_p20260902"]
    reason = "metrics_p20260901 should be gone; metrics_p20260902 should be gone"
    assert red(parts.run("check_provisioning")) == {"retention_on_time": reason}
    result = parts.run("partitions")
    assert states(result) == [("metrics_partitions", "unchanged"), ("retained_readings", "changed")]
    metadata = result.asset_materializations_for_node("retained_readings")[0].metadata
    assert (metadata["dropped_rows"].value, metadata["dropped_bytes"].value) == (40, 600)
    assert metadata["details"].value == [
        "dropped metrics_p20260901: 20 readings, 300 bytes",
        "dropped metrics_p20260902: 20 readings, 300 bytes",
    ]
    assert red(result) == {}


def test_what_changed_by_hand_is_seen_red_and_then_mended(parts: Parts) -> None:
    parts.run()
    parts.broker.topics[TOPIC].config["retention.bytes"] = "1000"
    parts.connect.configs[CONNECTOR]["batch.size"] = "1"
    assert red(parts.run("check_provisioning")) == {
        "topic_as_configured": "retention.bytes is 1000, configured 1789569706",
        "connector_as_configured": "batch.size is 1, configured 2500",
    }
    assert parts.broker.topics[TOPIC].config["retention.bytes"] == "1000", "a check mends nothing"
    mended = parts.run()
    assert states(mended) == [
        ("metrics_schema", "unchanged"),
        ("metrics_partitions", "unchanged"),
        ("metrics_topic", "changed"),
        ("metrics_sink_connector", "changed"),
    ]
    assert red(parts.run("check_provisioning")) == {}


def test_a_deleted_connector_and_a_failed_task_are_red(parts: Parts) -> None:
    parts.run()
    parts.connect.fail(CONNECTOR, "x.Y: broken", 1)
    assert red(parts.run("check_provisioning")) == {"connector_as_configured": "task 1 is FAILED: x.Y: broken"}
    del parts.connect.configs[CONNECTOR]
    checked = parts.run("check_provisioning")
    assert red(checked) == {"connector_as_configured": f"connector {CONNECTOR} does not exist"}
    assert not checked.success
    assert states(parts.run())[-1] == ("metrics_sink_connector", "created")


def test_the_third_asset_changes_the_sink_when_asked_to(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.run()
    parts.tables.sessions = 2
    monkeypatch.setenv("SINK", "copy")
    checked = parts.run("check_provisioning")
    assert "stored by Kafka Connect, configured the COPY sink" in red(checked)["connector_as_configured"]
    assert states(parts.run())[-1] == ("metrics_sink_connector", "changed")
    assert (parts.tables.active, parts.connect.states[CONNECTOR]) == ("copy", "STOPPED")
    assert states(parts.run())[-1] == ("metrics_sink_connector", "unchanged")
    assert red(parts.run("check_provisioning")) == {}
    monkeypatch.setenv("SINK", "connect")
    assert states(parts.run())[-1] == ("metrics_sink_connector", "changed")
    assert (parts.tables.active, parts.connect.states[CONNECTOR]) == ("connect", "RUNNING")


def test_an_asset_that_fails_blocks_what_is_downstream(parts: Parts) -> None:
    parts.schema.broken = "PostgreSQL at x cannot be reached: start it"
    result = parts.run()
    assert not result.success
    assert states(result) == []
    assert TOPIC not in parts.broker.topics
    (failure,) = [event for event in result.get_failed_step_keys() if event == "metrics_schema"]
    error = result.failure_data_for_node(failure)
    assert error is not None
    assert error.user_failure_data is not None
    assert error.user_failure_data.description == "PostgreSQL at x cannot be reached: start it"


def test_a_check_that_fails_blocks_what_is_downstream(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "migrate", lambda _settings: [])  # it does not bring the schema to its head
    result = parts.run()
    assert red(result) == {"schema_at_head": "migration 1_metrics is not applied; migration 2_summaries is not applied"}
    assert states(result) == [("metrics_schema", "unchanged")]
    assert TOPIC not in parts.broker.topics


def test_a_service_that_does_not_answer_is_red_with_its_reason(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.run()
    parts.broker.down = True
    found = red(parts.run("check_provisioning"))
    assert list(found) == ["topic_as_configured"]
    assert "cannot be reached" in found["topic_as_configured"]


def test_partitions_grow_when_the_run_is_asked_to(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.run()
    monkeypatch.setenv("TOPIC_PARTITIONS_METRICS", "12")
    refused = parts.run()
    assert not refused.success
    failed = refused.failure_data_for_node("metrics_topic")
    assert failed is not None
    assert failed.user_failure_data is not None
    assert "grow_partitions: true" in (failed.user_failure_data.description or "")
    assert parts.run(ops={"metrics_topic": {"config": {"grow_partitions": True}}}).success
    assert len(parts.broker.topics[TOPIC].offsets) == 12


def test_no_secret_reaches_the_event_log(parts: Parts) -> None:
    result = parts.run()
    logged = "".join(str(record) for record in parts.instance.all_logs(result.run_id))
    assert "metrics_topic" in logged
    assert SECRET not in logged


def test_the_pipeline_is_provisioned_when_all_three_were_made(parts: Parts) -> None:
    reason = provisioning.not_provisioned(parts.instance)
    assert (
        reason == "metrics_schema, metrics_topic, metrics_sink_connector not provisioned yet: run the `provision` job"
    )
    parts.schema.files = []
    parts.broker.down = True
    parts.run()
    assert provisioning.not_provisioned(parts.instance) == reason.replace("metrics_schema, ", "")
    parts.broker.down = False
    parts.run()
    assert provisioning.not_provisioned(parts.instance) is None


def test_while_provisioning_runs_the_pipeline_is_not_ready(parts: Parts) -> None:
    parts.run()
    parts.instance.create_run_for_job(defs.resolve_job_def("provision"), status=dg.DagsterRunStatus.STARTED)
    assert provisioning.not_provisioned(parts.instance) == "provisioning is under way"


def test_checks_wait_for_the_first_provisioning(monkeypatch: pytest.MonkeyPatch) -> None:
    def tick(instance: dg.DagsterInstance, reason: str | None) -> object:
        monkeypatch.setattr(provisioning, "not_provisioned", lambda _instance: reason)
        with dg.build_schedule_context(instance) as context:
            return provisioning.check_provisioning_schedule(context)

    with dg.instance_for_test() as instance:  # a schedule opens its instance by itself
        assert tick(instance, "not yet") == dg.SkipReason("not yet")
        assert isinstance(tick(instance, None), dg.RunRequest)


def test_schemas_at_a_registry_belong_to_the_topic(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_registry.serving() as registry:
        monkeypatch.setenv("SCHEMA_REGISTRY_URL", registry.url)
        assert parts.run().success
        assert set(registry.versions) == {"metrics-key", "metrics-value"}
        assert dict(states(parts.run()))["metrics_topic"] == "unchanged"
        registry.versions["metrics-value"].append(("JSON", '{"type":"object"}'))
        found = red(parts.run("check_provisioning"))
        assert list(found) == ["topic_as_configured"]
        assert f"schema metrics-value at {registry.url} is at version 2" in found["topic_as_configured"]
        del registry.versions["metrics-value"]
        assert ("metrics_topic", "changed") in states(parts.run())
        assert red(parts.run("check_provisioning")) == {}
