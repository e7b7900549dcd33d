"""The memories of the clients of one process, by version."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedllm.engines.checksummed_files import RESUME, read_tree, written
from fedllm.errors import RunError, not_written
from fedllm.files import write_durably
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree

MOST_NAME_BYTES = 255  # of a folder's name


class ClientStore:
    """Each client's stage memories, never sent, versioned by round so that any round can be run again.

    Version N is what the client remembers when round N begins; version 0 holds nothing. A round can be run again as
    long as it is not more than `keep` before the client's newest one. With no folder they stay in this object.
    """

    def __init__(self, folder: Path | None, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep
        self._held: dict[str, dict[int, tuple[Tree, ...]]] = {}

    def load(self, client: str, round: int, stages: int) -> tuple[Tree, ...]:
        """One memory per stage: the newest version that is not later than `round`; empty at first.

        Raises:
            RunError: that version is forgotten already, cannot be read, or is damaged.
        """
        versions = self._versions(client)
        known = [version for version in versions if version <= round]
        if versions and not known:
            raise RunError(
                f"what client {client} remembered in round {round} is forgotten, the oldest that is kept is round "
                f"{versions[0]}'s; go on from a later round"
            )
        if not known or known[-1] == 0:
            return tuple({} for _ in range(stages))
        if self._folder is None:
            return self._held[client][known[-1]]
        path = self._path(client, known[-1])
        trees = read_tree(path, f"without it client {client} cannot take part; bring it back from a copy")
        return tuple(tree.select_prefix(trees, f"memory{place}") for place in range(stages))

    def newest(self, clients: Iterable[str], round: int) -> dict[str, int]:
        """Of each of some clients that have a memory, the newest version that is not later than `round`."""
        if self._folder is not None and not self._folder.is_dir():
            return {}
        known = {client: [v for v in self._versions(client) if 0 < v <= round] for client in clients}
        return {client: versions[-1] for client, versions in known.items() if versions}

    def require(self, remembered: Mapping[str, int]) -> None:
        """Look whether these clients' memories are there.

        Raises:
            RunError: names the client and the round of one that is not.
        """
        for client, version in remembered.items():
            if not self._has(client, version):
                where = f" from {self._path(client, version)}" if self._folder is not None else ""
                raise RunError(
                    f"what client {client} remembered after round {version} is gone{where}; bring it back from a copy, "
                    "or start again with another --out"
                )

    def _has(self, client: str, version: int) -> bool:
        if self._folder is None:
            return version in self._held.get(client, {})
        return self._path(client, version).is_file()

    def save(self, client: str, round: int, memories: Sequence[Tree]) -> None:
        """Keep what a client remembers for the rounds from `round` on; forget versions that no resume needs.

        Raises:
            RunError: the disk is full or not writable; earlier versions are untouched.
        """
        versions = self._versions(client)
        if not versions:
            if not any(memories):
                return
            # Says that there is nothing before the first version, which a forgotten one would say, too.
            self._write(client, 0, ())
        self._write(client, round, memories)
        # the newest version at or before the oldest checkpoint that a resume may start from stays
        old = [version for version in {0, *versions, round} if version <= round - self._keep]
        for version in sorted(old)[:-1]:
            self._forget(client, version)

    def _write(self, client: str, version: int, memories: Sequence[Tree]) -> None:
        if self._folder is None:
            self._held.setdefault(client, {})[version] = tuple(memories)
            return
        path = self._path(client, version)
        trees: Tree = {}
        for place, memory in enumerate(memories):
            trees |= tree.add_prefix(**{f"memory{place}": memory})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path.with_suffix(".tmp"), written(trees))
            os.replace(path.with_suffix(".tmp"), path)
        except OSError as error:
            raise not_written(path, error, RESUME) from error

    def _forget(self, client: str, version: int) -> None:
        if self._folder is None:
            self._held[client].pop(version, None)
        else:
            self._path(client, version).unlink(missing_ok=True)

    def _versions(self, client: str) -> list[int]:
        if self._folder is None:
            return sorted(self._held.get(client, ()))
        return sorted(int(path.stem) for path in self._path(client, 0).parent.glob("*.safetensors"))

    def _path(self, client: str, version: int) -> Path:
        assert self._folder is not None
        require_folder_name(client)
        return self._folder / client / f"{version:06d}.safetensors"


def require_folder_name(client: str) -> None:
    """
    Raises:
        RunError: a client's name cannot name a folder.
    """
    plain = client.isprintable() and not set(client) & set('\\/:*?"<>|')
    if client in ("", ".", "..") or not plain or len(client.encode()) > MOST_NAME_BYTES:
        raise RunError(f"client {client!r} cannot name a folder; use letters, digits, '_', '.' and '-', at most 64")
