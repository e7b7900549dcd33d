"""Correlated noise is C^-1 Z, and prefix sums have less of it than of independent noise at the same epsilon."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.privacy import toeplitz
from fedllm.rng import Key
from fedllm.stages.privacy.dp_ftrl import SCALE, DpFtrl
from tests.stages.privacy.source import Source, drawn, flat, server

CLIP, Z, ROUNDS, APART = 0.5, 0.8, 16, 4
STAGE = DpFtrl(CLIP, Z, separation=APART)


def sums(stage: DpFtrl) -> list[Update]:
    local = ClientContext(RoundContext(0, Key(0), 4, 4, client="0"))
    sent = [stage.encode(update, {}, {}, local)[0] for update in drawn(ROUNDS)]
    return [Update({"delta": Part(one.parts["delta"].tree, 4.0)}) for one in sent]


def run(stage: DpFtrl, seed: int) -> tuple[torch.Tensor, list[dict]]:
    """(rounds, values): the noise of each round; and the states."""
    state, found, states, source = {}, [], [], Source(seed)
    for round, total in enumerate(sums(stage)):
        out, state = stage.decode(total, {}, state, server(source, round=round, rounds=ROUNDS))
        found.append(flat(out, "delta") - flat(total, "delta"))
        states.append(state)
    return torch.stack(found), states


def test_the_noise_is_the_inverse_of_the_factor_times_independent_noise():
    """Many runs: the covariance of the noise over rounds is sigma^2 C^-1 C^-T."""
    noise = torch.cat([run(STAGE, seed)[0] for seed in range(12)], 1).numpy()  # (rounds, 12 * 221)
    c = STAGE.coefficients(ROUNDS) / SCALE
    factor = np.array([[c[i - j] if i >= j else 0.0 for j in range(ROUNDS)] for i in range(ROUNDS)])
    white = factor @ noise / (Z * STAGE.sensitivity(ROUNDS) * CLIP)
    covariance = white @ white.T / white.shape[1]
    assert np.abs(covariance - np.eye(ROUNDS)).max() < 5 / math.sqrt(white.shape[1])
    assert abs(white.std() - 1) < 0.01  # 42,000 draws


def test_prefix_sums_have_less_noise_than_with_independent_noise_at_the_same_epsilon():
    found = torch.cat([run(STAGE, seed)[0] for seed in range(8)], 1).cumsum(0).std(1)
    participations = ROUNDS / APART
    independent = Z * CLIP * math.sqrt(participations) * torch.arange(1, ROUNDS + 1).sqrt()
    assert float(found[-1]) < 0.7 * float(independent[-1])  # the page's table: 4.9 in place of 8.0
    assert float(found.square().mean().sqrt()) < 0.8 * float(independent.square().mean().sqrt())


def test_the_sensitivity_is_that_of_the_worst_client():
    c = STAGE.coefficients(ROUNDS) / SCALE
    assert STAGE.sensitivity(ROUNDS) == pytest.approx(2.44, abs=0.005)  # the page's table, n 16, k 4, b 4
    rows = np.zeros(ROUNDS)
    for start in range(0, ROUNDS, APART):
        rows[start:] += c[: ROUNDS - start]
    assert STAGE.sensitivity(ROUNDS) == pytest.approx(float(np.linalg.norm(rows)))
    assert DpFtrl(CLIP, Z).sensitivity(9) == 3.0, "no separation: independent noise, one part a round"
    assert STAGE.sensitivity(ROUNDS) != pytest.approx(toeplitz.sensitivity(c, 1, ROUNDS), rel=0.2)


def test_it_goes_on_from_its_state_and_keeps_no_more_than_its_band():
    whole, states = run(STAGE, 3)
    assert {name.split("/")[0] for name in states[-1]} == {f"{w}{n}" for w in ("sum", "estimate") for n in (1, 2, 3)}
    total = sums(STAGE)[9]
    out, _ = STAGE.decode(total, {}, states[8], server(Source(3), round=9, rounds=ROUNDS))
    assert torch.equal(flat(out, "delta") - flat(total, "delta"), whole[9])
    lost, _ = STAGE.decode(total, {}, {}, server(Source(3), round=9, rounds=ROUNDS))
    assert not torch.equal(flat(lost, "delta") - flat(total, "delta"), whole[9]), "a state that is lost shows"


def test_the_release_is_one_for_the_whole_run():
    release = STAGE.release(Z, None)  # type: ignore[arg-type]
    assert (release.kind, release.noise_multiplier) == ("correlated", Z)


@pytest.mark.parametrize("stage", [DpFtrl(CLIP, 50.0, separation=APART), DpFtrl(CLIP, 50.0, groups={"a": 0.1})])
def test_large_noise_of_values_in_float64_is_drawn(stage: DpFtrl):
    (update,) = drawn(1, dtype=torch.float64)
    sent, _ = stage.encode(update, {}, {}, ClientContext(RoundContext(0, Key(0), 1, 1, client="0")))
    total = Update({"delta": Part(sent.parts["delta"].tree, 1.0)})
    out, _ = stage.decode(total, {}, {}, server(Source(), rounds=ROUNDS, clients=1))
    assert bool(torch.isfinite(flat(out, "delta")).all())
