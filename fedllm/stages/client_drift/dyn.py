"""FedDyn: each client's loss is bent until all clients agree on the optimum of their mean.

    client   grad <- grad - h_k + alpha (w - w_0)        h_k <- h_k - alpha Δ_k
    server   h <- h - alpha (1/N) sum_k Δ_k              params += mean_k Δ_k - h / alpha

Acar et al. 2021, algorithm 1, arXiv 2111.04263. N: the population.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fedllm.errors import require
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import CONTROL, DELTA, OWN_STEP, SAME_DELTA, Fact, Traits
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class Dyn(Stage):
    """State: h. Memory: h_k. Both from 0. Scratch: "h/.." is h_k and "anchor/.." is w_0.

    The sum over the clients is the decoded mean times its total weight, so every client must weigh the same. A round
    that nobody answered changes nothing. No settings give FedAvg: the server's step has no limit at alpha = 0.

    h is -alpha / N times the sum of all deltas, as each h_k is -alpha times the sum of its client's. What changes the
    deltas on their way from the local steps to the server's sum makes h another than the mean of the h_k: a stage that
    does so is refused, and so is a server's step beside this one's.

    Args:
        alpha: strength of the regulariser, above 0; 0.01 is the value of the authors' CIFAR-10 example, and the
            paper tunes it by data set.
        allow: local optimisers beside "sgd" that the experiment permits, such as "momentum" or "adamw".
    """

    alpha: float = 0.01
    allow: tuple[str, ...] = ()

    @property
    def traits(self) -> Traits:
        """Derived for plain SGD, and for what `allow` adds."""
        return Traits(
            takes=DELTA,
            needs=CONTROL | Fact.EQUAL_WEIGHTS | Fact.EQUAL_COMPONENTS | Fact.SUM_OF_DELTAS | Fact.ONLY_STEP,
            keeps=SAME_DELTA,
            loses=OWN_STEP,
            optimizers=frozenset({"sgd", *self.allow}),
        )

    def __post_init__(self) -> None:
        require(0 < self.alpha < math.inf, self, field="alpha", value=self.alpha, allowed="above 0 and finite")

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """The client's h_k and the anchor w_0."""
        own = {name: memory[name] if name in memory else torch.zeros_like(leaf) for name, leaf in params.items()}
        return params, tree.add_prefix(h=own, anchor=params)

    def grads(self, grads: Tree, params: Tree, scratch: Tree) -> Tree:
        """The gradient of the client's bent loss."""
        return {
            name: grad - scratch[f"h/{name}"] + self.alpha * (params[name] - scratch[f"anchor/{name}"])
            for name, grad in grads.items()
        }

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Move h_k; the update is sent as it is."""
        delta = update.parts.get("delta")
        if delta is None:
            return update, memory
        own = {name: leaf for name, leaf in tree.select_prefix(scratch, "h").items() if name in delta.tree}
        return update, {**memory, **{name: leaf - self.alpha * delta.tree[name] for name, leaf in own.items()}}

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Move h by the sum over the cohort, and step to the mean minus h / alpha."""
        part = total.parts.get("delta")
        if part is None or not part.weight:
            return total, state
        share = self.alpha * part.weight / ctx.population
        moved = {name: -share * leaf for name, leaf in part.tree.items()}
        moved = {name: state[name] + leaf if name in state else leaf for name, leaf in moved.items()}
        step = {name: leaf - moved[name] / self.alpha for name, leaf in part.tree.items()}
        return total.having("delta", replace(part, tree=step)), {**state, **moved}
