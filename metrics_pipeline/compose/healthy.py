"""`python -m metrics_pipeline.compose.healthy URL…|FILE`: exit code 0 when each URL answers well, or the file was touched just now.

`http://` is well with 2xx, `grpc://HOST:PORT/SERVICE` when the service says that it serves. For the health checks of images
that have no curl. It imports nothing of the package, and no Dagster, which takes a second of a core: it runs every few seconds.
"""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 5
ALIVE_SECONDS = 60
"""How long ago a file may have been touched by a service that gets on."""


def main(*urls: str) -> int:
    """Ask each once; the first reason goes to standard error, where `docker inspect` shows it."""
    for url in urls:
        if problem := _problem(url):
            sys.stderr.write(f"{url}: {problem}\n")
            return 1
    return 0


def _problem(url: str) -> str | None:
    try:
        if "://" not in url:
            age = time.time() - Path(url).stat().st_mtime
            # The clock may have been set back since.
            return None if -ALIVE_SECONDS < age <= ALIVE_SECONDS else f"last touched {age:.0f} s ago"
        if url.startswith("grpc://"):
            return _grpc_problem(url)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(url, timeout=TIMEOUT_SECONDS).close()
    except (urllib.error.URLError, OSError) as error:
        return str(error)
    return None


def _grpc_problem(url: str) -> str | None:
    # Here, since the others do without.
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    place = urlsplit(url)
    with grpc.insecure_channel(place.netloc, options=[("grpc.enable_http_proxy", 0)]) as channel:
        question = health_pb2.HealthCheckRequest(service=place.path.strip("/"))
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            status = stub.Check(question, timeout=TIMEOUT_SECONDS).status
        except grpc.RpcError as error:
            return str(error)
    return None if status == health_pb2.HealthCheckResponse.SERVING else "not serving"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
