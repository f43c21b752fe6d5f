"""What is wrong with an archive is found, and said with the file and with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from metrics_pipeline.archive import checking, folder, manifest, parquet
from metrics_pipeline.archive.folder import ArchiveFolder
from metrics_pipeline.archive.manifest import ArchivedFile, Manifest
from metrics_pipeline.errors import ServiceError, SettingError
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.archive import readings
from metrics_pipeline_tests.archive.readings import METRICS

BEGIN = datetime(2026, 11, 26, tzinfo=UTC)
NAME = "metrics_p20261126"


def archived(root: ArchiveFolder, name: str = NAME, rows: int = 300) -> Manifest:
    """Made as `keeping` does, without a table."""
    found = readings.simple(rows, BEGIN)
    with root.locked(), root.making(NAME) as making:
        paths = parquet.write(making, readings.frames(found), METRICS, file_rows=1000)
        sums, first, last = parquet.sums(paths)
        archive = Manifest(
            name=name,
            partition=NAME,
            low=BEGIN,
            high=datetime(2026, 11, 27, tzinfo=UTC),
            first=first,
            last=last,
            source="1/2/3",
            sums=sums,
            files=tuple(ArchivedFile(path.name, path.stat().st_size, folder.checksum(path)) for path in paths),
            created_at=datetime(2026, 11, 27, 1, tzinfo=UTC),
        )
        root.publish(archive)
    return archive


@pytest.fixture
def root(tmp_path: Path) -> ArchiveFolder:
    return ArchiveFolder(tmp_path / "archive")


def test_a_good_archive_is_read_as_it_was_written(root: ArchiveFolder) -> None:
    archive = archived(root, rows=2500)
    assert manifest.read(root.path / NAME) == archive
    assert root.manifests() == [archive]
    assert [path.name for path in root.files(archive)] == [f"part-0000{number}.parquet" for number in range(3)]
    assert checking.verify(root) == []
    assert sorted(path.name for path in root.path.iterdir()) == [".lock", NAME]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0])
def test_a_flipped_bit_is_found(root: ArchiveFolder, share: float) -> None:
    archived(root)
    path = root.path / NAME / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[min(int(share * len(data)), len(data) - 1)] ^= 1
    path.write_bytes(data)
    (damage,) = checking.verify(root)
    assert damage.problem == f"{path}: its bytes have changed: the SHA-256 is not that of the manifest"
    assert f"`metrics-pipeline archive make {NAME}`" in str(damage)


def test_every_byte_of_a_manifest_counts(root: ArchiveFolder) -> None:
    archive = archived(root)
    path = root.path / NAME / manifest.FILE
    good = path.read_bytes()
    for at in range(0, len(good), 7):
        data = bytearray(good)
        data[at] ^= 1
        path.write_bytes(data)
        if good[at : at + 1].isspace():  # another blank between two words of JSON
            continue
        with pytest.raises(ServiceError, match=manifest.FILE):
            manifest.read(root.path / NAME)
    path.write_bytes(good)
    assert manifest.read(root.path / NAME) == archive


def spoil(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    """A manifest that says something else and has the checksum of that."""

    def act(path: Path) -> None:
        document = json.loads((path / manifest.FILE).read_text())
        del document["sha256"]
        change(document)
        text = json.dumps(document | {"sha256": manifest._checksum(document)})
        (path / manifest.FILE).write_text(text)

    return act


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda path: (path / "part-00000.parquet").unlink(), "part-00000.parquet: it cannot be read: No such file"),
        (lambda path: (path / manifest.FILE).unlink(), "manifest.json: it cannot be read: No such file"),
        (lambda path: (path / manifest.FILE).write_text("[]"), "manifest.json: it is no manifest"),
        (lambda path: (path / "part-00000.parquet").write_bytes(b"PAR1"), "it has 4 bytes instead of"),
        (lambda path: (path / "part-00009.parquet").write_bytes(b""), "part-00009.parquet: it does not belong there"),
        (lambda path: path.rename(path.parent / "metrics_p1"), f"it is of {NAME}"),
        (spoil(lambda document: document.update(rows=299)), "the readings differ from it in rows"),
        (
            spoil(lambda document: document["checksums"].update(tags="0")),  # type: ignore[attr-defined]  # a dict in JSON
            "the readings differ from it in tags",
        ),
        (spoil(lambda document: document.update(first=BEGIN.replace(hour=1).isoformat())), "of another time"),
        (spoil(lambda document: document.update(schema_version=2)), "it has version 2"),
    ],
)
def test_other_damage_is_found(root: ArchiveFolder, act: Callable[[Path], object], said: str) -> None:
    archived(root)
    act(root.path / NAME)
    (damage,) = checking.verify(root)
    assert said in damage.problem
    assert str(root.path) in damage.problem


def test_only_those_that_are_named_are_read(root: ArchiveFolder) -> None:
    archived(root)
    archived(root, f"{NAME}.2")
    (root.path / NAME / "part-00000.parquet").unlink()
    assert checking.verify(root, [f"{NAME}.2"]) == []
    assert [damage.archive for damage in checking.verify(root)] == [NAME]
    with pytest.raises(SettingError, match="metrics_p1: there is no such archive"):
        checking.verify(root, ["metrics_p1"])


def test_what_a_killed_program_left_is_put_right(root: ArchiveFolder) -> None:
    """One that is half made goes; the former one of a name has it again when no new one has taken it."""
    archived(root)
    (root.path / f"{folder.MAKING}{NAME}").mkdir()
    (root.path / NAME).rename(root.path / f"{folder.FORMER}{NAME}")
    with root.locked():
        pass
    assert sorted(path.name for path in root.path.iterdir()) == [".lock", NAME]
    assert checking.verify(root) == []
    (root.path / f"{folder.FORMER}{NAME}").mkdir()
    with root.locked():
        pass
    assert sorted(path.name for path in root.path.iterdir()) == [".lock", NAME]


def test_two_never_write_at_once(root: ArchiveFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PATIENCE_SECONDS", 0.0)
    with root.locked(), pytest.raises(Exception, match="another program writes there"), root.locked():
        pass


def test_what_fails_leaves_nothing(root: ArchiveFolder) -> None:
    with root.locked():
        with suppress(RuntimeError), root.making(NAME) as making:
            (making / "part-00000.parquet").write_bytes(b"PAR1")
            raise RuntimeError
        assert root.names() == []
    assert [path.name for path in root.path.iterdir()] == [".lock"]


def test_a_folder_of_somebody_else_s_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root = ArchiveFolder(tmp_path / "file" / "archive")
    with pytest.raises(SettingError, match=r"METRICS_ARCHIVE=.*cannot be written"), root.locked():
        pass
    with pytest.raises(SettingError, match="METRICS_ARCHIVE is not set"):
        ArchiveFolder.of(Settings(_env_file=None))
