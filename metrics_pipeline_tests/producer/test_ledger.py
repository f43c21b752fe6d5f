"""The ledger against a PostgreSQL in memory; integration/test_producer.py has the real one."""

from __future__ import annotations

from uuid import UUID

import pytest

from metrics_pipeline.errors import BusyError, ServiceError
from metrics_pipeline.producer import ledger
from metrics_pipeline.producer.deliveries import NO_PARTITION, DeliveryCounts
from metrics_pipeline.producer.ledger import RunLedger, Source, multirange
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.fakes import FakeClock, FakePostgres, FakeSession, until

RUN = UUID(int=1)
OTHER = UUID(int=2)


@pytest.fixture
def server() -> FakePostgres:
    return FakePostgres()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WRITE_SECONDS", "AGAIN_SECONDS", "GRACE_SECONDS"):
        monkeypatch.setattr(ledger, name, 0.01)


def made(server: FakePostgres, run_id: UUID = RUN, source: Source = "simulated") -> RunLedger:
    return RunLedger(Settings(), run_id, source, connect=server.connect)


def test_a_run_is_there_from_its_start(server: FakePostgres) -> None:
    book = made(server)
    book.open()
    row = server.rows[RUN, NO_PARTITION]
    assert (row["source"], row["state"], row["acknowledged"], row["offsets"]) == ("simulated", "running", 0, set())
    assert row["started_at"].utcoffset() is not None
    book.close()


def test_a_source_of_ones_own_needs_no_lock(server: FakePostgres) -> None:
    first, other = made(server, source="greenhouse-2"), made(server, OTHER, source="g" * 40)
    first.open()
    other.open()
    assert [row["source"] for row in server.rows.values()] == ["greenhouse-2", "g" * 40]
    assert server.holder is None
    first.close()
    other.close()


@pytest.mark.parametrize("source", ["", "Greenhouse", "2nd", "two words", "é", "g" * 41, "new\nline", "simulated\n"])
def test_a_source_that_is_no_word_is_refused(server: FakePostgres, source: str) -> None:
    with pytest.raises(ValueError, match="one word of up to 40 characters"):
        made(server, source=source)
    assert server.rows == {}


def test_it_is_kept_up_to_date_and_finished(server: FakePostgres) -> None:
    tally = {0: DeliveryCounts(2, ranges=[(0, 2)])}
    book = made(server)
    book.open()
    book.start(lambda: tally)
    assert until(lambda: (RUN, 0) in server.rows)
    tally = {0: DeliveryCounts(5, 1, 2, ranges=[(0, 3), (7, 9)]), NO_PARTITION: DeliveryCounts(failed=4)}
    assert book.finish(tally, "finished", 5) is None
    row = server.rows[RUN, 0]
    assert (row["state"], row["acknowledged"], row["failed"], row["unknown"]) == ("finished", 5, 1, 2)
    assert row["offsets"] == {0, 1, 2, 7, 8}
    assert (server.rows[RUN, NO_PARTITION]["state"], server.rows[RUN, NO_PARTITION]["failed"]) == ("finished", 4)
    assert server.holder is None
    assert all(session.closed for session in server.sessions)


