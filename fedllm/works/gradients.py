"""Losses and gradients of a stack of clients, and which of them fail.

A value that is not finite may reach other clients of the stack (a joint product multiplies it by zero). Whoever looks
spoilt is computed alone; who is spoilt there has failed, stands still with zeros for weights, and the others are
computed again, with the same shapes and the same draws: their bits are those of a stack in which nobody fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from fedllm.batch import Batch
from fedllm.tree import Tree
from fedllm.work import Model

Buffers = tuple[Tensor, Tensor]  # (K, P) values, and their gradient, which is written here
Stacked = Callable[[Tensor], Tree]  # a (K, P) buffer to its leaves (K, ...)


def gradients(values: Tensor, slope: Tensor, leaves: Stacked, micro: Sequence[Batch], model: Model) -> Tensor:
    """(K,) losses, float64 on the CPU; `slope` (K, P) becomes the gradient of their sum at `values` (K, P).

    A client's loss is the mean over its examples in all micro-batches.
    """
    totals = torch.tensor([batch.counts for batch in micro]).sum(0).clamp(min=1).double()
    stack = {name: leaf.requires_grad_() for name, leaf in leaves(values.detach()).items()}
    losses, into = torch.zeros(len(values), dtype=torch.float64), list(leaves(slope).values())
    for number, batch in enumerate(micro):
        loss = model.losses(stack, batch)
        weighted = loss * (torch.tensor(batch.counts) / totals).to(loss)
        found = torch.autograd.grad(weighted.sum(), list(stack.values()), materialize_grads=True)
        (torch._foreach_add_ if number else torch._foreach_copy_)(into, found)
        losses += weighted.detach().double().cpu()
    return losses


def surviving(
    buffers: Buffers, leaves: Stacked, micro: Sequence[Batch], model: Model, failed: Collection[int]
) -> tuple[Tensor, dict[int, str]]:
    """Losses and gradients of a stack, and why clients fail at this step. The weights of those that do become zeros."""
    values, slope = buffers
    states = [generator.get_state() for generator in micro[0].dropout]
    reasons: dict[int, str] = {}
    while True:
        losses = gradients(values, slope, leaves, micro, model)
        finite = torch.isfinite(slope.sum(1)).tolist()
        spoilt = [k for k, loss in enumerate(losses.tolist()) if not (math.isfinite(loss) and finite[k])]
        spoilt = [k for k in spoilt if k not in failed and k not in reasons]
        if not spoilt:
            return losses, reasons
        found = {k: _reason(losses[k]) for k in spoilt}
        if len(values) > 1:
            alone = {k: _alone(values, leaves, micro, model, k, states) for k in spoilt}
            found = {k: reason for k, reason in alone.items() if reason is not None} or found
        reasons |= found
        with torch.no_grad():
            values[list(found)] = 0
        _rewind(micro, states)


def _alone(
    values: Tensor, leaves: Stacked, micro: Sequence[Batch], model: Model, k: int, states: Sequence[Tensor]
) -> str | None:
    """Why client k fails by itself; None if it does not."""
    _rewind(micro, states)
    own = [batch.only(k) for batch in micro if batch.counts[k]]
    slope = torch.zeros_like(values[k : k + 1])
    losses = gradients(values[k : k + 1], slope, leaves, own, model)
    fine = math.isfinite(float(losses[0])) and bool(torch.isfinite(slope.sum()))
    return None if fine else _reason(losses[0])


def _reason(loss: Tensor) -> str:
    spoilt = "gradient is not finite" if math.isfinite(float(loss)) else f"loss is {float(loss)}"
    return f"its {spoilt}; lower work.lr or set work.clip_norm"


def _rewind(micro: Sequence[Batch], states: Sequence[Tensor]) -> None:
    for generator, state in zip(micro[0].dropout, states, strict=True):
        generator.set_state(state)
