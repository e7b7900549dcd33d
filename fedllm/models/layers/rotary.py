"""Rotary embeddings in one pass: transformers' values, in bfloat16 to the bit.

    y = x cos + turned(x) sin        turned(x1, x2) = (-x2, x1)

A model's attention calls a function of its own file, `apply_rotary_pos_emb`. Each attention of a loaded model gets a
copy of its forward pass in which that name stands for this; the file, which others may use, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedllm.models.kernels import ops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "apply_rotary_pos_emb"
Pair = tuple[Tensor, Tensor]


def prepare(model: PreTrainedModel) -> int:
    """Give the attentions whose rotary embeddings have these values this function; how many they are."""
    found = 0
    if not ops.supports(model):
        return found
    for module in model.modules():
        forward = type(module).forward
        if (
            isinstance(forward, FunctionType)
            and NAME in forward.__code__.co_names
            and _fits(module, forward, model.dtype)
        ):
            names = {**forward.__globals__, NAME: Rotary(forward.__globals__[NAME])}
            own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(own, module)
            found += 1
    return found


@dataclass(frozen=True, eq=False)
class Rotary:
    """What stands for `other`, a model's own function, wherever the kernel does not serve."""

    other: Callable[..., Pair]

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Pair:
        """(1, heads, T, d) queries, (1, groups, T, d) keys, (1, T, d) cosines and sines, to turned queries and keys."""
        plain = len(q) == len(cos) == 1 and q.shape[3] == cos.shape[2] and not (rest or options)
        if not (plain and q.stride(3) == k.stride(3) == 1 and ops.supports(q, k, cos, sin)):
            return self.other(q, k, cos, sin, *rest, **options)
        return _turned(q, cos, sin), _turned(k, cos, sin)


@torch.no_grad()
def _fits(module: nn.Module, forward: FunctionType, dtype: torch.dtype) -> bool:
    """Whether this is what the function computes for numbers that the kernel takes; in float32 within its rounding,
    since the kernel rounds once where a product is added."""
    other, size = forward.__globals__.get(NAME), vars(module).get("head_dim")
    if other is None or not isinstance(size, int) or size % 2:
        return False
    q, k = (torch.linspace(-3, 5, heads * 7 * size).view(1, heads, 7, size).to(dtype) for heads in (2, 1))
    angles = torch.linspace(0, 9, 7 * size).view(1, 7, size)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    try:
        theirs = other(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # another function of that name
        return False
    mine = Rotary(other)(q, k, cos, sin)
    if dtype == torch.float32:
        return all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(mine, theirs, strict=True))
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y: Tensor = _Turned.apply(x[0].transpose(0, 1), cos[0], sin[0])  # type: ignore[no-untyped-call]
    return y.transpose(0, 1)[None]


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return ops.rotary(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ops.rotary_backward(dy, *ctx.saved_tensors), None, None
