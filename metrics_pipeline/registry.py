"""The JSON Schemas of the wire at a schema registry: a contract for other producers. The messages themselves stay plain JSON.

The API is Confluent's, which Redpanda speaks, too. https://docs.confluent.io/platform/current/schema-registry/develop/api.html
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit, urlunsplit

import requests

from metrics_pipeline import loopback
from metrics_pipeline.change import Change
from metrics_pipeline.errors import DriftError, ServiceError
from metrics_pipeline.settings import ROOT, TOPIC, Settings

SCHEMAS: Final = ROOT / "connect" / "schemas"
SUBJECTS: Final = {
    f"{TOPIC}-key": SCHEMAS / "metric-key.json",
    f"{TOPIC}-value": SCHEMAS / "metric-value.json",
}
"""Subject and file of each schema; the names are those that clients derive from the topic's."""

COMPATIBILITY: Final = "BACKWARD"
"""A new version must be able to read what was written by the one before: the topic holds old messages, too."""

_TYPE: Final = "application/vnd.schemaregistry.v1+json"
_TIMEOUT: Final = (3.05, 10.0)
_NOT_FOUND: Final = (404,)


@dataclass(frozen=True)
class Version:
    """A schema as the registry holds it; `schema` is the parsed text, `kind` is AVRO, JSON or PROTOBUF."""

    number: int
    kind: str
    schema: Any


