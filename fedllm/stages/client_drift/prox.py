"""FedProx: pull every local step back towards where the round began.

    grad <- grad + mu (w - w_0)        the gradient of mu/2 ||w - w_0||²

Li et al. 2020, eq. 2, arXiv 1812.06127.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedllm.errors import require
from fedllm.messages.context import ClientContext
from fedllm.messages.traits import Fact, Traits
from fedllm.stages.base import Stage
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class Prox(Stage):
    """Scratch: the anchor w_0, the parameters as this stage received them. Neutral, to the bit: `Prox(mu=0)`.

    Args:
        mu: strength of the pull, at least 0.
    """

    mu: float = 0.01

    traits = Traits(needs=Fact.GRADIENTS)

    def __post_init__(self) -> None:
        require(0 <= self.mu < math.inf, self, field="mu", value=self.mu, allowed="at least 0 and finite")

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Remember the anchor until the round ends."""
        return params, params

    def grads(self, grads: Tree, params: Tree, scratch: Tree) -> Tree:
        """Add the pull."""
        if self.mu == 0:
            return grads
        return {name: grad + self.mu * (params[name] - scratch[name]) for name, grad in grads.items()}
