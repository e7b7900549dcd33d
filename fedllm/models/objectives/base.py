"""Objectives: which tokens carry a label, and the loss of a batch, one mean per client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from fedllm.errors import with_record_place
from fedllm.models.batch import Batch, Example
from fedllm.models.templates import Template
from fedllm.models.tokenization import Text, encoded
from fedllm.tensors.tree import Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowScorer(Protocol):
    """What an objective may ask of a model."""

    def row_losses(self, stack: Tree, batch: Batch) -> Tensor:
        """(N,): negative log-likelihood of each labelled row."""
        ...


class Objective:
    """A frozen dataclass of settings. `couples_examples`: whether an example's loss depends on what else is in its
    batch, as where a batch's mean over tokens weighs examples by length, or examples are each other's contrast."""

    couples_examples: ClassVar[bool] = False

    def texts(
        self, records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template
    ) -> Sequence[Text]:
        """Each record's text in pieces, and whether the tokens of each carry labels."""
        raise NotImplementedError

    def encode(
        self,
        records: Iterable[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        max_length: int,
    ) -> list[Example | None]:
        """Records to examples, in one call of the tokenizer; None where nothing of a record carries a label.

        Raises:
            DataError: the template does not fit a record; with the record's place.
        """
        texts = with_record_place(list(records), lambda some: self.texts(some, tokenizer, template))
        return encoded(texts, tokenizer, max_length)

    def __call__(self, model: RowScorer, stack: Tree, batch: Batch) -> Tensor:
        """(K,): one mean loss per client."""
        raise NotImplementedError
