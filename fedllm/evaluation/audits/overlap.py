"""How much of a text was reconstructed: overlap of token sequences, each reference with a prediction of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Tokens = Sequence[int]


@dataclass(frozen=True)
class Overlap:
    """Of one reference. rouge_1, rouge_2: F1 of its tokens and of its pairs of tokens; exact: it was found whole."""

    rouge_1: float
    rouge_2: float
    exact: bool
    found: tuple[int, ...]


def rouge_n(found: Tokens, wanted: Tokens, n: int) -> float:
    """F1 of the n-grams that both have, n = 1 or 2. Lin 2004."""
    left, right = (Counter(each if n == 1 else pairwise(each)) for each in (found, wanted))
    common = sum((left & right).values())
    return 2 * common / (sum(left.values()) + sum(right.values())) if common else 0.0


def best_overlaps(predictions: Sequence[Tokens], references: Sequence[Tokens]) -> list[Overlap]:
    """Each reference with the prediction that fits it best; a prediction serves one reference, the best fits first."""
    fits = {
        (i, j): rouge_n(p, r, 1) + rouge_n(p, r, 2) for i, p in enumerate(predictions) for j, r in enumerate(references)
    }
    chosen: dict[int, int] = {}
    for i, j in sorted(fits, key=lambda pair: (-fits[pair], pair)):
        if j not in chosen and i not in chosen.values():
            chosen[j] = i
    found = [tuple(predictions[chosen[j]]) if j in chosen else () for j in range(len(references))]
    return [
        Overlap(rouge_n(f, r, 1), rouge_n(f, r, 2), tuple(r) == f, f) for f, r in zip(found, references, strict=True)
    ]
