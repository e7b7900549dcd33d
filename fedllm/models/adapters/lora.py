"""LoRA for a stack of K clients over one frozen linear layer.

    y = W x + s B_k A_k dropout(x)     A_k (rank, in), B_k (out, rank); stacked (K, rank, in), (K, out, rank)
    s = alpha / rank, or alpha / sqrt(rank) with `rslora`

Hu et al. 2021, arXiv:2106.09685; rslora: Kalajdzievski 2023, arXiv:2312.03732. The scale is one constant of the task.
A starts as uniform(-1/sqrt(in), 1/sqrt(in)) (kaiming_uniform with a = sqrt(5), as in PEFT), B as zero; or both as the
largest singular values of the layer's own weight, which gives up what they hold (`init: singular`):

    y = (W - s B_0 A_0) x + s B_k A_k x        s B_0 A_0 = U_r S_r V_r^T of W = U S V^T, B_0 and A_0 with the roots of S

Meng et al. 2024 (PiSSA), arXiv:2404.02948; federated: Yan et al. 2024 (FeDeRA), arXiv:2404.18848.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedllm.errors import ConfigError
from fedllm.models.adapters.base import Adapter, Attached, Decoder, InLayers, trained_dtype
from fedllm.models.adapters.peft_format import read_peft_lora, write_peft_lora
from fedllm.models.adapters.svd_init import singular_factors
from fedllm.models.adapters.targets import targeted
from fedllm.models.base_models.load import Base
from fedllm.models.layers.base_delta_linear import frozen, moved, require_fit
from fedllm.models.layers.forward_context import Forward, current
from fedllm.models.layers.linear import Turned, as_stored, base_weight, replace_forward
from fedllm.models.layers.low_rank_linear import low_rank_linear
from fedllm.rng import Key
from fedllm.tensors import low_rank
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class Lora(Adapter):
    """Low-rank adapters.

    Args:
        targets: `all_linear` (every linear layer but the output head), or patterns over module paths; a pattern
            without a star fits the end of a path (`q_proj`).
        dropout: on the adapter's input; drawn per client from its own key.
        init: `zero` begins with an adapter that adds nothing, `singular` with the weight's largest singular values.
        init_from: a run folder or a folder in PEFT's layout to start from.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all_linear",)
    dropout: float = 0.0
    rslora: bool = False
    init: Literal["zero", "singular"] = "zero"
    init_from: str | None = None
    stackable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"task.adapter.lora.rank is {self.rank}; it must be 1 or more")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"task.adapter.lora.alpha is {self.alpha}; it must be above 0 and finite")
        if not self.targets:
            raise ConfigError("task.adapter.lora.targets is empty; name layers, or all_linear")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"task.adapter.lora.dropout is {self.dropout}; it must be in [0, 1)")
        if self.init == "singular" and self.init_from is not None:
            raise ConfigError("task.adapter.lora has init: singular and init_from; a start is one of the two")

    @property
    def shares(self) -> bool:
        """Not where dropout draws anew for each sequence."""
        return not self.dropout

    @property
    def needs_weights(self) -> bool:
        """Where they give up what the adapter begins with."""
        return self.init == "singular"

    @property
    def scale(self) -> float:
        """s of the formula."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def attach(self, base: Base) -> Attached:
        """Extend the targeted layers of the base model; their names and weights stay as they are.

        Raises:
            ConfigError: a target selects no layer, or the rank is above a layer's size.
        """
        layers = targeted(base.model, self.targets, self.rank, "task.adapter.lora")
        for name, layer in layers.items():
            replace_forward(base.model, name, Adapted(layer, name, self.scale, self.dropout))
        return AttachedLora(Decoder(base), self, layers, self._given_up(base, layers))

    def _given_up(self, base: Base, layers: Mapping[str, nn.Linear]) -> Tree:
        """B_0 and A_0 of the layers; none where the adapter begins with nothing."""
        if self.init == "zero":
            return {}
        found = singular_factors({name: layer.weight.detach() for name, layer in layers.items()}, self.rank)
        dtype, start = trained_dtype(base), dict[str, Tensor]()
        for name in layers:
            start |= low_rank.layer_leaves(name, *low_rank.balanced_svd(*low_rank.pair(found, name), self.scale))
        return {name: leaf.to(dtype) for name, leaf in start.items()}


@dataclass(frozen=True, eq=False)
class Adapted:
    """The forward pass of a frozen linear layer with what the adapters of the current pass add to it."""

    layer: nn.Linear
    path: str
    scale: float
    dropout: float

    def __call__(self, inputs: Tensor) -> Tensor:
        """(1, T, in) of a packed row, or (B, L, in) of one client; (..., out) as well."""
        now = current()
        b = now.stack.get(f"{self.path}.lora_B")
        if b is None:
            return type(self.layer).forward(self.layer, inputs)
        x = inputs.flatten(0, -2)
        sizes = list(now.client_tokens) or [len(x)]
        low = self._dropped(x, now, sizes) if self.dropout and now.dropout else None
        still = frozen(self.layer, self.path, now.stack)
        y = low_rank_linear(x, low, still, (now.stack[f"{self.path}.lora_A"], b), sizes, self.scale)
        return y.view(*inputs.shape[:-1], -1)

    def is_plain(self, now: Forward) -> bool:
        """Whether a pair of factors is all that a pass adds, so that a whole layer can be one operation."""
        return True

    def _dropped(self, x: Tensor, now: Forward, sizes: list[int]) -> Tensor:
        """Each client's rows with its own generator's dropout."""
        pieces = zip(x.split(sizes), now.dropout, strict=True)
        kept = [torch.rand(x_k.shape, generator=generator) >= self.dropout for x_k, generator in pieces]
        return x * torch.cat(kept).to(x) / (1 - self.dropout)


@dataclass(frozen=True, eq=False)
class AttachedLora(InLayers):
    """LoRA on a loaded base model. `given_up`: factors whose product the frozen weights lack."""

    settings: Lora
    layers: Mapping[str, nn.Linear]
    given_up: Tree = field(default_factory=dict)

    def initial_params(self, key: Key) -> Tree:
        """A uniform, B zero; or what the frozen weights lack, or what `init_from` holds."""
        if self.given_up:
            return {name: leaf.clone() for name, leaf in self.given_up.items()}
        if self.settings.init_from is not None:
            found = read_peft_lora(Path(self.settings.init_from), self._shapes(), scale=self.settings.scale)
            return {name: leaf.to(trained_dtype(self.decoder.base)) for name, leaf in found.items()}
        params: Tree = {}
        dtype, rank = trained_dtype(self.decoder.base), self.settings.rank
        for name, layer in self.layers.items():
            out_size, in_size = layer.out_features, layer.in_features
            generator = key.fold("lora", name).generator()
            uniform = torch.rand(rank, in_size, generator=generator, dtype=torch.float64) * 2 - 1
            params[f"{name}.lora_A"] = (uniform / math.sqrt(in_size)).to(dtype)
            params[f"{name}.lora_B"] = torch.zeros(out_size, rank, dtype=dtype)
        return params

    def fits(self, base_delta: BaseDelta) -> None:
        """As many rows and columns as the layers have."""
        require_fit(base_delta, self.layers)

    @property
    def num_movable(self) -> int:
        """Of all layers that are extended."""
        return sum(layer.out_features * layer.in_features for layer in self.layers.values())

    def moved(self, base_delta: BaseDelta) -> Tree:
        """The frozen weights with the base delta in them."""
        return moved(self.layers, [self._lack, base_delta], self.settings.scale)

    @property
    def _lack(self) -> BaseDelta:
        """What the frozen weights have given up, as what is added to them."""
        lost = {name: -leaf if name.endswith(low_rank.B) else leaf for name, leaf in self.given_up.items()}
        return BaseDelta({1: lost} if lost else {})

    def save(self, params: Tree, folder: Path, base_name: str) -> None:
        """PEFT's layout."""
        settings = self.settings
        write_peft_lora(
            self._lack.folded({name: params[name] for name in self._shapes()}),
            folder,
            base_name=base_name,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            rslora=settings.rslora,
            turned=any(isinstance(layer, Turned) for layer in self.layers.values()),
        )

    def merged(self, params: Tree, base: Base | None = None) -> Mapping[str, Tensor]:
        """W + s B A, float32 or wider."""
        wide, model = trained_dtype(self.decoder.base), None if base is None else base.model
        whole, found = self._lack.folded(params), dict[str, Tensor]()
        for name, layer in self.layers.items():
            weight = base_weight(layer, name, model)
            product = torch.matmul(*low_rank.pair(whole, name)).to(weight.device)
            found[f"{name}.weight"] = as_stored(layer, weight.to(wide) + self.settings.scale * product)
        return found

    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        rank = self.settings.rank
        shapes: dict[str, tuple[int, ...]] = {}
        for name, layer in self.layers.items():
            shapes[f"{name}.lora_A"] = (rank, layer.in_features)
            shapes[f"{name}.lora_B"] = (layer.out_features, rank)
        return shapes
