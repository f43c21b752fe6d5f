"""The connector is put as its file stands, and only when it differs; failures say what to do."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator

import pytest

from metrics_pipeline import kafka, postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.settings import CONNECTOR, ROOT, Settings
from metrics_pipeline.sinks import connector
from metrics_pipeline.sinks.connector import ConnectClient, ForeignError, SinkState, TaskState
from metrics_pipeline_tests.fake_connect import FakeConnect, serving
from metrics_pipeline_tests.fake_kafka import FakeBroker

TRACE = """org.apache.kafka.connect.errors.ConnectException: Exiting WorkerSinkTask due to unrecoverable exception.
\tat org.apache.kafka.connect.runtime.WorkerSinkTask.deliverMessages(WorkerSinkTask.java:633)
Caused by: org.hibernate.exception.DataException: error executing work [ERROR: bad]
\t... 10 more
Caused by: org.postgresql.util.PSQLException: ERROR: invalid byte sequence for encoding "UTF8": 0x00
\tat org.postgresql.core.v3.QueryExecutorImpl.receiveErrorResponse(QueryExecutorImpl.java:2736)
"""


@pytest.fixture
def fake() -> Iterator[FakeConnect]:
    with serving() as fake:
        yield fake


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(connector, "FAILED_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(connector, "RUNNING_SECONDS", 0.5)


def at(fake: FakeConnect) -> Settings:
    return Settings(connect_url=fake.url)


def test_the_connector_is_put_as_its_file_stands_and_once(fake: FakeConnect) -> None:
    assert connector.connector_drift(at(fake)) == [f"connector {CONNECTOR} does not exist"]
    assert connector.ensure_connector(at(fake)).state == "created"
    in_file = json.loads((ROOT / "connect" / "metrics-postgres-sink.json").read_text())
    assert fake.configs[CONNECTOR] == {**in_file, "name": CONNECTOR}
    assert connector.connector_drift(at(fake)) == []
    assert connector.ensure_connector(at(fake)).state == "unchanged"
    assert fake.requests == [f"PUT /connectors/{CONNECTOR}/config"]


def test_the_file_names_no_host_and_no_secret() -> None:
    config = connector.connector_config()
    assert config["connection.password"] == "${env:SINK_PG_PASSWORD}"
    assert config["connection.username"] == "${env:SINK_PG_USER}"
    assert config["connection.url"].startswith(
        "jdbc:postgresql://${env:SINK_PG_HOST}:${env:SINK_PG_PORT}/${env:SINK_PG_DB}?"
    )


def test_connect_reads_consumer_settings_of_a_connector_only_with_override() -> None:
    assert not [
        name for name in connector.connector_config() if name.startswith("consumer.") and ".override." not in name
    ]


def test_every_setting_that_differs_is_named_and_put_back(fake: FakeConnect) -> None:
    connector.ensure_connector(at(fake))
    config = fake.configs[CONNECTOR]
    config |= {"batch.size": "10", "extra": "x", "connection.password": "in-the-clear"}
    del config["tasks.max"]
    drift = connector.connector_drift(at(fake))
    assert drift == [
        "batch.size is 10, configured 2500",
        "connection.password is (hidden), configured ${env:SINK_PG_PASSWORD}",
        "extra is x, not configured",
        "tasks.max is missing, configured 6",
    ]
    change = connector.ensure_connector(at(fake))
    assert (change.state, change.details) == ("changed", drift)
    assert connector.connector_drift(at(fake)) == []


def test_tasks_that_do_not_run_are_drift_with_their_cause(fake: FakeConnect) -> None:
    connector.ensure_connector(at(fake))
    fake.fail(CONNECTOR, TRACE, 1)
    assert connector.connector_drift(at(fake)) == [
        'task 1 is FAILED: org.postgresql.util.PSQLException: ERROR: invalid byte sequence for encoding "UTF8": 0x00'
    ]


def test_failed_tasks_of_a_connector_as_configured_are_restarted(fake: FakeConnect) -> None:
    connector.ensure_connector(at(fake))
    fake.fail(CONNECTOR, TRACE, 1)
    change = connector.ensure_connector(at(fake))
    assert change.state == "changed"
    assert change.details[0].startswith("restarted, task 1 is FAILED: org.postgresql")
    assert connector.sink_state(at(fake)).running


def test_a_task_that_cannot_start_is_an_error_with_its_cause_and_the_next_step(fake: FakeConnect) -> None:
    fake.poison = TRACE
    with pytest.raises(ServiceError, match=r"tasks 0, 1 are FAILED: .*invalid byte sequence.*logs connect"):
        connector.ensure_connector(at(fake))


def test_tasks_that_never_start_are_an_error_within_the_bound(fake: FakeConnect) -> None:
    fake.tasks = 0
    with pytest.raises(ServiceError, match=r"has no tasks after 0 s|has no tasks"):
        connector.ensure_connector(at(fake))


@pytest.mark.parametrize("state", ["PAUSED", "STOPPED"])
def test_a_paused_connector_is_drift_and_is_resumed(fake: FakeConnect, state: str) -> None:
    connector.ensure_connector(at(fake))
    fake.states[CONNECTOR] = state
    assert connector.connector_drift(at(fake)) == [f"connector {CONNECTOR} is {state}"]
    assert connector.ensure_connector(at(fake)).details == [f"resumed, was {state}"]


def test_a_rebalance_is_waited_for(fake: FakeConnect) -> None:
    fake.rebalances = 2
    assert connector.ensure_connector(at(fake)).state == "created"


def test_a_rebalance_without_end_is_an_error(fake: FakeConnect) -> None:
    fake.rebalances = 10**6
    with pytest.raises(ServiceError, match="still rebalancing after 0 s"):
        ConnectClient(fake.url, patience=0.2).put(CONNECTOR, {})


def test_a_refused_file_says_what_connect_says(fake: FakeConnect) -> None:
    fake.refuse = "Connector configuration is invalid and contains the following 1 error(s):\nInvalid value x\n"
    with pytest.raises(
        ServiceError, match=r"\(400\): .*1 error\(s\): Invalid value x: mend connect/metrics-postgres-sink.json"
    ):
        connector.ensure_connector(at(fake))


@pytest.mark.parametrize("version", ["4.1.1", "3.9.0", ""])
def test_an_older_connect_is_refused(fake: FakeConnect, version: str) -> None:
    fake.version = version
    with pytest.raises(ServiceError, match=r"needs 4\.2 or newer"):
        connector.ensure_connector(at(fake))
    assert CONNECTOR not in fake.configs


@pytest.mark.parametrize("version", ["4.2.0", "4.3.1-SNAPSHOT", "10.0"])
def test_newer_ones_are_not(fake: FakeConnect, version: str) -> None:
    fake.version = version
    assert ConnectClient(fake.url).version() == version


def test_an_unreachable_connect_is_named_with_the_setting() -> None:
    with pytest.raises(
        ServiceError, match=r"http://127\.0\.0\.1:1 cannot be reached \(Connection refused\): .*CONNECT_URL"
    ):
        connector.sink_state(Settings(connect_url="http://127.0.0.1:1"), patience=0.1)


def test_the_cause_of_a_failure_is_the_innermost() -> None:
    assert TaskState(0, "FAILED", TRACE).cause.startswith("org.postgresql.util.PSQLException: ERROR: invalid byte")
    assert (
        TaskState(0, "FAILED", "java.lang.OutOfMemoryError: heap\n\tat x").cause == "java.lang.OutOfMemoryError: heap"
    )


@pytest.mark.parametrize(
    ("state", "problems"),
    [
        (SinkState("RUNNING", (TaskState(0, "RUNNING"),)), []),
        (SinkState("RUNNING"), [f"connector {CONNECTOR} has no tasks"]),
        (SinkState("MISSING"), [f"connector {CONNECTOR} does not exist"]),
        (SinkState("RUNNING", (TaskState(0, "UNASSIGNED"),)), ["task 0 is UNASSIGNED"]),
        (SinkState("FAILED", (TaskState(0, "RUNNING"),), "x.Y: z"), [f"connector {CONNECTOR} is FAILED: x.Y: z"]),
    ],
)
def test_running_means_the_connector_and_all_tasks(state: SinkState, problems: list[str]) -> None:
    assert state.problems == problems
    assert state.running is (not problems)


def test_delete_is_done_when_there_is_nothing_to_delete(fake: FakeConnect) -> None:
    ConnectClient(fake.url).delete(CONNECTOR)
    connector.ensure_connector(at(fake))
    ConnectClient(fake.url).delete(CONNECTOR)
    assert connector.sink_state(at(fake)).connector == "MISSING"


@pytest.fixture
def dead() -> str:
    """A URL on which nobody listens."""
    return f"http://127.0.0.1:{free_ports(1)[0]}"


def test_a_worker_that_is_away_is_passed_over(fake: FakeConnect, dead: str) -> None:
    settings = Settings(connect_url=f"{dead},{fake.url}")
    assert connector.ensure_connector(settings, patience=0.5).state == "created"
    assert connector.sink_state(settings, patience=0.5).running
    assert connector.connector_drift(settings, patience=0.5) == []


def test_the_worker_that_answered_last_is_asked_first(fake: FakeConnect, dead: str) -> None:
    client = ConnectClient([dead, fake.url], patience=0.5)
    client.version()
    asked: list[str] = []
    client._session.hooks["response"].append(lambda answer, **_: asked.append(answer.url))
    client.version()
    assert asked == [f"{fake.url}/"]
    assert client._urls == [fake.url, dead]


@pytest.mark.usefixtures("without_backoff")
def test_when_all_workers_are_away_each_is_named(dead: str) -> None:
    other = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ServiceError, match=r"cannot be reached \(Connection refused\)") as caught:
        ConnectClient([dead, other], patience=0.3).version()
    assert dead in str(caught.value)
    assert other in str(caught.value)


def test_a_worker_that_hangs_is_not_asked_again_but_the_other_is(
    fake: FakeConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "_TIMEOUT", (0.5, 0.2))
    with socket.socket() as hanging:
        hanging.bind(("127.0.0.1", 0))
        hanging.listen()
        client = ConnectClient([f"http://127.0.0.1:{hanging.getsockname()[1]}", fake.url], patience=0.5)
        with pytest.raises(ServiceError, match="timed out"):
            client.put(CONNECTOR, {})  # it may have been taken in: not repeated elsewhere
        assert fake.requests == []
        assert client.version() == fake.version


@pytest.mark.usefixtures("without_backoff")
def test_a_change_that_the_groups_leader_is_not_there_for_is_tried_again(
    fake: FakeConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, refusals = fake.answer, [500, 500]

    def forwarding(method: str, target: str, body: object) -> tuple[int, object]:
        if method == "PUT" and refusals:
            message = "IO Error trying to forward REST request: java.net.ConnectException: Connection refused"
            return refusals.pop(), {"error_code": 500, "message": message}
        return answer(method, target, body)

    monkeypatch.setattr(fake, "answer", forwarding)
    assert connector.ensure_connector(at(fake), patience=5).state == "created"
    assert refusals == []


# --- whose Connect it is -----------------------------------------------------------------------------------------


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> FakeBroker:
    """The broker of ours; it is that of the fake Connect."""
    made = FakeBroker()
    monkeypatch.setattr(kafka, "AdminClient", made.admin)
    return made


def on_the_port(fake: FakeConnect) -> Settings:
    """Nobody named a Connect: it is looked for where ours would be."""
    return Settings(connect_port=int(fake.url.rpartition(":")[2]))


CALLS: dict[str, Callable[[ConnectClient], object]] = {
    "config": lambda client: client.config(CONNECTOR),
    "put": lambda client: client.put(CONNECTOR, {}),
    "state": lambda client: client.state(CONNECTOR),
    "restart": lambda client: client.restart(CONNECTOR),
    "resume": lambda client: client.resume(CONNECTOR),
    "stop": lambda client: client.stop(CONNECTOR),
    "delete": lambda client: client.delete(CONNECTOR),
    "version": lambda client: client.version(),
}


@pytest.mark.parametrize(("cluster", "what"), [("another", "of another Kafka cluster"), (None, "is no Kafka Connect")])
@pytest.mark.parametrize("call", CALLS)
def test_the_connect_of_another_cluster_is_asked_nothing(
    fake: FakeConnect, broker: FakeBroker, call: str, cluster: str | None, what: str
) -> None:
    """Another stack's, on the port that ours would have."""
    connector.ensure_connector(at(fake))
    fake.cluster = cluster
    fake.requests.clear()
    fake.asked.clear()
    client = connector.client(on_the_port(fake), patience=0.2)
    with pytest.raises(ForeignError, match=rf"127\.0\.0\.1:\d+ .*{what}.*CONNECT_URL"):
        CALLS[call](client)
    assert (fake.requests, fake.asked) == ([], [])
    assert fake.states[CONNECTOR] == "RUNNING"


