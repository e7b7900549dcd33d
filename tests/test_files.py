"""Folders are whole or not there, and files are on the disk when a write returns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedllm import files
from fedllm.errors import RunError
from fedllm.files import atomic_folder, remove_folder, write_durably


def test_atomic_folder_replaces_as_a_whole(tmp_path: Path) -> None:
    final = tmp_path / "adapter"
    with atomic_folder(final) as part:
        (part / "a").write_text("old")
        assert not final.exists()
    with pytest.raises(ZeroDivisionError), atomic_folder(final) as part:
        (part / "b").write_text("new")
        raise ZeroDivisionError
    assert [path.name for path in final.iterdir()] == ["a"]
    with atomic_folder(final) as part:
        (part / "b").write_text("new")
    assert [path.name for path in final.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="adapter could not be written"), atomic_folder(tmp_path / "file" / "adapter"):
        pass


def test_a_folder_is_taken_away_under_its_name_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "round"
    remove_folder(folder)  # nothing there: nothing to do
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("x")
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: waited.append(os.readlink(f"/proc/self/fd/{handle}")))
    write_durably(tmp_path / "file", b"12")
    files.sync(tmp_path)
    files.sync(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"12"
    assert waited == [str(tmp_path / "file"), str(tmp_path), str(tmp_path / "file")]
