"""The pass through a decoder layer as one operation, its gradient by hand: no graph between its kernels.

    h  = norm(x)     q, k, v = turned(Q h), turned(K h), V h     x' = x + O attention(q, k, v)
    h' = norm(x')    g, u = G h', U h'                           y  = x' + D (silu(g) u)

Each capital is a frozen matrix with what low-rank adapters of K clients add to it. Sums with x and x', and those of the
gradients that several products have of h and h', are made within the products before they are rounded. The last layer
computes what follows its attention for the tokens alone whose states are needed: those with a label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedllm.models.kernels import matmul, ops, prepack
from fedllm.models.kernels.matmul import MatrixLayout
from fedllm.models.layers.rms_norm import RMSNorm

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
AFTER = ("o", "gate", "up", "down")  # attention

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer in a pass. `pair`: factors A (K, rank, in) and B (K, out, rank), where it has them."""

    weight: Tensor
    bias: Tensor | None
    scale: float = 0.0
    pair: Pair | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """What a pass through a layer has beside tensors that train. `sizes[k]` rows are client k's, `sizes_after[k]` of
    those that go on after attention: `wanted`, where these are not all."""

    linears: Mapping[str, Linear]
    norms: tuple[RMSNorm, RMSNorm]
    turns: Pair
    sequences: ops.Sequences
    scaling: float
    sizes: tuple[int, ...]
    sizes_after: tuple[int, ...]
    wanted: Tensor | None = None

    def few(self, x: Tensor) -> Tensor:
        """The rows that go on after attention."""
        return x if self.wanted is None else x.index_select(0, self.wanted)

    def all(self, few: Tensor, rows: int) -> Tensor:
        """All rows, of which the others are zero."""
        if self.wanted is None:
            return few
        return few.new_zeros(rows, *few.shape[1:]).index_copy_(0, self.wanted, few)

    def counts(self, name: str) -> tuple[int, ...]:
        """Rows of each client in a product."""
        return self.sizes_after if name in AFTER else self.sizes

    def product(self, name: str, x: Tensor, pair: Pair | None, plus: Tensor | None = None) -> tuple[Tensor, Any]:
        """(T, in) to (T, out), added to `plus`; and what the gradient needs."""
        linear = self.linears[name]
        matrix = prepack.matrix(linear.weight, MatrixLayout.TURNED)
        if pair is None:
            return matmul.product(x, matrix, linear.bias, plus), None
        y = x.new_empty(len(x), len(linear.weight))
        return y, matmul.low_rank_(y, x, pair, self.counts(name), linear.scale, (x, matrix, linear.bias), plus)

    def backward(
        self, name: str, dy: Tensor, saved: Saved, plus: Tensor | None = None, needs_x: bool = True
    ) -> Gradients:
        """Gradients of x, added to `plus`, and of both factors."""
        linear, matrix = self.linears[name], prepack.matrix(self.linears[name].weight, MatrixLayout.PLAIN)
        if saved.pair is None:
            return (matmul.product(dy, matrix, None, plus) if needs_x else None), None, None
        kept, dx = (saved.x, saved.z, *saved.pair), torch.empty_like(saved.x) if needs_x else None
        da, db = matmul.low_rank_backward(dy, kept, self.counts(name), linear.scale, saved.needs, dx, matrix, plus)
        return dx, da, db


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Saved:
    """What a product's gradient needs. `needs`: whether the factors do."""

    x: Tensor
    z: Tensor
    pair: Pair | None
    needs: tuple[bool, bool]


def decoder_layer(x: Tensor, plan: Plan) -> Tensor:
    """(T, d) states before the layer to those behind it."""
    leaves = [leaf for name in LINEARS for leaf in plan.linears[name].pair or (None, None)]
    y: Tensor = _Pass.apply(x, plan, *leaves)  # type: ignore[no-untyped-call]
    return y


