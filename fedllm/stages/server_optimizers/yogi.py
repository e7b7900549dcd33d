"""FedYogi: Adam on the server whose second moment moves by at most the newest square.

    m <- beta1 m + (1 - beta1) Δ        v <- v - (1 - beta2) Δ² sign(v - Δ²)
    params += server_lr m / (sqrt(v) + tau)

Reddi et al. 2021, algorithm 2, arXiv 2003.00295.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.stages.server_optimizers.moments import Adaptive


@dataclass(frozen=True)
class Yogi(Adaptive):
    """State: m (from 0) and v (from tau²), in the shapes of the delta.

    Neutral, to the bit: `Yogi(beta1=0, beta2=1, tau=0.5, server_lr=1)`. With beta2 = 1 v stays tau², the denominator
    2 tau, and server_lr = 2 tau gives Δ. For beta2 < 1 no setting equals FedAvg exactly.

    Args:
        beta1: share of the old direction that is kept, in [0, 1).
        beta2: 1 - beta2 is the share of the newest square that v moves by, in [0, 1].
        tau: floor of the step's denominator: how adaptive the step is (smaller: more).
        server_lr: length of the server's step.
    """

    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    server_lr: float = 1e-3

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """A step of (1 - beta2) Δ² towards the newest square."""
        return v - (1 - self.beta2) * square * torch.sign(v - square)
