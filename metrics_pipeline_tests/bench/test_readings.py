"""What a benchmark publishes and expects: unique keys, the wire format, rows for COPY, checksums."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics_pipeline.bench import paths, readings
from metrics_pipeline.bench.place import _environment
from metrics_pipeline.bench.readings import Stream, Sum, _sum_of, checksum, encoded, rounds_of, simulated, with_schema
from metrics_pipeline.copy_sink import copy_format
from metrics_pipeline.copy_sink.batch import BatchDecoder
from metrics_pipeline.errors import RecordError
from metrics_pipeline.metric import Reading, connect_schema_value, decode, encode
from metrics_pipeline.settings import Settings
from metrics_pipeline.sinks.connector import connector_config
from metrics_pipeline.verification.spill import RECORD
from metrics_pipeline.verification.topic_entries import TopicDecoder, tags_digest
from metrics_pipeline_tests.fake_sink import FakeMessage

NOW = datetime(2026, 11, 22, 20, 0, tzinfo=UTC)


def all_of(count: int, end: datetime = NOW) -> list[tuple[bytes, bytes]]:
    return [pair for round_ in simulated(Settings(), count, end) for pair in round_]


def test_simulated_readings_are_as_many_as_asked_for_unique_valid_and_past() -> None:
    pairs = all_of(20_001)
    assert len(pairs) == 20_001
    assert len({key for key, _ in pairs}) == 20_001
    assert max(decode(*pair).published_at for pair in pairs) < NOW


def test_a_stream_goes_on_where_it_was_without_a_key_twice() -> None:
    stream = Stream(Settings(), NOW, timedelta(minutes=20))
    taken = [[pair for round_ in stream.take(count) for pair in round_] for count in (7_000, 1, 12_999)]
    assert [len(pairs) for pairs in taken] == [7_000, 1, 12_999]
    keys = [key for pairs in taken for key, _ in pairs]
    assert len(set(keys)) == 20_000
    times = [decode(*pair).published_at for pairs in taken for pair in pairs]
    assert min(times) > NOW
    # Rounds of 2,500 to 7,500.
    assert NOW + timedelta(minutes=20) * 2 < max(times) < NOW + timedelta(minutes=20) * 9


@pytest.mark.parametrize(("low", "high"), [(2_500, 7_500), (100, 300), (5_000, 5_000), (1, 40_000)])
@pytest.mark.parametrize("count", [10_000, 2_000_000])
def test_so_many_rounds_hold_so_many_readings(low: int, high: int, count: int) -> None:
    rounds = rounds_of(Settings(producer_min_metrics=low, producer_max_metrics=high), count)
    sizes = np.random.default_rng(7).integers(low, high, (200, rounds), endpoint=True)
    assert sizes.sum(axis=1).min() >= count
    if count > 1_000_000:
        assert rounds < 1.5 * count / ((low + high) / 2)


def test_both_decoders_have_the_same_sum() -> None:
    messages = [FakeMessage(number % 6, number, *pair) for number, pair in enumerate(all_of(5_000))]
    slowly = TopicDecoder().entries(messages)  # type: ignore[arg-type]  # a message of a test
    found = _sum_of(BatchDecoder().decode(messages, {}))
    assert found == Sum(5_000, checksum(slowly))
    half = [_sum_of(BatchDecoder().decode(part, {})) for part in (messages[:2_000], messages[2_000:])]
    assert half[0] + half[1] == found
    assert half[0] + half[0] != found


@pytest.mark.parametrize("every", [1, 7, 100])
def test_one_reading_in_so_many_is_spoilt_in_one_of_three_ways(every: int) -> None:
    good = all_of(1_000)
    found = [pair for round_ in readings.spoilt(simulated(Settings(), 1_000, NOW), every) for pair in round_]
    assert [key for key, _ in found] == [key for key, _ in good]
    reasons = Counter[str]()
    for at, (pair, original) in enumerate(zip(found, good, strict=True)):
        if at % every:
            assert pair == original
            continue
        with pytest.raises(RecordError) as refused:
            decode(*pair)
        reasons[refused.value.reason] += 1
    assert len(reasons) == 3
    assert max(reasons.values()) - min(reasons.values()) <= 1
    assert sum(reasons.values()) == -(-1_000 // every)


def test_messages_of_the_baseline_carry_their_schema() -> None:
    (pair,) = all_of(1)
    ((key, value),) = with_schema([pair])
    assert json.loads(value) == {"schema": connect_schema_value(), "payload": json.loads(pair[1])}
    assert json.loads(key)["payload"] == json.loads(pair[0])
    assert 600 < len(key) + len(value) < 1400


def test_the_baseline_is_the_configuration_to_beat() -> None:
    config = json.loads(paths.BASELINE_FILE.read_text())
    assert config["topics"] == readings.BASELINE_TOPIC
    assert (config["batch.size"], config["tasks.max"], config["insert.mode"]) == ("2500", "6", "upsert")
    assert "reWriteBatchedInserts" not in config["connection.url"]
    assert not {name for name in config if name.startswith("consumer.") or name == "use.reduction.buffer"}
    assert not {name for name in config if name.endswith("schema.content")}
    assert (
        config.items()
        >= {
            name: connector_config()[name]
            for name in ("primary.key.fields", "primary.key.mode", "collection.name.format")
        }.items()
    )


def row_of(reading: Reading) -> bytes:
    """The one row between header and trailer."""
    return encoded([FakeMessage(0, 0, *encode(reading))])[len(copy_format.BEGIN) : -len(copy_format.END)]


def test_rows_are_what_binary_copy_reads() -> None:
    (pair,) = all_of(1)
    reading = decode(*pair)
    row = row_of(reading)
    fields, rest = struct.unpack_from(">h", row)[0], row[2:]
    found = []
    for _ in range(fields):
        (size,) = struct.unpack_from(">i", rest)
        found.append(rest[4 : 4 + size])
        rest = rest[4 + size :]
    assert rest == b""
    assert found[0] == reading.device_id.bytes
    assert struct.unpack(">hd", found[2] + found[3]) == (reading.metric_name, reading.value)
    dimensions, _, oid, length, _ = struct.unpack_from(">iiiii", found[4])
    assert (dimensions, oid, length) == (1, 25, len(reading.tags))


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9), max_size=5))
def test_encoded_tags_are_those_that_the_comparison_expects(tags: list[str]) -> None:
    import hashlib

    base = decode(*all_of(1)[0])
    reading = Reading(base.device_id, base.published_at, base.metric_name, base.value, tags)
    array = row_of(reading)[2 + 20 + 12 + 6 + 12 + 4 :]
    assert hashlib.md5(array).digest() == tags_digest(tags)


def entries(count: int = 50) -> np.ndarray:
    random = np.random.default_rng(7)
    return np.frombuffer(random.bytes(count * RECORD.itemsize), RECORD)


def test_a_checksum_knows_no_order_and_adds_up() -> None:
    all_ = entries()
    assert checksum(all_) == checksum(all_[::-1])
    assert (checksum(all_[:20]) + checksum(all_[20:])) % 2**64 == checksum(all_)


@pytest.mark.parametrize("field", ["device_id", "published_at", "metric_name", "value", "tags"])
def test_a_checksum_sees_each_field(field: str) -> None:
    before = entries()
    after = before.copy()
    place = after["key"] if field in ("device_id", "published_at", "metric_name") else after
    place[field][3], place[field][4] = place[field][4].copy(), place[field][3].copy()
    assert checksum(before) != checksum(after)


def test_a_checksum_sees_a_row_too_many_or_too_few() -> None:
    all_ = entries()
    assert checksum(all_) != checksum(np.concatenate([all_, all_[:1]], dtype=RECORD))
    assert checksum(all_) != checksum(all_[1:])
    assert checksum(all_[:0]) == 0


def test_a_temporary_stack_takes_over_tuning_but_no_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINK_FLUSH_ROWS", "777")
    monkeypatch.setenv("SINK", "copy")
    monkeypatch.setenv("POSTGRES_URL", "postgresql://somebody@elsewhere/db")
    monkeypatch.setenv("METRICS_READER_PASSWORD", "tell-nobody")
    monkeypatch.setenv("POSTGRES_PORT", "5432")
    user = Settings.load(kafka_batch_size=321)
    before = dict(os.environ)
    with _environment(user, tmp_path):
        inside = Settings.load()
    assert dict(os.environ) == before
    assert (inside.sink_flush_rows, inside.kafka_batch_size, inside.sink) == (777, 321, "connect")
    assert inside.postgres_url == inside.metrics_reader_password.get_secret_value() == ""
    assert inside.postgres_port != 5432
    assert inside.data_dir == tmp_path / "data"
    ports = [getattr(inside, name) for name in Settings.model_fields if name.endswith("_port")]
    assert len(set(ports)) == len(ports)


def test_the_wire_of_a_filled_topic_is_the_frozen_one() -> None:
    key, value = all_of(1)[0]
    fields = msgspec.json.decode(value)
    assert list(fields) == ["device_id", "published_at", "metric_name", "value", "tags"]
    assert msgspec.json.decode(key) == {name: fields[name] for name in ("device_id", "published_at", "metric_name")}
