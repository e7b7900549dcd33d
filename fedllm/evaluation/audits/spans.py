"""What the update of a linear layer says about the layer's inputs: the space that they span.

    dL/dW = sum over t of delta_t x_t^T        its rows lie in span{x_t}, so dist(x_t) = 0 and others stand off
    LoRA, first step (B = 0):  dL/dB = s sum over t of delta_t (A x_t)^T: the same of A x_t, in R^rank

Exact while the inputs are fewer than the width (or the rank), and the step is plain gradient descent. DAGER,
arXiv:2405.15586; the case of B = 0 follows from the formula above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CUTOFF = 20  # directions of a full matrix that are never taken: a whole space tells nobody apart
GAP = 30.0  # how far singular values must fall for the rank to be known


@dataclass(frozen=True, eq=False)
class Span:
    """A space in R^d. basis: (k, d), orthonormal. full: no rank was seen below the most that it may have."""

    basis: Tensor
    full: bool

    @staticmethod
    def of(rows: Tensor, cutoff: int) -> Span:
        """Of the (n, d) rows of an update: up to the largest fall of the singular values, and at most d - cutoff."""
        _, values, vectors = torch.linalg.svd(rows.double(), full_matrices=False)
        most = max(1, rows.shape[1] - cutoff)
        known = values[: most + 1].clamp(min=float(values[0]) * 1e-12)
        falls = known[:-1] / known[1:]
        if not len(falls) or float(falls.max()) < GAP:
            return Span(vectors[: min(most, len(vectors))], full=True)
        return Span(vectors[: int(falls.argmax()) + 1], full=False)

    def distance(self, vectors: Tensor) -> Tensor:
        """(n,): of (n, d) vectors, the share of each that lies outside, from 0 to 1."""
        wide = vectors.double()
        rest = wide - (wide @ self.basis.T) @ self.basis
        lengths: Tensor = rest.norm(dim=1) / wide.norm(dim=1).clamp(min=1e-30)
        return lengths


@dataclass(frozen=True, eq=False)
class LayerSpans:
    """What the updates of layers with one and the same input say. `maps`: of each, A, or None for a whole weight."""

    module: str  # the path of the first of them, whose input it is
    spans: Sequence[Span]
    maps: Sequence[Tensor | None]

    @property
    def rank(self) -> int:
        """Directions that were found: as many different inputs, if there are no more than the budget."""
        return max(len(span.basis) for span in self.spans)

    @property
    def full(self) -> bool:
        """Whether every span is full, so that the test says nothing."""
        return all(span.full for span in self.spans)

    def distance(self, inputs: Tensor) -> Tensor:
        """(n,): of (n, d) inputs, the mean square distance over the layers whose span is not full."""
        used = [(s, a) for s, a in zip(self.spans, self.maps, strict=True) if not s.full] or [
            (self.spans[0], self.maps[0])
        ]
        squares = [span.distance(inputs if a is None else inputs.double() @ a.double().T) ** 2 for span, a in used]
        return torch.stack(squares).mean(0).sqrt()


def layer_spans(delta: dict[str, Tensor], start: dict[str, Tensor], block: str) -> LayerSpans | None:
    """Of the query, key and value layers of one block; None where the update has none of them.

    Args:
        delta: the update, by name. start: the adapter before it, for A. block: path of the attention module.
    """
    paths = [f"{block}.{name}_proj" for name in "qkv"]
    whole = [path for path in paths if f"{path}.weight" in delta]
    if whole:
        rows = torch.cat([delta[f"{path}.weight"] for path in whole])
        return LayerSpans(whole[0], [Span.of(rows, CUTOFF)], [None])
    low = [path for path in paths if f"{path}.lora_B" in delta]
    if not low:
        return None
    low = [path for path in low if not path.endswith("q_proj")] or low  # a query of the first place has no gradient
    spans = [Span.of(delta[f"{path}.lora_B"], 1) for path in low]
    return LayerSpans(low[0], spans, [start[f"{path}.lora_A"] for path in low])
