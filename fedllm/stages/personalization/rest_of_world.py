"""Each client's own LoRA, never overwritten, beside the mean of everybody else's.

    rest_k = (sum_m own_m - own_k) / (n - 1)        n: clients that have sent theirs, each with its latest

A client sends how far its own has moved since it last sent it, the server adds up, and the client takes its own out of
the mean by itself. So the server needs nothing but sums. With one client there is no rest, and the branch is zero.

FedALT, arXiv:2503.11880, whose mean over the others is uniform and of the factors. Of absent clients the latest one
counts, which the paper leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import OWN_STEP, Bracket, Fact, Traits
from fedllm.messages.update import Part, Update
from fedllm.stages.base import Stage
from fedllm.stages.personalization.branch_names import in_branch, twin
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree

JOINED = "joined"


@dataclass(frozen=True)
class RestOfWorld(Stage):
    """State: how many clients have sent theirs; the server's `rest` branch is the mean over all of them. Memory: what
    the client has sent last. Scratch: its own at the start of the round. No setting makes it FedAvg: what is
    averaged never comes back as a client's own.

    Where a stage behind it rounds, adds noise or sends the largest entries alone, what it leaves out is missing in the
    rest, and so is an update that is lost on its way. Stands before `keep`, which holds the own branch, and
    `task.scope.hold` keeps the rest from training.

    Args:
        own, rest: the two branches.
    """

    own: str = "personal"
    rest: str = "shared"

    traits = Traits(
        Bracket.LOCAL,
        makes=frozenset({JOINED}),
        needs=Fact.EQUAL_WEIGHTS | Fact.SERVER_STATE | Fact.ONLY_STEP,
        loses=OWN_STEP,
        adapter="multi_lora",
    )

    def personal(self, params: Tree, memory: Tree, state: Tree, client: str) -> Tree:
        """The mean over the others."""
        return self._without_own(params, memory, _count(state))

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """The mean over all, and how many they are."""
        return params, {"clients": _count(state)}

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Take the client's own out of the mean."""
        own = {name: params[mine] for mine, name in twin(params, self.own, self.rest)}
        return {**params, **self._without_own(params, memory, _count(extra))}, own

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """How far the client's own has moved since it was last sent, under the names of the rest."""
        delta = update.parts.get("delta")
        if delta is None:
            return update, memory
        own = {name: self._own_name(name) for name in scratch}
        now = {n: leaf + delta.tree[own[n]] if own[n] in delta.tree else leaf for n, leaf in scratch.items()}
        sent = {name: leaf - memory[name] if name in memory else leaf for name, leaf in now.items()}
        first = Part({JOINED: torch.tensor(float(not memory), dtype=torch.float64)}, 0.0)
        return update.having("delta", replace(delta, tree={**delta.tree, **sent})).having(JOINED, first), now

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The mean over all clients that have ever sent theirs, from how far those of this round have moved."""
        delta, joined = total.parts.get("delta"), total.parts.get(JOINED)
        if delta is None or joined is None:
            return total, state
        before = _count(state)
        now = before + joined.tree[JOINED]
        if not float(now):
            return total.without(JOINED), state
        weight = float(delta.weight or 0.0)
        sums = {name: leaf * weight for name, leaf in delta.tree.items() if in_branch(name, self.rest)}
        steps = {
            name: ((params[name].double() * before + leaf.double()) / now - params[name]).to(leaf.dtype)
            for name, leaf in sums.items()
        }
        whole = replace(delta, tree={**delta.tree, **steps})
        return total.having("delta", whole).without(JOINED), {"clients": now}

    def _without_own(self, params: Tree, memory: Tree, clients: torch.Tensor) -> Tree:
        """The rest of the world of one client; zero where there is none."""
        n = float(clients)
        others = n - 1 if memory else n
        found = {name: leaf for name, leaf in params.items() if in_branch(name, self.rest)}
        if others < 0.5:
            return tree.zeros_like(found)
        return {
            name: ((leaf.double() * n - memory[name].double()) / others).to(leaf.dtype) if memory else leaf
            for name, leaf in found.items()
        }

    def _own_name(self, name: str) -> str:
        return name.replace(f".{self.rest}.", f".{self.own}.")


def _count(state: Tree) -> torch.Tensor:
    return state.get("clients", torch.zeros((), dtype=torch.float64))
