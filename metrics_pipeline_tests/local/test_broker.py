"""The brokers' configuration: one as ever, three as a cluster in which one may be lost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from metrics_pipeline.errors import DriftError, SettingError
from metrics_pipeline.local import broker, connect_worker
from metrics_pipeline.local.broker import nodes, properties, require_same_brokers
from metrics_pipeline.local.budget import Budget
from metrics_pipeline.local.stack import PORTS, unused_ports
from metrics_pipeline.settings import Settings


def settings(tmp_path: Path, **given: object) -> Settings:
    return Settings(pipeline_data_dir=tmp_path, **given)  # type: ignore[arg-type]  # pydantic checks them


def test_one_broker_is_its_own_quorum(tmp_path: Path) -> None:
    alone = settings(tmp_path)
    (node,) = nodes(alone)
    assert (node.data, node.file) == (tmp_path / "kafka", tmp_path / "config" / "server.properties")
    config = properties(alone, node)
    assert config["controller.quorum.voters"] == "1@127.0.0.1:19093"
    assert {value for name, value in config.items() if "replication.factor" in name or "min.isr" in name} == {"1"}
    assert not {"min.insync.replicas", "controlled.shutdown.enable", "broker.session.timeout.ms"} & set(config)


def test_three_brokers_keep_everything_three_times(tmp_path: Path) -> None:
    cluster = settings(tmp_path, kafka_brokers=3)
    configs = [properties(cluster, node) for node in nodes(cluster)]
    assert [config["node.id"] for config in configs] == ["1", "2", "3"]
    assert {config["controller.quorum.voters"] for config in configs} == {
        "1@127.0.0.1:19093,2@127.0.0.1:19095,3@127.0.0.1:19097"
    }
    assert [config["advertised.listeners"] for config in configs] == [
        "PLAINTEXT://127.0.0.1:19092",
        "PLAINTEXT://127.0.0.1:19094",
        "PLAINTEXT://127.0.0.1:19096",
    ]
    assert len({config["log.dirs"] for config in configs}) == 3
    for config in configs:
        assert {value for name, value in config.items() if "replication.factor" in name} == {"3"}
        assert {value for name, value in config.items() if "min.i" in name} == {"2"}
        assert config["unclean.leader.election.enable"] == "false"
        # A broker is fenced only after several heartbeats that did not come.
        session, beat = (int(config[f"broker.{name}.ms"]) for name in ("session.timeout", "heartbeat.interval"))
        assert session >= 5 * beat
    assert {"0.0.0.0", "[::]"} & {value for config in configs for value in config.values()} == set()


def test_clients_know_all_brokers_and_workers(tmp_path: Path) -> None:
    cluster = settings(tmp_path, kafka_brokers=3, connect_workers=2)
    assert cluster.bootstrap_servers == "127.0.0.1:19092,127.0.0.1:19094,127.0.0.1:19096"
    assert cluster.connect_urls == ("http://127.0.0.1:8083", "http://127.0.0.1:8084")
    assert cluster.topic_replication_factor == 3
    alone = settings(tmp_path)
    assert (alone.bootstrap_servers, alone.connect_urls) == ("127.0.0.1:19092", ("http://127.0.0.1:8083",))
    assert alone.topic_replication_factor == 1


def test_replicas_that_were_set_are_not_guessed(tmp_path: Path) -> None:
    assert settings(tmp_path, kafka_brokers=3, topic_replication_factor=2).topic_replication_factor == 2


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("KAFKA_BROKERS", "2", "must be 1 or 3"),
        ("KAFKA_BROKERS", "x", "valid integer"),
        ("CONNECT_WORKERS", "0", "greater than or equal to 1"),
        ("CONNECT_WORKERS", "4", "less than or equal to 3"),
    ],
)
def test_numbers_that_make_no_sense(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingError, match=rf"{variable}={value}: .*{reason}"):
        Settings.load()


@pytest.mark.parametrize(("made", "asked"), [("kafka/meta.properties", 3), ("kafka-cluster/cluster-id", 1)])
def test_data_of_another_number_of_brokers_is_refused(tmp_path: Path, made: str, asked: int) -> None:
    require_same_brokers(settings(tmp_path, kafka_brokers=asked))  # an empty folder suits both
    (tmp_path / made).parent.mkdir()
    (tmp_path / made).touch()
    require_same_brokers(settings(tmp_path, kafka_brokers=4 - asked))
    with pytest.raises(DriftError, match=rf"KAFKA_BROKERS is {asked}: go on with KAFKA_BROKERS={4 - asked}, or"):
        require_same_brokers(settings(tmp_path, kafka_brokers=asked))
    require_same_brokers(settings(tmp_path, kafka_brokers=asked, kafka_url="127.0.0.1:1"))  # somebody else's broker


def test_the_cluster_has_one_identity(tmp_path: Path) -> None:
    file = tmp_path / "cluster-id"
    first = broker._shared_identity(file)
    assert len(first) == 22
    assert broker._shared_identity(file) == first
    assert broker._new_identity() != first


def test_services_are_named_ported_and_ordered(tmp_path: Path) -> None:
    cluster = settings(tmp_path, kafka_brokers=3, connect_workers=2)
    budget = Budget.of(cluster)
    brokers = broker.services(cluster, budget, [])
    workers = connect_worker.services(cluster, budget, [], tmp_path)
    assert [service.name for service in brokers] == ["broker", "broker-2", "broker-3"]
    assert [service.name for service in workers] == ["connect", "connect-2"]
    for worker, url in zip(workers, cluster.connect_urls, strict=True):
        assert set(worker.needs) == {"postgres", "broker", "broker-2", "broker-3"}
        assert worker.environment["CONNECT_LISTENERS"] == url
        assert worker.environment["CONNECT_BOOTSTRAP_SERVERS"] == cluster.bootstrap_servers
        assert worker.environment["CONNECT_REPLICATION_FACTOR"] == "3"
    assert len({str(service.log) for service in [*brokers, *workers]}) == 5
    assert {service.name for service in [*brokers, *workers]} <= set(PORTS)


def test_connects_own_topics_follow_the_brokers_whatever_the_topic_has(tmp_path: Path) -> None:
    cluster = settings(tmp_path, kafka_brokers=3, topic_replication_factor=1)
    (worker,) = connect_worker.services(cluster, Budget.of(cluster), [], tmp_path)
    assert worker.environment["CONNECT_REPLICATION_FACTOR"] == "3"
    outside = settings(tmp_path, kafka_url="127.0.0.1:1", topic_replication_factor=5)
    (worker,) = connect_worker.services(outside, Budget.of(outside), [], tmp_path)
    assert (worker.environment["CONNECT_REPLICATION_FACTOR"], worker.needs) == ("3", ("postgres", "broker"))


def test_ports_that_nobody_uses_need_not_be_free(tmp_path: Path) -> None:
    ours = {port for ports in PORTS.values() for port in ports}
    assert ours == set(Settings.group("ports"))
    assert unused_ports(settings(tmp_path)) & ours == {
        "kafka_2_port",
        "kafka_2_controller_port",
        "kafka_3_port",
        "kafka_3_controller_port",
        "connect_2_port",
        "connect_3_port",
        "exporter_port",
        "sink_port",
    }
    assert unused_ports(settings(tmp_path, kafka_brokers=3, connect_workers=3, exporter=True)) & ours == {"sink_port"}
    assert "pgadmin_port" in unused_ports(settings(tmp_path))  # of docker compose


@pytest.mark.parametrize(
    ("given", "found", "expected"),
    [
        ({}, 1, (True, None)),
        ({}, 0, (False, "no broker in the cluster yet")),
        ({"kafka_brokers": 3}, 3, (True, None)),
        ({"kafka_brokers": 3}, 2, (True, "1 of 3 brokers away")),
        ({"kafka_brokers": 3, "kafka_url": "127.0.0.1:1"}, 1, (True, None)),
    ],
)
def test_a_cluster_that_lacks_a_broker_works_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, object], found: int, expected: object
) -> None:
    metadata = SimpleNamespace(cluster_id="c1", brokers=dict.fromkeys(range(1, found + 1)))
    monkeypatch.setattr(broker, "_client", lambda addresses: SimpleNamespace(list_topics=lambda timeout: metadata))
    assert broker.look(settings(tmp_path, **given)) == expected


def test_a_broker_is_well_when_it_has_its_place_in_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = SimpleNamespace(cluster_id="c1", brokers={1: None, 3: None})
    monkeypatch.setattr(broker, "_client", lambda addresses: SimpleNamespace(list_topics=lambda timeout: metadata))
    assert broker._no_answer("127.0.0.1:1", 3, "c1") is None
    assert broker._no_answer("127.0.0.1:1", 2, "") == "broker 2 has not joined the cluster yet"
    assert str(broker._no_answer("127.0.0.1:1", 3, "c2")).startswith(
        "what answers on 127.0.0.1:1 is a broker of another Kafka"
    )


@pytest.mark.parametrize("brokers", [1, 3])
def test_a_broker_of_another_cluster_is_nobodys_of_ours(
    brokers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = settings(tmp_path, kafka_brokers=brokers)
    metadata = SimpleNamespace(cluster_id="theirs", brokers=dict.fromkeys(range(1, brokers + 1)))
    monkeypatch.setattr(broker, "_client", lambda addresses: SimpleNamespace(list_topics=lambda timeout: metadata))
    assert broker.look(own) == (True, None), "nothing was ever made in this folder"
    node = broker.nodes(own)[-1]
    node.data.mkdir(parents=True)
    (node.data / "meta.properties").write_text("#\nnode.id=1\ncluster.id=ours\nversion=1\n")
    answers, problem = broker.look(own)
    assert not answers
    assert str(problem).endswith("is a broker of another Kafka cluster (theirs): it is left alone")
    assert broker.look(settings(tmp_path, kafka_brokers=brokers, kafka_url="127.0.0.1:1"))[1] is None
