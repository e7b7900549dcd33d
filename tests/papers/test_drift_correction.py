"""SCAFFOLD and FedDyn beside textbook loops in numpy, and at the optimum that FedAvg misses."""

from __future__ import annotations

import numpy as np
import pytest

from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.client_drift.scaffold import Scaffold
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from tests.papers.quadratics import CLIENTS, Quadratic, distance, federate, leaves, optimum

THREE = (*CLIENTS, Quadratic(leaves(2, 1, 1, 2, 1, 1, 2, 1, 1), leaves(0, 1, 2, 3, -4, -3, -2, -1, 0), examples=5))
PARTIAL = ((0, 1), (2,), (), (1, 2), (0,), (0, 1, 2))


def flat(leaf_tree):
    return np.concatenate([leaf_tree[name].numpy().reshape(-1) for name in sorted(leaf_tree)])


def cohorts(index):
    return PARTIAL[index % len(PARTIAL)]


def textbook_scaffold(clients, rounds, *, lr, steps, drawn):
    """Karimireddy et al. 2020, algorithm 1: y <- y - lr (g_i(y) - c_i + c); option II; global step size 1."""
    a, b = [flat(q.a) for q in clients], [flat(q.b) for q in clients]
    x, c, c_i = np.zeros(9), np.zeros(9), [np.zeros(9) for _ in clients]
    for r in range(rounds):
        moves, changes = [], []
        for i in drawn(r):
            y = x.copy()
            for _ in range(steps):
                y = y - lr * (a[i] * (y - b[i]) - c_i[i] + c)
            c_new = c_i[i] - c + (x - y) / (steps * lr)
            moves.append(y - x)
            changes.append(c_new - c_i[i])
            c_i[i] = c_new
        if moves:
            x = x + np.mean(moves, axis=0)
            c = c + len(moves) / len(clients) * np.mean(changes, axis=0)
    return x, c, c_i


def textbook_dyn(clients, rounds, *, alpha, lr, steps, drawn):
    """Acar et al. 2021, algorithm 1, with `steps` gradient steps for the minimum."""
    a, b = [flat(q.a) for q in clients], [flat(q.b) for q in clients]
    m = len(clients)
    theta, h, g_k = np.zeros(9), np.zeros(9), [np.zeros(9) for _ in clients]
    for r in range(rounds):
        ends = []
        for k in drawn(r):
            t = theta.copy()
            for _ in range(steps):
                t = t - lr * (a[k] * (t - b[k]) - g_k[k] + alpha * (t - theta))
            g_k[k] = g_k[k] - alpha * (t - theta)
            ends.append(t)
        if ends:
            h = h - alpha / m * sum(t - theta for t in ends)
            theta = sum(ends) / len(ends) - h / alpha
    return theta, h, g_k


@pytest.mark.parametrize("drawn", [lambda r: (0, 1, 2), cohorts], ids=["all", "partial"])
def test_scaffold_equals_the_textbook_loop(drawn):
    x, c, c_i = textbook_scaffold(THREE, 12, lr=0.1, steps=5, drawn=drawn)
    course = federate([Scaffold(), Uniform()], 12, clients=THREE, cohorts=drawn)
    np.testing.assert_allclose(flat(course.params), x, atol=1e-12)
    np.testing.assert_allclose(flat(course.states[0]), c, atol=1e-12)
    for k in range(3):
        np.testing.assert_allclose(flat(course.memories[k][0]), c_i[k], atol=1e-12)


@pytest.mark.parametrize("drawn", [lambda r: (0, 1, 2), cohorts], ids=["all", "partial"])
@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_dyn_equals_the_textbook_loop(alpha, drawn):
    theta, h, g_k = textbook_dyn(THREE, 12, alpha=alpha, lr=0.1, steps=5, drawn=drawn)
    course = federate([Dyn(alpha=alpha), Uniform()], 12, clients=THREE, cohorts=drawn)
    np.testing.assert_allclose(flat(course.params), theta, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(flat(course.states[0]), h, rtol=1e-12, atol=1e-12)
    for k in range(3):
        np.testing.assert_allclose(flat(course.memories[k][0]), g_k[k], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stage", [Scaffold(), Dyn(alpha=1.0)])
def test_the_optimum_is_reached_where_fedavg_is_biased(stage):
    lrs = (0.1,) * 10
    assert distance(federate([stage, Uniform()], 150, lrs=lrs).params, optimum()) < 1e-3
    assert distance(federate([Uniform()], 150, lrs=lrs).params, optimum()) > 0.1


def test_scaffold_reaches_the_unweighted_optimum_whatever_the_weights():
    params = federate([Scaffold(), ByExamples()], 300, lrs=(0.1,) * 10).params
    assert distance(params, optimum()) < 1e-6
    assert distance(params, optimum(weights=(30.0, 10.0))) > 0.1


@pytest.mark.parametrize("stage", [Scaffold(), Dyn(alpha=1.0)])
def test_the_optimum_is_a_fixed_point_once_the_controls_have_settled(stage):
    settled = federate([stage, Uniform()], 600, lrs=(0.1,) * 10)
    for k, client in enumerate(CLIENTS):  # c_k, and h_k, are the clients' gradients at the optimum
        gradient = client.grad(optimum())
        assert distance(settled.memories[k][0], gradient) < 1e-8
        assert max(float(leaf.abs().max()) for leaf in gradient.values()) > 1
    assert max(float(leaf.abs().max()) for leaf in settled.states[0].values()) < 1e-8
