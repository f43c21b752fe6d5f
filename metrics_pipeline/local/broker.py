"""The embedded broker: Apache Kafka in KRaft mode, broker and controller in one process, or three such processes.

One broker keeps its data in `kafka`, three keep theirs in `kafka-cluster/1` to `3`: neither can be taken for the other.
"""

from __future__ import annotations

import base64
import subprocess
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from metrics_pipeline.errors import DriftError, InstallError
from metrics_pipeline.local import java
from metrics_pipeline.local.budget import MIB, Budget
from metrics_pipeline.local.service import Service
from metrics_pipeline.settings import Settings

PORTS = {
    "broker": ("kafka_port", "kafka_controller_port"),
    "broker-2": ("kafka_2_port", "kafka_2_controller_port"),
    "broker-3": ("kafka_3_port", "kafka_3_controller_port"),
}
"""Each broker's name and the settings of its ports."""


@dataclass(frozen=True, slots=True)
class BrokerNode:
    """One broker.

    Attributes:
        id: from 1.
        name: of its service.
        port: for clients.
        controller_port: for the quorum.
        data: its folder.
        file: its configuration.
    """

    id: int
    name: str
    port: int
    controller_port: int
    data: Path
    file: Path


def nodes(settings: Settings) -> list[BrokerNode]:
    """The brokers that these settings ask for."""
    alone = settings.kafka_brokers == 1
    home, config = settings.data_dir, settings.data_dir / "config"
    return [
        BrokerNode(
            number,
            name,
            port,
            controller_port,
            data=home / "kafka" if alone else home / "kafka-cluster" / str(number),
            file=config / ("server.properties" if alone else f"server-{number}.properties"),
        )
        for number, (name, (port, controller_port)) in enumerate(zip(PORTS, settings.broker_ports, strict=False), 1)
    ]


def properties(settings: Settings, node: BrokerNode) -> dict[str, str]:
    """A broker's configuration."""
    replicas = settings.kafka_brokers
    insync = min(replicas, 2)
    voters = [f"{voter.id}@127.0.0.1:{voter.controller_port}" for voter in nodes(settings)]
    common = {
        "process.roles": "broker,controller",
        "node.id": str(node.id),
        "controller.quorum.voters": ",".join(voters),
        "listeners": f"PLAINTEXT://127.0.0.1:{node.port},CONTROLLER://127.0.0.1:{node.controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{node.port}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": str(node.data),
        "auto.create.topics.enable": "false",
        "unclean.leader.election.enable": "false",
        "offsets.topic.replication.factor": str(replicas),
        "offsets.topic.num.partitions": "8",
        "transaction.state.log.replication.factor": str(replicas),
        "transaction.state.log.min.isr": str(insync),
        "share.coordinator.state.topic.replication.factor": str(replicas),
        # Members that start together, as the workers of a sink do, are given their shares together, not one after another.
        "group.initial.rebalance.delay.ms": "300",
        # Retention by bytes holds only as often as it is looked at.
        "log.retention.check.interval.ms": "30000",
        "log.cleaner.dedupe.buffer.size": str(16 * MIB),
        "num.network.threads": "2",
        "num.io.threads": "4",
        "num.recovery.threads.per.data.dir": "2",
    }
    return common if replicas == 1 else common | _cluster_properties(replicas, insync)


def _cluster_properties(replicas: int, insync: int) -> dict[str, str]:
    return {
        "default.replication.factor": str(replicas),
        "min.insync.replicas": str(insync),
        "share.coordinator.state.topic.min.isr": str(insync),
        # A dead broker's partitions get other leaders after this long (Kafka: 9 s). Heartbeats have a thread of their own,
        # but all three brokers share the machine's cores and disk: much less, and a busy machine fences healthy ones.
        "broker.session.timeout.ms": "6000",
        "broker.heartbeat.interval.ms": "1000",
        # Of the quorum's leader, for the same two reasons (Kafka: 2 s and 1 s).
        "controller.quorum.fetch.timeout.ms": "3000",
        "controller.quorum.election.timeout.ms": "1500",
        # A dead replica leaves the ISR when it is fenced; this is for one that lives and cannot follow, which on one machine
        # means that the machine is busy. Kafka's own value, which forgives that.
        "replica.lag.time.max.ms": "30000",
        # The keeper ends all of them at once, and a controlled shutdown needs a quorum: the last one would wait for minutes.
        # The logs are closed cleanly without it.
        "controlled.shutdown.enable": "false",
    }


def require_same_brokers(settings: Settings) -> None:
    """Check that the data folder holds the data of as many brokers as are asked for.

    Raises:
        DriftError: it was made for another number of them; nothing was changed.
    """
    home = settings.data_dir
    alone, cluster = home / "kafka" / "meta.properties", home / "kafka-cluster" / "cluster-id"
    made_for = 1 if alone.exists() else 3 if cluster.exists() else settings.kafka_brokers
    if made_for != settings.kafka_brokers and not settings.kafka_url:
        raise DriftError(
            f"the topic in {settings.data_dir} is that of {_count(made_for)}, and KAFKA_BROKERS is {settings.kafka_brokers}: "
            f"go on with KAFKA_BROKERS={made_for}, or take another folder (PIPELINE_DATA_DIR), "
            "or delete topic and readings with `metrics-pipeline reset` and start afresh"
        )


