"""The kernels for float32 against their formulas in float64, and on any number of threads against themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.models.kernels import matmul, ops
from fedllm.models.kernels.matmul import Matrix, MatrixLayout
from fedllm.models.kernels.threads import kernel_threads
from fedllm.models.layers import low_rank_linear, short_attention
from fedllm.models.layers.short_attention import Row
from tests.needs import needs_floats, needs_kernels

pytestmark = needs_floats
FLOAT = 2e-6  # 30 roundings of float32 in a row, relative to the norm of the result


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(found: Tensor, exact: Tensor) -> bool:
    return found.dtype == torch.float32 and float((found - exact).double().norm()) <= FLOAT * float(exact.norm())


def differentiated(of: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """A function's value, and the gradients of a sum of it with uneven weights."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in inputs]
    y = of(*leaves)
    weights = torch.arange(y.numel()).view_as(y).to(y).sin()
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


@pytest.mark.parametrize("form", [MatrixLayout.PLAIN, MatrixLayout.TURNED])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 2, 2), (7, 30, 66), (13, 700, 130), (25, 1300, 34)])
def test_products(rows: int, k: int, n: int, form: MatrixLayout) -> None:
    x, w, bias, plus = drawn(rows, k), drawn(k, n, seed=1), drawn(n, seed=2), drawn(rows, n, seed=3)
    plain = Matrix(w if form is MatrixLayout.PLAIN else w.T.contiguous(), form)
    ready = Matrix(plain.weight, form, matmul.laid_out(plain))
    exact = x.double() @ w.double()
    for matrix in (plain, ready):
        assert near(matmul.product(x, matrix), exact)
        assert near(matmul.product(x, matrix, bias, plus), exact + bias + plus)
    assert torch.equal(matmul.product(x, plain), matmul.product(x, ready))
    assert torch.equal(matmul.product(x[-1:], plain), matmul.product(x, plain)[-1:]), "a row knows of no other"


def test_a_sum_over_a_vocabulary_is_made_in_pieces() -> None:
    """One running sum of 60,000 ones and halves in float32 would be off by 1e-5 and more."""
    x = drawn(1, 60_000).abs()
    found = matmul.product(x, Matrix(torch.ones(60_000, 2), MatrixLayout.PLAIN))
    assert float((found.double() / x.double().sum() - 1).abs().max()) < 1e-6


LOW_RANK = [
    (37, 36, 20, 4, (10, 0, 20, 7)),
    (70, 100, 300, 8, (30, 40)),
    (9, 20, 36, 3, (4, 5)),
    (40, 64, 64, 17, (40,)),
]


