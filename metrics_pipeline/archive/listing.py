"""The archives there are, beside what the table has of them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from metrics_pipeline import partitions, postgres
from metrics_pipeline.archive import manifest, table
from metrics_pipeline.archive.folder import ArchiveFolder
from metrics_pipeline.archive.manifest import Manifest
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.settings import Settings


@dataclass(frozen=True, slots=True)
class Listed:
    """An archive in a list.

    Attributes:
        name: of the archive.
        archive: its manifest; None when that is damaged.
        damage: what is wrong with the manifest.
        table: how the table stands to it: `whole` has the same readings, `changed` has others by now, `gone` has not got the partition
            any more; `unknown` when PostgreSQL does not answer.
    """

    name: str
    archive: Manifest | None
    damage: str | None
    table: str

    def cells(self) -> tuple[str, ...]:
        """For a table on a terminal."""
        if self.archive is None:
            return self.name, "", "", "", "", "", self.damage or ""
        rows, size = f"{self.archive.sums.rows:,}", f"{self.archive.bytes:,}"
        bounds = (_shown(self.archive.low or self.archive.first), _shown(self.archive.high))
        return self.name, *bounds, rows, size, _shown(self.archive.created_at), self.table

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        known = self.archive.document() if self.archive else {"name": self.name}
        return known | {"damage": self.damage, "table": self.table}


def _shown(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M}"


def listed(settings: Settings) -> list[Listed]:
    """Every archive, in the order of time.

    Raises:
        SettingError: METRICS_ARCHIVE is not set, or cannot be read.
    """
    folder = ArchiveFolder.of(settings)
    states = _states(settings)
    found = []
    for name in folder.names():
        try:
            archive = manifest.read(folder.path / name)
        except ServiceError as error:
            found.append(Listed(name, None, str(error), "unknown"))
            continue
        found.append(Listed(name, archive, None, _stands(folder, archive, states)))
    return sorted(found, key=lambda one: (one.archive is not None and _begin(one.archive), one.name))


def _begin(archive: Manifest) -> float:
    moment = archive.low or archive.first
    return -1e12 if moment is None else moment.timestamp()


def _states(settings: Settings) -> dict[str, table.State | None] | None:
    """What is noted of each partition; None when PostgreSQL does not answer."""
    with (
        suppress(ServiceError),
        postgres.connect(settings, "metrics_reader", autocommit=True) as connection,
        table.errors("the catalogue"),
    ):
        return {one.name: table.state(connection, one.name) for one in partitions.listed(connection)}
    return None


def _stands(folder: ArchiveFolder, archive: Manifest, states: dict[str, table.State | None] | None) -> str:
    if states is None:
        return "unknown"
    state = states.get(archive.partition)
    if state is None or (state.name, state.folder) != (archive.name, str(folder.path)):
        return "gone"
    return "changed" if state.problem or state.manifest != archive.sha256 else "whole"
