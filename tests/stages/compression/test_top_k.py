"""TopK: what is sent, what is remembered, and what the memory is for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import ConfigError
from fedllm.messages import serialization
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from tests.papers.quadratics import Course, Quadratic, distance, federate, leaves, one_round

LOCAL = ClientContext(RoundContext(round=0, key=Key(1), cohort=1, population=1))


def sent(stage, delta, memory):
    update, memory = stage.encode(Update({"delta": Part(delta)}), {}, memory, LOCAL)
    return update.parts["delta"], memory


def test_the_largest_over_all_leaves_together_are_sent():
    delta = {"b": torch.tensor([[1.0, -9.0, 2.0]]), "a": torch.tensor([3.0, -0.5])}
    part, memory = sent(TopK(fraction=0.4), delta, {})
    assert part.tree["b"].tolist() == [[0.0, -9.0, 0.0]]
    assert part.tree["a"].tolist() == [3.0, 0.0]
    assert memory["b"].tolist() == [[1.0, 0.0, 2.0]]
    assert memory["a"].tolist() == [0.0, -0.5]
    assert part.wire_format.sparse


def test_what_was_held_back_is_sent_when_it_has_grown():
    stage, memory, seen = TopK(fraction=0.5), {}, []
    for _ in range(3):
        part, memory = sent(stage, {"w": torch.tensor([4.0, 3.0])}, memory)
        seen.append(part.tree["w"].tolist())
    # errors: (4, 3) -> (0, 3); (4, 6) -> (4, 0); (8, 3) -> (0, 3)
    assert seen == [[4.0, 0.0], [0.0, 6.0], [8.0, 0.0]]
    assert memory["w"].tolist() == [0.0, 3.0]


def test_ties_go_to_the_first_by_name_and_place_in_any_order_of_the_leaves():
    delta = {"b": torch.ones(2, 3), "a": torch.ones(2)}
    part, _ = sent(TopK(fraction=0.5), delta, {})
    assert part.tree["a"].tolist() == [1, 1]
    assert part.tree["b"].tolist() == [[1, 1, 0], [0, 0, 0]]
    again, _ = sent(TopK(fraction=0.5), dict(reversed(delta.items())), {})
    assert tree.equal(again.tree, part.tree)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-(2**20), 2**20), min_size=6, max_size=6), min_size=1, max_size=8),
       st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]))  # fmt: skip
def test_all_that_was_sent_plus_the_error_is_exactly_the_sum(deltas, fraction):
    stage, memory = TopK(fraction=fraction), {}
    total, passed = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    for values in deltas:
        delta = torch.tensor(values, dtype=torch.float64).reshape(2, 3) / 2**10
        part, memory = sent(stage, {"w": delta}, memory)
        assert int((part.tree["w"] != 0).sum()) <= max(1, round(fraction * 6))
        total, passed = total + delta, passed + part.tree["w"]
    assert torch.equal(passed + memory["w"], total)


# Each client's larger coordinate cancels against the other's; the smaller, which both want, is never the largest.
CROSSED = [
    Quadratic(leaves(1.0), leaves(*((2.0,) + (0.0,) * 7 + (1.0,)))),
    Quadratic(leaves(1.0), leaves(*((-2.0,) + (0.0,) * 7 + (1.0,)))),
]
SHARED = leaves(*((0.0,) * 8 + (1.0,)))


@pytest.mark.parametrize("feedback", [True, False])
def test_without_feedback_it_stalls_and_with_it_it_converges(feedback):
    # An entry waits until its error exceeds the 2 lr of the larger one, so the distance falls with the rate 1/(t + 5).
    stages, gaps = [TopK(fraction=0.1, feedback=feedback), Uniform()], []
    course = Course.start(stages, 2, leaves(0.0))
    for index in range(600):
        one_round(stages, course, index, clients=CROSSED, lrs=(1 / (index + 5),))
        gaps.append(distance(course.params, SHARED))
    if feedback:
        assert max(gaps[50:100]) < 0.1
        assert max(gaps[-50:]) < 0.01
    else:
        assert set(gaps) == {1.0}
        assert course.memories[0][0] == {}


def test_fraction_1_is_fedavg_to_the_bit():
    plain = federate([ByExamples()], 5)
    whole = federate([TopK(fraction=1), ByExamples()], 5)
    assert tree.digest(whole.params) == tree.digest(plain.params)
    assert all(not leaf.any() for leaf in whole.memories[0][0].values())


def test_the_wire_carries_positions_and_values_alone():
    part, _ = sent(TopK(fraction=0.05), {"w": torch.arange(1.0, 201.0).reshape(10, 20)}, {})
    message = Update({"delta": Part(part.tree, 1.0, part.wire_format)})
    assert serialization.part_bytes(message) == {"delta": 10 * (4 + 4)}
    received = serialization.deserialize(serialization.serialize(message))
    assert isinstance(received, Update)
    assert tree.equal(received.parts["delta"].tree, part.tree)


def test_an_empty_delta_passes():
    part, memory = sent(TopK(fraction=0.5), {}, {})
    assert part.tree == memory == {}


def test_a_resting_leaf_keeps_its_error():
    _, memory = sent(TopK(fraction=0.5), {"w": torch.tensor([4.0, 3.0])}, {"b": torch.ones(2)})
    assert memory["b"].tolist() == [1, 1]


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_fractions_out_of_range_are_refused(fraction):
    with pytest.raises(ConfigError, match=r"^top_k.fraction is .*; it must be above 0 and at most 1$"):
        TopK(fraction=fraction)
