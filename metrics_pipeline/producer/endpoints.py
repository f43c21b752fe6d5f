"""The producer's HTTP side: `/health` for machines, `/status` for people and programs, `/metrics` for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final
from uuid import UUID

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from metrics_pipeline.producer.latency import Latency
from metrics_pipeline.web import WebServer

LATENCY_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A producer run at one moment.

    Attributes:
        run_id: names the run in the ledger.
        state: starting, running, paused, stopping, or how it ended: finished, stopped, failed.
        seconds: since the run began.
        acknowledged: messages in the topic.
        failed: messages that are certainly not there.
        unknown: messages that were sent but never answered.
        in_flight: messages given to the Kafka client whose end is open.
        acknowledged_per_second: over the last ten seconds.
        latency_seconds: acknowledgement to visibility in PostgreSQL, over the last minute.
        paused: why nothing is published at the moment, if so.
        stalled_seconds: how long the broker has been owing an acknowledgement; 0 when it owes none.
    """

    run_id: UUID
    state: str
    seconds: float
    acknowledged: int
    failed: int
    unknown: int
    in_flight: int
    acknowledged_per_second: float
    latency_seconds: Latency
    paused: str | None
    stalled_seconds: float

    def as_json(self) -> dict[str, Any]:
        """What `/status` answers."""
        return {**asdict(self), "run_id": str(self.run_id)}


class ProducerMetrics(Collector):
    """A registry of its own, filled from the snapshot when Prometheus asks: counting costs nothing in between."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot
        self.registry = CollectorRegistry()
        self.latency = Histogram(
            "metrics_producer_latency_seconds",
            "Acknowledgement of a sampled key to its visibility in PostgreSQL",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The counters and gauges of this moment."""
        now = self._snapshot()
        messages = CounterMetricFamily(
            "metrics_producer_messages", "Messages by what became of them", labels=["outcome"]
        )
        for outcome in ("acknowledged", "failed", "unknown"):
            messages.add_metric([outcome], getattr(now, outcome))
        yield messages
        for name, text, value in (
            ("in_flight", "Messages without an answer yet", now.in_flight),
            ("paused", "1 while nothing is published on purpose", int(now.paused is not None)),
            ("stalled_seconds", "How long the broker has been owing an acknowledgement", now.stalled_seconds),
            ("acknowledged_per_second", "Over the last ten seconds", now.acknowledged_per_second),
            ("run_seconds", "Since the run began", now.seconds),
        ):
            yield GaugeMetricFamily(f"metrics_producer_{name}", text, value=value)


class HealthServer(WebServer):
    """The producer's endpoints."""

    def __init__(
        self,
        port: int,
        snapshot: Callable[[], Snapshot],
        registry: CollectorRegistry,
        stall_seconds: float,
        host: str = "127.0.0.1",
        identity: str = "",
    ) -> None:
        """Prepare; the port is taken by `start`.

        Args:
            port: where to listen; 0 for any, see `port` after `start`.
            snapshot: the run at this moment.
            registry: what `/metrics` shows.
            stall_seconds: seconds without an owed acknowledgement after which `/health` answers 503.
            host: address to listen on.
            identity: of the data folder.
        """
        self._snapshot = snapshot
        self._registry = registry
        self._stall_seconds = stall_seconds
        routes = [
            Route("/health", self._health),
            Route("/status", self._status),
            Route("/metrics", self._metrics),
        ]
        super().__init__(routes, port, "PRODUCER_PORT", host, identity)

    async def _health(self, _: Request) -> Response:
        now = self._snapshot()
        problem = None
        if now.stalled_seconds > self._stall_seconds:
            problem = f"no acknowledgement from the broker for {now.stalled_seconds:.0f} s"
        answer = {"healthy": problem is None, "state": now.state, "paused": now.paused, "reason": problem}
        return JSONResponse(answer, status_code=200 if problem is None else 503)

    async def _status(self, _: Request) -> Response:
        return JSONResponse(self._snapshot().as_json())

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
