"""Unequal ranks by the singular values of the mean of the products: FlexLoRA, and raFLoRA.

    P = sum_k p_k B_k A_k = [B_1 .. B_K] [p_1 A_1; ..; p_K A_K]        B, A <- U sqrt(S), sqrt(S) V^T of P's largest

Each client is sent as many components, the largest first, as its rank. What it sends is its factors, in its own rows of
a stack of zeros, so that a sum is a concatenation; the zeros are not sent.

    contributors   the j-th component of client k counts p_k / sum_{l: r_l > j} p_l in place of p_k (raFLoRA), so that
                   components that few clients have are not damped

With a fixed denominator sum_k p_k may be below 1. A client that is lost then counts as no change: the old product has
the rest of the weight, P = sum_k p_k B_k A_k + (1 - sum_k p_k) B A, as one more slot of the stack. The mean over the
contributors divides by those who answered, whatever the denominator, and is refused beside a fixed one.

Bai et al. 2024 (FlexLoRA), arXiv 2402.11505; raFLoRA 2026, arXiv 2602.13486.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import BOTH_FACTORS, DELTA, NONE, Fact, Traits
from fedllm.messages.update import Part, Update
from fedllm.stages.base import Stage
from fedllm.stages.lora import stacked_factors
from fedllm.tensors import low_rank
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class LoraStack(Stage):
    """Part "rows": A of each client, weighed. Part "columns": the transposed B, a plain sum. Part "holders": ones for
    the components that a client has.

    The server needs the factors of all clients, so whoever sees the sum sees each. No settings give FedAvg: the mean of
    the products is none of the factors.

    Args:
        mean: over `all` clients, or for each component over its `contributors` alone.
    """

    mean: Literal["all", "contributors"] = "all"

    @property
    def traits(self) -> Traits:
        """The contributors are among those who answered."""
        return Traits(
            takes=DELTA,
            makes=frozenset({"rows", "columns", "holders"}),
            needs=BOTH_FACTORS | Fact.SAME_START | (Fact.ANSWERED if self.mean == "contributors" else NONE),
            gives=Fact.ONE_SHAPE,
            loses=Fact.SHAPE | Fact.ENTRIES | Fact.FIXED_BASIS | Fact.HIDDEN,
        )

    @property
    def over_answered(self) -> bool:
        """True for the contributors."""
        return self.mean == "contributors"

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """The largest components."""
        return low_rank.sliced(params, ctx.profile.rank), {}

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Remember where the client starts."""
        return params, params

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """The client's factors in its rows of the stack; other leaves stay in the delta."""
        part = update.parts.get("delta")
        if part is None:
            return update, memory
        update, held = stacked_factors.stack_factors(update, part, scratch, local)
        return update.having("holders", Part(held, exact=True)), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """From the stack to the best factors of its product."""
        part, rows = total.parts.get("delta"), total.parts.get("rows")
        if part is None or rows is None:
            return total, state
        columns, holders = total.parts["columns"].tree, total.parts["holders"].tree
        step = dict(part.tree)
        for layer, a in rows.tree.items():
            old_b, old_a = low_rank.pair(params, layer)
            if self.mean == "contributors":
                share = holders[layer].repeat(len(a) // len(old_a))[:, None]
                a = torch.where(share > 0, a / share, 0)
            a, b = stacked_factors.with_lost(a, columns[layer], (old_b, old_a), part.answered)
            new_b, new_a = low_rank.truncated(b.T, a, len(old_a), f"round {ctx.round}, {layer}")
            step |= low_rank.layer_leaves(layer, new_b - old_b, new_a - old_a)
        return total.without(*self.traits.makes).having("delta", replace(part, tree=step)), state
