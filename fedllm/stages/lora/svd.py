"""FedSVD: clients train B, and the server turns the mean of B and the A that all had into factors with orthonormal A.

    B <- sum_k p_k B_k        U S V^T = B A        B <- U S        A <- V^T

With A held still on the clients the mean is exact: sum_k p_k B_k A = (sum_k p_k B_k) A. An orthonormal A keeps the
gradient of B no longer than that of the product, and noise on B is noise on the product of the same size, with no term
that multiplies noise with noise. The rows of A keep their span: what the turn changes is the axes along which an
adaptive optimiser scales its steps and noise or rounding is put on B.

Lee et al. 2025, arXiv 2505.12805.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedllm.messages.context import RoundContext
from fedllm.messages.traits import BOTH_FACTORS, Fact, Traits
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.tensors import low_rank
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class LoraSvd(Stage):
    """The product stays as it is. FedSVD is this with `scope.hold: "*lora_A"`; without, the mean of A is turned.

    A is orthonormal from the first round on, also where B is zero or of a low rank. A round that nobody answered turns
    nothing. No settings give FedAvg.
    """

    traits = Traits(needs=BOTH_FACTORS | Fact.SAME_START, loses=Fact.FIXED_BASIS)

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """From the mean of B to both factors of the next round."""
        part = total.parts.get("delta")
        if part is None or not part.weight:
            return total, state
        step = dict(part.tree)
        for layer in low_rank.layers(params):
            old_b, old_a = low_rank.pair(params, layer)
            moved = low_rank.merged_factors(params, part.tree, layer)
            new_b, new_a = low_rank.orthonormal(*moved, f"round {ctx.round}, {layer}")
            step |= low_rank.layer_leaves(layer, new_b - old_b, new_a - old_a)
        return total.having("delta", replace(part, tree=step)), state
