"""Scores of an answer against its reference."""

from __future__ import annotations

from collections.abc import Sequence


def normal(text: str) -> str:
    """Lower case, single spaces, no full stop at the end: what exact match compares."""
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same after `normal`, else 0."""
    return float(normal(answer) == normal(reference))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words. Lin 2004."""
    found, wanted = normal(answer).split(), normal(reference).split()
    common = _longest_common(found, wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def choice_score(log_likelihoods: Sequence[float], answer: int, tolerance: float = 1e-6) -> float:
    """1 if the right option is the most likely one; options within `tolerance` of the best share the point."""
    best = max(log_likelihoods)
    tied = [place for place, value in enumerate(log_likelihoods) if value >= best - tolerance]
    return 1 / len(tied) if answer in tied else 0.0


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        before = 0
        for place, other in enumerate(right, start=1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]
