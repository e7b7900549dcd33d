"""Prefix tuning for a stack of K clients: trained keys and values in front of those of every sequence, in each layer.

    attention of layer l: softmax(s Q [P_k, K]^T) [P_v, V]        P_k, P_v (tokens, key heads x d) of the client

A prefix has no queries and takes no place in the feed-forward blocks; keys enter behind the rotary embedding, and the
sequence's own positions begin behind the prefix, as in peft. Li and Liang 2021, arXiv:2101.00190; it starts, as the
paper advises, with the keys and values of real words, without the paper's reparametrisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedllm.errors import ConfigError, ModelError
from fedllm.models.adapters.base import Adapter, Attached, Decoder, trained_dtype
from fedllm.models.adapters.peft_format import num_key_heads, write_peft_prefix
from fedllm.models.adapters.random_tokens import random_tokens
from fedllm.models.base_models.load import Base
from fedllm.models.batch import Batch
from fedllm.models.layers.cross_entropy import Head
from fedllm.models.layers.forward_context import Forward, forward_context
from fedllm.models.layers.prefix_attention import leaf_name
from fedllm.rng import Key
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class Prefix(Adapter):
    """Trained keys and values.

    Args:
        tokens: how many in each layer; they come on top of the work's `max_length` in attention alone.
    """

    tokens: int = 20
    stackable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"task.adapter.prefix.tokens is {self.tokens}; it must be 1 or more")

    @property
    def virtual_tokens(self) -> int:
        """The prefix."""
        return self.tokens

    def attach(self, base: Base) -> Attached:
        """Nothing in the base model changes.

        Raises:
            ModelError: its sequences cannot share a row, or some of its layers see a window of the sequence alone.
        """
        if base.unpackable is not None:
            raise ModelError(f"adapter prefix needs fedllm's attention, and {base.unpackable}; use lora or soft_prompt")
        config = base.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        windowed = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
        if windowed:
            raise ModelError(f"layers of {base.title} see a window, in which a prefix would not stay; use lora")
        return AttachedPrefix(self, Decoder(base), config.num_hidden_layers)


@dataclass(frozen=True, eq=False)
class AttachedPrefix:
    """A prefix on a loaded base model. An empty stack is the base model without one."""

    settings: Prefix
    decoder: Decoder
    layers: int

    @torch.no_grad()
    def initial_params(self, key: Key) -> Tree:
        """The keys and values that the base model makes of words drawn from `key`."""
        words = random_tokens(self.decoder.base.tokenizer, self.settings.tokens, key.fold("prefix").generator())
        model, dtype, params = self.decoder.base.model, trained_dtype(self.decoder.base), dict[str, Tensor]()
        with forward_context(Forward({})):
            cache = model(input_ids=words[None].to(model.device), use_cache=True).past_key_values
        for layer in range(self.layers):
            for part, states in (("key", cache.layers[layer].keys), ("value", cache.layers[layer].values)):
                rows = states[0].transpose(0, 1).flatten(1)  # (heads, tokens, d) to (tokens, heads x d)
                params[leaf_name(layer, part)] = rows.to("cpu", dtype).contiguous()
        return params

    def hidden(self, stack: Tree, batch: Batch) -> Tensor:
        """(T, d)."""
        return self.decoder.row(stack, batch, offset=self.settings.tokens if stack else 0)

    def head(self, stack: Tree) -> Head:
        """The frozen head."""
        return self.decoder.head()

    def logits(self, params: Tree, tokens: Tensor, mask: Tensor, cache: Any | None) -> tuple[Tensor, Any | None]:
        """(B, V) of the next token. The prefix is the first part of the cache."""
        if not params:
            return self.decoder.padded({}, {"input_ids": tokens}, mask, cache)
        seen = torch.cat([mask.new_ones(len(mask), self.settings.tokens), mask], 1)
        return self.decoder.padded({}, {"input_ids": tokens}, seen, cache or self._cache(params, len(tokens)))

    def save(self, params: Tree, folder: Path, base_name: str) -> None:
        """PEFT's prefix tuning."""
        parts = [params[leaf_name(layer, part)] for layer in range(self.layers) for part in ("key", "value")]
        config = self.decoder.base.model.config.get_text_config()
        write_peft_prefix(torch.cat(parts, 1), folder, base_name=base_name, config=config)

    def merged(self, params: Tree, base: Base | None = None) -> Mapping[str, Tensor]:
        """Not possible."""
        raise ConfigError("a prefix cannot be merged into weights; export --to peft")

    def _cache(self, params: Tree, batch: int) -> Any:
        """transformers' cache of the prefix, for each sequence of a batch."""
        from transformers import DynamicCache

        model, cache = self.decoder.base.model, DynamicCache()
        heads = num_key_heads(model.config.get_text_config())
        for layer in range(self.layers):
            key, value = (
                params[leaf_name(layer, part)].to(model.device, model.dtype).unflatten(1, (heads, -1)).transpose(0, 1)
                for part in ("key", "value")
            )
            cache.update(key.expand(batch, -1, -1, -1).clone(), value.expand(batch, -1, -1, -1).clone(), layer)
        return cache
