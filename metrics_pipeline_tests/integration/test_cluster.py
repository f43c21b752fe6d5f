"""Three brokers and two Connect workers under the keeper: one of each killed under load, and nothing lost.

A stack of its own, without Dagster. The keeper is the real one; it runs in a thread of this process.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType

from metrics_pipeline import kafka, postgres
from metrics_pipeline.local import account, environment
from metrics_pipeline.local import keeper as keeping
from metrics_pipeline.local.broker import broker_problem
from metrics_pipeline.local.keeper import Keeper
from metrics_pipeline.local.stack import Stack, build
from metrics_pipeline.local.status import Sampler
from metrics_pipeline.settings import CONNECTOR, DEAD_LETTER_TOPIC, TOPIC, Settings
from metrics_pipeline.sinks import connector
from metrics_pipeline_tests.patience import patience

pytestmark = [pytest.mark.integration, pytest.mark.whole_stack]

LOAD = {"PRODUCER_MIN_METRICS": 100, "PRODUCER_MAX_METRICS": 300, "PRODUCER_PUBLISH_INTERVAL": 250}
"""About 800 messages/s: the machine has eight processes to share itself out to."""


@dataclass(frozen=True)
class Cluster:
    """What runs, and who looks after it."""

    settings: Settings
    environment: Mapping[str, str]
    keeper: Keeper
    reports: list[str]

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "metrics_pipeline", *arguments]

    def kill(self, name: str) -> int:
        """kill -9; the pid it had."""
        assert self.keeper.stack is not None
        process = self.keeper.stack.service(name).process
        assert process is not None
        process.kill()
        return process.pid

    def came_back(self, name: str, former: int) -> None:
        """The keeper started it again, and it is well."""
        assert self.keeper.stack is not None
        service = self.keeper.stack.service(name)
        until(f"{name} is well again", lambda: service.alive() and service.check() is None)
        assert service.process is not None
        assert service.process.pid != former

    def partitions(self, topic: str = TOPIC) -> dict[int, Any]:
        """Metadata of a topic's partitions: leader, replicas, in-sync replicas."""
        admin = AdminClient(kafka.client_config(self.settings))
        return dict(admin.list_topics(timeout=8).topics[topic].partitions)

    def acknowledged(self) -> int:
        """Messages of the running producer that are in the topic."""
        return int(requests.get(f"{self.settings.producer_http}/status", timeout=5).json()["acknowledged"])

    def rows(self) -> int:
        with postgres.connect(self.settings, "metrics_reader", autocommit=True) as connection:
            return int((connection.execute("SELECT count(*) FROM metrics").fetchone() or (0,))[0])

    def tasks(self) -> dict[str, int]:
        """How many tasks run on each worker; none when not all of them run."""
        if not connector.sink_state(self.settings).running:
            return {}
        for url in self.settings.connect_urls:
            try:
                status = requests.get(f"{url}/connectors/{CONNECTOR}/status", timeout=5).json()
            except requests.ConnectionError:
                continue
            workers = [task["worker_id"] for task in status["tasks"]]
            return {worker: workers.count(worker) for worker in set(workers)}
        return {}


