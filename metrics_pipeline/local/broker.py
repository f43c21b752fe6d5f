"""The embedded broker: Apache Kafka in KRaft mode, broker and controller in one process."""

from __future__ import annotations

import base64
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from metrics_pipeline.errors import InstallError
from metrics_pipeline.local import java
from metrics_pipeline.local.budget import MIB, Budget
from metrics_pipeline.local.service import Service
from metrics_pipeline.settings import Settings


def properties(settings: Settings, data: Path) -> dict[str, str]:
    """The broker's configuration."""
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{settings.kafka_controller_port}",
        "listeners": f"PLAINTEXT://127.0.0.1:{settings.kafka_port},CONTROLLER://127.0.0.1:{settings.kafka_controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{settings.kafka_port}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": str(data),
        "auto.create.topics.enable": "false",
        "unclean.leader.election.enable": "false",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "8",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "group.initial.rebalance.delay.ms": "0",
        # Retention by bytes holds only as often as it is looked at.
        "log.retention.check.interval.ms": "30000",
        "log.cleaner.dedupe.buffer.size": str(16 * MIB),
        "num.network.threads": "2",
        "num.io.threads": "4",
        "num.recovery.threads.per.data.dir": "2",
    }


def service(settings: Settings, budget: Budget, jars: Sequence[Path]) -> Service:
    """The broker as a child of the keeper."""
    data = settings.data_dir / "kafka"
    file = settings.data_dir / "config" / "server.properties"
    environment = java.environment(jars)

    def prepare() -> None:
        data.mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{name}={value}\n" for name, value in properties(settings, data).items()))
        if not (data / "meta.properties").exists():
            _format(environment, file)

    def check() -> str | None:
        return broker_problem(settings)

    return Service(
        name="broker",
        title="Broker",
        url=f"127.0.0.1:{settings.kafka_port}",
        command=java.command("kafka.Kafka", [str(file)], budget.broker_heap),
        environment=environment,
        log=settings.data_dir / "logs" / "broker.log",
        check=check,
        prepare=prepare,
        cwd=settings.data_dir,
        stop_seconds=45,
        start_seconds=180,  # unclean shutdown: the logs are read again
    )


def broker_problem(settings: Settings) -> str | None:
    """None when the broker answers, else why not."""
    client = AdminClient({"bootstrap.servers": settings.bootstrap_servers, "log_level": 0, "socket.timeout.ms": 3000})
    try:
        metadata = client.list_topics(timeout=3)
    except KafkaException as error:
        return f"no answer on {settings.bootstrap_servers}: {error.args[0].str()}"
    return None if metadata.brokers else "no broker in the cluster yet"


def _format(environment: dict[str, str], file: Path) -> None:
    # Kafka writes a UUID as 22 characters of URL-safe base64; `StorageTool random-uuid` would cost the start of another JVM.
    identity = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    arguments = ["format", f"--cluster-id={identity}", "--config", str(file)]
    command = java.command("kafka.tools.StorageTool", arguments, 128 * MIB)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InstallError(
            f"the broker's storage could not be formatted: {(done.stderr or done.stdout).strip()[-300:]}; "
            "if it is of an older version, `metrics-pipeline reset` starts afresh"
        )
