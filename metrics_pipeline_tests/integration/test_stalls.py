"""Parts brought to a standstill without ending: each is named within SINK_STALL_SECONDS, and mended or waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import psutil
import pytest
import requests
from confluent_kafka import Producer

from metrics_pipeline import kafka
from metrics_pipeline.local import copy_sink
from metrics_pipeline.local.connect_worker import connect_problem
from metrics_pipeline.local.environment import replaced
from metrics_pipeline.local.keeper import Keeper
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.local.service import Service
from metrics_pipeline.local.stack import Stack
from metrics_pipeline.metric import Reading, encode
from metrics_pipeline.settings import TOPIC, Settings
from metrics_pipeline.sinks import connector
from metrics_pipeline.sinks.watch import copy_sink_problem
from metrics_pipeline_tests.chaos import stalls
from metrics_pipeline_tests.chaos.processes import Sink
from metrics_pipeline_tests.chaos.stack import Place, own_stack
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.fakes import until
from metrics_pipeline_tests.patience import patience

pytestmark = pytest.mark.integration

PATIENCE = 5
"""SINK_STALL_SECONDS here: the least that there is."""


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Services of its own: they are stopped."""
    with own_stack() as running:
        yield running


@contextmanager
def kept(settings: Settings, service: Service) -> Iterator[list[str]]:
    """A keeper that looks after one service, which runs already and has answered it; what it tells."""
    told: list[str] = []
    heard, asks = threading.Event(), service.answers
    assert asks is not None

    def answers() -> str | None:
        if (problem := asks()) is None:
            heard.set()
        return problem

    service.answers = answers
    keeper = Keeper(settings, told.append)
    stack = Stack(settings, [service], frozenset(), None)  # type: ignore[arg-type]  # nothing is built
    keeper.stack = stack
    thread = threading.Thread(target=keeper.run, args=(lambda: None,))
    thread.start()
    try:
        assert heard.wait(patience(30))
        yield told
    finally:
        service.answers = asks
        keeper.request_stop()
        thread.join(patience(30))
        assert not thread.is_alive()


@pytest.mark.long
def test_each_standstill_of_the_copy_sink_is_named_and_over_when_its_cause_is(place: Place) -> None:
    outcome = stalls.stalls(place)
    assert outcome.problems == [], outcome.facts


def test_the_copy_sink_ends_while_the_broker_is_silent(place: Place) -> None:
    outcome = stalls.silent_end(place)
    assert outcome.problems == [], outcome.facts


def test_the_mark_of_a_transaction_at_the_end_is_nothing_to_wait_for(place: Place) -> None:
    with Sink(place, SINK_STALL_SECONDS=str(PATIENCE)).ready() as sink:
        producer = Producer(kafka.client_config(place.settings) | {"transactional.id": "of-test-stalls"})
        producer.init_transactions(30)
        producer.begin_transaction()
        for number in range(20):
            reading = Reading(UUID(int=number), datetime(2026, 1, 1, tzinfo=UTC), 10, 1.0, [])
            key, value = encode(reading)
            producer.produce(TOPIC, key=key, value=value)
        producer.commit_transaction(30)
        assert until(lambda: sink.status()["rows"] == 20, 30)
        assert until(lambda: sink.status()["lag"] == 0, 10), "the marks are taken for records that wait"
        end = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < end:
            assert requests.get(f"{sink.http}/health", timeout=5).ok
            time.sleep(0.5)
        assert sink.status()["stalls"] == {}
        assert sum(high for _, high in kafka.watermarks(place.settings).values()) > sum(place.offsets().values())


def test_a_supervisor_that_is_stopped_is_killed_with_its_workers_and_started_again(place: Place) -> None:
    changed = {"sink_port": free_ports(1)[0], "sink_stall_seconds": PATIENCE}
    settings = place.settings.model_copy(update=changed)
    variables = {name.upper(): str(value) for name, value in changed.items()}
    with replaced(dict(place.environment) | variables):
        service = copy_sink.service(settings)
    service.start()
    try:
        service.wait_until_healthy()
        assert until(lambda: len(workers(settings)) == 2, 30)
        former, supervisor = workers(settings), service.process
        assert supervisor is not None
        unanswered(supervisor, lambda: copy_sink_problem(settings))
        with kept(settings, service) as told:
            began = time.monotonic()
            supervisor.suspend()
            assert until(lambda: service.process is not supervisor, 30), told
            assert time.monotonic() - began < PATIENCE + 15
            assert "COPY sink does not answer for" in told[0]
            assert until(lambda: copy_sink_problem(settings) is None, 30)
            assert until(lambda: not any(psutil.pid_exists(pid) for pid in former), 10)
    finally:
        service.stop()


def unanswered(process: psutil.Process, problem: Callable[[], str | None]) -> None:
    """What is said of a process that is stopped, before a keeper looks after it, which might have replaced it by the time of the answer."""
    process.suspend()
    try:
        assert "no answer on" in str(problem())
    finally:
        process.resume()
    assert until(lambda: problem() is None, 30)


def workers(settings: Settings) -> list[int]:
    """Pids of the workers that run."""
    shown = requests.get(f"{settings.sink_http}/status", timeout=5).json()["workers"]
    return [one["pid"] for one in shown if one["state"] == "running"]


def test_a_connect_that_is_stopped_is_named_killed_and_started_again(stack: RunningStack) -> None:
    settings = stack.settings.model_copy(update={"sink_stall_seconds": PATIENCE})
    service = stack.services.service("connect")
    former = service.process
    assert former is not None
    unanswered(former, lambda: connect_problem(settings, settings.connect_rest))
    with kept(settings, service) as told:
        began = time.monotonic()
        former.suspend()
        assert until(lambda: service.process is not former, 30), told
        assert time.monotonic() - began < PATIENCE + 15
        assert "Kafka Connect does not answer for" in told[0]
        service.wait_until_healthy()
    assert until(lambda: connector.sink_state(settings).running, 60)
    quick = replace(stack, environment={**stack.environment, "PRODUCER_RUN_SECONDS": "2"})
    quick.cli("produce", "--seconds", "2", check=True)
    quick.cli("verify", check=True)