@pytest.mark.parametrize(("rows", "size_in", "size_out", "rank", "sizes"), LOW_RANK)
@pytest.mark.parametrize("product", [True, False])
def test_low_rank_products_and_their_gradients(
    rows: int,
    size_in: int,
    size_out: int,
    rank: int,
    sizes: tuple[int, ...],
    product: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the frozen product in the same sums, and added to one that is there."""
    monkeypatch.setattr(ops, "supports_product", lambda weight: product)
    x, a, b = drawn(rows, size_in), drawn(len(sizes), rank, size_in, seed=1), drawn(len(sizes), size_out, rank, seed=2)
    weight, bias = drawn(size_out, size_in, seed=3), drawn(size_out, seed=4)

    def computed(form: type[torch.autograd.Function], dtype: torch.dtype) -> list[Tensor]:
        layer = low_rank_linear.Layer(low_rank_linear.Frozen(weight.to(dtype), bias.to(dtype)), sizes, 0.5)
        return differentiated(
            lambda *leaves: form.apply(leaves[0], None, *leaves[1:], layer), *(t.to(dtype) for t in (x, a, b))
        )

    exact = computed(low_rank_linear._Apart, torch.float64)
    assert all(map(near, computed(low_rank_linear._Kernel, torch.float32), exact))


ROWS = [
    (Row((13, 40, 7, 40), (0, 9, 0, 0)), 6, 2, 16),
    (Row((50, 33)), 3, 3, 32),
    (Row((30, 31, 33, 70, 5), (0, 12, 12, 0, 3)), 4, 1, 32),
]


@pytest.mark.parametrize(("row", "heads", "groups", "size"), ROWS)
@pytest.mark.parametrize("window", [None, 10])
def test_attention_and_its_gradient(row: Row, heads: int, groups: int, size: int, window: int | None) -> None:
    tokens = sum(row.lengths) - sum(row.shared)
    states = [drawn(n, tokens, size, seed=seed) for seed, n in enumerate((heads, groups, groups))]

    def computed(form: type[torch.autograd.Function], dtype: torch.dtype) -> list[Tensor]:
        return differentiated(lambda *qkv: form.apply(*qkv, row, size**-0.5, window), *(s.to(dtype) for s in states))

    exact = computed(short_attention._Short, torch.float64)
    assert all(map(near, computed(short_attention._Kernel, torch.float32), exact))


@given(rows=st.integers(1, 40), size=st.integers(1, 70))
def test_what_goes_row_by_row(rows: int, size: int) -> None:
    x, w, up, plus = drawn(rows, size), drawn(size, seed=1), drawn(rows, size, seed=2), drawn(rows, size, seed=3)
    y, r = ops.norm(x, w, 1e-5)

    def norm(wide: Tensor) -> Tensor:
        return w.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)

    dy = torch.arange(y.numel()).view_as(y).double().sin()
    exact, gradient = differentiated(norm, x.double())
    assert near(y, exact) and near(ops.norm_backward(dy.float(), x, w, r, plus), gradient + plus)
    exact, *gradients = differentiated(lambda g, u: torch.nn.functional.silu(g) * u, x.double(), up.double())
    assert near(ops.gated(x, up), exact)
    assert all(map(near, ops.gated_backward(dy.float(), x, up), gradients))


@pytest.mark.parametrize("words", [3, 1000])
def test_losses_over_a_vocabulary(words: int) -> None:
    logits, targets = 5 * drawn(9, words), torch.arange(9) % words
    exact, gradient = differentiated(
        lambda wide: torch.nn.functional.cross_entropy(wide, targets, reduction="none"), logits.double()
    )
    losses = ops.cross_entropy_(logits, targets)
    assert near(losses, exact)
    assert near(logits * torch.arange(9).sin()[:, None], gradient)


# threads


def everything(dtype: torch.dtype) -> list[Tensor]:
    """What all kernels compute, for more rows than a part has at least."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, w, wide = some(150, 96), some(96), some(150, 96)
    y, r = ops.norm(x, w, 1e-5)
    found = [y, r, ops.norm_backward(wide, x, w, r), ops.gated(x, wide), *ops.gated_backward(wide, x, y)]
    angles = some(150, 32).float()
    found.append(ops.rotary(x.view(150, 3, 32), angles.cos().to(dtype), angles.sin().to(dtype)))
    logits = some(150, 500)
    found += [ops.cross_entropy_(logits, torch.arange(150)), logits]
    if dtype == torch.float32 or ops.supports_product(w[None].expand(2, 96).contiguous()):
        row = Row((40, 50, 70), (0, 0, 10))
        states = [some(n, 150, 32) for n in (4, 2, 2)]
        found += differentiated(lambda *qkv: short_attention._Kernel.apply(*qkv, row, 0.2, None), *states)
        layer = low_rank_linear.Layer(low_rank_linear.Frozen(some(200, 96)), (70, 80), 0.5)
        factors = torch.randn(2, 8, 96, generator=generator), torch.randn(2, 200, 8, generator=generator)
        found += differentiated(lambda *t: low_rank_linear._Kernel.apply(t[0], None, *t[1:], layer), x, *factors)
    return found


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    expected = everything(dtype)
    for threads in (1, 2, 4, 2):
        with kernel_threads(threads):
            for _ in range(3):
                assert all(torch.equal(a, b) for a, b in zip(everything(dtype), expected, strict=True))
