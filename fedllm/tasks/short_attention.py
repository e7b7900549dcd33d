"""Attention within each of several short sequences of a row, and its gradient, by plain products.

    P = softmax(s Q K^T + bias)    O = P V           bias: 0 where a position sees another one, else minus infinity
    dV = P^T dO    dP = dO V^T    dS = P (dP - rowsum(P dP))    dQ = s dS K    dK = s dS^T Q

The g query heads of a key head become g rows for each of its positions. Sequences are padded with zeros to a few
lengths, and those of one length share a batched product: a causal mask hides the padding from every real position. The
probabilities are kept for the gradient; on a CPU this beats the fused kernel, which computes them again, as long as
they are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

STEP = 32  # lengths are padded to its multiples: few shapes, for a new one costs as much as ten products


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float, window: int | None
) -> Tensor:
    """(heads, T, d) queries, (key heads, T, d) keys and (key heads, T, e) values of a row to (T, heads, e)."""
    layout = _layout(tuple(lengths), query.device)
    out: Tensor = _Short.apply(query, key, value, layout, scaling, window)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True, eq=False)
class Layout:
    """How the sequences of a row are grouped. `groups`: (sequences, padded length) of each group; `rows` (R,): the
    position that stands at each padded place, T for none; `places` (T,): the padded place of each position."""

    groups: Sequence[tuple[int, int]]
    rows: Tensor
    places: Tensor


@lru_cache(maxsize=16)
def _layout(lengths: tuple[int, ...], device: torch.device) -> Layout:
    total, starts = sum(lengths), [0, *accumulate(lengths)]
    by_length: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        by_length.setdefault(-(-length // STEP) * STEP, []).append(sequence)
    rows = []
    for size, members in by_length.items():
        for sequence in members:
            own = torch.arange(starts[sequence], starts[sequence + 1])
            rows.append(torch.cat([own, torch.full((size - len(own),), total)]))
    found = torch.cat(rows)
    real = (found < total).nonzero().reshape(-1)
    places = torch.empty(total, dtype=torch.long)
    places[found[real]] = real
    groups = [(len(members), size) for size, members in by_length.items()]
    return Layout(groups, found.to(device), places.to(device))


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None
    ) -> Tensor:
        heads, groups = len(key), len(query) // len(key)
        q, k, v = (_grouped(states, layout, heads) for states in (query, key, value))
        outs, kept = [], []
        for q_n, k_n, v_n in zip(q, k, v, strict=True):
            mask = bias(k_n.shape[1], window, groups, q_n.dtype, q_n.device)
            kept.append(torch.baddbmm(mask, q_n, k_n.mT, alpha=scaling).softmax(-1))
            outs.append(torch.bmm(kept[-1], v_n))
        ctx.save_for_backward(*q, *k, *v, *kept)
        ctx.layout, ctx.scaling, ctx.heads = layout, scaling, heads
        return _ungrouped(outs, layout, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, heads, saved, n = ctx.layout, ctx.heads, ctx.saved_tensors, len(ctx.layout.groups)
        q, k, v, kept = (saved[at : at + n] for at in range(0, 4 * n, n))
        dq, dk, dv = [], [], []
        for q_n, k_n, v_n, p, do in zip(q, k, v, kept, _grouped(grad.transpose(0, 1), layout, heads), strict=True):
            dv.append(torch.bmm(p.mT, do))
            ds = torch._softmax_backward_data(torch.bmm(do, v_n.mT), p, -1, p.dtype).mul_(ctx.scaling)
            dq.append(torch.bmm(ds, k_n))
            dk.append(torch.bmm(ds.mT, q_n))
        return *(_ungrouped(states, layout, heads).transpose(0, 1) for states in (dq, dk, dv)), None, None, None


def _grouped(states: Tensor, layout: Layout, heads: int) -> list[Tensor]:
    """(heads * g, T, d) to (sequences * heads, length * g, d) for each group, zeros where there is no position."""
    many, _, size = states.shape
    row = torch.cat([states.transpose(0, 1).reshape(-1, many * size), states.new_zeros(1, many * size)])
    padded = row.index_select(0, layout.rows).split([count * length for count, length in layout.groups])
    return [
        piece.view(count, length, heads, -1, size).transpose(1, 2).reshape(count * heads, -1, size)
        for piece, (count, length) in zip(padded, layout.groups, strict=True)
    ]


def _ungrouped(pieces: Sequence[Tensor], layout: Layout, heads: int) -> Tensor:
    """Back to (T, heads * g, d)."""
    size = pieces[0].shape[2]
    row = torch.cat(
        [
            piece.view(count, heads, length, -1, size).transpose(1, 2).reshape(count * length, -1)
            for piece, (count, length) in zip(pieces, layout.groups, strict=True)
        ]
    )
    return row.index_select(0, layout.places).view(len(layout.places), -1, size)


@lru_cache(maxsize=256)
def bias(length: int, window: int | None, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length * groups, length): each position's row `groups` times."""
    place = torch.arange(length, device=device)
    behind = place[:, None] - place
    hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
    rows = torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    return rows.repeat_interleave(groups, 0)
