"""The product in a gated MLP in one pass: transformers' values, and a gradient that keeps two tensors.

    y = silu(g) u    g = gate x, u = up x        silu(g) = g s, s = 1 / (1 + e^-g), rounded to 16 bits
    dg = dy u s (1 + g (1 - s))                  du = dy silu(g)

MLPs with another gate stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedllm.models.kernels import ops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def prepare(model: PreTrainedModel) -> int:
    """Give the MLPs whose values are these, to the bit, this product where there is a kernel; how many they are."""
    found = [module for module in model.modules() if all(hasattr(module, part) for part in PARTS)]
    same = [mlp for mlp in found if _is_same(mlp)] if ops.supports(model) else []
    for mlp in same:
        mlp.forward = SwiGLU(mlp)
    return len(same)


@dataclass(frozen=True, eq=False)
class SwiGLU:
    """An MLP's forward pass."""

    mlp: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        mlp: Any = self.mlp
        y: Tensor = mlp.down_proj(_Product.apply(mlp.gate_proj(x), mlp.up_proj(x)))  # type: ignore[no-untyped-call]
        return y


@torch.no_grad()
def _is_same(mlp: Any) -> bool:
    """Whether it is a product with SiLU and nothing else."""
    x = torch.linspace(-3, 5, 7 * mlp.gate_proj.in_features).view(7, -1).to(mlp.gate_proj.weight.dtype)
    return torch.equal(mlp(x), mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return ops.gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gated_backward(dy, *ctx.saved_tensors)
