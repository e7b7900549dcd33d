"""LoRA-XS for a stack of K clients over one frozen linear layer: a small square matrix between two fixed factors.

    y = W x + s B R_k A x        R_k (rank, rank), stacked (K, rank, rank); s = alpha / rank
    B = U, A = S V^T             of the largest `rank` singular values of the layer's own W = U S V^T

R alone trains, from zero, and is sent: rank² values a layer, whatever its width. The mean of B R_k A is B (mean of R_k)
A, exactly. B and A follow from the frozen weights, so they need no data and are never sent.

Bałazy et al. 2024, arXiv 2405.17604: S stands on the input's side; R starts at zero in place of N(0, 1e-5²). Federated
as in Fed-SB, Singhal et al. 2025, arXiv 2502.15436, which takes B and A from the first gradient of the full weights
(LoRA-SB); that would need a step on somebody's data before the first round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedllm.errors import ConfigError
from fedllm.models.adapters.base import Adapter, Attached, Decoder, InLayers, trained_dtype
from fedllm.models.adapters.peft_format import write_peft_lora
from fedllm.models.adapters.svd_init import singular_factors
from fedllm.models.adapters.targets import targeted
from fedllm.models.base_models.load import Base
from fedllm.models.layers.forward_context import current
from fedllm.models.layers.linear import Turned, as_stored, base_weight, replace_forward
from fedllm.rng import Key
from fedllm.tensors import low_rank
from fedllm.tensors.tree import Tree

LEAF = "lora_R"


@dataclass(frozen=True)
class LoraXs(Adapter):
    """Square matrices between fixed low-rank factors.

    Args:
        targets: as in `lora`.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all_linear",)
    stackable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"task.adapter.lora_xs.rank is {self.rank}; it must be 1 or more")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"task.adapter.lora_xs.alpha is {self.alpha}; it must be above 0 and finite")
        if not self.targets:
            raise ConfigError("task.adapter.lora_xs.targets is empty; name layers, or all_linear")

    @property
    def shares(self) -> bool:
        """Always."""
        return True

    def attach(self, base: Base) -> Attached:
        """Extend the targeted layers of the base model; their names and weights stay as they are.

        Raises:
            ConfigError: a target selects no layer, or the rank is above a layer's size.
            ModelError: a layer's weights are not finite, or its factors cannot be kept in the cache.
        """
        layers = targeted(base.model, self.targets, self.rank, "task.adapter.lora_xs")
        fixed = singular_factors({name: layer.weight.detach() for name, layer in layers.items()}, self.rank)
        dtype = trained_dtype(base)
        fixed = {name: leaf.to(base.model.device, dtype) for name, leaf in fixed.items()}
        for name, layer in layers.items():
            b, a = (leaf.to(base.model.device, base.model.dtype) for leaf in low_rank.pair(fixed, name))
            replace_forward(base.model, name, AdaptedXs(layer, name, b, a, self.alpha / self.rank))
        return AttachedLoraXs(Decoder(base), self, layers, fixed)


@dataclass(frozen=True, eq=False)
class AdaptedXs:
    """The forward pass of a frozen linear layer with the square matrices of the current pass. b (out, rank), a (rank,
    in): in the layer's type."""

    layer: nn.Linear
    path: str
    b: Tensor
    a: Tensor
    scale: float

    def __call__(self, inputs: Tensor) -> Tensor:
        """(1, T, in) of a packed row, or (B, L, in) of one client; (..., out) as well."""
        now = current()
        y = type(self.layer).forward(self.layer, inputs)
        r = now.stack.get(f"{self.path}.{LEAF}")
        if r is None:
            return y
        z = nn.functional.linear(inputs, self.a).flatten(0, -2)  # (T, rank), rows client by client
        sizes = list(now.client_tokens) or [len(z)]
        turned = torch.cat([z_k @ r_k.T for z_k, r_k in zip(z.split(sizes), r.to(z.dtype), strict=True)])
        return torch.addmm(y.flatten(0, -2), turned, self.b.T, alpha=self.scale).view(y.shape)


@dataclass(frozen=True, eq=False)
class AttachedLoraXs(InLayers):
    """LoRA-XS on a loaded base model. `fixed`: A and B of each layer."""

    settings: LoraXs
    layers: Mapping[str, nn.Linear]
    fixed: Tree

    def initial_params(self, key: Key) -> Tree:
        """Zeros: the base model itself. Their gradient is not zero, for B and A are not."""
        rank, dtype = self.settings.rank, trained_dtype(self.decoder.base)
        return {f"{name}.{LEAF}": torch.zeros(rank, rank, dtype=dtype) for name in self.layers}

    def save(self, params: Tree, folder: Path, base_name: str) -> None:
        """PEFT's layout of LoRA, with B R for lora_B."""
        settings = self.settings
        write_peft_lora(
            self._lora(params),
            folder,
            base_name=base_name,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=0.0,
            rslora=False,
            turned=any(isinstance(layer, Turned) for layer in self.layers.values()),
        )

    def merged(self, params: Tree, base: Base | None = None) -> Mapping[str, Tensor]:
        """W + s B R A, float32 or wider."""
        wide, model = trained_dtype(self.decoder.base), None if base is None else base.model
        scale, lora = self.settings.alpha / self.settings.rank, self._lora(params)
        found: Tree = {}
        for name, layer in self.layers.items():
            weight = base_weight(layer, name, model)
            b, a = low_rank.pair(lora, name)
            found[f"{name}.weight"] = as_stored(layer, weight.to(wide) + scale * (b @ a).to(weight.device))
        return found

    def _lora(self, params: Tree) -> Tree:
        """The same adapter as factors of LoRA."""
        found: Tree = {}
        for name in self.layers:
            b, a = low_rank.pair(self.fixed, name)
            found |= low_rank.layer_leaves(name, b @ params[f"{name}.{LEAF}"].to(b), a)
        return found
