"""Bottleneck adapters for a stack of K clients, behind frozen linear layers.

    h = W x + bias        y = h + U_k act(D_k h)        D_k (size, out), U_k (out, size); stacked (K, ...)

D starts as uniform(-1/sqrt(out), 1/sqrt(out)), U as zero, so that the model is the base model at first. There are no
biases. Behind the last linear layer of attention and of the feed-forward block it is Houlsby et al. 2019,
arXiv:1902.00751; behind that of the feed-forward block alone, Pfeiffer et al. 2021, arXiv:2005.00247.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedllm.errors import ConfigError
from fedllm.models.adapters.base import Adapter, Attached, Decoder, InLayers, trained_dtype
from fedllm.models.adapters.peft_format import write_weights
from fedllm.models.adapters.targets import targeted
from fedllm.models.base_models.load import Base
from fedllm.models.layers.forward_context import current
from fedllm.models.layers.linear import replace_forward
from fedllm.rng import Key
from fedllm.tensors.tree import Tree

DOWN, UP = "bottleneck_down", "bottleneck_up"
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


@dataclass(frozen=True)
class Bottleneck(Adapter):
    """Two small layers behind others.

    Args:
        size: of the bottleneck. targets: as in `lora`; the default is the end of each block. activation: between them.
    """

    size: int = 32
    targets: tuple[str, ...] = ("o_proj", "down_proj")
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    stackable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"task.adapter.bottleneck.size is {self.size}; it must be 1 or more")
        if not self.targets:
            raise ConfigError("task.adapter.bottleneck.targets is empty; name layers, or all_linear")

    @property
    def shares(self) -> bool:
        """Always."""
        return True

    def attach(self, base: Base) -> Attached:
        """Extend the targeted layers of the base model; their names and weights stay as they are.

        Raises:
            ConfigError: a target selects no layer.
        """
        layers = targeted(base.model, self.targets, 1, "task.adapter.bottleneck")
        for name, layer in layers.items():
            replace_forward(base.model, name, Narrowed(layer, name, self.activation))
        return AttachedBottleneck(Decoder(base), self, layers)


@dataclass(frozen=True, eq=False)
class Narrowed:
    """The forward pass of a frozen linear layer with the bottlenecks of the current pass behind it."""

    layer: nn.Linear
    path: str
    activation: str

    def __call__(self, inputs: Tensor) -> Tensor:
        """(1, T, in) of a packed row, or (B, L, in) of one client; (..., out) as well."""
        now, h = current(), type(self.layer).forward(self.layer, inputs)
        down = now.stack.get(f"{self.path}.{DOWN}")
        if down is None:
            return h
        up, rows = now.stack[f"{self.path}.{UP}"], h.flatten(0, -2)
        sizes = list(now.client_tokens) or [len(rows)]
        pieces = zip(rows.split(sizes), down.to(h.dtype), up.to(h.dtype), strict=True)
        act = ACTIVATIONS[self.activation]
        return torch.cat([torch.addmm(h_k, act(h_k @ d.T), u.T) for h_k, d, u in pieces]).view(h.shape)


@dataclass(frozen=True, eq=False)
class AttachedBottleneck(InLayers):
    """Bottlenecks on a loaded base model."""

    settings: Bottleneck
    layers: Mapping[str, nn.Linear]

    def initial_params(self, key: Key) -> Tree:
        """D uniform, U zero."""
        params: Tree = {}
        dtype, size = trained_dtype(self.decoder.base), self.settings.size
        for name, layer in self.layers.items():
            wide = layer.out_features
            drawn = torch.rand(size, wide, generator=key.fold("bottleneck", name).generator(), dtype=torch.float64)
            params[f"{name}.{DOWN}"] = ((2 * drawn - 1) / math.sqrt(wide)).to(dtype)
            params[f"{name}.{UP}"] = torch.zeros(wide, size, dtype=dtype)
        return params

    def save(self, params: Tree, folder: Path, base_name: str) -> None:
        """The tensors by name: PEFT has no layout for them."""
        write_weights(params, folder, base_name=base_name)

    def merged(self, params: Tree, base: Base | None = None) -> Mapping[str, Tensor]:
        """Not possible."""
        raise ConfigError("a bottleneck adapter cannot be merged into weights; export --to peft writes its tensors")
