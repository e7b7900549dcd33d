"""Weights that a model has under several names: one change for all of them, or a weight of its own for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.errors import ConfigError


def names_of(model: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """All names of each parameter, its first one among them, by its first one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {found[0]: tuple(found) for found in names.values()}


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set a transformers model's parameters by all of the names that change.

    A head that is tied to the embedding becomes a weight of its own where only one of the two changes, or both do in
    other ways.

    Raises:
        ConfigError: other layers share a weight and would need different ones; the model's files hold one for them.
    """
    for names in names_of(model).values():
        given = [weights.get(name) for name in names]
        first = next((weight for weight in given if weight is not None), None)
        if first is None:
            continue
        if not all(weight is not None and torch.equal(weight, first) for weight in given):
            _separate(model, names)
        for name, weight in zip(names, given, strict=True):
            if weight is not None:
                model.get_parameter(name).copy_(weight)


def _separate(model: nn.Module, names: tuple[str, ...]) -> None:
    """Give an embedding and the head that is tied to it a weight each, in the model's files as well."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if {id(model.get_submodule(name.rpartition(".")[0])) for name in names} != set(map(id, ends)):
        raise ConfigError(
            f"{' and '.join(names)} are one weight in this model, and the adapter changes them in different ways, so "
            "that it cannot be merged; export --to peft"
        )
    head = ends[1]
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    config: Any = model.config
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # type: ignore[assignment]
