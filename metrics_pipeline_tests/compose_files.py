"""The compose files as Compose sees them: `include`, `extends` and overlays merged, variables replaced."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from dotenv import dotenv_values

from metrics_pipeline.settings import ROOT

MAIN = ROOT / "docker-compose.yaml"
CLUSTER = ROOT / "compose.cluster.yaml"
REPLAY = ROOT / "compose.replay.yaml"
ARCHIVE = ROOT / "compose.archive.yaml"
FILES = (MAIN, CLUSTER, REPLAY, ARCHIVE, ROOT / "compose" / "observability.yaml", ROOT / "compose" / "templates.yaml")
VARIABLE = re.compile(r"\$\{(?P<name>[A-Z0-9_]+)(?::-(?P<default>[^}]*))?\}")
OURS = "metrics-pipeline"

Service = dict[str, Any]


def example() -> dict[str, str]:
    """`.env.example` as it would be read as `.env`."""
    return {name: value or "" for name, value in dotenv_values(ROOT / ".env.example").items()}


def interpolated(node: Any, variables: Mapping[str, str]) -> Any:
    """Every `${NAME:-default}` replaced; one that has neither a value nor a default is an error."""
    if isinstance(node, dict):
        return {key: interpolated(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolated(value, variables) for value in node]
    if not isinstance(node, str):
        return node

    def value(match: re.Match[str]) -> str:
        found = variables.get(match["name"]) or match["default"]
        if found is None:
            raise KeyError(f"{match[0]} has no value and no default")
        return found

    text = VARIABLE.sub(value, node)
    assert "$" not in text.replace("$$", ""), node
    return text


def project(*files: Path, variables: Mapping[str, str] | None = None) -> dict[str, Service]:
    """The services of these files, merged as `docker compose -f … -f …` does.

    Args:
        files: the first one's `include` is followed.
        variables: what stands in `.env`; default: `.env.example`.
    """
    merged: dict[str, Service] = {}
    for file in files or (MAIN,):
        document = _document(file)
        parts = [_document(ROOT / part["path"]) for part in document.get("include", ())]
        for services in (part["services"] for part in (*parts, document)):
            for name, service in services.items():
                whole = _extended(service, file.parent)
                merged[name] = _merge(merged[name], whole) if name in merged else whole
    replaced: dict[str, Service] = interpolated(merged, example() if variables is None else variables)
    return replaced


@cache
def _document(file: Path) -> dict[str, Any]:
    """A file as it is; whoever merges it makes anew what differs."""
    found: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    return found


def _extended(service: Service, folder: Path) -> Service:
    if "extends" not in service:
        return service
    own = {key: value for key, value in service.items() if key != "extends"}
    base = _document(folder / service["extends"]["file"])["services"]
    whole: Service = _merge(base[service["extends"]["service"]], own)
    return whole


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {
            key: _merge(below[key], above[key]) if key in below and key in above else above.get(key, below.get(key))
            for key in (*below, *(key for key in above if key not in below))
        }
    if isinstance(below, list) and isinstance(above, list):
        return below + above
    return above


def ports(service: Service) -> list[tuple[str, str, int]]:
    """Host address, published port (or range) and port inside, of each published port."""
    found = []
    for port in service.get("ports", ()):
        if isinstance(port, dict):
            found.append((str(port.get("host_ip", "")), str(port["published"]), int(port["target"])))
        else:
            host, published, target = port.rsplit(":", 2)
            found.append((host, published, int(target)))
    return found


def ours(service: Service) -> bool:
    """Whether the service runs an image that the Dockerfile makes."""
    return str(service["image"]).startswith(OURS)


def all_before(services: Mapping[str, Service], name: str) -> set[str]:
    """Every service that has to be ready before this one starts."""
    found: set[str] = set()

    def walk(one: str, path: tuple[str, ...]) -> None:
        assert one not in path, f"a circle: {' → '.join((*path, one))}"
        for need in services[one].get("depends_on", {}):
            found.add(need)
            walk(need, (*path, one))

    walk(name, ())
    return found


def each(check: Callable[[str, Service], None], *files: Path) -> None:
    """Apply a check to every service."""
    for name, service in project(*files).items():
        check(name, service)
