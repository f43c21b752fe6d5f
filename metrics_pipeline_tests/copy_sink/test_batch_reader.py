"""Messages into batches as they come: what belongs to a place, and where it moves it."""

from __future__ import annotations

from uuid import UUID

import pytest

from metrics_pipeline.copy_sink.batch import Batch, Chunk
from metrics_pipeline.copy_sink.worker import BatchReader, Partitions
from metrics_pipeline.metric import EPOCH, Reading, encode
from metrics_pipeline_tests.fake_sink import FakeMessage


def messages(number: int, *offsets: int) -> list[FakeMessage]:
    return [FakeMessage(number, at, *encode(Reading(UUID(int=at), EPOCH, 10, float(at), []))) for at in offsets]


def begin(places: Partitions, number: int, offset: int) -> int:
    """Let a partition stand at an offset; its epoch."""
    place = places.get(number)
    assert place is not None
    assert places.set(number, place.epoch, offset, log="")
    return place.epoch


def offsets(batch: Batch | None) -> list[tuple[int, int]]:
    """Partition and offset of each row."""
    assert batch is not None
    rows = [batch.messages[at] for at in batch.columns.source.tolist()]
    assert batch.columns.value.tolist() == [float(row.offset()) for row in rows]
    return [(row.partition(), row.offset()) for row in rows]


@pytest.fixture
def places() -> Partitions:
    places = Partitions()
    places.gain([0, 1])
    return places


def test_what_comes_in_pieces_is_one_batch(places: Partitions) -> None:
    epochs = [begin(places, 0, 5), begin(places, 1, 7)]
    reader = BatchReader(places)
    assert reader.take() is None
    reader.add(messages(0, 5, 6))
    reader.add([*messages(1, 7), *messages(0, 7, 8)])
    batch = reader.take()
    assert offsets(batch) == [(0, 5), (0, 6), (1, 7), (0, 7), (0, 8)]
    assert batch is not None
    assert batch.chunks == {0: Chunk(0, epochs[0], 5, 9, stamp=8), 1: Chunk(1, epochs[1], 7, 8, stamp=7)}
    assert list(batch.stamps) == [5, 6, 7, 7, 8]
    reader.add(messages(0, 9))
    batch = reader.take()
    assert batch is not None
    assert (offsets(batch), batch.chunks) == ([(0, 9)], {0: Chunk(0, epochs[0], 9, 10, stamp=9)})


def test_a_gap_before_a_batch_is_looked_at_again_unless_it_was_just_sought(places: Partitions) -> None:
    begin(places, 0, 5)
    reader = BatchReader(places)
    reader.add(messages(0, 6))  # just sought: the topic's own gap
    reader.add(messages(0, 9))  # within a batch nothing was dropped that was consumed
    assert offsets(reader.take()) == [(0, 6), (0, 9)]
    reader.add(messages(0, 12))
    assert reader.take() is None
    assert 0 in places.unknown()


def test_what_is_behind_the_place_or_of_no_place_is_left_out(places: Partitions) -> None:
    epoch = begin(places, 0, 5)
    reader = BatchReader(places)
    reader.add([*messages(0, 3, 4, 5), *messages(1, 1), *messages(2, 1)])
    batch = reader.take()
    assert batch is not None
    assert (offsets(batch), batch.chunks) == ([(0, 5)], {0: Chunk(0, epoch, 5, 6, stamp=5)})
    reader.add(messages(0, 4, 5))
    assert reader.take() is None


def test_a_place_that_was_lost_takes_its_part_of_the_open_batch_with_it(places: Partitions) -> None:
    begin(places, 0, 5)
    other = begin(places, 1, 0)
    reader = BatchReader(places)
    reader.add([*messages(0, 5, 6), *messages(1, 0)])
    places.forget([0])
    epoch = begin(places, 0, 2)
    reader.add(messages(0, 2, 3))
    batch = reader.take()
    assert batch is not None
    assert offsets(batch) == [(1, 0), (0, 2), (0, 3)]
    assert batch.chunks == {0: Chunk(0, epoch, 2, 4, stamp=3), 1: Chunk(1, other, 0, 1, stamp=0)}


def test_what_is_dropped_is_gone(places: Partitions) -> None:
    begin(places, 0, 0)
    begin(places, 1, 0)
    reader = BatchReader(places)
    reader.add([*messages(0, 0), FakeMessage(0, 1, b"", b"{"), FakeMessage(0, 2, b"", None), *messages(1, 0)])
    reader.drop([0, 3])
    batch = reader.take()
    assert batch is not None
    assert (offsets(batch), batch.rejects, batch.tombstones, set(batch.chunks)) == ([(1, 0)], [], 0, {1})


def test_halves_are_the_whole_and_continue_each_other(places: Partitions) -> None:
    begin(places, 0, 5)
    begin(places, 1, 7)
    reader = BatchReader(places)
    reader.add([*messages(0, 5, 6), *messages(1, 7), *messages(0, 8, 9)])
    reader.add([*messages(1, 8), *messages(0, 12)])
    whole = reader.take()
    assert whole is not None
    waiting, parts = [whole], []
    while waiting:
        one = waiting.pop(0)
        if halves := one.halves():
            waiting = [*halves, *waiting]
        else:
            parts.append(one)
    assert sorted(place for part in parts for place in offsets(part)) == sorted(offsets(whole))
    assert all(len(part.columns) == 1 for part in parts)
    for number, chunk in whole.chunks.items():
        ours = [part.chunks[number] for part in parts if number in part.chunks]
        assert [one.start for one in ours] == [chunk.start, *(one.stop for one in ours[:-1])]
        assert ours[-1].stop == chunk.stop
        assert {one.epoch for one in ours} == {chunk.epoch}
        assert [one.stamp for one in ours] == [None] * (len(ours) - 1) + [chunk.stamp]
