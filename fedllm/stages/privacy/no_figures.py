"""Nothing about a client's work leaves it beside its update: no loss, no counts, no scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedllm.messages.context import ClientContext
from fedllm.messages.traits import SAME_DELTA, Bracket, Fact, Traits
from fedllm.messages.update import FIGURES, Update
from fedllm.stages.base import Stage
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class NoFigures(Stage):
    """Takes the parts "metrics" and "counts" out. A private experiment begins with it, unless `evaluation.private` is
    false.

    Neutral: the model is that of a run without it.
    """

    traits = Traits(Bracket.LOCAL, keeps=SAME_DELTA | Fact.BOUNDED | Fact.INTEGERS | Fact.FITTED)

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Everything else."""
        return replace(update, parts={n: part for n, part in update.parts.items() if n not in FIGURES}), memory
