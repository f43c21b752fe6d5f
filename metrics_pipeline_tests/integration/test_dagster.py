"""Dagster's jobs on the real parts, run as a person runs them: `dagster job execute -m metrics_pipeline.definitions -j …`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest
import yaml
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from metrics_pipeline import kafka
from metrics_pipeline.defs.provisioning import COLUMNS
from metrics_pipeline.producer import ledger
from metrics_pipeline.settings import CONNECTOR, TOPIC, Settings
from metrics_pipeline.sinks import connector
from metrics_pipeline.sinks.connector import ConnectClient
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.patience import deadline, patience

pytestmark = pytest.mark.integration

PROVISIONING = ("metrics_schema", "metrics_partitions", "metrics_topic", "metrics_sink_connector")


@dataclass
class Jobs:
    """Dagster on this stack: its storage is the stack's PostgreSQL."""

    stack: RunningStack
    instance: dg.DagsterInstance
    folder: Path

    def command(self, job: str, config: Mapping[str, Any] | None = None) -> list[str]:
        command = [
            str(Path(sys.executable).parent / "dagster"),
            "job",
            "execute",
            "-m",
            "metrics_pipeline.definitions",
            "-j",
            job,
        ]
        if config:
            file = self.folder / f"{job}.yaml"
            file.write_text(yaml.safe_dump({"ops": config}))
            command += ["-c", str(file)]
        return command

    def run(
        self, job: str, config: Mapping[str, Any] | None = None
    ) -> tuple[dg.DagsterRun, subprocess.CompletedProcess[str]]:
        """Run a job to its end."""
        done = subprocess.run(
            self.command(job, config),
            # Not the checkout, whose `.env` Dagster would load over this.
            cwd=self.folder,
            env=dict(self.stack.environment),
            capture_output=True,
            text=True,
            timeout=patience(300),
            check=False,
        )
        (run,) = self.instance.get_runs(dg.RunsFilter(job_name=job), limit=1)
        assert done.returncode == (0 if run.status == dg.DagsterRunStatus.SUCCESS else 1), done.stderr
        return run, done

    @contextmanager
    def running(self, job: str, config: Mapping[str, Any]) -> Iterator[subprocess.Popen[str]]:
        """Run a job beside the test."""
        process = subprocess.Popen(
            self.command(job, config),
            cwd=self.folder,
            env=dict(self.stack.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def states(self, run: dg.DagsterRun) -> dict[str, object]:
        """What each asset did, in order."""
        found: dict[str, object] = {}
        for entry in self.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION):
            assert entry.dagster_event is not None
            made = entry.dagster_event.step_materialization_data.materialization
            found[made.asset_key.to_user_string()] = made.metadata["state"].value
        return found

    def checks(self, run: dg.DagsterRun) -> dict[str, str]:
        """Each check with `ok`, or what it says is wrong."""
        found: dict[str, str] = {}
        for entry in self.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION):
            assert entry.dagster_event is not None
            evaluation = entry.dagster_event.asset_check_evaluation_data
            found[evaluation.check_name] = "ok" if evaluation.passed else evaluation.description or ""
        return found


