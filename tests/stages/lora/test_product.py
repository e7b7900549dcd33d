"""Dense products in place of factors: FlexLoRA to the last digits, and optimisers on the mean of the products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedllm.aggregators.sum import Sum
from fedllm.data.partitioners.by import By
from fedllm.data.shards import ClientOutage, Shards
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, RunError
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.experiment.record import Experiment, Limits
from fedllm.messages import serialization
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.traits import Fact
from fedllm.rng import Key
from fedllm.runs import launch, server_round
from fedllm.runs.checkpoints import Checkpoints
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.product import LoraProduct
from fedllm.stages.lora.stack import LoraStack
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.round_trip import decode_all
from fedllm.stages.server_optimizers.adam import Adam
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import low_rank, tree
from fedllm.tensors.tree import Tree
from tests.engines.cohort import experiment, in_pieces, write_records
from tests.stages.lora.test_unequal_ranks import LAYERS, RANKS, WEIGHTS, Round, a_round, drawn, off, product

FORMS = ("update", "product")
EQUAL = [drawn(8, seed) for seed in (1, 2, 3)]


def wide(round: Round) -> Round:
    """In float64."""
    server, *after = (tree.map_leaves(Tensor.double, leaves) for leaves in (round.server, *round.after))
    return replace(round, server=server, after=after)


def equal_ranks(stage: Stage) -> Round:
    return wide(Round(drawn(8, 0), EQUAL, stage))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_alone_it_is_flexlora(form: str, layer: str) -> None:
    """Factors, not products alone: both have the roots of the singular values and one sign."""
    found, stack = (equal_ranks(stage).result() for stage in (LoraProduct(form), LoraStack()))  # type: ignore[arg-type]
    for one, other in zip(low_rank.pair(found, layer), low_rank.pair(stack, layer), strict=True):
        assert off(one, other) < 1e-9


@pytest.mark.parametrize("layer", LAYERS)
def test_products_of_unequal_ranks_are_flexlora(layer: str) -> None:
    found, stack = (wide(a_round(stage)).result() for stage in (LoraProduct("product"), LoraStack()))
    assert off(product(found, layer), product(stack, layer)) < 1e-9


@pytest.mark.parametrize("layer", LAYERS)
def test_updates_of_unequal_ranks_leave_what_a_client_lacks(layer: str) -> None:
    round = wide(a_round(LoraProduct()))
    whole = product(round.server, layer)
    for weight, rank, leaves in zip(WEIGHTS, RANKS, round.after, strict=True):
        whole = whole + weight * (product(leaves, layer) - product(low_rank.sliced(round.server, rank), layer))
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    assert off(product(round.result(), layer), (u[:, :16] * s[:16]) @ v[:16]) < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_its_bytes_are_those_of_the_layers(form: str) -> None:
    held = serialization.part_bytes(a_round(LoraProduct(form)).sent(0))  # type: ignore[arg-type]
    assert held == {"delta": 4 * sum(size_out * size_in for size_out, size_in in LAYERS.values())}


# Optimisers behind it act on the mean of the products.


def rounds_of(stages: Sequence[Stage], server: Tree, courses: Sequence[Sequence[Tree]]) -> tuple[Tree, Sequence[Tree]]:
    """The server after rounds in which the clients' factors end where `courses` says, and the stages' states."""
    states: Sequence[Tree] = [{} for _ in stages]
    for index, after in enumerate(courses):
        one = Round(server, after, stages[0])
        ctx = RoundContext(index, Key(0), len(after), len(after))
        total = Sum().reduce(lambda name, requests, one=one: ((str(k), one.sent(k)) for k in range(3)), {})
        total, states = decode_all(stages, total, server, states, ctx)
        server = tree.add(server, total.parts["delta"].tree)
    return server, states


def courses() -> list[list[Tree]]:
    """Of three rounds. Factors in float64."""
    seeds = ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    return [[tree.map_leaves(Tensor.double, drawn(8, seed)) for seed in row] for row in seeds]


def cut(whole: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    return (u[:, :8] * s[:8]) @ v[:8]


def mean_update(after: Sequence[Tree], old: Tensor, layer: str) -> Tensor:
    updates = (w * (product(leaves, layer) - old) for w, leaves in zip(WEIGHTS, after, strict=True))
    return sum(updates)  # type: ignore[return-value]


@pytest.mark.parametrize("layer", LAYERS)
def test_momentum_acts_on_the_mean_of_the_products(layer: str) -> None:
    start = tree.map_leaves(Tensor.double, drawn(8, 0))
    stages = (LoraProduct(), Momentum(beta=0.5, server_lr=2.0), ByExamples())
    found, states = rounds_of(stages, start, courses())
    old, velocity = product(start, layer), torch.zeros(LAYERS[layer], dtype=torch.float64)
    for after in courses():
        velocity = 0.5 * velocity + 0.5 * mean_update(after, old, layer)
        old = cut(old + 2 * velocity)
    assert off(product(found, layer), old) < 1e-9
    assert states[1].keys() == {f"{name}.lora_BA" for name in LAYERS}
    assert off(states[1][f"{layer}.lora_BA"], velocity) < 1e-9, "the velocity has the shape of the layer"


@pytest.mark.parametrize("layer", LAYERS)
def test_adam_acts_on_the_mean_of_the_products(layer: str) -> None:
    start = tree.map_leaves(Tensor.double, drawn(8, 0))
    stages = (LoraProduct(), Adam(beta1=0.5, beta2=0.9, tau=0.01, server_lr=0.05), ByExamples())
    found, _ = rounds_of(stages, start, courses())
    old, m, v = product(start, layer), 0.0, 0.01**2
    for after in courses():
        step = mean_update(after, old, layer)
        m, v = 0.5 * m + 0.5 * step, 0.9 * v + 0.1 * step**2
        old = cut(old + 0.05 * m / (v**0.5 + 0.01))
    assert off(product(found, layer), old) < 1e-9


# Whole runs.

PIPELINES: Mapping[str, tuple[Stage, ...]] = {
    "product": (LoraProduct("product"), ByExamples()),
    "behind": (LoraProduct(), Adam(server_lr=0.01), Prox(0.1), TopK(0.3), Uniform()),
}
PROFILES = {"ann": Profile(rank=4), "ben": Profile(rank=1), "c*": Profile(rank=2), "dot": Profile(rank=3)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


def made(data: Path, *stages: Stage, **settings) -> Experiment:
    federation = Shards(str(data), partition=By("who"), heldout=0.0, profiles=PROFILES, **settings)
    return experiment(data, stages=stages, rounds=3, limits=Limits(keep_last=9), federation=federation)


@pytest.mark.parametrize("pipeline", ["product", "behind"])
def test_stacks_give_the_same_and_a_run_resumes(pipeline: str, data: Path, tmp_path: Path) -> None:
    """To the bit from every round. The plain pipeline, and Ray: tests/conformance."""
    exp = made(data, *PIPELINES[pipeline])
    serial = launch.run(exp, engine=Serial(), out=tmp_path / "serial").params
    batched = launch.run(exp, engine=Batched(stack=3), out=tmp_path / "batched").params
    for layer in low_rank.layers(serial):
        assert off(product(dict(batched), layer), product(dict(serial), layer)) < 1e-9
    assert tree.equal(dict(in_pieces(exp, tmp_path / "cut").params), dict(serial))


def test_a_round_that_nobody_answers_moves_nothing(data: Path, tmp_path: Path) -> None:
    """Neither the factors, which a cut would write anew, nor the optimiser's state on products."""
    lost = tuple(ClientOutage(who, 1) for who in ("ann", "ben", "cid", "dot", "eve"))
    exp = made(data, LoraProduct(), Momentum(), ByExamples(), failures=lost)
    launch.run(exp, engine=Serial(), out=tmp_path / "run")
    saved = Checkpoints(tmp_path / "run" / "checkpoints", 9)
    before, after, end = (saved.load(round) for round in (1, 2, 3))
    assert before is not None and after is not None and end is not None
    assert tree.equal(before.params, after.params) and not tree.equal(after.params, end.params)
    assert all(map(tree.equal, before.states, after.states))
    assert all(name.endswith("lora_BA") for name in after.states[1])


