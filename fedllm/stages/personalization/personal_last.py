"""Federated rounds first, and then each client tunes a copy of what they came to.

    rounds 0 .. T - n - 1    the shared branch trains and is averaged
    round T - n              the personal branch begins with the shared one's values
    rounds T - n .. T - 1    the personal branch trains alone; nothing is sent

FedDPA-F, arXiv:2403.19211 (algorithm 1, as quoted second hand; the released code has the iterative form alone).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedllm.errors import require
from fedllm.messages.context import ClientContext
from fedllm.messages.traits import Bracket, Fact, Traits
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.stages.personalization.branch_names import in_branch, twin
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class PersonalLast(Stage):
    """Scratch: how far the copy is from where the personal branch stood. No setting makes it FedAvg: there is always a
    last round.

    Stands before `keep`, which holds the personal branch.

    Args:
        rounds: how many of the last rounds are personal. own, shared: the two branches.
    """

    rounds: int = 1
    own: str = "personal"
    shared: str = "shared"

    traits = Traits(Bracket.LOCAL, loses=Fact.SAME_TENSORS, adapter="multi_lora")

    def __post_init__(self) -> None:
        require(self.rounds >= 1, self, field="rounds", value=self.rounds, allowed="1 or more")

    def trains_in_round(self, name: str, round: int, rounds: int) -> bool:
        """The shared branch in the first rounds, what is the client's own in the last ones."""
        return in_branch(name, self.shared) == (round < rounds - self.rounds)

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """In the first personal round, begin with the shared branch's values."""
        if local.ctx.round != local.ctx.rounds - self.rounds:
            return params, {}
        copy = {own: params[name] for own, name in twin(params, self.own, self.shared)}
        return {**params, **copy}, tree.sub(copy, {name: params[name] for name in copy})

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Count the copy as moved, so that `keep` remembers where the branch has come to."""
        delta = update.parts.get("delta")
        if delta is None or not scratch:
            return update, memory
        moved = {name: leaf + delta.tree[name] for name, leaf in scratch.items() if name in delta.tree}
        return update.having("delta", replace(delta, tree={**delta.tree, **moved})), memory
