"""`SINK=copy metrics-pipeline up`: the COPY sink in Connect's place, killed and found again, and Connect back in its place."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from metrics_pipeline import postgres
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.local.state import StackState
from metrics_pipeline.sinks import connector
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.fakes import until
from metrics_pipeline_tests.integration.test_keeper import Pipeline, own_pipeline

pytestmark = [pytest.mark.integration, pytest.mark.whole_stack]


@pytest.fixture
def place(stack: RunningStack) -> Iterator[Pipeline]:
    """A pipeline with the COPY sink that is not up yet; where its Connect would be is that of another stack."""
    # Runs that end by themselves meanwhile, each followed by the next one.
    with own_pipeline(
        SINK="copy", CONNECT_PORT=str(stack.settings.connect_port), PRODUCER_RUN_SECONDS="45"
    ) as pipeline:
        yield pipeline


def flows(sink: str) -> Any:
    """Whether readings are produced, and stored by this sink."""
    return lambda sample: (
        sample["sink"]["kind"] == sink
        and all(sample[part]["healthy"] for part in ("postgres", "broker", "sink", "producer", "dagster"))
        and (sample["rows_per_second"] or 0) > 0
    )


def test_the_copy_sink_in_connects_place_and_back(place: Pipeline, stack: RunningStack) -> None:
    up = place.cli("up", "--detach", timeout=400)
    assert up.returncode == 0, up.stdout + up.stderr
    assert "COPY sink is up: " in up.stdout
    assert "Provisioned: schema, topic, COPY sink" in up.stdout
    assert "Kafka Connect" not in up.stdout
    assert connector.sink_state(stack.settings).running, "another stack's connector was touched"
    place.wait("stored by the COPY sink", flows("copy"))
    assert {"sink"} == set(StackState.read(place.data).children) & {"sink", "connect"}
    assert place.cli("status").returncode == 0
    assert place.cli("logs", "sink").returncode == 0
    doctor = place.cli("doctor")
    assert "SINK=copy" in doctor.stdout

    killed = place.child("sink")
    killed.send_signal(signal.SIGKILL)
    place.wait_for_another("sink", killed.pid)
    place.wait("brought back", flows("copy"))

    place.kill_keeper()
    sink = place.child("sink").pid
    again = place.cli("up", "--detach", timeout=400)
    assert "COPY sink was running already: " in again.stdout, again.stdout + again.stderr
    assert place.child("sink").pid == sink
    place.wait("adopted", flows("copy"))

    # A keeper of another SINK ends what is no part of its stack, and lets Connect begin where the COPY sink ended.
    place.kill_keeper()
    place.environment.update(SINK="connect", CONNECT_PORT=str(free_ports(1)[0]))
    back = place.cli("up", "--detach", timeout=400)
    assert back.returncode == 0, back.stdout + back.stderr
    assert "sink is no part of the stack any more" in back.stdout
    assert "the readings are stored by Kafka Connect, before by the COPY sink" in back.stdout
    assert not psutil.pid_exists(sink)
    place.wait("stored by Kafka Connect", flows("connect"))
    assert connector.sink_state(stack.settings).running, "another stack's connector was touched"
    ended = "SELECT FROM producer_runs WHERE state = 'finished'"
    with postgres.connect(place.settings(), "metrics_reader", autocommit=True) as connection:
        assert until(lambda: connection.execute(ended).fetchone() is not None, 60), "no run ended by itself"
    place.verify()
