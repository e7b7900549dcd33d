"""FedASK (arXiv 2507.09990) with one frozen lora_A is FedSVD, so that its second trip has nothing to bring.

    Y = sum_k w_k B_k (A_k O)      Q = qr(Y)      P = sum_k w_k A_k^T (B_k^T Q)      U S V^T = svd(P^T)
    B = Q U_r S_r^(1/2)            A = S_r^(1/2) V_r^T          O: in x r, standard normal

With A_k = A all of this is a function of the mean of B_k, which one trip brings; in the private method that mean is
noised on the clients, and the rest follows from it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedllm.tensors import low_rank
from tests.stages.lora.test_unequal_ranks import off

RANK, CLIENTS, WEIGHTS = 4, 6, (0.3, 0.25, 0.2, 0.1, 0.1, 0.05)
SHAPES = [(40, 24), (24, 40)]  # out, in


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fedask(b: list[Tensor], a: list[Tensor], width: int = RANK) -> Tensor:
    """The product that the two trips of sketches come to. B: (out, rank) each, A: (rank, in) each."""
    clients = list(zip(WEIGHTS, b, a, strict=True))
    omega = normal(99, a[0].shape[1], width)
    first = sum((weight * one @ (other @ omega) for weight, one, other in clients), torch.zeros(()))
    q = torch.linalg.qr(first)[0]
    second = sum((weight * other.T @ (one.T @ q) for weight, one, other in clients), torch.zeros(()))
    u, s, v = torch.linalg.svd(second.T, full_matrices=False)
    root = s[:RANK].sqrt()
    return ((q @ u[:, :RANK]) * root) @ (root[:, None] * v[:RANK])


def mean_product(b: list[Tensor], a: list[Tensor]) -> Tensor:
    return sum((w * one @ other for w, one, other in zip(WEIGHTS, b, a, strict=True)), torch.zeros(()))


@pytest.mark.parametrize(("size_out", "size_in"), SHAPES)
def test_with_one_frozen_a_the_two_sketches_are_the_mean_of_b_times_a(size_out: int, size_in: int) -> None:
    """And what FedSVD makes of it on the server, in one trip of B alone."""
    a = normal(1, RANK, size_in)
    b = [normal(10 + client, size_out, RANK) for client in range(CLIENTS)]
    found = fedask(b, [a] * CLIENTS)
    mean = sum((weight * one for weight, one in zip(WEIGHTS, b, strict=True)), torch.zeros(()))
    turned, orthonormal = low_rank.orthonormal(mean, a, "layer")
    assert off(found, mean @ a) < 1e-12
    assert off(found, turned @ orthonormal) < 1e-12


@pytest.mark.parametrize(("size_out", "size_in"), SHAPES)
def test_where_a_differs_it_is_cut_to_the_rank(size_out: int, size_in: int) -> None:
    """The mean has the rank of all clients together, and no sketch makes the cut to `RANK` exact."""
    a = [normal(30 + client, RANK, size_in) for client in range(CLIENTS)]
    b = [normal(10 + client, size_out, RANK) for client in range(CLIENTS)]
    assert off(fedask(b, a), mean_product(b, a)) > 0.3
    assert off(fedask(b, a, width=24), mean_product(b, a)) > 0.3
