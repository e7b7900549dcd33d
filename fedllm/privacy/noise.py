"""Secret noise: keys of the operating system, and integer noise with a discrete Gaussian law.

Noise hides an update only while nobody can draw it again. So nothing here is seeded by the run: a key has 32 bytes of
the operating system, and a stream is SHAKE-256 over the key and a counter (FIPS 202), from which nobody learns the
next bytes, or the key, by the bytes that he knows. The generators of numpy and torch are not made for that.

Noise is integers, because the low-order bits of a sum of floating-point numbers tell what was added (Mironov 2012,
10.1145/2382196.2382264). The discrete Gaussian has P(x) proportional to exp(-x^2 / (2 sigma^2)) for integers x; for
releases on a grid its Renyi divergences are at most those of the continuous one (Canonne, Kamath and Steinke,
arXiv 2004.00010, theorem 4). Their algorithms 2 and 3 draw it, with comparisons in float64 in place of exact fractions:
each draw's probability is off by at most some 2^-52.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import PrivacyError
from fedllm.privacy.rounded_normal import NARROWEST, rounded_normals

KEY_BYTES = 32
BLOCK = 1 << 16  # bytes of one call of SHAKE-256
LARGEST_SIGMA = 2.0**45  # a draw's square stays far from 2^127, and a draw from 2^53
PIECE = 1 << 16  # candidates at once: some arrays of this size stay in the cache

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def new_key() -> bytes:
    """32 bytes of the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def derive(key: bytes, *names: str | int | bytes) -> bytes:
    """The key of a named purpose: HMAC-SHA256 of the names under `key`, 32 bytes.

    Each name is written as its type (one letter), the length of its bytes (8 bytes, big-endian) and its bytes, so that
    different names are never the same text. Integers are written in decimal digits, strings in UTF-8.
    """
    return hmac.digest(key, b"".join(_encoded(name) for name in names), "sha256")


def _encoded(name: str | int | bytes) -> bytes:
    kind = b"b" if isinstance(name, bytes) else b"s" if isinstance(name, str) else b"i"
    data = name if isinstance(name, bytes) else str(name).encode()
    return kind + len(data).to_bytes(8, "big") + data


class NoiseStream:
    """The random numbers of one key, in one order; equal keys give equal bytes on every machine, equal noise on one.

    Block i of the bytes is SHAKE-256(key, i in 8 bytes, big-endian), `BLOCK` bytes long. A stream is for one release:
    two releases with the same numbers differ by what they should hide.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise PrivacyError(f"a noise key has {len(key)} bytes; it must have {KEY_BYTES}")
        self._key = key
        self._block = 0
        self._rest = b""

    def __repr__(self) -> str:
        return "NoiseStream(...)"  # never the key

    def bytes(self, size: int) -> bytes:
        """The next `size` bytes."""
        parts, have = [self._rest], len(self._rest)
        while have < size:
            parts.append(hashlib.shake_256(self._key + self._block.to_bytes(8, "big")).digest(BLOCK))
            self._block += 1
            have += BLOCK
        joined = b"".join(parts)
        self._rest = joined[size:]
        return joined[:size]

    def words(self, size: int) -> NDArray[np.uint64]:
        """The next `size` numbers of 64 bits, little-endian."""
        return np.frombuffer(self.bytes(8 * size), "<u8").astype(np.uint64)

    def uniform(self, size: int) -> Floats:
        """Uniform numbers in (0, 1): (k + 1/2) 2^-52 for k of 52 bits, so that neither 0 nor 1 is among them."""
        return ((self.words(size) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def discrete_gaussian(self, sigma: float, size: int) -> Ints:
        """Integers with P(x) proportional to exp(-x^2 / (2 sigma^2)), shape [size].

        A discrete Laplace of scale t = floor(sigma) + 1 is kept with chance exp(-(|x| - sigma^2 / t)^2 / (2 sigma^2))
        (arXiv 2004.00010, algorithm 3); above 2^14 a normal number is rounded, which is faster (`rounded_normal`).

        Raises:
            PrivacyError: `sigma` is not above 0, or is above 2^45.
        """
        if not 0 < sigma <= LARGEST_SIGMA:
            raise PrivacyError(f"the noise has sigma {sigma!r} grid steps; it must be above 0 and at most 2^45")
        if sigma >= NARROWEST:
            return rounded_normals(self, sigma, size)
        scale, found, have = math.floor(sigma) + 1, [np.empty(0, np.int64)], 0
        while have < size:
            drawn = self._discrete_laplace(scale, min(PIECE, 2 * (size - have) + 64))
            off = np.abs(drawn).astype(np.float64) - sigma * sigma / scale
            kept = drawn[self.uniform(drawn.size) < np.exp(-(off * off) / (2 * sigma * sigma))]
            found.append(kept)
            have += kept.size
        return np.concatenate(found)[:size]

    def _discrete_laplace(self, scale: int, candidates: int) -> Ints:
        """Integers with P(x) proportional to exp(-|x| / scale), at most `candidates` of them (algorithm 2).

        |x| = u + scale v with u below `scale`, kept with chance exp(-u / scale), and v geometric of ratio 1 / e. An
        inverse of the distribution function in float64 would leave out integers where `scale` is large.
        """
        mask = np.uint64((1 << (scale - 1).bit_length()) - 1)
        u = self.words(candidates) & mask
        u = u[u < np.uint64(scale)].astype(np.int64)
        u = u[self.uniform(u.size) < np.exp(-u / scale)]
        v = np.floor(-np.log(self.uniform(u.size))).astype(np.int64)
        sign = 1 - 2 * (self.words(u.size) & np.uint64(1)).astype(np.int64)
        size = u + scale * v
        return (sign * size)[(size > 0) | (sign > 0)]  # else 0 would come twice as often
