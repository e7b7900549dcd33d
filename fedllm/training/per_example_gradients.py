"""The gradient of each example by itself, all in one pass: a stack whose clients are the examples.

    g_i = d loss(example i) / d params        i = 1 ... N

This is what clipping each example's gradient needs (differential privacy at example level).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm.models.batch import Example, collate
from fedllm.tensors.tree import Tree
from fedllm.training.base import Model


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
