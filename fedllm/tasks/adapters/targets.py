"""Which linear layers an adapter extends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fedllm.errors import ConfigError, nearest
from fedllm.tree import matches


def targeted(model: nn.Module, targets: Sequence[str], rank: int, key: str) -> Mapping[str, nn.Linear]:
    """The layers that `targets` choose, by their paths and in the model's order; never the output head.

    A target is `all_linear`, a pattern over paths, or, without a star, the end of a path. `key`: the adapter's place in
    an experiment, for errors.

    Raises:
        ConfigError: a target selects no layer, or the rank is above a layer's size.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    chosen: set[str] = set()
    for target in targets:
        pattern = "*" if target == "all_linear" else target if "*" in target else f"*.{target}"
        found = {name for name in linears if matches(name, [pattern])}
        if not found:
            known = {name.rpartition(".")[2] for name in linears}
            raise ConfigError(f"{key}.targets: '{target}' fits no layer{nearest(target, known)}")
        chosen |= found
    layers = {name: layer for name, layer in linears.items() if name in chosen}
    for name, layer in layers.items():
        if rank > min(layer.out_features, layer.in_features):
            size = f"{layer.out_features}x{layer.in_features}"
            raise ConfigError(f"{key}.rank is {rank}, above the size {size} of layer {name}")
    return layers
