"""The server's state: all that a run needs to go on to the bit, beside the clients' memories.

`checkpoints` saves it; `engines/client_store.py` holds the memories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedllm.rng import Key
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.tree import Tree


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
class ServerState:
    """The server's state after `round` complete rounds.

    `best` is (completed rounds, value) of the best evaluation so far; `pending` are events, as the log writes them,
    that belong to the checkpoint and follow it in the log. `base_delta`: what was added to the frozen weights; `seen`:
    the version of it that each client has, where it is not 0. `remembered`: the newest version of each client's memory,
    where it has one. `spent`: what was released, in the records of the privacy journal.
    """

    params: Tree
    states: tuple[Tree, ...]
    round: int
    key: Key
    totals: Totals = Totals()
    best: tuple[int, float] | None = None
    pending: Sequence[Mapping[str, Any]] = field(default_factory=list)
    base_delta: BaseDelta = BaseDelta()
    seen: Mapping[str, int] = field(default_factory=dict)
    remembered: Mapping[str, int] = field(default_factory=dict)
    spent: Sequence[Mapping[str, Any]] = field(default_factory=list)
