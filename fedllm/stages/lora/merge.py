"""FLoRA: the clients' factors side by side are the mean of their products; it joins the frozen weights.

    W <- W + s [B_1 .. B_K] [p_1 A_1; ..; p_K A_K] = W + s sum_k p_k B_k A_k        B <- 0, A <- drawn anew

Exact for any ranks. Every client begins the next round with fresh factors of its own rank, and is sent the stack: a
download grows with the sum of the ranks of the rounds that it has missed.

With a fixed denominator sum_k p_k may be below 1. A client that is lost then counts as no change: the old product has
the rest of the weight, W <- W + s (sum_k p_k B_k A_k + (1 - sum_k p_k) B A). B is zero when a round begins, so that
this adds nothing; in a run that starts from a trained adapter, the first round is the exception.

Wang et al. 2024, arXiv 2409.05976. Its weights p_k multiply one of the two factors; on both they would count twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import BOTH_FACTORS, DELTA, MOVED_BASE, Fact, Traits
from fedllm.messages.update import Part, Update
from fedllm.stages.base import Stage
from fedllm.stages.lora import stacked_factors
from fedllm.tensors import low_rank
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class LoraMerge(Stage):
    """Parts "rows" and "columns": the factors of each client (`stacked_factors`). Part "base_delta", the server's:
    what is merged.

    The server needs the factors of all clients, and the stack shows them to every client. No settings give FedAvg: the
    mean of the products is none of the factors.
    """

    traits = Traits(
        takes=DELTA,
        makes=frozenset({"rows", "columns"}),
        needs=BOTH_FACTORS | MOVED_BASE | Fact.SAME_START,
        gives=Fact.ONE_SHAPE,
        loses=Fact.SHAPE | Fact.ENTRIES | Fact.FIXED_BASIS | Fact.HIDDEN,
    )

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """As many components as the client's rank."""
        return low_rank.sliced(params, ctx.profile.rank), {}

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Remember where the client starts."""
        return params, params

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """The client's factors in its rows of the stack; other leaves stay in the delta."""
        part = update.parts.get("delta")
        if part is None:
            return update, memory
        return stacked_factors.stack_factors(update, part, scratch, local)[0], memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The stack to the frozen weights; fresh factors."""
        part, rows = total.parts.get("delta"), total.parts.get("rows")
        if part is None or rows is None:
            return total, state
        columns, step, merged = total.parts["columns"].tree, dict(part.tree), dict[str, torch.Tensor]()
        for layer, weighed in rows.tree.items():
            low_rank.require_finite(f"round {ctx.round}, {layer}", weighed, columns[layer])
            b, a = low_rank.pair(params, layer)
            answered = part.answered if bool(b.any()) else 1.0  # a product of zero adds nothing
            weighed, whole = stacked_factors.with_lost(weighed, columns[layer], (b, a), answered)
            there = weighed.any(1) | whole.any(1)  # a slot may be empty, and a rank below the adapter's
            merged |= low_rank.layer_leaves(layer, whole[there].T, weighed[there])
            drawn = torch.rand(a.shape, generator=ctx.rng(f"{layer}.lora_A"), dtype=torch.float64) * 2 - 1
            step |= low_rank.layer_leaves(layer, -b, (drawn / math.sqrt(a.shape[1])).to(a) - a)
        total = total.without(*self.traits.makes)
        return total.having("delta", replace(part, tree=step)).having("base_delta", Part(merged, 0.0)), state
