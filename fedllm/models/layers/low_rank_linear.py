"""The product of a frozen linear layer with the low-rank adapters of K clients, and its gradient, by hand.

    y = x W^T + bias + s z B_k^T          z = u A_k^T                  x, u: (T, in), rows client by client; u is x, or
    dx = dy W   du = dz A_k               dz = s dy B_k                what dropout left of it
    dA_k = dz^T u   dB_k = s dy^T z

The products with W run over all rows at once. Those with A and B are small, and each call costs as much as it computes.
In bfloat16 on a CPU a kernel computes them with W's in the same sums (`_Kernel`). Elsewhere, where they stay narrow, or
the tokens are few, the factors of all clients are side by side in one product, whose values between a row and another
client's factors are set to zero (`_Joint`); else each client has products of its own (`_Apart`). A zero times a NaN is
a NaN, so the joint form keeps clients apart only while all values are finite: `Sgd` sees to that.

Padding a client's rank with zeros adds zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedllm.models.kernels import matmul, ops, prepack
from fedllm.models.kernels.matmul import MatrixLayout
from fedllm.models.layers.quantized_linear import Quantized

NARROW, FEW = 64, 6000  # clients x rank, tokens x rank


@dataclass(frozen=True, eq=False)
class Frozen:
    """x W^T + bias, W (out, in). `rest`: a second term of W, of what the type of the first one cannot hold."""

    weight: Tensor
    bias: Tensor | None = None
    rest: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) to (T, out)."""
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        return y if self.rest is None else y.addmm_(x, self.rest.T)

    def backward(self, dy: Tensor) -> Tensor:
        """(T, out) to (T, in)."""
        dx = dy @ self.weight
        return dx if self.rest is None else dx.addmm_(dy, self.rest)


@dataclass(frozen=True, eq=False)
class Layer:
    """What a layer's product has beside tensors that train: `sizes[k]` rows are client k's; `scale`: s."""

    frozen: Frozen | Quantized
    sizes: tuple[int, ...]
    scale: float

    @property
    def with_product(self) -> Frozen | None:
        """The frozen matrix, if the kernel is to compute its product, too."""
        frozen = self.frozen
        if not isinstance(frozen, Frozen) or frozen.rest is not None or not ops.supports_product(frozen.weight):
            return None
        return frozen


def low_rank_linear(
    x: Tensor,
    dropped: Tensor | None,
    frozen: Frozen | Quantized,
    factors: tuple[Tensor, Tensor],
    sizes: Sequence[int],
    scale: float,
) -> Tensor:
    """(T, in) rows, `sizes[k]` of them client k's, to (T, out).

    Args:
        dropped: u; None if it is x. frozen: W and the bias.
        factors: A (K, rank, in) and B (K, out, rank), in the type in which they train.
    """
    (clients, rank, _), size_out = factors[0].shape, factors[1].shape[1]
    form: type[torch.autograd.Function] = _Apart
    if ops.supports_low_rank(x, size_out):
        form = _Kernel
    elif clients > 1 and (x.is_cuda or joint_pays(clients, len(x), rank)):
        form = _Joint
    y: Tensor = form.apply(x, dropped, *factors, Layer(frozen, tuple(sizes), scale))
    return y


