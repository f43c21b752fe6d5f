"""Records that stop the connector, on the real parts under load: it goes on by itself. `make chaos` does all of it at full length.

The stack is shared with other tests. What they stored is gone before these, so that table and topic can be compared as a whole; the
connector runs at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from metrics_pipeline import kafka, postgres
from metrics_pipeline.bench.place import clear
from metrics_pipeline.errors import BusyError, ServiceError
from metrics_pipeline.local.status import Sampler
from metrics_pipeline.settings import TOPIC
from metrics_pipeline.sinks import active, connector
from metrics_pipeline.sinks.quarantine import Quarantine, Taken
from metrics_pipeline.sinks.repair import SinkRepair
from metrics_pipeline.verification.topic_entries import dead_letters
from metrics_pipeline_tests.chaos import quarantine
from metrics_pipeline_tests.chaos.processes import Load, Repair, until
from metrics_pipeline_tests.chaos.quarantine import Record, Wire, nul, passed, publish, two_repairs
from metrics_pipeline_tests.chaos.scenarios import Outcome
from metrics_pipeline_tests.chaos.stack import Place
from metrics_pipeline_tests.conftest import RunningStack
from metrics_pipeline_tests.integration.test_sink_poison import POISON
from metrics_pipeline_tests.patience import patience

pytestmark = pytest.mark.integration

AROUND = 500
"""Good records between two bad ones."""
RATE = 5_000
"""Readings a second of the producer beside them."""
STOPS = frozenset(
    {
        "29 February",
        "36 spaces",
        "NUL in a tag",
        "bad uuid in the key only",
        "basic format",
        "code beyond int16",
        "comma",
        "digits of another script",
        "hour 24",
        "integer beyond a double",
        "leap second",
        "line feed after it",
        "no zone",
        "null key",
        "offset of a day",
        "offset without colon",
        "space",
        "unknown code",
        "uuid with other dashes",
        "value beyond a double",
        "week date",
        "year 0",
        "year 0 in UTC",
        "year 10000 in UTC",
        "year 294277",
    }
)
"""What Connect hands on and cannot store: each of these stops its task for good."""
COERCED = frozenset(
    {
        "SQL for a device",
        "a device name of 64 kB",
        "a tag of nearly a megabyte",
        "another device in the key",
        "another metric in the key",
        "another time in the key",
        "byte order mark",
        "code as a boolean",
        "code as a float",
        "code as text",
        "code beyond int64",
        "leading zero",
        "lone surrogate",
        "lower case",
        "no seconds",
        "one tag too many",
        "seven decimals",
        "something after it",
        "surrogates in the wrong order",
        "tag too long",
        "tag too long in bytes",
        "tags as text",
        "ten thousand tags",
        "the key of another record",
        "too many tags",
        "uuid in braces",
        "uuid without dashes",
        "value as a boolean",
        "value as text",
    }
)
"""What Connect takes for something else, and stores without a word: a matter of its own."""


@pytest.fixture(scope="module")
def place(stack: RunningStack) -> Iterator[Place]:
    """Empty, and with a connector that runs; so it is left, too."""
    until(lambda: active.lag(stack.settings).total == 0, patience(60), "what was published before is stored")
    clear(stack.settings)
    (stack.settings.data_dir / "logs").mkdir(exist_ok=True)
    yield Place(stack.settings, stack.environment, stack.services)
    connector.ensure_connector(stack.settings)


def fine(outcome: Outcome) -> Outcome:
    assert outcome.problems == [], outcome.facts
    return outcome


def test_every_poison_record_among_good_ones_under_load(place: Place) -> None:
    """Each of them either stops the connector or becomes a dead letter; none needs a hand."""
    record, outcome, device = Record(place), Outcome(), uuid4()
    wires: list[Wire] = []
    at: dict[str, int] = {}
    with two_repairs(place), Load(place, RATE) as load:
        until(
            lambda: sum(high for _, high in kafka.watermarks(place.settings).values()) > RATE,
            patience(60),
            "there is load",
        )
        for name, (_, key, value) in POISON.items():
            if name in COERCED:
                continue
            wires += quarantine.good(AROUND, device, len(wires))
            at[name] = len(wires)
            wires.append((key, value))
        places = publish(place, [*wires, *quarantine.good(AROUND, device, len(wires))])
        # A minute on a machine that has nothing else to do.
        until(lambda: passed(place, places), patience(180), "all of them are passed")
        load.check()
        load.end()
        dead = {(number, int(offset)) for number, offsets in dead_letters(place.settings).items() for offset in offsets}
        expected = {places[position]: POISON[name][0] for name, position in at.items()}
        bad = {where: reason for where, reason in expected.items() if reason != "tombstone" and where not in dead}
        assert {places[at[name]] for name in STOPS} <= bad.keys()
        # Those that come after a bad one are taken with it, and are rejects then instead of dead letters.
        found = record.rejected()
        record.settle(outcome, {where: reason for where, reason in expected.items() if where in found} | bad)
    fine(outcome)
    with place_session(place) as session:
        row = session.execute(
            "SELECT count(*) FROM metrics WHERE device_id = %s AND tags = '{good}'", [device]
        ).fetchone()
    assert row == (AROUND * (len(at) + 1),)
    events = [one for one in record.repairs() if one["action"] == "quarantine"]
    assert {one["by"] for one in events} <= {"keeper", "sensor"}
    taken = [stretch for one in events for stretch in one["stretches"]]
    # The watcher names those, too, that were taken for something else or became dead letters.
    assert len(STOPS) <= sum(stretch["rejected"] for stretch in taken) == record.quarantined() <= len(found)


def place_session(place: Place) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(place.settings.admin_url(place.settings.metrics_database), autocommit=True)


def test_one_bad_record_in_a_thousand_does_not_hold_it_up(place: Place) -> None:
    fine(quarantine.bad_one_in_a_thousand(place, 30, rate=RATE))


@pytest.mark.parametrize(
    ("victim", "steps"),
    [("repair", ["stopped", "stored", "committed", "moved"]), ("connect", ["read"]), ("postgres", ["stored"])],
)
def test_a_death_in_a_quarantine_changes_nothing(place: Place, victim: str, steps: list[str]) -> None:
    fine(quarantine.deaths(place, steps, [victim]))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("full", "No space left on device .53100."),
        ("no right", "permission denied for table metrics .42501."),
        ("locked", "lock timeout .55P03."),
        ("standby", "is a standby, which takes no writes"),
        ("down", "cannot be reached"),
    ],
)
def test_a_database_that_cannot_store_makes_no_record_a_bad_one(place: Place, fault: str, words: str) -> None:
    record, outcome = Record(place), Outcome()
    (at, _) = publish(place, [nul(0, uuid4()), *quarantine.good(1, uuid4())], partition=1)
    until(lambda: connector.sink_state(place.settings).failed, patience(60), "the record stops the connector")
    with quarantine.FAULTS[fault](place):
        with pytest.raises(ServiceError, match=words):
            Quarantine(place.settings).take(None, "a test")
        assert connector.sink_state(place.settings).connector == "RUNNING", "it was stopped for nothing"
    assert record.quarantined() == 0
    assert Quarantine(place.settings).unfinished() is None
    taken = Quarantine(place.settings).take(None, "a test")
    assert [(one.partition, one.rejected) for one in taken.stretches] == [(1, 1)]
    with Repair(place, "keeper"):
        record.settle(outcome, {at: "bad_tags"})
    fine(outcome)


def test_good_records_that_the_connector_cannot_bear_together_are_stored_in_its_place(place: Place) -> None:
    """One key in two spellings is two keys to the connector, and one to PostgreSQL, which refuses their batch."""
    record, outcome, device = Record(place), Outcome(), uuid4()
    small, large = str(device).encode(), str(device).upper().encode()
    wires: list[Wire] = []
    for key, value in quarantine.good(8, device):  # sixteen records: one statement of the driver
        assert key is not None
        assert value is not None
        wires += [(key, value), (key.replace(small, large), value.replace(small, large))]
    assert len(set(wires)) == 16
    try:
        published = publish(place, wires, partition=2)
        with two_repairs(place):
            record.settle(outcome, {})
        # Two records, one key: one row.
        assert outcome.problems == [f"{outcome.report.rows:,} rows for {outcome.report.rows + 8:,} keys"]
        assert outcome.report.clean
        stretches = [one for done in record.repairs() if done["action"] == "quarantine" for one in done["stretches"]]
        # Where records of other partitions wait as well, they are taken, too.
        here = [one for one in stretches if one["partition"] == 2]
        assert (sum(one["stored"] for one in here), sum(one["rejected"] for one in stretches)) == (16, 0)
        assert {offset for one in here for offset in range(one["first"], one["next"])} >= {at for _, at in published}
    finally:
        clear(place.settings)  # elsewhere each record has a key of its own


def test_a_dead_letter_that_comes_last_does_not_rest(place: Place) -> None:
    """The connector commits no dead letter before it has stored something behind it: without the repair it would wait for ever."""
    record = Record(place)
    repair = SinkRepair(place.settings.model_copy(update={"sink_stall_seconds": 5}))
    (first, (key, _)) = quarantine.good(2, uuid4())
    (_, at) = publish(place, [first, (key, b"{no json")], partition=4)

    def passed_it() -> bool:
        repair.tick()
        return active.lag(place.settings).total == 0

    until(passed_it, patience(60), "the connector is behind the dead letter", 0.5)
    assert record.rejected() == {at: "bad_json"}
    assert record.quarantined() == 1
    until(lambda: repair.tick().healthy, patience(60), "the repair has nothing to say")


def test_switched_off_it_stops_and_the_command_does_it_once(place: Place) -> None:
    """The negative control: without a quarantine a record stops the connector for good."""
    record = Record(place)
    settings = place.settings.model_copy(update={"sink_quarantine": False})
    repair = SinkRepair(settings, jitter=lambda: 0.1)
    (first, bad, last) = publish(
        place, [*quarantine.good(1, uuid4()), nul(0, uuid4()), *quarantine.good(1, uuid4())], partition=3
    )
    said = ""

    def stopped() -> bool:
        nonlocal said
        said = repair.tick().message
        return "stopped trying" in said

    until(stopped, patience(120), "the repair gives up", 0.2)
    assert f"at topic {TOPIC}, partition 3, offset " in said
    assert 'invalid byte sequence for encoding "UTF8": 0x00' in said
    assert "`metrics-pipeline rejects quarantine`" in said
    assert record.quarantined() == 0
    stack = RunningStack(place.settings, place.environment, place.services)
    done = stack.cli("rejects", "quarantine", "--json")
    assert done.returncode == 0, done.stderr
    (stretch,) = json.loads(done.stdout)["stretches"]
    assert (stretch["partition"], stretch["next"], stretch["rejected"]) == (3, last[1] + 1, 1)
    assert json.loads(done.stdout)["reasons"] == {"bad_tags": 1}
    assert [one["by"] for one in record.repairs()] == ["command"]
    until(lambda: passed(place, [first, bad, last]), patience(60), "the connector is behind them")
    until(lambda: repair.tick().healthy, patience(60), "the repair has nothing to say")
    assert record.rejected() == {bad: "bad_tags"}
    with closing(Sampler(place.settings)) as sampler:
        sample = sampler.sample()
    assert sample["connect"]["quarantines"]["rejected"] >= 1
    assert "of records that stop the connector" in sample["connect"]["quarantines"]["text"]
    again = stack.cli("rejects", "quarantine")
    assert again.returncode == 1
    assert "no task is FAILED, so no record stops the connector (all of it runs)" in again.stderr


def test_two_at_once_exclude_each_other_and_provisioning(place: Place) -> None:
    with postgres.connect(place.settings, "metrics_reader", autocommit=True) as session:
        session.execute(postgres.query("sinks_lock"))
        with pytest.raises(BusyError, match="is under way"):
            Quarantine(place.settings).take(None, "a test")
        with pytest.raises(BusyError, match="is under way"), Quarantine(place.settings).alone():
            raise AssertionError("a move of the offsets would have been in the way")
    # Nothing is bad: nothing is stopped.
    assert Quarantine(place.settings).take(None, "a test") == Taken()
    assert connector.sink_state(place.settings).running


def test_a_change_of_the_sink_ends_what_is_unfinished(place: Place) -> None:
    with place_session(place) as session:
        session.execute("INSERT INTO quarantines (topic, log_id, cause, records) VALUES (%s, '', 'a test', 1)", [TOPIC])
        assert Quarantine(place.settings).unfinished() is not None
        session.execute(postgres.query("sink_activate").encode(), {"active": "connect"})
    assert Quarantine(place.settings).unfinished() is None
