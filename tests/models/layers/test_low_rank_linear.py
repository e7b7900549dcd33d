"""The low-rank product and its gradient, joint and apart, against the formula left to autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.models.layers import low_rank_linear as module
from fedllm.models.layers.low_rank_linear import Frozen, low_rank_linear

SCALE, INNER, OUTER = 1.5, 7, 5  # not square


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def textbook(x: Tensor, u: Tensor, frozen: Frozen, a: Tensor, b: Tensor, sizes: list[int]) -> Tensor:
    """Client by client."""
    weight = frozen.weight if frozen.rest is None else frozen.weight + frozen.rest
    y = torch.nn.functional.linear(x, weight, frozen.bias)
    each = zip(y.split(sizes), u.split(sizes), a, b, strict=True)
    return torch.cat([y_k + SCALE * u_k @ a_k.T @ b_k.T for y_k, u_k, a_k, b_k in each])


@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    rank=st.integers(1, 3),
    dropped=st.booleans(),
    biased=st.booleans(),
    split=st.booleans(),
    joint=st.booleans(),
)
def test_values_and_gradients_are_the_formula(
    sizes: list[int], rank: int, dropped: bool, biased: bool, split: bool, joint: bool
) -> None:
    total, clients = sum(sizes), len(sizes)
    bias, rest = drawn(OUTER, seed=1) if biased else None, drawn(OUTER, INNER, seed=7) if split else None
    frozen = Frozen(drawn(OUTER, INNER, seed=0), bias, rest)
    x, u = (drawn(total, INNER, seed=seed).requires_grad_() for seed in (2, 3))
    a = drawn(clients, rank, INNER, seed=4).requires_grad_()
    b = drawn(clients, OUTER, rank, seed=5).requires_grad_()
    gradient, leaves = drawn(total, OUTER, seed=6), [x, a, b, *([u] if dropped else [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "joint_pays", lambda *sizes: joint)
        found = low_rank_linear(x, u if dropped else None, frozen, (a, b), sizes, SCALE)
    grads = torch.autograd.grad(found, leaves, gradient)
    expected = textbook(x, u if dropped else x, frozen, a, b, sizes)
    assert torch.allclose(found, expected, atol=1e-12)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, leaves, gradient), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-11)


def test_the_first_layer_needs_no_gradient_of_its_rows() -> None:
    x, frozen = drawn(4, INNER, seed=0), Frozen(drawn(OUTER, INNER, seed=1))
    a, b = drawn(2, 3, INNER, seed=2).requires_grad_(), drawn(2, OUTER, 3, seed=3).requires_grad_()
    grads = torch.autograd.grad(low_rank_linear(x, None, frozen, (a, b), [1, 3], SCALE).sum(), [a, b])
    expected = torch.autograd.grad(textbook(x, x, frozen, a, b, [1, 3]).sum(), [a, b])
    assert all(torch.allclose(mine, theirs) for mine, theirs in zip(grads, expected, strict=True))


@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
def test_one_clients_rows_and_factors_change_no_bit_of_another(joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "joint_pays", lambda *sizes: joint)
    frozen = Frozen(drawn(OUTER, INNER, seed=0).float())

    def passed(seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, a, b = drawn(6, INNER, seed=1), drawn(2, 2, INNER, seed=2), drawn(2, OUTER, 2, seed=3)
        x[4:], a[1], b[1] = drawn(2, INNER, seed=seed), drawn(2, INNER, seed=seed + 1), drawn(OUTER, 2, seed=seed + 2)
        x, a, b = (leaf.float().requires_grad_() for leaf in (x, a, b))
        y = low_rank_linear(x, None, frozen, (a, b), [4, 2], SCALE)
        return y, torch.autograd.grad(y.square().sum(), [x, a, b])

    (y, (dx, da, db)), (z, (ex, ea, eb)) = passed(10), passed(20)
    assert torch.equal(y[:4], z[:4]) and not torch.equal(y[4:], z[4:])
    assert torch.equal(dx[:4], ex[:4]) and torch.equal(da[0], ea[0]) and torch.equal(db[0], eb[0])
    assert not torch.equal(da[1], ea[1]) and not torch.equal(db[1], eb[1])