def _count(brokers: int) -> str:
    return "1 broker" if brokers == 1 else f"{brokers} brokers"


def services(settings: Settings, budget: Budget, jars: Sequence[Path]) -> list[Service]:
    """The brokers as children of the keeper; three of them start side by side, since one alone is no quorum."""
    identity = threading.Lock()
    return [_service(settings, budget, jars, node, identity) for node in nodes(settings)]


def _service(
    settings: Settings, budget: Budget, jars: Sequence[Path], node: BrokerNode, identity: threading.Lock
) -> Service:
    environment = java.environment(jars)
    alone = settings.kafka_brokers == 1

    def prepare() -> None:
        require_same_brokers(settings)
        node.data.mkdir(parents=True, exist_ok=True)
        node.file.parent.mkdir(parents=True, exist_ok=True)
        node.file.write_text(java.properties(properties(settings, node)), "ascii")
        if not (node.data / "meta.properties").exists():
            with identity:
                cluster = _new_identity() if alone else _shared_identity(node.data.parent / "cluster-id")
            _format(environment, node.file, cluster)

    def check() -> str | None:
        return _no_answer(f"127.0.0.1:{node.port}", node.id, written_cluster(settings))

    return Service(
        name=node.name,
        title="Broker" if alone else f"Broker {node.id}",
        url=f"127.0.0.1:{node.port}",
        command=java.command("kafka.Kafka", [str(node.file)], budget.broker_heap),
        environment=environment,
        log=settings.data_dir / "logs" / f"{node.name}.log",
        check=check,
        prepare=prepare,
        cwd=settings.data_dir,
        stop_seconds=45,
        first_cause=java.first_cause,
        start_seconds=180,  # unclean shutdown: the logs are read again
    )


def broker_problem(settings: Settings) -> str | None:
    """None when the broker answers, or all of them do, else why not."""
    return look(settings)[1]


def look(settings: Settings) -> tuple[bool, str | None]:
    """Whether there is a broker to work with, and what is wrong; a cluster may lack one and work."""
    client = _client(settings.bootstrap_servers)
    try:
        known = client.list_topics(timeout=3)
    except KafkaException as error:
        return False, f"no answer on {settings.bootstrap_servers}: {error.args[0].str()}"
    if problem := _foreign(settings.bootstrap_servers, known.cluster_id, written_cluster(settings)):
        return False, problem
    brokers = len(known.brokers)
    if not brokers:
        return False, "no broker in the cluster yet"
    missing = 0 if settings.kafka_url else settings.kafka_brokers - brokers
    return True, f"{missing} of {settings.kafka_brokers} brokers away" if missing > 0 else None


def written_cluster(settings: Settings) -> str:
    """The id of the Kafka cluster in the data folder; empty when none was made there, or KAFKA_URL names one elsewhere."""
    if settings.kafka_url:
        return ""
    for node in nodes(settings):
        try:
            lines = (node.data / "meta.properties").read_text("utf-8").splitlines()
        except OSError:
            continue
        if found := [line.partition("=")[2].strip() for line in lines if line.startswith("cluster.id=")]:
            return found[0]
    return ""


def _foreign(address: str, theirs: str | None, ours: str) -> str | None:
    if not ours or not theirs or theirs == ours:
        return None
    return f"what answers on {address} is a broker of another Kafka cluster ({theirs}): it is left alone"


def _no_answer(address: str, node: int, cluster: str) -> str | None:
    """None when the broker at this address answers and has its place in the cluster."""
    client = _client(address)
    try:
        known = client.list_topics(timeout=3)
    except KafkaException as error:
        return f"no answer on {address}: {error.args[0].str()}"
    if problem := _foreign(address, known.cluster_id, cluster):
        return problem
    brokers = known.brokers
    if not brokers:
        return "no broker in the cluster yet"
    return None if node in brokers else f"broker {node} has not joined the cluster yet"


def _client(addresses: str) -> AdminClient:
    return AdminClient({"bootstrap.servers": addresses, "log_level": 0, "socket.timeout.ms": 3000})


def _new_identity() -> str:
    # Kafka writes a UUID as 22 characters of URL-safe base64; `StorageTool random-uuid` would cost the start of another JVM.
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def _shared_identity(file: Path) -> str:
    """The cluster's identity, the same for each of its brokers however often one is formatted."""
    if not file.exists():
        scratch = file.with_suffix(".tmp")
        scratch.write_text(_new_identity())
        scratch.replace(file)
    return file.read_text().strip()


def _reason(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return (java.first_cause(lines) or (lines or ["no output"])[0]).strip()[:300]


def _format(environment: dict[str, str], file: Path, identity: str) -> None:
    arguments = ["format", f"--cluster-id={identity}", "--config", str(file)]
    command = java.command("kafka.tools.StorageTool", arguments, 128 * MIB)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InstallError(
            f"the broker's storage could not be formatted: {_reason(done.stdout + done.stderr)}; "
            "if it is of an older version, `metrics-pipeline reset` starts afresh"
        )