def test_every_call_is_in_the_list() -> None:
    public = {name for name, value in vars(ConnectClient).items() if callable(value) and not name.startswith("_")}
    assert public == set(CALLS)


def test_ours_is_known_by_the_cluster_and_asked_like_one_that_was_named(fake: FakeConnect, broker: FakeBroker) -> None:
    settings = on_the_port(fake)
    assert connector.ensure_connector(settings).state == "created"
    assert connector.sink_state(settings).running
    connector.stop_connector(settings)
    assert fake.states[CONNECTOR] == "STOPPED"


def test_one_that_was_named_is_meant_whatever_its_cluster(fake: FakeConnect, broker: FakeBroker) -> None:
    fake.cluster = "another"
    broker.down = True
    assert connector.ensure_connector(at(fake)).state == "created"


def test_a_cluster_made_anew_is_asked_for_once_more(fake: FakeConnect, broker: FakeBroker) -> None:
    client = connector.client(on_the_port(fake), patience=0.2)
    assert client.state(CONNECTOR).connector == "MISSING"
    broker.cluster = fake.cluster = "made anew"
    assert client.state(CONNECTOR).connector == "MISSING"
    broker.down = True  # known: the broker is not asked again
    assert client.state(CONNECTOR).connector == "MISSING"


def test_without_the_broker_nobody_knows_whose_it_is(fake: FakeConnect, broker: FakeBroker) -> None:
    broker.down = True
    with pytest.raises(ServiceError, match=r"Kafka broker .* cannot be reached"):
        connector.sink_state(on_the_port(fake))
    assert fake.asked == []


