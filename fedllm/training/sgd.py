"""Local SGD or AdamW: each step takes the gradient of the mean loss of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.training.gradient_descent import GradientDescent


@dataclass(frozen=True)
class Sgd(GradientDescent):
    """Mini-batch descent. Exactly one of `steps` and `epochs` is set.

    Args:
        lr: learning rate; `lr_schedule` multiplies it. momentum: of SGD. betas, eps: of AdamW.
        batch_size: examples a micro-batch; `accumulation` micro-batches make one step.
        clip_norm: bound on the 2-norm of a client's gradient, before the optimiser and after the stages' hooks.
        max_length: longest sequence in tokens; what is longer is cut (see the template).
    """
