"""The watcher on the real parts: what Kafka Connect stores in another form is named, and the row is put right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
from confluent_kafka import Producer

from metrics_pipeline import kafka, postgres, rejects, summaries
from metrics_pipeline.local.watcher import watcher_problem
from metrics_pipeline.metric import Reading, encode
from metrics_pipeline.settings import DEAD_LETTER_TOPIC, TOPIC, Settings
from metrics_pipeline.sinks import active
from metrics_pipeline.verification.verify import VerifyReport, verify
from metrics_pipeline.watcher.coercion import CoercedRow
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.integration.test_sinks import problems, until
from metrics_pipeline_tests.patience import deadline, patience
from metrics_pipeline_tests.watcher.coerced import COERCED, Bad

pytestmark = pytest.mark.integration

START = datetime(2026, 7, 1, tzinfo=UTC)
Wire = tuple[bytes | None, bytes | None]
Place = tuple[int, int]


def publish(settings: Settings, wires: Sequence[Wire], partition: int = -1) -> list[Place]:
    producer = Producer(kafka.client_config(settings) | {"linger.ms": 5, "message.max.bytes": 1_000_000})
    places: dict[int, Place] = {}

    def delivered(at: int) -> Callable[[Any, Any], None]:
        def note(error: Any, message: Any) -> None:
            assert error is None
            places[at] = message.partition(), message.offset()

        return note

    for at, (key, value) in enumerate(wires):
        producer.produce(TOPIC, key=key, value=value, partition=partition, on_delivery=delivered(at))
        producer.poll(0)
    assert producer.flush(patience(60)) == 0
    return [places[at] for at in range(len(wires))]


def rows(stack: RunningStack, row: CoercedRow) -> list[tuple[float, list[str]]]:
    with stack.admin() as connection:
        return connection.execute(
            "SELECT value, tags FROM metrics WHERE (device_id, published_at, metric_name) = (%s, %s, %s)",
            [row.device_id, row.published_at, row.metric_name],
        ).fetchall()


def rejects_of(stack: RunningStack) -> dict[Place, tuple[str, str, bytes | None, bytes | None]]:
    with stack.admin() as connection:
        found = connection.execute(
            'SELECT partition, "offset", reason, detail, key, payload FROM rejected_metrics WHERE topic = %s', [TOPIC]
        ).fetchall()
    return {(row[0], row[1]): row[2:] for row in found}


def stored(settings: Settings) -> bool:
    return active.lag(settings).total == 0


@pytest.fixture
def before(stack: RunningStack) -> VerifyReport:
    until(lambda: watcher_problem(stack.settings) is None)
    return verify(stack.settings)


def good(device: UUID, number: int) -> Wire:
    return encode(Reading(device, START + timedelta(microseconds=number), 10, float(number), ["good"]))


@contextmanager
def agreeing(stack: RunningStack, before: VerifyReport) -> Iterator[None]:
    """Afterwards topic, table and summaries agree as they did."""
    yield
    until(lambda: stored(stack.settings))
    after = verify(stack.settings)
    assert problems(after) == problems(before), after.lines()
    devices = summaries.device_summary(stack.settings, limit=1)
    with stack.admin() as connection:
        assert connection.execute("SELECT count(*), count(DISTINCT device_id) FROM metrics").fetchone() == (
            devices.rows,
            devices.devices,
        )
        for table, plain in (
            ("SELECT device_id, rows, first_seen, last_seen FROM device_summary", "device_summary_plain"),
            (
                "SELECT device_id, metric_name, rows, min, mean, max, first_seen, last_seen FROM device_metric_summary",
                "device_metric_summary_plain",
            ),
        ):
            kept, counted = (
                sorted(connection.execute(text).fetchall(), key=str) for text in (table, postgres.query(plain))
            )
            assert kept == counted


@dataclass
class Case:
    """A bad record of a key of its own, with good ones of the same key or without.

    Attributes:
        name: of the kind.
        bad: the record.
        earlier: whether a good reading is stored before.
        later: whether one comes afterwards.
        place: where the bad one stands.
    """

    name: str
    bad: Bad
    earlier: bool
    later: bool
    place: Place = (-1, -1)

    def expected(self) -> list[tuple[float, list[str]]]:
        """The row in the end."""
        return [(8.5, ["later"])] if self.later else [(7.5, ["former"])] if self.earlier else []

    def problem(
        self, stack: RunningStack, found: dict[Place, tuple[str, str, bytes | None, bytes | None]]
    ) -> str | None:
        """What is not as it should be in the end."""
        if self.place not in found:
            return f"{self} is not named"
        reason, detail, key, payload = found[self.place]
        if (reason, key, payload) != (self.bad.reason, *self.bad.wire):
            return f"{self} is named {reason}: {detail}"
        if (row := rows(stack, self.bad.row)) != self.expected():
            return f"{self}: its row is {row}"
        # A later good one may have been stored over it at once.
        return None if self.later or "Kafka Connect had stored" in detail else f"{self}: {detail}"


def settled(stack: RunningStack, cases: Sequence[Case], seconds: float = 60) -> None:
    """All named and put right within a minute."""
    give_up = deadline(seconds)

    def wrong() -> list[str]:
        found = rejects_of(stack)
        return [problem for case in cases if (problem := case.problem(stack, found))]

    while left := wrong():
        assert time.monotonic() < give_up, left
        time.sleep(0.5)


def of_every_kind(*, apart: bool) -> list[Case]:
    """All; or those whose keys are written as those of the good ones.

    A key that is written in another way may stand in another partition, and between partitions there is no order. In the same one, Connect
    takes it for another key, and PostgreSQL refuses the batch: `cannot affect row a second time`.
    """
    cases = [
        Case(name, make(uuid4()), earlier, later)
        for name, make in COERCED.items()
        for earlier in (False, True)
        for later in (False, True)
    ]
    return [case for case in cases if apart or case.bad.wire[0] == case.bad.good(0.0, [])[0]]


def publish_all(stack: RunningStack, cases: Sequence[Case], *, apart: bool) -> None:
    """Good ones of other keys around them; `apart`, each step is stored before the next: else the last of a key may win."""
    settings, others = stack.settings, uuid4()
    steps: dict[str, list[Wire]] = {
        "before": [good(others, number) for number in range(1000)],
        "earlier": [case.bad.good(7.5, ["former"]) for case in cases if case.earlier],
        "bad": [case.bad.wire for case in cases],
        "later": [case.bad.good(8.5, ["later"]) for case in cases if case.later],
        "after": [good(others, 1000 + number) for number in range(1000)],
    }
    for step, wires in steps.items():
        places = publish(settings, wires)
        if step == "bad":
            for case, place in zip(cases, places, strict=True):
                case.place = place
        if apart:
            until(lambda: stored(settings))


@pytest.mark.parametrize("apart", [True, False], ids=["stored one after the other", "in one batch"])
def test_each_kind_is_named_and_its_row_put_right(stack: RunningStack, before: VerifyReport, apart: bool) -> None:
    """Alone, after a good reading of its key, before one, and between two; among good ones of other keys."""
    cases = of_every_kind(apart=apart)
    with agreeing(stack, before):
        publish_all(stack, cases, apart=apart)
        until(lambda: stored(stack.settings))
        settled(stack, cases)
    newest = {(reject.partition, reject.offset) for reject in rejects.newest(stack.settings, limit=10_000)}
    assert {case.place for case in cases} <= newest


def test_a_record_that_somebody_wrote_right_meanwhile_stays(stack: RunningStack, before: VerifyReport) -> None:
    """Only what Connect made of the record is touched; verify says what it thinks of the rest."""
    case = Case("value as text", COERCED["value as text"](uuid4()), earlier=False, later=False)
    row = case.bad.row
    stop_watcher(stack)
    try:
        (case.place,) = publish(stack.settings, [case.bad.wire])
        until(lambda: stored(stack.settings))
        with stack.admin() as connection:
            connection.execute(
                "UPDATE metrics SET value = 21.5 WHERE (device_id, published_at, metric_name) = (%s, %s, %s)",
                [row.device_id, row.published_at, row.metric_name],
            )
    finally:
        start_watcher(stack)
    until(lambda: case.place in rejects_of(stack) and looked_at(stack, case.place))
    assert rows(stack, row) == [(21.5, row.tags)]
    assert "Kafka Connect" not in rejects_of(stack)[case.place][1]
    with stack.admin() as connection:
        connection.execute("DELETE FROM metrics WHERE device_id = %s", [row.device_id])


def test_what_connect_stores_once_more_is_put_right_once_more(stack: RunningStack, before: VerifyReport) -> None:
    """As a task does that had lost its partitions and still had the record in hand."""
    case = Case("value as text", COERCED["value as text"](uuid4()), earlier=True, later=False)
    row = case.bad.row
    with agreeing(stack, before):
        publish(stack.settings, [case.bad.good(7.5, ["former"])])
        until(lambda: stored(stack.settings))
        (case.place,) = publish(stack.settings, [case.bad.wire])
        settled(stack, [case])
        with stack.admin() as connection:
            connection.execute(
                "UPDATE metrics SET value = %s, tags = %s WHERE (device_id, published_at, metric_name) = (%s, %s, %s)",
                [row.value, row.tags, row.device_id, row.published_at, row.metric_name],
            )
        assert case.problem(stack, rejects_of(stack)) is not None
        settled(stack, [case], seconds=90)
    assert "had stored again" in rejects_of(stack)[case.place][1]


def test_killed_again_and_again_it_leaves_nothing_out(stack: RunningStack, before: VerifyReport) -> None:
    cases = of_every_kind(apart=False)
    with agreeing(stack, before):
        publish_all(stack, cases[: len(cases) // 2], apart=False)
        for number in range(8):
            kill_watcher(stack)
            start_watcher(stack)
            if number == 3:
                publish_all(stack, cases[len(cases) // 2 :], apart=False)
            time.sleep(0.3 + 0.4 * number)  # at another instruction each time
        settled(stack, cases, seconds=120)


def test_dead_letters_stand_among_the_rejects_at_their_place(stack: RunningStack, before: VerifyReport) -> None:
    """Connect has told why, and the strict decoder's reason is kept where it has one."""
    settings, device = stack.settings, uuid4()
    key, value = good(device, 1)
    assert key is not None
    assert value is not None
    wires = [good(device, 0), (key, b"{broken"), (key, value.replace(b'"good"', b"7")), good(device, 2)]
    with agreeing(stack, before):
        places = publish(settings, wires)
        until(lambda: set(places[1:3]) <= rejects_of(stack).keys())
        found = rejects_of(stack)
        assert [found[place][0] for place in places[1:3]] == ["bad_json", "bad_tags"]
        # The connector commits behind a dead letter when it has stored what comes after it.
        publish(settings, [good(device, 3)], partition=places[1][0])
        until(lambda: stored(settings))
        # What the watcher could not know: a valid reading that Connect refused, as its topic of dead letters says.
        (valid,) = places[3:]
        dead_letter(settings, valid, wires[3])
        dead_letter(settings, (0, 10**12), wires[3], topic="another")
        until(lambda: valid in rejects_of(stack))
        reason, detail, *wire = rejects_of(stack)[valid]
        assert (reason, tuple(wire)) == ("refused_by_connect", wires[3])
        assert detail == "Kafka Connect: DataException: what was wrong"
        assert (0, 10**12) not in rejects_of(stack)
        # It is stored all the same: a dead letter says nothing about the row.
        with stack.admin() as connection:
            connection.execute(
                'DELETE FROM rejected_metrics WHERE (topic, partition, "offset") = (%s, %s, %s)', [TOPIC, *valid]
            )
            assert connection.execute("SELECT count(*) FROM metrics WHERE device_id = %s", [device]).fetchone() == (3,)


