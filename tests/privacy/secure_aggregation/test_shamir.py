"""Shamir's sharing against its definition."""

from __future__ import annotations

from itertools import combinations

import pytest

from fedllm.privacy.secure_aggregation import shamir
from fedllm.privacy.secure_aggregation.primitives import random_bytes
from fedllm.privacy.secure_aggregation.shamir import PRIME, combine, split


def test_the_modulus_is_prime() -> None:
    """Miller and Rabin with forty bases: a composite passes with chance 4^-40."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        value = pow(base, odd, PRIME)
        squares = [pow(value, 2**i, PRIME) for i in range(twos)]
        assert value == 1 or PRIME - 1 in squares


def test_shares_are_values_of_the_polynomial(monkeypatch: pytest.MonkeyPatch) -> None:
    """f(x) = 5 + 7 x + 11 x^2 by hand: 23, 63, 443 at 1, 2, 6."""
    drawn = iter([11, 7])
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda below: next(drawn))
    shares = split((5).to_bytes(32, "big"), [1, 2, 6], 3)
    assert [int.from_bytes(share, "big") for share in shares] == [23, 63, 443]


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(31) + b"\x01"])
def test_every_subset_of_the_threshold_gives_the_secret(secret: bytes) -> None:
    holders = [1, 2, 5, 9, 65_536]
    shares = dict(zip(holders, split(secret, holders, 3), strict=True))
    for subset in combinations(holders, 3):
        assert combine({holder: shares[holder] for holder in subset}) == secret
    for subset in combinations(holders, 2):
        assert combine({holder: shares[holder] for holder in subset}) != secret


def test_fewer_than_the_threshold_fit_every_secret() -> None:
    """Two shares of three: for any other secret there is a third share that makes it."""
    shares = dict(zip([1, 2, 3], split(random_bytes(), [1, 2, 3], 3), strict=True))
    wanted = random_bytes()
    # f(0) = 3 f(1) - 3 f(2) + f(3), so the third share is wanted - 3 f(1) + 3 f(2)
    first, second = (int.from_bytes(shares[holder], "big") for holder in (1, 2))
    third = (int.from_bytes(wanted, "big") - 3 * first + 3 * second) % PRIME
    assert combine({**shares, 3: third.to_bytes(33, "big")}) == wanted


def test_no_secret_is_above_32_bytes() -> None:
    above = (2**256 + 1).to_bytes(33, "big")
    assert combine({1: above}) is None
