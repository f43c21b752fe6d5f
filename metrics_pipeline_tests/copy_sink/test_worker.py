"""The real worker in any order of events: rebalances, zombies, lost answers, kills, retention, the other sink; and a model of it."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, ClassVar, cast
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from metrics_pipeline import postgres
from metrics_pipeline.copy_sink import tags, worker
from metrics_pipeline.copy_sink.batch import Batch
from metrics_pipeline.copy_sink.store import RowWriter, StandbyError, Store, Written
from metrics_pipeline.copy_sink.worker import Partitions
from metrics_pipeline.metric import EPOCH, Reading, decode, encode
from metrics_pipeline_tests.fake_sink import REFUSED, FakeMessage, FakeSession, Process, Task, World

PARTITIONS = 2
KEYS = 3
"""Distinct keys of a partition: so that the same one comes again and again."""

kinds = st.sampled_from(["good", "good", "good", "odd", "bad", "refused", "tombstone", "gap"])
records = st.tuples(kinds, st.integers(0, KEYS - 1))
numbers = st.integers(0, PARTITIONS - 1)
few = st.integers(0, 7)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(worker, "FEWEST", 1)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class SinkMachine(RuleBasedStateMachine):
    """After each step the tables must be what the records below the stored offsets make them."""

    store: ClassVar[type[Store]] = Store

    def __init__(self) -> None:
        super().__init__()
        self.world = World(PARTITIONS, self.store)
        self.database = self.world.database
        self.kinds: dict[tuple[int, int], str] = {}
        self.first: dict[int, int] = {}
        self.before: dict[int, int] = {}
        self.lost: set[tuple[int, int]] = set()
        self.jumps = 0
        self.clean = True

    @initialize(
        made=st.lists(st.lists(records, min_size=4, max_size=8), min_size=PARTITIONS, max_size=PARTITIONS), rounds=few
    )
    def begin(self, made: list[list[tuple[str, int]]], rounds: int) -> None:
        for number, entries in enumerate(made):
            self.produce(number, entries)
        self.world.start()
        self.world.start()
        self.everything_runs(rounds * 4)

    # --- What happens outside ---

    @rule(number=numbers, made=st.lists(records, min_size=1, max_size=8))
    def produce(self, number: int, made: list[tuple[str, int]]) -> None:
        log = self.world.logs[number]
        for kind, name in made:
            offset = len(log.records)
            device = UUID(int=number * KEYS + name + 1)
            value = REFUSED if kind == "refused" else float(offset)
            key, text = encode(Reading(device, EPOCH, 10, value, [str(offset)]))
            payload = {"bad": b"{", "tombstone": None, "odd": b" " + text}.get(kind, text)
            log.records.append(None if kind == "gap" else FakeMessage(number, offset, key, payload))
            self.kinds[number, offset] = kind

    @rule(number=numbers, ahead=st.integers(1, 3))
    def delete_old_records(self, number: int, ahead: int) -> None:
        log = self.world.logs[number]
        log.low = max(log.low, min(len(log.records), self.database.offsets.get(number, 0) + ahead))

    @rule(number=numbers, part=st.floats(0, 1))
    @precondition(lambda self: not self.first)
    def the_connector_was_here(self, number: int, part: float) -> None:
        self.world.connector[number] = int(part * (len(self.world.logs[number].records) + 2))

    @rule(seconds=st.sampled_from([0.05, 1.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.clock += seconds

    @rule(times=st.integers(1, 3))
    def the_broker_fails(self, times: int) -> None:
        self.world.broker_fails = times

    @rule(times=st.integers(1, 3))
    def seeks_are_refused(self, times: int) -> None:
        self.world.seeks_refused = times

    @rule(most=st.integers(1, 10), backwards=st.booleans())
    def fetch_otherwise(self, most: int, backwards: bool) -> None:
        self.world.most, self.world.backwards = most, backwards

    # --- Processes and their group ---

    @rule()
    @precondition(lambda self: len(self.world.running) < 3)
    def start(self) -> None:
        self.world.start()

    @rule(which=few)
    @precondition(lambda self: self.world.running)
    def kill(self, which: int) -> None:
        self._process(which).kill()

    @rule(which=few)
    @precondition(lambda self: self.world.running)
    def stop(self, which: int) -> None:
        self._process(which).worker.stop()

    @rule(number=numbers, which=few)
    @precondition(lambda self: self.world.members)
    def rebalance(self, number: int, which: int) -> None:
        members, log = self.world.members, self.world.logs[number]
        if log.owner is None:
            self.world.assign(number, members[which % len(members)])
        else:
            self.world.revoke(number)

    @rule(which=few)
    @precondition(lambda self: self.world.members)
    def expel(self, which: int) -> None:
        members = self.world.members
        self.world.expel(members[which % len(members)])

    @rule(which=few, steps=st.integers(1, 12), early=st.booleans())
    @precondition(lambda self: self.world.running)
    def read(self, which: int, steps: int, early: bool) -> None:
        task = self._process(which).reader
        for _ in range(steps):
            task.resume("early" if early else None)
            self.look()

    @rule(which=few, steps=st.integers(1, 12))
    @precondition(lambda self: self.world.running)
    def write(self, which: int, steps: int) -> None:
        for _ in range(steps):
            if tasks := self._writers(which):
                tasks[-1].resume()
                self.look()

    @rule(which=few, steps=st.integers(1, 12))
    @precondition(lambda self: self.world.running)
    def write_on_behalf_of_the_past(self, which: int, steps: int) -> None:
        for _ in range(steps):
            if tasks := self._writers(which):
                tasks[0].resume()
                self.look()

    @rule(which=few)
    @precondition(lambda self: self.world.running)
    def the_answer_to_commit_is_lost(self, which: int) -> None:
        if session := self._session(which):
            session.reply_lost = True

    @rule(which=few)
    @precondition(lambda self: self.database.sessions)
    def a_session_is_cut(self, which: int) -> None:
        ours = [session for session in self.database.sessions if session.process]
        if ours:
            ours[which % len(ours)].end()

    @rule()
    def postgres_restarts(self) -> None:
        for session in [session for session in self.database.sessions if session.process]:
            session.end()
        self.database.down = True
        self.everything_runs(5)
        self.database.down = False

    @rule(rounds=st.integers(1, 5))
    def it_is_a_standby_for_a_while(self, rounds: int) -> None:
        self.database.standby = True
        self.everything_runs(rounds)
        self.database.standby = False

    @rule(most=st.integers(0, 3))
    def a_statement_may_not_be_long(self, most: int) -> None:
        self.database.most = most

    @rule(which=few, rounds=st.integers(5, 30))
    @precondition(lambda self: len(self.world.running) > 1)
    def one_is_replaced_while_it_hangs(self, which: int, rounds: int) -> None:
        process = self._process(which)
        if process.consumer is not None:
            self.world.expel(process.consumer)
            self.everything_runs(rounds, besides=process)

    @rule(rounds=st.integers(1, 30))
    def go_on(self, rounds: int) -> None:
        self.everything_runs(rounds)

    # --- The other sink ---

    @rule(rounds=st.integers(0, 3), number=numbers, further=st.integers(0, 15))
    @precondition(lambda self: self.database.active == "copy" and len(self.database.offsets) == PARTITIONS)
    def the_connector_takes_over(self, rounds: int, number: int, further: int) -> None:
        if any(session.locked for session in self.database.sessions):
            return
        session = FakeSession(self.database, None)
        session.locked = set(self.database.offsets)
        self.database.sessions.append(session)
        self.everything_runs(rounds)
        self.database.active = "connect"
        self.world.connector |= self.database.offsets
        session.end()
        self.produce(number, [("good", 0), ("good", 1), ("good", 2), ("good", 0)])
        self.everything_runs(further)

    @rule(number=numbers, records=st.integers(1, 5))
    @precondition(lambda self: self.database.active == "connect")
    def the_connector_stores(self, number: int, records: int) -> None:
        log = self.world.logs[number]
        if number not in self.first or self.database.offsets.get(number) is None:
            return
        for offset in range(
            self.world.connector[number], min(len(log.records), self.world.connector[number] + records)
        ):
            if offset < log.low:
                self.lost.add((number, offset))
            elif (key := self._key(number, offset)) is not None:
                self.database.rows[key[0]] = key[1]
            elif self.kinds[number, offset] in ("bad", "refused"):
                self.database.rejects[number, offset] = "by the connector"
            self.world.connector[number] = offset + 1
        self.before = {}

    @rule()
    @precondition(lambda self: self.database.active == "connect")
    def the_copy_sink_takes_over(self) -> None:
        if not any(session.locked for session in self.database.sessions):
            self.database.offsets |= {n: at for n, at in self.world.connector.items() if n in self.first}
            self.database.active = "copy"
            self.before = {}

    # --- What must hold ---

    @invariant()
    def look(self) -> None:
        """Every record below a stored offset is stored, rejected or nothing; nothing else is; offsets only grow."""
        database, present = self.database, self.database.offsets
        if present == self.before and len(database.skipped) == self.jumps:
            return
        self.clean = False
        jumped = set()
        for number, begin, stop in database.skipped[self.jumps :]:
            assert begin < stop <= self.world.logs[number].low, "records that are there were jumped over"
            jumped.add((number, stop))
            if database.active == "copy":
                self.lost |= {(number, offset) for offset in range(begin, stop)}
        self.jumps = len(database.skipped)
        rows: dict[bytes, bytes] = {}
        certain: dict[tuple[int, int], str] = {}
        possible: set[tuple[int, int]] = set()
        for number, offset in present.items():
            assert offset >= self.before.get(number, 0), "an offset went back"
            if number not in self.first:
                log, commit = self.world.logs[number], self.world.connector.get(number)
                begins = commit if commit is not None and log.low <= commit <= len(log.records) else log.low
                assert offset <= begins, "a partition begins behind its first record"
                self.first[number] = offset
            stop = self.world.connector[number] if database.active == "connect" else offset
            # A jump that waited while the sinks changed stores nothing, and is forgotten when they change back.
            stays = offset == self.before.get(number, offset) or (number, offset) in jumped
            assert database.active == "copy" or stays, "it is another sink's time"
            self._expect(number, self.first[number], stop, rows, certain, possible)
        self.before = dict(present)
        assert database.rows == rows
        assert certain.keys() <= database.rejects.keys() <= certain.keys() | possible
        assert all(database.rejects[at] in (reason, "by the connector") for at, reason in certain.items())
        self.clean = True

    def _expect(
        self,
        number: int,
        begin: int,
        stop: int,
        rows: dict[bytes, bytes],
        certain: dict[tuple[int, int], str],
        possible: set[tuple[int, int]],
    ) -> None:
        later: set[bytes] = set()
        for offset in range(stop - 1, begin - 1, -1):
            at, kind = (number, offset), self.kinds[number, offset]
            if at in self.lost or kind in ("gap", "tombstone"):
                continue
            if kind == "bad":
                certain[at] = "bad_json"
            elif kind == "refused":
                key = self._name(number, offset)
                # One that a later reading of the same key replaces within its batch never reaches the database.
                if key in later:
                    possible.add(at)
                else:
                    certain[at] = "refused_by_database"
                later.add(key)
            else:
                stored = self._key(number, offset)
                assert stored is not None
                rows.setdefault(*stored)
                later.add(stored[0])

    def _name(self, number: int, offset: int) -> bytes:
        message = self.world.logs[number].records[offset]
        assert message is not None
        reading = decode(message.key(), message.value())
        return reading.device_id.bytes + struct.pack(">qh", 0, reading.metric_name)

    def _key(self, number: int, offset: int) -> tuple[bytes, bytes] | None:
        if self.kinds[number, offset] not in ("good", "odd"):
            return None
        return self._name(number, offset), struct.pack(">d", float(offset)) + tags.encode_tags([str(offset)])

    # --- Helpers ---

    def _process(self, which: int) -> Process:
        running = self.world.running
        return running[which % len(running)]

    def _writers(self, which: int) -> list[Task]:
        return [task for task in self._process(which).writers if not task.done]

    def _session(self, which: int) -> FakeSession | None:
        connection: Any = self._process(which).worker._store._connection
        return cast("FakeSession | None", connection)

    def everything_runs(self, rounds: int, besides: Process | None = None) -> None:
        """Each thread takes its turn, and free partitions are given to whoever is there."""
        for turn in range(rounds):
            members = [member for member in self.world.members if member.process is not besides]
            for number, log in self.world.logs.items():
                if log.owner is None and members:
                    self.world.assign(number, members[(number + turn) % len(members)])
            for process in [process for process in self.world.running if process is not besides]:
                for task in process.tasks:
                    task.resume()
                    self.look()

    def at_the_end(self) -> None:
        """Left alone, the sink stores everything."""
        for process in self.world.running[1:]:
            process.kill()
        for process in self.world.running:
            for session in [one for one in self.database.sessions if one.process is process]:
                session.reply_lost = False
        if self.database.active == "connect":
            for session in list(self.database.sessions):
                session.end()
            self.the_copy_sink_takes_over()
        self.database.down, self.database.most = False, 0
        self.world.broker_fails = self.world.seeks_refused = 0
        self.world.most = 100
        self.world.start()
        # Nothing tells a consumer of what is missing at the very end.
        ends = {
            number: max((at + 1 for at, record in enumerate(log.records) if record is not None), default=0)
            for number, log in self.world.logs.items()
        }
        for _ in range(400):
            self.everything_runs(10)
            if all(self.database.offsets.get(number, 0) >= end for number, end in ends.items()):
                break
        else:
            raise AssertionError(f"the sink does not get on: {self.database.offsets} of {ends}\n{self.world}")
        self.before = {}
        self.look()

    def teardown(self) -> None:
        try:
            if self.clean:
                self.at_the_end()
        finally:
            self.world.close()


PROFILE = settings(
    deadline=None,
    max_examples=100,
    stateful_step_count=50,
    suppress_health_check=list(HealthCheck),
    # To find the shortest way to a failure takes minutes: what failed can be shrunk by hand.
    phases=[Phase.generate],
    derandomize=True,
    database=None,
)


def test_whatever_happens_each_record_is_stored_once_or_rejected() -> None:
    run_state_machine_as_test(SinkMachine, settings=PROFILE)


# --- With nothing to write ---------------------------------------------------------------------------------------


@pytest.fixture
def idle() -> Iterator[SinkMachine]:
    """One worker that has stored everything there is."""
    machine = SinkMachine()
    machine.produce(0, [("good", 0)])
    machine.world.start()
    machine.everything_runs(60)
    assert machine.database.offsets == {0: 1, 1: 0}
    yield machine
    machine.world.close()


def test_a_worker_with_nothing_to_write_comes_back_when_its_sessions_are_cut(idle: SinkMachine) -> None:
    """The producer waits for a sink that is connected: one that reconnects only to write would never see it again."""
    (process,) = idle.world.running
    for session in list(idle.database.sessions):
        session.end()
    idle.everything_runs(60)
    assert [session for session in idle.database.sessions if session.process is process]
    assert process.worker.report.state == "running"


def test_a_worker_with_nothing_to_write_says_that_it_could_not(idle: SinkMachine) -> None:
    (process,) = idle.world.running
    report = process.worker.report
    for session in list(idle.database.sessions):
        session.end()
    idle.database.down = True
    idle.everything_runs(60)
    assert (report.state, "cannot be reached" in report.reason) == ("waiting", True)
    idle.everything_runs(200)
    assert report.waiting_seconds > 15.0
    idle.database.down = False
    idle.everything_runs(60)
    assert (report.state, report.reason, report.waiting_seconds) == ("running", "", 0.0)


def test_a_worker_with_nothing_to_write_notices_that_nothing_could_be_written(idle: SinkMachine) -> None:
    """Its session stays, and would answer for ever: by the address another server may answer by now."""
    (process,) = idle.world.running
    report = process.worker.report
    idle.database.standby = True
    idle.everything_runs(60)
    assert (report.state, "standby" in report.reason) == ("waiting", True)
    idle.database.standby = False
    idle.everything_runs(60)
    assert (report.state, report.reason) == ("running", "")


def test_a_batch_that_is_too_much_for_one_statement_is_divided(idle: SinkMachine) -> None:
    (process,) = idle.world.running
    counts = process.worker.report.counts
    idle.database.most = 1
    idle.produce(0, [("good", key) for key in range(KEYS)])
    idle.produce(1, [("good", key) for key in range(KEYS)])
    idle.everything_runs(200)
    assert idle.database.offsets == {0: 1 + KEYS, 1: KEYS}
    assert counts.retries["57014"] >= 2
    tried = counts.retries["57014"]
    idle.database.most = 0
    idle.produce(0, [("good", 0)] * 4)
    idle.everything_runs(200)
    assert idle.database.offsets[0] == 1 + KEYS + 4
    assert counts.retries["57014"] == tried


def test_what_cannot_be_divided_is_tried_again_ever_more_rarely(
    idle: SinkMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost right, a full disk: the same statement would fail at full speed."""
    (process,) = idle.world.running
    counts = process.worker.report.counts

    def refuse(*_: object, **__: object) -> None:
        raise psycopg.errors.DiskFull("could not extend file: No space left on device")

    with monkeypatch.context() as full:
        full.setattr(RowWriter, "write", refuse)
        idle.produce(0, [("good", 1)])
        began = idle.world.clock
        idle.everything_runs(400)
        seconds = idle.world.clock - began
    assert seconds > 10
    assert counts.retries[psycopg.errors.DiskFull.sqlstate or ""] < 8 + seconds / 2
    assert "No space left" in process.worker.report.reason
    idle.everything_runs(60)
    assert idle.database.offsets[0] == 2