def until(what: str, condition: Callable[[], bool], limit: float = 60) -> float:
    """Wait for a condition; the seconds it took."""
    began = time.monotonic()
    while time.monotonic() - began < patience(limit):
        if condition():
            return time.monotonic() - began
        time.sleep(0.2)
    pytest.fail(f"not within {patience(limit):.0f} s: {what}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """`metrics-pipeline up --brokers 3 --connect-workers 2`, but for Dagster."""

    def provision(stack: Stack) -> str:
        postgres.migrate(stack.settings)
        kafka.ensure_topic(stack.settings)
        connector.ensure_connector(stack.settings)
        return ""

    folder = Path(tempfile.mkdtemp(prefix="metrics-pipeline-cluster-"))
    own = {"PIPELINE_MEMORY_GB": "3", "KAFKA_BROKERS": "3", "CONNECT_WORKERS": "2"}
    with environment.replaced(environment.isolated(folder) | own), pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "build", partial(build, with_dagster=False, quiet=True))
        patch.setattr(Stack, "_provision", provision)
        reports: list[str] = []
        try:
            with Keeper(Settings.load(), reports.append) as keeper:
                keeper.start()
                running = threading.Thread(target=keeper.run, args=[lambda: None])
                running.start()
                try:
                    yield Cluster(keeper.settings, environment.for_python(keeper.settings), keeper, reports)
                finally:
                    keeper.request_stop()
                    running.join()
        finally:
            home = account.postgres_home(folder / "data", account.unprivileged())
            shutil.rmtree(home, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)


def test_every_topic_has_three_replicas_of_which_two_must_answer(cluster: Cluster) -> None:
    assert cluster.settings.bootstrap_servers.count(",") == 2
    assert cluster.settings.topic_replication_factor == 3
    assert kafka.topic_drift(cluster.settings) == []
    assert broker_problem(cluster.settings) is None
    admin = AdminClient(kafka.client_config(cluster.settings))
    topics = admin.list_topics(timeout=8).topics
    assert {TOPIC, DEAD_LETTER_TOPIC, "__consumer_offsets", "connect-configs", "connect-offsets", "connect-status"} == {
        *topics
    }
    for name, topic in topics.items():
        assert {len(partition.replicas) for partition in topic.partitions.values()} == {3}, name
        resource = ConfigResource(ResourceType.TOPIC, name)
        config = admin.describe_configs([resource])[resource].result()
        assert config["min.insync.replicas"].value == "2", name
        assert config["unclean.leader.election.enable"].value == "false", name


def test_both_workers_share_the_tasks(cluster: Cluster) -> None:
    until("three tasks on each worker", lambda: sorted(cluster.tasks().values()) == [3, 3])
    for url in cluster.settings.connect_urls:
        assert connector.ConnectClient(url).state(CONNECTOR).running


def test_a_broker_and_a_worker_killed_under_load(cluster: Cluster) -> None:
    options = [option for name, value in LOAD.items() for option in ("--set", f"{name}={value}")]
    producer = subprocess.Popen(
        cluster.command("produce", "--seconds", "600", *options),
        env=dict(cluster.environment),
        cwd=cluster.settings.data_dir,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until("rows are stored", lambda: producer.poll() is None and cluster.rows() > 1000)
        lost_broker(cluster)
        lost_worker(cluster)
        assert producer.poll() is None
    finally:
        producer.terminate()
        said, _ = producer.communicate(timeout=patience(60))
    assert producer.returncode == 0, said  # every message was acknowledged
    verified = subprocess.run(
        cluster.command("verify", "--json"),
        env=dict(cluster.environment),
        cwd=cluster.settings.data_dir,
        capture_output=True,
        text=True,
        timeout=patience(200),
        check=False,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert json.loads(verified.stdout)


def lost_broker(cluster: Cluster) -> None:
    leader = cluster.partitions()[0].leader
    led = [number for number, partition in cluster.partitions().items() if partition.leader == leader]
    before = kafka.watermarks(cluster.settings)
    name = "broker" if leader == 1 else f"broker-{leader}"
    pid = cluster.kill(name)
    until(
        "its partitions are led by others",
        lambda: all(cluster.partitions()[number].leader not in (leader, -1) for number in led),
    )
    moved = kafka.watermarks(cluster.settings)
    until(
        "messages are acknowledged in every one of them",
        lambda: all(kafka.watermarks(cluster.settings)[number][1] > moved[number][1] for number in led),
    )
    assert all(moved[number][1] >= before[number][1] for number in before)
    cluster.came_back(name, pid)
    until(
        "all replicas are in sync",
        lambda: all(
            len(partition.isrs) == 3
            for topic in (TOPIC, "__consumer_offsets", "connect-configs", "connect-offsets", "connect-status")
            for partition in cluster.partitions(topic).values()
        ),
    )
    assert [line for line in cluster.reports if f"Broker {leader} ended" in line]


def lost_worker(cluster: Cluster) -> None:
    acknowledged, rows = cluster.acknowledged(), cluster.rows()
    pid = cluster.kill("connect")
    # The URL that is asked first is dead now; the other worker answers for the group.
    assert connector.sink_state(cluster.settings).tasks
    sampler = Sampler(cluster.settings)
    assert "1 of 2 Connect workers away" in sampler.sample()["connect"]["reason"]
    sampler.close()
    until("rows go on", lambda: cluster.rows() > rows)
    until("messages go on", lambda: cluster.acknowledged() > acknowledged)
    marks = kafka.watermarks(cluster.settings)
    cluster.came_back("connect", pid)
    # Its tasks still show RUNNING for a while: what counts is that records published after its end are stored.
    until(
        "every partition is read again",
        lambda: all(kafka.committed(cluster.settings).get(number, 0) > high for number, (_, high) in marks.items()),
        limit=90,
    )
    until("three tasks on each worker again", lambda: sorted(cluster.tasks().values()) == [3, 3])
    assert [line for line in cluster.reports if "Kafka Connect ended" in line]
