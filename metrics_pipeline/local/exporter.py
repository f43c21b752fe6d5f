"""The Prometheus exporter as a part of the embedded stack, when it is asked for."""

from __future__ import annotations

import sys
from urllib.parse import urlsplit

import requests

from metrics_pipeline.local.environment import for_python
from metrics_pipeline.local.service import Service
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
        check=lambda: exporter_problem(settings),
        cwd=settings.data_dir,
        stop_seconds=10,
    )


def exporter_problem(settings: Settings) -> str | None:
    """None when the exporter answers, else why not."""
    try:
        requests.get(f"{settings.exporter_http}/health", timeout=5).raise_for_status()
    except requests.RequestException as error:
        return f"no answer on {urlsplit(settings.exporter_http).netloc} ({type(error).__name__})"
    return None
