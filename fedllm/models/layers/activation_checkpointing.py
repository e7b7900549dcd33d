"""Gradient checkpointing: keep each layer's input only, and compute the layer again in the backward pass.

It is a matter of the pass (`Forward.recompute`), not of the model, so that one thread may do it while another does not.
The second computation sees the same adapters and draws the same dropout, so the bits are those of a pass without it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from fedllm.models.layers.forward_context import current, forward_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare(model: PreTrainedModel) -> int:
    """Make the decoder's layers able to be computed twice; how many they are."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = Recomputed(layer.forward)
    return len(layers)


@dataclass(frozen=True, eq=False)
class Recomputed:
    """A layer's forward pass."""

    forward: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the layer computes; its inner values are kept or not as the pass of this thread says."""
        now = current()
        if not now.recompute or not torch.is_grad_enabled():
            return self.forward(*args, **options)
        states = [generator.get_state() for generator in now.dropout]

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            again = tuple(torch.Generator(generator.device) for generator in now.dropout)
            for generator, state in zip(again, states, strict=True):
                generator.set_state(state)
            return nullcontext(), forward_context(replace(now, dropout=again))

        return checkpoint(
            self.forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **options
        )
