"""Faults that are planted: what would not find them, proves nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Final

from metrics_pipeline_tests.containers import checks
from metrics_pipeline_tests.containers.deployment import Deployment, ProblemError, wait_until
from metrics_pipeline_tests.containers.scenarios import Run

LOSE: Final = """CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN CASE WHEN random() < 0.9 THEN NEW END; END';
CREATE TRIGGER lose BEFORE INSERT ON metrics FOR EACH ROW EXECUTE FUNCTION lose()"""
"""A tenth of the readings vanish, and the sink hears of nothing."""


Edit = tuple[str, str, str]
"""A file, what it has, and what it gets instead."""
OWNER: Final[tuple[Edit, ...]] = (
    ("compose/templates.yaml", '"/run/metrics-pipeline:uid=10001,gid=10001"', "/run/metrics-pipeline"),
    ("compose/templates.yaml", "start_period: 120s", "start_period: 20s"),  # less patience than a slow machine gets
)
WIRING: Final[tuple[Edit, ...]] = (
    # Provisioning waits for Connect by itself: all comes up, but out of order.
    (
        "docker-compose.yaml",
        "      redpanda: {condition: service_healthy}\n      connect: {condition: service_healthy}\n    deploy: {resources: {limits: {memory: 1g, pids: 128}}}\n",
        "      redpanda: {condition: service_healthy}\n    deploy: {resources: {limits: {memory: 1g, pids: 128}}}\n",
    ),
    (
        "docker-compose.yaml",
        'volumes: ["secrets-connect:/run/metrics-secrets:ro"]\n    depends_on:\n      secrets',
        'volumes: ["secrets-pipeline:/run/metrics-secrets:ro"]\n    depends_on:\n      secrets',
    ),
)


def faults(run: Run) -> None:
    """Planted: an owner of a tmpfs, a dependency, a secret and a sink that are wrong; each is caught."""
    with run.deployment() as (made, _):
        _plant(made, OWNER)
        caught(run, "a tmpfs that belongs to root", made.up, r"Permission denied: '/run/metrics-pipeline")
    with run.deployment() as (made, events):
        _plant(made, WIRING)
        made.up()
        checks.rows_rise(made)
        caught(run, "a missing depends_on", lambda: checks.order_of_start(events), "started before connect was there")
        pattern = r"connect sees .*, and should \['metrics_writer_password'\]"
        caught(run, "a secret in the wrong volume", lambda: checks.secrets(made), pattern)
        before = checks.rows(made)
        made.as_superuser(LOSE)
        wait_until("5,000 more rows", lambda: checks.rows(made) > before + 5000, 240)
        caught(run, "a sink that does not store all", lambda: checks.verify(made), r"[1-9][\d,]* lost")


def _plant(made: Deployment, edits: tuple[Edit, ...]) -> None:
    for name, old, new in edits:
        file = made.checkout / name
        text = file.read_text("utf-8")
        if old not in text:
            raise ProblemError(f"{name} has no {old!r} any more: this fault is to be planted elsewhere")
        file.write_text(text.replace(old, new), "utf-8")


def caught(run: Run, what: str, check: Callable[[], Any], pattern: str) -> None:
    """A check fails, and for this reason.

    Raises:
        ProblemError: it does not.
    """
    began = time.monotonic()
    try:
        check()
    except ProblemError as error:
        if not re.search(pattern, str(error)):
            raise ProblemError(f"{what}: it fails, but for another reason: {error}") from error
        run.did(f"caught: {what}", began)
        return
    raise ProblemError(f"{what} was not noticed")
