"""Records of the dead letter topic, as rejects."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from metrics_pipeline.copy_sink.batch import DETAIL
from metrics_pipeline.settings import TOPIC
from metrics_pipeline.watcher.dead_letters import REASON, reject_of
from metrics_pipeline_tests.test_metric import KEY, VALUE, compact

HEADERS = {
    "topic": TOPIC.encode(),
    "partition": b"3",
    "offset": b"1234",
    "exception.class.name": b"org.apache.kafka.connect.errors.DataException",
    "exception.message": b"Invalid null value for required INT16 field",
}


@dataclass
class Letter:
    """A consumed message."""

    sent: bytes | None = compact(VALUE)
    said: dict[str, bytes] = field(default_factory=lambda: dict(HEADERS))

    def key(self) -> bytes | None:
        return compact(KEY)

    def value(self) -> bytes | None:
        return self.sent

    def headers(self) -> list[tuple[str, bytes]] | None:
        return [(f"__connect.errors.{name}", text) for name, text in self.said.items()] or None


def test_what_is_no_reading_keeps_its_more_exact_reason() -> None:
    reject = reject_of(Letter(b"{broken"))
    assert reject is not None
    assert (reject.topic, reject.partition, reject.offset, reject.reason) == (TOPIC, 3, 1234, "bad_json")
    assert reject.detail.endswith("; Kafka Connect: DataException: Invalid null value for required INT16 field")
    assert (reject.key, reject.payload) == (compact(KEY), b"{broken")


def test_what_only_connect_refuses() -> None:
    reject = reject_of(Letter())
    assert reject is not None
    assert (reject.reason, reject.detail) == (
        REASON,
        "Kafka Connect: DataException: Invalid null value for required INT16 field",
    )


@pytest.mark.parametrize(
    "said",
    [
        {},
        HEADERS | {"topic": b"another"},
        HEADERS | {"partition": b"three"},
        HEADERS | {"offset": b"-1"},
        HEADERS | {"offset": b""},
        HEADERS | {"topic": b"\xff"},
    ],
)
def test_what_connect_did_not_write_is_left_alone(said: dict[str, bytes]) -> None:
    assert reject_of(Letter(said=said)) is None


def test_what_it_says_can_be_stored_and_is_bounded() -> None:
    reject = reject_of(Letter(said=HEADERS | {"exception.message": b"\x00\xff" * 10_000}))
    assert reject is not None
    assert "\0" not in reject.detail
    assert len(reject.detail) < 2 * DETAIL