def dead_letter(settings: Settings, place: Place, wire: Wire, topic: str = TOPIC) -> None:
    """As Kafka Connect writes one."""
    name = "__connect.errors."
    headers: list[tuple[str, str | bytes | None]] = [
        (f"{name}topic", topic.encode()),
        (f"{name}partition", str(place[0]).encode()),
        (f"{name}offset", str(place[1]).encode()),
        (f"{name}exception.class.name", b"org.apache.kafka.connect.errors.DataException"),
        (f"{name}exception.message", b"what was wrong"),
    ]
    producer = Producer(kafka.client_config(settings))
    producer.produce(DEAD_LETTER_TOPIC, key=wire[0], value=wire[1], headers=headers)
    assert producer.flush(patience(30)) == 0


def test_it_ends_at_once_when_told_to(stack: RunningStack) -> None:
    """Also while everything else hangs: `down` never waits for it."""
    until(lambda: watcher_problem(stack.settings) is None)
    process = subprocess.Popen([sys.executable, "-m", "metrics_pipeline", "watch"], env=dict(stack.environment))
    port = stack.settings.postgres_port
    try:
        # It listens to signals before it connects.
        until(
            lambda: any(one.raddr and one.raddr.port == port for one in psutil.Process(process.pid).net_connections())
        )
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert time.monotonic() - began < 3
    finally:
        process.kill()
        process.wait()


