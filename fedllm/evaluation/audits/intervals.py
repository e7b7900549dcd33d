"""Intervals of 95 % for what an attack reaches: an area under a curve, and a rate.

    AUC = mean_ij psi(p_i, n_j)        psi(a, b) = 1[a > b] + 1[a = b] / 2
    Var = var_i(mean_j psi) / n+ + var_j(mean_i psi) / n-

DeLong, DeLong and Clarke-Pearson 1988, 10.2307/2531595; Clopper and Pearson 1934, 10.1093/biomet/26.4.404.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NORMAL = 1.959963984540054  # of 95 %


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


def auc(members: Floats, others: Floats) -> Interval:
    """The chance that a member's score is above another's, of equal ones half.

    Where all of the members are above all others the variance is 0 and says nothing; then the lower end is that of the
    rate at which members pass the largest score of the others.
    """
    order = np.sort(others)
    below = (np.searchsorted(order, members, "left") + np.searchsorted(order, members, "right")) / 2 / len(others)
    order = np.sort(members)
    above = 1 - (np.searchsorted(order, others, "left") + np.searchsorted(order, others, "right")) / 2 / len(members)
    value = float(below.mean())
    error = math.sqrt(below.var(ddof=1) / len(members) + above.var(ddof=1) / len(others))
    if not error:
        return Interval(value, proportion(round(value * len(members)), len(members)).low, value)
    return Interval(value, max(0.0, value - NORMAL * error), min(1.0, value + NORMAL * error))


def proportion(count: int, of: int, confidence: float = 0.95) -> Interval:
    """count / of, with the exact binomial interval."""
    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else _root(lambda p: _at_least(count, of, p) - tail)
    high = 1.0 if count == of else _root(lambda p: tail - (1 - _at_least(count + 1, of, p)))
    return Interval(count / of, low, high)


def true_positives(members: Floats, others: Floats, rate: float) -> Interval | None:
    """The share of members above a threshold that at most this share of the others is above. The threshold is that of
    every second of the others, and the interval that of the members alone. None: too few others to tell such a rate.
    """
    held = np.sort(others[::2])[::-1]
    allowed = int(rate * len(held))
    if not allowed:
        return None
    return proportion(int((members > held[allowed]).sum()), len(members))


def _at_least(count: int, of: int, p: float) -> float:
    """P[Bin(of, p) >= count]."""
    if p in (0.0, 1.0):
        return float(p == 1.0 or count == 0)
    k = np.arange(count, of + 1)
    chosen = np.array([math.lgamma(of + 1) - math.lgamma(x + 1) - math.lgamma(of - x + 1) for x in k])
    return float(np.exp(chosen + k * math.log(p) + (of - k) * math.log1p(-p)).sum())


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function of a chance is 0."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
