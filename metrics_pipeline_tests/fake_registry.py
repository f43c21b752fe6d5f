"""A schema registry in memory, behind a real socket: the part of Confluent's API that Redpanda has, too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from metrics_pipeline_tests.fake_http import Request, listening


@dataclass
class FakeRegistry:
    """One registry. `incompatible` refuses every further version; `page` makes it answer with something else."""

    url: str = ""
    incompatible: bool = False
    page: str = ""
    password: str = ""
    versions: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Type and text of each version, by subject."""
    levels: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Status code and JSON of an answer."""
        if method != "GET":
            self.requests.append(f"{method} {path}")
        match [method, *path.strip("/").split("/")]:
            case ["GET", "subjects", subject, "versions", "latest"]:
                if subject not in self.versions:
                    return 404, {"error_code": 40401, "message": f"Subject '{subject}' not found."}
                kind, schema = self.versions[subject][-1]
                found = {"subject": subject, "version": len(self.versions[subject]), "id": 1, "schema": schema}
                return 200, found | ({} if kind == "AVRO" else {"schemaType": kind})
            case ["POST", "subjects", subject]:
                for number, (kind, schema) in enumerate(self.versions.get(subject, []), 1):
                    if kind == body["schemaType"] and json.loads(schema) == json.loads(body["schema"]):
                        return 200, {"subject": subject, "version": number, "id": 1, "schema": schema}
                return 404, {"error_code": 40403, "message": "Schema not found"}
            case ["POST", "subjects", subject, "versions"]:
                if '"type"' not in body["schema"]:
                    return 422, {"error_code": 42201, "message": "Invalid schema"}
                if self.incompatible and subject in self.versions and self.levels.get(subject) != "NONE":
                    return 409, {"error_code": 409, "message": "Schema being registered is incompatible"}
                # As a registry keeps it: the content, not the spaces.
                text = json.dumps(json.loads(body["schema"]), separators=(",", ":"), sort_keys=True)
                self.versions.setdefault(subject, []).append((body["schemaType"], text))
                return 200, {"id": len(self.versions)}
            case ["GET", "config", subject]:
                if subject not in self.levels:
                    return 404, {"error_code": 40408, "message": f"Subject '{subject}' has no level"}
                return 200, {"compatibilityLevel": self.levels[subject]}
            case ["PUT", "config", subject]:
                self.levels[subject] = body["compatibility"]
                return 200, body
        return 404, {"error_code": 404, "message": "HTTP 404 Not Found"}


@contextmanager
def serving() -> Iterator[FakeRegistry]:
    """A FakeRegistry on a free port."""
    fake = FakeRegistry()

    def respond(request: Request) -> None:
        body = request.json()
        if fake.password and not request.headers.get("Authorization"):
            status, content = 401, json.dumps({"error_code": 40101, "message": "Unauthorized"}).encode()
        elif fake.page:
            status, content = 200, fake.page.encode()
        else:
            status, answer = fake.answer(request.command, request.path, body)
            content = json.dumps(answer).encode()
        request.reply(status, content, "application/vnd.schemaregistry.v1+json")

    with listening(respond) as server:
        fake.url = f"http://127.0.0.1:{server.server_port}"
        yield fake
