"""SCAFFOLD: control variates take the drift out of the local steps.

    grad <- grad + c - c_k        c_k' = c_k - c - Δ_k / (K lr)        c <- c + (1/N) sum_k (c_k' - c_k)

Karimireddy et al. 2020, algorithm 1 with option II, arXiv 1910.06378. N: the population.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import CONTROL, DELTA, SAME_DELTA, Fact, Traits
from fedllm.messages.update import Part, Update
from fedllm.stages.base import Stage
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class Scaffold(Stage):
    """State: c. Memory: c_k. Both from 0. Scratch: c - c_k. Part "control": c_k' - c_k, a plain sum.

    K lr is the sum of the round's learning rates, which is right for any schedule of plain SGD; with other local
    rules c_k' is no mean of gradients, so the stage is derived for "sgd" and what `allow` adds. The fixed point is the
    optimum of the *unweighted* mean of the clients' losses, whatever the weights. No settings give FedAvg; with one
    client the correction is 0 up to rounding. Stages that change the delta stand behind this one.

    The control is sent as it is: c is the mean of the c_k that the clients remember, and a rounding on the way would
    stay in the difference for good, as a bias of the optimum.

    Args:
        allow: further local optimisers that the experiment permits, such as "momentum" or "adamw".
    """

    allow: tuple[str, ...] = ()

    @property
    def traits(self) -> Traits:
        """Derived for plain SGD, and for what `allow` adds."""
        return Traits(
            takes=DELTA,
            makes=frozenset({"control"}),
            needs=CONTROL,
            keeps=SAME_DELTA,
            loses=Fact.ANY_RANK,
            optimizers=frozenset({"sgd", *self.allow}),
        )

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """Send c, always in the shapes of the parameters."""
        return params, {name: state[name] if name in state else torch.zeros_like(p) for name, p in params.items()}

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """The round's correction c - c_k."""
        return params, {name: leaf - memory[name] if name in memory else leaf for name, leaf in extra.items()}

    def grads(self, grads: Tree, params: Tree, scratch: Tree) -> Tree:
        """Correct the drift."""
        return {name: grad + scratch[name] if name in scratch else grad for name, grad in grads.items()}

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Add the change of the client's control; a client that took no step keeps its control."""
        delta = update.parts.get("delta")
        if delta is None:
            return update, memory
        moved = local.facts["steps"] > 0 and local.facts["lr_sum"] > 0
        old = {name: memory.get(name, torch.zeros_like(leaf)) for name, leaf in delta.tree.items() if name in scratch}
        new = {name: -scratch[name] - delta.tree[name] / local.facts["lr_sum"] for name in old} if moved else old
        change = {name: leaf - old[name] for name, leaf in new.items()}
        return update.having("control", Part(change, 0.0, exact=True)), {**memory, **new}

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Move c by the sum over the cohort, over the population."""
        control = total.parts.get("control")
        if control is None:
            return total, state
        moved = {name: leaf / ctx.population for name, leaf in control.tree.items()}
        moved = {name: state[name] + leaf if name in state else leaf for name, leaf in moved.items()}
        return total.without("control"), {**state, **moved}
