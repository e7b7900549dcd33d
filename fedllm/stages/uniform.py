"""The plain mean: every client that answers counts the same.

    Δ = (1 / K) sum_k Δ_k        K: clients that answered
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedllm import weights
from fedllm.stage import Bracket, Stage
from fedllm.tree import Tree
from fedllm.update import Ctx, Local, Update


@dataclass(frozen=True)
class Uniform(Stage):
    """Weight 1 for every client; the sum of the weights is the number of clients that answered.

    Neutral: this is FedAvg for clients with equal numbers of examples.
    """

    bracket: ClassVar[Bracket] = Bracket.WEIGH

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: Local) -> tuple[Update, Tree]:
        """Weight 1."""
        return weights.weigh(update, 1.0), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: Ctx) -> tuple[Update, Tree]:
        """Over the sum of the weights, which the parts keep."""
        return weights.divide(total), state
