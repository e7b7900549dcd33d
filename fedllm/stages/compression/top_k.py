"""Send the largest entries alone, and remember the rest for later.

    e <- e + Δ        sent = the k largest of |e| over all leaves together        e <- e - sent

Stich et al. 2018, algorithm 1, arXiv 1809.07599.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedllm.errors import require
from fedllm.messages.context import ClientContext
from fedllm.messages.traits import DELTA, PER_ENTRY, Traits
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.tensors.tree import Tree
from fedllm.tensors.wire_format import SPARSE


@dataclass(frozen=True)
class TopK(Stage):
    """Memory: e, the client's error. What is sent plus e is exactly e plus Δ. Neutral, to the bit: `TopK(1)`.

    k = round(fraction * number of values), at least 1; of equal sizes the first by name and place goes first.
    The error can make what is sent longer than Δ by any amount, so no norm is promised.

    Args:
        fraction: of the values that is sent, in (0, 1].
        feedback: remember the error. False drops it: the method that can stall, for comparison.
    """

    fraction: float
    feedback: bool = True

    traits = Traits(takes=DELTA, needs=PER_ENTRY)

    def __post_init__(self) -> None:
        allowed = "above 0 and at most 1"
        require(0 < self.fraction <= 1, self, field="fraction", value=self.fraction, allowed=allowed)

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Replace the delta by the largest entries of error plus delta."""
        part = update.parts.get("delta")
        if part is None or not part.tree:
            return update, memory
        held = {name: memory[name] + leaf if name in memory else leaf for name, leaf in part.tree.items()}
        largest = _largest(held, self.fraction)
        sent = {name: leaf.masked_fill(~largest[name], 0) for name, leaf in held.items()}
        error = {name: leaf.masked_fill(largest[name], 0) for name, leaf in held.items()}
        update = update.having("delta", replace(part, tree=sent, wire_format=SPARSE))
        return update, {**memory, **error} if self.feedback else memory


def _largest(held: Tree, fraction: float) -> Tree:
    """Per leaf the mask of the entries to send. Leaves are taken by name: a tree's order is no part of a result."""
    names = sorted(held)
    sizes = torch.cat([held[name].abs().reshape(-1) for name in names])
    count = max(1, round(fraction * sizes.numel()))
    threshold = torch.kthvalue(sizes, sizes.numel() - count + 1).values
    mask = sizes > threshold
    ties = (sizes == threshold).nonzero().reshape(-1)
    mask[ties[: count - int(mask.sum())]] = True
    pieces = torch.split(mask, [held[name].numel() for name in names])
    return {name: piece.reshape(held[name].shape) for name, piece in zip(names, pieces, strict=True)}
