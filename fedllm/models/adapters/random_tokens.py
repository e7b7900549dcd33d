"""Random tokens of a vocabulary, for adapters that start with what a model knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def random_tokens(tokenizer: PreTrainedTokenizerBase, count: int, generator: torch.Generator) -> Tensor:
    """(count,) tokens at random, without special ones."""
    known = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    return known[torch.randint(len(known), (count,), generator=generator)]
