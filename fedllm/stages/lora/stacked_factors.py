"""Low-rank factors of a cohort side by side, so that a sum of updates is a concatenation.

    rows      (K rank, in)     client k's A in the rows of its slot, weighed: after the sum p_k A_k
    columns   (K rank, out)    its transposed B there, a plain sum
    columns^T rows = sum_k p_k B_k A_k

Zeros fill the other slots; they are not sent. Whoever sees the sum sees each client's factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.tensors import low_rank
from fedllm.tensors.tree import Tree
from fedllm.tensors.wire_format import Box, WireFormat


def stack_factors(update: Update, part: Part, start: Tree, local: ClientContext) -> tuple[Update, Tree]:
    """The delta's factors in parts "rows" and "columns"; other leaves stay in it.

    Args:
        part: the delta. start: where the client began; its factors are start + delta.

    Returns:
        The update; and for each layer (rank of the adapter,), ones for the components that the client has.
    """
    rows: Tree = {}
    columns: Tree = {}
    holders: Tree = {}
    windows: dict[str, Box] = {}
    for layer in low_rank.layers(part.tree):
        b, a = (s + d for s, d in zip(low_rank.pair(start, layer), low_rank.pair(part.tree, layer), strict=True))
        most = len(local.initial_params[f"{layer}.{low_rank.A}"])
        first = local.ctx.slot * most
        rows[layer], columns[layer] = (_among(leaf, first, local.ctx.cohort * most) for leaf in (a, b.T))
        windows[layer] = ((first, first + len(a)), (0, -1))
        holders[layer] = (torch.arange(most) < len(a)).to(a.dtype)
    rest = {name: leaf for name, leaf in part.tree.items() if name.rpartition(".")[0] not in rows}
    update = update.having("delta", replace(part, tree=rest))
    update = update.having("rows", Part(rows, wire_format=_windows(rows, windows)))
    return update.having("columns", Part(columns, 0.0, _windows(columns, windows))), holders


def stack_with_share(update: Update, start: Tree, local: ClientContext) -> Update:
    """`stack_factors`, and in a part "shares" (cohort,) a one at the client's slot: weighed and added up, the p_k."""
    part = update.parts.get("delta")
    if part is None:
        return update
    update, _ = stack_factors(update, part, start, local)
    mine = torch.zeros(local.ctx.cohort, dtype=torch.float64)
    mine[local.ctx.slot] = 1
    return update.having("shares", Part({"share": mine}, exact=True))


class LayerStack(NamedTuple):
    """A layer's factors of all clients, in float64; `start`: those that all began with, B (out, rank), A (rank, in).

    rows (K rank, in): the p_k A_k; columns (K rank, out): the transposed B_k; shares (K,): the p_k.
    """

    layer: str
    start: low_rank.Pair
    rows: Tensor
    columns: Tensor
    shares: Tensor


def layer_stacks(total: Update, params: Tree, ctx: RoundContext) -> Iterator[LayerStack]:
    """Layer by layer what the sum of `stack_with_share` holds; if clients were lost, with one more slot (`with_lost`).

    Raises:
        RunError: a value is not finite.
    """
    rows, columns, shares = (total.parts[name].tree for name in ("rows", "columns", "shares"))
    answered = total.parts["delta"].answered
    for layer in rows:
        start = low_rank.pair(params, layer)
        low_rank.require_finite(f"round {ctx.round}, {layer}", rows[layer], columns[layer])
        a, b = with_lost(rows[layer].double(), columns[layer].double(), start, answered)
        yield LayerStack(layer, start, a, b, _with_rest(shares["share"], answered))


def with_lost(rows: Tensor, columns: Tensor, start: low_rank.Pair, answered: float) -> tuple[Tensor, Tensor]:
    """The stack with one more slot: the factors that all began with stand for the clients that were lost.

    rows (K rank, in): the p_k A_k; columns (K rank, out): the transposed B_k. answered: sum_k p_k. If it is 1, nobody
    is missing, and the stack stays as it is.
    """
    if answered == 1:
        return rows, columns
    b, a = start
    return torch.cat([rows, (1 - answered) * a.to(rows)]), torch.cat([columns, b.T.to(columns)])


def _with_rest(shares: Tensor, answered: float) -> Tensor:
    """The p_k (K,) beside the stack of `with_lost`."""
    return shares if answered == 1 else torch.cat([shares, shares.new_tensor([1 - answered])])


def _among(block: Tensor, first: int, count: int) -> Tensor:
    """(count, n): a block's rows from `first` on, zeros elsewhere."""
    whole = block.new_zeros(count, block.shape[1])
    whole[first : first + len(block)] = block
    return whole


def _windows(leaves: Tree, windows: dict[str, Box]) -> WireFormat:
    return WireFormat(windows={name: (windows[name][0], (0, leaf.shape[1])) for name, leaf in leaves.items()})


def factors_of_client(update: Update, start: Tree, ctx: RoundContext) -> Tree:
    """The delta of one client's factors, from what `stack_factors` made of it and a weigher multiplied.

    Args:
        start: what the client was sent. ctx: that of its request.
    """
    rows, columns = update.parts.get("rows"), update.parts.get("columns")
    found: Tree = {}
    if rows is None or columns is None:
        return found
    for layer, whole in rows.tree.items():
        b, a = low_rank.pair(start, layer)
        first = ctx.slot * (len(whole) // ctx.cohort)
        own = slice(first, first + len(a))
        found |= low_rank.layer_leaves(layer, columns.tree[layer][own].T - b, whole[own] / (rows.weight or 1) - a)
    return found
