"""Products with frozen matrices and with low-rank factors of K clients, in bfloat16 or float32; see product.c and
low_rank.c, and those that end in _float.c.

What they write is new, unless a name ends in an underscore: then it stands in the place of the first argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from fedllm.models.kernels.ctypes_calls import addend, call

ORDER = 8  # ranks are padded to multiples of it
LINES, COLUMNS = 32, 64  # a layout is filled up to multiples of them


class MatrixLayout(IntEnum):
    """Of a matrix W in y = x W, as in product.h: as it is, its transpose, or laid out."""

    PLAIN = 0
    TURNED = 1
    LAID_OUT = 2


@dataclass(frozen=True, eq=False)
class Matrix:
    """A frozen matrix for the product kernel. `form`: of `weight`, unless `layout` holds its values."""

    weight: Tensor
    form: MatrixLayout
    layout: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Those of a row that is multiplied, and of what comes of it."""
        rows, columns = self.weight.shape
        return (rows, columns) if self.form is MatrixLayout.PLAIN else (columns, rows)

    @property
    def given(self) -> tuple[Tensor, MatrixLayout]:
        """What the kernel reads."""
        return (self.weight, self.form) if self.layout is None else (self.layout, MatrixLayout.LAID_OUT)


def low_rank_(
    y: Tensor,
    u: Tensor,
    factors: tuple[Tensor, Tensor],
    sizes: Sequence[int],
    scale: float,
    frozen: tuple[Tensor, Matrix, Tensor | None] | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """Adds scale u A_k^T B_k^T to y (T, out); u (T, in), A (K, rank, in), B (K, out, rank). Gives z = u A_k^T.

    With x (T, in), W^T (in, out) and a bias in `frozen`, y becomes the sum with x W^T + bias and `plus` (T, out).
    """
    a, b, counts = _factors(factors[0]), _factors(factors[1]), _counts(tuple(sizes))
    assert y.is_contiguous() and u.is_contiguous() and len(y) == len(u) == sum(sizes) and len(a) == len(b) == len(sizes)
    assert a.shape[1:] == (b.shape[2], u.shape[1]) and b.shape[1] == y.shape[1]
    z = y.new_empty(len(u), -(-a.shape[1] // ORDER) * ORDER)
    passed: tuple[Tensor | int | None, ...] = (None, None, None, None, 0)
    if frozen is not None:
        x, matrix, bias = frozen
        assert x.shape == u.shape and matrix.sizes == (a.shape[2], b.shape[1])
        weight, form = matrix.given
        passed = x.contiguous(), weight, bias, addend(plus, y), form
    call("low_rank", u, y, z, a, b, counts, *_sizes(a, b), scale, *passed)
    return z


def low_rank_backward(
    dy: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    sizes: Sequence[int],
    scale: float,
    needs: tuple[bool, bool],
    dx: Tensor | None,
    frozen: Matrix | None = None,
    plus: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A and B in float32, where they are needed; adds that of u to dx. `saved`: u, z, A and B.

    Where A or B is a leaf of the graph that has a `grad`, the gradient is written there, and the leaf has none.
    With W (out, in) in `frozen`, dx becomes the sum with dy W and `plus` (T, in).
    """
    u, z, *pair = saved
    da, db = (_ready(leaf) if needed else None for leaf, needed in zip(pair, needs, strict=True))
    dy, (a, b), counts = dy.contiguous(), map(_factors, pair), _counts(tuple(sizes))
    assert dy.shape == (len(u), b.shape[1]) and (dx is None or (dx.is_contiguous() and dx.shape == u.shape))
    assert frozen is None or frozen.sizes == (b.shape[1], a.shape[2])
    weight, form = (None, 0) if frozen is None else frozen.given
    more = None if dx is None else addend(plus, dx)
    next_gradients = (0 if gradient is None else gradient.stride(0) for gradient in (da, db))
    call(
        "low_rank_backward",
        dy,
        u,
        z,
        dx,
        a,
        b,
        da,
        db,
        counts,
        *_sizes(a, b),
        *next_gradients,
        scale,
        weight,
        more,
        form,
    )
    return da, db


def product(
    x: Tensor, matrix: Matrix, bias: Tensor | None = None, plus: Tensor | None = None, *, few: bool = False
) -> Tensor:
    """(T, k) rows times W (k, n), and the sum with a bias (n) and with `plus` (T, n).

    `few`: most of x is zero. The product is the same, but in bfloat16 zeros that stand in six rows of x take no time.
    """
    (k, n), (weight, form) = matrix.sizes, matrix.given
    assert x.shape[1] == k
    y = x.new_empty(len(x), n)
    call("product", x.contiguous(), weight, bias, addend(plus, y), y, len(x), k, n, form, few)
    return y


def laid_out(matrix: Matrix) -> Tensor:
    """The values of a matrix as the kernel reads them."""
    k, n = matrix.sizes
    out = matrix.weight.new_empty(-(-k // LINES) * LINES * -(-n // COLUMNS) * COLUMNS)
    call("laid_out", matrix.weight, out, k, n, matrix.form)
    return out


def _factors(stack: Tensor) -> Tensor:
    """Each client's in one piece, in float32; between them may lie what belongs to others."""
    stack = stack.float()
    return stack if _in_pieces(stack) else stack.contiguous()


def _in_pieces(stack: Tensor) -> bool:
    """Whether each client's (., n) lies row by row."""
    return stack.stride()[1:] == (stack.shape[2], 1)


def _ready(leaf: Tensor) -> Tensor:
    """Memory for a leaf's gradient."""
    place = leaf.grad if leaf.is_leaf else None
    if place is None or place.dtype != torch.float32 or not _in_pieces(place):
        return torch.empty(leaf.shape, dtype=torch.float32)
    leaf.grad = None  # whoever else has a gradient of it adds to this one
    return place


def _sizes(a: Tensor, b: Tensor) -> tuple[int, ...]:
    (clients, rank, size_in), size_out = a.shape, b.shape[1]
    return clients, rank, size_in, size_out, a.stride(0), b.stride(0)


@lru_cache(maxsize=256)
def _counts(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor(sizes, dtype=torch.int64)
