"""Nothing on this machine is asked through a proxy; what is outside is, when the environment says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import pytest
import requests
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from metrics_pipeline import loopback
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.registry import RegistryClient
from metrics_pipeline.sinks.connector import ConnectClient

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "grpc_proxy")


class Recorder(BaseHTTPRequestHandler):
    """Answers everything, and remembers what it was asked for: a proxy is asked for whole URLs."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked for."""
    asked: list[str] = []
    made = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Recorder,), {"asked": asked}))
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{made.server_port}", asked
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every proxy leads to a port on which nobody listens."""
    (port,) = free_ports(1)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in PROXIES:
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")


def test_this_machine_is_asked_directly(server: tuple[str, list[str]], closed: None) -> None:
    address, asked = server
    port = address.partition(":")[2]
    for host in ("127.0.0.1", "localhost", "127.0.0.1"):
        assert loopback.get(f"http://{host}:{port}/x", timeout=5).ok
    assert asked == ["/x"] * 3


def test_outside_is_asked_through_the_proxy_unless_it_is_excepted(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = server
    monkeypatch.setenv("http_proxy", f"http://{address}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    ConnectClient("http://connect.example:8083", patience=1).config("c")
    RegistryClient("http://registry.example:8081").compatibility("s")
    assert asked == ["http://connect.example:8083/connectors/c/config", "http://registry.example:8081/config/s"]
    monkeypatch.setenv("no_proxy", "connect.example")
    with pytest.raises(requests.ConnectionError):
        loopback.get("http://connect.example:8083/", timeout=1)
    assert len(asked) == 2


def test_each_worker_of_several_has_its_own_way(server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    address, asked = server
    (port,) = free_ports(1)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    ConnectClient(["http://connect.example:8083", f"http://{address}"], patience=1).config("c")
    assert asked == ["/connectors/c/config"]


def serving(channel: grpc.Channel) -> bool:
    """Whether the server at the other end says that it serves."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def test_grpc_on_this_machine_goes_through_no_proxy(closed: None) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with loopback.channel(f"127.0.0.1:{port}") as channel:
            assert serving(channel)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as plain, pytest.raises(grpc.RpcError):
            serving(plain)  # the asserter: by itself gRPC does go through the proxy
    finally:
        server.stop(0)
