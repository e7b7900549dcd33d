"""Epsilon and delta of a ledger: against tables, closed forms, integrals and another library."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedllm.errors import MissingExtra, PrivacyError
from fedllm.privacy import accountant
from fedllm.privacy.accountant import delta_of, epsilon, epsilons, worst
from fedllm.privacy.releases import Kind, Release
from fedllm.privacy.schemes import EveryRound, FixedSizeScheme, PoissonScheme, RotationScheme, Scheme

ROUNDED = 6e-5  # figures of four digits, and the bins
# rate, noise, steps, delta, epsilon by Google's PLD, by Opacus's PRV (which adds its own error of 0.01)
TABLE = [
    (1, 4.530877117, 1, 1e-6, 0.9274, 0.9374),
    (0.01, 4, 10000, 1e-5, 0.9470, 0.9569),
    (0.04, 1.5, 2250, 1e-5, 6.7688, 6.7791),
    (256 / 60000, 1.1, 14062, 1e-5, 2.3817, 2.3917),
    (0.01, 1, 1000, 1e-5, 1.8282, 1.8384),
    (0.1, 1, 100, 1e-5, 7.0466, 7.0571),
    (0.1, 0.8, 200, 1e-4, 13.4552, 13.4661),
    (0.5, 2, 50, 1e-3, 6.9811, 6.9918),
    (0.001, 0.7, 5000, 1e-6, 1.3806, 1.3907),
]


def poisson(noise: float, rate: float, steps: int) -> dict[Release, int]:
    return {Release("gaussian", noise, PoissonScheme(rate)): steps}


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta of a Gaussian whose neighbours are mu deviations apart (Dong, Roth and Su 2022, corollary 2.13)."""
    return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    if gaussian_delta(mu, 0) <= delta:
        return 0.0
    return float(brentq(lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0, mu * mu / 2 + 40 * mu, xtol=1e-12))


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "google", "opacus"), TABLE)
def test_table(rate: float, noise: float, steps: int, delta: float, google: float, opacus: float) -> None:
    found = epsilon(poisson(noise, rate, steps), delta)
    assert google - ROUNDED <= found.epsilon <= google + 0.001
    assert found.epsilon == pytest.approx(opacus, abs=0.02)
    assert (found.relation, found.accountant) == ("add-remove", "pld")


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "noise", "steps", "delta"), [TABLE[4][:4], TABLE[7][:4]])
def test_opacus_agrees(rate: float, noise: float, steps: int, delta: float) -> None:
    from opacus.accountants import PRVAccountant

    other = PRVAccountant()
    other.history = [(noise, rate, steps)]
    assert epsilon(poisson(noise, rate, steps), delta).epsilon == pytest.approx(other.get_epsilon(delta), abs=0.02)


