"""LoRA beside sparse values of the same layers, for a stack of K clients over one frozen linear layer.

    y = W x + s (B_k A_k + S_k) x        S_k (out, in): trained values at the layer's positions, zero elsewhere

The positions are the same for everybody (`sparse_mask`). Both parts begin at zero. The stage `sparse_first` trains
first one and then the other (SLoRA: Babakniya et al. 2023, arXiv 2308.06522).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedllm.errors import ConfigError
from fedllm.models.adapters.base import Attached, Decoder, trained_dtype
from fedllm.models.adapters.lora import Adapted, AttachedLora, Lora
from fedllm.models.adapters.targets import targeted
from fedllm.models.base_models.load import Base
from fedllm.models.layers.forward_context import Forward, current
from fedllm.models.layers.linear import replace_forward
from fedllm.rng import Key
from fedllm.tensors import low_rank, sparse_mask
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class SparseLora(Lora):
    """Low-rank adapters and sparse values.

    Args:
        density: share of a layer's values that train, above 0 and at most 1.
    """

    density: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ConfigError(f"task.adapter.sparse_lora.density is {self.density}; it must be above 0 and at most 1")
        if self.init != "zero" or self.init_from is not None:
            raise ConfigError("task.adapter.sparse_lora begins at zero; leave out init and init_from")

    def attach(self, base: Base) -> Attached:
        """Extend the targeted layers of the base model; their names and weights stay as they are.

        Raises:
            ConfigError: a target selects no layer, or the rank is above a layer's size.
        """
        layers = targeted(base.model, self.targets, self.rank, "task.adapter.sparse_lora")
        for name, layer in layers.items():
            replace_forward(base.model, name, AdaptedSparse(layer, name, self.scale, self.dropout))
        return AttachedSparse(Decoder(base), self, layers)


@dataclass(frozen=True, eq=False)
class AdaptedSparse(Adapted):
    """The forward pass of a frozen linear layer, with the adapters and the sparse values of the current pass."""

    def is_plain(self, now: Forward) -> bool:
        """Sparse values are more than a pair of factors."""
        return False

    def __call__(self, inputs: Tensor) -> Tensor:
        """(1, T, in) of a packed row, or (B, L, in) of one client; (..., out) as well."""
        now, y = current(), super().__call__(inputs)
        values = now.stack.get(f"{self.path}.{low_rank.SPARSE}")
        if values is None or not (values.requires_grad or bool(values.any())):
            return y
        x = inputs.flatten(0, -2)
        sizes = tuple(now.client_tokens) or (len(x),)
        shape = (self.layer.out_features, self.layer.in_features)
        added: Tensor = _Sparse.apply(x, values, self.path, shape, sizes)  # type: ignore[no-untyped-call]
        return y + self.scale * added.view(y.shape)


class _Sparse(torch.autograd.Function):
    """y_k = x_k S_k^T; dx_k = dy_k S_k; the values' gradient is dy_k^T x_k at their places."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, layer: str, shape: tuple[int, int], sizes: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.layer, ctx.shape, ctx.sizes = layer, shape, sizes
        whole = (sparse_mask.scatter(layer, own.to(x.dtype), shape) for own in values)
        return torch.cat([x_k @ s_k.T for x_k, s_k in zip(x.split(list(sizes)), whole, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        rows = list(zip(dy.split(list(ctx.sizes)), x.split(list(ctx.sizes)), values, strict=True))
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = torch.cat(
                [dy_k @ sparse_mask.scatter(ctx.layer, own.to(dy.dtype), ctx.shape) for dy_k, _, own in rows]
            )
        if ctx.needs_input_grad[1]:
            found = [sparse_mask.gather(ctx.layer, dy_k.T @ x_k, values.shape[1]) for dy_k, x_k, _ in rows]
            dvalues = torch.stack(found).to(values.dtype)
        return dx, dvalues, None, None, None


@dataclass(frozen=True, eq=False)
class AttachedSparse(AttachedLora):
    """LoRA and sparse values on a loaded base model."""

    def initial_params(self, key: Key) -> Tree:
        """LoRA's start, and zeros."""
        assert isinstance(self.settings, SparseLora)
        dtype, params = trained_dtype(self.decoder.base), super().initial_params(key)
        for name, layer in self.layers.items():
            count = sparse_mask.num_values((layer.out_features, layer.in_features), self.settings.density)
            params[f"{name}.{low_rank.SPARSE}"] = torch.zeros(count, dtype=dtype)
        return params

    def save(self, params: Tree, folder: Path, base_name: str) -> None:
        """PEFT's layout of LoRA; sparse values that are not zero become factors of the layer's own rank."""
        super().save(_folded(params), folder, base_name)

    def merged(self, params: Tree, base: Base | None = None) -> Mapping[str, Tensor]:
        """W + s (B A + S), float32 or wider."""
        return super().merged(_folded(params), base)


def _folded(params: Tree) -> Tree:
    """Sparse values that are not zero as components of the factors."""
    values = {n: leaf for n, leaf in params.items() if n.endswith(f".{low_rank.SPARSE}") and bool(leaf.any())}
    if not values:
        return params
    layers = [name.rpartition(".")[0] for name in values]
    empty = {layer: (b[:, :0], a[:0]) for layer in layers for b, a in [low_rank.pair(params, layer)]}
    step = {name: leaf for layer, pair in empty.items() for name, leaf in low_rank.layer_leaves(layer, *pair).items()}
    return BaseDelta({1: {**step, **values}}).folded(params)
