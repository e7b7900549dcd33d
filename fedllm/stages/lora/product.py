"""The product of the factors travels in place of the factors: what stands behind works on the mean of the products.

    client   B_k A_k - B_0 A_0        or B_k A_k        as one leaf (out, in) of each layer
    server   B, A <- U sqrt(S), sqrt(S) V^T of the largest singular values of B_0 A_0 + step        or of the step

With a fixed denominator the weights of those who answered may sum to less than 1. A client that is lost then counts as
no change: an update of zero; of the products, the old one has the rest of the weight, sum_k p_k B_k A_k +
(1 - sum_k p_k) B_0 A_0.

A step is the mean, or what a server optimiser behind this stage makes of it. FlexLoRA with dense products: Bai et al.
2024, arXiv 2402.11505; `lora_stack` computes the same from the factors, with fewer bytes and in sight of the server.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import BOTH_FACTORS, DELTA, NONE, Fact, Traits
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.tensors import low_rank
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class LoraProduct(Stage):
    """Each client is sent the components of its rank, the largest first, and sends out x in values a layer.

    A sum of products is all that the server needs. No settings give FedAvg: the mean of the products is none of the
    factors. Of clients of unequal ranks an update leaves the components that a client lacks as they are; a product
    counts them as zero, as the paper does.

    Args:
        form: what is sent: the `update` of the product, or the `product` itself. Optimisers, errors that are kept and
            bounds need the `update`, and are refused behind the `product`.
    """

    form: Literal["update", "product"] = "update"

    @property
    def traits(self) -> Traits:
        """A mean of products, which are no updates of one."""
        return Traits(
            takes=DELTA,
            needs=BOTH_FACTORS,
            gives=Fact.ONE_SHAPE,
            loses=Fact.SHAPE | Fact.FIXED_BASIS | (Fact.DIFFERENCE if self.form == "product" else NONE),
        )

    @property
    def absolute(self) -> bool:
        """True for the product."""
        return self.form == "product"

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """The largest components."""
        return low_rank.sliced(params, ctx.profile.rank), {}

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Remember where the client starts."""
        return params, params

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """A dense leaf for the factors of each layer; other leaves stay as they are."""
        part = update.parts.get("delta")
        if part is None:
            return update, memory
        found = dict(part.tree)
        for layer in low_rank.layers(scratch):
            old, new = low_rank.pair(scratch, layer), low_rank.merged_factors(scratch, part.tree, layer)
            for name in low_rank.layer_leaves(layer, *new):
                found.pop(name, None)
            found[_dense(layer)] = new[0] @ new[1] if self.form == "product" else _moved(old, new)
        return update.having("delta", replace(part, tree=found)), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """From the step of the products to that of the factors."""
        part = total.parts.get("delta")
        if part is None:
            return total, state
        step = dict(part.tree)
        for layer in (layer for layer in low_rank.layers(params) if _dense(layer) in step):
            old_b, old_a = low_rank.pair(params, layer)
            product = step.pop(_dense(layer))
            if self.form == "update":
                product = product + old_b @ old_a
            elif part.answered != 1:
                product = product + (1 - part.answered) * (old_b @ old_a)
            new_b, new_a = low_rank.best_rank_r(product, len(old_a), f"round {ctx.round}, {layer}")
            step |= low_rank.layer_leaves(layer, new_b - old_b, new_a - old_a)
        return total.having("delta", replace(part, tree=step)), state


def _dense(layer: str) -> str:
    return f"{layer}.{low_rank.PRODUCT}"


def _moved(old: low_rank.Pair, new: low_rank.Pair) -> Tensor:
    """B A - B_0 A_0, without the difference of two large numbers."""
    return (new[0] - old[0]) @ new[1] + old[0] @ (new[1] - old[1])
