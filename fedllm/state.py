"""State: the server's run and the clients' memories, saved atomically, enough to resume to the bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from fedllm import tree
from fedllm.errors import RunError
from fedllm.rng import Key
from fedllm.tree import Tree

ROUND = "round-{:06d}"


@dataclass(frozen=True)
class Totals:
    """Running sums over complete rounds."""

    bytes_up: int = 0
    bytes_down: int = 0
    evaluation_bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def plus(self, other: Totals) -> Totals:
        """Sum, field by field."""
        return Totals(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Run:
    """The server's state after `round` complete rounds.

    `best` is (completed rounds, value) of the best evaluation so far; `pending` are events, as the log writes them,
    that belong to the checkpoint and follow it in the log.
    """

    params: Tree
    states: tuple[Tree, ...]
    round: int
    key: Key
    totals: Totals = Totals()
    best: tuple[int, float] | None = None
    pending: Sequence[Mapping[str, Any]] = field(default_factory=list)


class Checkpoints:
    """`checkpoints/round-N/`: `server.safetensors` and `run.json`, written beside and renamed into place."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self._folder, self._keep_last = folder, keep_last

    def rounds(self) -> list[int]:
        """The saved ones, oldest first."""
        return sorted(int(path.name.removeprefix("round-")) for path in self._folder.glob("round-*"))

    def save(self, run: Run) -> None:
        """Save; then drop what is neither the best nor among the last ones.

        Raises:
            RunError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        final = self._folder / ROUND.format(run.round)
        trees = tree.join(params=run.params)
        for place, state in enumerate(run.states):
            trees |= tree.join(**{f"state{place}": state})
        facts = {
            "round": run.round,
            "key": run.key.value,
            "states": len(run.states),
            "totals": asdict(run.totals),
            "best": run.best,
            "pending": list(run.pending),
        }
        with atomic_folder(final) as folder:
            write_durably(folder / "server.safetensors", save({n: t.contiguous() for n, t in trees.items()}))
            write_durably(folder / "run.json", json.dumps(facts).encode())
        kept = {*self.rounds()[-self._keep_last :], *([run.best[0]] if run.best else [])}
        for number in self.rounds():
            if number not in kept:
                shutil.rmtree(self._folder / ROUND.format(number))

    def load(self, number: int | None = None) -> Run | None:
        """The newest, or the one after `number` rounds; None if there is none."""
        numbers = self.rounds()
        if not numbers or (number is not None and number not in numbers):
            return None
        folder = self._folder / ROUND.format(numbers[-1] if number is None else number)
        trees = load_file(folder / "server.safetensors")
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return Run(
            params=tree.branch(trees, "params"),
            states=tuple(tree.branch(trees, f"state{place}") for place in range(facts["states"])),
            round=facts["round"],
            key=Key(facts["key"]),
            totals=Totals(**facts["totals"]),
            best=tuple(facts["best"]) if facts["best"] else None,
            pending=facts["pending"],
        )


class ClientStore:
    """Each client's stage memories, never sent, versioned by round so that any round can be run again.

    A version `N` is what the client remembers when round N begins. With no folder they stay in this object.
    """

    def __init__(self, folder: Path | None, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep
        self._held: dict[tuple[str, int], tuple[Tree, ...]] = {}

    def load(self, client: str, round: int, stages: int) -> tuple[Tree, ...]:
        """One memory per stage: the newest version that is not later than `round`; empty at first."""
        known = [version for version in self._versions(client) if version <= round]
        if not known:
            return tuple({} for _ in range(stages))
        if self._folder is None:
            return self._held[client, known[-1]]
        trees = load_file(self._path(client, known[-1]))
        return tuple(tree.branch(trees, f"memory{place}") for place in range(stages))

    def save(self, client: str, round: int, memories: Sequence[Tree]) -> None:
        """Keep what a client remembers for the rounds from `round` on; forget versions that no resume needs."""
        if not any(memories) and not self._versions(client):
            return
        if self._folder is None:
            self._held[client, round] = tuple(memories)
        else:
            trees = {
                name: leaf.contiguous()
                for place, memory in enumerate(memories)
                for name, leaf in tree.join(**{f"memory{place}": memory}).items()
            }
            path = self._path(client, round)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path.with_suffix(".tmp"), save(trees))
            os.replace(path.with_suffix(".tmp"), path)
        # the newest version at or before the oldest checkpoint that a resume may start from stays
        old = [version for version in self._versions(client) if version <= round - self._keep]
        for version in old[:-1]:
            if self._folder is None:
                del self._held[client, version]
            else:
                self._path(client, version).unlink()

    def _versions(self, client: str) -> list[int]:
        if self._folder is None:
            return sorted(version for name, version in self._held if name == client)
        found = (self._folder / client).glob("*.safetensors")
        return sorted(int(path.stem) for path in found)

    def _path(self, client: str, version: int) -> Path:
        assert self._folder is not None
        return self._folder / client / f"{version:06d}.safetensors"


class atomic_folder:
    """`with atomic_folder(path) as part:` fills `part`, which becomes `path` at the end, whole or not at all."""

    def __init__(self, final: Path) -> None:
        self._final = final
        self._part = final.with_name(f".{final.name}.part")

    def __enter__(self) -> Path:
        try:
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)
        except OSError as error:
            raise self._refusal(error) from error
        return self._part

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            try:
                if self._final.exists():
                    shutil.rmtree(self._final)
                os.replace(self._part, self._final)
                sync_folder(self._final.parent)
                return
            except OSError as caught:
                error = caught
        shutil.rmtree(self._part, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> RunError:
        return RunError(
            f"{self._final} could not be written ({error.strerror or error}); earlier checkpoints are whole: "
            "make room on the disk, then resume the run"
        )


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
