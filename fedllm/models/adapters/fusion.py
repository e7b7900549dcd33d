"""Two factors that fuse two LoRAs into one, found without gradients.

    A = w_1 A_1 + w_2 A_2        B = w_1 B_1 + w_2 B_2
    w = argmin loss(w) + penalty (|w_1| + |w_2|) / 2        on a few examples, w in [-reach, reach]^2

A compass search: from the best of some starting points, steps in four directions that become smaller. All points of a
step are the clients of one stack. FDLoRA's AdaFusion, arXiv:2406.07925, which takes another gradient-free optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STARTS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
STEPS = (0.5, 0.25, 0.125)
PENALTY, REACH = 0.05, 1.5

Losses = Callable[[Tensor], Tensor]  # (n, 2) factors to (n,) losses


def fused(first: Tensor, second: Tensor, factors: Tensor) -> Tensor:
    """(K, ...) tensors of two branches and (K, 2) factors; where both factors are zero nobody has looked for them, and
    the first branch counts in full."""
    unset = (factors == 0).all(1, keepdim=True)
    w = torch.where(unset, torch.tensor([1.0, 0.0], dtype=factors.dtype, device=factors.device), factors).to(first)
    shape = (-1, *([1] * (first.dim() - 1)))
    return w[:, 0].view(shape) * first + w[:, 1].view(shape) * second


def search(losses: Losses) -> tuple[float, float]:
    """The factors. Both zero is the base model, which is never the answer: nobody would need adapters then."""
    known: dict[tuple[float, float], float] = {}

    def look(points: Sequence[tuple[float, float]]) -> None:
        new = [point for point in dict.fromkeys(points) if point not in known and any(point)]
        if new:
            w = torch.tensor(new, dtype=torch.float64)
            found = losses(w).double() + PENALTY * w.abs().sum(1).to("cpu") / 2
            known.update({point: float(value) for point, value in zip(new, found, strict=True)})

    look(STARTS)
    for step in STEPS:
        x, y = min(known, key=lambda point: known[point])
        around = [(x + step, y), (x - step, y), (x, y + step), (x, y - step)]
        look([(max(-REACH, min(REACH, a)), max(-REACH, min(REACH, b))) for a, b in around])
    return min(known, key=lambda point: known[point])
