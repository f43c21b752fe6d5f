"""What Java is told, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from metrics_pipeline.errors import SettingError
from metrics_pipeline.local.java import first_cause, properties, require_sayable

NAMES = ["a b", " lead", "ä", "日本", "#", "!", "=", ":", "'", '"', "a\\b", "tab\t", "𝄞", "%20", "$x", "", "trail "]


def unescaped(text: str) -> str:
    """As Java's own documentation of the format has it."""
    out, rest = [], iter(text)
    for character in rest:
        if character != "\\":
            out.append(character)
        elif (after := next(rest)) == "u":
            out.append(chr(int("".join(next(rest) for _ in range(4)), 16)))
        else:
            out.append(after)
    return "".join(out).encode("utf-16", "surrogatepass").decode("utf-16")


@pytest.mark.parametrize("value", NAMES)
def test_every_value_can_be_told(value: str) -> None:
    line = properties({"log.dirs": value})
    assert line.isascii()
    name, _, written = line.removesuffix("\n").partition("=")
    assert name == "log.dirs"
    assert not written.startswith(" ")  # Java would leave it out
    assert unescaped(written) == value


@pytest.mark.parametrize("name", ["a b", "ä", "日本", "#", "=", "'", "!", "%20", "$x", "a:b"])
def test_folders_that_kafka_can_be_told(name: str) -> None:
    require_sayable("PIPELINE_DATA_DIR", Path("/data") / name)


@pytest.mark.parametrize(
    ("name", "why"), [("a,b", "a comma"), ("a\\b", "a backslash"), ("a\nb", "a line break"), ("${x}", "a reference")]
)
def test_a_folder_that_kafka_cannot_be_told_is_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(SettingError, match=rf"^PIPELINE_DATA_DIR: there is {why}.* in .*set PIPELINE_DATA_DIR to"):
        require_sayable("PIPELINE_DATA_DIR", Path("/data") / name)


def test_a_colon_ends_an_entry_of_the_class_path() -> None:
    with pytest.raises(SettingError, match=r"^PIPELINE_CACHE_DIR: there is a colon in"):
        require_sayable("PIPELINE_CACHE_DIR", Path("/a:b"), in_class_path=True)


BIND = """\
2026-11-22T10:00:00.000Z INFO  [main] starting (KafkaRaftServer)
2026-11-22T10:00:01.000Z ERROR [main] Exiting Kafka due to fatal exception (Kafka$)
org.apache.kafka.common.KafkaException: Socket server failed to bind to 127.0.0.1:9092: Address already in use.
\tat kafka.network.Acceptor.openServerSocket(SocketServer.scala:714)
\tat kafka.network.Acceptor.<init>(SocketServer.scala:605)
Caused by: java.net.BindException: Address already in use
\tat java.base/sun.nio.ch.Net.bind0(Native Method)
\t... 17 more
2026-11-22T10:00:01.100Z INFO  [main] shutting down (BrokerServer)
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (BIND, "java.net.BindException: Address already in use"),
        (
            'Exception in thread "main" java.lang.RuntimeException: No readable meta.properties files found.\n\tat a.B.c(D.java:1)\n',
            "java.lang.RuntimeException: No readable meta.properties files found.",
        ),
        (
            "2026 INFO a\n2026 ERROR [main] the first (X)\n2026 ERROR [main] the second (X)\n",
            "2026 ERROR [main] the first (X)",
        ),
        ("2026 INFO all is well\n", None),
        ("", None),
        (
            "Error: Could not find or load main class kafka.Kafka\nCaused by: java.lang.ClassNotFoundException: kafka.Kafka\n",
            "java.lang.ClassNotFoundException: kafka.Kafka",
        ),
    ],
)
def test_the_cause_is_shown_and_not_the_end_of_its_trace(log: str, cause: str | None) -> None:
    assert first_cause(log.splitlines()) == cause
