"""The whole pipeline in somebody else's database, by a role that may nothing but what the error lists, with either sink."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from metrics_pipeline_tests.integration.test_guest import catalogs, shop, statements
from metrics_pipeline_tests.integration.test_keeper import own_pipeline
from metrics_pipeline_tests.servers import Server, own_server

pytestmark = [pytest.mark.integration, pytest.mark.whole_stack]

__all__ = ["shop"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with own_server() as made:
        yield made


@pytest.mark.parametrize(
    ("sink", "schema"), [("connect", "readings"), pytest.param("copy", "", marks=pytest.mark.long)]
)
def test_it_runs_beside_another_application(sink: str, schema: str, shop: Server) -> None:
    others = catalogs(shop, of_others=True)
    before = catalogs(shop, of_others=False)
    url = shop.url("shop", "guest", "g")
    with own_pipeline(POSTGRES_URL=url, POSTGRES_SCHEMA=schema, SINK=sink, EXPORTER="true") as place:
        refused = place.cli("up", "--detach", timeout=400)
        assert refused.returncode == 1, refused.stdout + refused.stderr
        assert catalogs(shop, of_others=False) == before
        (said,) = [line for line in refused.stderr.splitlines() if "run the same command again" in line]
        with shop.admin("shop") as boss:
            for statement in statements(said):
                boss.execute(statement.encode())
        started = place.cli("up", "--detach", timeout=400)
        assert started.returncode == 0, started.stdout + started.stderr
        place.wait(
            "storing",
            lambda s: (
                all(s[part]["healthy"] for part in ("postgres", "broker", "sink", "watcher", "producer", "dagster"))
                and (s["rows_per_second"] or 0) > 0
            ),
        )
        for arguments in (
            ("status",),
            ("migrate", "status"),
            ("sql", "SELECT count(*) FROM metrics"),
            ("rejects", "list"),
        ):
            done = place.cli(*arguments)
            assert done.returncode == 0, done.stdout + done.stderr
        place.verify()
        with shop.admin("shop") as boss:
            there = boss.execute("SELECT count(*) FROM pg_class WHERE relname = 'metrics' AND relkind = 'p'").fetchone()
        assert there == (1,)
    assert catalogs(shop, of_others=True) == others
    with psycopg.connect(shop.url("shop", "clerk", "x")) as clerk:
        assert clerk.execute("SELECT total()").fetchone() == (2,)