def test_an_empty_total_has_no_leaves_where_another_shape_is_sent(data: Path) -> None:
    exp = made(data, LoraProduct(), ByExamples())
    run = server_round.initial_state(exp, drawn(4, 0))
    everyone = RoundContext(0, exp.key, 0, 5)
    assert server_round.empty_total(exp, run, everyone).parts["delta"].tree == {}
    plain, one = replace(exp, stages=(ByExamples(),)), replace(run, states=({},))
    assert server_round.empty_total(plain, one, everyone).parts["delta"].tree.keys() == run.params.keys()


def test_a_sum_is_all_that_the_server_sees(data: Path) -> None:
    assert Fact.HIDDEN not in LoraProduct().traits.loses and not LoraProduct().traits.makes
    check(made(data, LoraProduct(), TopK(0.5), Uniform(), Quantize(8)))
    check_profiles(made(data, LoraProduct(), Adam(), Uniform()), {"a": Profile(), "b": Profile(rank=2)})


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Keep(("*lora_B",)), LoraProduct(), Uniform()), "lora_product works on both .*, but keep keeps"),
        (
            (LoraProduct(), Dyn(allow=("momentum",)), Uniform()),
            "dyn compares the update with the local steps, but lora",
        ),
        (
            (Momentum(), LoraProduct(), Uniform()),
            "momentum is right only while .* but lora_product writes .* or put momentum behind lora_product",
        ),
        (
            (LoraProduct(), LoraStack(), Uniform()),
            "lora_stack works on lora_A and lora_B .* lora_product takes them out before it",
        ),
        ((LoraProduct(), LoraPad(), Uniform()), "lora_pad works on lora_A .* lora_product takes them out"),
    ],
)
def test_what_cannot_be_is_refused(data: Path, stages: tuple[Stage, ...], message: str) -> None:
    with pytest.raises(CheckError, match=message):
        check(made(data, *stages))


@pytest.mark.parametrize("form", FORMS)
def test_an_svd_of_nan_is_refused_by_name(form: str) -> None:
    spoilt = a_round(LoraProduct(form))  # type: ignore[arg-type]
    spoilt.after[1]["down.lora_A"][3, 5] = math.nan
    with pytest.raises(RunError, match=r"round 0, down: the sum of the clients' products holds values that"):
        spoilt.result()
