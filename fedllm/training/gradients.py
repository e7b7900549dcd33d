"""Losses and gradients of a stack of clients, and which of them fail.

A value that is not finite may reach other clients of the stack (a joint product multiplies it by zero). A client whose
values are not finite is computed again, alone. If they are not finite there either, it has failed: its parameters
become zeros and stay so, and the others are computed again, with the same shapes and the same draws: their bits are
those of a stack in which nobody fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.models.batch import Batch
from fedllm.tensors.tree import Tree
from fedllm.training.base import Model

Stacked = Callable[[Tensor], Tree]  # a (K, P) buffer to its tensors (K, ...)


@dataclass(frozen=True, eq=False)
class Stack:
    """K clients: (K, P) values, the (K, P) memory of their gradient, how both are cut into tensors (K, ...), and
    tensors (K, ...) that stand still."""

    values: Tensor
    gradient: Tensor
    leaves: Stacked
    held: Tree

    def only(self, k: int) -> Stack:
        """Client k alone, with a gradient of its own."""
        own, held = self.values[k : k + 1], {name: leaf[k : k + 1] for name, leaf in self.held.items()}
        return Stack(own, torch.zeros_like(own), self.leaves, held)


def gradients(stack: Stack, micro: Sequence[Batch], model: Model) -> Tensor:
    """(K,) losses, float64 on the CPU; the stack's `gradient` becomes the gradient of their sum at its `values`.

    A client's loss is the mean over its examples in all micro-batches.
    """
    totals = torch.tensor([batch.counts for batch in micro]).sum(0).clamp(min=1).double()
    leaves = {name: leaf.requires_grad_() for name, leaf in stack.leaves(stack.values.detach()).items()}
    losses = torch.zeros(len(stack.values), dtype=torch.float64)
    into = list(stack.leaves(stack.gradient).values())
    for number, batch in enumerate(micro):
        for leaf, place in zip(leaves.values(), into, strict=True):
            leaf.grad = None if number else place  # a kernel may write it there itself
        loss = model.losses({**stack.held, **leaves}, batch)
        weighted = loss * (torch.tensor(batch.counts) / totals).to(loss)
        found = torch.autograd.grad(weighted.sum(), list(leaves.values()), materialize_grads=True)
        if number:
            torch._foreach_add_(into, found)
        elif rest := [
            (place, gradient) for place, gradient in zip(into, found, strict=True) if not _same(place, gradient)
        ]:
            torch._foreach_copy_([place for place, _ in rest], [gradient for _, gradient in rest])
        losses += weighted.detach().double().cpu()
    return losses


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are one piece of memory."""
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def surviving(
    stack: Stack, micro: Sequence[Batch], model: Model, failed: Collection[int]
) -> tuple[Tensor, dict[int, str]]:
    """Losses and gradients of a stack, and why clients fail at this step. The weights of those that do become zeros."""
    states = [generator.get_state() for generator in micro[0].dropout]
    reasons: dict[int, str] = {}
    while True:
        losses = gradients(stack, micro, model)
        finite = torch.isfinite(stack.gradient.sum(1)).tolist()
        spoilt = [k for k, loss in enumerate(losses.tolist()) if not (math.isfinite(loss) and finite[k])]
        spoilt = [k for k in spoilt if k not in failed and k not in reasons]
        if not spoilt:
            return losses, reasons
        found = {k: _reason(losses[k]) for k in spoilt}
        if len(stack.values) > 1:
            alone = {k: _alone(stack.only(k), micro, model, k, states) for k in spoilt}
            found = {k: reason for k, reason in alone.items() if reason is not None} or found
        reasons |= found
        with torch.no_grad():
            stack.values[list(found)] = 0
        _rewind(micro, states)


def _alone(stack: Stack, micro: Sequence[Batch], model: Model, k: int, states: Sequence[Tensor]) -> str | None:
    """Why client k fails by itself; None if it does not."""
    _rewind(micro, states)
    own = [batch.only(k) for batch in micro if batch.counts[k]]
    losses = gradients(stack, own, model)
    fine = math.isfinite(float(losses[0])) and bool(torch.isfinite(stack.gradient.sum()))
    return None if fine else _reason(losses[0])


def _reason(loss: Tensor) -> str:
    spoilt = "gradient is not finite" if math.isfinite(float(loss)) else f"loss is {float(loss)}"
    return f"its {spoilt}; lower work.sgd.lr or set work.sgd.clip_norm"


def _rewind(micro: Sequence[Batch], states: Sequence[Tensor]) -> None:
    for generator, state in zip(micro[0].dropout, states, strict=True):
        generator.set_state(state)
