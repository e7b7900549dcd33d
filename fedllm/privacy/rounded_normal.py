"""Draws of a wide discrete Gaussian, several times faster than from a discrete Laplace: rounded normal numbers.

    x = round(sigma g)    g normal (Box and Muller 1958): sqrt(-2 ln u) cos(2 pi v), sqrt(-2 ln u) sin(2 pi v)
    keep x with chance a(x) = exp(-1 / (8 sigma^2)) / I(x)
    I(x) = integral of cosh(x t / sigma^2) exp(-t^2 / (2 sigma^2)) over t from -1/2 to 1/2

Rounding gives x the chance exp(-x^2 / (2 sigma^2)) I(x) / (sigma sqrt(2 pi)), so what is kept has the law of the
discrete Gaussian. The numerator is at most I(0), and so at most I(x): a(x) <= 1. With sigma >= 2^14 and |x| < 9 sigma
(no draw is larger) almost all are kept:

    1 - a(x) = 1 / (12 sigma^2) + x^2 / (24 sigma^4) + O(sigma^-4) < 2^-24

So a coin of 16 bits decides for all but one candidate in 65,536, and only those look at a(x).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

NARROWEST = 2.0**14  # sigma; the terms that are left out of 1 - a(x) are below 2^-54
PIECE = 1 << 14  # pairs at once, whose arrays stay in the cache


class Stream(Protocol):
    """Where the random numbers come from."""

    def bytes(self, size: int) -> bytes:
        """The next `size` bytes."""
        ...

    def uniform(self, size: int) -> NDArray[np.float64]:
        """Uniform numbers in (0, 1)."""
        ...


def rounded_normals(stream: Stream, sigma: float, size: int) -> NDArray[np.int64]:
    """Integers with P(x) proportional to exp(-x^2 / (2 sigma^2)), shape [size]; `sigma` is `NARROWEST` or more."""
    assert sigma >= NARROWEST, sigma
    out, have = np.empty(size, np.int64), 0
    while have < size:
        drawn = _kept(stream, sigma, min(PIECE, (size - have + 1) // 2))[: size - have]
        out[have : have + drawn.size] = drawn
        have += drawn.size
    return out


def _kept(stream: Stream, sigma: float, pairs: int) -> NDArray[np.float64]:
    """Candidates that are kept: whole numbers in float64, 2 * pairs of them, or rarely some fewer."""
    both = stream.uniform(2 * pairs)
    radius, angle = both[:pairs], both[pairs:]
    np.log(radius, out=radius)
    np.sqrt(np.multiply(radius, -2.0, out=radius), out=radius)
    radius *= sigma
    angle *= 2 * np.pi
    x = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    np.rint(x, out=x)
    rare = np.flatnonzero(np.frombuffer(stream.bytes(4 * pairs), "<u2") == 0)
    if not rare.size:
        return x
    refused = stream.uniform(rare.size) < 65536 * _refusal(x[rare], sigma)
    return np.delete(x, rare[refused])


def _refusal(x: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """1 - a(x)."""
    return 1 / (12 * sigma**2) + (x / sigma) ** 2 / (24 * sigma**2)
