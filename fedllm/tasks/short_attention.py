"""Attention within each of several short sequences of a row, and its gradient, by plain products.

    P = softmax(s Q K^T + bias)    O = P V           bias: 0 where a position sees another one, else minus infinity
    dV = P^T dO    dP = dO V^T    dS = P (dP - rowsum(P dP))    dQ = s dS K    dK = s dS^T Q

The g query heads of a key head become g rows for each of its positions, so that a sequence takes one batched product
over its key heads. The probabilities are kept for the gradient: on a CPU this beats the fused kernel, which computes
them again, as long as they are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float, window: int | None
) -> Tensor:
    """(heads, T, d) queries, (key heads, T, d) keys and (key heads, T, e) values of a row to (T, heads, e)."""
    out: Tensor = _Short.apply(query, key, value, lengths, scaling, window)  # type: ignore[no-untyped-call]
    return out


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Sequence[int],
        scaling: float,
        window: int | None,
    ) -> Tensor:
        groups = len(query) // len(key)
        q, k, v = _folded(query, groups), key.contiguous(), value.contiguous()
        out, kept = q.new_empty(*q.shape[:2], v.shape[2]), []
        for at, end in pairwise([0, *accumulate(lengths)]):
            rows = slice(at * groups, end * groups)
            scores = torch.baddbmm(
                bias(end - at, window, groups, q.dtype, q.device), q[:, rows], k[:, at:end].mT, alpha=scaling
            )
            kept.append(scores.softmax(-1))
            torch.bmm(kept[-1], v[:, at:end], out=out[:, rows])
        ctx.save_for_backward(q, k, v, *kept)
        ctx.lengths, ctx.scaling = lengths, scaling
        return out.view(len(k), -1, groups, v.shape[2]).transpose(0, 1).reshape(-1, len(query), v.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        groups = q.shape[1] // k.shape[1]
        do = _folded(grad.transpose(0, 1), groups)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for p, (at, end) in zip(kept, pairwise([0, *accumulate(ctx.lengths)]), strict=True):
            rows, own = slice(at * groups, end * groups), slice(at, end)
            torch.bmm(p.mT, do[:, rows], out=dv[:, own])
            dp = torch.bmm(do[:, rows], v[:, own].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scaling)
            torch.bmm(ds, k[:, own], out=dq[:, rows])
            torch.bmm(ds.mT, q[:, rows], out=dk[:, own])
        return _unfolded(dq, groups), dk, dv, None, None, None


def _folded(states: Tensor, groups: int) -> Tensor:
    """(heads, T, d) to (key heads, T * groups, d)."""
    heads, length, size = states.shape
    return states.view(heads // groups, groups, length, size).transpose(1, 2).reshape(heads // groups, -1, size)


def _unfolded(states: Tensor, groups: int) -> Tensor:
    """(key heads, T * groups, d) to (heads, T, d)."""
    heads, rows, size = states.shape
    return states.view(heads, rows // groups, groups, size).transpose(1, 2).reshape(heads * groups, -1, size)


@lru_cache(maxsize=256)
def bias(length: int, window: int | None, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length * groups, length): each position's row `groups` times."""
    place = torch.arange(length, device=device)
    behind = place[:, None] - place
    hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
    rows = torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    return rows.repeat_interleave(groups, 0)
