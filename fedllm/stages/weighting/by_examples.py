"""The weighted mean of FedAvg: a client counts as much as it has examples.

Δ = sum_k n_k Δ_k / sum_k n_k        McMahan et al. 2017, algorithm 1, arXiv 1602.05629
"""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import SAME_DELTA, Bracket, Fact, Traits
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.stages.weighting import weighted_mean
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class ByExamples(Stage):
    """Weight `n_k`: the client's number of examples. Clients that fail drop out of numerator and denominator.

    The sum of the weights tells the server how many examples the cohort has. Neutral: this is FedAvg itself.
    """

    traits = Traits(Bracket.WEIGH, keeps=SAME_DELTA | Fact.BOUNDED, loses=Fact.EQUAL_WEIGHTS | Fact.FIXED_DENOMINATOR)

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Times the number of examples."""
        return weighted_mean.weigh(update, local.facts["examples"]), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Over the sum of the weights, which the parts keep."""
        return weighted_mean.divide(total), state
