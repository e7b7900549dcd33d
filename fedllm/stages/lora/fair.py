"""LoRA-FAIR: the mean of A, and the B that makes up for it.

    A = sum_k p_k A_k    B = sum_k p_k B_k    P = sum_k p_k B_k A_k
    B <- B + argmin_D ||P - (B + D) A||_F^2 + lambda ||D||_F^2 = B + (P A^T - B A A^T) (A A^T + lambda I)^-1

Clients go on from (B, A): the mean of A is kept, and the product is nearer to what they have learned than that of the
means. A large lambda is FedIT.

With a fixed denominator sum_k p_k may be below 1. A client that is lost then counts as no change: in all three sums the
old factors, which all began with, have the rest of the weight, as one more client's.

Bian et al. 2024, arXiv 2411.14961, which measures the distance by the cosine; here it is the Frobenius norm, for which
the minimum has a closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedllm.errors import require
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import BOTH_FACTORS, DELTA, Fact, Traits
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.stages.lora import stacked_factors
from fedllm.tensors import low_rank
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class LoraFair(Stage):
    """Parts "rows" and "columns": the factors of each client (`stacked_factors`). Part "shares": (cohort,), the p_k.

    The server needs the factors of all clients, so whoever sees the sum sees each.

    Args:
        penalty: lambda, in units of the squared rows of A. 0 is the nearest B that there is.
    """

    penalty: float = 0.01

    traits = Traits(
        takes=DELTA,
        makes=frozenset({"rows", "columns", "shares"}),
        needs=BOTH_FACTORS | Fact.SAME_START,
        loses=Fact.SHAPE | Fact.ENTRIES | Fact.HIDDEN | Fact.ANY_RANK,
    )

    def __post_init__(self) -> None:
        require(0 <= self.penalty < math.inf, self, field="penalty", value=self.penalty, allowed="0 or more and finite")

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Remember where the client starts."""
        return params, params

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """The client's factors at its slot, and a one there."""
        return stacked_factors.stack_with_share(update, scratch, local), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """From the factors of all to the mean of A and the corrected mean of B."""
        part = total.parts.get("delta")
        if part is None or "rows" not in total.parts:
            return total, state
        step = dict(part.tree)
        for layer, (old_b, old_a), rows, columns, shares in stacked_factors.layer_stacks(total, params, ctx):
            new_b, new_a = corrected(columns.T, rows, shares, self.penalty)
            step |= low_rank.layer_leaves(layer, new_b.to(old_b) - old_b, new_a.to(old_a) - old_a)
        return total.without(*self.traits.makes).having("delta", replace(part, tree=step)), state


def corrected(columns: Tensor, rows: Tensor, shares: Tensor, penalty: float) -> low_rank.Pair:
    """B (out, rank) and A (rank, in) of the module's formula.

    columns (out, K rank): the B_k. rows (K rank, in): the p_k A_k. shares (K,): the p_k. With no penalty and rows of A
    that depend on each other, B is the smallest of the nearest.
    """
    rank = len(rows) // len(shares)
    a = rows.unflatten(0, (-1, rank)).sum(0)
    b = (columns.unflatten(1, (-1, rank)) * shares[:, None]).sum(1)
    gram, one = a @ a.T, torch.eye(rank, dtype=a.dtype)
    gap = columns @ (rows @ a.T) - b @ gram  # (P - B A) A^T
    return b + gap @ torch.linalg.pinv(gram + penalty * one, hermitian=True), a
