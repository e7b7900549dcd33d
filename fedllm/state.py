"""State: the server's run and the clients' memories, saved atomically, enough to resume to the bit.

Every file holds the SHA-256 of its content, which is compared when the file is read (`damage`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedllm import tree
from fedllm.damage import read_facts, read_tree, with_sum, written
from fedllm.disk import atomic_folder, not_written, remove_folder, write_durably
from fedllm.errors import RunError
from fedllm.rng import Key
from fedllm.shift import Shift
from fedllm.tree import Tree

MOST_NAME_BYTES = 255  # of a folder's name
RESUME = "resume the run"


@dataclass(frozen=True)
class Totals:
    """Running sums over complete rounds. `computed`: tokens, without what sequences had in common."""

    bytes_up: int = 0
    bytes_down: int = 0
    evaluation_bytes: int = 0
    tokens: int = 0
    computed: int = 0
    seconds: float = 0.0

    def plus(self, other: Totals) -> Totals:
        """Sum, field by field."""
        theirs = asdict(other)
        return Totals(**{name: value + theirs[name] for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Run:
    """The server's state after `round` complete rounds.

    `best` is (completed rounds, value) of the best evaluation so far; `pending` are events, as the log writes them,
    that belong to the checkpoint and follow it in the log. `shift`: what was added to the frozen weights; `seen`: the
    version of it that each client has, where it is not 0. `remembered`: the newest version of each client's memory,
    where it has one.
    """

    params: Tree
    states: tuple[Tree, ...]
    round: int
    key: Key
    totals: Totals = Totals()
    best: tuple[int, float] | None = None
    pending: Sequence[Mapping[str, Any]] = field(default_factory=list)
    shift: Shift = Shift()
    seen: Mapping[str, int] = field(default_factory=dict)
    remembered: Mapping[str, int] = field(default_factory=dict)


class Checkpoints:
    """`checkpoints/round-N/`: `server.safetensors` and `run.json`, written beside and renamed into place."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self._folder, self._keep_last = folder, keep_last

    def rounds(self) -> list[int]:
        """The saved ones, oldest first."""
        found = (re.fullmatch(r"round-(\d+)", path.name) for path in self._folder.glob("round-*"))
        return sorted(int(match[1]) for match in found if match)

    def save(self, run: Run) -> None:
        """Save; then drop what is neither the best nor among the last ones.

        Raises:
            RunError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        trees = tree.join(params=run.params)
        for place, state in enumerate(run.states):
            trees |= tree.join(**{f"state{place}": state})
        trees |= run.shift.joined_trees()
        facts = {
            "round": run.round,
            "key": run.key.value,
            "states": len(run.states),
            "totals": asdict(run.totals),
            "best": run.best,
            "pending": list(run.pending),
            "shift": list(run.shift.steps),
            "seen": dict(run.seen),
            "remembered": dict(run.remembered),
        }
        with atomic_folder(self._path(run.round), RESUME) as folder:
            write_durably(folder / "server.safetensors", written(trees))
            write_durably(folder / "run.json", with_sum(facts).encode())
        kept = {*self.rounds()[-self._keep_last :], *([run.best[0]] if run.best else [])}
        for number in self.rounds():
            if number not in kept:
                remove_folder(self._path(number))

    def load(self, number: int | None = None) -> Run | None:
        """The newest, or the one after `number` rounds; None if there is none.

        Raises:
            RunError: it cannot be read, or is damaged.
        """
        numbers = self.rounds()
        if not numbers or (number is not None and number not in numbers):
            return None
        chosen = numbers[-1] if number is None else number
        folder, advice = self._path(chosen), self._without(chosen)
        trees, facts = read_tree(folder / "server.safetensors", advice), read_facts(folder / "run.json", advice)
        try:
            return Run(
                params=tree.bundled(tree.branch(trees, "params")),
                states=tuple(tree.branch(trees, f"state{place}") for place in range(facts["states"])),
                round=facts["round"],
                key=Key(facts["key"]),
                totals=Totals(**facts["totals"]),
                best=tuple(facts["best"]) if facts["best"] else None,
                pending=facts["pending"],
                shift=Shift.of(trees, facts["shift"]),
                seen=facts["seen"],
                remembered=facts.get("remembered", {}),
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RunError(f"{folder}/run.json cannot be read ({error}); {advice}") from error

    def _without(self, number: int) -> str:
        """What to do where a checkpoint cannot be used."""
        earlier = [saved for saved in self.rounds() if saved < number]
        if earlier:
            return f"delete {self._path(number)} to go on from {self._path(earlier[-1]).name}, the one before it"
        return "no checkpoint before it is left, so bring it back from a copy, or start again with another --out"

    def _path(self, number: int) -> Path:
        return self._folder / f"round-{number:06d}"


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
        return tuple(tree.branch(trees, f"memory{place}") for place in range(stages))

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
            trees |= tree.join(**{f"memory{place}": memory})
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
        plain = client.isprintable() and not set(client) & set('\\/:*?"<>|')
        if client in ("", ".", "..") or not plain or len(client.encode()) > MOST_NAME_BYTES:
            raise RunError(f"client {client!r} cannot name a folder; use letters, digits, '_', '.' and '-', at most 64")
        return self._folder / client / f"{version:06d}.safetensors"