@given(st.floats(0.05, 50), st.integers(1, 300), st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_gaussians_have_the_closed_form(noise: float, count: int, delta: float) -> None:
    exact = gaussian_epsilon(math.sqrt(count) / noise, delta)
    kinds: tuple[Kind, ...] = ("gaussian", "correlated")
    for kind in kinds:
        found = epsilon({Release(kind, noise, EveryRound()): count}, delta)
        assert found.epsilon == pytest.approx(exact, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("noise", [0.5, 2.0, 20.0])
def test_a_clients_own_update_is_two_clips_from_another_one(noise: float) -> None:
    """Halving the noise for the PLD as well would double the distance once more."""
    found = epsilon({Release("local", noise, EveryRound()): 3}, 1e-5)
    assert found.epsilon == pytest.approx(gaussian_epsilon(2 * math.sqrt(3) / noise, 1e-5), rel=1e-4)
    assert (found.relation, found.accountant) == ("replace-one", "pld")
    assert found.epsilon > 1.9 * epsilon({Release("gaussian", noise, EveryRound()): 3}, 1e-5).epsilon


def test_gaussian_epsilons_beyond_the_range_of_exp() -> None:
    """e^epsilon is above the largest float64 from 709.8 on."""
    exact = gaussian_epsilon(math.sqrt(67) / 0.25, 1e-8)
    ledger = {Release("gaussian", 0.25, EveryRound()): 67}
    assert epsilon(ledger, 1e-8).epsilon == pytest.approx(exact) and exact > 710
    assert delta_of(ledger, exact).delta == pytest.approx(1e-8)


@pytest.mark.parametrize(("noise", "rate", "at"), [(1.0, 0.1, 0.5), (2.0, 0.5, 0.2), (0.7, 0.02, 1.0), (1.0, 1.0, 2.0)])
def test_one_sampled_step_is_its_integral(noise: float, rate: float, at: float) -> None:
    """delta = the larger integral of max(0, p - e^epsilon q), with p, q the densities with and without one client."""
    grid = np.linspace(-12 * noise, 1 + 12 * noise, 400_001)
    without = norm.pdf(grid, scale=noise)
    among = (1 - rate) * without + rate * norm.pdf(grid, loc=1, scale=noise)
    deltas = [np.trapezoid(np.maximum(p - math.exp(at) * q, 0), grid) for p, q in ((among, without), (without, among))]
    assert delta_of(poisson(noise, rate, 1), at).delta == pytest.approx(max(deltas), rel=1e-4, abs=1e-12)


def renyi_epsilon(distance: float, noise: float, delta: float, orders: np.ndarray) -> float:
    """Epsilon by the Renyi divergences a distance^2 / (2 noise^2) of a Gaussian (Mironov 2017, proposition 7; the
    conversion of Canonne, Kamath and Steinke 2020, proposition 12)."""
    divergence = orders * distance**2 / (2 * noise**2)
    values = divergence + np.log1p(-1 / orders) - (np.log(delta) + np.log(orders)) / (orders - 1)
    return float(values.min())


def test_rdp_is_handed_half_of_the_noise_once() -> None:
    """A cohort of all 20 clients hides nobody: what is left is a Gaussian with neighbours 2 clips apart."""
    found = epsilon({Release("gaussian", 2.0, FixedSizeScheme(20, 20)): 1}, 1e-5)
    assert (found.relation, found.accountant) == ("replace-one", "rdp")
    orders = np.arange(1.01, 64, 0.01)
    right, unhalved, halved_twice = (renyi_epsilon(distance, 2.0, 1e-5, orders) for distance in (2, 1, 4))
    assert found.epsilon == pytest.approx(right, rel=0.01)
    assert gaussian_epsilon(2 / 2.0, 1e-5) < found.epsilon  # exact
    assert unhalved < 0.6 * found.epsilon and halved_twice > 1.8 * found.epsilon


def test_local_releases_beside_a_fixed_size_are_halved_as_well() -> None:
    noise = 2.0
    both = {Release("local", noise, EveryRound()): 3, Release("gaussian", noise, FixedSizeScheme(20, 20)): 1}
    found, orders = epsilon(both, 1e-5), np.arange(1.01, 64, 0.01)
    assert found.epsilon == pytest.approx(renyi_epsilon(2 * math.sqrt(4), noise, 1e-5, orders), rel=0.01)


def test_three_schemes_of_one_cohort() -> None:
    """1000 clients, 100 a round, 100 rounds, noise 1; and 10 of 20, 50 rounds, noise 2. The figures for a fixed size
    are at noise 1 and 2 over the distance of two neighbours: 2 and 4 over the clip norm."""
    large, small = (1000, 100, 100, 1.0, 1e-5), (20, 10, 50, 2.0, 1e-3)
    expected = {large: (7.05, 14.05, 91.8), small: (6.98, 18.0, 16.5)}
    for (population, cohort, rounds, noise, delta), figures in expected.items():
        found = [
            epsilon({Release("gaussian", z, scheme): rounds}, delta).epsilon
            for z, scheme in (
                (noise, PoissonScheme(cohort / population)),
                (2 * noise, FixedSizeScheme(population, cohort)),
                (noise, EveryRound()),
            )
        ]
        assert found == pytest.approx(figures, abs=0.05)


def test_fixed_size_costs_what_the_library_says() -> None:
    assert epsilon({Release("gaussian", 2.0, FixedSizeScheme(200, 20)): 50}, 1e-5).epsilon == pytest.approx(
        9.43, abs=5e-3
    )


def test_rotation_costs_the_rounds_of_one_client() -> None:
    found = epsilon({Release("gaussian", 2.0, RotationScheme(8)): 50}, 1e-5)  # 7 rounds of 50
    assert found.epsilon == pytest.approx(gaussian_epsilon(math.sqrt(7) / 2, 1e-5), rel=1e-4)


def test_example_steps_are_those_of_the_client() -> None:
    ledger = {Release("example", 1.0, PoissonScheme(0.01), steps=10): 100}
    assert epsilon(ledger, 1e-5).epsilon == epsilon(poisson(1.0, 0.01, 1000), 1e-5).epsilon


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [(4.0, 1e-4, 10**6), (8.0, 1e-3, 10**5)],
)
def test_many_small_steps_are_not_lost_in_the_bins(noise: float, rate: float, steps: int) -> None:
    """Bins of 1e-4 say 0.142 and 0.131. The limit of many steps is a Gaussian with mu = q sqrt(T (e^(1/z^2) - 1))
    (Dong, Roth and Su 2022, corollary 5.4), which is at most a percent off here."""
    limit = gaussian_epsilon(rate * math.sqrt(steps * math.expm1(noise**-2)), 1e-5)
    assert epsilon(poisson(noise, rate, steps), 1e-5).epsilon == pytest.approx(limit, rel=0.01)


@pytest.mark.parametrize(
    "ledger",
    [
        poisson(1.0, 0.1, 20),
        {Release("local", 3.0, EveryRound()): 4},
        {Release("gaussian", 2.0, FixedSizeScheme(200, 20)): 50},
    ],
    ids=["poisson", "local", "fixed size"],
)
def test_delta_and_epsilon_are_inverse(ledger: dict[Release, int]) -> None:
    at = epsilon(ledger, 1e-5).epsilon
    assert delta_of(ledger, at).delta == pytest.approx(1e-5, rel=1e-3)
    assert delta_of(ledger, at * 1.1).delta < 1e-5 < delta_of(ledger, at * 0.9).delta


@pytest.mark.parametrize("scheme", [EveryRound(), PoissonScheme(0.1), FixedSizeScheme(20, 2)])
def test_no_noise_is_no_guarantee(scheme: EveryRound | PoissonScheme | FixedSizeScheme) -> None:
    ledger = {Release("gaussian", 0.0, scheme): 1}
    assert epsilon(ledger, 1e-5).epsilon == math.inf
    assert delta_of(ledger, 8.0).delta == 1.0


def test_nothing_released_costs_nothing() -> None:
    assert epsilon({}, 1e-5).epsilon == 0.0
    assert delta_of({}, 0.0).delta == 0.0
    assert epsilon({Release("example", 1.0, FixedSizeScheme(40, 4), steps=0): 3}, 1e-5).epsilon == 0.0


@pytest.mark.parametrize(
    "by_round",
    [
        [poisson(2.0, 0.1, 1)] * 30,
        [{Release("gaussian", 1.0 + place % 3, RotationScheme(4)): 1} for place in range(30)],
        [{Release("gaussian", 4.0, FixedSizeScheme(20, 2)): 1}] * 30,
    ],
    ids=["poisson", "rotation", "fixed size"],
)
def test_the_curve_is_epsilon_of_the_first_rounds(by_round: list[dict[Release, int]]) -> None:
    accountant._step.cache_clear()
    found = epsilons(by_round, 1e-5, [30, 0, 1, 9])
    assert accountant._step.cache_info().misses <= 4  # a curve of sampled steps computes one distribution
    for value, rounds in zip(found, [30, 0, 1, 9], strict=True):
        total: dict[Release, int] = {}
        for ledger in by_round[:rounds]:
            total = {key: total.get(key, 0) + ledger.get(key, 0) for key in {**total, **ledger}}
        assert value == pytest.approx(epsilon(total, 1e-5).epsilon, rel=1e-4, abs=1e-9)
    assert found[1] == 0.0 < found[2] < found[3] < found[0]


def test_the_worst_client_is_found_without_asking_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {f"client-{n:02}": 40 + 7 * n for n in range(3)}
    ledgers = {name: {Release("example", 1.0, PoissonScheme(4 / size), steps=5): 3} for name, size in sizes.items()}
    ledgers["often"] = {Release("example", 1.0, PoissonScheme(4 / 400), steps=5): 12}
    each = {name: epsilon(ledger, 1e-5) for name, ledger in ledgers.items()}
    asked = []
    monkeypatch.setattr(accountant, "epsilon", lambda ledger, delta: asked.append(1) or epsilon(ledger, delta))
    assert worst(ledgers, 1e-5) == ("client-00", each["client-00"])
    assert max(guarantee.epsilon for guarantee in each.values()) == each["client-00"].epsilon
    assert len(asked) == 2  # the one with the largest rate, and the one with the most steps


def test_a_guarantee_says_what_it_holds_for() -> None:
    found = epsilon(poisson(1.0, 0.1, 1), 1e-5).to_json()
    assert found.pop("epsilon") > 0
    assert found.pop("version").startswith("dp-accounting 0.")
    assert found == {"delta": 1e-5, "relation": "add-remove", "accountant": "pld"}


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_none_is_refused(delta: float) -> None:
    for ask in (
        lambda: epsilon({}, delta),
        lambda: epsilons([{}], delta, [1]),
        lambda: worst({"a": {}}, delta),
    ):
        with pytest.raises(PrivacyError, match="it must be above 0 and below 1"):
            ask()


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(PrivacyError, match="there is no client"):
        worst({}, 1e-5)
    with pytest.raises(PrivacyError, match="epsilon is -1; it must be a number of 0 or more"):
        delta_of({}, -1)


def test_without_the_library_there_is_a_line_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    accountant._step.cache_clear()
    for noise in (0.0, 1.0):
        with pytest.raises(MissingExtra, match=r"pip install 'fedllm\[privacy\]'"):
            epsilon(poisson(noise, 0.1, 1), 1e-5)


def test_the_library_computes_the_divergences_it_was_chosen_for() -> None:
    """Its own published test vector: rate 0.01, noise 2.5, 50 steps."""
    import dp_accounting
    from dp_accounting import rdp

    orders = [1.5, 2.5, 5, 50, 100]
    other = rdp.RdpAccountant(orders)
    other.compose(dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(2.5)), 50)
    assert list(other._rdp) == pytest.approx([6.7058e-4, 1.08549e-3, 2.18076e-3, 2.38460e-2, 1.674163e2], rel=1e-4)


PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "privacy-accounting.md"
SCHEMES: dict[str, Scheme] = {
    "PoissonScheme": PoissonScheme(20 / 200),
    "RotationScheme": RotationScheme(10),
    "FixedSizeScheme": FixedSizeScheme(200, 20),
    "EveryRound": EveryRound(),
}


def test_the_table_of_the_page_on_accounting() -> None:
    rows = re.findall(r"\| `(\w+)` \| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert {row[0] for row in rows} == set(SCHEMES)
    for name, relation, printed, noise in rows:
        found = epsilon({Release("gaussian", 2.0, SCHEMES[name]): 50}, 1e-5)
        assert (found.relation, f"{found.epsilon:.2f}") == (relation, printed)
        there = epsilon({Release("gaussian", float(noise), SCHEMES[name]): 50}, 1e-5)
        assert there.epsilon == pytest.approx(8, rel=0.02)


def test_a_loss_that_no_float_holds_is_infinite() -> None:
    spent = {Release("gaussian", 1e-6, PoissonScheme(0.5)): 1}
    assert epsilon(spent, 1e-5).epsilon == math.inf
    assert delta_of(spent, 8.0).delta == 1.0
