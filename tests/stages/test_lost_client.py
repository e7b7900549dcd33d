"""A fixed denominator: one of three clients is lost, and counts as no change whatever an update is made of.

Each case is computed from the factors by hand, in float64: the lost client's are those that all began with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedllm.errors import CheckError
from fedllm.experiment.checks.check import check
from fedllm.messages.traits import Fact
from fedllm.stages.base import Stage
from fedllm.stages.lora.bandwidth_cap import LoraCap
from fedllm.stages.lora.fair import LoraFair
from fedllm.stages.lora.merge import LoraMerge
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.product import LoraProduct
from fedllm.stages.lora.prune import LoraPrune
from fedllm.stages.lora.residual import LoraResidual
from fedllm.stages.lora.sparse_first import SparseFirst
from fedllm.stages.lora.stack import LoraStack
from fedllm.stages.lora.svd import LoraSvd
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import low_rank, tree
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.tree import Tree
from tests.conformance.table import CASES
from tests.experiment.test_check import of
from tests.stages.lora.one_round import Round, off

LAYERS = {"q": (5, 9), "down": (11, 7)}  # out, in
RANK, LOST = 4, 1
COHORT = Uniform("cohort")
OF_ONE_RANK: tuple[Stage, ...] = (LoraResidual(), LoraFair(0.0), LoraFair(0.5), LoraSvd())
OF_ANY_RANK: tuple[Stage, ...] = (LoraMerge(), LoraStack(), LoraProduct(), LoraProduct("product"), LoraPad())
EVERY = (*OF_ONE_RANK, *OF_ANY_RANK)


def drawn(rank: int, seed: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    found: Tree = {"head.bias": torch.randn(3, generator=generator).double()}
    for layer, (size_out, size_in) in LAYERS.items():
        b, a = (torch.randn(*shape, generator=generator).double() for shape in ((size_out, rank), (rank, size_in)))
        found |= low_rank.layer_leaves(layer, b, a)
    return found


def a_round(stage: Stage, ranks: Sequence[int] = (RANK,) * 3, lost: Sequence[int] = (LOST,)) -> Round:
    """The client of most examples is lost; the weights are equal all the same."""
    after = [drawn(rank, seed) for seed, rank in enumerate(ranks, 1)]
    return Round(drawn(RANK, 0), after, stage, examples=(3, 20, 5), weigher=COHORT, lost=lost)


def counted(round: Round) -> list[Tree]:
    """The factors that the mean is over: a lost client's are the server's."""
    return [round.server if k in round.lost else leaves for k, leaves in enumerate(round.after)]


def product(leaves: Tree, layer: str) -> Tensor:
    return torch.matmul(*low_rank.pair(leaves, layer))


def model(round: Round) -> Tree:
    """What each layer adds to its weight of before the round: the product, and what joined the frozen weight."""
    total = round.total()
    after = tree.add(round.server, total.parts["delta"].tree)
    added = BaseDelta({1: total.parts["base_delta"].tree}) if "base_delta" in total.parts else BaseDelta()
    return {layer: product(after, layer) + (added.dense(layer) if layer in added.layers() else 0) for layer in LAYERS}


def cut(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize("stage", EVERY, ids=str)
def test_without_a_change_nothing_changes(stage: Stage) -> None:
    still = a_round(stage)
    still = replace(still, after=[still.server] * 3)
    for layer, found in model(still).items():
        assert off(found, product(still.server, layer)) < 1e-12
    assert torch.equal(still.result()["head.bias"], still.server["head.bias"])


@pytest.mark.parametrize("stage", EVERY, ids=str)
def test_with_nobody_lost_it_is_the_mean_of_those_who_answered_to_the_bit(stage: Stage) -> None:
    whole = a_round(stage, lost=())
    one, two = whole.total(), replace(whole, weigher=Uniform()).total()
    assert one.parts.keys() == two.parts.keys()
    assert all(tree.equal(one.parts[name].tree, two.parts[name].tree) for name in one.parts)


@pytest.mark.parametrize("stage", EVERY, ids=str)
def test_other_leaves_go_a_third_of_the_way_for_each_answer(stage: Stage) -> None:
    round = a_round(stage)
    expected = sum(leaves["head.bias"] for leaves in counted(round)) / 3
    assert off(round.result()["head.bias"], expected) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [LoraResidual(), LoraMerge(), LoraStack(), LoraProduct(), LoraProduct("product")])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 3, 4)])
def test_the_model_becomes_the_mean_of_the_clients_models(stage: Stage, ranks: tuple[int, ...]) -> None:
    if ranks != (4, 4, 4) and Fact.ONE_SHAPE not in stage.traits.gives:
        pytest.skip("clients of one rank alone")
    round = a_round(stage, ranks)
    for layer, found in model(round).items():
        mean = torch.zeros(LAYERS[layer]).double()
        for k, leaves in enumerate(counted(round)):
            mean += product(leaves, layer) / 3
            if stage == LoraProduct() and k not in round.lost:  # what a client lacks stays as it is
                b, a = low_rank.pair(round.server, layer)
                mean += b[:, ranks[k] :] @ a[ranks[k] :] / 3
        assert off(found, mean if Fact.WRITABLE_BASE in stage.traits.needs else cut(mean, RANK)) < 1e-12


def test_the_residual_leaves_the_means_of_the_factors() -> None:
    round = a_round(LoraResidual())
    for name, leaf in round.result().items():
        assert off(leaf, sum(leaves[name] for leaves in counted(round)) / 3) < 1e-12  # type: ignore[arg-type]


def test_merging_begins_anew_whoever_is_lost() -> None:
    found = a_round(LoraMerge()).result()
    assert not any(found[f"{layer}.lora_B"].any() for layer in LAYERS)


def test_merging_sends_no_slot_for_a_lost_client_where_the_product_was_zero() -> None:
    round = a_round(LoraMerge())
    start = {name: torch.zeros_like(leaf) if name.endswith("B") else leaf for name, leaf in round.server.items()}
    base_delta = replace(round, server=start).total().parts["base_delta"].tree
    assert {len(leaf) for name, leaf in base_delta.items() if name.endswith("A")} == {2 * RANK}


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_the_corrected_b_solves_its_least_squares_problem(penalty: float) -> None:
    """min_D ||P - (B + D) A||^2 + penalty ||D||^2 as one system: [A^T; sqrt(penalty) I] D^T = [(P - B A)^T; 0]."""
    round = a_round(LoraFair(penalty))
    found = round.result()
    for layer in LAYERS:
        b, a = (sum(leaves[name] for leaves in counted(round)) / 3 for name in (f"{layer}.lora_B", f"{layer}.lora_A"))
        gap = sum(product(leaves, layer) for leaves in counted(round)) / 3 - b @ a  # type: ignore[operator]
        left = torch.cat([a.T, penalty**0.5 * torch.eye(RANK).double()])  # type: ignore[union-attr]
        right = torch.cat([gap.T, torch.zeros(RANK, len(gap)).double()])
        step = torch.linalg.lstsq(left, right).solution.T
        assert off(found[f"{layer}.lora_A"], a) < 1e-12 and off(found[f"{layer}.lora_B"], b + step) < 1e-10  # type: ignore[arg-type, operator]


def test_padding_counts_zeros_for_who_answers_without_a_component_and_the_old_one_for_who_is_lost() -> None:
    round = a_round(LoraPad(), (2, 3, 4))
    found = round.result()
    for name in (name for name in found if low_rank.is_factor(name)):
        for j in range(RANK):
            at = [leaves[name].select(low_rank.component_axis(name), j) for leaves in counted(round)[j >= 2 :]]
            assert off(found[name].select(low_rank.component_axis(name), j), sum(at) / 3) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((LoraPrune(), COHORT), "lora_prune divides by .* answered, but uniform divides by .* drawn; set"),
        ((LoraPad("contributors"), COHORT), "lora_pad divides by .* answered, but uniform divides by .* drawn; set"),
        (
            (LoraStack("contributors"), COHORT),
            "lora_stack divides by .* answered, but uniform divides by .* drawn",
        ),
    ],
)
def test_what_divides_by_those_who_answered_is_refused(stages: tuple[Stage, ...], message: str) -> None:
    with pytest.raises(CheckError, match=message):
        check(of(*stages))
    check(of(stages[0], Uniform()))


def test_every_stage_on_factors_is_here_or_refused() -> None:
    """A stage that is new says in which of the two ways it counts a lost client."""
    mean_of_steps = SparseFirst  # it adds a mean of steps to what the server has, as FedAvg does
    seen = {mean_of_steps, *(type(stage) for stage in (*EVERY, LoraPrune()))}
    stages = [case.stage for case in CASES.values()]
    on_factors = {type(stage) for stage in stages if {Fact.BOTH_TRAIN, Fact.SHAPE} & set(stage.traits.needs)}
    assert on_factors - seen == {LoraCap}