def counted(rows: Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """How many of some rows are each client's, who has so many of all."""
    ends = torch.tensor(sizes).cumsum(0)
    counts = torch.bincount(torch.searchsorted(ends, rows, right=True), minlength=len(sizes))
    return tuple(counts.tolist())


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, *leaves: Tensor | None) -> Tensor:
        pairs, z = dict(zip(LINEARS, _pairs(leaves), strict=True)), {}
        h, r = _normed(plan.norms[0], x)
        q, z["q"] = plan.product("q", h, pairs["q"])
        k, z["k"] = plan.product("k", h, pairs["k"])
        v, z["v"] = plan.product("v", h, pairs["v"])
        heads = q.shape[1] // plan.turns[0].shape[1], k.shape[1] // plan.turns[0].shape[1]
        q, k = (ops.rotary(state.view(len(x), n, -1), *plan.turns) for state, n in zip((q, k), heads, strict=True))
        v = v.view(len(x), heads[1], -1)
        o, p = ops.attention(_by_head(q, k, v), plan.sequences, None, plan.scaling)
        o = plan.few(o.flatten(1))
        middle, z["o"] = plan.product("o", o, pairs["o"], plus=plan.few(x))
        h2, r2 = _normed(plan.norms[1], middle)
        gate, z["gate"] = plan.product("gate", h2, pairs["gate"])
        up, z["up"] = plan.product("up", h2, pairs["up"])
        m = ops.gated(gate, up)
        y, z["down"] = plan.product("down", m, pairs["down"], plus=middle)
        kept = (x, h, r, q, k, v, p, o, middle, h2, r2, gate, up, m)
        ctx.save_for_backward(*kept, *(z[name] for name in LINEARS), *leaves)
        ctx.plan = plan
        return plan.all(y, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plan, needs_x = ctx.plan, ctx.needs_input_grad[0]
        x, h, r, q, k, v, p, o, middle, h2, r2, gate, up, m, *rest = ctx.saved_tensors
        inputs = {"q": h, "k": h, "v": h, "o": o, "gate": h2, "up": h2, "down": m}
        needs = zip(ctx.needs_input_grad[2::2], ctx.needs_input_grad[3::2], strict=True)
        z, pairs = rest[: len(LINEARS)], _pairs(rest[len(LINEARS) :])
        of = {
            name: Saved(inputs[name], own, pair, both)
            for name, own, pair, both in zip(LINEARS, z, pairs, needs, strict=True)
        }
        found: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        dy = plan.few(dy)
        dm, *found["down"] = plan.backward("down", dy, of["down"])
        d_gate, d_up = ops.gated_backward(dm, gate, up)
        dh2, *found["gate"] = plan.backward("gate", d_gate, of["gate"])
        dh2, *found["up"] = plan.backward("up", d_up, of["up"], plus=dh2)
        d_middle = ops.norm_backward(dh2, middle, plan.norms[1].norm.weight, r2, plus=dy)
        do, *found["o"] = plan.backward("o", d_middle, of["o"])
        do = plan.all(do, len(x)).view(len(x), -1, v.shape[2])
        dq, dk, dv = ops.attention_backward(do, (*_by_head(q, k, v), p), plan.sequences, None, plan.scaling)
        dq, dk = (ops.rotary_backward(state, *plan.turns) for state in (dq, dk))
        dh, *found["q"] = plan.backward("q", dq.flatten(1), of["q"], needs_x=needs_x)
        dh, *found["k"] = plan.backward("k", dk.flatten(1), of["k"], plus=dh, needs_x=needs_x)
        dh, *found["v"] = plan.backward("v", dv.flatten(1), of["v"], plus=dh, needs_x=needs_x)
        dx = None
        if needs_x:
            dx = ops.norm_backward(dh, x, plan.norms[0].norm.weight, r, plus=plan.all(d_middle, len(x)))
        return dx, None, *(gradient for name in LINEARS for gradient in found[name])


def _normed(normed: RMSNorm, x: Tensor) -> Pair:
    return ops.norm(x, normed.norm.weight, normed.eps)  # type: ignore[arg-type]


def _by_head(*states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (state.transpose(0, 1) for state in states)
    return q, k, v


def _pairs(leaves: Any) -> list[Pair | None]:
    """A and B of each linear layer."""
    return [None if a is None else (a, b) for a, b in zip(leaves[::2], leaves[1::2], strict=True)]
