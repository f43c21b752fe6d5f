"""The Prometheus exporter as a part of the embedded stack, when it is asked for."""

from __future__ import annotations

import sys

from metrics_pipeline.local.environment import for_python
from metrics_pipeline.local.service import Service, http_problem, silence
from metrics_pipeline.settings import Settings


def service(settings: Settings) -> Service:
    """`metrics-pipeline exporter` as a child of the keeper. It needs nothing: what is away is what it tells."""
    return Service(
        name="exporter",
        title="Exporter",
        url=f"{settings.exporter_http}/metrics",
        command=[sys.executable, "-m", "metrics_pipeline", "exporter"],
        environment=for_python(settings),
        log=settings.data_dir / "logs" / "exporter.log",
        check=lambda: http_problem(f"{settings.exporter_http}/health"),
        answers=lambda: silence(f"{settings.exporter_http}/health"),
        cwd=settings.data_dir,
        stop_seconds=10,
    )
