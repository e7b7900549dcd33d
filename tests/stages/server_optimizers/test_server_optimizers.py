"""Momentum, Nesterov, Adagrad, Adam and Yogi: trajectories by hand, textbook loops, torch, neutral settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedllm.errors import ConfigError
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.server_optimizers.adagrad import Adagrad
from fedllm.stages.server_optimizers.adam import Adam
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.server_optimizers.nesterov import Nesterov
from fedllm.stages.server_optimizers.yogi import Yogi
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.tensors import tree
from tests.papers.quadratics import CLIENTS, Quadratic, federate, leaves

CTX = RoundContext(round=0, key=Key(1), cohort=2, population=2)


def steps(stage, deltas):
    """What the stage makes of a series of mean deltas."""
    state, made = {}, []
    for delta in deltas:
        total, state = stage.decode(Update({"delta": Part(delta, 2.0)}), {}, state, CTX)
        assert total.parts["delta"].weight == 2.0
        made.append(total.parts["delta"].tree)
    return made


def scalars(stage, *values):
    made = steps(stage, [{"w": torch.tensor([[v]], dtype=torch.float64)} for v in values])
    return [float(step["w"]) for step in made]


def test_momentum_by_hand():
    # v = 0.5 v + 0.5 Δ: 2, 0, 4; half of it is stepped
    assert scalars(Momentum(beta=0.5, server_lr=0.5), 4, -2, 8) == [1, 0, 2]


def test_nesterov_by_hand():
    # b = 0.5 b + Δ: 4, 0, 8; step = 0.5 (Δ + 0.5 b)
    assert scalars(Nesterov(server_lr=0.5, momentum=0.5), 4, -2, 8) == [3, -1, 6]


def test_adagrad_by_hand():
    # v: 3² + 4² = 5², + 12² = 13², + 84² = 85²; m = 0.5 m + 0.5 Δ: 2, -5, 39.5; step = 2 m / (sqrt(v) + 3)
    expected = [4 / 8, -10 / 16, 79 / 88]
    assert scalars(Adagrad(beta1=0.5, tau=3, server_lr=2), 4, -12, 84) == pytest.approx(expected, rel=1e-15)


def test_adam_by_hand():
    # v = (v + Δ²) / 2 from 1: (1 + 49) / 2 = 5², (25 + 35²) / 2 = 25², (625 + 175²) / 2 = 125²
    # m = 0.5 m + 0.5 Δ: 3.5, -15.75, 79.625; step = 2 m / (sqrt(v) + 1)
    expected = [7 / 6, -31.5 / 26, 159.25 / 126]
    assert scalars(Adam(beta1=0.5, beta2=0.5, tau=1, server_lr=2), 7, -35, 175) == pytest.approx(expected, rel=1e-15)


def test_yogi_by_hand():
    # v from 5² = 25: 24² is above it, + 144 = 13²; 10² is below, - 25 = 12²; 18² is above, + 81 = 15²
    # m = 0.5 m + 0.5 Δ: 12, 1, 9.5; step = 2 m / (sqrt(v) + 5)
    expected = [24 / 18, 2 / 17, 19 / 20]
    assert scalars(Yogi(beta1=0.5, beta2=0.75, tau=5, server_lr=2), 24, -10, 18) == pytest.approx(expected, rel=1e-15)


def random_deltas(rounds, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "a": torch.randn(2, 3, generator=generator, dtype=torch.float64),
            "b": torch.randn(4, generator=generator, dtype=torch.float64),
        }
        for _ in range(rounds)
    ]


SECOND = {
    Adagrad: lambda v, d: v + d**2,
    Adam: lambda v, d: 0.99 * v + 0.01 * d**2,
    Yogi: lambda v, d: v - 0.01 * d**2 * np.sign(v - d**2),
}


@pytest.mark.parametrize("cls", SECOND)
def test_the_defaults_equal_a_textbook_loop(cls):
    deltas = [tree.scale(delta, 0.01) for delta in random_deltas(20)]  # so small that the start of v shows
    made = steps(cls(), deltas)
    for name in ("a", "b"):
        m, v = np.zeros(deltas[0][name].shape), 1e-6
        for delta, step in zip(deltas, made, strict=True):
            d = delta[name].numpy()
            m, v = 0.9 * m + 0.1 * d, SECOND[cls](v, d)
            np.testing.assert_allclose(step[name].numpy(), 1e-3 * m / (np.sqrt(v) + 1e-3), rtol=1e-12)


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.3)])
def test_nesterov_is_torch_sgd_on_the_pseudo_gradient(lr, momentum):
    deltas = random_deltas(10)
    params = {name: torch.ones_like(leaf) for name, leaf in deltas[0].items()}
    mine = dict(params)
    theirs = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    optimizer = torch.optim.SGD(theirs.values(), lr=lr, momentum=momentum, nesterov=True)
    for delta, step in zip(deltas, steps(Nesterov(server_lr=lr, momentum=momentum), deltas), strict=True):
        for name, leaf in theirs.items():
            leaf.grad = -delta[name]
        optimizer.step()
        mine = tree.add(mine, step)
        for name, leaf in theirs.items():
            torch.testing.assert_close(mine[name], leaf.detach(), rtol=0, atol=1e-13)


NEUTRAL = [
    Momentum(beta=0, server_lr=1),
    Nesterov(server_lr=1, momentum=0),
    Adagrad(beta1=0, tau=2.0**40, server_lr=2.0**41),
    Adam(beta1=0, beta2=1, tau=0.5, server_lr=1),
    Yogi(beta1=0, beta2=1, tau=0.5, server_lr=1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stage", NEUTRAL, ids=lambda stage: type(stage).__name__)
def test_neutral_settings_are_fedavg_to_the_bit(stage, dtype):
    clients = [
        Quadratic(tree.map_leaves(lambda x: x.to(dtype), c.a), tree.map_leaves(lambda x: x.to(dtype) / 3, c.b), 7 + k)
        for k, c in enumerate(CLIENTS)
    ]
    start = leaves(0.1, dtype=dtype)
    plain = federate([ByExamples()], 6, clients=clients, params=start)
    staged = federate([stage, ByExamples()], 6, clients=clients, params=start)
    assert tree.digest(staged.params) == tree.digest(plain.params)


@pytest.mark.parametrize("cls", [Momentum, Nesterov, Adagrad, Adam, Yogi])
def test_the_defaults_differ_from_fedavg_and_from_each_other(cls):
    params = federate([cls(), ByExamples()], 3).params
    others = [federate([other(), ByExamples()], 3).params for other in (Momentum, Adagrad, Adam, Yogi) if other != cls]
    for other in [federate([ByExamples()], 3).params, *others]:
        assert all(float((params[name] - other[name]).abs().max()) > 1e-6 for name in params)


def test_adagrad_tends_to_fedavg_as_tau_grows():
    delta = {"w": torch.tensor([[0.3, -2.0]], dtype=torch.float64)}
    gaps = []
    for tau in (1e1, 1e2, 1e3):
        (step,) = steps(Adagrad(beta1=0, tau=tau, server_lr=2 * tau), [delta])
        gaps.append(float((step["w"] - delta["w"]).abs().max()))
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2] > 0  # the gap falls with the square of tau


@pytest.mark.parametrize("stage", [Momentum(), Nesterov(), Adagrad(), Adam(), Yogi()], ids=lambda s: type(s).__name__)
def test_a_leaf_that_rests_keeps_its_moments(stage):
    both, a_only = random_deltas(2)
    del a_only["b"]
    resting = steps(stage, [both, a_only, both])
    running = steps(stage, [both, both])
    assert resting[1].keys() == {"a"}
    torch.testing.assert_close(resting[2]["b"], running[1]["b"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Momentum(beta=1.0), "momentum.beta is 1.0"),
        (lambda: Momentum(beta=-0.1), "momentum.beta is -0.1"),
        (lambda: Momentum(server_lr=0), "momentum.server_lr is 0"),
        (lambda: Nesterov(momentum=1), "nesterov.momentum is 1"),
        (lambda: Nesterov(server_lr=float("nan")), "nesterov.server_lr is nan"),
        (lambda: Adagrad(tau=0), "adagrad.tau is 0"),
        (lambda: Adam(beta1=1), "adam.beta1 is 1"),
        (lambda: Adam(beta2=1.5), "adam.beta2 is 1.5"),
        (lambda: Yogi(server_lr=float("inf")), "yogi.server_lr is inf"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make, field):
    with pytest.raises(ConfigError, match=f"^{field}; it must be "):
        make()
