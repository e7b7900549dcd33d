"""HetLoRA: weights, penalty, pruning and zeros by hand, and clients that find the rank of their task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedllm.errors import CheckError, ConfigError
from fedllm.experiment.checks.check import check
from fedllm.messages.context import ClientContext, Profile, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.prune import LEAST, LoraPrune
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.round_trip import adjust_grads, broadcast_all, decode_all, encode_all, receive_all
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import low_rank, tree
from fedllm.tensors.tree import Tree
from tests.experiment.test_check import of
from tests.stages.lora.one_round import LAYERS, RANKS, a_round, drawn, off, product

PLAIN = LoraPrune(gamma=1, penalty=0)
NORMS = [
    math.hypot(*(float(product(drawn(r, seed), layer).norm()) for layer in LAYERS)) for seed, r in enumerate(RANKS, 1)
]


def test_the_norm_of_a_product_by_hand() -> None:
    """B A = [3, 4]^T [2, 0, 0] has norm 5 x 2; a second layer of norm 24 makes sqrt(10^2 + 24^2)."""
    one = low_rank.layer_leaves("one", torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0, 0.0]]))
    two = low_rank.layer_leaves("two", 4 * torch.eye(1), 6 * torch.eye(1))
    assert low_rank.norm(one) == 10 and low_rank.norm(one | two) == 26


def test_weights_are_the_shares_of_the_norms() -> None:
    """Whatever the numbers of examples; by the dense products of both layers."""
    round = a_round(PLAIN)
    for k, norm in enumerate(NORMS):
        assert round.sent(k).parts["delta"].weight == pytest.approx(norm, rel=1e-6)
        assert round.sent(k).parts["holders"].weight == pytest.approx(norm, rel=1e-6)
    found = round.result()
    for name in found:
        axis = low_rank.component_axis(name)
        for j in range(max(RANKS)):
            having = [k for k, rank in enumerate(RANKS) if rank > j]
            expected = sum(NORMS[k] / sum(NORMS) * round.after[k][name].select(axis, j).double() for k in having)
            assert off(found[name].select(axis, j), expected) < 1e-6  # type: ignore[arg-type]


def test_without_penalty_and_pruning_it_is_zero_padding_weighed_by_norms() -> None:
    found, padded = a_round(PLAIN).result(), replace(a_round(LoraPad()), examples=NORMS).result()
    assert all(torch.allclose(found[name], padded[name], rtol=1e-5, atol=1e-7) for name in padded)
    assert not any(torch.allclose(found[name], leaf, rtol=1e-3) for name, leaf in a_round(LoraPad()).result().items())


def test_what_a_client_lacks_is_an_exact_zero_and_is_not_sent() -> None:
    part = a_round(PLAIN).sent(0).parts["delta"]
    for name, leaf in part.tree.items():
        assert leaf.shape == drawn(16, 0)[name].shape
        assert (
            not leaf.narrow(low_rank.component_axis(name), 4, 12).any()
            and leaf.narrow(low_rank.component_axis(name), 0, 4).all()
        )
        assert part.wire_format.windows[name][low_rank.component_axis(name)] == (0, 4)


def test_a_client_whose_product_is_zero_still_has_a_weight() -> None:
    round = a_round(PLAIN)
    zeros = {name: torch.zeros_like(leaf) if name.endswith("B") else leaf for name, leaf in round.after[0].items()}
    sent = replace(round, after=[zeros, *round.after[1:]])
    assert sent.sent(0).parts["delta"].weight == LEAST
    alone = replace(sent, after=[zeros], examples=(1,)).result()
    assert torch.allclose(alone["q.lora_A"][:4], zeros["q.lora_A"], rtol=1e-5), "the mean of one is itself"


# The penalty.


def wide(leaves: Tree) -> Tree:
    return {name: leaf.double() for name, leaf in leaves.items()}


@pytest.mark.parametrize(("gamma", "kept"), [(0.75, 6), (0.7, 6), (0.1, 1), (1e-9, 1), (0.99, 8), (1, 8)])
def test_the_gradient_of_the_penalty_is_that_of_autograd(gamma: float, kept: int) -> None:
    params, grads = wide(drawn(8, 1)), wide(drawn(8, 2))
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    pairs = [low_rank.pair(leaves, layer) for layer in LAYERS]
    value = sum(b[:, kept:].norm() * a[kept:].norm() for b, a in pairs)
    expected = torch.autograd.grad(3 * value, list(leaves.values()), materialize_grads=True)  # type: ignore[operator]
    before = tree.map_leaves(torch.clone, grads)
    found = LoraPrune(gamma, 3).grads(grads, params, {})
    for name, gradient in zip(leaves, expected, strict=True):
        assert torch.allclose(found[name] - grads[name], gradient, rtol=1e-12, atol=1e-14)
    assert tree.equal(grads, before), "the gradients of the work are not written to"


def test_where_a_norm_is_zero_the_penalty_has_no_gradient() -> None:
    params, grads = wide(drawn(4, 1)), wide(drawn(4, 2))
    fresh = {name: torch.zeros_like(leaf) if name.endswith("B") else leaf for name, leaf in params.items()}
    assert tree.equal(LoraPrune(0.5, 3).grads(grads, fresh, {}), grads)


# Pruning.


def sent(stage: LoraPrune, start: Tree, after: Tree, memory: Tree | None = None) -> tuple[Update, Tree]:
    """What a client sends that goes from `start`, which it is sent, to `after`; and its memory."""
    ctx, memory = RoundContext(0, Key(0), 1, 1, client="a"), memory or {}
    began, scratch = stage.receive(start, {}, memory, ClientContext(ctx))
    return stage.encode(
        Update({"delta": Part(tree.sub(after, began))}), scratch, memory, ClientContext(ctx, initial_params=start)
    )


def faded(leaves: Tree, rank: int, factor: float) -> Tree:
    """The components from `rank` on multiplied by a factor."""
    found = tree.map_leaves(torch.clone, leaves)
    for name, leaf in found.items():
        leaf.narrow(low_rank.component_axis(name), rank, leaf.shape[low_rank.component_axis(name)] - rank).mul_(factor)
    return found


def test_a_client_prunes_if_the_trailing_components_lose_and_then_only() -> None:
    start = drawn(16, 1)
    update, memory = sent(LoraPrune(0.5), start, faded(start, 8, 0.9))
    assert memory == {"rank": torch.tensor(8)}
    part, marks = update.parts["delta"], update.parts["holders"].tree
    assert all(edges[low_rank.component_axis(name)] == (0, 8) for name, edges in part.wire_format.windows.items())
    assert all(mark.tolist() == [1] * 8 + [0] * 8 for mark in marks.values())
    assert part.weight == pytest.approx(low_rank.norm(low_rank.sliced(start, 8)), rel=1e-6), "of what is left"
    for after in (faded(start, 8, 1.1), start, faded(start, 4, 1.1), faded(start, 15, 1.1)):
        update, memory = sent(LoraPrune(0.5), start, after)
        assert memory == {} and all(mark.all() for mark in update.parts["holders"].tree.values())


def test_the_next_round_begins_at_the_rank_that_is_left() -> None:
    start, memory = drawn(16, 1), {"rank": torch.tensor(5)}
    params, scratch = LoraPrune().receive(start, {}, memory, ClientContext(RoundContext(1, Key(0), 1, 1)))
    assert tree.equal(params, low_rank.sliced(start, 5)) and scratch is params
    _, after = sent(LoraPrune(0.5), start, faded(params, 3, 0.5), memory)
    assert after == {"rank": torch.tensor(3)}, "half of 5, rounded up"
    _, after = sent(LoraPrune(0.5, min_rank=4), start, faded(params, 4, 0.5), memory)
    assert after == {"rank": torch.tensor(4)}, "but not below the least"
    _, after = sent(LoraPrune(0.5, min_rank=9), start, faded(params, 3, 0.5), memory)
    assert after == memory


def test_ranks_round_up_and_not_by_the_last_digit() -> None:
    assert [LoraPrune(0.75)._kept(rank) for rank in (16, 12, 9, 7, 6, 5, 4, 3, 1)] == [12, 9, 7, 6, 5, 4, 3, 3, 1]
    assert 0.28 * 25 > 7 and LoraPrune(0.28)._kept(25) == 7


def test_an_evaluation_prunes_nothing() -> None:
    scores = Update({"metrics": Part({"loss": torch.tensor(1.0)}, 0.0)})
    assert LoraPrune().encode(scores, {}, {}, ClientContext(RoundContext(0, Key(0), 1, 1))) == (scores, {})


def ranks_over_rounds(stage: LoraPrune, rounds: int = 12) -> dict[str, list[int]]:
    """Two clients descend on 1/2 ||B A - T||^2, one to a T of rank 2, one to a T of rank 16; what ranks they send."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"w": (40, 24)}
    targets = {k: torch.linalg.qr(normal(generator, 40, r))[0] @ torch.linalg.qr(normal(generator, 24, r))[0].T
               for k, r in (("two", 2), ("all", 16))}  # fmt: skip
    fresh = low_rank.layer_leaves("w", torch.zeros(40, 16).double(), normal(generator, 16, 24) / 5)
    assert {n: tuple(leaf.shape) for n, leaf in fresh.items()} == {"w.lora_A": (16, 24), "w.lora_B": (40, 16)}, shapes
    stages, params = (stage, ByExamples()), fresh
    memories: dict[str, tuple[Tree, ...]] = {k: ({}, {}) for k in targets}
    found: dict[str, list[int]] = {k: [] for k in targets}
    for r in range(rounds):
        parts: dict[str, Part] = {}
        for k, target in targets.items():
            ctx = RoundContext(r, Key(0), 2, 2, client=k, profile=Profile(rank=16))
            sent_params, extras = broadcast_all(stages, params, ({}, {}), ctx)
            start, arrival = receive_all(
                stages, sent_params, extras, memories[k], ClientContext(ctx, initial_params=fresh)
            )
            y = dict(start)
            for _ in range(60):
                b, a = low_rank.pair(y, "w")
                error = b @ a - target
                y = tree.add(
                    y, adjust_grads(stages, arrival, low_rank.layer_leaves("w", error @ a.T, b.T @ error), y), -0.2
                )
            local = ClientContext(ctx, {"examples": 1.0}, fresh)
            update, memories[k] = encode_all(
                stages, Update({"delta": Part(tree.sub(y, start))}), arrival, memories[k], local
            )
            found[k].append(int((update.parts["holders"].tree["w.lora_A"] != 0).sum()))
            parts = added(parts, update.parts)
        total, _ = decode_all(stages, Update(parts), params, ({}, {}), RoundContext(r, Key(0), 2, 2))
        params = tree.add(params, total.parts["delta"].tree)
    return found


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def added(total: Mapping[str, Part], more: Mapping[str, Part]) -> dict[str, Part]:
    if not total:
        return dict(more)
    return {
        name: Part(tree.add(total[name].tree, part.tree), (total[name].weight or 0) + (part.weight or 0))
        for name, part in more.items()
    }


