"""The product of a frozen linear layer with the low-rank adapters of K clients, and its gradient, by hand.

    y = x W^T + bias + s z B_k^T          z = u A_k^T                  x, u: (T, in), rows client by client; u is x, or
    dx = dy W   du = dz A_k               dz = s dy B_k                what dropout left of it
    dA_k = dz^T u   dB_k = s dy^T z

The products with W run over all rows at once; those with A and B run over one client's rows each, so what one client
holds, a NaN as well, reaches no other. Padding a client's rank with zeros adds zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def low_rank(
    x: Tensor,
    dropped: Tensor | None,
    frozen: tuple[Tensor, Tensor | None],
    factors: tuple[Tensor, Tensor],
    sizes: Sequence[int],
    scale: float,
) -> Tensor:
    """(T, in) rows, `sizes[k]` of them client k's, to (T, out).

    Args:
        dropped: u; None if it is x. frozen: W (out, in), and the bias (out,) or None.
        factors: A (K, rank, in) and B (K, out, rank), in the type in which they train.
    """
    y: Tensor = _LowRank.apply(x, dropped, *frozen, *factors, sizes, scale)  # type: ignore[no-untyped-call]
    return y


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        sizes: Sequence[int],
        scale: float,
    ) -> Tensor:
        u, a, b = x if dropped is None else dropped, a.to(x.dtype), b.to(x.dtype)
        y, low = torch.nn.functional.linear(x, weight, bias), []
        for k, own in enumerate(_rows(sizes)):
            low.append(u[own] @ a[k].T)
            y[own].addmm_(low[k], b[k].T, alpha=scale)
        ctx.save_for_backward(u, weight, a, b, *low)
        ctx.sizes, ctx.scale = sizes, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, a, b, *low = ctx.saved_tensors
        needs_x, needs_dropped, *_ = ctx.needs_input_grad
        dx = dy @ weight if needs_x else None
        du = torch.empty_like(u) if needs_dropped else None
        da, db = torch.empty_like(a), torch.empty_like(b)
        for k, own in enumerate(_rows(ctx.sizes)):
            dy_k = dy[own]
            torch.mm(dy_k.T, low[k], out=db[k]).mul_(ctx.scale)
            dz = (dy_k @ b[k]).mul_(ctx.scale)
            torch.mm(dz.T, u[own], out=da[k])
            if du is not None:
                torch.mm(dz, a[k], out=du[own])
            elif dx is not None:
                dx[own].addmm_(dz, a[k])
        return dx, du, None, None, da, db, None, None


def _rows(sizes: Sequence[int]) -> list[slice]:
    """Client k's rows."""
    return [slice(*edges) for edges in pairwise([0, *accumulate(sizes)])]
