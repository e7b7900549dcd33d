"""A frozen linear layer's weight with what a server has added to it.

    W' = W + s sum_v B_v A_v

In 16 bits W' is two terms, the nearest value of the type and what it leaves out, so that a small step is not lost in
the rounding of W: 16 bits of precision in bfloat16, 22 in float16, for a second product with each frozen layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedllm.errors import ClientError
from fedllm.models.layers.low_rank_linear import Frozen
from fedllm.models.layers.quantized_linear import Quantized, QuantizedLinear
from fedllm.tensors import low_rank
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.tree import Tree

MOVED, REST = "moved", "moved_rest"


def moved(layers: Mapping[str, nn.Linear], base_deltas: Sequence[BaseDelta], scale: float) -> Tree:
    """Tensors `LAYER.moved` (out, in), and `LAYER.moved_rest` in 16 bits, of the layers that the base deltas move."""
    found: Tree = {}
    for name in sorted({name for delta in base_deltas for name in delta.layers()}):
        weight = layers[name].weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        added = sum(delta.dense(name).to(weight.device, wide) for delta in base_deltas if name in delta.layers())
        whole = weight.to(wide) + scale * added
        first = whole.to(weight.dtype)
        found[f"{name}.{MOVED}"] = first
        if wide != weight.dtype:
            found[f"{name}.{REST}"] = (whole - first).to(weight.dtype)
    return found


def frozen(layer: nn.Linear, path: str, stack: Mapping[str, Tensor]) -> Frozen | Quantized:
    """A layer's frozen product in a pass; a moved weight stands in the stack, the same for all clients."""
    whole, rest = stack.get(f"{path}.{MOVED}"), stack.get(f"{path}.{REST}")
    if whole is None:
        return layer.product if isinstance(layer, QuantizedLinear) else Frozen(layer.weight, layer.bias)
    return Frozen(whole[0], layer.bias, None if rest is None else rest[0])


def require_fit(base_delta: BaseDelta, layers: Mapping[str, nn.Linear]) -> None:
    """
    Raises:
        ClientError: it names other layers, or has tensors of another shape.
    """
    for at, leaves in base_delta.steps.items():
        shapes = dict(_shapes(leaves, layers))
        for name, leaf in leaves.items():
            if not leaf.is_floating_point() or shapes.get(name) != leaf.shape:
                raise ClientError(
                    f"version {at} of the frozen weights holds '{name}' {tuple(leaf.shape)}, which fits no layer that "
                    "the adapter extends; the server must have the same model and adapter"
                )


def _shapes(leaves: Tree, layers: Mapping[str, nn.Linear]) -> Iterator[tuple[str, torch.Size]]:
    for layer in {name.rpartition(".")[0] for name in leaves} & layers.keys():
        size_out, size_in = layers[layer].out_features, layers[layer].in_features
        b, a = leaves.get(f"{layer}.{low_rank.B}"), leaves.get(f"{layer}.{low_rank.A}")
        if b is not None and a is not None and a.dim() == 2:
            yield f"{layer}.{low_rank.B}", torch.Size((size_out, len(a)))
            yield f"{layer}.{low_rank.A}", torch.Size((len(a), size_in))
            values = leaves.get(f"{layer}.{low_rank.SPARSE}")
            if values is not None and values.dim() == 1 and len(values) <= size_out * size_in:
                yield f"{layer}.{low_rank.SPARSE}", values.shape
        yield f"{layer}.{low_rank.PRODUCT}", torch.Size((size_out, size_in))
