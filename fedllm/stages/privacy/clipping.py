"""A bound on everything that a client sends, and a grid on which sums are exact.

    u_g <- u_g min(1, C_g / ||u_g||)        g: a group of tensors; by default all are one

The norm is over all tensors of a group in all parts, in float64. McMahan et al. 2018, arXiv 1710.06963.

The grid: values become integers times a step that is a power of two, so small that the bound holds behind the rounding
and so large that a sum over all clients there are is exact in the type that travels. Then a sum has no rounding of its
own that could tell who is in it, and noise can be added to integers (Mironov 2012, CCS).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedllm.messages.update import FIGURES, Part, Update
from fedllm.privacy.noise import NoiseStream
from fedllm.tensors import tree

BITS = 24  # of the integers that float32 holds
FINE = 2.0**-7  # most of the bound that rounding may take before values are sent in float64
Leaf = tuple[str, str]  # part, tensor


@dataclass(frozen=True)
class Group:
    """Tensors that share a bound, in a fixed order. `size`: their values."""

    leaves: tuple[Leaf, ...]
    clip: float
    size: int


def grouped(update: Update, clip: float, groups: Mapping[str, float]) -> list[Group]:
    """The groups of an update's tensors, figures apart. A tensor is in the group of the first pattern that fits its
    name; those that fit none share `clip`."""
    found: dict[str, list[Leaf]] = {pattern: [] for pattern in (*groups, "")}
    for part, leaf in sorted(_leaves(update)):
        fitting = next((pattern for pattern in groups if tree.matches(leaf, [pattern])), "")
        found[fitting].append((part, leaf))
    return [
        Group(tuple(leaves), groups.get(pattern, clip), sum(update.parts[p].tree[n].numel() for p, n in leaves))
        for pattern, leaves in found.items()
        if leaves
    ]


def norm(update: Update, leaves: Sequence[Leaf]) -> float:
    """The 2-norm over some tensors, in float64."""
    squares = (float(update.parts[part].tree[name].double().square().sum()) for part, name in leaves)
    return math.sqrt(math.fsum(squares))


def clipped(update: Update, groups: Sequence[Group]) -> Update:
    """Each group scaled to its bound, if it is longer; values keep their types."""
    factors = dict[Leaf, float]()
    for group in groups:
        length = norm(update, group.leaves)
        if length > group.clip:
            factors |= dict.fromkeys(group.leaves, group.clip / length)
    return mapped(update, lambda leaf, value: value * factors[leaf] if leaf in factors else value)


def step_of(group: Group, clients: int, dtype: torch.dtype) -> float:
    """The step of a group's grid: sums over `clients` values of at most the clip are exact in `dtype`."""
    addends = math.ceil(math.log2(max(1, clients)))
    largest = math.frexp(group.clip)[1] + addends  # |sum| <= 2^largest
    if dtype == torch.float32:
        return 2.0 ** (largest - BITS)
    # As fine as the rounding asks for: the noise is integers of this step, and must stay far below 2^63.
    fine = math.ceil(math.log2(math.sqrt(group.size) / FINE)) + 3
    return 2.0 ** (largest - min(max(BITS + 2, addends + fine), 52))


def grid_type(groups: Sequence[Group], clients: int, dtype: torch.dtype) -> torch.dtype:
    """float32 where its grid is fine enough for every group, else float64. Whatever the clip is: a step is at most
    2 clients 2^-24 of it."""
    largest = max(group.size for group in groups)
    coarse = math.sqrt(largest) * 2.0 ** (math.ceil(math.log2(max(1, clients))) - BITS) > FINE
    return torch.float64 if coarse or dtype == torch.float64 else torch.float32


def on_grid(update: Update, groups: Sequence[Group], clients: int) -> Update:
    """Clipped, and rounded to the grid: the norm of each group is at most its clip, behind the rounding.

    Rounding to the nearest moves a vector of d values by at most sqrt(d) step / 2, so it is first brought to that
    much below the bound: x <- x min(1, (C - sqrt(d) step / 2) / ||x||). A group that is not finite counts as zeros:
    in the sum it would take the place of what all others have sent.
    """
    dtype = grid_type(groups, clients, _type(update))
    steps = {group: step_of(group, clients, dtype) for group in groups}
    rounded, coarsest = rounded_within(update, groups, steps, dtype), max(steps.values())
    parts = {n: p if n in FIGURES else replace(p, grid=coarsest) for n, p in rounded.parts.items()}
    return replace(update, parts=parts)


