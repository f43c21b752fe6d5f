"""What counts as new in a folder, and where files go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metrics_pipeline.errors import BusyError, SettingError
from metrics_pipeline.replay import folder as folders
from metrics_pipeline.replay.folder import Note, ReplayFolder, sha256


@pytest.fixture
def folder(tmp_path: Path) -> ReplayFolder:
    found = ReplayFolder(tmp_path / "in")
    found.path.mkdir()
    found.prepare()
    return found


def put(folder: ReplayFolder, name: str, text: str = "x", changed: int = 1_700_000_000) -> Path:
    path = folder.path / name
    path.write_text(text)
    os.utime(path, (changed, changed))
    return path


def note(folder: ReplayFolder, name: str) -> Note:
    path = folder.path / name
    return Note(
        name=name, sha256=sha256(path), size=1, recipe={}, skip_bad=False, allow_implausible=False, begun="2026-01-01"
    )


def test_a_file_is_new_when_it_has_stood_still_since_the_last_look(folder: ReplayFolder) -> None:
    put(folder, "b.csv", changed=1)
    put(folder, "a.csv", changed=2)
    first = folder.look({})
    assert (first.ready, first.waiting) == ([], 2)
    put(folder, "a.csv", "x and more", changed=2)
    second = folder.look(first.seen)
    assert (second.ready, second.waiting) == (["b.csv"], 1)
    put(folder, "b.csv", changed=3)
    third = folder.look(second.seen)
    assert (third.ready, third.waiting) == (["a.csv"], 1)
    assert folder.look(third.seen).ready == ["a.csv", "b.csv"], "oldest first"


def test_what_is_still_written_hidden_or_a_report_is_passed_over(folder: ReplayFolder) -> None:
    for name in (".a.csv", "a.csv.part", "a.csv.TMP", "a.csv.report.json"):
        put(folder, name)
    (folder.path / "more").mkdir()
    assert folder.look(folder.look({}).seen) == folders.Look()


def test_what_cannot_be_replayed_is_named_and_the_others_go_on(
    folder: ReplayFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "good.csv")
    put(folder, "two\nlines.csv")
    put(folder, "n" * 201)
    (folder.path / "link.csv").symlink_to(folder.path / "good.csv")
    os.mkfifo(folder.path / "pipe")
    closed = put(folder, "closed.csv")
    really = open

    def refusing(path: str, mode: str) -> object:
        if path == str(closed):
            raise PermissionError(13, "Permission denied", path)
        return really(path, mode)

    monkeypatch.setattr(folders, "open", refusing, raising=False)  # the tests may run as root
    found = folder.look(folder.look({}).seen)
    assert found.ready == ["good.csv"]
    assert found.problems == sorted(
        [
            "'two\\nlines.csv': its name has characters that cannot be shown: rename it",
            f"{'n' * 201}: its name is too long for a report beside it: at most 200 bytes",
            "link.csv is a link: put the file itself there",
            "pipe is no file",
            "closed.csv cannot be read: Permission denied",
        ]
    )


def test_a_folder_that_is_missing_or_may_not_be_written_is_said(
    folder: ReplayFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match=r"REPLAY_FOLDER=.*: it does not exist; make it"):
        ReplayFolder(folder.path / "nowhere").look({})
    with pytest.raises(SettingError, match="it is no folder"):
        ReplayFolder(put(folder, "file")).look({})
    monkeypatch.setattr(os, "access", lambda path, _mode: not str(path).endswith("done"))
    with pytest.raises(SettingError, match="/done is not writable; give the account of the pipeline the right"):
        folder.look({})


def test_nothing_is_made_by_a_look(tmp_path: Path) -> None:
    ReplayFolder(tmp_path).look({})
    assert list(tmp_path.iterdir()) == []


def test_a_note_is_kept_until_its_file_is_moved(folder: ReplayFolder) -> None:
    put(folder, "a.csv")
    one = note(folder, "a.csv")
    folder.write(one)
    assert folder.notes() == [one]
    assert folder.look({}).under_way == 1
    one.place, one.report = folder.free_place("done", one), {"readings": 1, "sha256": one.sha256}
    target = folder.finish(one)
    assert target == folder.path / "done" / "a.csv"
    assert target.read_text() == "x"
    assert '"readings": 1' in (folder.path / "done" / "a.csv.report.json").read_text()
    assert folder.notes() == []
    assert not (folder.path / "a.csv").exists()


@pytest.mark.parametrize(
    ("name", "second", "third"),
    [
        ("a.csv", "a-2.csv", "a-3.csv"),
        ("a.b.csv.gz", "a.b-2.csv.gz", "a.b-3.csv.gz"),
        ("readings", "readings-2", "readings-3"),
    ],
)
def test_the_same_name_with_another_content_gets_a_number(
    folder: ReplayFolder, name: str, second: str, third: str
) -> None:
    for text in "xyz":
        put(folder, name, text)
        one = note(folder, name)
        one.place, one.report = folder.free_place("done", one), {"sha256": one.sha256}
        folder.finish(one)
    assert [(folder.path / "done" / each).read_text() for each in (name, second, third)] == ["x", "y", "z"]


def test_nothing_is_overwritten_by_what_was_to_be_moved_before(folder: ReplayFolder) -> None:
    """Somebody puts a file there between the note and the move."""
    put(folder, "a.csv")
    one = note(folder, "a.csv")
    one.place, one.report = folder.free_place("done", one), {"sha256": one.sha256}
    put(folder, "done/a.csv", "other")
    assert folder.finish(one).name == "a-2.csv"
    assert (folder.path / "done" / "a.csv").read_text() == "other"
    assert folder.notes() == []


def test_a_report_without_its_file_is_written_anew_only_for_the_same_content(folder: ReplayFolder) -> None:
    put(folder, "a.csv")
    one = note(folder, "a.csv")
    put(folder, "failed/a.csv.report.json", '{"sha256": "of another one"}')
    assert folder.free_place("failed", one) == "failed/a-2.csv"
    put(folder, "failed/a.csv.report.json", f'{{"sha256": "{one.sha256}"}}')
    assert folder.free_place("failed", one) == "failed/a.csv", "it was moved back"


def test_a_damaged_note_is_named(folder: ReplayFolder) -> None:
    put(folder, ".under-way/a.json", "{")
    with pytest.raises(SettingError, match=r"a\.json: the note cannot be read"):
        folder.notes()


def test_one_process_at_a_time_and_the_lock_ends_with_it(folder: ReplayFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.2)
    assert not folder.locked()
    code = (
        "import sys, pathlib; from metrics_pipeline.replay.folder import ReplayFolder\n"
        "with ReplayFolder(pathlib.Path(sys.argv[1])).lock(): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        assert folder.locked()
        with pytest.raises(BusyError, match="another run replays"), folder.lock():
            pass
        holder.kill()
        holder.wait(30)
    assert not folder.locked()
    with folder.lock():
        assert folder.locked()
