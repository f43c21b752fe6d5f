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
    return _refusal(port) is None


def is_taken(port: int) -> bool:
    """Whether somebody listens on 127.0.0.1:`port`; one that this user may not open is not taken by that."""
    match _refusal(port):
        case errno.EACCES:
            with socket.socket() as probe:
                probe.settimeout(1)
                return probe.connect_ex(("127.0.0.1", port)) == 0
        case refusal:
            return refusal is not None


def _refusal(port: int) -> int | None:
    """The errno with which the system refuses to let anybody listen there; None when it does not."""
    with socket.socket() as probe:
        # As the services do it: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return error.errno
            raise
    return None


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


def trouble(port: int) -> str | None:
    """Why nobody of ours could listen on 127.0.0.1:`port`; None when one could."""
    if is_free(port):
        return None
    return f"in use by {holder(port)}" if is_taken(port) else "not this user's to open: those below 1024 are root's"


def require_free(settings: Settings, names: Iterable[str]) -> None:
    """Check the ports of these settings.

    Raises:
        BusyError: naming every busy port, who holds it, and the setting that moves it.
    """
    ports = [(name, getattr(settings, name)) for name in names]
    if busy := [(name, port, problem) for name, port in ports if (problem := trouble(port)) is not None]:
        named = "; ".join(f"port {port} is {problem}: set {name.upper()} to a free one" for name, port, problem in busy)
        raise BusyError(f"{named}; or let `metrics-pipeline up --free-ports` choose")