def test_a_worker_of_another_cluster_among_ours_is_passed_over(fake: FakeConnect, broker: FakeBroker) -> None:
    with serving() as other:
        other.cluster = "another"
        first, second = (int(worker.url.rpartition(":")[2]) for worker in (other, fake))
        settings = Settings(connect_workers=2, connect_port=first, connect_2_port=second)
        assert connector.ensure_connector(settings).state == "created"
        assert (other.asked, other.requests) == ([], [])


def test_the_connectors_sessions_begin_as_ours_do() -> None:
    """Its pool has a statement for it: what a role or a database presets changes nothing of what it stores.

    It is said in a transaction, and a later one that fails must not take it back.
    """
    wanted = postgres.session_sql(postgres.session_settings("metrics_writer"))
    assert connector.connector_config()["hibernate.agroal.initialSQL"] == f"{wanted}; COMMIT"


def test_a_schema_of_our_own_is_the_connectors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_SCHEMA", "readings")
    settings = Settings.load()
    config = connector.connector_config(settings)
    wanted = postgres.session_sql(postgres.session_settings("metrics_writer", settings.metrics_schema))
    assert config["hibernate.agroal.initialSQL"] == f"{wanted}; COMMIT"
    assert "'search_path', 'readings'" in wanted
    assert config["collection.name.format"] == "readings.metrics"
