"""Language modelling: every token of a text is a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedllm.models.batch import Batch, client_means
from fedllm.models.objectives.base import Objective, RowScorer
from fedllm.models.templates import Template, learned_texts
from fedllm.models.tokenization import Text
from fedllm.tensors.tree import Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Lm(Objective):
    """Language modelling: loss on every token but the first, the mean per example over its own tokens."""

    def texts(
        self, records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template
    ) -> Sequence[Text]:
        """Labels on all tokens."""
        return learned_texts(records, tokenizer, template)

    def __call__(self, model: RowScorer, stack: Tree, batch: Batch) -> Tensor:
        """Mean over examples of the mean over tokens."""
        return client_means(model.row_losses(stack, batch), batch)
