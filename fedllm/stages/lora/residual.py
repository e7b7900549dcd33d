"""FedEx-LoRA: the means of the factors, and what they lack of the mean of the products joins the frozen weights.

    B = sum_k p_k B_k    A = sum_k p_k A_k    W <- W + s R
    R = sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A) = [B_1 - B .. B_K - B] [p_1 (A_1 - A); ..; p_K (A_K - A)]

W + s B A is then what the clients learned, exactly, and they go on from (B, A) as in FedIT. R is sent as its factors,
of rank K x rank; this form of it needs no difference of two large products.

With a fixed denominator sum_k p_k may be below 1. A client that is lost then counts as no change: in all sums the old
factors, which all began with, have the rest of the weight, as one more client's.

Singhal et al. 2024, arXiv 2410.09432, eq. 9 to 11.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import BOTH_FACTORS, DELTA, MOVED_BASE, Fact, Traits
from fedllm.messages.update import Part, Update
from fedllm.stages.base import Stage
from fedllm.stages.lora import stacked_factors
from fedllm.tensors import low_rank
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class LoraResidual(Stage):
    """Parts "rows" and "columns": the factors of each client (`stacked_factors`). Part "shares": (cohort,), the p_k.
    Part "base_delta", the server's: the residual.

    The server needs the factors of all clients, so whoever sees the sum sees each. No settings give FedAvg: the
    residual is its error.
    """

    traits = Traits(
        takes=DELTA,
        makes=frozenset({"rows", "columns", "shares"}),
        needs=BOTH_FACTORS | MOVED_BASE | Fact.SAME_START,
        loses=Fact.SHAPE | Fact.ENTRIES | Fact.HIDDEN | Fact.ANY_RANK,
    )

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Remember where the client starts."""
        return params, params

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """The client's factors at its slot, and a one there."""
        return stacked_factors.stack_with_share(update, scratch, local), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """From the factors of all to their means and the residual."""
        part = total.parts.get("delta")
        if part is None or "rows" not in total.parts:
            return total, state
        step, residual = dict(part.tree), dict[str, Tensor]()
        for layer, (old_b, old_a), rows, columns, shares in stacked_factors.layer_stacks(total, params, ctx):
            (b, a), gap = _means_and_gap(columns, rows, shares)
            step |= low_rank.layer_leaves(layer, b.to(old_b) - old_b, a.to(old_a) - old_a)
            residual |= low_rank.layer_leaves(layer, gap[0].to(old_b), gap[1].to(old_a))
        total = total.without(*self.traits.makes)
        return total.having("delta", replace(part, tree=step)).having("base_delta", Part(residual, 0.0)), state


def _means_and_gap(columns: Tensor, rows: Tensor, shares: Tensor) -> tuple[low_rank.Pair, low_rank.Pair]:
    """(B, A), and the factors of R, of those who have a share.

    columns (K rank, out): the transposed B_k. rows (K rank, in): the p_k A_k. shares (K,): the p_k.
    """
    there = shares > 0
    b, weighed, p = (leaf.unflatten(0, (len(shares), -1))[there] for leaf in (columns, rows, shares))
    p = p[:, None]  # (K, 1, 1)
    mean_b, mean_a = (p * b).sum(0), weighed.sum(0)
    left, right = b - mean_b, weighed - p * mean_a
    return (mean_b.T, mean_a), (left.flatten(0, 1).T, right.flatten(0, 1))
