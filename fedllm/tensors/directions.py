"""Random directions that a seed stands for: what a sender and a receiver must draw alike.

    z = (z_1, z_2, ...)    of a tree of tensors: standard normal, drawn on the CPU in float32 by one generator of the
                           seed's key, tensor by tensor in the order of their names, then brought to the tensor's type

A pair (seed, number) means nothing without this. A direction is drawn again where it is needed, one tensor at a time,
and never held whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedllm.rng import Key
from fedllm.tensors.tree import Tree


def directions(leaves: Mapping[str, Tensor], key: Key) -> Iterator[tuple[str, Tensor]]:
    """z of a key, tensor by tensor."""
    generator = key.generator()
    for name in sorted(leaves):
        leaf = leaves[name]
        yield name, torch.randn(leaf.shape, generator=generator, dtype=torch.float32).to(leaf)


def add_direction_(leaves: Mapping[str, Tensor], key: Key, factor: float) -> None:
    """leaves += factor * z, in place."""
    for name, z in directions(leaves, key):
        leaves[name].add_(z, alpha=factor)


def seed_key(seed: int) -> Key:
    """The key that a seed's direction is drawn from, the same in all runs."""
    return Key(0).fold("direction", seed)


def replayed(start: Tree, amounts: Tensor) -> Tree:
    """start - sum over s of amounts[s] z(s), the seeds in their order: the same bits wherever it is done.

    Args:
        amounts: (K,), one for each seed of the pool; those that are zero cost nothing.
    """
    found = {name: leaf.clone() for name, leaf in start.items()}
    for seed in amounts.nonzero().reshape(-1).tolist():
        add_direction_(found, seed_key(seed), -float(amounts[seed]))
    return found
