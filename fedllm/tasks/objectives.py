"""Objectives: which tokens carry a label, and the loss of a batch, one mean per client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from fedllm.batch import Batch, Example, client_means
from fedllm.federation import naming
from fedllm.tasks.encoding import Text, encoded
from fedllm.tasks.template import Template, learned_texts, response_texts
from fedllm.tree import Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rows(Protocol):
    """What an objective may ask of a model."""

    def row_losses(self, stack: Tree, batch: Batch) -> Tensor:
        """(N,): negative log-likelihood of each labelled row."""
        ...


class Objective:
    """A frozen dataclass of settings."""

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
        texts = naming(list(records), lambda some: self.texts(some, tokenizer, template))
        return encoded(texts, tokenizer, max_length)

    def __call__(self, model: Rows, stack: Tree, batch: Batch) -> Tensor:
        """(K,): one mean loss per client."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sft(Objective):
    """Supervised fine-tuning: loss on response tokens only, the mean per example over its own tokens."""

    def texts(
        self, records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template
    ) -> Sequence[Text]:
        """Labels on the responses."""
        return response_texts(records, tokenizer, template)

    def __call__(self, model: Rows, stack: Tree, batch: Batch) -> Tensor:
        """Mean over examples of the mean over response tokens."""
        return client_means(model.row_losses(stack, batch), batch)


@dataclass(frozen=True)
class Lm(Objective):
    """Language modelling: loss on every token but the first, the mean per example over its own tokens."""

    def texts(
        self, records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template
    ) -> Sequence[Text]:
        """Labels on all tokens."""
        return learned_texts(records, tokenizer, template)

    def __call__(self, model: Rows, stack: Tree, batch: Batch) -> Tensor:
        """Mean over examples of the mean over tokens."""
        return client_means(model.row_losses(stack, batch), batch)
