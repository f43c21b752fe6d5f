"""The exporter: a part that is away costs its own figures only, and many scrapes cost little."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import requests
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from metrics_pipeline import exporter, kafka
from metrics_pipeline.errors import BusyError, ServiceError
from metrics_pipeline.exporter import ConnectSource, Exporter, NotUsedError, PipelineMetrics, SinkSource
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.settings import Settings
from metrics_pipeline.sinks import active, connector
from metrics_pipeline.sinks.connector import SinkState, TaskState
from metrics_pipeline.sinks.watch import ProgressWatch

PARTS = {"postgres", "producer", "broker", "connect", "sink", "watcher", "dagster"}


def nowhere() -> Settings:
    """Settings of a pipeline of which nothing runs."""
    postgres_port, kafka_port, connect_port, own = free_ports(4)
    return Settings(postgres_port=postgres_port, kafka_port=kafka_port, connect_port=connect_port, exporter_port=own)


def figure(value: float) -> Callable[[], list[Metric]]:
    return lambda: [GaugeMetricFamily("figure", "x", value)]


def failing(error: Exception) -> Callable[[], list[Metric]]:
    def part() -> list[Metric]:
        raise error

    return part


@pytest.fixture
def made() -> Iterator[Callable[..., PipelineMetrics]]:
    """PipelineMetrics with parts of the test's own, closed in the end."""
    all_made: list[PipelineMetrics] = []

    def make(answer_seconds: float = 5.0, fresh_seconds: float = 0.0, **parts: Any) -> PipelineMetrics:
        metrics = PipelineMetrics(nowhere(), fresh_seconds, answer_seconds)
        metrics._parts = parts
        all_made.append(metrics)
        return metrics

    yield make
    for metrics in all_made:
        metrics.close()


def values(metrics: PipelineMetrics) -> dict[tuple[str, str], float]:
    """Samples by name and the values of their labels."""
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in metrics.collect()
        for sample in family.samples
    }


def test_a_part_that_works_is_up_with_its_figures(made: Callable[..., PipelineMetrics]) -> None:
    assert values(made(one=figure(7))) == {("metrics_pipeline_up", "one"): 1, ("figure", ""): 7}


@pytest.mark.parametrize(
    "error", [ServiceError("it is away"), psycopg.OperationalError("it is away"), ZeroDivisionError("it is away")]
)
def test_a_part_that_fails_costs_its_own_figures_only(
    made: Callable[..., PipelineMetrics], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = made(one=figure(7), two=failing(error))
    assert values(metrics) == {("metrics_pipeline_up", "one"): 1, ("figure", ""): 7, ("metrics_pipeline_up", "two"): 0}
    assert "it is away" in metrics.problems()["two"]
    values(metrics)
    assert [record.message for record in caplog.records if record.message.startswith("two is down")] != []
    assert len([record for record in caplog.records if record.message.startswith("two is")]) == 1


def test_a_part_that_is_not_used_is_neither_up_nor_down(made: Callable[..., PipelineMetrics]) -> None:
    metrics = made(one=failing(NotUsedError()))
    assert values(metrics) == {}
    assert metrics.problems() == {}


def test_a_part_that_comes_back_is_up_again(made: Callable[..., PipelineMetrics]) -> None:
    metrics = made(one=failing(ServiceError("away")))
    assert values(metrics)["metrics_pipeline_up", "one"] == 0
    metrics._parts["one"] = figure(7)
    assert values(metrics)["metrics_pipeline_up", "one"] == 1
    assert metrics.problems() == {}


def test_a_part_that_hangs_is_down_and_its_late_answer_serves_the_next_scrape(
    made: Callable[..., PipelineMetrics],
) -> None:
    let_go, asked = threading.Event(), []

    def slow() -> list[Metric]:
        asked.append(1)
        let_go.wait(20)
        return figure(7)()

    metrics = made(answer_seconds=0.1, one=slow, two=figure(3))
    for _ in range(3):
        assert values(metrics) == {
            ("metrics_pipeline_up", "one"): 0,
            ("metrics_pipeline_up", "two"): 1,
            ("figure", ""): 3,
        }
    assert len(asked) == 1, "it is not asked again while it owes an answer"
    assert metrics.problems()["one"] == "no answer within 0.1 s"
    let_go.set()
    metrics._asked["one"].result(5)
    metrics._parts["two"] = failing(ServiceError("x"))
    assert values(metrics)["figure", ""] == 7


def test_many_scrapes_ask_once(made: Callable[..., PipelineMetrics]) -> None:
    asked = []

    def part() -> list[Metric]:
        asked.append(1)
        return []

    metrics = made(fresh_seconds=60, one=part)
    scrapes = [threading.Thread(target=values, args=[metrics]) for _ in range(20)]
    for scrape in scrapes:
        scrape.start()
    for scrape in scrapes:
        scrape.join()
    assert len(asked) == 1
    metrics._until = 0
    values(metrics)
    assert len(asked) == 2


@pytest.mark.usefixtures("without_backoff")
def test_with_nothing_running_every_part_is_down_and_the_scrape_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "METADATA_SECONDS", 0.3)
    settings = nowhere()
    server = Exporter(settings)
    server.start()
    try:
        began = time.monotonic()
        answer = requests.get(f"{settings.exporter_http}/metrics", timeout=20)
        assert time.monotonic() - began < exporter.ANSWER_SECONDS + 2
        health = requests.get(f"{settings.exporter_http}/health", timeout=5)
        with pytest.raises(BusyError, match="EXPORTER_PORT"):
            Exporter(settings).start()
    finally:
        server.stop()
    assert answer.status_code == 200
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert set(families) == {"metrics_pipeline_up"}
    assert {s.labels["part"]: s.value for s in families["metrics_pipeline_up"].samples} == dict.fromkeys(PARTS, 0)
    assert health.json()["healthy"] is True
    assert set(health.json()["down"]) == PARTS
    assert str(settings.postgres_port) in health.json()["down"]["postgres"]


