"""What an archive holds, as JSON beside its files; the last thing that is written of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from metrics_pipeline.errors import ServiceError

FILE: Final = "manifest.json"
SCHEMA_VERSION: Final = 1
"""Of the Parquet files and of the manifest; a reader refuses what it does not know."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What readings add up to, whatever their order; equal readings have equal sums.

    Attributes:
        rows: how many.
        keys: sum of 60 bits of the MD5 of each key.
        values: of each key with the bits of its value.
        tags: of each key with its tags.
        created_at: of each key with the time at which it was stored.
    """

    rows: int
    keys: int
    values: int
    tags: int
    created_at: int

    def differences(self, other: Sums) -> list[str]:
        """Names of what differs."""
        mine, theirs = asdict(self), asdict(other)
        return [name for name, value in mine.items() if value != theirs[name]]


@dataclass(frozen=True, slots=True)
class ArchivedFile:
    """A Parquet file: its name in the folder of the archive, its size, and its checksum."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """One archive.

    Attributes:
        name: of the archive: the folder that it lies in.
        partition: the table that it was made of.
        low: least published_at that the table may hold; None: there is no bound.
        high: what every published_at is less than; None: there is no bound.
        first: least published_at that there is; None without rows.
        last: greatest one.
        source: cluster, database and table, by number.
        sums: of all readings.
        files: in the order of the keys.
        created_at: when it was made.
    """

    name: str
    partition: str
    low: datetime | None
    high: datetime | None
    first: datetime | None
    last: datetime | None
    source: str
    sums: Sums
    files: tuple[ArchivedFile, ...]
    created_at: datetime

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        fields = {"schema_version": SCHEMA_VERSION, **asdict(self), "rows": self.sums.rows, "bytes": self.bytes}
        fields["checksums"] = {name: f"{number:x}" for name, number in asdict(self.sums).items() if name != "rows"}
        del fields["sums"]
        for name in ("low", "high", "first", "last", "created_at"):
            moment = fields[name]
            fields[name] = None if moment is None else moment.isoformat()
        fields["files"] = list(fields["files"])
        return fields

    def text(self) -> str:
        """The file: the document, and its own checksum."""
        document = self.document()
        return json.dumps(document | {"sha256": _checksum(document)}, indent=1, ensure_ascii=False) + "\n"

    @property
    def sha256(self) -> str:
        """Checksum of the file."""
        return sha256(self.text().encode()).hexdigest()

    def covers(self, low: datetime, high: datetime) -> bool:
        """Whether it holds readings of this stretch of time."""
        return self.first is not None and self.last is not None and self.first < high and self.last >= low


def read(folder: Path) -> Manifest:
    """The manifest in a folder.

    Raises:
        ServiceError: there is none, it cannot be read, or it is not as it was written.
    """
    path = folder / FILE
    try:
        document = json.loads(path.read_text("utf-8"))
        written = document.pop("sha256")
        version = document["schema_version"]
        if version != SCHEMA_VERSION:
            raise ServiceError(f"{path}: it has version {version}, and this metrics-pipeline reads {SCHEMA_VERSION}")
        manifest = _parsed(document)
    except OSError as error:
        raise ServiceError(f"{path}: it cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServiceError(f"{path}: it is no manifest: {error}") from error
    if manifest.document() != document or written != _checksum(document):
        raise ServiceError(f"{path}: it is not as it was written")
    if manifest.name != folder.name:
        raise ServiceError(f"{path}: it is of {manifest.name}")
    return manifest


def _parsed(document: Mapping[str, Any]) -> Manifest:
    def moment(name: str) -> datetime | None:
        text = document[name]
        return None if text is None else datetime.fromisoformat(text)

    sums = {name: int(text, 16) for name, text in document["checksums"].items()}
    return Manifest(
        name=document["name"],
        partition=document["partition"],
        low=moment("low"),
        high=moment("high"),
        first=moment("first"),
        last=moment("last"),
        source=document["source"],
        sums=Sums(rows=document["rows"], **sums),
        files=tuple(ArchivedFile(**file) for file in document["files"]),
        created_at=datetime.fromisoformat(document["created_at"]),
    )


def _checksum(document: Mapping[str, Any]) -> str:
    return sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
