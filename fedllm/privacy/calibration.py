"""How much noise a promise needs."""

from __future__ import annotations

import math
from collections.abc import Callable

from fedllm.errors import PrivacyError
from fedllm.privacy.accountant import check_delta, epsilon
from fedllm.privacy.composition import Ledger

CLOSE = 0.995  # of the target; promised is 0.99
NARROW = 1.002  # two noises this near each other are one
LEAST, MOST = 2.0**-5, 2.0**20  # noise multipliers that are tried


def noise_multiplier(target_epsilon: float, delta: float, releases_of: Callable[[float], Ledger]) -> float:
    """The smallest noise multiplier whose epsilon is at most `target_epsilon`.

    Epsilon at the result is never above the target. It is at least 0.99 of it, or 1 % less noise misses it (where
    epsilon jumps, as it does near 0).

    Args:
        target_epsilon: above 0.
        delta: above 0 and below 1.
        releases_of: the ledger of the whole run at a noise multiplier; its epsilon must fall as noise grows.

    Raises:
        PrivacyError: a target that no noise reaches, or that every noise reaches.
        MissingExtra: dp-accounting is not installed.
    """
    if not 0 < target_epsilon < math.inf:
        raise PrivacyError(f"the target epsilon is {target_epsilon!r}; it must be a number above 0")
    check_delta(delta)

    def excess(noise: float) -> float:
        """log(epsilon / target): at most 0 where the noise is enough."""
        value = epsilon(releases_of(noise), delta).epsilon
        return math.log(value / target_epsilon) if 0 < value < math.inf else math.copysign(math.inf, value - 1)

    return _root(excess, *_bracket(excess, target_epsilon, delta))


def _bracket(
    excess: Callable[[float], float], target: float, delta: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """A noise that is too small and one, twice as large, that is enough, each with its excess."""
    noise, value = 1.0, excess(1.0)
    factor = 0.5 if value <= 0 else 2.0
    while True:
        other = noise * factor
        if other > MOST:
            raise PrivacyError(
                f"no noise reaches epsilon {target} at delta {delta}: even {MOST:.0f} is too little; "
                "take a larger epsilon, a larger delta or fewer rounds"
            )
        if other < LEAST:
            raise PrivacyError(
                f"every noise reaches epsilon {target} at delta {delta}, so that the guarantee would say nothing; "
                "take a smaller epsilon or a smaller delta"
            )
        there = excess(other)
        if factor < 1 and there > 0:
            return (other, there), (noise, value)
        if factor > 1 and there <= 0:
            return (noise, value), (other, there)
        noise, value = other, there


def _root(excess: Callable[[float], float], small: tuple[float, float], enough: tuple[float, float]) -> float:
    """The noise between the two that is just enough. epsilon is about a power of the noise, so that the chord between
    the logarithms meets `CLOSE` after two or three steps; every second step halves the bracket instead."""
    aim, halve = math.log((1 + CLOSE) / 2), False
    while enough[1] < math.log(CLOSE) and enough[0] / small[0] > NARROW:
        low, high = math.log(small[0]), math.log(enough[0])
        share = 0.5 if halve or not math.isfinite(small[1] - enough[1]) else (aim - small[1]) / (enough[1] - small[1])
        noise = math.exp(low + min(max(share, 0.02), 0.98) * (high - low))
        value = excess(noise)
        small, enough = (small, (noise, value)) if value <= 0 else ((noise, value), enough)
        halve = not halve
    return enough[0]


def update_noise(noise_multiplier: float, count_noise: float) -> float:
    """The multiplier of the updates' noise in a round that also releases a noised count for adaptive clipping, such
    that both together cost what one Gaussian of `noise_multiplier` does (Andrew et al. 2021, arXiv 1905.03871,
    theorem 1):

        z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)

    Args:
        noise_multiplier: z, of the whole round.
        count_noise: sigma_b, the standard deviation of the noise on the sum of the bits b - 1/2, of sensitivity 1/2.

    Raises:
        PrivacyError: 2 sigma_b is not above z: the count alone costs as much as the round may.
    """
    if not 2 * count_noise > noise_multiplier > 0:
        raise PrivacyError(
            f"the count's noise of {count_noise:g} is too small for a noise multiplier of {noise_multiplier:g}; "
            f"it must be above {noise_multiplier / 2:g}, and twice that is a good choice"
        )
    return 1 / math.sqrt(noise_multiplier**-2 - (2 * count_noise) ** -2)
