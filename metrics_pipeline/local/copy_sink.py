"""The COPY sink as a part of the embedded stack."""

from __future__ import annotations

import sys
from urllib.parse import urlsplit

import requests

from metrics_pipeline.local.environment import for_python
from metrics_pipeline.local.service import Service, silence
from metrics_pipeline.settings import Settings


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


def copy_sink_problem(settings: Settings) -> str | None:
    """None when the COPY sink of this machine answers that it is well, else why not."""
    place = urlsplit(settings.sink_http).netloc
    try:
        answer = requests.get(f"{settings.sink_http}/health", timeout=5)
    except requests.RequestException as error:
        return f"no answer on {place} ({type(error).__name__})"
    if answer.ok:
        return None
    try:
        reason = str(answer.json().get("reason") or "")
    except (ValueError, AttributeError):
        reason = ""
    return f"{place} answers {answer.status_code}" + (f": {reason}" if reason else "")
