"""FedAvg and FedProx on quadratics land on fixed points that can be computed.

One round of K local steps takes w to b_k + rho_k (w - b_k), rho_k = (1 - lr a_k)^K, so with weights p_k

    w' - w = sum_k p_k (1 - rho_k)(b_k - w) / sum_k p_k        w* = sum p_k (1 - rho_k) b_k / sum p_k (1 - rho_k)

which is the optimum sum p_k a_k b_k / sum p_k a_k only if K = 1. With the pull of FedProx the local map contracts
with rho_k = (1 - lr (a_k + mu))^K towards (a_k b_k + mu w)/(a_k + mu), so the client moves by
(1 - rho_k) a_k/(a_k + mu) (b_k - w): the same formula with q_k = (1 - rho_k) a_k/(a_k + mu) for 1 - rho_k.
"""

from __future__ import annotations

import numpy as np
import pytest

from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from tests.papers.quadratics import CLIENTS, distance, federate, leaves, optimum

LR, STEPS = 0.1, 10


def fixed_point(weights: tuple[float, ...], mu: float = 0.0) -> tree.Tree:
    share = [
        {name: p * (1 - (1 - LR * (a + mu)) ** STEPS) * a / (a + mu) for name, a in client.a.items()}
        for p, client in zip(weights, CLIENTS, strict=True)
    ]
    return {
        name: sum(s[name] * c.b[name] for s, c in zip(share, CLIENTS, strict=True)) / sum(s[name] for s in share)
        for name in CLIENTS[0].a
    }


@pytest.mark.parametrize(("stage", "weights"), [(Uniform(), (1.0, 1.0)), (ByExamples(), (30.0, 10.0))])
def test_fedavg_lands_on_its_biased_fixed_point(stage, weights):
    params = federate([stage], 60, lrs=(LR,) * STEPS).params
    assert distance(params, fixed_point(weights)) < 1e-9
    assert distance(params, optimum(weights=weights)) > 0.1


def test_one_local_step_has_no_bias():
    params = federate([ByExamples()], 400, lrs=(LR,)).params
    assert distance(params, optimum(weights=(30.0, 10.0))) < 1e-9


def test_the_two_weightings_differ():
    assert distance(federate([Uniform()], 60).params, federate([ByExamples()], 60).params) > 0.1


@pytest.mark.parametrize("mu", [0.5, 4.0])
def test_fedprox_lands_on_its_fixed_point(mu):
    params = federate([Prox(mu=mu), ByExamples()], 300, lrs=(LR,) * STEPS).params
    assert distance(params, fixed_point((30.0, 10.0), mu)) < 1e-9


def test_fedprox_lies_nearer_to_the_optimum():
    true = optimum(weights=(30.0, 10.0))
    plain, pulled = fixed_point((30.0, 10.0)), fixed_point((30.0, 10.0), 4.0)
    assert distance(pulled, true) < 0.6 * distance(plain, true)


def test_fedavg_and_fedprox_equal_the_textbook_loop():
    mu, a, b = 0.7, [flat(c.a) for c in CLIENTS], [flat(c.b) for c in CLIENTS]
    w = np.zeros(9)
    for _ in range(5):
        ends = []
        for k in range(2):
            y = w.copy()
            for _ in range(STEPS):
                y -= LR * (a[k] * (y - b[k]) + mu * (y - w))
            ends.append(y)
        w = (30 * ends[0] + 10 * ends[1]) / 40
    params = federate([Prox(mu=mu), ByExamples()], 5, lrs=(LR,) * STEPS).params
    np.testing.assert_allclose(flat(params), w, atol=1e-12)


def test_an_empty_cohort_moves_nothing():
    start = leaves(1.5)
    course = federate([Prox(), ByExamples()], 2, cohorts=lambda index: (), params=start)
    assert tree.equal(course.params, start)


def flat(leaf_tree: tree.Tree) -> np.ndarray:
    return np.concatenate([leaf_tree[name].numpy().reshape(-1) for name in sorted(leaf_tree)])
