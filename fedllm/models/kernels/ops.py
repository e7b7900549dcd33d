"""Kernels on tensors in bfloat16 or float32 that lie row by row in memory, but for products; see the C files for the
formulas.

What they write is new, unless a name ends in an underscore: then it stands in the place of the first argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedllm.models.kernels.build import library
from fedllm.models.kernels.ctypes_calls import addend, call

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH = 16  # numbers of a vector


def have_choice(*values: Tensor | PreTrainedModel) -> bool:
    """Whether all are what kernels may be for: all bfloat16 or all float32, on a CPU."""
    types = {value.dtype for value in values}
    return types in ({torch.bfloat16}, {torch.float32}) and all(value.device.type == "cpu" for value in values)


def supports(*values: Tensor | PreTrainedModel) -> bool:
    """Whether there are kernels for such tensors, or for a model's."""
    return have_choice(*values) and (library().floats if _wide(values[0]) else library().handle is not None)


def _wide(value: Tensor | PreTrainedModel) -> bool:
    return value.dtype == torch.float32


def supports_low_rank(x: Tensor, size_out: int) -> bool:
    """Whether there are kernels for low-rank products of rows x (T, in) to (T, out)."""
    return x.shape[1] % 4 == size_out % 4 == 0 and supports(x) and (_wide(x) or library().tiles)


def supports_product(weight: Tensor) -> bool:
    """Whether products with a frozen matrix are better computed by the kernel, and low-rank ones together with them."""
    fits = weight.is_contiguous() and weight.shape[0] % 2 == weight.shape[1] % 2 == 0
    return fits and supports(weight) and (_wide(weight) or library().products)


def supports_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there are kernels for attention over such states (heads, T, d)."""
    sizes = query.shape[2] % WIDTH == value.shape[2] % WIDTH == 0
    return sizes and supports(query, key, value) and (_wide(query) or library().tiles)


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(..., n) rows to the normed ones, and what each was multiplied by, in float32."""
    assert weight.shape == x.shape[-1:]
    x, y, r = x.contiguous(), x.new_empty(x.shape), torch.empty(x.shape[:-1], dtype=torch.float32)
    call("norm", x, weight.contiguous(), y, r, r.numel(), len(weight), eps)
    return y, r


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, plus: Tensor | None = None) -> Tensor:
    """Gradient of x, from what `norm` was given and gave; added to another one in `plus`."""
    assert dy.shape == x.shape
    dx, passed = x.new_empty(x.shape), (dy.contiguous(), x.contiguous(), weight.contiguous(), r, addend(plus, x))
    call("norm_backward", *passed, dx, r.numel(), len(weight))
    return dx


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, of one shape."""
    assert gate.shape == up.shape
    y = gate.new_empty(gate.shape)
    call("gated", gate.contiguous(), up.contiguous(), y, y.numel())
    return y


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    assert dy.shape == gate.shape == up.shape
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    call("gated_backward", dy.contiguous(), gate.contiguous(), up.contiguous(), d_gate, d_up, dy.numel())
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
    call("cross_entropy", logits, targets.contiguous(), losses, rest, *logits.shape)
    return losses


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, heads, d) states, each in one piece, turned by (T, d) cosines and sines."""
    return _turned("rotary", x, cos, sin)


def rotary_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of the states."""
    return _turned("rotary_backward", dy if dy.stride(2) == 1 else dy.contiguous(), cos, sin)


def _turned(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    assert cos.shape == sin.shape == (x.shape[0], x.shape[2]) and x.stride(2) == 1
    y = x.new_empty(x.shape)
    call(name, x, x.stride(0), x.stride(1), cos.contiguous(), sin.contiguous(), y, *x.shape)
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
    probabilities that the gradient needs."""
    counts = _counted(states, sequences)
    tokens, heads, _, _, size_v = counts
    out, p = states[0].new_empty(tokens, heads, size_v), states[0].new_empty(heads * sequences.pairs)
    table = sequences.table
    call("attention", *_strides(*states), p, out, table, len(table), *counts[1:], window or 0, scale)
    return out, p


def attention_backward(
    dout: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    sequences: Sequences,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; (T, ., .) of each. `saved`: these and the probabilities."""
    query, key, value, p = saved
    gradients = tuple(state.new_empty(sequences.tokens, len(state), state.shape[2]) for state in (query, key, value))
    counts, table = _counted((query, key, value), sequences), sequences.table
    passed = *_strides(query, key, value), p, dout.contiguous(), *gradients, table
    call("attention_backward", *passed, len(table), *counts, window or 0, scale)
    dq, dk, dv = gradients
    return dq, dk, dv


def _counted(states: tuple[Tensor, Tensor, Tensor], sequences: Sequences) -> tuple[int, int, int, int, int]:
    """Tokens, heads, groups, size and size of a value, of states that fit each other and the sequences."""
    query, key, value = states
    (heads, tokens, size), (groups, _, size_v) = query.shape, value.shape
    assert tokens == sequences.tokens and key.shape == (groups, tokens, size) and value.shape[1] == tokens
    assert heads % groups == 0 and all(state.stride(2) == 1 for state in states)
    return tokens, heads, groups, size, size_v


def _strides(*states: Tensor) -> list[Tensor | int]:
    """Each, and its strides of a head and of a position."""
    return [part for each in states for part in (each, each.stride(0), each.stride(1))]