@pytest.fixture(scope="module")
def jobs(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_POSTGRES_URL", stack.environment["DAGSTER_POSTGRES_URL"])
        with dg.DagsterInstance.from_config(stack.environment["DAGSTER_HOME"]) as instance:
            yield Jobs(stack, instance, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def provisioned(jobs: Jobs) -> None:
    """Dagster knows it; whoever changes something mends it."""
    assert jobs.run("provision")[0].status == dg.DagsterRunStatus.SUCCESS


def change_retention(settings: Settings) -> None:
    entry = ConfigEntry("retention.bytes", "100000000", incremental_operation=AlterConfigOpType.SET)
    admin = AdminClient(kafka.client_config(settings))
    (future,) = admin.incremental_alter_configs(
        [ConfigResource(ResourceType.TOPIC, TOPIC, incremental_configs=[entry])]
    ).values()
    future.result(patience(10))


def change_connector(settings: Settings) -> None:
    ConnectClient(settings.connect_rest).put(CONNECTOR, connector.connector_config() | {"batch.size": "2400"})


def delete_connector(settings: Settings) -> None:
    ConnectClient(settings.connect_rest).delete(CONNECTOR)


def test_provisioned_in_order_and_then_unchanged(jobs: Jobs) -> None:
    first, _ = jobs.run("provision")
    assert tuple(jobs.states(first)) == PROVISIONING
    second, _ = jobs.run("provision")
    assert jobs.states(second) == dict.fromkeys(PROVISIONING, "unchanged")
    assert jobs.checks(second) == dict.fromkeys(
        ("schema_at_head", "partitions_ahead", "topic_as_configured", "connector_as_configured"), "ok"
    )


@pytest.mark.usefixtures("provisioned")
@pytest.mark.parametrize(
    ("by_hand", "check", "says", "mended"),
    [
        (change_retention, "topic_as_configured", "retention.bytes is 100000000, configured 1789569706", "changed"),
        (change_connector, "connector_as_configured", "batch.size is 2400, configured 2500", "changed"),
        (delete_connector, "connector_as_configured", f"connector {CONNECTOR} does not exist", "created"),
    ],
)
def test_what_is_changed_by_hand_turns_a_check_red_and_is_mended(
    jobs: Jobs, by_hand: Callable[[Settings], None], check: str, says: str, mended: str
) -> None:
    by_hand(jobs.stack.settings)
    checked, done = jobs.run("check_provisioning")
    assert {name: said for name, said in jobs.checks(checked).items() if said != "ok"}.keys() == {check}
    assert says in jobs.checks(checked)[check]
    assert checked.status == dg.DagsterRunStatus.FAILURE, "red in the list of runs, too"
    assert check in done.stderr + done.stdout
    again, _ = jobs.run("provision")
    assert mended in jobs.states(again).values()
    assert set(jobs.checks(again).values()) == {"ok"}


def test_a_producer_run_is_observed_counted_and_stored(jobs: Jobs) -> None:
    settings = jobs.stack.settings
    run, done = jobs.run("produce_metrics", _publish(producer_run_seconds=12))
    assert run.status == dg.DagsterRunStatus.SUCCESS, done.stdout
    observed = []
    for entry in jobs.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION):
        assert entry.dagster_event is not None
        observed.append(entry.dagster_event.asset_observation_data.asset_observation.metadata)
    assert [metadata["state"].value for metadata in observed] == ["running", "finished"]
    with jobs.stack.admin() as connection:
        counted = connection.execute(
            "SELECT sum(acknowledged), sum(failed), min(state) FROM producer_runs WHERE run_id = %s", [run.run_id]
        ).fetchone()
    assert counted == (observed[-1]["acknowledged"].value, 0, "finished")
    give_up = deadline(120)
    while kafka.consumer_lag(settings).total:
        assert time.monotonic() < give_up
        time.sleep(0.2)
    summaries, _ = jobs.run("summaries")
    assert summaries.status == dg.DagsterRunStatus.SUCCESS
    event = jobs.instance.get_latest_materialization_event(dg.AssetKey("ingestion_rate"))
    assert event is not None
    assert event.asset_materialization is not None
    with jobs.stack.admin() as connection:
        assert connection.execute("SELECT count(*) FROM metrics").fetchone() == (
            event.asset_materialization.metadata["rows"].value,
        )
    # Other tests on this stack may just have sent bad records, and had them taken over from the connector.
    with jobs.stack.admin() as connection:
        connection.execute("UPDATE rejected_metrics SET rejected_at = rejected_at - interval '11 minutes'")
        connection.execute("UPDATE quarantines SET ended_at = ended_at - interval '11 minutes'")
    checked, _ = jobs.run("check_throughput")
    assert jobs.checks(checked) == dict.fromkeys(("throughput", "consumer_lag", "freshness", "rejects"), "ok")


def test_a_second_producer_says_why_not_and_a_hanging_one_is_an_error(jobs: Jobs) -> None:
    settings = jobs.stack.settings
    with jobs.running("produce_metrics", _publish(producer_run_seconds=300)) as process:
        _wait_for(lambda: ledger.holder(settings) is not None)
        (first,) = jobs.instance.get_runs(dg.RunsFilter(job_name="produce_metrics"), limit=1)
        second, done = jobs.run("produce_metrics", _publish(producer_run_seconds=5))
        assert second.status == dg.DagsterRunStatus.FAILURE
        assert "another producer is running" in done.stdout + done.stderr
        # Hanging, its run is active and its session has the lock: nothing new is stored.
        process.send_signal(signal.SIGSTOP)
        try:
            _wait_for(lambda: kafka.consumer_lag(settings).total == 0)
            _let_pass(jobs, first, 61)
            assert _started_before(jobs, first, 60)
            assert _nothing_stored_for(jobs, 60)
            checked, _ = jobs.run("check_throughput")
            found = jobs.checks(checked)
            assert "although a producer is meant to run" in found["throughput"]
            assert "nothing was stored for 60 s" in found["freshness"]
            assert found["consumer_lag"] == "ok"
        finally:
            process.send_signal(signal.SIGCONT)
        # No code server knows this run: it sees by itself that it is to end.
        jobs.instance.report_run_canceling(first)
        process.wait(patience(60))
    run = jobs.instance.get_run_by_id(first.run_id)
    assert run is not None
    assert run.status == dg.DagsterRunStatus.CANCELED
    with jobs.stack.admin() as connection:
        counted = connection.execute("SELECT DISTINCT state FROM producer_runs WHERE run_id = %s", [first.run_id])
        assert counted.fetchall() == [("stopped",)]


def test_purge_and_its_sql(jobs: Jobs) -> None:
    run, done = jobs.run("housekeeping")
    assert run.status == dg.DagsterRunStatus.SUCCESS, done.stdout
    assert "deleted 0 runs" in done.stdout + done.stderr

    def kept() -> tuple[int, int]:
        """Executions, and checks that have any."""
        row = connection.execute("SELECT count(*), count(DISTINCT check_name) FROM asset_check_executions").fetchone()
        assert row is not None
        return row[0], row[1]

    with psycopg.connect(jobs.stack.settings.dagster_postgres_url, autocommit=True) as connection:
        for _ in range(2):
            if kept()[0] == kept()[1]:  # a check's last execution stays, so there has to be a former one
                jobs.run("check_provisioning")
        executions, checks = kept()
        assert executions > checks
        connection.execute(
            "UPDATE asset_check_executions SET create_timestamp = create_timestamp - interval '25 hours'"
        )
        jobs.run("housekeeping")
        assert kept() == (checks, checks)


def test_no_secret_stands_in_dagsters_storage(jobs: Jobs) -> None:
    settings = jobs.stack.settings
    secrets = [
        getattr(settings, name).get_secret_value() for name in Settings.model_fields if name.endswith("_password")
    ]
    assert all(secrets)
    with psycopg.connect(settings.dagster_postgres_url) as connection:
        for table, column in (
            ("event_logs", "event"),
            ("runs", "run_body"),
            ("asset_check_executions", "evaluation_event"),
        ):
            for secret in secrets:
                found = connection.execute(
                    f"SELECT count(*) FROM {table} WHERE strpos({column}, %s) > 0", [secret]
                ).fetchone()
                assert found == (0,), (table, column)


def test_columns_shown_are_those_of_the_table(stack: RunningStack) -> None:
    with stack.admin() as connection:
        rows = connection.execute(
            "SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute "
            "WHERE attrelid = 'metrics'::regclass AND attnum > 0 ORDER BY attnum"
        ).fetchall()
    names = {"timestamp with time zone": "timestamptz"}
    assert [(column.name, column.type, not column.constraints.nullable) for column in COLUMNS.columns] == [
        (name, names.get(kind, kind), filled) for name, kind, filled in rows
    ]


def _publish(**settings: int) -> dict[str, Any]:
    """Run config of a producer that gives the sink little to do."""
    return {"publish": {"config": {"producer_min_metrics": 100, "producer_max_metrics": 200, **settings}}}


def _let_pass(jobs: Jobs, run: dg.DagsterRun, seconds: int) -> None:
    """As if the run had begun, and everything been stored, so much earlier: a minute is not waited for."""
    with jobs.stack.admin() as connection:
        connection.execute(
            "UPDATE metrics SET created_at = created_at - make_interval(secs => %(seconds)s) "
            "WHERE created_at > now() - make_interval(secs => %(seconds)s)",
            {"seconds": seconds},
        )
    with psycopg.connect(jobs.stack.settings.dagster_postgres_url) as connection:
        moved = connection.execute(
            "UPDATE runs SET start_time = start_time - %s WHERE run_id = %s", [seconds, run.run_id]
        )
        assert moved.rowcount == 1


def _started_before(jobs: Jobs, run: dg.DagsterRun, seconds: float) -> bool:
    record = jobs.instance.get_run_record_by_id(run.run_id)
    return record is not None and record.start_time is not None and time.time() - record.start_time > seconds


def _nothing_stored_for(jobs: Jobs, seconds: float) -> bool:
    with jobs.stack.admin() as connection:
        found = connection.execute(
            "SELECT now() - max(created_at) > make_interval(secs => %s) FROM metrics", [seconds]
        ).fetchone()
    return found == (True,)


def _wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    give_up = deadline(seconds)
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.2)
