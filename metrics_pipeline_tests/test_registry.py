"""The schemas are registered once, as their files stand; what differs is named and not overwritten in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from metrics_pipeline import registry
from metrics_pipeline.change import Change
from metrics_pipeline.errors import DriftError, ServiceError
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.settings import ROOT, Settings
from metrics_pipeline_tests.fake_registry import FakeRegistry, serving

KEY, VALUE = "metrics-key", "metrics-value"


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with serving() as fake:
        yield fake


def at(fake: FakeRegistry) -> Settings:
    return Settings(schema_registry_url=fake.url)


def test_without_a_registry_nothing_is_asked() -> None:
    assert Settings().schema_registry_url == ""
    assert registry.ensure_schemas(Settings()) == Change("unchanged")
    assert registry.registry_drift(Settings()) == []


def test_both_schemas_are_registered_as_their_files_stand_and_once(fake: FakeRegistry) -> None:
    assert registry.registry_drift(at(fake)) == [
        f"schema {KEY} is not registered at {fake.url}",
        f"schema {VALUE} is not registered at {fake.url}",
    ]
    assert registry.ensure_schemas(at(fake)).state == "created"
    for subject, file in ((KEY, "metric-key.json"), (VALUE, "metric-value.json")):
        ((kind, text),) = fake.versions[subject]
        assert kind == "JSON"
        assert json.loads(text) == json.loads((ROOT / "connect" / "schemas" / file).read_text("utf-8"))
    assert fake.levels == {KEY: "BACKWARD", VALUE: "BACKWARD"}
    assert registry.registry_drift(at(fake)) == []
    asked = list(fake.requests)
    assert registry.ensure_schemas(at(fake)) == Change("unchanged")
    assert fake.requests == asked, "the second time changes nothing"


def test_another_schema_of_the_same_subject_is_followed_by_ours(fake: FakeRegistry) -> None:
    fake.versions[VALUE] = [("JSON", '{"type":"object"}')]
    fake.levels[VALUE] = "FULL"
    assert registry.registry_drift(at(fake)) == [
        f"schema {KEY} is not registered at {fake.url}",
        f"schema {VALUE} at {fake.url} is at version 1, connect/schemas/metric-value.json is not registered",
        f"compatibility of {VALUE} is FULL, configured BACKWARD",
    ]
    change = registry.ensure_schemas(at(fake))
    assert change.state == "changed"
    assert f"compatibility of {VALUE}: FULL → BACKWARD" in change.details
    assert len(fake.versions[VALUE]) == 2
    assert registry.registry_drift(at(fake)) == []


def test_an_avro_schema_there_is_another_one(fake: FakeRegistry) -> None:
    fake.versions[KEY] = [("AVRO", '{"type":"string"}')]
    assert f"schema {KEY} at {fake.url} is at version 1" in registry.registry_drift(at(fake))[0]


def test_a_newer_version_than_ours_is_not_overwritten(fake: FakeRegistry) -> None:
    registry.ensure_schemas(at(fake))
    fake.versions[VALUE].append(("JSON", '{"type":"object"}'))
    assert registry.registry_drift(at(fake)) == [
        f"schema {VALUE} at {fake.url} is at version 2, connect/schemas/metric-value.json is version 1"
    ]
    with pytest.raises(
        DriftError, match=r"at version 2, .*metric-value.json is version 1: update metrics-pipeline, or del"
    ):
        registry.ensure_schemas(at(fake))
    assert len(fake.versions[VALUE]) == 2


def test_an_incompatible_schema_says_what_the_registry_says_and_can_be_let_pass_once(fake: FakeRegistry) -> None:
    fake.versions[VALUE] = [("JSON", '{"type":"object"}')]
    fake.incompatible = True
    with pytest.raises(DriftError, match=r"Schema being registered is incompatible \(409\): .*metrics-value to NONE"):
        registry.ensure_schemas(at(fake))
    fake.levels[VALUE] = "NONE"
    assert registry.ensure_schemas(at(fake)).state == "changed"
    assert fake.levels[VALUE] == "BACKWARD"


def test_a_level_that_somebody_changed_is_drift_and_put_back(fake: FakeRegistry) -> None:
    registry.ensure_schemas(at(fake))
    del fake.levels[KEY]
    assert registry.registry_drift(at(fake)) == [f"compatibility of {KEY} is not set, configured BACKWARD"]
    assert registry.ensure_schemas(at(fake)).details == [f"compatibility of {KEY}: not set → BACKWARD"]


def test_a_registry_that_is_away_is_named_without_its_password() -> None:
    (port,) = free_ports(1)
    settings = Settings(schema_registry_url=f"http://user:tell-nobody@127.0.0.1:{port}")
    with pytest.raises(
        ServiceError, match=rf"schema registry at http://127\.0\.0\.1:{port} cannot be reached .*SCHEMA_REGISTRY_URL"
    ) as caught:
        registry.ensure_schemas(settings)
    assert "tell-nobody" not in f"{caught.value}{caught.value.__cause__}"
    assert "tell-nobody" not in repr(settings)


@pytest.mark.parametrize("page", ["<html>hello</html>", "[]"])
def test_something_else_on_that_port_is_no_registry(fake: FakeRegistry, page: str) -> None:
    fake.page = page
    with pytest.raises(ServiceError, match="is no schema registry: correct SCHEMA_REGISTRY_URL"):
        registry.registry_drift(at(fake))


def test_a_registry_that_wants_a_password_gets_the_one_in_the_url(fake: FakeRegistry) -> None:
    fake.password = "x"
    with pytest.raises(ServiceError, match="put user and password into SCHEMA_REGISTRY_URL"):
        registry.ensure_schemas(at(fake))
    place = urlsplit(fake.url).netloc
    assert registry.ensure_schemas(Settings(schema_registry_url=f"http://user:x@{place}")).state == "created"


def test_a_schema_that_the_registry_refuses_is_an_error(fake: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServiceError, match=r"refused POST /subjects/metrics-key/versions: Invalid schema \(42201\)"):
        registry.RegistryClient(fake.url).register(KEY, "{}")


@pytest.mark.parametrize(
    ("first", "second", "state"),
    [
        (Change("created", ["a"]), Change("unchanged"), "created"),
        (Change("unchanged"), Change("created", ["b"]), "changed"),
        (Change("changed", ["a"]), Change("created", ["b"]), "changed"),
        (Change("unchanged"), Change("unchanged"), "unchanged"),
    ],
)
def test_topic_and_schemas_are_one_change(first: Change, second: Change, state: str) -> None:
    assert first.then(second) == Change(state, first.details + second.details)  # type: ignore[arg-type]
