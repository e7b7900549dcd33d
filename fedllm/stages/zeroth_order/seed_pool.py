"""FedKSeed: seeds and numbers are all that travels; everybody rebuilds the weights from them.

    w = w_0 - sum over s of A[s] z(s)        A: (K,) on the server, from zero; z(s): the direction of a seed of the pool
    down   A                                 up   what the client's steps added along each seed, those that are not zero
    A <- A + sum_k p_k G_k                   p_k: as the weigher has it

Qin et al. 2024, arXiv:2312.06353. A client rebuilds w from w_0, which all have, and A, in the order of the seeds: two
processes come to the same bits, and one that was away for any number of rounds needs what the others need, 4 K bytes.
(The paper's code copies the server's model.) The rebuilding costs one draw of all weights for each seed of the pool
that was used, in each round. The numbers hold the learning rate, so that rates may differ by client and round; what
they add up to is FedAvg of the local models, in exact arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import Bracket, Fact, Traits
from fedllm.messages.update import Part, Update
from fedllm.stages.base import Stage
from fedllm.tensors import tree
from fedllm.tensors.directions import replayed
from fedllm.tensors.tree import Tree
from fedllm.tensors.wire_format import SPARSE

POOL = "pool"


@dataclass(frozen=True)
class SeedPool(Stage):
    """State: A, and w_0, which everybody draws from the run's key or has as the base model. No setting makes it FedAvg
    to the bit, for sums of directions round elsewhere.

    Needs the work `zeroth_order` with a `pool`. What the server holds of the weights, for evaluation and export,
    differs from what clients rebuild by the rounding of one sum.
    """

    traits = Traits(
        Bracket.MEANING,
        takes=frozenset({"scalars"}),
        needs=Fact.ONLY_STEP | Fact.SERVER_STATE | Fact.ENTRIES | Fact.DIFFERENCE,
        loses=Fact.SHAPE | Fact.ENTRIES | Fact.PLAIN_MEAN | Fact.ANY_RANK | Fact.FACTORS,
    )

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """A, and no weights."""
        return {}, {POOL: state.get(POOL, torch.zeros(0))}

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Rebuild the weights."""
        return replayed(dict(local.initial_params), extra.get(POOL, torch.zeros(0))), {}

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """The numbers in place of the delta."""
        scalars = update.parts.get("scalars")
        if scalars is None:
            return update, memory
        return update.without("scalars").having("delta", replace(scalars, wire_format=SPARSE)), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Add the mean of the numbers, and rebuild the weights as a client does."""
        delta = total.parts.get("delta")
        if delta is None or not delta.tree.get(POOL, torch.zeros(0)).any():
            return (total if delta is None else total.having("delta", Part(tree.zeros_like(params), 0.0))), state
        start = {name.removeprefix("w/"): leaf for name, leaf in state.items() if name != POOL} or dict(params)
        amounts = delta.tree[POOL] + state.get(POOL, torch.zeros_like(delta.tree[POOL]))
        now = replayed(start, amounts)
        kept = {POOL: amounts, **{f"w/{name}": leaf for name, leaf in start.items()}}
        return total.having("delta", replace(delta, tree=tree.sub(now, params))), kept
