"""A site's key of its noise: whole, secret, and one for all processes of the site."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedllm.engines.client_noise import forget_key, key_file
from fedllm.errors import RunError


@pytest.mark.parametrize("text", ["", "\n", "00", "ab" * 31, "no key"])
def test_a_key_that_is_not_whole_is_refused(tmp_path: Path, text: str) -> None:
    """An empty file, as a full disk leaves it, would be a key that everybody knows."""
    (tmp_path / "noise.key").write_text(text)
    with pytest.raises(RunError, match=r"noise\.key holds no key; bring it back from a copy, or start again"):
        key_file(tmp_path / "noise.key")


def test_processes_that_begin_at_once_have_one_key(tmp_path: Path) -> None:
    path = tmp_path / "clients" / "noise.key"
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: key_file(path), range(8)))
    assert len(keys) == 1 and len(*keys) == 32
    assert os.stat(path).st_mode & 0o077 == 0
    assert list(path.parent.iterdir()) == [path]


def test_a_key_that_was_made_in_part_is_no_key_and_is_forgotten_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "noise.key"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="No space left on device"):
            key_file(path)
    assert not path.exists()
    key_file(path)
    (tmp_path / "noise.key.part-1").write_text("left by a process that died")
    forget_key(path)
    assert not list(tmp_path.iterdir())
