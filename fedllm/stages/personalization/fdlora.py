"""FDLoRA: each client's own LoRA first, their mean as the shared one, and outer steps on it from then on.

    round 0            the personal branch trains alone; the server's shared branch becomes their mean
    round 1 .. T - 2   the shared branch trains alone and is averaged; in every H-th round the personal branch becomes a
                       copy of what the client has just trained
    round T - 1        nothing trains: each client looks for the two factors of the mix (`mixer: fused`)

arXiv:2406.07925, second hand: from a reading of algorithm 1 and a reimplementation, whose faults are not repeated
(copies every H-th round and not in all others; the personal branch of round 0 is kept). The outer optimiser is the
stage `nesterov` with `start: 1`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedllm.errors import require
from fedllm.messages.context import ClientContext
from fedllm.messages.traits import Bracket, Fact, Traits
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.stages.personalization.branch_names import in_branch, twin
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class Fdlora(Stage):
    """Scratch: how far the personal branch was from the shared one, under the shared names. No setting makes it FedAvg:
    the first round trains something else.

    Stands before `keep`, which holds the personal branch and the mix.

    Args:
        every: H, rounds between two copies. fuse: whether the last round is for the mix. own, shared: the two branches.
    """

    every: int = 5
    fuse: bool = True
    own: str = "personal"
    shared: str = "shared"

    traits = Traits(Bracket.LOCAL, loses=Fact.SAME_TENSORS | Fact.ANY_RANK, adapter="multi_lora")

    def __post_init__(self) -> None:
        require(self.every >= 1, self, field="every", value=self.every, allowed="1 or more")

    def trains_in_round(self, name: str, round: int, rounds: int) -> bool:
        """The personal branch in round 0, the mix in the last one, the shared branch between."""
        last = self.fuse and round == rounds - 1
        if in_branch(name, self.own):
            return round == 0 and not last
        return round > 0 and not last if in_branch(name, self.shared) else last

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Note how far the two branches are apart."""
        return params, {name: params[own] - params[name] for own, name in twin(params, self.own, self.shared)}

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Of round 0, what the personal branch came to in place of the shared one; where a copy is due, that one."""
        delta, round = update.parts.get("delta"), local.ctx.round
        if delta is None:
            return update, memory
        found = dict(delta.tree)
        for own, name in twin(self._names(scratch), self.own, self.shared):
            if own in delta.tree:
                found[name] = scratch[name] + delta.tree[own]
            elif name in delta.tree and round % self.every == 0:
                found[own] = delta.tree[name] - scratch[name]
        return update.having("delta", replace(delta, tree=found)), memory

    def _names(self, scratch: Tree) -> list[str]:
        """Those of both branches."""
        return [*scratch, *(name.replace(f".{self.shared}.", f".{self.own}.") for name in scratch)]
