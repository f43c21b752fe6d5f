"""The COPY sink as a part of the embedded stack."""

from __future__ import annotations

import sys

from metrics_pipeline.local.environment import for_python
from metrics_pipeline.local.service import Service, silence
from metrics_pipeline.settings import Settings
from metrics_pipeline.sinks.watch import copy_sink_problem


def service(settings: Settings) -> Service:
    """The COPY sink's parent process as a child of the keeper; it runs the workers and serves their health.

    It may be up before there is a schema, a topic or a decision that it is the one to store: it stands by until then.
    """
    command = [sys.executable, "-m", "metrics_pipeline", "sink", "--workers", str(settings.sink_workers)]
    return Service(
        name="sink",
        title="COPY sink",
        url=settings.sink_http,
        command=command,
        environment=for_python(settings),
        log=settings.data_dir / "logs" / "sink.log",
        check=lambda: copy_sink_problem(settings),
        answers=lambda: silence(f"{settings.sink_http}/health"),
        needs=("databases", "broker"),
        cwd=settings.data_dir,
        stop_seconds=45,
    )