def joint_pays(clients: int, tokens: int, rank: int) -> bool:
    """Whether what the joint form wastes on a CPU costs less than its calls save."""
    return clients * rank <= NARROW or tokens * rank <= FEW


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, layer: Layer) -> Tensor:
        u = (x if dropped is None else dropped).contiguous()
        if (frozen := layer.with_product) is not None:
            y = x.new_empty(len(x), b.shape[1])
            given = x, prepack.matrix(frozen.weight, MatrixLayout.TURNED), frozen.bias
            z = matmul.low_rank_(y, u, (a, b), layer.sizes, layer.scale, given)
        else:
            y = layer.frozen.forward(x)
            z = matmul.low_rank_(y, u, (a, b), layer.sizes, layer.scale)
        ctx.save_for_backward(u, z, a, b)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_dropped, *needs = ctx.needs_input_grad
        layer, saved = ctx.layer, ctx.saved_tensors  # asked for once: with recomputation they are made then
        u = saved[0]
        together = layer.with_product if needs_x and not needs_dropped else None
        matrix = prepack.matrix(together.weight, MatrixLayout.PLAIN) if together is not None else None
        dx: Tensor | None = None
        if needs_x:
            dx = layer.frozen.backward(dy) if together is None else torch.empty_like(u)
        du = torch.zeros_like(u) if needs_dropped else dx
        both = needs[0], needs[1]
        da, db = matmul.low_rank_backward(dy, saved, layer.sizes, layer.scale, both, du, matrix)
        return dx, du if needs_dropped else None, da, db, None


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, layer: Layer) -> Tensor:
        u, a, b = x if dropped is None else dropped, a.to(x.dtype), b.to(x.dtype)
        y, low = layer.frozen.forward(x), []
        for k, own in enumerate(_rows(layer.sizes)):
            low.append(u[own] @ a[k].T)
            y[own].addmm_(low[k], b[k].T, alpha=layer.scale)
        ctx.save_for_backward(u, a, b, *low)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, a, b, *low = ctx.saved_tensors
        needs_x, needs_dropped, needs_a, needs_b, *_ = ctx.needs_input_grad
        dx = ctx.layer.frozen.backward(dy) if needs_x else None
        du = torch.empty_like(u) if needs_dropped else None
        da, db = torch.empty_like(a) if needs_a else None, torch.empty_like(b) if needs_b else None
        for k, own in enumerate(_rows(ctx.layer.sizes)):
            dy_k = dy[own]
            if db is not None:
                torch.mm(dy_k.T, low[k], out=db[k]).mul_(ctx.layer.scale)
            dz = (dy_k @ b[k]).mul_(ctx.layer.scale)
            if da is not None:
                torch.mm(dz.T, u[own], out=da[k])
            if du is not None:
                torch.mm(dz, a[k], out=du[own])
            elif dx is not None:
                dx[own].addmm_(dz, a[k])
        return dx, du, da, db, None


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, layer: Layer) -> Tensor:
        clients, rank, _ = a.shape
        u, others = x if dropped is None else dropped, _others(layer.sizes, rank, x.device)
        left = a.to(x.dtype).reshape(clients * rank, -1)  # (K rank, in)
        right = b.transpose(0, 1).to(x.dtype).reshape(-1, clients * rank)  # (out, K rank)
        z = (u @ left.T).masked_fill_(others, 0)
        y = layer.frozen.forward(x).addmm_(z, right.T, alpha=layer.scale)
        ctx.save_for_backward(u, left, right, z, others)
        ctx.layer, ctx.clients = layer, clients
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, left, right, z, others = ctx.saved_tensors
        needs_x, needs_dropped, needs_a, needs_b, *_ = ctx.needs_input_grad
        dz = (dy @ right).mul_(ctx.layer.scale).masked_fill_(others, 0)
        da = (dz.T @ u).view(ctx.clients, -1, u.shape[1]) if needs_a else None
        db = (dy.T @ z).mul_(ctx.layer.scale).view(dy.shape[1], ctx.clients, -1).transpose(0, 1) if needs_b else None
        dx = ctx.layer.frozen.backward(dy) if needs_x else None
        if needs_dropped:
            return dx, dz @ left, da, db, None
        return None if dx is None else dx.addmm_(dz, left), None, da, db, None


@lru_cache(maxsize=16)
def _others(sizes: tuple[int, ...], rank: int, device: torch.device) -> Tensor:
    """(T, K rank): True between a row and the factors of another client."""
    owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    columns = torch.arange(len(sizes)).repeat_interleave(rank)
    return (owners[:, None] != columns).to(device)


def _rows(sizes: Sequence[int]) -> list[slice]:
    """Client k's rows."""
    return [slice(*edges) for edges in pairwise([0, *accumulate(sizes)])]
