"""FedAvgM: the server steps along a running mean of the mean deltas.

    v <- beta v + (1 - beta) Δ        params += server_lr v

Hsu et al. 2019, arXiv 1909.06335, with the running mean of OpenFedLLM (Ye et al. 2024, arXiv 2402.06954);
Hsu et al. write v <- beta v + Δ, which is this with server_lr = 1 / (1 - beta).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.errors import require
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.stages.server_optimizers import moments
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class Momentum(Stage):
    """State: v, in the shapes of the delta, from 0. Neutral, to the bit: `Momentum(beta=0, server_lr=1)`.

    Args:
        beta: share of the old direction that is kept, in [0, 1).
        server_lr: length of the server's step.
    """

    beta: float = 0.9
    server_lr: float = 1.0

    traits = moments.TRAITS

    def __post_init__(self) -> None:
        require(0 <= self.beta < 1, self, field="beta", value=self.beta, allowed="at least 0 and below 1")
        moments.check_server_lr(self, self.server_lr)

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The mean delta becomes the step."""
        return moments.apply_rule(total, state, self._step)

    def _step(self, delta: Tree, state: Tree) -> tuple[Tree, Tree]:
        velocity = moments.ema(moments.init_moment(state, delta), delta, self.beta)
        return tree.scale(velocity, self.server_lr), {**state, **velocity}
