"""SCAFFOLD: one round by hand; textbook loops are in tests/papers/test_drift_correction.py."""

from __future__ import annotations

import pytest
import torch

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.client_drift.scaffold import Scaffold
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from tests.papers.quadratics import CLIENTS, federate, leaves

CTX = RoundContext(round=0, key=Key(1), cohort=1, population=4)


def leaf(*values):
    return {"w": torch.tensor([values], dtype=torch.float64)}


def facts(steps=2, lr_sum=0.5):
    return ClientContext(CTX, {"examples": 3.0, "steps": steps, "lr_sum": lr_sum})


def test_one_round_by_hand():
    # c = 1, c_k = 3: correction -2. delta = -4 over lr_sum 0.5: c_k' = 3 - 1 + 8 = 10, change 7; c = 1 + 7/4
    stage = Scaffold()
    params, extra = stage.broadcast(leaf(5.0), leaf(1.0), CTX)
    _, scratch = stage.receive(params, extra, leaf(3.0), facts())
    assert float(stage.grads(leaf(0.25), params, scratch)["w"]) == 0.25 + 1 - 3
    sent, memory = stage.encode(Update({"delta": Part(leaf(-4.0))}), scratch, leaf(3.0), facts())
    assert float(memory["w"]) == 10
    assert float(sent.parts["control"].tree["w"]) == 7
    assert sent.parts["control"].weight == 0
    total, state = stage.decode(sent, params, leaf(1.0), CTX)
    assert float(state["w"]) == 1 + 7 / 4
    assert total.parts.keys() == {"delta"}


def test_the_extra_has_the_shapes_of_the_parameters_from_the_first_round():
    _, extra = Scaffold().broadcast(leaves(2.0), {}, CTX)
    assert tree.equal(extra, tree.zeros_like(leaves(2.0)))
    _, extra = Scaffold().broadcast(leaves(2.0), {"layer.lora_B": torch.ones(3, 1)}, CTX)
    assert extra.keys() == leaves(2.0).keys()


def test_the_control_of_a_schedule_is_the_mean_gradient_weighted_by_the_rates():
    lrs = (0.3, 0.2, 0.1)
    course = federate([Scaffold(), Uniform()], 1, lrs=lrs)
    for k, client in enumerate(CLIENTS):
        params, mean = leaves(0.0), leaves(0.0)
        for lr in lrs:
            grad = client.grad(params)
            mean, params = tree.add(mean, grad, lr / sum(lrs)), tree.add(params, grad, -lr)
        for name, own in course.memories[k][0].items():
            torch.testing.assert_close(own, mean[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("steps", "lr_sum"), [(0, 0.0), (3, 0.0), (0, 0.5)])
def test_without_a_step_the_control_stays(steps, lr_sum):
    update = Update({"delta": Part(leaf(0.0))})
    sent, memory = Scaffold().encode(update, leaf(-2.0), leaf(3.0), facts(steps, lr_sum))
    assert float(memory["w"]) == 3
    assert float(sent.parts["control"].tree["w"]) == 0


def test_leaves_without_a_delta_rest():
    memory = {**leaf(3.0), "b": torch.ones(2)}
    scratch = {**leaf(-2.0), "b": torch.zeros(2)}
    sent, after = Scaffold().encode(Update({"delta": Part(leaf(-4.0))}), scratch, memory, facts())
    assert sent.parts["control"].tree.keys() == {"w"}
    assert torch.equal(after["b"], torch.ones(2))
    state = {"b": torch.ones(2)}
    _, state = Scaffold().decode(sent, {}, state, CTX)
    assert state.keys() == {"w", "b"}


def test_unequal_cohorts_divide_by_the_population():
    course = federate([Scaffold(), Uniform()], 1, cohorts=lambda index: (1,))
    for name, own in course.memories[1][0].items():
        torch.testing.assert_close(course.states[0][name], own / 2, rtol=0, atol=0)


def test_it_names_the_local_optimisers_that_it_covers():
    assert Scaffold().traits.optimizers == {"sgd"}
    assert Scaffold(allow=("adamw",)).traits.optimizers == {"sgd", "adamw"}
