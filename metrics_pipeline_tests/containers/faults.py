"""Faults that are planted: what would not find them, proves nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Final

from metrics_pipeline_tests.containers import checks
from metrics_pipeline_tests.containers.deployment import Deployment, ProblemError
from metrics_pipeline_tests.containers.scenarios import Run

LOSE: Final = """CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN CASE WHEN random() < 0.9 THEN NEW END; END';
CREATE TRIGGER lose BEFORE INSERT ON metrics FOR EACH ROW EXECUTE FUNCTION lose()"""
"""A tenth of the readings vanish, and the sink hears of nothing."""


def faults(run: Run) -> None:
    """Planted: an owner of a tmpfs, a dependency, a secret and a sink that are wrong; each is caught."""
    with run.deployment() as (made, _):
        # The owner of Connect's own folder; and less patience than a slow machine gets.
        _edit(made, "compose/templates.yaml", '"/run/metrics-pipeline:uid=10001,gid=10001"', "/run/metrics-pipeline")
        _edit(made, "compose/templates.yaml", "start_period: 120s", "start_period: 20s")
        _caught(run, "a tmpfs that belongs to root", made.up, r"Permission denied: '/run/metrics-pipeline")
    with run.deployment() as (made, events):
        # Provisioning waits for Connect by itself: all comes up, but out of order.
        _edit(made, "docker-compose.yaml", "      connect: {condition: service_healthy}\n", "")
        _edit(made, "docker-compose.yaml", "secrets-connect:/run", "secrets-pipeline:/run")
        made.up()
        checks.rows_rise(made)
        _caught(run, "a missing depends_on", lambda: checks.order_of_start(events), "started before connect was there")
        _caught(
            run,
            "a secret in the wrong volume",
            lambda: checks.secrets(made),
            r"connect sees .*, and should \['metrics_writer_password'\]",
        )
        before = checks.rows(made)
        made.as_superuser(LOSE)
        while checks.rows(made) < before + 5000:
            time.sleep(1)
        _caught(run, "a sink that does not store all", lambda: checks.verify(made), r"[1-9][\d,]* lost")


def _edit(made: Deployment, name: str, old: str, new: str) -> None:
    file = made.checkout / name
    text = file.read_text("utf-8")
    if old not in text:
        raise ProblemError(f"{name} has no {old!r} any more: this fault is to be planted elsewhere")
    file.write_text(text.replace(old, new), "utf-8")


def _caught(run: Run, what: str, check: Callable[[], Any], pattern: str) -> None:
    began = time.monotonic()
    try:
        check()
    except ProblemError as error:
        if not re.search(pattern, str(error)):
            raise ProblemError(f"{what}: it fails, but for another reason: {error}") from error
        run.did(f"caught: {what}", began)
        return
    raise ProblemError(f"{what} was not noticed")
