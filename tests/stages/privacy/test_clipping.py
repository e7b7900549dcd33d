"""The bound, and the grid on which sums are exact."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.messages.update import Part, Update
from fedllm.stages.privacy.clipping import Lattice, clipped, grid_type, grouped, norm, on_grid, step_of
from fedllm.tensors.wire_format import truncated
from tests.stages.privacy.source import drawn, flat


def all_leaves(update: Update):
    (group,) = grouped(update, 1.0, {})
    return group.leaves


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.floats(1e-6, 1e6), st.floats(1e-3, 1e3), st.integers(1, 5000), st.integers(0, 99))
def test_behind_the_grid_no_update_is_longer_than_the_clip(size, clip, times, clients, seed):
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * clip * times
    update = Update({"delta": Part({"w": values}, 1.0)})
    groups = grouped(update, clip, {})
    sent = on_grid(update, groups, clients)
    assert norm(sent, groups[0].leaves) <= clip
    step = step_of(groups[0], clients, sent.parts["delta"].tree["w"].dtype)
    ratio = sent.parts["delta"].tree["w"].double() / step
    assert torch.equal(ratio, ratio.round()), "multiples of the step"
    shrunk = values.double() * min(1.0, clip / float(values.double().norm()))
    assert float((sent.parts["delta"].tree["w"].double() - shrunk).norm()) <= size**0.5 * step, (
        "and near what they were"
    )


def test_a_sum_is_exact_in_any_order():
    updates = list(drawn(5))
    sent = [on_grid(update, grouped(update, 0.5, {}), 5) for update in updates]
    exact = sum(flat(one) for one in sent)
    for order in permutations(sent):
        total = order[0].parts["delta"].tree["a"].clone()
        for one in order[1:]:
            total += one.parts["delta"].tree["a"]  # float32
        assert torch.equal(total.double().reshape(-1), exact[: total.numel()])
    rough = [clipped(update, grouped(update, 0.5, {})).parts["delta"].tree["a"] for update in updates]
    totals = [sum(order[1:], start=order[0]) for order in permutations(rough)]
    assert not all(torch.equal(total, totals[0]) for total in totals), "off the grid the order shows in the last bits"


def test_all_parts_share_the_bound_and_figures_are_left_alone():
    (update,) = drawn(1)
    update = update.having("control", Part({"c": torch.full((5,), 3.0)}, 0.0)).having(
        "metrics", Part({"loss": torch.ones(1)})
    )
    sent = clipped(update, grouped(update, 1.0, {}))
    assert float(flat(sent, "delta", "control").norm()) == pytest.approx(1.0, rel=1e-6)
    assert torch.equal(sent.parts["metrics"].tree["loss"], torch.ones(1))
    apart = Update({"delta": update.parts["delta"]})
    assert float(flat(clipped(apart, grouped(apart, 1.0, {})), "delta").norm()) > float(flat(sent, "delta").norm())


def test_groups_have_bounds_of_their_own():
    (update,) = drawn(1)
    groups = grouped(update, 0.3, {"a*": 0.1})
    assert [(group.clip, group.size) for group in groups] == [(0.1, 210), (0.3, 11)]
    sent = clipped(update, groups)
    assert float(sent.parts["delta"].tree["a"].norm()) == pytest.approx(0.1, rel=1e-6)
    assert float(sent.parts["delta"].tree["b"].norm()) <= 0.3 * (1 + 1e-6)


def test_many_clients_or_values_are_sent_in_float64():
    (small,) = grouped(Update({"delta": Part({"w": torch.zeros(100)}, 1.0)}), 1.0, {})
    assert grid_type([small], 100, torch.float32) == torch.float32
    assert grid_type([small], 10**6, torch.float32) == torch.float64
    assert grid_type([small], 2, torch.float64) == torch.float64


def test_a_lattice_holds_the_sum_in_integers_and_rounds_what_is_off_it():
    (update,) = drawn(1)
    (group,) = grouped(update, 0.5, {})
    sent = on_grid(update, [group], 4)
    lattice = Lattice.of(sent, group, 4)
    assert torch.equal(torch.from_numpy(lattice.values).double() * lattice.step, flat(sent))
    off = Lattice.of(update, group, 4)
    assert float((torch.from_numpy(off.values).double() * off.step - flat(update)).abs().max()) <= off.step / 2


@pytest.mark.parametrize("bits", [4, 8])
def test_bounded_values_are_rounded_towards_zero_and_stay_on_the_grid(bits):
    rows = (torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) * 1000).round() * 2.0**-12
    codes, scales = truncated(rows, bits, 2.0**-12)
    values = codes * scales[:, None]
    assert bool((values.abs() <= rows.abs()).all()) and bool((codes.abs() <= 2 ** (bits - 1) - 1).all())
    assert torch.equal(values * 2**12, (values * 2**12).round()), "multiples of the grid"
    assert torch.equal(torch.frexp(scales).mantissa, torch.full((6,), 0.5)), "powers of two"
    assert float((values - rows).abs().max()) < float(scales.max())


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_counts_as_zeros_and_leaves_the_sum_of_the_others(broken):
    """In a sum a NaN would take the place of what all others have sent."""
    good, bad = drawn(2)
    bad.parts["delta"].tree["a"].view(-1)[0] = broken
    sent = [on_grid(update, grouped(update, 0.5, {}), 2) for update in (good, bad)]
    assert not flat(sent[1]).any()
    total = Update({"delta": Part({name: leaf + sent[1].parts["delta"].tree[name]
                                   for name, leaf in sent[0].parts["delta"].tree.items()}, 2.0)})  # fmt: skip
    (group,) = grouped(total, 0.5, {})
    assert np.array_equal(Lattice.of(total, group, 2).values, Lattice.of(sent[0], group, 2).values)
