"""Records of the dead letter topic, as the rejects that they are of the topic of the readings."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from metrics_pipeline.copy_sink.batch import clean
from metrics_pipeline.errors import RecordError
from metrics_pipeline.metric import decode
from metrics_pipeline.settings import TOPIC

REASON = "refused_by_connect"
"""Why a valid reading stands among the dead letters."""


class Reject(NamedTuple):
    """A row of `rejected_metrics`."""

    topic: str
    partition: int
    offset: int
    reason: str
    detail: str
    key: bytes | None
    payload: bytes | None


class DeadLetter(Protocol):
    """What is used of `confluent_kafka.Message`."""

    def key(self) -> bytes | None:
        """The record's own key."""

    def value(self) -> bytes | None:
        """The record's own value."""

    def headers(self) -> list[tuple[str, bytes]] | None:
        """The record's own headers, and Connect's."""


def reject_of(message: DeadLetter) -> Reject | None:
    """The reject at its original place; None for what Connect did not write, or wrote of another topic."""
    headers = dict(message.headers() or [])

    def header(name: str) -> str:
        # A header of the same name that the producer had set is no text of Connect's: nothing is taken for granted.
        return (headers.get(f"__connect.errors.{name}") or b"").decode("utf-8", "replace")

    partition, offset = header("partition"), header("offset")
    if header("topic") != TOPIC or not (partition.isdecimal() and offset.isdecimal()):
        return None
    exception = header("exception.class.name").rpartition(".")[2]
    said = f"Kafka Connect: {exception}: {header('exception.message')}"
    try:
        decode(message.key(), message.value())
        reason, detail = REASON, said
    except RecordError as error:
        reason, detail = error.reason, f"{error.detail}; {said}"
    return Reject(TOPIC, int(partition), int(offset), reason, clean(detail), message.key(), message.value())
