"""Where Dagster keeps its runs and events: PostgreSQL, in sessions that nothing of the surroundings changes."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

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
        url, schema = without_options(config_value["postgres_url"])
        _SCHEMAS[urlsplit(url).path.strip("/")] = schema
        if not event.contains(Engine, "do_connect", connect):
            event.listen(Engine, "do_connect", connect)
        if not os.environ.get("POSTGRES_URL"):  # a pooler that would refuse it stands before servers of others only
            begun = quote(postgres.session_options(postgres.session_settings("dagster", schema)))
            url += f"{'&' if '?' in url else '?'}client_encoding=utf8&options={begun}"
        return cls(inst_data=inst_data, **{**config_value, "postgres_url": url})


_SCHEMAS: dict[str, str] = {}
"""By database, where Dagster's tables are."""


def without_options(url: str) -> tuple[str, str]:
    """A URL of Dagster's database without its `options`, and the schema that they name."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    options = " ".join(value for name, value in query if name == "options")
    found = re.search(r"search_path=(\S+)", options)
    left = urlencode([(name, value) for name, value in query if name != "options"], safe="/", quote_via=quote)
    return urlunsplit(parts._replace(query=left)), found[1] if found else "public"


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


def connect(dialect: Any, _record: Any, arguments: Any, named: dict[str, Any]) -> Any:
    """A session of psycopg2 with what every session of ours has, before SQLAlchemy asks it what its schema is."""
    if dialect.driver != "psycopg2":  # an engine of another database
        return None
    connection = dialect.connect(*arguments, **named)
    try:
        begin(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def begin(connection: Any) -> None:
    """Give a new session of psycopg2 what every session of ours has."""
    place = connection.get_dsn_parameters()
    wanted = postgres.session_settings("dagster", _SCHEMAS.get(quote(place.get("dbname", ""), safe=""), "public"))
    asked = re.findall(r"statement_timeout=(\S+)", place.get("options", ""))
    if asked and asked[-1] != wanted["statement_timeout"]:
        del wanted["statement_timeout"]  # the webserver has one of its own
    connection.set_client_encoding("UTF8")
    former, connection.autocommit = connection.autocommit, True
    with connection.cursor() as cursor:
        cursor.execute(postgres.session_sql(wanted))
    connection.autocommit = former
