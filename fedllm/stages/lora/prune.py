"""Clients that find their own rank: HetLoRA.

    F_k + lambda sum_layers ||B[:, m:]|| ||A[m:, :]||     m = ceil(gamma r_k)       what client k minimises
    r_k <- max(m, min_rank)   if the sum of the products of norms is below its value when the round began
    A <- sum_k p_k pad(A_k), B alike                      p_k = ||B_k A_k|| / sum_l ||B_l A_l||

All norms are Frobenius norms; ||B_k A_k||^2 is a sum over the layers. Cho et al. 2024 (HetLoRA), arXiv 2401.06432.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedllm.errors import require
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import BOTH_FACTORS, DELTA, Fact, Traits
from fedllm.messages.update import Part, Update
from fedllm.stages.base import Stage
from fedllm.tensors import low_rank, tree
from fedllm.tensors.tree import Tree
from fedllm.tensors.wire_format import SPARSE

LEAST = 1e-12  # the weight of a client whose product is zero: the mean exists, and keeps the digits of float32


@dataclass(frozen=True)
class LoraPrune(Stage):
    """Sends each client the first components of its profile's rank; the client takes of them those of the rank that it
    remembers, trains, and sends what is left after pruning. Memory: "rank", once it is below the profile's.

    Part "holders": ones for the components that a client sends. No settings give FedAvg, for the weights are norms;
    `gamma: 1` or `penalty: 0` leave out the penalty, `gamma: 1` the pruning, too.

    Args:
        gamma: of a client's rank, what stays if it prunes, in (0, 1]. Rounded up: a rank of r prunes only if
            gamma <= (r - 1) / r.
        penalty: lambda. min_rank: a client does not prune below.
    """

    gamma: float = 0.75
    penalty: float = 1e-3
    min_rank: int = 1

    traits = Traits(
        takes=DELTA,
        makes=frozenset({"holders"}),
        needs=BOTH_FACTORS | Fact.LOCAL_UNITS | Fact.GRADIENTS | Fact.ANSWERED,
        gives=Fact.ONE_SHAPE,
        loses=Fact.EQUAL_WEIGHTS | Fact.FIXED_SIZES,
    )

    def __post_init__(self) -> None:
        require(0 < self.gamma <= 1, self, field="gamma", value=self.gamma, allowed="above 0 and at most 1")
        allowed = "at least 0 and finite"
        require(0 <= self.penalty < math.inf, self, field="penalty", value=self.penalty, allowed=allowed)
        require(self.min_rank >= 1, self, field="min_rank", value=self.min_rank, allowed="at least 1")

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """The first components."""
        return low_rank.sliced(params, ctx.profile.rank), {}

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """The first of them, as many as the client has kept."""
        start = low_rank.sliced(params, int(memory["rank"])) if memory else params
        return start, start

    def grads(self, grads: Tree, params: Tree, scratch: Tree) -> Tree:
        """Plus the gradient of the penalty; zero where one of a layer's norms is zero."""
        changed = dict(grads)
        for layer in low_rank.layers(params):
            b, a = self._trailing(params, layer)
            b_norm, a_norm = (torch.linalg.vector_norm(leaf) for leaf in (b, a))
            for name, leaf, ratio in (
                (f"{layer}.{low_rank.B}", b, _ratio(a_norm, b_norm)),
                (f"{layer}.{low_rank.A}", a, _ratio(b_norm, a_norm)),
            ):
                changed[name] = grads[name].clone()
                at, size = low_rank.component_axis(name), leaf.shape[low_rank.component_axis(name)]
                changed[name].narrow(at, grads[name].shape[at] - size, size).add_(leaf * ratio, alpha=self.penalty)
        return changed

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Prune, weigh by the norm of what is left, and fill up with zeros, which are not sent."""
        part = update.parts.get("delta")
        if part is None:
            return update, memory
        after, delta = tree.add(scratch, part.tree), part.tree
        if self._size(after) < self._size(scratch):
            rank = self._kept(_rank(after))
            after, delta = low_rank.sliced(after, rank), low_rank.sliced(delta, rank)
            memory = {"rank": torch.tensor(rank)}
        weight = max(low_rank.norm(after), LEAST)
        padded, packing = low_rank.padded(delta, local.initial_params)
        packing = SPARSE if part.wire_format.sparse else packing
        update = update.having("delta", replace(part, tree=padded, weight=weight, wire_format=packing))
        return update.having(
            "holders", Part(low_rank.component_mask(delta, local.initial_params), weight, exact=True)
        ), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """From the mean of the padded deltas to the step."""
        part, holders = total.parts.get("delta"), total.parts.get("holders")
        if part is None or holders is None:
            return total, state
        shares = holders.tree
        step = {
            name: low_rank.padded_mean_step(name, leaf, params[name], shares[name]) if name in shares else leaf
            for name, leaf in part.tree.items()
        }
        return total.without("holders").having("delta", replace(part, tree=step)), state

    def _kept(self, rank: int) -> int:
        """Of a rank, what stays if the client prunes; 0.28 x 25 is 7, whatever the last digit of the product."""
        return min(rank, max(math.ceil(self.gamma * rank - 1e-9), self.min_rank))

    def _trailing(self, leaves: Tree, layer: str) -> low_rank.Pair:
        """B[:, m:] and A[m:, :] of a layer."""
        b, a = low_rank.pair(leaves, layer)
        kept = self._kept(len(a))
        return b[:, kept:], a[kept:]

    def _size(self, leaves: Tree) -> float:
        """sum_layers ||B[:, m:]|| ||A[m:, :]||, in float64; the order of the layers changes no bit."""
        pairs = (self._trailing(leaves, layer) for layer in low_rank.layers(leaves))
        return math.fsum(float(b.double().norm() * a.double().norm()) for b, a in pairs)


def _rank(leaves: Tree) -> int:
    return max(len(low_rank.pair(leaves, layer)[1]) for layer in low_rank.layers(leaves))


def _ratio(one: Tensor, two: Tensor) -> Tensor:
    return torch.where(two > 0, one / two, 0)
