"""Epsilon and delta of a ledger, by Google's dp-accounting: the one file that imports it.

Privacy loss distributions (PLD; Koskela et al. 2020, arXiv 1906.03049; Doroshenko et al. 2022, arXiv 2207.04380)
wherever they know the release; they are rounded upwards, so that epsilon is an upper bound. Renyi divergences (RDP;
Mironov 2017, arXiv 1702.07476) for a cohort of fixed size and for Skellam noise, for which dp-accounting has no PLD.

Noise is std / C in every ledger. Where neighbours replace one unit they are 2 C apart, and that is said once: the
closed form is given the distance, RDP half of the noise, because its Gaussian knows nothing of neighbours.
(dp-accounting's PLD would double the distance by itself.) The factor left out or taken twice is a factor of about 2
in epsilon.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from math import inf, sqrt
from typing import Any, Literal, Protocol

from fedllm.errors import MissingExtra, PrivacyError
from fedllm.privacy.composition import Ledger, Steps, loss_span, smallest_deviation, steps_of, undominated
from fedllm.privacy.releases import Relation, Release

INTERVAL = 1e-4  # width of a bin of the privacy loss: dp-accounting's own default
FINEST = 5e-6  # below it the library's differences of probabilities are rounding errors
PER_DEVIATION = 5  # bins for the standard deviation of one step's loss
MOST_BINS = 2**18  # for the loss of a whole ledger, about
ORDERS = (*range(2, 257), 384, 512, 1024, 2048, 4096)  # whole ones


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta) for neighbours of `relation`; `version`: of dp-accounting."""

    epsilon: float
    delta: float
    relation: Relation
    accountant: Literal["pld", "rdp"]
    version: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def epsilon(releases: Ledger, delta: float) -> Guarantee:
    """The smallest epsilon of all releases together, at `delta`. It is infinite where a release has no noise.

    Args:
        releases: how often each release was made. Of sums under a `RotationScheme` it is the number of rounds, of which
            one client is in some; of all others, each counts.
        delta: above 0 and below 1.

    Raises:
        PrivacyError: releases of different units or neighbours, a count below 0, a delta that is none.
        MissingExtra: dp-accounting is not installed.
    """
    check_delta(delta)
    steps = steps_of(releases)
    return _guarantee(steps, _loss(steps, _interval(steps)).epsilon(delta), delta)


def delta_of(releases: Ledger, epsilon: float) -> Guarantee:
    """The smallest delta of all releases together, at `epsilon` of 0 or more.

    Raises:
        PrivacyError, MissingExtra: as `epsilon`.
    """
    if not 0 <= epsilon < inf:
        raise PrivacyError(f"epsilon is {epsilon!r}; it must be a number of 0 or more")
    steps = steps_of(releases)
    return _guarantee(steps, epsilon, _loss(steps, _interval(steps)).delta(epsilon))


def epsilons(by_round: Sequence[Ledger], delta: float, rounds: Sequence[int]) -> list[float]:
    """Epsilon after each of `rounds`: after 0 it is that of nothing, after n that of `by_round[:n]` together.

    The loss of one step is computed once for all of them, so that some 20 rounds take seconds.

    Raises:
        PrivacyError, MissingExtra: as `epsilon`.
    """
    check_delta(delta)
    widest = _interval(steps_of(_together(by_round, max(rounds, default=0))))
    return [_loss(steps_of(_together(by_round, number)), widest).epsilon(delta) for number in rounds]


def worst(ledgers: Mapping[str, Ledger], delta: float) -> tuple[str, Guarantee]:
    """The client whose ledger has the largest epsilon, and that; of equal ones the first by name.

    Epsilon is computed only of clients whose steps are not plainly covered by another one's.

    Raises:
        PrivacyError, MissingExtra: as `epsilon`; no client at all, or clients of different units or neighbours.
    """
    check_delta(delta)
    if not ledgers:
        raise PrivacyError("there is no client whose epsilon could be the largest; account for one at least")
    steps = {client: steps_of(ledger) for client, ledger in sorted(ledgers.items())}
    found = {client: epsilon(ledgers[client], delta) for client in undominated(steps)}
    client = max(found, key=lambda name: found[name].epsilon)
    return client, found[client]


def check_delta(delta: float) -> None:
    """Raises PrivacyError: `delta` is not above 0 and below 1."""
    if not 0 < delta < 1:
        raise PrivacyError(f"delta is {delta!r}; it must be above 0 and below 1, and well below 1 / clients")


def _together(by_round: Sequence[Ledger], rounds: int) -> Ledger:
    total = Counter[Release]()
    for ledger in by_round[:rounds]:
        total.update(ledger)
    return total


def _guarantee(steps: Steps, epsilon: float, delta: float) -> Guarantee:
    _library()  # also where epsilon is infinite, and nothing was computed
    accountant: Literal["pld", "rdp"] = "rdp" if steps.fixed_size or steps.rho else "pld"
    return Guarantee(epsilon, delta, steps.relation, accountant, f"dp-accounting {version('dp-accounting')}")