def test_registering_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PipelineMetrics, "collect", lambda self: pytest.fail("asked"))
    PipelineMetrics(nowhere()).close()


def test_a_task_has_one_state(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SinkState("RUNNING", (TaskState(0, "RUNNING"), TaskState(1, "FAILED", "x"), TaskState(2, "ODD")))
    monkeypatch.setattr(active, "position", lambda settings: active.Position("connect"))
    monkeypatch.setattr(connector, "sink_state", lambda settings: state)
    (family,) = ConnectSource(nowhere())()
    shown = {(s.labels["task"], s.labels["state"]) for s in family.samples if s.value == 1}
    assert shown == {("0", "RUNNING"), ("1", "FAILED"), ("2", "ODD")}
    assert {s.value for s in family.samples} == {0, 1}


def test_connect_is_no_part_while_the_copy_sink_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    part = ConnectSource(nowhere())
    monkeypatch.setattr(active, "position", lambda settings: active.Position("copy"))
    with pytest.raises(NotUsedError):
        part()

    def away(settings: Settings) -> active.Position:
        raise ServiceError("PostgreSQL is away")

    monkeypatch.setattr(active, "position", away)
    with pytest.raises(NotUsedError):  # what was known last stands
        part()


@pytest.mark.parametrize(
    ("place", "group"),
    [
        (active.Position("connect"), "connect-metrics-postgres-sink"),
        (active.Position("copy", {0: 5}), "metrics-copy-sink"),
    ],
)
def test_lag_is_that_of_the_active_sink(monkeypatch: pytest.MonkeyPatch, place: active.Position, group: str) -> None:
    monkeypatch.setattr(active, "position", lambda settings: place)
    monkeypatch.setattr(kafka, "consumer_lag", lambda settings, group: kafka.Lag(7, {0: 7}))
    monkeypatch.setattr(kafka, "lag_from", lambda settings, offsets: kafka.Lag(offsets[0], dict(offsets)))
    partitions = {0: SimpleNamespace(replicas=[1, 2], isrs=[1]), 1: SimpleNamespace(replicas=[1, 2], isrs=[2, 1])}
    metadata = SimpleNamespace(brokers={1: None, 2: None}, topics={"metrics": SimpleNamespace(partitions=partitions)})
    client = SimpleNamespace(list_topics=lambda timeout: metadata)
    monkeypatch.setattr(exporter, "AdminClient", lambda config: client)
    families = {family.name: family for family in exporter.BrokerSource(nowhere())()}
    (lag,) = families["metrics_pipeline_lag"].samples
    assert (lag.labels, lag.value) == ({"group": group, "partition": "0"}, 7 if place.active == "connect" else 5)
    assert families["metrics_pipeline_brokers"].samples[0].value == 2
    assert families["metrics_pipeline_partitions_under_replicated"].samples[0].value == 1


def test_the_broker_is_up_while_there_is_no_topic_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> kafka.Lag:
        raise ServiceError("topic metrics does not exist")

    monkeypatch.setattr(active, "position", lambda settings: active.Position())
    monkeypatch.setattr(kafka, "consumer_lag", none)
    client = SimpleNamespace(list_topics=lambda timeout: SimpleNamespace(brokers={1: None}, topics={}))
    monkeypatch.setattr(exporter, "AdminClient", lambda config: client)
    assert {family.name for family in exporter.BrokerSource(nowhere())()} == {
        "metrics_pipeline_brokers",
        "metrics_pipeline_partitions_under_replicated",
    }


def test_a_sink_that_stores_nothing_is_down_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "sink_problem", lambda settings: None)
    monkeypatch.setattr(ProgressWatch, "problem", lambda self: None)
    source = SinkSource(nowhere())
    assert source() == []
    monkeypatch.setattr(ProgressWatch, "problem", lambda self: "nothing is stored for 80 s")
    with pytest.raises(ServiceError, match="nothing is stored for 80 s"):
        source()
    monkeypatch.setattr(active, "sink_problem", lambda settings: "task 1 is FAILED")
    with pytest.raises(ServiceError, match="task 1 is FAILED"):
        SinkSource(nowhere())()
