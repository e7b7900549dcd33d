"""ByExamples and Uniform: weighted means through a sum."""

from __future__ import annotations

import pytest
import torch

from fedllm import tree
from fedllm.aggregate import Sum
from fedllm.packing import SPARSE
from fedllm.rng import Key
from fedllm.stage import merge
from fedllm.stages.by_examples import ByExamples
from fedllm.stages.momentum import Momentum
from fedllm.stages.uniform import Uniform
from fedllm.update import Ctx, Local, Part, Update

CTX = Ctx(round=0, key=Key(1), cohort=2, population=2)


def update(delta, *, own=2.0):
    return Update(
        {
            "delta": Part({"w": torch.tensor([delta])}, packing=SPARSE),
            "logits": Part({"y": torch.tensor([10.0 * delta])}, own),
            "control": Part({"c": torch.tensor([delta])}, 0.0),
        }
    )


def decoded(stage, *clients):
    """The total of (delta, examples, own weight) clients after `decode`."""
    sent = {
        str(k): stage.encode(update(delta, own=own), {}, {}, Local(CTX, {"examples": examples}))[0]
        for k, (delta, examples, own) in enumerate(clients)
    }
    total = Sum().reduce(lambda name, requests: iter(sent.items()), {})
    return stage.decode(total, {}, {}, CTX)[0].parts


def test_by_examples_is_the_weighted_mean():
    parts = decoded(ByExamples(), (1.0, 30.0, 2.0), (5.0, 10.0, 6.0))
    assert float(parts["delta"].tree["w"]) == (30 * 1 + 10 * 5) / 40
    assert parts["delta"].weight == 40


def test_uniform_is_the_plain_mean_of_those_that_answered():
    parts = decoded(Uniform(), (1.0, 30.0, 2.0), (5.0, 10.0, 6.0))
    assert float(parts["delta"].tree["w"]) == 3
    assert parts["delta"].weight == 2


@pytest.mark.parametrize("stage", [ByExamples(), Uniform()])
def test_a_weight_of_its_own_is_kept_and_a_weight_of_0_is_a_sum(stage):
    parts = decoded(stage, (1.0, 30.0, 2.0), (5.0, 10.0, 6.0))
    assert float(parts["logits"].tree["y"]) == (2 * 10 + 6 * 50) / 8
    assert float(parts["control"].tree["c"]) == 6
    assert parts["control"].weight == 0


def test_a_client_without_examples_counts_for_nothing():
    parts = decoded(ByExamples(), (100.0, 0.0, 2.0), (5.0, 10.0, 6.0))
    assert float(parts["delta"].tree["w"]) == 5
    nobody = decoded(ByExamples(), (100.0, 0.0, 2.0))
    assert float(nobody["delta"].tree["w"]) == 0


def test_the_layout_of_a_part_is_kept():
    sent, _ = ByExamples().encode(update(1.0), {}, {}, Local(CTX, {"examples": 3.0}))
    assert sent.parts["delta"].packing is SPARSE


@pytest.mark.parametrize("stage", [ByExamples(), Uniform()])
def test_an_empty_cohort_divides_nothing(stage):
    zero = {"w": torch.zeros(2, 3)}
    total, _ = merge([Momentum(), stage], Update({"delta": Part(zero, 0.0)}), zero, [{}, {}], CTX)
    assert tree.equal(total.parts["delta"].tree, zero)