def test_a_worker_with_nothing_to_write_notices_another_sink_s_time(idle: SinkMachine) -> None:
    (process,) = idle.world.running
    idle.database.active = "connect"
    idle.everything_runs(60)
    assert process.worker.report.state == "standing by"
    assert idle.world.members == []
    idle.database.active = "copy"
    idle.everything_runs(60)
    assert process.worker.report.state == "running"


# --- Stores that are wrong on purpose ----------------------------------------------------------------------------


class OffsetsFirst(Store):
    """Commits the offsets, and the readings in a transaction of their own."""

    def _advance(self, session: postgres.Connection, batch: Batch) -> None:
        super()._advance(session, batch)
        session.commit()


class WithoutComparison(Store):
    """Sets the offsets, wherever they were."""

    def _lock(self, session: postgres.Connection, batch: Batch) -> None:
        pass

    def _advance(self, session: postgres.Connection, batch: Batch) -> None:
        changes = cast("FakeSession", session).changes
        changes.offsets |= {chunk.partition: chunk.stop for chunk in batch.chunks.values()}


class OffsetsLast(Store):
    """Commits the readings, and the offsets afterwards."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rows = CommittingWriter(self._failpoints)


class CommittingWriter(RowWriter):
    """Commits what it wrote, and leaves the offsets to the transaction after it."""

    def write(self, session: postgres.Connection, batch: Batch, *, upsert: bool) -> Written:
        written = super().write(session, batch, upsert=upsert)
        changes = cast("FakeSession", session).changes
        offsets, changes.offsets = changes.offsets, {}
        session.commit()
        self._failpoints.reach("between")
        cast("FakeSession", session).changes.offsets = offsets
        return written


class BlindToOtherSinks(Store):
    """Does not ask whether it is its time."""

    def _lock(self, session: postgres.Connection, batch: Batch) -> None:
        with suppress(StandbyError):
            super()._lock(session, batch)

    def _advance(self, session: postgres.Connection, batch: Batch) -> None:
        changes = cast("FakeSession", session).changes
        changes.offsets |= {chunk.partition: chunk.stop for chunk in batch.chunks.values()}


class TrustsEveryAnswer(Store):
    """Takes a lost answer for a COMMIT."""

    def written(self, batch: Batch) -> bool:
        return True


@pytest.mark.parametrize("store", [OffsetsFirst, WithoutComparison, OffsetsLast, BlindToOtherSinks, TrustsEveryAnswer])
def test_a_wrong_store_is_caught(store: type[Store]) -> None:
    machine = type("BrokenMachine", (SinkMachine,), {"store": store})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=settings(PROFILE, max_examples=400))


def test_a_worker_without_epochs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor comparison: either of the two is enough alone."""
    monkeypatch.setattr(Partitions, "stale", lambda _self, _batch: [])
    machine = type("BrokenMachine", (SinkMachine,), {"store": WithoutComparison})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=settings(PROFILE, max_examples=400))
