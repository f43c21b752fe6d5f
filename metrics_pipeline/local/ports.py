"""Loopback ports: found busy before anything is started, named by the setting that moves them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable

import psutil

from metrics_pipeline.errors import BusyError
from metrics_pipeline.settings import Settings


def is_free(port: int) -> bool:
    """Whether a service could listen on 127.0.0.1:`port` now."""
    with socket.socket() as probe:
        # As the services do it: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def free_ports(count: int) -> list[int]:
    """Distinct ports that are free now, chosen by the kernel."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def holder(port: int) -> str:
    """Who listens on the port, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            if (
                connection.laddr
                and connection.laddr.port == port
                and connection.status == psutil.CONN_LISTEN
                and connection.pid
            ):
                return f"{psutil.Process(connection.pid).name()}, pid {connection.pid}"
    except psutil.Error:
        pass
    return "another program"


def require_free(settings: Settings, names: Iterable[str]) -> None:
    """Check the ports of these settings.

    Raises:
        BusyError: naming every busy port, who holds it, and the setting that moves it.
    """
    busy = [(name, getattr(settings, name)) for name in names if not is_free(getattr(settings, name))]
    if busy:
        named = "; ".join(
            f"port {port} is in use by {holder(port)}: set {name.upper()} to a free one" for name, port in busy
        )
        raise BusyError(f"{named}; or let `metrics-pipeline up --free-ports` choose")
