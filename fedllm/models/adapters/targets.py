"""Which linear layers an adapter extends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fedllm.errors import ConfigError, nearest
from fedllm.models.layers.linear import linear_layers
from fedllm.tensors.tree import matches


def targeted(model: nn.Module, targets: Sequence[str], rank: int, key: str) -> Mapping[str, nn.Linear]:
    """The layers that `targets` choose, by their paths and in the model's order; never the output head.

    A target is `all_linear`, a pattern over paths, or, without a star, the end of a path. `key`: the adapter's place in
    an experiment, for errors.

    Raises:
        ConfigError: a target selects no layer, or the rank is above a layer's size.
    """
    linears = linear_layers(model)
    chosen: set[str] = set()
    for target in targets:
        pattern = "*" if target == "all_linear" else target if "*" in target else f"*.{target}"
        found = {name for name in linears if matches(name, [pattern])}
        if not found:
            raise ConfigError(f"{key}.targets: '{target}' fits no layer{_advice(model, linears, target, pattern)}")
        chosen |= found
    layers = {name: layer for name, layer in linears.items() if name in chosen}
    for name, layer in layers.items():
        if rank > min(layer.out_features, layer.in_features):
            size = f"{layer.out_features}x{layer.in_features}"
            raise ConfigError(f"{key}.rank is {rank}, above the size {size} of layer {name}")
    return layers


def _advice(model: nn.Module, linears: Mapping[str, nn.Linear], target: str, pattern: str) -> str:
    """What to set in place of a target that fits nothing."""
    if not linears:
        return ": the model has no linear layers beside its output head; use soft_prompt, norms or full"
    names = sorted({name.rpartition(".")[2] for name in linears})
    head = model.get_output_embeddings()  # type: ignore[operator]
    if any(module is head and matches(f".{name}", [pattern]) for name, module in model.named_modules()):
        return f" that can be extended, for the output head cannot; name some of {', '.join(names)}"
    known = nearest(target, names)
    return f"{known} The linear layers are {', '.join(names)}" if known.endswith("?") else known
