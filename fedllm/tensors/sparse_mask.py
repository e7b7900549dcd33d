"""Sparse additions to a layer's weight, at positions that everybody draws alike, so that only values are sent.

    S (out, in) = values at `positions`, zero elsewhere        density d: round(d out in) values

A layer's positions depend on its name, its size and their number, and on nothing of a run.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fedllm.rng import Key


def num_values(shape: tuple[int, int], density: float) -> int:
    """At least one."""
    return max(1, round(density * shape[0] * shape[1]))


@lru_cache(maxsize=1024)
def positions(layer: str, size: int, count: int) -> Tensor:
    """(count,): rising positions among `size` values, drawn without repeats."""
    generator = Key(0).fold("sparse", layer, size).generator()
    return torch.randperm(size, generator=generator)[:count].sort().values


def scatter(layer: str, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """(out, in): the values at the layer's positions, zeros elsewhere."""
    whole = values.new_zeros(shape[0] * shape[1])
    whole[positions(layer, whole.numel(), len(values)).to(values.device)] = values
    return whole.view(shape)


def gather(layer: str, whole: Tensor, count: int) -> Tensor:
    """(count,): the values of (out, in) at the layer's positions."""
    return whole.reshape(-1)[positions(layer, whole.numel(), count).to(whole.device)]
