"""Releases: what they may hold, whose neighbours they hide, and their form as plain values."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedllm.errors import PrivacyError
from fedllm.privacy.releases import Kind, Release, ledger_from_json, ledger_to_json, release_from_json
from fedllm.privacy.schemes import EveryRound, FixedSizeScheme, PoissonScheme, RotationScheme, Scheme

FIXED = FixedSizeScheme(200, 20)


def test_a_ledger_survives_json() -> None:
    ledger = {
        Release("gaussian", 1.25, PoissonScheme(0.1)): 7,
        Release("correlated", 2.0, RotationScheme(4)): 1,
        Release("local", 3.0, EveryRound()): 2,
        Release("example", 1.1, PoissonScheme(0.03), steps=10): 5,
        Release("gaussian", 2.0, FIXED): 9,
    }
    assert ledger_from_json(json.loads(json.dumps(ledger_to_json(ledger)))) == ledger


def test_equal_rows_are_added_up() -> None:
    row = Release("gaussian", 1.0, EveryRound()).to_json()
    assert ledger_from_json([{**row, "count": 2}, {**row, "count": 3}]) == {Release("gaussian", 1.0, EveryRound()): 5}


@pytest.mark.parametrize(
    ("kind", "scheme", "relation", "unit"),
    [
        ("gaussian", EveryRound(), "add-remove", "client"),
        ("gaussian", PoissonScheme(0.5), "add-remove", "client"),
        ("gaussian", FIXED, "replace-one", "client"),
        ("correlated", RotationScheme(2), "add-remove", "client"),
        ("local", EveryRound(), "replace-one", "client"),
        ("example", PoissonScheme(0.5), "add-remove", "example"),
        ("example", FIXED, "replace-one", "example"),
    ],
)
def test_neighbours(kind: Kind, scheme: Scheme, relation: str, unit: str) -> None:
    release = Release(kind, 1.0, scheme)
    assert (release.relation, release.unit) == (relation, unit)


def test_two_noised_outputs_of_one_draw_are_one_of_less_noise() -> None:
    # Their mean has the noise z / sqrt(2), and holds all that both of them tell.
    assert Release("gaussian", 2.0, PoissonScheme(0.1)).repeated(4) == Release("gaussian", 1.0, PoissonScheme(0.1))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            ("laplace", 1.0, EveryRound()),
            "of kind 'laplace'; known kinds: gaussian, correlated, local, skellam, example",
        ),
        (("gaussian", 1.0, None), "has the scheme None; it may have every_round, poisson, fixed_size, rotation"),
        (
            ("correlated", 1.0, PoissonScheme(0.1)),
            "'correlated' has the scheme poisson; it may have every_round, rotation",
        ),
        (("local", 1.0, PoissonScheme(0.1)), "'local' has the scheme poisson"),
        (("example", 1.0, RotationScheme(2)), "'example' has the scheme rotation"),
        (("gaussian", -1.0, EveryRound()), "noise_multiplier -1.0; it must be 0 or more"),
        (("gaussian", float("nan"), EveryRound()), "noise_multiplier nan"),
        (("gaussian", 1.0, EveryRound(), 3), "'gaussian' has 3 steps; only 'example' has several"),
    ],
)
def test_what_cannot_be_accounted_is_refused(values: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(PrivacyError) as caught:
        Release(*values)
    assert sentence in str(caught.value)


def test_a_row_with_other_keys_is_refused() -> None:
    row = Release("gaussian", 1.0, EveryRound()).to_json()
    for bad in ({**row, "sigma": 1}, {key: value for key, value in row.items() if key != "scheme"}):
        with pytest.raises(PrivacyError, match="it needs kind, noise_multiplier and scheme"):
            release_from_json(bad)
