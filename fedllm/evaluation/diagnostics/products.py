"""Products of low-rank factors: what an aggregation loses of their mean, and how many directions the server's use.

    P = sum_k p_k B_k A_k                                                   the mean of the clients' products
    bias           ||P - B A||_F / ||P||_F                                  B A: what the server came to
    bias of means  the same with B = sum_k p_k B_k and A = sum_k p_k A_k    what FedIT comes to

Frobenius norms over layers together. Where one factor stands still both are zero, for P is linear in the other one.
Sun et al. 2024 (FFA-LoRA), arXiv 2403.12313, and Singhal et al. 2024 (FedEx-LoRA), arXiv 2410.09432, name the bias;
raFLoRA 2026, arXiv 2602.13486, the energy above the smallest rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from fedllm.evaluation.diagnostics import geometry
from fedllm.tensors import low_rank
from fedllm.tensors.tree import Tree


@dataclass(frozen=True, eq=False)
class Seen:
    """One client's update: its weight, where it began (with frozen tensors), and how far it moved from there."""

    client: str
    weight: float
    start: Tree
    delta: Tree

    @property
    def alike(self) -> bool:
        """True if the delta has the form of the parameters."""
        return all(name in self.start and self.start[name].shape == leaf.shape for name, leaf in self.delta.items())


@dataclass(frozen=True)
class Bias:
    """`norm`: ||P||_F. `total`, `means`: relative to it; None where all products are zero."""

    norm: float
    total: float | None
    means: float | None


def bias(seen: Sequence[Seen], after: Tree, most: int | None) -> Bias | None:
    """What the aggregation has lost.

    Args:
        most: layers at most. after: what the server came to, with frozen tensors.

    Returns:
        None where the products are not known: other adapters, factors that stay with a client or travel otherwise.
    """
    found = layers(seen[0].start, seen[0].delta, most) if seen else []
    if not found or not all(one.alike for one in seen):
        return None
    share = torch.tensor([one.weight for one in seen], dtype=torch.float64)
    share = (share / share.sum())[:, None, None]
    norm = lost = mixed = 0.0
    for layer in found:
        b, a = (trained(seen, f"{layer}.{name}") for name in (low_rank.B, low_rank.A))  # (K, out, rank), (K, rank, in)
        mean = b.transpose(0, 1).flatten(1), (share * a).flatten(0, 1)  # (out, K rank), (K rank, in)
        square = geometry.inner(mean, mean)
        came_to = low_rank.pair(after, layer)
        norm += square
        lost += geometry.apart(square, mean, (came_to[0].double(), came_to[1].double()))
        mixed += geometry.apart(square, mean, ((share * b).sum(0), (share * a).sum(0)))
    if not norm > 0:
        return Bias(0.0, None, None)
    return Bias(math.sqrt(norm), math.sqrt(lost / norm), math.sqrt(mixed / norm))


def spectra(after: Tree, names: Sequence[str], smallest: int | None) -> tuple[float | None, float | None]:
    """Means over the layers whose product is not zero: the effective rank, and the energy above the smallest rank."""
    found = [geometry.spectrum(*(leaf.double() for leaf in low_rank.pair(after, layer))) for layer in names]
    found = [values for values in found if values[0] > 0]
    if not found:
        return None, None
    above = None if smallest is None else fmean(geometry.energy_above(values, smallest) for values in found)
    return fmean(map(geometry.effective_rank, found)), above


def layers(leaves: Mapping[str, Tensor], some: Collection[str], most: int | None) -> list[str]:
    """The layers with both factors among the tensors, one of them among `some`; at most `most`, spread evenly."""
    ends = (low_rank.A, low_rank.B)
    found = [layer for layer in sorted(low_rank.layers(leaves)) if any(f"{layer}.{end}" in some for end in ends)]
    count = len(found) if most is None else min(most, len(found))
    return [found[place * len(found) // count] for place in range(count)]


def trained(seen: Sequence[Seen], name: str) -> Tensor:
    """(K, ...): a tensor after training in float64; where it did not move it is where it was. Smaller ranks are
    filled up with zeros, which changes no product."""
    starts = [one.start[name] for one in seen]
    moved = [one.delta[name] if name in one.delta else torch.zeros_like(one.start[name]) for one in seen]
    return geometry.alike(starts).double() + geometry.alike(moved)
