"""Algebra on the factors of low-rank adapters: leaves `LAYER.lora_A` (rank, in) and `LAYER.lora_B` (out, rank).

A component is a row of A with its column of B; B A is the sum over the components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedllm.errors import RunError
from fedllm.packing import Packing, Window
from fedllm.tree import Tree

A, B = "lora_A", "lora_B"
Pair = tuple[Tensor, Tensor]  # B, A


def layers(leaves: Mapping[str, Tensor]) -> list[str]:
    """The layers that have both factors among the leaves, in order."""
    named = (name.removesuffix(f".{A}") for name in leaves if name.endswith(f".{A}"))
    return [layer for layer in named if f"{layer}.{B}" in leaves]


def pair(leaves: Mapping[str, Tensor], layer: str) -> Pair:
    """B (out, rank) and A (rank, in) of a layer."""
    return leaves[f"{layer}.{B}"], leaves[f"{layer}.{A}"]


def named(layer: str, b: Tensor, a: Tensor) -> Tree:
    """The leaves of a layer."""
    return {f"{layer}.{A}": a, f"{layer}.{B}": b}


def sliced(leaves: Mapping[str, Tensor], rank: int | None) -> Tree:
    """The first components of every layer, other leaves as they are. None: all components."""
    if rank is None:
        return dict(leaves)
    return {name: leaf[_first(name, leaf, rank)] for name, leaf in leaves.items()}


def padded(leaves: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> tuple[Tree, Packing]:
    """The leaves with zeros for the components that they lack of `whole`, and a packing that does not send these."""
    found: Tree = {}
    windows: dict[str, Window] = {}
    for name, leaf in leaves.items():
        shape = whole[name].shape if name in whole else leaf.shape
        found[name] = leaf.new_zeros(shape)
        found[name][tuple(map(slice, leaf.shape))] = leaf
        windows[name] = tuple((0, size) for size in leaf.shape)
    same = all(found[name].shape == leaf.shape for name, leaf in leaves.items())
    return (dict(leaves), Packing()) if same else (found, Packing(windows=windows))


def is_factor(name: str) -> bool:
    """True of a leaf with components: a row each of lora_A, a column each of lora_B."""
    return name.endswith((A, B))


def axis(name: str) -> int:
    """The axis of a factor's components."""
    return 1 if name.endswith(B) else 0


def along(name: str, share: Tensor) -> Tensor:
    """A number for each component (rank,), in the shape that multiplies a factor."""
    return share if name.endswith(B) else share[:, None]


def holders(leaves: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> Tree:
    """Of each factor of `leaves`, ones for the components that it has of `whole`, (rank of whole,)."""
    return {
        name: (torch.arange(whole[name].shape[axis(name)]) < leaf.shape[axis(name)]).to(leaf.dtype)
        for name, leaf in leaves.items()
        if is_factor(name)
    }


def faded(name: str, delta: Tensor, param: Tensor, share: Tensor) -> Tensor:
    """The step to the mean of zero-padded factors, from the mean of their padded deltas.

    `share` (rank,): the weights of those who have a component, over all weights; who lacks it counts with zeros.
    """
    return delta + (along(name, share) - 1) * param


def norm(leaves: Mapping[str, Tensor]) -> float:
    """The Frobenius norm of the products B A of all layers together, in float64.

    ||B A||^2 = <B^T B, A A^T>: matrices of rank x rank, and no product. The order of the leaves changes no bit.
    """
    pairs = ((b.double(), a.double()) for b, a in (pair(leaves, layer) for layer in layers(leaves)))
    return math.sqrt(math.fsum(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0) for b, a in pairs))


def truncated(b: Tensor, a: Tensor, rank: int, where: str) -> Pair:
    """The best approximation of B A of a rank: B <- U sqrt(S), A <- sqrt(S) V^T of its singular values and vectors.

    b (out, R), a (R, in) of any R, also below `rank`; computed in float64 from the QR factors of both, without the
    product. Of each component the largest entry of its column of B is positive, so that it has one form.

    Raises:
        RunError: a value is not finite.
    """
    if not bool(torch.isfinite(b).all() and torch.isfinite(a).all()):
        raise RunError(f"{where}: the sum of the clients' products holds values that are not finite; lower work.lr")
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    found = min(rank, len(s))
    left, right, root = q_b @ u[:, :found], v[:found] @ q_a.T, s[:found].sqrt()
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    new_b, new_a = b.new_zeros(len(b), rank), a.new_zeros(rank, a.shape[1])
    new_b[:, :found], new_a[:found] = left * (sign * root), right * (sign.T * root[:, None])
    return new_b, new_a


def _first(name: str, leaf: Tensor, rank: int) -> tuple[slice, ...]:
    if name.endswith(f".{A}"):
        return (slice(rank),)
    return (slice(None), slice(rank)) if name.endswith(f".{B}") else ()
