"""Frozen matrices laid out for the product kernel, and products of it."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedllm.models.kernels import matmul, prepack
from fedllm.models.kernels.ctypes_calls import addend
from fedllm.models.kernels.matmul import Matrix, MatrixLayout
from fedllm.models.kernels.prepack import kept_layouts
from tests.needs import needs_products

pytestmark = needs_products


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def frozen(*shape: int, seed: int = 1) -> nn.Parameter:
    return nn.Parameter(drawn(*shape, seed=seed), requires_grad=False)


@given(
    rows=st.sampled_from([1, 5, 6, 7, 13, 40]),
    k=st.sampled_from([2, 4, 30, 64, 66, 772, 1600]),
    n=st.sampled_from([1, 4, 63, 64, 130]),
    form=st.sampled_from([MatrixLayout.PLAIN, MatrixLayout.TURNED]),
    bias=st.booleans(),
    plus=st.booleans(),
)
def test_products(rows: int, k: int, n: int, form: MatrixLayout, bias: bool, plus: bool) -> None:
    x, weight = drawn(rows, k, seed=0), frozen(*((k, n) if form is MatrixLayout.PLAIN else (n, k)))
    more = drawn(n, seed=2) if bias else None, drawn(rows, n, seed=3) if plus else None
    matrix = Matrix(weight, form)
    found = matmul.product(x, matrix, *more)
    w = weight.double() if form is MatrixLayout.PLAIN else weight.double().T
    exact = x.double() @ w + sum(each.double() for each in more if each is not None)
    assert (found.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    laid_out = matmul.product(x, Matrix(weight, form, matmul.laid_out(matrix)), *more)
    assert torch.equal(laid_out, found)
    parts = [p if p is None else p[-1:] for p in more[1:]]
    alone = matmul.product(x[-1:], matrix, more[0], *parts)
    assert torch.equal(alone, found[-1:])


@given(
    rows=st.sampled_from([1, 5, 6, 7, 13, 40]),
    k=st.sampled_from([2, 30, 64, 66, 772, 1600]),
    n=st.sampled_from([1, 4, 63, 64, 130]),
    form=st.sampled_from([MatrixLayout.PLAIN, MatrixLayout.TURNED]),
    share=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)
def test_zeros_that_are_left_out_change_no_bit(rows: int, k: int, n: int, form: MatrixLayout, share: float) -> None:
    x, weight = drawn(rows, k, seed=0), frozen(*((k, n) if form is MatrixLayout.PLAIN else (n, k)))
    x[torch.rand(rows, k, generator=torch.Generator().manual_seed(2)) >= share] = 0
    matrix, plus = Matrix(weight, form), drawn(rows, n, seed=3)
    expected = matmul.product(x, matrix, plus=plus)
    for each in (matrix, Matrix(weight, form, matmul.laid_out(matrix))):
        assert torch.equal(matmul.product(x, each, plus=plus, few=True), expected)
    x[0, k // 2] = torch.nan
    found = matmul.product(x, matrix, plus=plus, few=True)
    assert found[0].isnan().all() and torch.equal(found[1:], expected[1:])


def test_the_mean_of_a_head_is_made_once() -> None:
    weight = frozen(300, 40)
    expected = weight.double().mean(0)
    assert (prepack.mean(weight).double() - expected).abs().max() <= 2**-8 * expected.abs().max()
    assert torch.equal(prepack.mean(weight.data), prepack.mean(weight))
    found = prepack.mean(weight)
    with kept_layouts():
        assert prepack.mean(weight) is found
    assert prepack.mean(weight) is found
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(prepack.mean(weight), 2 * found)


def test_a_sum_is_written_elsewhere_than_what_it_is_added_to() -> None:
    y = drawn(3, 4, seed=0)
    with pytest.raises(AssertionError):
        addend(y, y)


def test_a_matrix_is_laid_out_once_while_a_block_is_open() -> None:
    weight, x = frozen(12, 40), drawn(3, 40, seed=0)
    assert prepack.matrix(weight, MatrixLayout.TURNED).layout is None
    with kept_layouts():
        one, two = (prepack.matrix(weight, MatrixLayout.TURNED) for _ in range(2))
        assert one.layout is not None and one.layout is two.layout and one.sizes == (40, 12)
        other = prepack.matrix(weight, MatrixLayout.PLAIN)
        assert other.layout is not None and other.layout is not one.layout and other.sizes == (12, 40)
        with kept_layouts():
            assert prepack.matrix(weight, MatrixLayout.TURNED).layout is one.layout
        assert prepack.matrix(weight, MatrixLayout.TURNED).layout is one.layout
        assert torch.equal(matmul.product(x, one), matmul.product(x, Matrix(weight, MatrixLayout.TURNED)))
    assert prepack.matrix(weight, MatrixLayout.TURNED).layout is None


def test_a_matrix_that_has_changed_is_laid_out_again() -> None:
    weight, x = frozen(12, 40), drawn(3, 40, seed=0)
    with kept_layouts():
        before = matmul.product(x, prepack.matrix(weight, MatrixLayout.TURNED))
        with torch.no_grad():
            weight.mul_(-1)
        assert torch.equal(matmul.product(x, prepack.matrix(weight, MatrixLayout.TURNED)), -before)


def test_what_trains_or_passes_is_not_laid_out() -> None:
    with kept_layouts():
        assert prepack.matrix(nn.Parameter(drawn(4, 4, seed=0)), MatrixLayout.PLAIN).layout is None
        assert prepack.matrix(drawn(4, 4, seed=0), MatrixLayout.PLAIN).layout is None


def test_a_layout_goes_with_its_matrix() -> None:
    with kept_layouts():
        weight = frozen(12, 40)
        assert prepack.matrix(weight, MatrixLayout.TURNED).layout is not None
        held = prepack._layouts.held[MatrixLayout.TURNED]
        before = len(held)
        del weight
        gc.collect()
        assert len(held) == before - 1


def test_bytes() -> None:
    assert prepack.num_bytes([frozen(12, 40), frozen(3, 5)]) == 2 * 2 * (480 + 15)
