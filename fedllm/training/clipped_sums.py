"""The sum of the clipped gradients of a client's examples, in whole steps of a grid.

    x_i = round(g_i min(1, C' / |g_i|) / u)    u = C / S    S = 2^k >= 2^11 sqrt(d), and 2^20 at least    |x_i| <= S
    C' = C (1 - sqrt(d) / (2 S)) (1 - 2^-20)

g_i: the gradient of example i over all d values that train, in one vector. Rounding moves each value by half a step at
most, so |x_i| by sqrt(d) / 2: C' leaves room for it, and for the rounding of the product in float32 (2 x 2^-24). So
one example more or less moves the sum by S steps, which are C, at most, and the integers are exact in float64: no order
of adding shows. Noise is added to integers because the last bits of floating-point sums tell what was added (Mironov
2012, 10.1145/2382196.2382264).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 20  # bits of S
ROOM = 11  # bits of S above those of sqrt(d): clipping to C' in place of C costs 2^-12 at most
SLACK = 2.0**-20
PIECE = 1 << 16  # values of each example at once: a dozen examples of them stay in the cache


@dataclass(frozen=True)
class Clip:
    """How a client's examples are clipped. `norm`: C; `size`: d; `on_grid`: False without noise, when the sum is that
    of g_i min(1, C / |g_i|)."""

    norm: float
    size: int
    on_grid: bool

    @property
    def levels(self) -> int:
        """S: steps of the grid in C."""
        return 1 << max(LEAST, ROOM + math.ceil(math.log2(max(1, self.size)) / 2))

    @property
    def unit(self) -> float:
        """u: what 1 in the sum stands for."""
        return self.norm / self.levels if self.on_grid else 1.0

    @property
    def bound(self) -> float:
        """C': the longest gradient that is added as it is."""
        if not self.on_grid:
            return self.norm
        return self.norm * (1 - math.sqrt(self.size) / (2 * self.levels)) * (1 - SLACK)

    def add(self, total: Tensor, gradients: Tensor) -> None:
        """Add the clipped gradients (n, P) of n examples to `total` (P,), float64, in steps of `unit`.

        A gradient that is not finite counts as zeros, for a client that fails would tell that it has such an example.
        """
        lengths = norms(gradients)
        broken = ~torch.isfinite(lengths)
        if bool(broken.any()):
            gradients[broken], lengths[broken] = 0, 0
        factors = self.bound / lengths.clamp(min=self.bound) / self.unit
        factors = factors.to(torch.promote_types(gradients.dtype, torch.float32))[:, None]
        for place, piece in zip(total.split(PIECE), gradients.split(PIECE, 1), strict=True):
            scaled = piece * factors
            place += (scaled.round_() if self.on_grid else scaled).sum(0, dtype=torch.float64)


def norms(gradients: Tensor) -> Tensor:
    """(n,): the 2-norms of n rows, in float64."""
    squares = torch.zeros(len(gradients), dtype=torch.float64, device=gradients.device)
    for piece in gradients.split(PIECE, 1):
        squares += torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64).square()
    return squares.sqrt()
