"""Checkpoints of the server: whole or absent."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from fedllm.engines.checksummed_files import RESUME, read_facts, read_tree, with_sum, written
from fedllm.errors import RunError
from fedllm.files import atomic_folder, remove_folder, write_durably
from fedllm.rng import Key
from fedllm.runs.state import ServerState, Totals
from fedllm.tensors import tree
from fedllm.tensors.base_delta import BaseDelta


class Checkpoints:
    """`checkpoints/round-N/`: `server.safetensors` and `run.json`, written beside and renamed into place."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self._folder, self._keep_last = folder, keep_last

    def rounds(self) -> list[int]:
        """The saved ones, oldest first."""
        found = (re.fullmatch(r"round-(\d+)", path.name) for path in self._folder.glob("round-*"))
        return sorted(int(match[1]) for match in found if match)

    def save(self, run: ServerState) -> None:
        """Save; then drop what is neither the best nor among the last ones.

        Raises:
            RunError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        trees = tree.add_prefix(params=run.params)
        for place, state in enumerate(run.states):
            trees |= tree.add_prefix(**{f"state{place}": state})
        trees |= run.base_delta.joined_trees()
        facts = {
            "round": run.round,
            "key": run.key.value,
            "states": len(run.states),
            "totals": asdict(run.totals),
            "best": run.best,
            "pending": list(run.pending),
            "base_delta": list(run.base_delta.steps),
            "seen": dict(run.seen),
            "remembered": dict(run.remembered),
            "spent": list(run.spent),
        }
        with atomic_folder(self._path(run.round), RESUME) as folder:
            write_durably(folder / "server.safetensors", written(trees))
            write_durably(folder / "run.json", with_sum(facts).encode())
        kept = {*self.rounds()[-self._keep_last :], *([run.best[0]] if run.best else [])}
        for number in self.rounds():
            if number not in kept:
                remove_folder(self._path(number))

    def load(self, number: int | None = None) -> ServerState | None:
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
            return ServerState(
                params=tree.flatten(tree.select_prefix(trees, "params")),
                states=tuple(tree.select_prefix(trees, f"state{place}") for place in range(facts["states"])),
                round=facts["round"],
                key=Key(facts["key"]),
                totals=Totals(**facts["totals"]),
                best=tuple(facts["best"]) if facts["best"] else None,
                pending=facts["pending"],
                base_delta=BaseDelta.of(trees, facts["base_delta"]),
                seen=facts["seen"],
                remembered=facts.get("remembered", {}),
                spent=facts.get("spent", []),
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
