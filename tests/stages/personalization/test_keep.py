"""Keep: the leaves stay, nothing of them is sent, and the rest is FedAvg."""

from __future__ import annotations

import pytest
import torch

from fedllm.errors import ConfigError
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.client_drift.scaffold import Scaffold
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.round_trip import Received, broadcast_all, encode_all
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from tests.papers.quadratics import CLIENTS, federate, leaves, optimum

CTX = RoundContext(round=0, key=Key(1), cohort=2, population=2)
A, B = "layer.lora_A", "layer.lora_B"
KEEP_B = Keep(("*lora_B",))
EVERY_STAGE = (KEEP_B, Momentum(beta=0.5), Scaffold(), Prox(mu=0.1), Uniform())


def test_kept_leaves_are_neither_sent_down_nor_up():
    params, extras = broadcast_all(EVERY_STAGE, leaves(1.0), [{}] * 5, CTX)
    assert params.keys() == {A}
    assert extras[2].keys() == {A}
    course = federate(EVERY_STAGE, 3)
    for update in course.sent:
        assert all(B not in part.tree for part in update.parts.values())
        assert update.parts["delta"].tree.keys() == update.parts["control"].tree.keys() == {A}


def test_a_client_goes_on_from_its_own_values_and_the_server_keeps_its():
    # three rounds of 5 steps alone are 15 steps on the kept leaf; the shared leaf is FedAvg's
    start = leaves(0.5)
    course = federate([KEEP_B, ByExamples()], 3, params=start)
    for client, memories in zip(CLIENTS, course.memories, strict=True):
        expected = client.b[B] + (1 - 0.1 * client.a[B]) ** 15 * (0.5 - client.b[B])
        torch.testing.assert_close(memories[0][B], expected, rtol=0, atol=1e-12)
        assert memories[0].keys() == {B}
    assert torch.equal(course.params[B], start[B])
    assert torch.equal(course.params[A], federate([ByExamples()], 3, params=start).params[A])


def test_each_client_reaches_its_own_optimum_on_the_kept_leaf():
    course = federate([KEEP_B, Scaffold(), Uniform()], 200)
    for client, memories in zip(CLIENTS, course.memories, strict=True):
        torch.testing.assert_close(memories[0][B], client.b[B], rtol=0, atol=1e-9)
    torch.testing.assert_close(course.params[A], optimum()[A], rtol=0, atol=1e-6)


def test_the_first_start_is_fresh_and_memory_wins_later():
    fresh = {A: torch.zeros(2, 3), B: torch.full((3, 1), 7.0)}
    local = ClientContext(CTX, initial_params=fresh)
    params, scratch = KEEP_B.receive({A: torch.ones(2, 3)}, {}, {}, local)
    assert torch.equal(params[B], fresh[B])
    assert torch.equal(params[A], torch.ones(2, 3))
    assert scratch.keys() == {B}
    params, _ = KEEP_B.receive({A: torch.ones(2, 3)}, {}, {B: torch.full((3, 1), 9.0)}, local)
    assert float(params[B][0, 0]) == 9


def test_every_parameter_shaped_part_is_cleared_and_figures_stay():
    update = Update({"delta": Part({A: torch.ones(2, 3), B: torch.ones(3, 1)}),
                     "fisher": Part({A: torch.ones(2, 3), B: torch.ones(3, 1)}),
                     "metrics": Part({"loss": torch.tensor(2.0)})})  # fmt: skip
    sent, memory = KEEP_B.encode(update, {B: torch.full((3, 1), 5.0)}, {}, ClientContext(CTX))
    assert sent.parts["delta"].tree.keys() == sent.parts["fisher"].tree.keys() == {A}
    assert float(sent.parts["metrics"].tree["loss"]) == 2
    assert torch.equal(memory[B], torch.full((3, 1), 6.0))


def test_keeping_every_leaf_still_makes_rounds():
    course = federate([Keep(("*",)), Momentum(), ByExamples()], 2, params=leaves(0.5))
    assert tree.equal(course.params, leaves(0.5))
    assert course.memories[0][0].keys() == {A, B}


def test_a_resting_kept_leaf_is_remembered():
    memory = {B: torch.ones(3, 1)}
    _, after = KEEP_B.encode(Update({"delta": Part({A: torch.ones(2, 3)})}), memory, memory, ClientContext(CTX))
    assert torch.equal(after[B], memory[B])


def test_patterns_that_fit_nothing_are_fedavg_to_the_bit():
    plain = federate([ByExamples()], 4)
    kept = federate([Keep(("*.no_such_leaf",)), ByExamples()], 4)
    assert tree.digest(kept.params) == tree.digest(plain.params)


def test_evaluation_reads_the_kept_leaves_and_changes_nothing():
    memory = {B: torch.ones(3, 1)}
    params, scratch = KEEP_B.receive({A: torch.ones(2, 3)}, {}, memory, ClientContext(CTX))
    assert params.keys() == {A, B}
    update = Update({"metrics": Part({"loss": torch.tensor(1.0)})})
    _, (after,) = encode_all([KEEP_B], update, Received((scratch,), (frozenset(params),)), [memory], ClientContext(CTX))
    assert tree.equal(after, memory)


@pytest.mark.parametrize("patterns", [(), "*lora_B"])
def test_patterns_must_be_a_list(patterns):
    with pytest.raises(ConfigError, match=r"^keep.patterns is .*; it must be a list of at least one pattern"):
        Keep(patterns)