class RegistryClient:
    """The part of the registry's REST API that we use.

    Args:
        url: base URL without a trailing slash; a user and a password may stand in it.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = loopback.session(url)
        self._session.headers["Accept"] = _TYPE

    @property
    def name(self) -> str:
        """The registry for people: its URL without user and password."""
        parts = urlsplit(self._url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def latest(self, subject: str) -> Version | None:
        """The newest version of a subject, or None when there is none.

        Raises:
            ServiceError: the registry cannot be used.
        """
        answer = self._ask("GET", f"/subjects/{quote(subject)}/versions/latest")
        return None if answer is None else _version(answer)

    def lookup(self, subject: str, schema: str) -> int | None:
        """The version under which this very schema is registered, if it is.

        Raises:
            ServiceError: the registry cannot be used.
        """
        answer = self._ask("POST", f"/subjects/{quote(subject)}", _body(schema))
        return None if answer is None else int(answer["version"])

    def register(self, subject: str, schema: str) -> None:
        """Make a schema the newest version of a subject.

        Raises:
            DriftError: it is not compatible with the version before.
            ServiceError: the registry cannot be used, or refuses the schema.
        """
        self._ask("POST", f"/subjects/{quote(subject)}/versions", _body(schema))

    def compatibility(self, subject: str) -> str | None:
        """The subject's own level of compatibility, or None when the registry's default holds.

        Raises:
            ServiceError: the registry cannot be used.
        """
        answer = self._ask("GET", f"/config/{quote(subject)}")
        return None if answer is None else str(answer.get("compatibilityLevel") or answer.get("compatibility"))

    def set_compatibility(self, subject: str, level: str) -> None:
        """Set the subject's own level of compatibility.

        Raises:
            ServiceError: the registry cannot be used.
        """
        self._ask("PUT", f"/config/{quote(subject)}", {"compatibility": level})

    def _ask(self, method: str, path: str, body: dict[str, str] | None = None) -> dict[str, Any] | None:
        data = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": _TYPE}
        try:
            answer = self._session.request(method, self._url + path, data=data, headers=headers, timeout=_TIMEOUT)
        except requests.RequestException as error:
            # The cause would repeat the URL with its password.
            raise ServiceError(
                f"the schema registry at {self.name} cannot be reached ({type(error).__name__}): start it, or correct "
                "SCHEMA_REGISTRY_URL (empty for none)"
            ) from None
        content = _object(answer)
        if content is None or (not answer.ok and "error_code" not in content):
            raise ServiceError(
                f"{self.name} answers {answer.status_code}, but is no schema registry: correct SCHEMA_REGISTRY_URL"
            )
        if answer.ok:
            return content
        if answer.status_code in _NOT_FOUND and method != "PUT" and not path.endswith("/versions"):
            return None
        reason = f"{' '.join(str(content.get('message', answer.reason)).split())[:500]} ({content['error_code']})"
        if answer.status_code == requests.codes.conflict:
            raise DriftError(
                f"the schema registry at {self.name} holds a schema that ours does not follow from: {reason}: see which is "
                f"right, and delete the version there that is not, or set the compatibility of {path.split('/')[2]} to NONE for once"
            )
        if answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
            reason += ": put user and password into SCHEMA_REGISTRY_URL"
        raise ServiceError(f"the schema registry at {self.name} refused {method} {path}: {reason}")


def ensure_schemas(settings: Settings) -> Change:
    """Register the schemas of key and value, and their level of compatibility; nothing when no registry is set.

    Raises:
        ServiceError: the registry cannot be used, or refuses a schema.
        DriftError: it holds a newer version than this release's, or one that ours is not compatible with.
    """
    if not settings.schema_registry_url:
        return Change("unchanged")
    client = RegistryClient(settings.schema_registry_url)
    changes = [_ensure(client, subject, file) for subject, file in SUBJECTS.items()]
    details = [line for change in changes for line in change.details]
    if all(change.state == "created" for change in changes):
        return Change("created", details)
    return Change("changed" if details else "unchanged", details)


def _ensure(client: RegistryClient, subject: str, file: Path) -> Change:
    text, details = file.read_text("utf-8"), []
    latest = client.latest(subject)
    if latest is None or not _same(latest, text):
        older = None if latest is None else client.lookup(subject, text)
        if latest is not None and older is not None and older != latest.number:
            raise DriftError(
                f"schema {subject} at {client.name} is at version {latest.number}, {_ours(file)} is version {older}: "
                f"update metrics-pipeline, or delete version {latest.number} there"
            )
        if older is None:
            client.register(subject, text)
            details.append(f"schema {subject} registered")
    # After the schema: who let an incompatible one pass for once has set another level, and this one puts it back.
    level = client.compatibility(subject)
    if level != COMPATIBILITY:
        client.set_compatibility(subject, COMPATIBILITY)
        details.append(f"compatibility of {subject}: {level or 'not set'} → {COMPATIBILITY}")
    return Change("created" if latest is None else "changed" if details else "unchanged", details)


def registry_drift(settings: Settings) -> list[str]:
    """Each difference between the registry and our schemas; empty when there is none, or no registry.

    Raises:
        ServiceError: the registry cannot be used.
    """
    if not settings.schema_registry_url:
        return []
    client = RegistryClient(settings.schema_registry_url)
    differences = []
    for subject, file in SUBJECTS.items():
        text = file.read_text("utf-8")
        latest = client.latest(subject)
        if latest is None:
            differences.append(f"schema {subject} is not registered at {client.name}")
            continue
        if not _same(latest, text):
            older = client.lookup(subject, text)
            where = "is not registered" if older is None else f"is version {older}"
            if older != latest.number:
                differences.append(
                    f"schema {subject} at {client.name} is at version {latest.number}, {_ours(file)} {where}"
                )
        if (level := client.compatibility(subject)) != COMPATIBILITY:
            differences.append(f"compatibility of {subject} is {level or 'not set'}, configured {COMPATIBILITY}")
    return differences


def _ours(file: Path) -> str:
    return str(file.relative_to(ROOT))


def _body(schema: str) -> dict[str, str]:
    return {"schema": schema, "schemaType": "JSON"}


def _version(answer: dict[str, Any]) -> Version:
    kind = str(answer.get("schemaType", "AVRO"))  # left out for Avro
    text = str(answer.get("schema", ""))
    return Version(int(answer["version"]), kind, _parsed(text) if kind == "JSON" else text)


def _same(version: Version, text: str) -> bool:
    """Registries keep the content, not its spaces and the order of its names."""
    return version.kind == "JSON" and version.schema == json.loads(text)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _object(answer: requests.Response) -> dict[str, Any] | None:
    try:
        content = answer.json()
    except requests.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None
