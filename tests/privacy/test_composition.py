"""From a ledger to the steps that one client has to fear."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import PrivacyError
from fedllm.privacy.composition import Steps, covers, steps_of, undominated
from fedllm.privacy.releases import Release
from fedllm.privacy.schemes import EveryRound, FixedSizeScheme, PoissonScheme, RotationScheme

RATE = PoissonScheme(0.25)


def test_gaussians_add_up_in_the_inverse_of_their_variance() -> None:
    ledger = {
        Release("gaussian", 2.0, EveryRound()): 3,
        Release("correlated", 0.5, RotationScheme(7)): 1,
        Release("gaussian", 1.0, PoissonScheme(1)): 2,  # a coin that always falls on one side is none
    }
    assert steps_of(ledger) == Steps("add-remove", 3 / 4 + 4 + 2)


def test_local_steps_are_counted_by_example() -> None:
    ledger = {Release("example", 1.5, RATE, steps=10): 4, Release("example", 1.5, RATE, steps=3): 2}
    assert steps_of(ledger) == Steps("add-remove", poisson={(1.5, 0.25): 46})


def test_a_correlated_or_local_release_under_rotation_counts_as_it_stands() -> None:
    # The sensitivity of a correlated run knows the rotation already; a client's own releases are those it made.
    assert steps_of({Release("correlated", 1.0, RotationScheme(4)): 3}).precision == 3
    assert steps_of({Release("local", 1.0, RotationScheme(4)): 3}).precision == 3


@given(st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=1, max_size=9), st.integers(1, 4))
def test_rotation_is_as_bad_as_the_worst_client_in_any_order(noises: list[float], separation: int) -> None:
    """Against all choices of rounds that are `separation` apart, in the worst order of the rounds' noises."""
    ledger = {Release("gaussian", z, RotationScheme(separation)): noises.count(z) for z in set(noises)}
    most = len(range(0, len(noises), separation))
    worst = sum(z**-2 for z in sorted(noises)[:most])
    assert steps_of(ledger).precision == pytest.approx(worst)
    rounds = range(len(noises))
    for chosen in itertools.combinations(rounds, min(most, len(noises))):
        if all(b - a >= separation for a, b in itertools.pairwise(chosen)):
            assert sum(noises[place] ** -2 for place in chosen) <= steps_of(ledger).precision + 1e-12


@pytest.mark.parametrize(
    ("ledger", "sentence"),
    [
        (
            {Release("gaussian", 1.0, EveryRound()): 1, Release("gaussian", 1.0, FixedSizeScheme(4, 2)): 1},
            "releases of different neighbours (add-remove, replace-one)",
        ),
        (
            {Release("gaussian", 1.0, EveryRound()): 1, Release("example", 1.0, RATE): 1},
            "releases of different units (client, example)",
        ),
        ({Release("gaussian", 1.0, EveryRound()): -1}, "was made -1 times"),
    ],
)
def test_what_does_not_add_up_is_refused(ledger: dict[Release, int], sentence: str) -> None:
    with pytest.raises(PrivacyError) as caught:
        steps_of(ledger)
    assert sentence in str(caught.value)


def test_a_release_that_was_never_made_decides_nothing() -> None:
    ledger = {Release("gaussian", 1.0, EveryRound()): 2, Release("local", 1.0, EveryRound()): 0}
    assert steps_of(ledger) == Steps("add-remove", 2.0)


def of(*steps: tuple[float, float, int], precision: float = 0.0) -> Steps:
    return Steps("add-remove", precision, {(noise, rate): count for noise, rate, count in steps})


@pytest.mark.parametrize(
    ("large", "small", "expected"),
    [
        (of((1.0, 0.1, 5)), of((1.0, 0.1, 5)), True),
        (of((1.0, 0.1, 5)), of((1.0, 0.1, 6)), False),
        (of((1.0, 0.1, 5)), of((1.1, 0.05, 5)), True),
        (of((1.0, 0.1, 5)), of((0.9, 0.05, 5)), False),
        (of((1.0, 0.1, 5)), of((1.1, 0.2, 5)), False),
        (of((1.0, 0.1, 5), (2.0, 0.2, 5)), of((2.0, 0.1, 10)), True),  # from both
        (of((1.0, 0.1, 5), (2.0, 0.2, 5)), of((2.0, 0.1, 11)), False),
        (of((1.0, 0.1, 5), precision=1.0), of((1.0, 0.1, 5), precision=2.0), False),
        (of(precision=1.0), of(), True),
    ],
)
def test_steps_cover_steps(large: Steps, small: Steps, expected: bool) -> None:
    assert covers(large, small) is expected


def test_only_those_who_may_be_the_worst_are_left() -> None:
    clients = {
        "a": of((1.0, 0.1, 5)),
        "b": of((1.0, 0.1, 5)),
        "c": of((1.0, 0.2, 5)),
        "d": of((1.0, 0.1, 50)),
        "e": of((1.0, 0.01, 50)),
    }
    assert undominated(clients) == ["c", "d"]