def test_a_final_range_is_sent_once(server: FakePostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    original = FakeSession.executemany

    def spy(self: FakeSession, statement: str, rows: list[dict[str, str]]) -> None:
        sent.extend(row["offsets"] for row in rows if row["partition"] == 0)  # type: ignore[comparison-overlap]
        original(self, statement, rows)

    monkeypatch.setattr(FakeSession, "executemany", spy)
    book = made(server)
    book.open()
    for ranges in ([(0, 2)], [(0, 3), (5, 6)], [(0, 3), (5, 8), (9, 10)]):
        book.write({0: DeliveryCounts(ranges=ranges)}, "running")
    assert sent == ["{[0,2)}", "{[0,3),[5,6)}", "{[5,8),[9,10)}"]
    assert server.rows[RUN, 0]["offsets"] == {0, 1, 2, 5, 6, 7, 9}


def test_an_outage_costs_nothing_but_time(server: FakePostgres) -> None:
    tally = {0: DeliveryCounts(1, ranges=[(0, 1)])}
    book = made(server)
    book.open()
    book.start(lambda: tally)
    assert until(lambda: (RUN, 0) in server.rows)
    server.restart()
    server.down = True
    tally = {0: DeliveryCounts(3, ranges=[(0, 1), (4, 5), (8, 9)])}
    assert until(lambda: server.refused > 3)
    assert server.rows[RUN, 0]["acknowledged"] == 1
    server.down = False
    assert until(lambda: server.rows[RUN, 0]["offsets"] == {0, 4, 8})
    assert server.holder is not None  # the lock is back as well
    assert book.usurped is None
    assert book.finish(tally, "stopped", 5) is None


def test_the_last_write_waits_for_postgres_within_its_bound(server: FakePostgres) -> None:
    book = made(server)
    book.open()
    book.start(dict)
    server.down = True
    assert (
        book.finish({0: DeliveryCounts(1, ranges=[(0, 1)])}, "finished", 0.05) == "PostgreSQL at fake cannot be reached"
    )
    assert (RUN, 0) not in server.rows
    assert server.refused > 1


def test_a_slow_postgres_is_written_to_less_often(server: FakePostgres) -> None:
    clock = FakeClock()
    book = RunLedger(Settings(), RUN, "simulated", connect=server.connect, clock=clock)
    book.open()
    assert book._keep_up({}) == ledger.WRITE_SECONDS
    server.slow = lambda: clock.sleep(3)
    assert book._keep_up({}) == 30
    book.close()


def test_a_postgres_that_hangs_is_not_waited_for(server: FakePostgres) -> None:
    book = made(server)
    book.open()
    book.start(dict)
    server.hangs = True
    assert book.finish({}, "finished", 0.05) == "PostgreSQL did not answer within 0.05 s"
    server.hangs = False


def test_the_second_simulated_run_is_told_who_runs(server: FakePostgres) -> None:
    first = made(server)
    first.open()
    with pytest.raises(BusyError, match=rf"another producer is running \(producer run {RUN}, connected since 16:00:00"):
        made(server, OTHER).open()
    assert (OTHER, NO_PARTITION) not in server.rows
    first.close()
    made(server, OTHER).open()


def test_a_replay_runs_beside_it(server: FakePostgres) -> None:
    made(server).open()
    made(server, OTHER, "replay").open()
    assert server.rows[OTHER, NO_PARTITION]["source"] == "replay"
    assert server.rows[RUN, NO_PARTITION]["state"] == "running"


def test_who_takes_the_lock_ends_the_runs_that_died(server: FakePostgres) -> None:
    made(server).open()
    made(server, UUID(int=3), "replay").open()
    server.restart()
    made(server, OTHER).open()
    assert server.rows[RUN, NO_PARTITION]["state"] == "failed"
    assert server.rows[UUID(int=3), NO_PARTITION]["state"] == "running"  # a replay may still be alive
    assert server.rows[OTHER, NO_PARTITION]["state"] == "running"


def test_losing_the_lock_to_another_run_is_seen_and_the_counts_are_written_all_the_same(server: FakePostgres) -> None:
    book = made(server)
    book.open()
    book.start(dict)
    server.restart()
    server.holder = "somebody else"
    assert until(lambda: book.usurped)
    assert isinstance(book.usurped, BusyError)
    assert book.finish({0: DeliveryCounts(1, ranges=[(0, 1)])}, "failed", 5) is None
    assert server.rows[RUN, 0]["acknowledged"] == 1
    assert server.holder == "somebody else"


def test_postgres_is_needed_at_the_start(server: FakePostgres) -> None:
    server.down = True
    with pytest.raises(ServiceError, match="cannot be reached"):
        made(server).open()


def test_multirange() -> None:
    assert multirange([]) == "{}"
    assert multirange([(0, 3), (7, 8)]) == "{[0,3),[7,8)}"
