"""Correlated noise by a lower triangular Toeplitz matrix C, given by its first column c.

A model after round t needs the sum of all updates so far: A X, with A lower triangular ones. With A = B C the noised
sums are A X + B Z = A (X + C^-1 Z) for independent noise Z of standard deviation sigma. So round t releases its sum
with the noise (C^-1 Z)_t, and the sum up to round t is off by sigma times the norm of row t of B = A C^-1. The price is
that one client moves C X by the sensitivity, and not by 1 (Denisov et al. 2022, arXiv 2202.08312).

The square root of A is near the best C (Fichtenberger, Henzinger and Upadhyay 2023, arXiv 2202.11205). Cut to its first
p coefficients (BSR) it costs less where clients come back after p rounds; cut in its inverse (BISR), the noise of a
round needs the last p - 1 draws alone.

Shapes: c, and all that is returned, [rounds].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import PrivacyError

Floats = NDArray[np.float64]


def square_root(rounds: int) -> Floats:
    """The square root of the matrix of ones: c_0 = 1, c_j = c_(j-1) (2 j - 1) / (2 j) (arXiv 2202.11205)."""
    if rounds < 1:
        raise PrivacyError(f"correlated noise spans {rounds!r} rounds; it must be 1 or more")
    steps = np.arange(1, rounds, dtype=np.float64)
    return np.concatenate([[1.0], np.cumprod((2 * steps - 1) / (2 * steps))])


def inverse(c: Floats) -> Floats:
    """The first column of C^-1: d_0 = 1 / c_0, d_j = -(c_1 d_(j-1) + ... + c_j d_0) / c_0."""
    d = np.zeros(len(c))
    d[0] = 1 / c[0]
    for j in range(1, len(c)):
        d[j] = -(c[1 : j + 1] @ d[j - 1 :: -1]) / c[0]
    return d


def banded_square_root(rounds: int, band: int) -> Floats:
    """BSR: the square root's first `band` coefficients (Kalinin and Lampert 2024, arXiv 2405.13763). Band 1 is
    independent noise, `rounds` the whole root."""
    return _cut(square_root(rounds), band)


def banded_inverse_square_root(rounds: int, band: int) -> Floats:
    """BISR: the C whose inverse has the first `band` coefficients of the root's inverse (arXiv 2505.12128)."""
    return inverse(_cut(inverse(square_root(rounds)), band))


def _cut(c: Floats, band: int) -> Floats:
    if not 1 <= band <= len(c):
        raise PrivacyError(f"the band of the noise is {band!r}; it must be 1 to {len(c)}, the number of rounds")
    return np.where(np.arange(len(c)) < band, c, 0.0)


def default_band(rounds: int, min_separation: int) -> int:
    """A client that comes back after b rounds: band b. Of those who may come back at once, 1: independent noise."""
    return min(rounds, min_separation)


def sensitivity(c: Floats, participations: int, min_separation: int) -> float:
    """How far one client moves C X in 2-norm, with updates of norm 1 in at most k rounds, at least b apart.

    Its worst rounds are 0, b, 2 b, ...: sens = || sum of C's columns i b, i < min(k, ceil(n / b)) || (arXiv 2405.13763,
    theorem 2). That is exact for coefficients that are not negative and do not grow; others are replaced by the largest
    absolute value from there on, which is an upper bound.
    """
    if participations < 1 or min_separation < 1:
        raise PrivacyError(
            f"a client takes part {participations!r} times, {min_separation!r} rounds apart; both must be 1 or more"
        )
    falling = np.maximum.accumulate(np.abs(c)[::-1])[::-1]
    rounds, moved = len(c), np.zeros(len(c))
    for start in range(0, rounds, min_separation)[:participations]:
        moved[start:] += falling[: rounds - start]
    return float(np.linalg.norm(moved))


def prefix_errors(c: Floats) -> Floats:
    """The norm of each row of B = A C^-1: the standard deviation of a value of each prefix sum, for sigma = 1.

    Noise that costs the same has sigma proportional to the sensitivity, so matrices are compared by the product.
    """
    return np.sqrt(np.cumsum(np.cumsum(inverse(c)) ** 2))