def rounded_within(
    update: Update, groups: Sequence[Group], step_of_group: Mapping[Group, float], dtype: torch.dtype
) -> Update:
    """Each group in multiples of its step, with a norm of at most its clip."""
    factors, steps = dict[Leaf, float](), dict[Leaf, float]()
    for group in groups:
        step = step_of_group[group]
        room, length = group.clip - math.sqrt(group.size) * step / 2, norm(update, group.leaves)
        factor = 0.0 if not math.isfinite(length) else min(1.0, room / length) if length else 1.0
        factors |= dict.fromkeys(group.leaves, factor)
        steps |= dict.fromkeys(group.leaves, step)

    def rounded(leaf: Leaf, value: Tensor) -> Tensor:
        if not factors[leaf]:
            return torch.zeros(value.shape, dtype=dtype)
        return (torch.round(value.double() * factors[leaf] / steps[leaf]) * steps[leaf]).to(dtype)

    return mapped(update, rounded)


@dataclass(frozen=True, eq=False)
class Lattice:
    """A group's sum as integers: (d,) int64 times `step`."""

    group: Group
    step: float
    values: np.ndarray

    @staticmethod
    def of(total: Update, group: Group, clients: int) -> Lattice:
        """Of a sum over at most `clients` clients, which is exact if all of them keep to the grid. What one of them has
        sent off the grid is rounded onto it."""
        leaves = [total.parts[part].tree[name] for part, name in group.leaves]
        dtype = torch.float64 if any(leaf.dtype == torch.float64 for leaf in leaves) else torch.float32
        step = step_of(group, clients, dtype)
        flat = torch.cat([leaf.reshape(-1).double() for leaf in leaves]) / step
        whole = torch.nan_to_num(torch.round(flat)).clamp(-(2.0**52), 2.0**52)
        return Lattice(group, step, whole.to(torch.int64).numpy())

    def noised(self, total: Update, spread: float, stream: NoiseStream) -> Update:
        """The update with this group's values plus noise of standard deviation spread x clip, in float64."""
        noise = stream.discrete_gaussian(spread * self.group.clip / self.step, self.group.size)
        return placed(total, self.group, (self.values + noise) * self.step)


def lengths(noised: Update, groups: Sequence[Group], spread: float) -> tuple[float, float]:
    """The 2-norm of a noised sum, and that of its noise: sqrt(sum_g d_g (spread C_g)^2)."""
    noise = math.sqrt(math.fsum(group.size * (spread * group.clip) ** 2 for group in groups))
    return norm(noised, [leaf for group in groups for leaf in group.leaves]), noise


def placed(total: Update, group: Group, values: np.ndarray) -> Update:
    """The update with a group's values replaced by (d,) float64 ones, in the tensors' own shapes."""
    flat, at, parts = torch.from_numpy(values), 0, dict(total.parts)
    for part, name in group.leaves:
        old = parts[part].tree[name]
        new = flat[at : at + old.numel()].reshape(old.shape)
        parts[part] = replace(parts[part], tree={**parts[part].tree, name: new})
        at += old.numel()
    return replace(total, parts=parts)


def digest(values: Iterable[np.ndarray]) -> bytes:
    """Of integers, to tell one sum from another."""
    found = hashlib.blake2b(digest_size=32)
    for each in values:
        found.update(np.ascontiguousarray(each).astype("<i8").tobytes())
    return found.digest()


def _leaves(update: Update) -> Iterator[Leaf]:
    return ((part, leaf) for part in update.parts if part not in FIGURES for leaf in update.parts[part].tree)


def _type(update: Update) -> torch.dtype:
    types = {update.parts[part].tree[leaf].dtype for part, leaf in _leaves(update)}
    return torch.float64 if torch.float64 in types else torch.float32


def mapped(update: Update, function: Callable[[Leaf, Tensor], Tensor]) -> Update:
    """Each tensor of each part replaced, figures apart."""
    parts: dict[str, Part] = {
        name: part
        if name in FIGURES
        else replace(part, tree={leaf: function((name, leaf), value) for leaf, value in part.tree.items()})
        for name, part in update.parts.items()
    }
    return replace(update, parts=parts)
