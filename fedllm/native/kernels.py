"""The kernels on tensors in bfloat16 that lie row by row in memory; see the C files for the formulas.

What they write is new, unless a name ends in an underscore: then it stands in the place of the first argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm.native.library import library

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH = 16  # numbers of a vector
ORDER = 8  # ranks are padded to multiples of it
ERRORS = {1: (MemoryError, "no memory"), 2: (IndexError, "a target is no word of the vocabulary")}  # as in bf16.h
KINDS: Mapping[str, Any] = {"p": c_void_p, "n": c_int64, "x": c_float}
SIGNATURES = {
    "norm": "ppppnnx",
    "norm_slope": "ppppppnn",
    "gated": "pppn",
    "gated_slope": "pppppn",
    "rotary": "pnnpppnnn",
    "rotary_slope": "pnnpppnnn",
    "attention": "pnn" * 3 + "ppp" + "n" * 6 + "x",
    "attention_slope": "pnn" * 3 + "pppppp" + "n" * 7 + "x",
    "cross_entropy": "ppppnn",
    "low_rank": "ppppppnnnnnnxppppn",
    "low_rank_slope": "ppppppppp" + "n" * 8 + "xppn",
    "product": "pppppnnnnn",
    "laid_out": "ppnnn",
}


class Form(IntEnum):
    """Of a matrix W in y = x W, as in product.h: as it is, its transpose, or laid out."""

    PLAIN = 0
    TURNED = 1
    LAID_OUT = 2


LINES, COLUMNS = 32, 64  # a layout is filled up to multiples of them


@dataclass(frozen=True, eq=False)
class Matrix:
    """A frozen matrix for the product kernel. `form`: of `weight`, unless `layout` holds its values."""

    weight: Tensor
    form: Form
    layout: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Those of a row that is multiplied, and of what comes of it."""
        rows, columns = self.weight.shape
        return (rows, columns) if self.form is Form.PLAIN else (columns, rows)

    @property
    def given(self) -> tuple[Tensor, Form]:
        """What the kernel reads."""
        return (self.weight, self.form) if self.layout is None else (self.layout, Form.LAID_OUT)


def made_for(*values: Tensor | PreTrainedModel) -> bool:
    """Whether all are what kernels may be for: bfloat16 on a CPU."""
    return all(value.dtype == torch.bfloat16 and value.device.type == "cpu" for value in values)


def serve(*values: Tensor | PreTrainedModel) -> bool:
    """Whether there are kernels for such tensors, or for a model's."""
    return made_for(*values) and library().handle is not None


def serve_low_rank(x: Tensor, size_out: int) -> bool:
    """Whether there are kernels for low-rank products of rows x (T, in) to (T, out)."""
    return x.shape[1] % 4 == size_out % 4 == 0 and serve(x) and library().tiles


def serve_product(weight: Tensor) -> bool:
    """Whether products with a frozen matrix are better computed by the kernel, and low-rank ones together with them."""
    fits = weight.is_contiguous() and weight.shape[0] % 2 == weight.shape[1] % 2 == 0
    return fits and serve(weight) and library().products


def serve_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there are kernels for attention over such states (heads, T, d)."""
    sizes = query.shape[2] % WIDTH == value.shape[2] % WIDTH == 0
    return sizes and serve(query, key, value) and library().tiles


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(..., n) rows to the normed ones, and what each was multiplied by, in float32."""
    assert weight.shape == x.shape[-1:]
    x, y, r = x.contiguous(), x.new_empty(x.shape), torch.empty(x.shape[:-1], dtype=torch.float32)
    _call("norm", x, weight.contiguous(), y, r, r.numel(), len(weight), eps)
    return y, r


