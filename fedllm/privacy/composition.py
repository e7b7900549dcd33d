"""A ledger as the independent Gaussian steps that one client, or one example, has to fear: arithmetic, no library.

Gaussian steps without chance add up in 1 / noise^2, in any order and however they depend on each other (Dong, Roth and
Su 2022, arXiv 1905.02383, corollary 3.3): they are one Gaussian.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from fedllm.errors import PrivacyError
from fedllm.privacy.releases import Relation, Release
from fedllm.privacy.schemes import FixedSizeScheme, PoissonScheme, RotationScheme

Ledger = Mapping[Release, int]


@dataclass(frozen=True)
class Steps:
    """Independent steps; noise is std / C throughout.

    Args:
        relation: of all of them.
        precision: the sum of 1 / noise^2 over the steps without chance.
        poisson: how many steps by (noise, rate).
        fixed_size: how many steps by (noise, population, cohort).
        rho, xi: a Renyi divergence of at most xi + rho alpha for integer orders alpha, of the Skellam steps together.
    """

    relation: Relation
    precision: float = 0.0
    poisson: Mapping[tuple[float, float], int] = field(default_factory=dict)
    fixed_size: Mapping[tuple[float, int, int], int] = field(default_factory=dict)
    rho: float = 0.0
    xi: float = 0.0

    @property
    def noiseless(self) -> bool:
        """Some step has no noise at all."""
        noises = [*(noise for noise, _ in self.poisson), *(noise for noise, _, _ in self.fixed_size)]
        return math.inf in (self.precision, self.rho) or 0 in noises


def steps_of(releases: Ledger) -> Steps:
    """The steps of a ledger.

    Raises:
        PrivacyError: a count below 0, or releases that differ in their units or neighbours.
    """
    made = {release: count for release, count in releases.items() if count}
    for release, count in made.items():
        if count < 0:
            raise PrivacyError(f"a release of kind '{release.kind}' was made {count} times; a count must be 0 or more")
    _check_alike("units", (release.unit for release in made))
    _check_alike("neighbours", (release.relation for release in made))
    rho = xi = 0.0
    precision, poisson, fixed_size = 0.0, Counter[tuple[float, float]](), Counter[tuple[float, int, int]]()
    for release, count in _of_one_client(made):
        noise, scheme, steps = release.noise_multiplier, release.scheme, count * release.steps
        if not steps:
            continue
        if release.kind == "skellam":
            one = skellam_divergence(noise, release.levels)
            rho, xi = rho + steps * one[0], xi + steps * one[1]
        elif isinstance(scheme, FixedSizeScheme):
            fixed_size[noise, scheme.population, scheme.cohort] += steps
        elif isinstance(scheme, PoissonScheme) and scheme.rate < 1:
            poisson[noise, scheme.rate] += steps
        else:
            precision += steps * noise**-2 if noise else math.inf
    relation: Relation = next((release.relation for release in made), "add-remove")
    return Steps(relation, precision, poisson, fixed_size, rho, xi)


def skellam_divergence(noise: float, levels: int) -> tuple[float, float]:
    """rho and xi of one Skellam step on a grid of so many levels: a Renyi divergence of at most xi + rho alpha.

        mu = (z L)^2        rho = (1 + 1 / mu) / (2 z^2)        xi = 11 L^2 / (4 mu^2)

    L: the 2-norm of the integers, at least `levels`. Their 1-norm D1 is at most 2 L^2, because sqrt(d) is at most 2 L
    where rounding leaves room for anything. Agarwal, Kairouz and Liu 2021, arXiv 2110.04995, theorem 3.5, first term of
    the minimum: alpha L^2 / (2 mu) + ((2 alpha - 1) L^2 + 6 D1) / (4 mu^2).
    """
    if not noise:
        return math.inf, 0.0
    mu = (noise * levels) ** 2
    return (1 + 1 / mu) / (2 * noise**2), 11 * levels**2 / (4 * mu**2)


def _check_alike(what: str, found: Iterable[str]) -> None:
    values = set(found)
    if len(values) > 1:
        names = ", ".join(sorted(values))
        raise PrivacyError(f"one ledger has releases of different {what} ({names}); account for each by itself")


def _of_one_client(releases: Ledger) -> Iterator[tuple[Release, int]]:
    """Each release with how many of them one client is in. Of sums under rotation it is in as many as the shortest
    separation allows, and they are taken to be the least noisy ones."""
    rotated = [release for release in releases if release.kind == "gaussian" and separation(release)]
    yield from ((release, count) for release, count in releases.items() if release not in rotated)
    shortest = min((separation(release) for release in rotated), default=1)
    left = RotationScheme(shortest).participations(sum(releases[release] for release in rotated)) if rotated else 0
    for release in sorted(rotated, key=lambda release: release.noise_multiplier):
        taken = min(left, releases[release])
        left -= taken
        yield release, taken


def separation(release: Release) -> int:
    """The least number of rounds between two of one client; 0 where no rotation keeps one."""
    return release.scheme.min_separation if isinstance(release.scheme, RotationScheme) else 0


def loss_span(steps: Steps) -> float:
    """About how far the privacy loss of all steps reaches, for one unit more or less: its mean plus 8 standard
    deviations, or 8 times as far as one step's loss does, which is composed in bins as well.

    A step of rate q and noise z has a mean loss of at most q / (2 z^2) and at most q^2 (exp(1 / z^2) - 1), its
    chi-squared divergence; a sum of losses of mean m has a variance of about 2 m.
    """
    mean, reach = steps.precision / 2, 0.0
    for (noise, rate), count in steps.poisson.items():
        inverse = noise**-2
        mean += count * rate * min(rate * math.expm1(min(inverse, 50.0)), inverse / 2)
        unsampled = inverse / 2 + 8 * math.sqrt(inverse)
        reach = max(reach, math.log1p(rate * math.expm1(unsampled)) if unsampled < 500 else unsampled)
    return max(mean + 8 * math.sqrt(2 * mean), 8 * reach)


def smallest_deviation(steps: Steps) -> float:
    """About the smallest standard deviation of one sampled step's loss: rate / noise; infinite where there is none."""
    return min((rate / noise for noise, rate in steps.poisson), default=math.inf)


def undominated(clients: Mapping[str, Steps]) -> list[str]:
    """Clients among whom is one of the largest epsilon, at any delta; of equal ones the first.

    Raises:
        PrivacyError: clients with different neighbours, whose epsilons cannot be compared.
    """
    _check_alike("neighbours", (steps.relation for steps in clients.values()))
    kept: list[str] = []
    for name, steps in clients.items():
        if not any(covers(clients[other], steps) for other in kept):
            kept = [*(other for other in kept if not covers(steps, clients[other])), name]
    return kept


def covers(large: Steps, small: Steps) -> bool:
    """True if each step of `small` can be paired with a step of `large` of its own, of no more noise and no smaller
    rate, and so costs no more. False may also mean that no such pairs were found."""
    if any(small.fixed_size.get(key, 0) > large.fixed_size.get(key, 0) for key in small.fixed_size):
        return False
    free = Counter(large.poisson)
    for (noise, rate), count in sorted(small.poisson.items(), key=lambda step: (step[0][0], -step[0][1])):
        for other in [other for other in free if other[0] <= noise and other[1] >= rate]:
            taken = min(count, free[other])
            free[other] -= taken
            count -= taken
        if count:
            return False
    return small.precision <= large.precision and small.rho <= large.rho and small.xi <= large.xi
