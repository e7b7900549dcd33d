"""Noise of many clients: each part is small, and the sum has all of it whoever is lost."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedllm
from fedllm.aggregators.secure_sum import SecureSum
from fedllm.errors import CheckError, ClientError, ConfigError
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.privacy.accountant import epsilon
from fedllm.privacy.composition import skellam_divergence
from fedllm.privacy.releases import Release, release_from_json
from fedllm.privacy.schemes import EveryRound
from fedllm.rng import Key
from fedllm.stages.privacy.base import UnprotectedError
from fedllm.stages.privacy.clipping import clipped, grouped, rounded_within
from fedllm.stages.privacy.discrete_noise import DiscreteNoise
from fedllm.stages.privacy.fixed_point import FixedPoint
from tests.aggregators.conversation import Conversation, context
from tests.runs.small import spec
from tests.stages.privacy.source import Source, drawn, flat

CLIP, Z, HONEST = 0.5, 2.0, 5
STAGE = DiscreteNoise(CLIP, Z, survivors=HONEST, levels=2**10)


def sent(stage: DiscreteNoise, seed: int, update: Update | None = None, client: str = "0", of: int = 8) -> Update:
    ctx = RoundContext(0, Key(0), of, of, client=client)
    return stage.encode(update or next(drawn(1)), {}, {}, ClientContext(ctx, noise=Source(seed)))[0]


def test_a_client_adds_its_share_of_the_noise_to_integers() -> None:
    """Of 400 messages of 221 values: standard deviation z C / sqrt(h), within 1 %; 88,400 draws have 0.24 %."""
    noised = torch.stack([flat(sent(STAGE, seed)) for seed in range(400)])
    part = sent(STAGE, 0).parts["delta"]
    assert part.grid == 2.0**-11 == CLIP / 2**10
    assert torch.equal(noised, (noised / part.grid).round() * part.grid)
    assert float((noised - noised.mean(0)).std()) == pytest.approx(Z * CLIP / math.sqrt(HONEST), rel=0.01)
    assert float(noised.abs().max()) < 2.0**part.bits * part.grid


def test_the_bound_holds_behind_a_coarse_rounding() -> None:
    """100 equal values of 1.6 steps: rounding to the nearest alone makes 2 of each, and 0.625 of 0.5."""
    update = Update({"delta": Part({"a": torch.full((20, 5), 10.0)}, 1.0)})
    groups, step = grouped(update, CLIP, {}), CLIP / 16
    found = flat(rounded_within(update, groups, dict.fromkeys(groups, step), torch.float64))
    assert float(found.norm()) <= CLIP and torch.equal(found, (found / step).round() * step)
    nearest = (flat(clipped(update, groups)) / step).round() * step
    assert float(nearest.norm()) == 0.625
    with pytest.raises(ClientError, match=r"levels is 16, too few for 300 values; set it to 18 or more"):
        sent(DiscreteNoise(CLIP, Z, levels=16), 0, Update({"delta": Part({"a": torch.ones(300)}, 1.0)}))


@pytest.mark.parametrize("lost", [0, 3])
def test_a_secure_sum_has_all_of_the_noise_whoever_is_lost(lost: int) -> None:
    """Eight clients of whom five answer at least: the variance of a sum is (z C)^2 n / h, never below (z C)^2."""
    names = [f"c{number}" for number in range(8)]
    fixed, size = FixedPoint(), 20_000
    zero = Update({"delta": Part({"w": torch.zeros(200, size // 200)}, 1.0)})
    updates = {}
    for place, name in enumerate(names):
        ctx = context(name, place, 8)
        noised = STAGE.encode(zero, {}, {}, ClientContext(ctx, noise=Source(place)))[0]
        updates[name] = fixed.encode(noised, {}, {}, ClientContext(ctx))[0]
    grid = updates["c0"].parts["grid"].tree["delta/float64/w"]
    assert grid.shape == (1, 200, size // 200), "one integer of the ring for each value"
    aggregator = SecureSum(corrupt=0.0, dropout=0.4, min_survivors=5)
    talk = Conversation(aggregator, updates, {("mask", name) for name in names[:lost]})
    total = fixed.decode(aggregator.reduce(talk, talk.requests()), {}, {}, context("", 0, 8))[0]
    values = STAGE.decode(total, {}, {}, context("", 0, 8))[0].parts["delta"].tree["w"]
    assert float(values.std()) == pytest.approx(Z * CLIP * math.sqrt((8 - lost) / HONEST), rel=0.03)
    assert float(values.std()) >= 0.97 * Z * CLIP


def test_nothing_is_sent_without_a_source() -> None:
    with pytest.raises(UnprotectedError, match="no source"):
        STAGE.encode(next(drawn(1)), {}, {}, ClientContext(RoundContext(0, Key(0), 4, 4, client="0")))


@pytest.mark.parametrize(("noise", "levels", "alpha"), [(1.0, 16, 2), (1.0, 16, 8), (2.0, 16, 16), (1.5, 32, 4)])
def test_the_divergence_is_at_least_the_exact_one(noise: float, levels: int, alpha: int) -> None:
    """In one dimension, a shift by all levels, both ways; and half of the noise is not covered by it."""
    rho, xi = skellam_divergence(noise, levels)
    bound = xi + rho * alpha
    assert exact_divergence((noise * levels) ** 2, levels, alpha) <= bound
    assert exact_divergence((noise * levels / 2) ** 2, levels, alpha) > bound


def exact_divergence(variance: float, shift: int, alpha: int) -> float:
    """1 / (alpha - 1) log sum_x P(x - shift)^alpha P(x)^(1 - alpha), P by convolving two Poisson laws."""
    mean, reach = variance / 2, int(variance / 2 + 40 * math.sqrt(variance) + 60)
    k = np.arange(reach + 1)
    poisson = np.exp(k * math.log(mean) - mean - np.array([math.lgamma(x + 1) for x in k]))
    law = np.convolve(poisson, poisson[::-1])  # of differences -reach .. reach
    law = law[law > 1e-250]
    moved, still = law[:-shift], law[shift:]
    return float(np.log(np.sum(still * np.exp((alpha - 1) * (np.log(still) - np.log(moved)))))) / (alpha - 1)


def test_epsilon_is_that_of_renyi_divergences() -> None:
    """z 4, 20 rounds, delta 1e-5: 5.38 by Renyi divergences of the Gaussian, 4.98 by its loss distribution."""
    release = Release("skellam", 4.0, EveryRound(), levels=2**14)
    found = epsilon({release: 20}, 1e-5)
    assert found.accountant == "rdp" and found.epsilon == pytest.approx(5.379, abs=0.01)
    assert epsilon({Release("gaussian", 4.0, EveryRound()): 20}, 1e-5).epsilon == pytest.approx(4.98, abs=0.01)
    coarse = epsilon({Release("skellam", 4.0, EveryRound(), levels=16): 20}, 1e-5).epsilon
    assert found.epsilon < coarse < 1.05 * found.epsilon
    assert release_from_json(release.to_json()) == release
    assert epsilon({Release("skellam", 0.0, EveryRound(), levels=16): 1}, 1e-5).epsilon == math.inf


def experiment(path: Path, **changes: Any) -> Any:
    stages = [{"uniform": {"denominator": "cohort"}}, {"discrete_noise": {"clip": 1.0, "noise_multiplier": 1.0}}]
    made = {
        "stages": [*stages, "fixed_point"],
        "aggregator": {"secure_sum": {"corrupt": 0.0}},
        "evaluation": {"metrics": []},
    }
    return fedllm.build(spec(path, **{**made, **changes}))


def test_noise_that_no_sum_completes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    good = experiment(path)
    check(good)
    profiles = {name: good.federation.profile(name) for name in "abcdefgh"}
    check_profiles(good, profiles)
    with pytest.raises(CheckError, match="aggregator sum shows each by itself; use the aggregator secure_sum"):
        check(experiment(path, aggregator="sum"))
    corrupt = experiment(path, aggregator={"secure_sum": {"corrupt": 0.25}})
    with pytest.raises(
        CheckError, match=r"survivors is 2, but a sum may be of 3 .* 2 of 8 may be corrupt; set min_surv"
    ):
        check_profiles(corrupt, profiles)
    few = {name: profiles[name] for name in "abcd"}  # a tenth of four clients is one, as the protocol counts
    default = experiment(path, aggregator={"secure_sum": {"corrupt": 0.1, "dropout": 0.0}})
    check_profiles(default, few)
    two = default.stages[1]
    three = replace(default, stages=(default.stages[0], replace(two, survivors=3), default.stages[2]))
    with pytest.raises(CheckError, match=r"survivors is 3, but a sum may be of 3 .* 1 of 4 may be corrupt"):
        check_profiles(three, few)
    with pytest.raises(ConfigError, match=r"discrete_noise\.levels is 2; it must be 16 to 2\^40"):
        DiscreteNoise(1.0, 1.0, levels=2)
