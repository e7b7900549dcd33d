"""Schemes: their numbers, and their form as plain values."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import PrivacyError
from fedllm.privacy.schemes import (
    SCHEMES,
    EveryRound,
    FixedSizeScheme,
    PoissonScheme,
    RotationScheme,
    Scheme,
    scheme_from_json,
)

EACH: list[Scheme] = [EveryRound(), PoissonScheme(0.1), FixedSizeScheme(200, 20), RotationScheme(4)]


@pytest.mark.parametrize("scheme", EACH, ids=lambda scheme: scheme.name)
def test_a_scheme_survives_json(scheme: Scheme) -> None:
    assert scheme_from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


def test_every_scheme_is_among_those_above() -> None:
    assert {type(scheme) for scheme in EACH} == set(SCHEMES.values())


def test_the_words_of_the_file() -> None:
    assert FixedSizeScheme(200, 20).to_json() == {"scheme": "fixed_size", "population": 200, "cohort": 20}


@given(st.integers(1, 60), st.integers(1, 12))
def test_rotation_counts_the_rounds_of_the_most_eager_client(rounds: int, separation: int) -> None:
    taken = range(0, rounds, separation)  # as early and as often as it may
    assert RotationScheme(separation).participations(rounds) == len(taken)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"scheme": "shuffled"}, "'shuffled' is not a scheme that the accountant knows; known: every_round"),
        ({}, "None is not a scheme"),
        ({"scheme": "poisson"}, "the scheme 'poisson' does not have the values []"),
        ({"scheme": "poisson", "rate": 0.1, "cohort": 3}, "does not have the values ['cohort', 'rate']"),
        ({"scheme": "poisson", "rate": "0.1"}, "its values must be finite numbers"),
        ({"scheme": "poisson", "rate": float("nan")}, "its values must be finite numbers"),
        ({"scheme": "poisson", "rate": 1.5}, "is 1.5; it must be above 0 and at most 1"),
        ({"scheme": "poisson", "rate": 0}, "is 0; it must be above 0"),
        ({"scheme": "fixed_size", "population": 3, "cohort": 4}, "draws 4 of 3"),
        ({"scheme": "rotation", "min_separation": 0}, "is 0; it must be 1 or more"),
    ],
)
def test_what_is_no_scheme_is_refused(value: dict[str, object], sentence: str) -> None:
    with pytest.raises(PrivacyError) as caught:
        scheme_from_json(value)
    assert sentence in str(caught.value)