def norm_slope(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, plus: Tensor | None = None) -> Tensor:
    """Slope of x, from what `norm` was given and gave; added to another one in `plus`."""
    assert dy.shape == x.shape
    dx, passed = x.new_empty(x.shape), (dy.contiguous(), x.contiguous(), weight.contiguous(), r, _plus(plus, x))
    _call("norm_slope", *passed, dx, r.numel(), len(weight))
    return dx


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, of one shape."""
    assert gate.shape == up.shape
    y = gate.new_empty(gate.shape)
    _call("gated", gate.contiguous(), up.contiguous(), y, y.numel())
    return y


def gated_slope(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes of gate and up."""
    assert dy.shape == gate.shape == up.shape
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _call("gated_slope", dy.contiguous(), gate.contiguous(), up.contiguous(), d_gate, d_up, dy.numel())
    return d_gate, d_up


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, V) logits, which become softmax - onehot, and (N,) targets to (N,) losses in float32.

    Raises:
        IndexError: a target is none of the V.
    """
    return _cross_entropy_(logits, targets, None)


def cross_entropy_few_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same, but the smallest of softmax become zero (see cross_entropy.c): losses, and each row's sum of these."""
    rest = torch.empty(len(logits), dtype=torch.float32)
    return _cross_entropy_(logits, targets, rest), rest


def _cross_entropy_(logits: Tensor, targets: Tensor, rest: Tensor | None) -> Tensor:
    assert logits.is_contiguous() and targets.shape == logits.shape[:1] and targets.dtype == torch.int64
    losses = torch.empty(len(logits), dtype=torch.float32)
    _call("cross_entropy", logits, targets.contiguous(), losses, rest, *logits.shape)
    return losses


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
        passed = x.contiguous(), weight, bias, _plus(plus, y), form
    _call("low_rank", u, y, z, a, b, counts, *_sizes(a, b), scale, *passed)
    return z


