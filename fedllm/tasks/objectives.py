"""Objectives: which tokens carry a label, and the loss of a batch, one mean per client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from fedllm.batch import Batch, Example, client_means
from fedllm.tasks.template import Template, encode_response, encode_text
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

    def encode(
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int
    ) -> Example | None:
        """A record to an example; None if nothing of it carries a label."""
        raise NotImplementedError

    def __call__(self, model: Rows, stack: Tree, batch: Batch) -> Tensor:
        """(K,): one mean loss per client."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sft(Objective):
    """Supervised fine-tuning: loss on response tokens only, the mean per example over its own tokens."""

    def encode(
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int
    ) -> Example | None:
        """Labels on the responses."""
        return encode_response(record, tokenizer, template, max_length)

    def __call__(self, model: Rows, stack: Tree, batch: Batch) -> Tensor:
        """Mean over examples of the mean over response tokens."""
        return client_means(model.row_losses(stack, batch), batch)


@dataclass(frozen=True)
class Lm(Objective):
    """Language modelling: loss on every token but the first, the mean per example over its own tokens."""

    def encode(
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int
    ) -> Example | None:
        """Labels on all tokens."""
        return encode_text(record, tokenizer, template, max_length)

    def __call__(self, model: Rows, stack: Tree, batch: Batch) -> Tensor:
        """Mean over examples of the mean over tokens."""
        return client_means(model.row_losses(stack, batch), batch)
