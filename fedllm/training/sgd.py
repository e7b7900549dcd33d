"""Local SGD or AdamW: each step takes the gradient of the mean loss of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.training.gradient_descent import GradientDescent


@dataclass(frozen=True)
class Sgd(GradientDescent):
    """Mini-batch descent. Exactly one of `steps` and `epochs` is set."""
