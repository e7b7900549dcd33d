"""FedAdagrad: a server step whose size falls with the sum of all squared mean deltas.

    m <- beta1 m + (1 - beta1) Δ        v <- v + Δ²        params += server_lr m / (sqrt(v) + tau)

Reddi et al. 2021, algorithm 2, arXiv 2003.00295.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedllm.messages.context import RoundContext
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.stages.server_optimizers import moments
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class Adagrad(Stage):
    """State: m (from 0) and v (from tau²), in the shapes of the delta.

    Near FedAvg: with beta1 = 0 and server_lr = 2 tau the step tends to Δ as tau grows, because then v stays tau².
    Neutral, to the bit, while no entry of Δ exceeds 2¹³: `Adagrad(beta1=0, tau=2.0**40, server_lr=2.0**41)`,
    where Δ² is lost in the rounding of v, also in float64.

    Args:
        beta1: share of the old direction that is kept, in [0, 1).
        tau: floor of the step's denominator: how adaptive the step is (smaller: more).
        server_lr: length of the server's step.
    """

    beta1: float = 0.9
    tau: float = 1e-3
    server_lr: float = 1e-3

    traits = moments.TRAITS

    def __post_init__(self) -> None:
        moments.check_adaptive(self, beta1=self.beta1, tau=self.tau, server_lr=self.server_lr)

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The mean delta becomes the step."""
        return moments.adaptive(total, state, _second, beta1=self.beta1, tau=self.tau, server_lr=self.server_lr)


def _second(v: Tensor, square: Tensor) -> Tensor:
    return v + square
