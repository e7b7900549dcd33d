"""The draws of each sampler fit the scheme that it carries: what is accounted for is what runs."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm.data.sampling import All, PoissonSampling, RotationSampling, Sampling, UniformSampling
from fedllm.data.shards import Shards
from fedllm.errors import ConfigError
from fedllm.privacy.schemes import EveryRound, FixedSizeScheme, PoissonScheme, RotationScheme
from fedllm.rng import Key

CLIENTS = [f"c{number}" for number in range(10)]
ROUNDS = 10_000  # of 10 clients: 100,000 draws
P_001 = {9: 21.67, 10: 23.21, 44: 68.71}  # chi-square at p = 0.01, by degrees of freedom


def drawn(sampling: Sampling, rounds: int = ROUNDS) -> torch.Tensor:
    """(rounds, clients): who takes part."""
    cohorts = [set(sampling.draw(CLIENTS, Key(11), round)) for round in range(rounds)]
    return torch.tensor([[client in cohort for client in CLIENTS] for cohort in cohorts], dtype=torch.float64)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected).square() / expected).sum())


def test_poisson_draws_are_independent_coins():
    rate = PoissonSampling(0.3).scheme(10)
    assert rate == PoissonScheme(0.3)
    found = drawn(PoissonSampling(0.3))
    expected = torch.full((10,), ROUNDS * 0.3, dtype=torch.float64)
    assert chi_square(found.sum(0), expected) / 0.7 < P_001[10], "each client by the rate"
    sizes = torch.bincount(found.sum(1).long(), minlength=11).double()
    law = torch.tensor([math.comb(10, n) * 0.3**n * 0.7 ** (10 - n) for n in range(11)], dtype=torch.float64) * ROUNDS
    kept = law > 5
    assert chi_square(sizes[kept], law[kept]) < P_001[9], "a binomial number of them: a fixed size is no Poisson sample"
    fixed = torch.bincount(drawn(UniformSampling(3), 500).sum(1).long(), minlength=11).double()
    assert chi_square(fixed[kept], law[kept] / 20) > 1000, "as the same test says of a fixed size"


def test_uniform_draws_are_as_likely_for_every_pair():
    assert UniformSampling(3).scheme(10) == FixedSizeScheme(10, 3)
    found = drawn(UniformSampling(3))
    assert set(found.sum(1).tolist()) == {3.0}
    pairs = torch.stack([(found[:, i] * found[:, j]).sum() for i in range(10) for j in range(i)])
    assert chi_square(pairs, torch.full((45,), ROUNDS * 3 * 2 / 90, dtype=torch.float64)) < P_001[44]


def test_a_rotation_keeps_its_distance():
    rotation = RotationSampling(2)
    assert rotation.scheme(10) == RotationScheme(5) and rotation.expected(10) == 2.0
    found = drawn(rotation, 50)
    assert set(found.sum(1).tolist()) == {2.0} and set(found.sum(0).tolist()) == {10.0}
    for client in range(10):
        rounds = found[:, client].nonzero().reshape(-1)
        assert set((rounds[1:] - rounds[:-1]).tolist()) == {5}
    other = [rotation.draw(CLIENTS, Key(12), round) for round in range(5)]
    assert other != [rotation.draw(CLIENTS, Key(11), round) for round in range(5)], "the order is the run's"


def test_a_rotation_that_would_leave_clients_out_is_refused():
    with pytest.raises(ConfigError, match=r"rotation\.cohort is 3, which does not divide the 10 clients"):
        RotationSampling(3).draw(CLIENTS, Key(0))
    with pytest.raises(ConfigError, match=r"rotation\.cohort is 0; it must be 1 or more"):
        RotationSampling(0)


def test_the_federation_carries_the_scheme_and_the_expected_cohort():
    for sampling, scheme, expected in (
        (All(), EveryRound(), 10.0),
        (PoissonSampling(0.25), PoissonScheme(0.25), 2.5),
        (UniformSampling(4), FixedSizeScheme(10, 4), 4.0),
    ):
        shards = Shards("nowhere.jsonl", sampling=sampling)
        assert (shards.scheme(10), shards.expected_cohort(10)) == (scheme, expected)
    assert Sampling().scheme(10) is None, "a sampler of somebody's own says so itself"
