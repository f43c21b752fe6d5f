"""What is said when PostgreSQL cannot be used, without one: a server that answers as told stands in for it."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from metrics_pipeline import postgres
from metrics_pipeline.errors import ServiceError, SettingError
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.settings import Settings

SECRET = "not-to-be-seen"


def load(**values: object) -> Settings:
    passwords = {f"{role}_password": SECRET for role in (*postgres.ROLES, "postgres")}
    return Settings.load(**{**passwords, **values})


@contextmanager
def refusing_server(message: str) -> Iterator[int]:
    """Speaks just enough of the protocol to refuse every connection with a message, as PostgreSQL does."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                while True:
                    length, code = struct.unpack(">ii", client.recv(8))
                    client.recv(length - 8)
                    if code != 3 << 16:  # TLS or GSS encryption asked for
                        client.sendall(b"N")
                        continue
                    fields = f"SFATAL\0C57P03\0M{message}\0\0".encode()
                    client.sendall(b"E" + struct.pack(">i", len(fields) + 4) + fields)
                    break

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def refusal(message: str) -> str:
    with refusing_server(message) as port, pytest.raises(ServiceError) as caught:
        postgres.connect(load(postgres_port=port), "metrics_reader")
    text = str(caught.value)
    assert "\n" not in text
    assert SECRET not in text
    return text.replace(str(port), "PORT")


def test_nobody_listens() -> None:
    (port,) = free_ports(1)
    with pytest.raises(
        ServiceError, match=rf"^PostgreSQL at 127.0.0.1:{port} cannot be reached .*efused.*POSTGRES_PORT$"
    ):
        postgres.connect(load(postgres_port=port), "metrics_reader")


def test_an_existing_server_is_named_by_its_url() -> None:
    (port,) = free_ports(1)
    settings = load(postgres_url=f"postgresql://admin:{SECRET}@127.0.0.1:{port}/metrics")
    with pytest.raises(ServiceError, match=r"correct POSTGRES_URL$") as caught:
        postgres.connect_admin(settings)
    assert SECRET not in str(caught.value)


def test_a_wrong_password_names_its_variable() -> None:
    assert refusal('password authentication failed for user "metrics_reader"').startswith(
        "PostgreSQL at 127.0.0.1:PORT: password refused for metrics_reader: correct METRICS_READER_PASSWORD "
    )


def test_a_missing_database_is_named() -> None:
    assert "has no database metrics: run `metrics-pipeline up`" in refusal('database "metrics" does not exist')


def test_a_missing_role_is_named() -> None:
    assert "has no role metrics_reader: run `metrics-pipeline up`" in refusal('role "metrics_reader" does not exist')


@pytest.mark.parametrize("state", ["starting up", "shutting down", "in recovery mode"])
def test_a_server_that_is_not_ready(state: str) -> None:
    assert f"is not ready yet (the database system is {state}): try again" in refusal(f"the database system is {state}")


def test_a_server_that_has_no_connection_left() -> None:
    assert "(FATAL: sorry, too many clients already)" in refusal("sorry, too many clients already")


def test_a_server_that_does_not_answer_is_not_waited_for_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ServiceError, match="timeout"):
        postgres.connect(load(postgres_port=silent.getsockname()[1]), "metrics_reader", connect_timeout=2)


def test_a_role_without_password_is_not_made() -> None:
    with pytest.raises(SettingError, match=r"^METRICS_WRITER_PASSWORD is empty"):
        postgres.bootstrap(load(metrics_writer_password=""))


def test_query_text_is_the_file() -> None:
    assert postgres.query("device_summary_plain").startswith("-- Per device:")


UP = """-- migrate:up

REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO metrics_writer;
CREATE TABLE public.metrics (a int); -- not republic.metrics
SELECT 'public.metrics'::regclass;

-- migrate:down
GRANT USAGE ON SCHEMA public TO PUBLIC;
"""


def test_a_migration_goes_into_a_schema_of_our_own() -> None:
    assert postgres.migration_in(UP, "public") == UP
    text = postgres.migration_in(UP, "mine")
    assert "CREATE TABLE mine.metrics (a int); -- not republic.metrics" in text
    assert "REVOKE ALL ON SCHEMA mine FROM PUBLIC;" in text
    assert "SELECT 'mine.metrics'::regclass;" in text


def test_what_public_may_in_a_schema_of_others_stays() -> None:
    text = postgres.migration_in(UP, "public", ours=False)
    assert "PUBLIC" not in text
    assert "GRANT USAGE ON SCHEMA public TO metrics_writer;" in text


def test_a_migration_says_its_settings_where_a_session_cannot() -> None:
    text = postgres.migration_in(UP, "public", begin=r"SELECT set_config('a', '\1', false)")
    assert text.count("SELECT set_config('a', '\\1', false);\n") == 2
    assert text.startswith("-- migrate:up\nSELECT set_config")


def test_every_migration_can_be_put_into_another_schema() -> None:
    for path in postgres.MIGRATIONS.glob("*.sql"):
        text = postgres.migration_in(path.read_text("utf-8"), "mine", ours=False)
        for line in text.splitlines():
            if not line.startswith("--"):
                assert "public" not in line, f"{path.name}: {line}"
