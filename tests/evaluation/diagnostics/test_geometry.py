"""Lengths, angles and spectra against dense matrices and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedllm.evaluation.diagnostics import geometry


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_spectrum(values: list[float]) -> tuple[Tensor, Tensor]:
    """B (192, r) and A (r, 576) whose product has these singular values, split unevenly between the two."""
    s = torch.tensor(values, dtype=torch.float64)
    left, right = (torch.linalg.qr(drawn(size, len(s), seed=size))[0] for size in (192, 576))
    mixed = drawn(len(s), len(s), seed=7)
    return left * s**0.25 @ mixed, torch.linalg.inv(mixed) @ (right * s**0.75).T


def test_products_of_pairs_are_those_of_the_dense_matrices() -> None:
    one, two = (drawn(192, 4), drawn(4, 576, seed=1)), (drawn(192, 9, seed=2), drawn(9, 576, seed=3))
    dense = [b @ a for b, a in (one, two)]
    assert geometry.inner(one, two) == pytest.approx(float((dense[0] * dense[1]).sum()), rel=1e-12)
    square = geometry.inner(one, one)
    assert geometry.apart(square, one, two) == pytest.approx(float(((dense[0] - dense[1]) ** 2).sum()), rel=1e-12)
    assert geometry.apart(square, one, (2 * one[0], one[1] / 2)) <= 1e-14 * square


@pytest.mark.parametrize("values", [[5.0, 3.0, 2.0, 0.5], [1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [1e3, 1.0, 1e-3]])
def test_a_known_spectrum_comes_back(values: list[float]) -> None:
    found = geometry.spectrum(*of_spectrum(values))
    assert np.allclose(found, values, rtol=1e-6, atol=1e-7 * values[0])


def test_effective_rank_of_spectra_by_hand() -> None:
    assert geometry.effective_rank(torch.tensor([2.0, 2.0, 2.0, 2.0]).double()) == pytest.approx(4)
    assert geometry.effective_rank(torch.tensor([7.0, 0.0, 0.0]).double()) == pytest.approx(1)
    # q = 1/2, 1/4, 1/4: entropy (1/2) log 2 + (1/2) log 4 = 1.5 log 2
    assert geometry.effective_rank(torch.tensor([4.0, 2.0, 2.0]).double()) == pytest.approx(2**1.5)
    assert geometry.effective_rank(geometry.spectrum(*of_spectrum([4.0, 2.0, 2.0]))) == pytest.approx(2**1.5)


def test_energy_above_a_rank_by_hand() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 1.0]).double()  # squares 9, 4, 1, 1
    assert [geometry.energy_above(values, rank) for rank in (1, 2, 4)] == pytest.approx([6 / 15, 2 / 15, 0])


def test_cosines_are_numpys() -> None:
    leaves = [[drawn(192, 4, seed=k) for k in range(5)], [drawn(4, 576, seed=10 + k) for k in range(5)]]
    flat = np.stack([np.concatenate([leaf[k].numpy().ravel() for leaf in leaves]) for k in range(5)])
    norms = np.linalg.norm(flat, axis=1)
    wanted = (flat @ flat.T / np.outer(norms, norms))[np.triu_indices(5, 1)]
    assert np.allclose(geometry.cosines(geometry.gram(leaves)), wanted, rtol=0, atol=1e-12)


def test_cosines_by_hand() -> None:
    """Along one axis, against it, across it, and nowhere; a shorter update counts as filled up with zeros."""
    rows = [[2.0, 0.0], [-1.0, 0.0], [0.0, 5.0], [0.0, 0.0]]
    leaves = [*(torch.tensor(row) for row in rows), torch.tensor([3.0])]
    found = geometry.cosines(geometry.gram([leaves]))
    assert found == pytest.approx([-1, 0, 0, 1, 0, 0, -1, 0, 0, 0])
    assert math.isclose(float(geometry.gram([leaves])[0, 4]), 6)
