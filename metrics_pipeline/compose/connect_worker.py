"""The Connect worker of a container: the embedded stack's worker, jars and options, with the container's addresses."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from metrics_pipeline.local import connect_worker, jars
from metrics_pipeline.local.budget import GIB
from metrics_pipeline.settings import ROOT, Settings
from metrics_pipeline.sinks import active

JMX_PORT: Final = 9404
"""Where Prometheus finds the worker's JMX figures; only among the containers."""
JMX_RULES: Final = ROOT / "compose" / "jmx" / "connect.yaml"
USES: Final = ("kafka", "debezium", "jmx")
"""What the image carries: the locked jars of the embedded stack, and the JMX agent."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerCommand:
    """What is executed in place of this process."""

    command: list[str]
    environment: Mapping[str, str]


def fetch(settings: Settings) -> None:
    """Fetch the locked jars and unpack the plugin: a step of the image's build.

    Raises:
        InstallError: a download failed or differs from the lock.
    """
    paths = jars.fetch(settings, USES, quiet=True)
    jars.unpack_debezium(paths["debezium"][0], jars.cache_dir(settings) / "plugins")


def worker(settings: Settings, *, jmx_port: int = JMX_PORT) -> WorkerCommand:
    """Write the worker's file and say what to execute; every jar is compared with the lock once more.

    Raises:
        InstallError: a jar is missing or altered.
    """
    paths = jars.fetch(settings, USES, quiet=True)
    plugin = jars.unpack_debezium(paths["debezium"][0], jars.cache_dir(settings) / "plugins")
    file = settings.data_dir / "config" / "worker.properties"
    connect_worker.write_worker_file(file, plugin)
    return WorkerCommand(
        connect_worker.command(
            file,
            settings.connect_memory_gb * GIB // 2,
            f"-javaagent:{paths['jmx'][0]}={settings.listen_host}:{jmx_port}:{JMX_RULES}",
        ),
        connect_worker.environment(
            settings,
            paths["kafka"],
            listeners=f"http://{settings.listen_host}:{settings.connect_port}",
            # The engine's DNS knows the container by this name, also when there are several workers.
            advertised=socket.gethostname() if settings.listen_host != "127.0.0.1" else "127.0.0.1",
        ),
    )


def run(settings: Settings, *, jmx_port: int = JMX_PORT) -> None:
    """Become the worker; does not return."""
    made = worker(settings, jmx_port=jmx_port)
    if settings.sink == "connect":
        for line in active.hand_over(settings):
            log.warning("%s", line)
    os.execve(made.command[0], made.command, dict(made.environment))  # noqa: S606  # no shell
