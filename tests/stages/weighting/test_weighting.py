"""ByExamples and Uniform: weighted means through a sum."""

from __future__ import annotations

import pytest
import torch

from fedllm.aggregators.sum import Sum
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import Fact
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.round_trip import decode_all
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.weighting import weighted_mean
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from fedllm.tensors.wire_format import SPARSE

CTX = RoundContext(round=0, key=Key(1), cohort=2, population=2)


def update(delta, *, own=2.0):
    return Update(
        {
            "delta": Part({"w": torch.tensor([delta])}, wire_format=SPARSE),
            "logits": Part({"y": torch.tensor([10.0 * delta])}, own),
            "control": Part({"c": torch.tensor([delta])}, 0.0),
        }
    )


def decoded(stage, *clients):
    """The total of (delta, examples, own weight) clients after `decode`."""
    sent = {
        str(k): stage.encode(update(delta, own=own), {}, {}, ClientContext(CTX, {"examples": examples}))[0]
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
    sent, _ = ByExamples().encode(update(1.0), {}, {}, ClientContext(CTX, {"examples": 3.0}))
    assert sent.parts["delta"].wire_format is SPARSE


@pytest.mark.parametrize("stage", [ByExamples(), Uniform()])
def test_an_empty_cohort_divides_nothing(stage):
    zero = {"w": torch.zeros(2, 3)}
    total, _ = decode_all([Momentum(), stage], Update({"delta": Part(zero, 0.0)}), zero, [{}, {}], CTX)
    assert tree.equal(total.parts["delta"].tree, zero)


def test_a_fixed_denominator_counts_a_lost_client_as_zero():
    stage, drawn = Uniform("cohort"), RoundContext(round=0, key=Key(1), cohort=4, population=9)
    sent = [stage.encode(update(delta), {}, {}, ClientContext(drawn, {"examples": 5.0}))[0] for delta in (1.0, 5.0)]
    metrics = [Part({"loss": torch.tensor(loss)}) for loss in (2.0, 4.0)]
    sent = [
        u.having("metrics", weighted_mean.weigh(Update({"m": m}), 1.0).parts["m"])
        for u, m in zip(sent, metrics, strict=True)
    ]
    total = Sum().reduce(lambda name, requests: iter(zip("ab", sent, strict=True)), {})
    parts = stage.decode(total, {}, {}, drawn)[0].parts
    assert float(parts["delta"].tree["w"]) == (1 + 5) / 4
    assert parts["delta"].weight == 4
    assert float(parts["control"].tree["c"]) == 6
    assert float(parts["metrics"].tree["loss"]) == 3  # a figure is a mean over those who answered
    zero = Update({"delta": Part({"w": torch.zeros(1)}, 0.0)})
    assert stage.decode(zero, {}, {}, drawn)[0].parts["delta"].weight == 0


def test_which_weigher_keeps_what_promise():
    assert Uniform().traits.loses == Fact.FIXED_DENOMINATOR
    assert Uniform("cohort").traits.loses == Fact.ANSWERED
    assert ByExamples().traits.loses == Fact.EQUAL_WEIGHTS | Fact.FIXED_DENOMINATOR
