"""What the keeper writes down about itself and its children, so that another process can find them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from metrics_pipeline.local.processes import ProcessId, certain, identify
from metrics_pipeline.local.service import Service


@dataclass(slots=True)
class StackState:
    """The content of `stack.json`."""

    keeper: ProcessId | None = None
    children: dict[str, ProcessId] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    ready: bool = False
    """Everything came up and was provisioned."""

    @classmethod
    def read(cls, data_dir: Path) -> StackState:
        """The last written state; an empty one when there is none or it cannot be understood."""
        try:
            content: dict[str, Any] = json.loads((data_dir / "stack.json").read_text())
            return cls(
                keeper=ProcessId.parse(content["keeper"]) if content["keeper"] else None,
                children={
                    name: certain(ProcessId.parse(child), data_dir) for name, child in content["children"].items()
                },
                fingerprints=content["fingerprints"],
                ready=content["ready"],
            )
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, data_dir: Path) -> None:
        """Replace the file in one step."""
        scratch = data_dir / ".stack.json"
        scratch.write_text(json.dumps(asdict(self), indent=1))
        scratch.replace(data_dir / "stack.json")

    def adopt(self, services: Iterable[Service]) -> list[Service]:
        """Give each service the process that a former keeper left; those started otherwise than they would be now are returned."""
        stale = []
        for service in services:
            written = self.children.get(service.name)
            process = (written.find() if written else None) or service.find()
            if process is None:
                continue
            service.adopt(process)
            if self.fingerprints.get(service.name) != service.fingerprint:
                stale.append(service)
        return stale

    def others(self, services: Iterable[Service], logs: Path) -> list[Service]:
        """What a former keeper left and is no part of this stack (it had more brokers or workers): fit only to be ended."""
        known = {service.name for service in services}
        others = []
        for name, child in self.children.items():
            if name not in known and (process := child.find()) is not None:
                log = logs / f"{name}.log"
                other = Service(name, name, "", [], {}, log, lambda: "is no part of this stack", stop_seconds=45)
                other.adopt(process)
                others.append(other)
        return others

    def note(self, services: Iterable[Service]) -> None:
        """Take down which processes run now."""
        self.children, self.fingerprints = {}, {}
        for service in services:
            if service.process is not None and service.alive():
                try:
                    self.children[service.name] = identify(service.process)
                except psutil.Error:
                    continue
                self.fingerprints[service.name] = service.fingerprint
