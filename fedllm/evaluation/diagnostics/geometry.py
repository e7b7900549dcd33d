"""Lengths, angles and spectra of updates and of products of low-rank factors, from Gram matrices.

    <B A, D C> = tr((B A)^T D C) = sum (B^T D) o (A C^T)        o: entry by entry; no product is formed

In float64 a difference of two equal products comes out as 1e-8 of their norm or so, for its square is a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm.tensors.low_rank import Pair


def inner(one: Pair, two: Pair) -> float:
    """The Frobenius product of B A and D C. Each pair: (out, rank) and (rank, in), of any rank."""
    (b, a), (d, c) = one, two
    return float(((b.T @ d) * (a @ c.T)).sum())


def apart(square: float, one: Pair, two: Pair) -> float:
    """||B A - D C||_F squared; `square` is that of B A alone."""
    return max(0.0, square - 2 * inner(one, two) + inner(two, two))


def spectrum(b: Tensor, a: Tensor) -> Tensor:
    """(rank,): the singular values of B A, the largest first, from b (out, rank) and a (rank, in).

    They are the roots of the eigenvalues of R A A^T R, where R is the symmetric root of B^T B.
    """
    values, vectors = torch.linalg.eigh(b.T @ b)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    squares: Tensor = torch.linalg.eigvalsh(root @ (a @ a.T) @ root)
    return squares.clamp(min=0).sqrt().flip(0)


def effective_rank(values: Tensor) -> float:
    """exp(-sum_j q_j log q_j), q = s / sum s: the rank if all singular values are equal. Not all may be zero.

    Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality, definition 1.
    """
    share = values / values.sum()
    return math.exp(float(-torch.special.xlogy(share, share).sum()))


def energy_above(values: Tensor, rank: int) -> float:
    """sum_{j > rank} s_j^2 / sum_j s_j^2: what nobody of this rank sees of the product."""
    squares = values**2
    return float(squares[rank:].sum() / squares.sum())


def gram(leaves: Sequence[Sequence[Tensor]]) -> Tensor:
    """(K, K): the inner products of K clients' updates, in the updates' type within a tensor, in float64 over all.

    `leaves`: of each name the K tensors; one that is smaller along an axis counts as filled up with zeros.
    """
    count = len(leaves[0])
    total = torch.zeros(count, count, dtype=torch.float64)
    for own in leaves:
        flat = alike(own).flatten(1)
        total += flat @ flat.T
    return total


def cosines(products: Tensor) -> list[float]:
    """The upper triangle of the cosines of a Gram matrix, row by row without the diagonal. An update of zero has none
    with others: 0."""
    norms = products.diagonal().sqrt()
    scaled = products / torch.where(norms > 0, norms, 1) / torch.where(norms > 0, norms, 1)[:, None]
    rows, columns = torch.triu_indices(len(norms), len(norms), 1)
    return [float(value) for value in scaled[rows, columns].clamp(-1, 1)]


def alike(leaves: Sequence[Tensor]) -> Tensor:
    """(K, ...): the tensors in the shape of the largest."""
    if len({leaf.shape for leaf in leaves}) == 1:
        return torch.stack(list(leaves))
    whole = leaves[0].new_zeros(len(leaves), *map(max, zip(*(leaf.shape for leaf in leaves), strict=True)))
    for row, leaf in zip(whole, leaves, strict=True):
        row[tuple(map(slice, leaf.shape))] = leaf
    return whole