def _interval(steps: Steps) -> float:
    """The width of a bin: small against one step's loss, so that rounding upwards costs little, and large enough for
    the loss of all steps to fit into `MOST_BINS`."""
    if steps.noiseless:
        return INTERVAL
    fine = max(smallest_deviation(steps) / PER_DEVIATION, FINEST)
    return max(min(INTERVAL, fine), loss_span(steps) / MOST_BINS)


class _Loss(Protocol):
    """What epsilon and delta are read from."""

    def epsilon(self, delta: float) -> float: ...
    def delta(self, epsilon: float) -> float: ...


@dataclass(frozen=True)
class _Noiseless:
    def epsilon(self, delta: float) -> float:
        return inf

    def delta(self, epsilon: float) -> float:
        return 1.0


@dataclass(frozen=True)
class _Gaussian:
    """The distribution of a Gaussian alone has a closed form (Balle and Wang 2018, arXiv 1805.06530, theorem 8);
    `distance`: of neighbours, in standard deviations."""

    distance: float

    def epsilon(self, delta: float) -> float:
        return float(_library().get_epsilon_gaussian(1 / self.distance, delta))

    def delta(self, epsilon: float) -> float:
        loss = _library().pld.privacy_loss_mechanism.GaussianPrivacyLoss(1 / self.distance)
        return float(loss.get_delta_for_epsilon(epsilon))


@dataclass(frozen=True)
class _Distribution:
    pld: Any  # dp_accounting's PrivacyLossDistribution

    def epsilon(self, delta: float) -> float:
        return float(self.pld.get_epsilon_for_delta(delta))

    def delta(self, epsilon: float) -> float:
        return float(self.pld.get_delta_for_epsilon(epsilon))


@dataclass(frozen=True)
class _Renyi:
    accountant: Any  # dp_accounting's RdpAccountant

    def epsilon(self, delta: float) -> float:
        return float(self.accountant.get_epsilon(delta))

    def delta(self, epsilon: float) -> float:
        return float(self.accountant.get_delta(epsilon))


def _loss(steps: Steps, interval: float) -> _Loss:
    if steps.noiseless:
        return _Noiseless()
    if steps.rho:
        return _Renyi(_skellam(steps))
    if steps.fixed_size:
        return _Renyi(_renyi(steps))
    if steps.precision and not steps.poisson:
        return _Gaussian(sqrt(steps.precision) * (2 if steps.relation == "replace-one" else 1))
    try:
        return _Distribution(_distribution(steps, interval))
    except OverflowError:  # a loss that float64 does not hold: no bound is known
        return _Noiseless()


def _library() -> Any:
    try:
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise MissingExtra("dp-accounting", "privacy") from error
    return dp_accounting


@lru_cache(maxsize=16)  # some megabytes each
def _step(noise: float, rate: float, interval: float) -> Any:
    """The privacy loss distribution of one Gaussian step, for one unit more or less."""
    return _library().pld.privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise,
        value_discretization_interval=interval,
        sampling_prob=rate,
        neighboring_relation=_library().NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _distribution(steps: Steps, interval: float) -> Any:
    """The privacy loss distribution of all steps."""
    assert steps.relation == "add-remove" or not steps.poisson, steps  # coins hide whether a unit is there
    total = _library().pld.privacy_loss_distribution.identity(interval)
    if steps.precision:
        total = total.compose(_step(steps.precision**-0.5, 1.0, interval))
    for (noise, rate), count in steps.poisson.items():
        total = total.compose(_step(noise, rate, interval).self_compose(count))
    return total


def _renyi(steps: Steps) -> Any:
    """An RDP accountant of all steps. All neighbours are 2 C apart, so it is handed half of each noise."""
    library = _library()
    accountant = library.rdp.RdpAccountant(neighboring_relation=library.NeighboringRelation.REPLACE_ONE)
    for (noise, population, cohort), count in steps.fixed_size.items():
        event = library.SampledWithoutReplacementDpEvent(population, cohort, library.GaussianDpEvent(noise / 2))
        accountant.compose(event, count)
    if steps.precision:
        accountant.compose(library.GaussianDpEvent(steps.precision**-0.5 / 2))
    return accountant


def _skellam(steps: Steps) -> Any:
    """An RDP accountant of Skellam steps, whose divergences are known for integer orders alone; and of Gaussian ones
    beside them.

    Raises:
        PrivacyError: steps by chance beside them.
    """
    if steps.poisson or steps.fixed_size:
        raise PrivacyError("one ledger has Skellam releases and sampled ones; account for each by itself")
    library = _library()
    accountant = library.rdp.RdpAccountant(orders=ORDERS)
    accountant.compose(library.ZCDpEvent(steps.rho, steps.xi))
    if steps.precision:
        accountant.compose(library.GaussianDpEvent(steps.precision**-0.5))
    return accountant
