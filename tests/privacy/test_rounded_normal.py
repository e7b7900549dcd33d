"""Rounded normal numbers have the law of the discrete Gaussian: what is refused, by numerical integration; moments."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from fedllm.privacy.noise import NoiseStream
from fedllm.privacy.rounded_normal import NARROWEST, PIECE, _refusal, rounded_normals


def kept(x: float, sigma: float) -> float:
    """a(x) = exp(-1 / (8 sigma^2)) / I(x), by Simpson's rule in steps of 1/2000; 1 - a(x), without cancelling."""
    t = np.linspace(-0.5, 0.5, 2001)
    weights = np.ones(2001)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    less = np.expm1(-(t**2) / (2 * sigma**2))
    more = 2 * np.sinh(x * t / (2 * sigma**2)) ** 2  # cosh - 1
    integral = float((weights * (less + more + less * more)).sum() / 3 / 2000)  # I(x) - 1
    return (integral - math.expm1(-1 / (8 * sigma**2))) / (1 + integral)


@pytest.mark.parametrize("sigma", [NARROWEST, 2.0**20])
@pytest.mark.parametrize("times", [0.0, 0.5, 1.0, 3.0, 8.6])
def test_what_is_refused_is_what_rounding_gives_too_much(sigma: float, times: float) -> None:
    x = float(round(times * sigma))
    found = float(_refusal(np.array([x]), sigma)[0])
    assert found == pytest.approx(kept(x, sigma), rel=1e-6)
    assert 0 < found < 2.0**-24


class Scripted:
    """The first three coins are zero; the uniform number that decides about the first of these candidates is given."""

    def __init__(self, decides: float) -> None:
        self.decides, self.coins = decides, [bytes(6)]

    def bytes(self, size: int) -> bytes:
        first = self.coins.pop() if self.coins else b""
        return first + b"\xff" * (size - len(first))

    def uniform(self, size: int) -> NDArray[np.float64]:
        return np.array([self.decides, 0.5, 0.999]) if size == 3 else np.linspace(0.1, 0.9, size)


def test_a_rare_candidate_is_refused_with_its_chance() -> None:
    sigma = NARROWEST
    chance = 65536 * float(_refusal(np.zeros(1), sigma)[0])
    assert chance < 2.0**-10
    refused, kept_all = (rounded_normals(Scripted(decides), sigma, 20) for decides in (chance / 2, 0.01))
    assert len(refused) == len(kept_all) == 20 and refused.dtype == np.int64
    assert list(refused[:19]) == list(kept_all[1:])  # without the first of 20, and one more behind them


def test_moments_and_tails() -> None:
    """Of 1e6 draws: the variance to 4 sqrt(2 / n), the fourth moment to 4 sqrt(96 / n), tails by their chance."""
    sigma, n = 3.0 * 2**19, 10**6
    x = NoiseStream(bytes(32)).discrete_gaussian(sigma, n) / sigma
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert (x**2).mean() == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    assert (x**4).mean() == pytest.approx(3, abs=4 * math.sqrt(96 / n))
    for bound in (1.0, 2.0, 3.0, 4.0):
        chance = math.erfc(bound / math.sqrt(2))
        assert (np.abs(x) > bound).mean() == pytest.approx(chance, abs=4 * math.sqrt(chance / n))
    edges = np.array([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    cut = np.diff([0.0, *(0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges), 1.0]) * n
    counts = np.bincount(np.searchsorted(edges, x), minlength=8)
    assert float(((counts - cut) ** 2 / cut).sum()) < 18.5  # chi-square of 7 degrees of freedom: p = 0.01


def test_neighbours_are_alone_and_last_bits_even() -> None:
    """Pairs come from one radius; their squares do not hang together, and all last bits occur alike."""
    x = NoiseStream(bytes([1]) * 32).discrete_gaussian(2.0**22, 4 * PIECE)
    first, second = x[: 2 * PIECE].reshape(2, PIECE).astype(float)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(PIECE)
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < 4 / math.sqrt(PIECE)
    assert abs((x & 1).mean() - 0.5) < 2 / math.sqrt(len(x))
    assert len(x) == 4 * PIECE and abs(int(x.max())) < 9 * 2**22


def test_a_stream_repeats_itself_and_goes_on() -> None:
    one, other = NoiseStream(bytes(32)), NoiseStream(bytes(32))
    assert np.array_equal(one.discrete_gaussian(2.0**20, 1001), other.discrete_gaussian(2.0**20, 1001))
    assert not np.array_equal(
        one.discrete_gaussian(2.0**20, 1001), NoiseStream(bytes(32)).discrete_gaussian(2.0**20, 1001)
    )
