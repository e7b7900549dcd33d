"""SLoRA: some rounds of sparse tuning, then LoRA from what they came to.

    rounds < R      only values at a layer's places train and travel: W + s S
    after them      B, A <- U sqrt(C), sqrt(C) V^T of the largest singular values C of S        W <- W + s (S - B A)
    from then on    only B and A train and travel

The model does not change at the switch: what the factors cannot hold of S joins the frozen weights, and is sent once,
as the values of S and the factors. With `leftover: dropped` the frozen weights go back to where they were.

Babakniya et al. 2023, arXiv 2308.06522; s is the scale of the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fedllm.errors import require
from fedllm.messages.context import RoundContext
from fedllm.messages.traits import BOTH_FACTORS, MOVED_BASE, Fact, Traits
from fedllm.messages.update import Part, Update
from fedllm.stages.base import Stage
from fedllm.tensors import low_rank, sparse_mask
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class SparseFirst(Stage):
    """Part "base_delta", the server's: what the factors cannot hold. No settings give FedAvg, which trains both at
    once; `SparseFirst(rounds=0)` is FedIT.

    Args:
        rounds: of sparse tuning, R. leftover: `kept` in the frozen weights, or `dropped`.
    """

    rounds: int = 5
    leftover: Literal["kept", "dropped"] = "kept"

    traits = Traits(needs=BOTH_FACTORS | MOVED_BASE, loses=Fact.SAME_TENSORS, adapter="sparse_lora")

    def __post_init__(self) -> None:
        require(self.rounds >= 0, self, field="rounds", value=self.rounds, allowed="0 or more")

    def trains_in_round(self, name: str, round: int, rounds: int) -> bool:
        """The sparse values in the first rounds, the factors in the others."""
        return name.endswith(f".{low_rank.SPARSE}") == (round < self.rounds)

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """What trains in this round; a client has the initial values of the rest, which add nothing."""
        return {name: leaf for name, leaf in params.items() if self.trains_in_round(name, ctx.round, ctx.rounds)}, {}

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """After the last round of sparse tuning: from its values to the factors."""
        part = total.parts.get("delta")
        if part is None or ctx.round != self.rounds - 1:
            return total, state
        step, base_delta = dict(part.tree), dict[str, Tree]()
        for name in [name for name in params if name.endswith(f".{low_rank.SPARSE}")]:
            layer = name.removesuffix(f".{low_rank.SPARSE}")
            old_b, old_a = low_rank.pair(params, layer)
            values = params[name] + step[name] if name in step else params[name]
            if not bool(values.any()):  # nobody has answered: zeros on both sides would never move
                continue
            low_rank.require_finite(f"round {ctx.round}, {layer}", values)
            whole = sparse_mask.scatter(layer, values, (len(old_b), old_a.shape[1]))
            b, a = (leaf.to(old_b) for leaf in low_rank.balanced_svd(*low_rank.top_singular(whole, len(old_a)), 1.0))
            step |= {name: -params[name], **low_rank.layer_leaves(layer, b - old_b, a - old_a)}
            base_delta[layer] = {name: values, **low_rank.layer_leaves(layer, -b, a)}
        total = total.having("delta", replace(part, tree=step))
        left = {name: leaf for leaves in base_delta.values() for name, leaf in leaves.items()}
        kept = left and self.leftover == "kept"
        return (total.having("base_delta", Part(left, 0.0)) if kept else total), state
