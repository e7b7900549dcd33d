"""Skellam noise from a secret stream: the difference of two Poisson numbers, whose sums are Skellam numbers again.

    Sk(mu) = Poisson(mu / 2) - Poisson(mu / 2)        variance mu        Sk(a) + Sk(b) = Sk(a + b)

So n clients that each add Sk(mu / n) have added Sk(mu) together, also modulo the ring of a secure sum. Agarwal, Kairouz
and Liu 2021, arXiv 2110.04995. For integer orders alpha of 2 or more and integers of 2-norm D2 and 1-norm D1 (theorem
3.5, as in their code):

    eps(alpha) <= alpha D2^2 / (2 mu) + ((2 alpha - 1) D2^2 + 6 D1) / (4 mu^2)
"""

from __future__ import annotations

import math

import numpy as np

from fedllm.errors import PrivacyError
from fedllm.privacy.noise import Floats, Ints, NoiseStream

LEAST_MEAN, MOST_MEAN = 10.0, 2.0**44  # of a Poisson number that is drawn here
PIECE = 1 << 16


def skellam(stream: NoiseStream, variance: float, size: int) -> Ints:
    """(size,) integers of mean 0 and this variance.

    Raises:
        PrivacyError: half of the variance is below 10 or above 2^44.
    """
    return poisson(stream, variance / 2, size) - poisson(stream, variance / 2, size)


def poisson(stream: NoiseStream, mean: float, size: int) -> Ints:
    """(size,) Poisson numbers by transformed rejection (Hoermann 1993, 10.1016/0167-6687(93)90997-4, algorithm PTRS).

    Each draw's probability is off by the rounding of float64 alone.

    Raises:
        PrivacyError: the mean is below 10 or above 2^44.
    """
    if not LEAST_MEAN <= mean <= MOST_MEAN:
        raise PrivacyError(f"Skellam noise has a variance of {2 * mean:g} grid steps; it must be 20 to 2^45")
    found, have = [np.empty(0, np.int64)], 0
    while have < size:
        kept = _kept(stream, mean, min(PIECE, 2 * (size - have) + 64))
        found.append(kept)
        have += kept.size
    return np.concatenate(found)[:size]


def _kept(stream: NoiseStream, mean: float, candidates: int) -> Ints:
    """Those of some candidates that are accepted."""
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    u, v = stream.uniform(candidates) - 0.5, stream.uniform(candidates)
    us = 0.5 - np.abs(u)
    k = np.floor((2 * a / us + b) * u + mean + 0.43)
    sure = (us >= 0.07) & (v <= 0.9277 - 3.6224 / (b - 2))
    possible = (k >= 0) & ~((us < 0.013) & (v > us)) & ~sure
    ratio = 1.1239 + 1.1328 / (b - 3.4)
    left = np.log(v[possible] * ratio / (a / us[possible] ** 2 + b))
    k_left = k[possible]
    sure[possible] = left <= k_left * math.log(mean) - mean - log_factorial(k_left)
    kept: Ints = k[sure].astype(np.int64)
    return kept


def log_factorial(k: Floats) -> Floats:
    """ln k! of whole numbers: a table below 16, Stirling's series above (off by less than 1e-12)."""
    table = np.cumsum(np.log(np.maximum(np.arange(16.0), 1)))
    x = np.maximum(k, 16.0)
    series = x * np.log(x) - x + 0.5 * np.log(2 * math.pi * x) + 1 / (12 * x) - 1 / (360 * x**3) + 1 / (1260 * x**5)
    return np.where(k < 16, table[np.minimum(k, 15).astype(np.int64)], series)
