"""The largest singular vectors of a model's weights, computed once and kept in the cache folder.

    W (out, in) = U S V^T        lora_B = U (out, rank)        lora_A = S V^T = U^T W (rank, in)

Each component has one form (`low_rank.top_singular`). Libraries of linear algebra may still differ in the last digits,
from one processor to the next; components of nearly equal singular values then differ by more, for they are mixed.
Processes that share a cache folder share the file, and with it the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedllm.errors import ModelError
from fedllm.models.base_models.cache import build_once
from fedllm.tensors import low_rank, tree
from fedllm.tensors.tree import Tree

FILE = "factors.safetensors"


def singular_factors(weights: Mapping[str, Tensor], rank: int) -> Tree:
    """`LAYER.lora_A` and `LAYER.lora_B`, float64 on the CPU, of each layer's weight (out, in), rank <= min(out, in).

    Raises:
        ModelError: weights that are not finite, or a cache folder that cannot be written to.
    """

    def build(out: Path, work: Path) -> None:
        save_file({name: leaf for layer in weights for name, leaf in _largest(layer, weights[layer], rank)}, out / FILE)

    return load_file(build_once(f"singular-{tree.digest(weights)[:24]}-{rank}", build) / FILE)


def _largest(layer: str, weight: Tensor, rank: int) -> list[tuple[str, Tensor]]:
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"the weights of layer {layer} are not finite, so that they have no singular vectors")
    b, a = low_rank.top_singular(weight, rank)
    return [(name, leaf.contiguous()) for name, leaf in low_rank.layer_leaves(layer, b, a).items()]
