"""The base model's own weights: all of them, those of its norms, or its biases.

BitFit: Ben Zaken et al. 2022, arXiv:2106.10199. A tensor has its parameter's name and holds the weight itself, not a
difference; a head that is tied to the embedding is one tensor. Tensors are float32 (float64 on a float64 base) and are
rounded to the base's dtype in the forward pass, so small steps are not lost. One client at a time, in one thread: a
forward pass swaps the model's weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm.models.adapters.base import Adapter, Attached, Decoder, trained_dtype
from fedllm.models.adapters.peft_format import write_weights
from fedllm.models.base_models.load import Base
from fedllm.models.base_models.tied_weights import names_of
from fedllm.models.batch import Batch
from fedllm.models.layers.cross_entropy import Head
from fedllm.rng import Key
from fedllm.tensors.tree import Tree


class Weights(Adapter):
    """Some of the weights."""

    @property
    def shares(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class Full(Weights):
    """All weights."""

    @property
    def needs_weights(self) -> bool:
        """They train."""
        return True

    def attach(self, base: Base) -> Attached:
        """Nothing in the base model changes."""
        return _attached(base, dict(base.model.named_parameters()))


@dataclass(frozen=True)
class Norms(Weights):
    """The weights of the normalisation layers."""

    def attach(self, base: Base) -> Attached:
        """Nothing in the base model changes."""
        norms = {name for name, module in base.model.named_modules() if "norm" in type(module).__name__.lower()}
        names = [name for name, _ in base.model.named_parameters() if name.rpartition(".")[0] in norms]
        return _attached(base, names)


@dataclass(frozen=True)
class BitFit(Weights):
    """The biases. A model without biases has no tensor."""

    def attach(self, base: Base) -> Attached:
        """Nothing in the base model changes."""
        return _attached(base, [name for name, _ in base.model.named_parameters() if name.endswith(".bias")])


def _attached(base: Base, names: Iterable[str]) -> AttachedWeights:
    parameters = dict(base.model.named_parameters())
    head = base.model.get_output_embeddings().weight
    head_name = next((name for name, parameter in parameters.items() if parameter is head), "")  # none if quantised
    return AttachedWeights(Decoder(base), {name: parameters[name] for name in names}, head_name)


@dataclass(frozen=True, eq=False)
class AttachedWeights:
    """Some of a loaded base model's own weights. `head_name`: the tensor that is the output head, if it can
    train."""

    decoder: Decoder
    own: Mapping[str, Tensor]
    head_name: str

    def initial_params(self, key: Key) -> Tree:
        """The base model's values."""
        dtype = trained_dtype(self.decoder.base)
        return {name: leaf.detach().to("cpu", dtype, copy=True) for name, leaf in self.own.items()}

    def hidden(self, stack: Tree, batch: Batch) -> Tensor:
        """(T, d)."""
        assert len(batch.counts) == 1, "weights are not stackable"
        return self._with({name: leaf[0] for name, leaf in stack.items()}).row({}, batch)

    def head(self, stack: Tree) -> Head:
        """The trained head, or the frozen one."""
        return self._cast(stack[self.head_name][0]) if self.head_name in stack else self.decoder.head()

    def logits(self, params: Tree, tokens: Tensor, mask: Tensor, cache: Any | None) -> tuple[Tensor, Any | None]:
        """(B, V) of the next token."""
        return self._with(params).padded({}, {"input_ids": tokens}, mask, cache)

    def save(self, params: Tree, folder: Path, base_name: str) -> None:
        """The trained weights by name: PEFT has no layout for them."""
        write_weights(params, folder, base_name=base_name)

    def merged(self, params: Tree, base: Base | None = None) -> Mapping[str, Tensor]:
        """The tensors themselves, under all names that the model has for them."""
        names = names_of(self.decoder.base.model)
        wide = {name: leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for name, leaf in params.items()}
        return {other: leaf for name, leaf in wide.items() for other in names[name]}

    def _with(self, params: Mapping[str, Tensor]) -> Decoder:
        return replace(self.decoder, weights={name: self._cast(leaf) for name, leaf in params.items()})

    def _cast(self, leaf: Tensor) -> Tensor:
        return leaf.to(self.decoder.base.model.device, self.decoder.base.model.dtype)
