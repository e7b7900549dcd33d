"""Unequal ranks by zero padding: a client trains the first components, and the mean is taken component by component.

    padded         A <- sum_k p_k pad(A_k)            a client counts with zeros where it has no component
    contributors   A_j <- sum_{k: r_k > j} p_k A_kj / sum_{k: r_k > j} p_k        j: a component; B alike

With a fixed denominator sum_k p_k may be below 1. A client that is lost then counts as no change (padded): the rest of
the weight is that of the old A, A <- sum_k p_k pad(A_k) + (1 - sum_k p_k) A. The mean over the contributors divides by
those who answered, whatever the denominator, and is refused beside a fixed one.

padded: the baseline of Cho et al. 2024 (HetLoRA), arXiv 2401.06432, and Wang et al. 2024 (FLoRA), arXiv 2409.05976.
contributors: Chen et al. 2024 (RBLA), arXiv 2408.08699; the masked mean of HAFLQ, arXiv 2411.06581.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import DELTA, NONE, SAME_DELTA, Fact, Traits
from fedllm.messages.update import Part, Update
from fedllm.stages.base import Stage
from fedllm.tensors import low_rank
from fedllm.tensors.tree import Tree
from fedllm.tensors.wire_format import SPARSE


@dataclass(frozen=True)
class LoraPad(Stage):
    """Sends each client as many components as its profile's rank. Part "holders": ones for the components that it has.

    A component that nobody has in a round is multiplied by 0 (padded) or stands (contributors). Neutral, to the bit:
    clients of one rank.

    Args:
        mean: `padded`, or `contributors` alone.
    """

    mean: Literal["padded", "contributors"] = "padded"

    @property
    def traits(self) -> Traits:
        """The contributors are among those who answered."""
        return Traits(
            takes=DELTA,
            makes=frozenset({"holders"}),
            needs=Fact.SHAPE | (Fact.ANSWERED if self.mean == "contributors" else NONE),
            gives=Fact.ONE_SHAPE,
            keeps=SAME_DELTA,
        )

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """The first components."""
        return low_rank.sliced(params, ctx.profile.rank), {}

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Fill up with zeros, which are not sent."""
        part = update.parts.get("delta")
        if part is None:
            return update, memory
        padded, packing = low_rank.padded(part.tree, local.initial_params)
        packing = SPARSE if part.wire_format.sparse else packing
        holders = Part(low_rank.component_mask(part.tree, local.initial_params), exact=True)
        return update.having("delta", replace(part, tree=padded, wire_format=packing)).having(
            "holders", holders
        ), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """From the mean of the padded deltas to the step of each component."""
        part, holders = total.parts.get("delta"), total.parts.get("holders")
        if part is None or holders is None:
            return total, state
        step = {
            name: self._step(name, leaf, params[name], holders.tree[name], part.answered)
            if name in holders.tree
            else leaf
            for name, leaf in part.tree.items()
        }
        return total.without("holders").having("delta", replace(part, tree=step)), state

    def _step(self, name: str, delta: Tensor, param: Tensor, share: Tensor, answered: float) -> Tensor:
        """`share` (rank,): the weights of those who have the component, over all weights."""
        if self.mean == "padded":
            return low_rank.padded_mean_step(name, delta, param, share, answered)
        along = low_rank.per_component(name, share)
        return torch.where(along > 0, delta / along, 0)