def test_status_shows_it(stack: RunningStack) -> None:
    until(lambda: watcher_problem(stack.settings) is None)
    until(lambda: json.loads(stack.cli("status", "--json").stdout)["watcher"].get("waiting") == 0)
    stop_watcher(stack)
    try:
        sample = json.loads(stack.cli("status", "--json").stdout)["watcher"]
        assert sample["healthy"] is False
        assert "not connected" in sample["reason"]
    finally:
        start_watcher(stack)
    until(lambda: watcher_problem(stack.settings) is None)


def stop_watcher(stack: RunningStack) -> None:
    stack.services.service("watcher").stop()
    until(lambda: watcher_problem(stack.settings) is not None)


def start_watcher(stack: RunningStack) -> None:
    stack.services.service("watcher").start()


def kill_watcher(stack: RunningStack) -> None:
    service = stack.services.service("watcher")
    os.kill(service.process.pid, signal.SIGKILL)
    until(lambda: not service.alive())


def looked_at(stack: RunningStack, place: Place) -> bool:
    with stack.admin() as connection:
        row = connection.execute(
            'SELECT looks > 0 FROM coerced_metrics WHERE (topic, partition, "offset") = (%s, %s, %s)', [TOPIC, *place]
        ).fetchone()
    return row == (True,)
