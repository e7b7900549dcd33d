"""Attention within each of several short sequences of a row, and its gradient, by plain products.

    P = softmax(s Q K^T + bias)    O = P V           bias: 0 where a position sees another one, else minus infinity
    dV = P^T dO    dP = dO V^T    dS = P (dP - rowsum(P dP))    dQ = s dS K    dK = s dS^T Q

The g query heads of a key head become g rows for each of its positions. Sequences are padded to a few lengths, and
those of one length share a batched product. Padding repeats the sequence's first position: a causal mask hides it from
every real one, and its dO is zero. Tokens that a row holds once for several sequences (see `shared_prefix`) are keys
in each of them and queries in the first; their dK and dV add up. The probabilities are kept for the gradient; on a CPU
this beats torch's fused kernel, which computes them again, as long as they are few. In bfloat16 fedllm's own kernel
does all that without padding, and leaves out what a mask would hide.
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

from fedllm.models.kernels import ops
from fedllm.models.layers.shared_prefix import first_of, shared_prefix

STEP = 32  # lengths are padded to its multiples: few shapes, for a new one costs as much as ten products


@dataclass(frozen=True)
class Row:
    """Sequences of these lengths; `shared`: as in a batch."""

    lengths: tuple[int, ...]
    shared: tuple[int, ...] = ()


def short_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scaling: float,
    window: int | None,
    shared: Sequence[int] = (),
) -> Tensor:
    """(heads, T, d) queries, (key heads, T, d) keys and (key heads, T, e) values of a row to (T, heads, e)."""
    row = Row(tuple(lengths), tuple(shared))
    form = _Kernel if ops.supports_attention(query, key, value) else _Short
    out: Tensor = form.apply(query, key, value, row, scaling, window)  # type: ignore[no-untyped-call]
    return out


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: Row, scaling: float, window: int | None
    ) -> Tensor:
        q, k, v = (each if each.stride(2) == 1 else each.contiguous() for each in (query, key, value))
        out, p = ops.attention((q, k, v), sequences(row), window, scaling)
        ctx.save_for_backward(q, k, v, p)
        ctx.row, ctx.scaling, ctx.window = row, scaling, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ops.attention_backward(grad, ctx.saved_tensors, sequences(ctx.row), ctx.window, ctx.scaling)
        return *(states.transpose(0, 1) for states in found), None, None, None


@lru_cache(maxsize=64)
def sequences(row: Row) -> ops.Sequences:
    """Where the keys and queries of each sequence stand in the computed row."""
    shared = row.shared or (0,) * len(row.lengths)
    starts = [0, *accumulate(length - common for length, common in zip(row.lengths, shared, strict=True))]
    firsts = first_of(shared)
    return ops.Sequences.of([(starts[firsts[i]], shared[i], starts[i], length) for i, length in enumerate(row.lengths)])


@dataclass(frozen=True, eq=False)
class SequenceGroups:
    """How the sequences of a row are grouped. `groups`: (sequences, padded length) of each group. `rows` (R,): the
    position that stands at each padded place, a sequence's first where there is none; `real` (R,): whether it is a
    query there. `again`: (group, place in it, first position, how many) of the keys that a sequence shares."""

    groups: Sequence[tuple[int, int]]
    rows: Tensor
    real: Tensor
    again: Sequence[tuple[int, int, int, int]]


@lru_cache(maxsize=16)
def _layout(row: Row) -> SequenceGroups:
    shared = row.shared or (0,) * len(row.lengths)
    owned = shared_prefix(row.lengths, shared).places.split(row.lengths)  # the position of each sequence's tokens
    by_length: dict[int, list[int]] = {}
    for sequence, length in enumerate(row.lengths):
        by_length.setdefault(-(-length // STEP) * STEP, []).append(sequence)
    rows, real, again = [], [], []
    for group, (size, members) in enumerate(by_length.items()):
        place = torch.arange(size)
        for at, sequence in enumerate(members):
            length, common = row.lengths[sequence], shared[sequence]
            rows.append(owned[sequence][torch.where(place < length, place, 0)])
            real.append((common <= place) & (place < length))
            if common:
                again.append((group, at, int(owned[first_of(shared)[sequence]][0]), common))
    groups = [(len(members), size) for size, members in by_length.items()]
    return SequenceGroups(groups, torch.cat(rows), torch.cat(real), again)


@dataclass(frozen=True, eq=False)
class Order:
    """The order of products: of the R H places (group, sequence, key head, place, query head of the key head), which
    row of the T H rows (position, head) stands there (`rows`), and which hold none (`empty`); of each of the T H rows,
    where it stands (`places`)."""

    rows: Tensor
    empty: Tensor
    places: Tensor


@lru_cache(maxsize=32)
def _order(sequences: Row, heads: int, groups: int, device: torch.device) -> Order:
    layout, many = _layout(sequences), heads * groups
    head = torch.arange(many).view(1, heads, 1, groups)
    rows, real, at = [], [], 0
    for count, size in layout.groups:
        here = slice(at, at := at + count * size)
        rows.append((layout.rows[here].view(count, 1, size, 1) * many + head).reshape(-1))
        real.append(layout.real[here].view(count, 1, size, 1).expand(count, heads, size, groups).reshape(-1))
    found, filled = torch.cat(rows), torch.cat(real)
    places = torch.empty(int(layout.real.sum()) * many, dtype=torch.long)
    places[found[filled]] = filled.nonzero()[:, 0]
    return Order(found.to(device), (~filled).nonzero()[:, 0].to(device), places.to(device))


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row: Row,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        heads, per = len(key), len(query) // len(key)
        spread, own = (_order(row, heads, n, query.device) for n in (per, 1))
        q, k, v = _split(query, spread, row, per), _split(key, own, row, 1), _split(value, own, row, 1)
        out, kept = query.new_empty(len(spread.rows), value.shape[2]), []
        for q_n, k_n, v_n, out_n in zip(q, k, v, _pieces(out, row, heads, per), strict=True):
            mask = bias(k_n.shape[1], window, per, q_n.dtype, q_n.device)
            kept.append(torch.baddbmm(mask, q_n, k_n.mT, alpha=scaling).softmax(-1))
            torch.bmm(kept[-1], v_n, out=out_n)
        ctx.save_for_backward(*q, *k, *v, *kept)
        ctx.row, ctx.scaling, ctx.heads, ctx.per = row, scaling, heads, per
        return _joined(out, spread, heads * per)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        row, heads, per, saved = ctx.row, ctx.heads, ctx.per, ctx.saved_tensors
        n = len(saved) // 4
        q, k, v, kept = (saved[at : at + n] for at in range(0, 4 * n, n))
        spread, own = (_order(row, heads, n, grad.device) for n in (per, 1))
        gradient = grad.reshape(-1, grad.shape[2]).index_select(0, spread.rows).index_fill_(0, spread.empty, 0)
        dq, dk, dv = (
            grad.new_empty(len(order.rows), size)
            for order, size in ((spread, q[0].shape[2]), (own, q[0].shape[2]), (own, grad.shape[2]))
        )
        pieces = (_pieces(states, row, heads, g) for states, g in ((gradient, per), (dq, per), (dk, 1), (dv, 1)))
        for q_n, k_n, v_n, p, do, dq_n, dk_n, dv_n in zip(q, k, v, kept, *pieces, strict=True):
            torch.bmm(p.mT, do, out=dv_n)
            ds = torch._softmax_backward_data(torch.bmm(do, v_n.mT), p, -1, p.dtype).mul_(ctx.scaling)
            torch.bmm(ds, k_n, out=dq_n)
            torch.bmm(ds.mT, q_n, out=dk_n)
        found = (_joined(dq, spread, heads * per), _summed(dk, own, row, heads), _summed(dv, own, row, heads))
        return *(states.transpose(0, 1) for states in found), None, None, None


def _split(states: Tensor, order: Order, row: Row, per: int) -> list[Tensor]:
    """(heads * per, T, d) to (sequences * heads, length * per, d) for each group."""
    rows = states.transpose(0, 1).reshape(-1, states.shape[2])
    return _pieces(rows.index_select(0, order.rows), row, len(states) // per, per)


def _pieces(rows: Tensor, row: Row, heads: int, per: int) -> list[Tensor]:
    """Views of the padded rows, one for each group."""
    groups = _layout(row).groups
    pieces = rows.split([count * heads * size * per for count, size in groups])
    return [piece.view(count * heads, size * per, -1) for piece, (count, size) in zip(pieces, groups, strict=True)]


def _joined(rows: Tensor, order: Order, heads: int) -> Tensor:
    """Padded rows back to (T, heads, d)."""
    return rows.index_select(0, order.places).view(-1, heads, rows.shape[1])


def _summed(rows: Tensor, order: Order, row: Row, heads: int) -> Tensor:
    """The same of keys or values, with the gradients that they have in other sequences."""
    found, pieces = _joined(rows, order, heads), _pieces(rows, row, heads, 1)
    for group, at, first, count in _layout(row).again:
        found[first : first + count] += pieces[group].unflatten(0, (-1, heads))[at, :, :count].transpose(0, 1)
    return found


@lru_cache(maxsize=256)
def bias(length: int, window: int | None, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length * groups, length): each position's row `groups` times."""
    place = torch.arange(length, device=device)
    behind = place[:, None] - place
    hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
    rows = torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    return rows.repeat_interleave(groups, 0)
