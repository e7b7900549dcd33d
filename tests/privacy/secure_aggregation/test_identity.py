"""Keys of clients: their files, and the file of pinned peers."""

from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import MissingExtra
from fedllm.privacy.secure_aggregation import primitives
from fedllm.privacy.secure_aggregation.faults import IdentityError
from fedllm.privacy.secure_aggregation.identity import (
    load_identity,
    load_peers,
    new_identity,
    save_identity,
    save_peers,
)


def test_a_key_comes_back_and_is_its_owners_alone(tmp_path: Path) -> None:
    path, made = tmp_path / "key", new_identity("north")
    save_identity(path, made)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_identity(path, "north") == made
    assert made.secret.hex() not in repr(made)


def test_a_key_is_not_overwritten(tmp_path: Path) -> None:
    save_identity(tmp_path / "key", new_identity("north"))
    with pytest.raises(IdentityError, match="a key is not overwritten"):
        save_identity(tmp_path / "key", new_identity("north"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o601])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    save_identity(path, new_identity("north"))
    path.chmod(mode)
    with pytest.raises(IdentityError, match=rf"not its owner's alone \(mode {mode:04o}\); run: chmod 600"):
        load_identity(path, "north")
    path.chmod(0o400)
    load_identity(path, "north")


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for words in ("", "00" * 31, "00" * 33, "zz" * 32, "00" * 5000):
        path.write_text(words)
        path.chmod(0o600)
        with pytest.raises(IdentityError, match="does not hold a key of 32 bytes in hex"):
            load_identity(path, "north")
    with pytest.raises(IdentityError, match="cannot be opened"):
        load_identity(tmp_path / "absent", "north")
    save_identity(tmp_path / "real", new_identity("north"))
    os.symlink(tmp_path / "real", tmp_path / "link")
    with pytest.raises(IdentityError, match="cannot be opened"):
        load_identity(tmp_path / "link", "north")
    with pytest.raises(IdentityError):
        load_identity(tmp_path, "north")


def test_peers_come_back_and_a_repeated_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "peers"
    peers = {"north": bytes(range(32)), "south and east": bytes(range(1, 33))}
    save_peers(path, peers)
    assert load_peers(path) == peers
    path.write_text("# pinned in May\n\n" + path.read_text())
    assert load_peers(path) == peers
    for line, sentence in (
        ("north " + "ff" * 32, "has a name or a key that an earlier line has"),
        ("west " + bytes(range(32)).hex(), "has a name or a key that an earlier line has"),
        ("west 00", "is not a name and a key"),
        ("00" * 32, "is not a name and a key"),
    ):
        save_peers(path, peers)
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(IdentityError, match=f"peers:3 {sentence}"):
            load_peers(path)
    with pytest.raises(IdentityError, match="cannot be read"):
        load_peers(tmp_path / "absent")


def test_without_the_package_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "cryptography":
            raise ModuleNotFoundError(name)
        return honest(name, *rest)

    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", absent)
    for use in (
        lambda: primitives.exchange_pair(),
        lambda: primitives.sign(bytes(32), b""),
        lambda: primitives.keystream(primitives.AES, bytes(16)),
        lambda: primitives.encrypt(bytes(32), b"", b""),
    ):
        with pytest.raises(MissingExtra, match=r"pip install 'fedllm\[secure\]'"):
            use()
