"""Skellam noise has its law, and its sums too."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedllm.errors import PrivacyError
from fedllm.privacy.noise import NoiseStream
from fedllm.privacy.skellam import log_factorial, poisson, skellam


def test_the_logarithm_of_a_factorial() -> None:
    k = np.array([0, 1, 2, 5, 15, 16, 17, 100, 1e6, 2.0**40])
    assert log_factorial(k) == pytest.approx([math.lgamma(x + 1) for x in k], rel=1e-13, abs=1e-12)


@pytest.mark.parametrize("mean", [10.0, 37.5, 900.0])
def test_poisson_numbers_have_their_probabilities(mean: float) -> None:
    """Chi-squared over single values and two tails, 200,000 draws: at most its mean plus 5 standard deviations."""
    count, drawn = 200_000, poisson(NoiseStream(b"k" * 32), mean, 200_000)
    low, high = max(1, int(mean - 3 * math.sqrt(mean))), int(mean + 3 * math.sqrt(mean))
    chance = np.array([math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(high + 1)])
    expected = count * np.array([chance[:low].sum(), *chance[low:], 1 - chance.sum()])
    seen = np.array([(drawn < low).sum(), *((drawn == k).sum() for k in range(low, high + 1)), (drawn > high).sum()])
    chi, freedom = float(((seen - expected) ** 2 / expected).sum()), len(expected) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("variance", [20.0, 1e4, 2.0**40])
def test_skellam_numbers_have_mean_0_their_variance_and_no_skew(variance: float) -> None:
    """Moments of 200,000 draws within 5 standard errors: sqrt(v / n), v sqrt((2 + 1 / v) / n), sqrt(15 / n)."""
    count = 200_000
    drawn = skellam(NoiseStream(b"s" * 32), variance, count).astype(float)
    assert abs(drawn.mean()) < 5 * math.sqrt(variance / count)
    assert drawn.var() == pytest.approx(variance, rel=5 * math.sqrt((2 + 1 / variance) / count))
    assert abs((drawn**3).mean()) < 5 * variance**1.5 * math.sqrt(20 / count)


def test_the_same_key_draws_the_same_and_another_one_something_else() -> None:
    first = skellam(NoiseStream(b"a" * 32), 100.0, 1000)
    assert (first == skellam(NoiseStream(b"a" * 32), 100.0, 1000)).all()
    assert (first != skellam(NoiseStream(b"b" * 32), 100.0, 1000)).any()
    assert (poisson(NoiseStream(b"a" * 32), 50.0, 10) == poisson(NoiseStream(b"a" * 32), 50.0, 10)).all()


@pytest.mark.parametrize("variance", [0.0, 19.9, 2.0**46, math.nan])
def test_a_variance_out_of_range_is_refused(variance: float) -> None:
    with pytest.raises(PrivacyError, match="it must be 20 to"):
        skellam(NoiseStream(b"a" * 32), variance, 10)
