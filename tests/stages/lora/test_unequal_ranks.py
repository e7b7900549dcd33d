"""Clients of unequal ranks: the server's factors against closed forms, on layers that are not square."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedllm.data.partitioners.by import By
from fedllm.data.shards import Shards
from fedllm.engines.batched.engine import Batched
from fedllm.engines.remote.ray import RayActors
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, RunError
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.experiment.record import Demands, Experiment, Limits
from fedllm.messages import serialization
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.traits import Fact
from fedllm.models.adapters.weights import Full
from fedllm.models.task import Scope
from fedllm.rng import Key
from fedllm.runs import launch
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.scaffold import Scaffold
from fedllm.stages.lora.bandwidth_cap import LoraCap
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.prune import LoraPrune
from fedllm.stages.lora.stack import LoraStack
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.round_trip import broadcast_all
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import low_rank, tree
from tests.doubles.kept import Kept
from tests.engines.cohort import experiment, in_pieces, write_records
from tests.stages.lora.one_round import EXAMPLES, LAYERS, RANKS, WEIGHTS, Round, a_round, drawn, off, product


def mean_of_products(round: Round, layer: str) -> Tensor:
    return sum(p * product(leaves, layer) for p, leaves in zip(WEIGHTS, round.after, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("layer", LAYERS)
def test_flexlora_is_the_truncated_svd_of_the_mean_of_the_products(layer: str) -> None:
    round = a_round(LoraStack())
    found, mean = round.result(), mean_of_products(round, layer)
    u, s, v = torch.linalg.svd(mean, full_matrices=False)
    for rank in RANKS:  # what a client of this rank is sent
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert off(product(low_rank.sliced(found, rank), layer), best) < 1e-6
        left = float((mean - product(low_rank.sliced(found, rank), layer)).norm())
        assert left == pytest.approx(float(s[rank:].norm()), rel=1e-6), "Eckart and Young"
    b, a = low_rank.pair(found, layer)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-5), "both have the roots of the singular values"


@pytest.mark.parametrize("layer", LAYERS)
def test_flexlora_of_all_ranks_together_is_exact(layer: str) -> None:
    """With room for 4 + 8 + 16 components nothing is cut off."""
    round = replace(a_round(LoraStack()), server=drawn(28, 0))
    assert off(product(round.result(), layer), mean_of_products(round, layer)) < 1e-6


class DividedTwice(LoraStack):
    """Weighs the columns, too."""

    def encode(self, update, scratch, memory, local):
        update, memory = super().encode(update, scratch, memory, local)
        return update.having("columns", replace(update.parts["columns"], weight=None)), memory


class Transposed(LoraStack):
    """Takes the columns for those of another client."""

    def decode(self, total, params, state, ctx):
        columns = total.parts["columns"]
        turned = {name: leaf.roll(16, 0) for name, leaf in columns.tree.items()}
        return super().decode(total.having("columns", replace(columns, tree=turned)), params, state, ctx)


@pytest.mark.parametrize("broken", [DividedTwice(), Transposed()])
def test_a_stack_that_is_wrong_is_caught(broken: Stage) -> None:
    round = replace(a_round(broken), server=drawn(28, 0))
    assert off(product(round.result(), "down"), mean_of_products(round, "down")) > 0.1


@pytest.mark.parametrize("layer", LAYERS)
def test_raflora_counts_each_component_over_those_who_have_it(layer: str) -> None:
    round = a_round(LoraStack("contributors"))
    mean = torch.zeros(LAYERS[layer], dtype=torch.float64)
    for low, high in ((0, 4), (4, 8), (8, 16)):  # partitions of the ranks
        having = [k for k, rank in enumerate(RANKS) if rank >= high]
        for k in having:
            b, a = (leaf.double() for leaf in low_rank.pair(round.after[k], layer))
            mean += WEIGHTS[k] / sum(WEIGHTS[j] for j in having) * b[:, low:high] @ a[low:high]
    u, s, v = torch.linalg.svd(mean, full_matrices=False)
    assert off(product(round.result(), layer), (u[:, :16] * s[:16]) @ v[:16]) < 1e-6


@pytest.mark.parametrize("mean", ["padded", "contributors"])
@pytest.mark.parametrize("name", ["q.lora_A", "q.lora_B", "down.lora_A", "down.lora_B"])
def test_padding_by_hand(mean: str, name: str) -> None:
    round = a_round(LoraPad(mean))  # type: ignore[arg-type]
    found = round.result()[name]
    found = found.T if name.endswith("B") else found
    for j in range(16):
        having = [k for k, rank in enumerate(RANKS) if rank > j]
        whole = sum(WEIGHTS[k] for k in having) if mean == "contributors" else 1
        leaves = {k: round.after[k][name].double() for k in having}
        components = {k: leaf[:, j] if name.endswith("B") else leaf[j] for k, leaf in leaves.items()}
        expected = sum(WEIGHTS[k] / whole * component for k, component in components.items())
        assert off(found[j], expected) < 1e-6  # type: ignore[arg-type]


def test_zero_padding_is_not_the_mean_of_the_products() -> None:
    round = a_round(LoraPad())
    assert off(product(round.result(), "q"), mean_of_products(round, "q")) > 0.1


def test_a_component_that_nobody_has_stands_or_goes() -> None:
    few = Round(drawn(16, 0), [drawn(4, 1), drawn(4, 2)], LoraPad("contributors"), (1, 2))
    assert torch.equal(few.result()["q.lora_A"][4:], few.server["q.lora_A"][4:])
    assert not replace(few, stage=LoraPad()).result()["q.lora_A"][4:].any()


@pytest.mark.parametrize("stage", [LoraPad(), LoraStack()])
def test_bytes_are_those_of_the_clients_own_ranks(stage: Stage) -> None:
    round, sizes = a_round(stage), sum(size_out + size_in for size_out, size_in in LAYERS.values())
    for k, rank in enumerate(RANKS):
        held = serialization.part_bytes(round.sent(k))
        marks = held.pop("holders")
        assert sum(held.values()) == 4 * rank * sizes, "rank x (in + out) float32 a layer"
        assert marks <= 4 * 16 * 2 * len(LAYERS)
        ctx = RoundContext(0, Key(0), 3, 3, client=str(k), profile=Profile(rank=rank))
        params, _ = broadcast_all(round.pipeline(), round.server, ({}, {}), ctx)
        assert tree.num_bytes(params) == 4 * rank * sizes


@pytest.mark.parametrize("stage", [LoraPad(), LoraPad("contributors"), LoraStack(), LoraStack("contributors")])
def test_the_order_of_the_clients_does_not_matter(stage: Stage) -> None:
    round = a_round(stage)
    turned = replace(round, after=round.after[::-1], examples=EXAMPLES[::-1])
    for layer in LAYERS:
        assert off(product(turned.result(), layer), product(round.result(), layer)) < 1e-5


def energy_above(stage: Stage, rank: int = 2, rounds: int = 20) -> float:
    """The share of the global product's energy beyond the smallest rank, where all clients pull towards one target.

    The target has eight components of one size; a client moves its product a third of the way to the best that its rank
    can hold.
    """
    generator = torch.Generator().manual_seed(3)
    b, a, left, right = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (40, 24, 40, 24))
    target = torch.linalg.qr(left)[0] @ torch.linalg.qr(right)[0].T
    server, eye = low_rank.layer_leaves("w", 0.1 * b, 0.1 * a.T), torch.eye(24).double()
    for _ in range(rounds):
        after = []
        for own in (rank, rank, rank, rank, 8):
            b, a = low_rank.pair(low_rank.sliced(server, own), "w")
            pulled = torch.cat([b * 2 / 3, target / 3], 1), torch.cat([a, eye])
            after.append(low_rank.layer_leaves("w", *low_rank.truncated(*pulled, own, "w")))
        server = Round(server, after, stage, (1,) * 5).result()
    values = torch.linalg.svdvals(product(server, "w")).square()
    return float(values[rank:].sum() / values.sum())


def test_raflora_keeps_energy_above_the_smallest_rank_that_flexlora_loses() -> None:
    flex, ra = energy_above(LoraStack()), energy_above(LoraStack("contributors"))
    assert ra > 1.5 * flex, (ra, flex)


# Whole runs.

PROFILES = {"ann": Profile(rank=4), "ben": Profile(rank=1), "c*": Profile(rank=2), "dot": Profile(rank=3)}
CAPPED = {"ann": Profile(bandwidth=20_000), "b*": Profile(2, bandwidth=8_000), "c*": Profile(2), "*": Profile(3)}
TRIPS = {
    "zero padding": (LoraPad(), ByExamples()),
    "rbla": (LoraPad("contributors"), ByExamples()),
    "flexlora": (LoraStack(), ByExamples()),
    "raflora": (LoraStack("contributors"), ByExamples()),
    "hetlora": (LoraPrune(gamma=0.5, penalty=0.2), ByExamples()),
    "haflq": (LoraPad("contributors"), ByExamples(), LoraCap()),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


def made(data: Path, *stages: Stage, rounds: int = 3, **settings) -> Experiment:
    profiles = CAPPED if any(Fact.FITTED in stage.traits.gives for stage in stages) else PROFILES
    federation = Shards(str(data), partition=By("who"), heldout=0.0, profiles=profiles)
    return experiment(data, stages=stages, rounds=rounds, limits=Limits(keep_last=9), federation=federation, **settings)


@pytest.mark.parametrize("method", TRIPS)
def test_stacks_give_the_same(method: str, data: Path, tmp_path: Path) -> None:
    """Of clients of unequal ranks."""
    exp = made(data, *TRIPS[method], rounds=2)
    serial = launch.run(exp, engine=Serial(), out=tmp_path / "serial")
    batched = launch.run(exp, engine=Batched(stack=3), out=tmp_path / "batched")
    for layer in low_rank.layers(serial.params):
        assert off(product(dict(batched.params), layer), product(dict(serial.params), layer)) < 1e-9


@pytest.mark.parametrize("method", ["hetlora", "haflq"])
def test_ray_gives_the_same(method: str, data: Path, tmp_path: Path, ray_actors: RayActors) -> None:
    """Ranks that clients remember, and picked components; the others send what these do."""
    exp = made(data, *TRIPS[method], rounds=2)
    serial = launch.run(exp, engine=Serial(), out=tmp_path / "serial").params
    assert tree.equal(dict(launch.run(exp, engine=Kept(ray_actors), out=tmp_path / "ray").params), dict(serial))


def test_a_run_resumes_to_the_bit(data: Path, tmp_path: Path) -> None:
    """Of the method whose clients remember their ranks; of all: tests/papers/test_presets_everywhere.py."""
    exp = made(data, *TRIPS["hetlora"])
    whole = launch.run(exp, engine=Serial(), out=tmp_path / "whole").params
    assert tree.equal(dict(in_pieces(exp, tmp_path / "cut").params), dict(whole))


@pytest.mark.parametrize(
    ("stages", "settings", "message"),
    [
        ((LoraStack(), Uniform()), {"demands": Demands(secrecy=True)}, "nothing but sums, but lora_stack shows it"),
        (
            (LoraStack(), Uniform()),
            {"adapter": Full()},
            "lora_stack works on lora_A and lora_B of each layer, but task.adapter is full",
        ),
        (
            (Keep(("*.layers.0.*",)), LoraStack(), Uniform()),
            {},
            "lora_stack works on both factors of every layer, but keep keeps tensors",
        ),
    ],
)
def test_what_cannot_be_is_refused(data: Path, stages, settings, message: str) -> None:
    with pytest.raises(CheckError, match=message):
        check(made(data, *stages, **settings))


@pytest.mark.parametrize(("key", "pattern"), [("freeze", ("*lora_A",)), ("alternate", ("*lora_A", "*lora_B"))])
def test_a_factor_that_stands_still_is_refused(data: Path, key: str, pattern: tuple[str, ...]) -> None:
    exp = made(data, LoraStack(), Uniform())
    with pytest.raises(CheckError, match=f"lora_stack works on both factors of lora, but task.scope.{key}"):
        check(replace(exp, task=replace(exp.task, scope=Scope(**{key: pattern}))))


@pytest.mark.parametrize(
    ("stages", "profile", "scope", "message"),
    [
        (
            (LoraPad(), Uniform()),
            Profile(rank=5),
            Scope(),
            "client b has rank 5, above the rank 4 of task.adapter; raise",
        ),
        ((LoraPad(), Uniform()), Profile(rank=2), Scope(freeze=("*lora_A",)), "task.scope.freeze holds"),
        (
            (Keep(("*lora_B",)), LoraPad(), Uniform()),
            Profile(rank=2),
            Scope(),
            "keep holds tensors at the adapter's rank",
        ),
        ((LoraPad(), Scaffold(), Uniform()), Profile(rank=2), Scope(), "scaffold makes the part 'control'"),
    ],
)
def test_unequal_ranks_that_cannot_be_are_refused(data: Path, stages, profile, scope, message: str) -> None:
    exp = made(data, *stages)
    with pytest.raises(CheckError, match=message):
        check_profiles(replace(exp, task=replace(exp.task, scope=scope)), {"a": Profile(), "b": profile})


def test_an_svd_of_nan_is_refused_by_name() -> None:
    spoilt = a_round(LoraStack())
    spoilt.after[1]["down.lora_A"][3, 5] = math.nan
    with pytest.raises(RunError, match=r"round 0, down: the sum of the clients' products holds values that"):
        spoilt.result()
