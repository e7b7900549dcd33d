"""Shamir's secret sharing over the integers modulo p = 2^256 + 297, which is prime.

    f(x) = secret + a_1 x + ... + a_(t-1) x^(t-1) mod p        share of holder i: f(i), i = 1, 2, ...
    secret = sum_i f(i) prod_(j != i) j / (j - i) mod p        from any t shares

Shamir 1979, "How to Share a Secret". A secret is any 32 bytes: 2^256 < p.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297
SHARE = 33  # bytes


def split(secret: bytes, holders: Sequence[int], threshold: int) -> list[bytes]:
    """One share for each holder, in their order; any `threshold` of them give the secret, fewer say nothing.

    holders: distinct numbers from 1 on.
    """
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    shares = []
    for x in holders:
        value = 0
        for coefficient in coefficients:
            value = (value + coefficient) * x % PRIME
        shares.append(((value + int.from_bytes(secret, "big")) % PRIME).to_bytes(SHARE, "big"))
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of holder -> share: exactly as many as the threshold. None where no 32 bytes have such shares."""
    total = 0
    for i, share in shares.items():
        above = below = 1
        for j in shares:
            if j != i:
                above = above * j % PRIME
                below = below * (j - i) % PRIME
        total += int.from_bytes(share, "big") * above * pow(below, -1, PRIME)
    total %= PRIME
    return total.to_bytes(32, "big") if total < 2**256 else None