def low_rank_slope(
    dy: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    sizes: Sequence[int],
    scale: float,
    needs: tuple[bool, bool],
    dx: Tensor | None,
    frozen: Matrix | None = None,
    plus: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Slopes of A and B in float32, where they are needed; adds that of u to dx. `saved`: u, z, A and B.

    Where A or B is a leaf of the graph that has a `grad`, the slope is written there, and the leaf has none any more.
    With W (out, in) in `frozen`, dx becomes the sum with dy W and `plus` (T, in).
    """
    u, z, *pair = saved
    da, db = (_ready(leaf) if needed else None for leaf, needed in zip(pair, needs, strict=True))
    dy, (a, b), counts = dy.contiguous(), map(_factors, pair), _counts(tuple(sizes))
    assert dy.shape == (len(u), b.shape[1]) and (dx is None or (dx.is_contiguous() and dx.shape == u.shape))
    assert frozen is None or frozen.sizes == (b.shape[1], a.shape[2])
    weight, form = (None, 0) if frozen is None else frozen.given
    more = None if dx is None else _plus(plus, dx)
    next_slopes = (0 if slope is None else slope.stride(0) for slope in (da, db))
    _call("low_rank_slope", dy, u, z, dx, a, b, da, db, counts, *_sizes(a, b), *next_slopes, scale, weight, more, form)
    return da, db


def product(
    x: Tensor, matrix: Matrix, bias: Tensor | None = None, plus: Tensor | None = None, *, few: bool = False
) -> Tensor:
    """(T, k) rows times W (k, n), and the sum with a bias (n) and with `plus` (T, n).

    `few`: most of x is zero. The product is the same, but zeros that stand in six rows of x take no time.
    """
    (k, n), (weight, form) = matrix.sizes, matrix.given
    assert x.shape[1] == k
    y = x.new_empty(len(x), n)
    _call("product", x.contiguous(), weight, bias, _plus(plus, y), y, len(x), k, n, form, few)
    return y


def laid_out(matrix: Matrix) -> Tensor:
    """The values of a matrix as the kernel reads them."""
    k, n = matrix.sizes
    out = matrix.weight.new_empty(-(-k // LINES) * LINES * -(-n // COLUMNS) * COLUMNS)
    _call("laid_out", matrix.weight, out, k, n, matrix.form)
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, heads, d) states, each in one piece, turned by (T, d) cosines and sines."""
    return _turned("rotary", x, cos, sin)


def rotary_slope(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Slope of the states."""
    return _turned("rotary_slope", dy if dy.stride(2) == 1 else dy.contiguous(), cos, sin)


def _turned(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    assert cos.shape == sin.shape == (x.shape[0], x.shape[2]) and x.stride(2) == 1
    y = x.new_empty(x.shape)
    _call(name, x, x.stride(0), x.stride(1), cos.contiguous(), sin.contiguous(), y, *x.shape)
    return y


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of a row: (S, 4) int64, of each where its first keys lie that it shares with another one, how many
    these are, where its own lie, and its length. `tokens`: of the row. `pairs`: own queries times keys, padded."""

    table: Tensor
    tokens: int
    pairs: int

    @staticmethod
    def of(rows: Sequence[tuple[int, int, int, int]]) -> Sequences:
        """From the rows of the table."""
        pairs = sum((length - common) * -(-length // WIDTH) * WIDTH for _, common, _, length in rows)
        own = sum(length - common for _, common, _, length in rows)
        return Sequences(torch.tensor(rows, dtype=torch.int64), own, pairs)


def attention(
    states: tuple[Tensor, Tensor, Tensor], sequences: Sequences, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(heads, T, d) queries, (groups, T, d) keys, (groups, T, e) values, each state in one piece, to (T, heads, e), and
    probabilities that the slope needs."""
    counts = _counted(states, sequences)
    tokens, heads, _, _, size_v = counts
    out, p = states[0].new_empty(tokens, heads, size_v), states[0].new_empty(heads * sequences.pairs)
    table = sequences.table
    _call("attention", *_strides(*states), p, out, table, len(table), *counts[1:], window or 0, scale)
    return out, p


def attention_slope(
    dout: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    sequences: Sequences,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes of queries, keys and values; (T, ., .) of each. `saved`: these and the probabilities."""
    query, key, value, p = saved
    slopes = tuple(state.new_empty(sequences.tokens, len(state), state.shape[2]) for state in (query, key, value))
    counts, table = _counted((query, key, value), sequences), sequences.table
    passed = *_strides(query, key, value), p, dout.contiguous(), *slopes, table
    _call("attention_slope", *passed, len(table), *counts, window or 0, scale)
    dq, dk, dv = slopes
    return dq, dk, dv


def _counted(states: tuple[Tensor, Tensor, Tensor], sequences: Sequences) -> tuple[int, int, int, int, int]:
    """Tokens, heads, groups, size and size of a value, of states that fit each other and the sequences."""
    query, key, value = states
    (heads, tokens, size), (groups, _, size_v) = query.shape, value.shape
    assert tokens == sequences.tokens and key.shape == (groups, tokens, size) and value.shape[1] == tokens
    assert heads % groups == 0 and all(state.stride(2) == 1 for state in states)
    return tokens, heads, groups, size, size_v


def _plus(plus: Tensor | None, y: Tensor) -> Tensor | None:
    """What is added to y, which it is none of."""
    assert plus is None or (plus.shape == y.shape and plus.data_ptr() != y.data_ptr())
    return plus if plus is None else plus.contiguous()


def _factors(stack: Tensor) -> Tensor:
    """Each client's in one piece, in float32; between them may lie what belongs to others."""
    stack = stack.float()
    return stack if _in_pieces(stack) else stack.contiguous()


def _in_pieces(stack: Tensor) -> bool:
    """Whether each client's (., n) lies row by row."""
    return stack.stride()[1:] == (stack.shape[2], 1)


def _ready(leaf: Tensor) -> Tensor:
    """Memory for a leaf's slope."""
    place = leaf.grad if leaf.is_leaf else None
    if place is None or place.dtype != torch.float32 or not _in_pieces(place):
        return torch.empty(leaf.shape, dtype=torch.float32)
    leaf.grad = None  # whoever else has a slope of it adds to this one
    return place


def _sizes(a: Tensor, b: Tensor) -> tuple[int, ...]:
    (clients, rank, size_in), size_out = a.shape, b.shape[1]
    return clients, rank, size_in, size_out, a.stride(0), b.stride(0)


def _strides(*states: Tensor) -> list[Tensor | int]:
    """Each, and its strides of a head and of a position."""
    return [part for each in states for part in (each, each.stride(0), each.stride(1))]


def _call(name: str, *arguments: Tensor | float | None) -> None:
    status = _function(name)(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])
    if status:
        kind, reason = ERRORS[status]
        raise kind(f"kernel {name}: {reason}")


@lru_cache(maxsize=64)
def _function(name: str) -> Any:
    handle = library().handle
    assert handle is not None, "see serve"
    function = handle[f"fedllm_{name}"]
    function.argtypes, function.restype = [KINDS[letter] for letter in SIGNATURES[name]], c_int
    return function


@lru_cache(maxsize=256)
def _counts(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor(sizes, dtype=torch.int64)
