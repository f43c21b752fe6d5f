"""Ports: a busy one is found before anything starts, and named by the setting that moves it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from metrics_pipeline.errors import BusyError
from metrics_pipeline.local.ports import free_ports, holder, is_free, is_taken, require_free
from metrics_pipeline.settings import Settings


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_free_ports_are_distinct_and_free() -> None:
    ports = free_ports(40)
    assert len(set(ports)) == 40
    assert all(is_free(port) for port in ports)


def test_a_port_that_is_listened_on_is_busy(listener: int) -> None:
    assert not is_free(listener)
    assert is_taken(listener)


def test_a_port_that_connections_were_closed_on_is_free() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as PostgreSQL and the JVMs do
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            accepted.close()  # the side that closes first keeps the port in TIME_WAIT
    assert is_free(port)


def test_holder_names_the_program(listener: int) -> None:
    assert f"pid {os.getpid()}" in holder(listener)


def test_a_busy_port_is_named_with_its_setting_and_the_way_out(listener: int) -> None:
    (free,) = free_ports(1)
    settings = Settings.load(connect_port=listener, kafka_port=free)
    with pytest.raises(BusyError) as caught:
        require_free(settings, ["kafka_port", "connect_port"])
    message = str(caught.value)
    assert message.startswith(f"port {listener} is in use by ")
    assert "set CONNECT_PORT to a free one" in message
    assert "--free-ports" in message
    assert "KAFKA_PORT" not in message


def test_free_ports_pass() -> None:
    first, second = free_ports(2)
    require_free(Settings.load(connect_port=first, kafka_port=second), ["kafka_port", "connect_port"])


def test_a_port_that_only_root_may_open_is_nobodys(monkeypatch: pytest.MonkeyPatch, listener: int) -> None:
    class Socket(socket.socket):
        """Of an ordinary user."""

        def bind(self, address: Any) -> None:
            raise PermissionError(errno.EACCES, f"Permission denied: {address}")

    (free,) = free_ports(1)
    monkeypatch.setattr("metrics_pipeline.local.ports.socket.socket", Socket)
    assert (is_free(free), is_taken(free)) == (False, False)
    assert (is_free(listener), is_taken(listener)) == (False, True)
    with pytest.raises(BusyError, match=rf"^port {free} is not this user's to open: .* set KAFKA_PORT to a free one"):
        require_free(Settings.load(kafka_port=free), ["kafka_port"])
