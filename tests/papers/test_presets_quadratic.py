"""The presets through `fedllm.run` on a task that can be solved by hand: where they end, and how they get there.

With local steps a_k (b_k - w), FedAvg lands on a point that can be computed and is not the optimum; SCAFFOLD and FedDyn
reach the optimum. The server optimisers take one local step a round, so the mean delta is lr times the gradient of the
mean loss, and their path is written out from algorithm 2 of Reddi et al. 2021.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from fedllm.experiment.config_file import build
from fedllm.runs import launch
from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.weighting.uniform import Uniform
from tests.papers.quadratic_task import CLIENTS, LR, ONE, Bowls, end, fixed_point, flat, optimum, quadratic

EXAMPLES = tuple(c.examples for c in CLIENTS)
STEPS = 10


def stages_of(method):
    """What a method's name sets."""
    parts = {"task": {"model": "tiny-llama"}, "federation": {"shards": "quickstart"}, "work": {"sgd": {"steps": 1}}}
    return build({**parts, "method": method}).stages


def away(point, other):
    return float(np.linalg.norm(point - other))


def test_fedavg_lands_on_its_biased_point(tmp_path):
    found = end(stages_of("fedavg"), 15, tmp_path / "run", steps=STEPS)
    assert away(found, fixed_point(STEPS, EXAMPLES)) < 1e-6
    assert away(found, optimum(EXAMPLES)) > 0.5


def test_fedavg_with_one_local_step_has_no_bias(tmp_path):
    found = end(stages_of("fedavg"), 60, tmp_path / "run", steps=1)
    assert away(found, optimum(EXAMPLES)) < 1e-3


def test_scaffold_reaches_the_optimum_that_fedavg_misses(tmp_path):
    found = end(stages_of("scaffold"), 15, tmp_path / "scaffold", steps=STEPS)
    assert away(found, optimum()) < 1e-3
    fedavg = end((Uniform(),), 15, tmp_path / "fedavg", steps=STEPS)
    assert away(fedavg, fixed_point(STEPS, (1, 1))) < 1e-6
    assert away(fedavg, optimum()) > 0.5


def test_feddyn_reaches_the_optimum_that_fedavg_misses(tmp_path):
    stages = stages_of({"feddyn": {"alpha": 1.0}})
    assert stages == (Dyn(alpha=1.0), Uniform())
    assert away(end(stages, 18, tmp_path / "run", steps=STEPS), optimum()) < 1e-3


@pytest.mark.parametrize("mu", [0.5, 1.0])
def test_fedprox_lands_on_its_point(mu, tmp_path):
    found = end(stages_of({"fedprox": {"mu": mu}}), 25, tmp_path / "run", steps=STEPS)
    assert away(found, fixed_point(STEPS, EXAMPLES, mu)) < 1e-6
    assert away(found, fixed_point(STEPS, EXAMPLES)) > 0.05


def mean_delta(w):
    """lr sum_k n_k a_k (b_k - w) / sum_k n_k"""
    return LR * sum(c.examples * c.curve * (c.centre - w) for c in CLIENTS) / sum(EXAMPLES)


def path(rounds, rule):
    """w after some rounds of `step, m, v = rule(Δ, m, v)`, with beta1 0.9, beta2 0.99, tau 1e-3."""
    w, m, v = np.zeros(3), np.zeros(3), np.full(3, 1e-3**2)
    for _ in range(rounds):
        step, m, v = rule(mean_delta(w), m, v)
        w = w + step
    return w


def adaptive(second):
    def rule(delta, m, v):
        m, v = 0.9 * m + 0.1 * delta, second(v, delta * delta)
        return 1e-3 * m / (np.sqrt(v) + 1e-3), m, v

    return rule


def momentum(delta, m, v):
    m = 0.9 * m + 0.1 * delta
    return m, m, v


RULES = {
    "fedavg": lambda delta, m, v: (delta, m, v),
    "fedavgm": momentum,
    "fedadagrad": adaptive(lambda v, square: v + square),
    "fedadam": adaptive(lambda v, square: 0.99 * v + 0.01 * square),
    "fedyogi": adaptive(lambda v, square: v - 0.01 * square * np.sign(v - square)),
}


@pytest.mark.parametrize("method", RULES)
def test_a_server_optimiser_takes_its_papers_path(method, tmp_path):
    found = end(stages_of(method), 4, tmp_path / "run", steps=1)
    np.testing.assert_allclose(found, path(4, RULES[method]), rtol=1e-12)
    others = [path(4, rule) for name, rule in RULES.items() if name != method]
    assert all(away(found, other) > 1e-6 for other in others)


def test_the_first_step_of_fedadam_by_hand(tmp_path):
    """Entry 0: Δ = 0.1 (3·1·1 + 1·4·(-3)) / 4 = -0.225; m = -0.0225; v = 0.99e-6 + 0.01·0.050625 = 5.0724e-4;
    sqrt(v) = 0.0225220; step = 1e-3 · (-0.0225) / (0.0225220 + 0.001) = -9.5655e-4."""
    found = end(stages_of("fedadam"), 1, tmp_path / "run", steps=1)
    assert found[0] == pytest.approx(-9.5655e-4, rel=1e-4)


@dataclass(frozen=True)
class LossyBowls(Bowls):
    """The second client never answers."""

    def failure(self, client, round, call, key):
        return "it was lost" if client == "client-1" else None


@pytest.mark.parametrize(("denominator", "counted"), [("answered", 1), ("cohort", 2)])
def test_a_lost_client_counts_as_zero_only_with_a_fixed_denominator(denominator, counted, tmp_path):
    experiment = replace(quadratic((Uniform(denominator),), 1, steps=1), federation=LossyBowls())
    found = flat(launch.run(experiment, engine="serial", out=tmp_path / "run").params)
    np.testing.assert_allclose(found, LR * ONE.curve * ONE.centre / counted, rtol=1e-12)
