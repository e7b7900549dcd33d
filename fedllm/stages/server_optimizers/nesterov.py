"""DiLoCo's outer optimiser: SGD with Nesterov momentum on the pseudo-gradient -Δ.

    b <- momentum b + Δ        params += server_lr (Δ + momentum b)

Douillard et al. 2023, arXiv 2311.08105. The same steps as torch.optim.SGD(nesterov=True) without dampening.
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
class Nesterov(Stage):
    """State: b, in the shapes of the delta, from 0. Neutral, to the bit: `Nesterov(server_lr=1, momentum=0)`.

    Args:
        server_lr: the outer learning rate.
        momentum: of the outer steps, in [0, 1).
        start: rounds before this one move by the plain mean.
    """

    server_lr: float = 0.7
    momentum: float = 0.9
    start: int = 0

    traits = moments.TRAITS

    def __post_init__(self) -> None:
        moments.check_server_lr(self, self.server_lr)
        allowed = "at least 0 and below 1"
        require(0 <= self.momentum < 1, self, field="momentum", value=self.momentum, allowed=allowed)
        require(self.start >= 0, self, field="start", value=self.start, allowed="0 or more")

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The mean delta becomes the step."""
        if ctx.round < self.start:
            return total, state
        return moments.apply_rule(total, state, self._step)

    def _step(self, delta: Tree, state: Tree) -> tuple[Tree, Tree]:
        buffer = tree.add(delta, moments.init_moment(state, delta), self.momentum)
        ahead = tree.add(delta, buffer, self.momentum)
        return tree.scale(ahead, self.server_lr), {**state, **buffer}
