"""Soft prompts: trained vectors in front of every sequence; the model itself stays as it is.

    h = decoder([p_1 ... p_n, e(x_1) ... e(x_L)])    p: (tokens, hidden), positions 0 ... n + L - 1

The prompt carries no label, and the returned hidden states are those of x. Lester et al. 2021, arXiv:2104.08691.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedllm.errors import ConfigError
from fedllm.models.adapters.base import Adapter, Attached, Decoder, trained_dtype
from fedllm.models.adapters.peft_format import write_peft_prompt
from fedllm.models.adapters.random_tokens import random_tokens
from fedllm.models.base_models.load import Base
from fedllm.models.batch import Batch
from fedllm.models.layers.cross_entropy import Head
from fedllm.rng import Key
from fedllm.tensors.tree import Tree

LEAF = "soft_prompt"
SAMPLE = 1000  # tokens whose embeddings `normal` measures


@dataclass(frozen=True)
class SoftPrompt(Adapter):
    """A trained prompt.

    Args:
        tokens: its length; it comes on top of the work's `max_length`.
        init: `words` (embeddings of tokens drawn from the vocabulary) or `normal` (with the mean and the standard
            deviation of such embeddings).
    """

    tokens: int = 20
    init: Literal["words", "normal"] = "words"
    stackable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"task.adapter.soft_prompt.tokens is {self.tokens}; it must be 1 or more")

    @property
    def virtual_tokens(self) -> int:
        """The prompt."""
        return self.tokens

    def attach(self, base: Base) -> Attached:
        """Nothing in the base model changes."""
        return AttachedPrompt(self, Decoder(base))


@dataclass(frozen=True, eq=False)
class AttachedPrompt:
    """A soft prompt on a loaded base model. An empty stack is the base model without one."""

    settings: SoftPrompt
    decoder: Decoder

    def initial_params(self, key: Key) -> Tree:
        """Drawn from `key`."""
        generator, size = key.fold(LEAF).generator(), self.settings.tokens
        count = size if self.settings.init == "words" else SAMPLE
        words = self._embed(random_tokens(self.decoder.base.tokenizer, count, generator))
        prompt = words
        if self.settings.init == "normal":
            drawn = torch.randn(size, words.shape[1], generator=generator, dtype=torch.float64).to(words.device)
            prompt = drawn * words.double().std() + words.double().mean()
        return {LEAF: prompt.to("cpu", trained_dtype(self.decoder.base))}

    def hidden(self, stack: Tree, batch: Batch) -> Tensor:
        """(T, d)."""
        if not stack:
            return self.decoder.row({}, batch)
        words = self._embed(batch.tokens)
        prompts, size = stack[LEAF].to(words.dtype), self.settings.tokens
        owners = batch.sequence_clients.tolist()
        pieces = zip(owners, words.split(batch.lengths), strict=True)
        row = torch.cat([part for owner, piece in pieces for part in (prompts[owner], piece)])
        hidden = self.decoder.embedded(row, [size + length for length in batch.lengths], batch.recompute)
        # the t-th real token stands behind its own prompt and those of the sequences before it
        shift = size * (1 + torch.repeat_interleave(torch.arange(len(owners)), torch.tensor(batch.lengths)))
        return hidden[(torch.arange(len(words)) + shift).to(hidden.device)]

    def head(self, stack: Tree) -> Head:
        """The frozen head."""
        return self.decoder.head()

    def logits(self, params: Tree, tokens: Tensor, mask: Tensor, cache: Any | None) -> tuple[Tensor, Any | None]:
        """(B, V) of the next token. The prompt enters with the first tokens and stays in the cache."""
        if not params:
            return self.decoder.padded({}, {"input_ids": tokens}, mask, cache)
        words = self._embed(tokens)
        prompt = params[LEAF].to(words).expand(len(tokens), -1, -1)
        padding_first, order = torch.cat([mask.new_ones(prompt.shape[:2]), mask], 1).sort(stable=True)
        if cache is None:  # the prompt goes between the padding and the first token
            words = torch.cat([prompt, words], 1).gather(1, order[:, :, None].expand(-1, -1, words.shape[2]))
        return self.decoder.padded({}, {"inputs_embeds": words}, padding_first, cache)

    def save(self, params: Tree, folder: Path, base_name: str) -> None:
        """PEFT's prompt tuning."""
        config = self.decoder.base.model.config.get_text_config()
        write_peft_prompt(params[LEAF], folder, base_name=base_name, config=config)

    def merged(self, params: Tree, base: Base | None = None) -> Mapping[str, Tensor]:
        """Not possible."""
        raise ConfigError("a soft prompt cannot be merged into weights; export --to peft")

    def _embed(self, tokens: Tensor) -> Tensor:
        model = self.decoder.base.model
        embedded: Tensor = model.get_input_embeddings()(tokens.to(model.device))
        return embedded
