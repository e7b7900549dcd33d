"""Algebra on the factors of low-rank adapters: leaves `LAYER.lora_A` (rank, in) and `LAYER.lora_B` (out, rank).

A component is a row of A with its column of B; B A is the sum over the components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedllm.errors import RunError
from fedllm.tensors.tree import Tree
from fedllm.tensors.wire_format import Window, WireFormat

A, B = "lora_A", "lora_B"
SPARSE = "lora_sparse"  # a layer's leaf of values at its positions, beside the factors
PRODUCT = "lora_BA"  # a layer's leaf (out, in) where a product travels in place of its factors
Pair = tuple[Tensor, Tensor]  # B, A


def layers(leaves: Mapping[str, Tensor]) -> list[str]:
    """The layers that have both factors among the leaves, in order."""
    named = (name.removesuffix(f".{A}") for name in leaves if name.endswith(f".{A}"))
    return [layer for layer in named if f"{layer}.{B}" in leaves]


def pair(leaves: Mapping[str, Tensor], layer: str) -> Pair:
    """B (out, rank) and A (rank, in) of a layer."""
    return leaves[f"{layer}.{B}"], leaves[f"{layer}.{A}"]


def merged_factors(start: Mapping[str, Tensor], delta: Mapping[str, Tensor], layer: str) -> Pair:
    """B and A of a layer once they have moved; a factor that the delta lacks stands still."""
    b, a = (start[name] + delta[name] if name in delta else start[name] for name in (f"{layer}.{B}", f"{layer}.{A}"))
    return b, a


def layer_leaves(layer: str, b: Tensor, a: Tensor) -> Tree:
    """The leaves of a layer."""
    return {f"{layer}.{A}": a, f"{layer}.{B}": b}


def sliced(leaves: Mapping[str, Tensor], rank: int | None) -> Tree:
    """The first components of every layer, other leaves as they are. None: all components."""
    if rank is None:
        return dict(leaves)
    return {name: leaf[_first(name, leaf, rank)] for name, leaf in leaves.items()}


def padded(leaves: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> tuple[Tree, WireFormat]:
    """The leaves with zeros for the components that they lack of `whole`, and a wire format without these."""
    found: Tree = {}
    windows: dict[str, Window] = {}
    for name, leaf in leaves.items():
        shape = whole[name].shape if name in whole else leaf.shape
        found[name] = leaf.new_zeros(shape)
        found[name][tuple(map(slice, leaf.shape))] = leaf
        windows[name] = tuple((0, size) for size in leaf.shape)
    same = all(found[name].shape == leaf.shape for name, leaf in leaves.items())
    return (dict(leaves), WireFormat()) if same else (found, WireFormat(windows=windows))


def is_factor(name: str) -> bool:
    """True of a leaf with components: a row each of lora_A, a column each of lora_B."""
    return name.endswith((A, B))


def component_axis(name: str) -> int:
    """The axis of a factor's components."""
    return 1 if name.endswith(B) else 0


def per_component(name: str, share: Tensor) -> Tensor:
    """A number for each component (rank,), in the shape that multiplies a factor."""
    return share if name.endswith(B) else share[:, None]


def component_mask(leaves: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> Tree:
    """Of each factor of `leaves`, ones for the components that it has of `whole`, (rank of whole,)."""
    return {
        name: (torch.arange(whole[name].shape[component_axis(name)]) < leaf.shape[component_axis(name)]).to(leaf.dtype)
        for name, leaf in leaves.items()
        if is_factor(name)
    }


def padded_mean_step(name: str, delta: Tensor, param: Tensor, share: Tensor, answered: float = 1.0) -> Tensor:
    """The step to the mean of zero-padded factors, from the mean of their padded deltas.

    `share` (rank,): the weights of those who have a component, over all weights; who lacks it counts with zeros.
    `answered`: the weights of all who answered, over all weights; who did not answer counts with the old value.
    """
    return delta + (per_component(name, share) - answered) * param


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
    require_finite(where, b, a)
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    found = min(rank, len(s))
    left, right, root = q_b @ u[:, :found], v[:found] @ q_a.T, s[:found].sqrt()
    new_b, new_a = b.new_zeros(len(b), rank), a.new_zeros(rank, a.shape[1])
    sign = signs(left)
    new_b[:, :found], new_a[:found] = left * (sign * root), right * (sign * root)[:, None]
    return new_b, new_a


def top_singular(weight: Tensor, rank: int) -> Pair:
    """U (out, rank) and S V^T = U^T W (rank, in) of the largest singular values of W (out, in), rank <= min(out, in).

    From the eigenvectors of W W^T or W^T W, whichever is smaller, in float64. Of each component the largest entry of
    its column of U is positive, so that it has one form.
    """
    w = weight.cpu().double()
    wide = w.shape[1] > w.shape[0]
    vectors = torch.linalg.eigh(w @ w.T if wide else w.T @ w).eigenvectors.flip(1)[:, :rank]
    if wide:
        b, a = vectors, vectors.T @ w
    else:
        b = w @ vectors
        sizes = b.norm(dim=0)
        b, a = b / sizes.clamp(min=torch.finfo(b.dtype).tiny), sizes[:, None] * vectors.T
    sign = signs(b)
    return b * sign, sign[:, None] * a


def balanced_svd(b: Tensor, a: Tensor, scale: float) -> Pair:
    """From U and S V^T to B and A with scale B A = U S V^T, each with the roots of S / scale.

    b (out, rank) with columns of length one; a (rank, in).
    """
    root = (a.norm(dim=1) / scale).sqrt()
    return b * root, a / (scale * root.clamp(min=torch.finfo(a.dtype).tiny))[:, None]


def best_rank_r(product: Tensor, rank: int, where: str) -> Pair:
    """The same from the product (out, in) itself, rank <= min(out, in)."""
    require_finite(where, product)
    u, s, v = torch.linalg.svd(product.double(), full_matrices=False)
    left, root = u[:, :rank], s[:rank].sqrt() * signs(u[:, :rank])
    return (left * root).to(product.dtype), (v[:rank] * root[:, None]).to(product.dtype)


def orthonormal(b: Tensor, a: Tensor, where: str) -> Pair:
    """The same product with orthonormal rows in A: B <- U S, A <- V^T of B A = U S V^T, in float64.

    b (out, rank), a (rank, in), rank <= min(out, in). The rows of A keep their span; they are orthonormal also where B
    or A is of a lower rank. The signs are as in `truncated`.

    Raises:
        RunError: a value is not finite.
    """
    require_finite(where, b, a)
    q, r = torch.linalg.qr(a.double().T)  # A = r^T q^T
    u, s, v = torch.linalg.svd(b.double() @ r.T, full_matrices=False)
    sign = signs(u)
    return (u * (s * sign)).to(b.dtype), (sign[:, None] * (v @ q.T)).to(a.dtype)


def signs(columns: Tensor) -> Tensor:
    """(rank,): -1 for the columns (n, rank) whose largest entry is negative, else 1."""
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns)


def require_finite(where: str, *leaves: Tensor) -> None:
    """
    Raises:
        RunError: a value is not finite.
    """
    if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
        raise RunError(f"{where}: the sum of the clients' products holds values that are not finite; lower work.sgd.lr")


def _first(name: str, leaf: Tensor, rank: int) -> tuple[slice, ...]:
    if name.endswith(f".{A}"):
        return (slice(rank),)
    return (slice(None), slice(rank)) if name.endswith(f".{B}") else ()
