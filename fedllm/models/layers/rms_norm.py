"""Root-mean-square norms of a model in 16 bits, or in float32 where there are kernels: transformers' values, and their
gradient in one pass by hand.

    y = w h,  h = r x rounded to 16 bits,  r = (mean(x^2) + eps)^(-1/2)           all else in float32
    dx = r (w dy) - x r^3 mean(x w dy)    dw = sum over rows of h dy

Left to autograd, the backward pass of the norms takes three times as long, a twentieth of a local step. On a
CPU a kernel makes each in one pass; it adds up the mean in another order.
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


def prepare(model: PreTrainedModel) -> int:
    """Give the norms whose values are these, to the bit, this gradient; how many they are."""
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    found = [RMSNorm(norm, eps) for norm in norms if (eps := vars(norm).get("variance_epsilon")) is not None]
    same = [normed for normed in found if _is_same(normed)]
    for normed in same:
        normed.norm.forward = normed
    return len(same)


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """A norm's forward pass."""

    norm: nn.Module
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        y: Tensor = _RmsNorm.apply(x, self.norm.weight, self.eps)  # type: ignore[no-untyped-call]
        return y


@torch.no_grad()
def _is_same(normed: RMSNorm) -> bool:
    weight = normed.norm.weight
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not (weight.element_size() == 2 or ops.supports(weight)):
        return False
    x = torch.linspace(-3, 5, 7 * len(weight), device=weight.device).view(7, -1).to(weight.dtype)
    return torch.equal(normed.norm(x), _by_torch(x, weight, normed.eps)[0])


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = (ops.norm if ops.supports(x, weight) else _by_torch)(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        dw = None
        if ctx.needs_input_grad[1]:
            h = (x * r[..., None]).to(x.dtype).float()
            dw = (h * dy).flatten(0, -2).sum(0).to(weight.dtype)
        return (ops.norm_backward if ops.supports(dy, x, weight) else _backward)(dy, x, weight, r), dw, None


def _by_torch(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and r (...)."""
    wide = x.float()
    r = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return weight * wide.mul_(r[..., None]).to(x.dtype), r


def _backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """dx."""
    wide, gradient = x.float(), (dy * weight).float()
    inner = (gradient * wide).sum(-1).mul_(r.pow(3) / wide.shape[-1])
    return gradient.mul_(r[..., None]).addcmul_(wide, inner[..., None], value=-1).to(x.dtype)