def test_a_client_finds_the_rank_of_its_task() -> None:
    found = ranks_over_rounds(LoraPrune(gamma=0.75, penalty=1e-3))
    assert found["two"][0] == 16 and found["two"][-1] <= 4, found
    assert set(found["all"]) == {16}, found


def test_without_pruning_ranks_stay() -> None:
    assert set(map(tuple, ranks_over_rounds(PLAIN, 3).values())) == {(16, 16, 16)}


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.0}, r"lora_prune\.gamma is 0\.0; it must be above 0 and at most 1"),
        ({"gamma": 1.01}, r"lora_prune\.gamma is 1\.01; it must be above 0 and at most 1"),
        ({"gamma": math.nan}, r"lora_prune\.gamma is nan; it must be"),
        ({"penalty": -1.0}, r"lora_prune\.penalty is -1\.0; it must be at least 0 and finite"),
        ({"penalty": math.inf}, r"lora_prune\.penalty is inf; it must be"),
        ({"min_rank": 0}, r"lora_prune\.min_rank is 0; it must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraPrune(**settings)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            (LoraPrune(), Prox(), Uniform()),
            "prox works on tensors of one size, .*; put prox on the other side",
        ),
        ((TopK(0.5), LoraPrune(), Uniform()), "lora_prune compares the update .*, but top_k .*; put top_k behind"),
        ((Dyn(), LoraPrune(), Uniform()), "dyn is right only if .*, but lora_prune behind it changes them"),
        ((Keep(("*lora_A",)), LoraPrune(), Uniform()), "lora_prune works on both .*, but keep keeps tensors"),
    ],
)
def test_what_cannot_be_is_refused(stages, message: str) -> None:
    with pytest.raises(CheckError, match=message):
        check(of(*stages))


def test_what_stands_on_the_right_side_passes() -> None:
    check(of(Prox(), LoraPrune(), TopK(0.5), ByExamples()))
