"""Where Dagster keeps its runs and events: PostgreSQL, in sessions that nothing of the surroundings changes."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from dagster._core.scheduler.instigation import InstigatorState, SensorInstigatorData
from dagster_postgres import DagsterPostgresStorage, PostgresScheduleStorage
from sqlalchemy import event
from sqlalchemy.engine import Engine

from metrics_pipeline import postgres
from metrics_pipeline.surroundings import forget_libpq

CLOCK_SECONDS: Final = 5.0
"""By how much a sensor's last tick may lie ahead."""


class PipelineStorage(DagsterPostgresStorage):
    """Dagster's own storage; `dagster.yaml` names it, so every program of Dagster's makes its sessions here."""

    def __init__(self, postgres_url: str, should_autocreate_tables: bool = True, inst_data: Any = None) -> None:
        super().__init__(postgres_url, should_autocreate_tables, inst_data)
        self._schedule_storage = SteadyScheduleStorage(postgres_url, should_autocreate_tables)

    @classmethod
    def from_config_value(cls, inst_data: Any, config_value: Mapping[str, Any]) -> "PipelineStorage":
        """Make it, once no variable of libpq's can lead it elsewhere."""
        forget_libpq(os.environ, outside=bool(os.environ.get("POSTGRES_URL")))
        if not event.contains(Engine, "connect", begin):
            event.listen(Engine, "connect", begin)
        url = config_value["postgres_url"]
        if not os.environ.get("POSTGRES_URL"):  # a pooler that would refuse it stands before servers of others only
            begun = quote(postgres.session_options(postgres.session_settings("dagster")))
            url += f"{'&' if '?' in url else '?'}client_encoding=utf8&options={begun}"
        return cls(inst_data=inst_data, **{**config_value, "postgres_url": url})


class SteadyScheduleStorage(PostgresScheduleStorage):
    """Dagster's own, in which no sensor was looked at in the future: it would rest until the clock is there again."""

    def all_instigator_state(self, *args: Any, **kwargs: Any) -> Sequence[InstigatorState]:
        """The state of every sensor and schedule."""
        return [steady(state, time.time()) for state in super().all_instigator_state(*args, **kwargs)]

    def get_instigator_state(self, origin_id: str, selector_id: str) -> InstigatorState | None:
        """The state of one of them."""
        state = super().get_instigator_state(origin_id, selector_id)
        return None if state is None else steady(state, time.time())


def steady(state: InstigatorState, now: float) -> InstigatorState:
    """A sensor's state without ticks that lie in the future, from before the clock was set back: due, as one without any."""
    data = state.instigator_data
    if not isinstance(data, SensorInstigatorData):
        return state
    last = max(data.last_tick_timestamp or 0.0, data.last_tick_start_timestamp or 0.0)
    if last <= now + CLOCK_SECONDS:
        return state
    return state.with_data(data._replace(last_tick_timestamp=None, last_tick_start_timestamp=None))


def begin(connection: Any, _record: Any) -> None:
    """Give a new session of psycopg2 what every session of ours has."""
    if not hasattr(connection, "get_dsn_parameters"):  # an engine of another database
        return
    wanted = postgres.session_settings("dagster")
    asked = re.findall(r"statement_timeout=(\S+)", connection.get_dsn_parameters().get("options", ""))
    if asked and asked[-1] != wanted["statement_timeout"]:
        del wanted["statement_timeout"]  # the webserver has one of its own
    connection.set_client_encoding("UTF8")
    former, connection.autocommit = connection.autocommit, True
    with connection.cursor() as cursor:
        cursor.execute(postgres.session_sql(wanted))
    connection.autocommit = former
