"""The gradient of each example by itself, all in one pass: a stack whose clients are the examples.

    g_i = d loss(example i) / d params        i = 1 ... N

This is what clipping each example's gradient needs (differential privacy at example level).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedllm.models.batch import Batch, Example, collate
from fedllm.tensors.tree import Tree
from fedllm.training.base import Model
from fedllm.training.gradients import Stack, gradients


def per_example_gradients(model: Model, params: Tree, examples: Sequence[Example]) -> tuple[Tree, Tensor]:
    """One client's examples to (N, ...) gradients of its tensors and (N,) losses.

    Exact: each example has its own products with the adapter, or is kept apart by zeros in joint ones. Memory grows
    with N times the size of the adapter, so take examples by the dozen.

    Args:
        model: a loaded task whose adapter can be stacked. params: unstacked tensors. A tensor that the loss does not
            reach has a gradient of zeros.
    """
    count = len(examples)
    stack = {name: leaf.detach().expand(count, *leaf.shape).requires_grad_() for name, leaf in params.items()}
    losses = model.losses(stack, collate([[example] for example in examples]))
    grads = torch.autograd.grad(losses.sum(), list(stack.values()), materialize_grads=True)
    return dict(zip(stack, grads, strict=True)), losses.detach()


def fill(stack: Stack, batch: Batch, model: Model) -> Tensor:
    """(N,) losses, float64 on the CPU; the stack's `gradient` (N, P) becomes the gradients of N examples.

    A value that is not finite may reach other examples of a joint product, so such gradients are computed again, each
    alone, and so are all of a model that takes one sequence at a time.

    Args:
        stack: `values` (N, P), each example's own. batch: its clients are the examples (`Batch.apart`).
    """
    if model.why_not_stackable is not None:
        losses = torch.zeros(len(batch.counts), dtype=torch.float64)
        _alone(stack, batch, model, range(len(losses)), losses)
        return losses
    losses = gradients(stack, [batch], model)
    spoilt = (~torch.isfinite(stack.gradient.sum(1))).nonzero().reshape(-1).tolist()
    if len(batch.counts) > 1:
        _alone(stack, batch, model, spoilt, losses)
    return losses


def _alone(stack: Stack, batch: Batch, model: Model, places: Iterable[int], losses: Tensor) -> None:
    for place in places:
        own = stack.only(place)
        losses[place] = gradients(own, [batch.only(place)], model)[0]
        stack.gradient[place] = own.gradient[0]
