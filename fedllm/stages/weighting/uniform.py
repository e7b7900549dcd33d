"""The plain mean: every client counts the same.

Δ = (1 / K) sum_k Δ_k        K: clients that answered, that were drawn, or that a draw is expected to have
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fedllm.messages.context import ClientContext, RoundContext, ServerContext
from fedllm.messages.traits import SAME_DELTA, Bracket, Fact, Traits
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.stages.weighting import weighted_mean
from fedllm.tensors.tree import Tree

FIGURES = "metrics"  # a mean over those who answered, whatever the denominator of the rest


@dataclass(frozen=True)
class Uniform(Stage):
    """Weight 1 for every client.

    Neutral: this is FedAvg for clients with equal numbers of examples.

    Args:
        denominator: "answered" divides by the clients that answered; "cohort" by those that were drawn, so that a lost
            client counts as no change and no client's absence changes what the others weigh; "expected" by the
            expected size of a cohort, which does not even depend on who was drawn. A part with a weight of its own is
            divided by the same number; a stage that weighs the delta itself is refused.
    """

    denominator: Literal["answered", "cohort", "expected"] = "answered"

    @property
    def traits(self) -> Traits:
        """What the denominator rests on: who answered, or who was drawn."""
        lost = Fact.FIXED_DENOMINATOR if self.denominator == "answered" else Fact.ANSWERED
        return Traits(Bracket.WEIGH, keeps=SAME_DELTA | Fact.BOUNDED, loses=lost)

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Weight 1."""
        return weighted_mean.weigh(update, 1.0), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Over the sum of the weights or the size of a cohort, which the parts keep as their weight."""
        return weighted_mean.divide(self._spread(total, self._number(ctx))), state

    def _number(self, ctx: RoundContext) -> float | None:
        """What divides; None: the weights of those who answered."""
        if self.denominator == "answered":
            return None
        if self.denominator == "expected" and isinstance(ctx, ServerContext):
            return ctx.expected
        return float(ctx.cohort)

    def _spread(self, total: Update, cohort: float | None) -> Update:
        """The total, its parts weighing as much as the whole cohort, and how much of it answered."""
        if not cohort:
            return total
        parts = {
            name: replace(part, weight=cohort, answered=part.weight / cohort)
            if part.weight and name != FIGURES
            else part
            for name, part in total.parts.items()
        }
        return replace(total, parts=parts)
