"""A data folder has one id, however many ask for it."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from metrics_pipeline.data_folder import folder_id, make_folder_id
from metrics_pipeline.settings import Settings


def test_a_folder_in_which_nothing_was_started_has_none(tmp_path: Path) -> None:
    assert folder_id(Settings.load(pipeline_data_dir=tmp_path)) == ""


def test_all_who_ask_at_once_get_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: make_folder_id(tmp_path), range(40)))
    assert found == {folder_id(Settings.load(pipeline_data_dir=tmp_path))}
    assert [path.name for path in tmp_path.iterdir()] == ["stack-id"]


def test_a_file_system_without_hard_links_has_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert make_folder_id(tmp_path) == make_folder_id(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stack-id"]


def test_two_folders_differ(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert make_folder_id(tmp_path / "a") != make_folder_id(tmp_path / "b")


def test_a_copy_of_a_folder_is_another_one_and_a_moved_one_is_not(tmp_path: Path) -> None:
    """Or what is done to the one would end what runs for the other."""
    original = tmp_path / "original"
    original.mkdir()
    identity = make_folder_id(original)
    shutil.copytree(original, tmp_path / "copy")
    assert folder_id(Settings.load(pipeline_data_dir=tmp_path / "copy")) == ""
    assert make_folder_id(tmp_path / "copy") != identity
    original.rename(tmp_path / "moved")
    assert make_folder_id(tmp_path / "moved") == identity


@pytest.mark.parametrize("text", ["", "x", "\xff", "a b c"])
def test_an_id_that_cannot_be_read_is_made_anew(text: str, tmp_path: Path) -> None:
    (tmp_path / "stack-id").write_text(text, "latin-1")
    assert folder_id(Settings.load(pipeline_data_dir=tmp_path)) == ""
    assert make_folder_id(tmp_path) == folder_id(Settings.load(pipeline_data_dir=tmp_path)) != ""
