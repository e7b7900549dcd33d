"""FedSVD: lora_A is held still on the clients and turned on the server; written out, and with noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedllm.data.partitioners.by import By
from fedllm.data.shards import Shards
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, RunError
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.experiment.record import Experiment
from fedllm.messages.context import Profile, RoundContext
from fedllm.models.adapters.weights import Full
from fedllm.models.batch import collate
from fedllm.models.loaded_model import load
from fedllm.models.task import Scope
from fedllm.runs import launch
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.svd import LoraSvd
from fedllm.stages.server_optimizers.adam import Adam
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import low_rank, tree
from fedllm.tensors.tree import Tree
from tests.engines.cohort import ADAMW, CLIENTS, SGD, SIZES, in_pieces, write_records
from tests.papers.test_lora_scopes import ROUNDS, bias, course, fresh, kinds, made
from tests.stages.lora.test_unequal_ranks import LAYERS, WEIGHTS, Round, drawn, off, product

HOLD = Scope(hold=("*lora_A",))
STAGES = (LoraSvd(), ByExamples())
PLAIN = replace(SGD, momentum=0.0, lr=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


# The turn itself.


@pytest.mark.parametrize("rank_of_b", [0, 3, 8])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_product_stays_and_a_is_orthonormal(
    dtype: torch.dtype, tolerance: float, layer: str, rank_of_b: int
) -> None:
    b, a = (leaf.to(dtype) for leaf in low_rank.pair(drawn(8, 1), layer))
    b = b * (torch.arange(8) < rank_of_b)
    new_b, new_a = low_rank.orthonormal(b, a, layer)
    before = b.double() @ a.double()
    assert (new_b.double() @ new_a.double() - before).norm() <= tolerance * max(float(before.norm()), 1e-30)
    assert (new_a @ new_a.T - torch.eye(8)).abs().max() < 10 * tolerance
    again_b, again_a = low_rank.orthonormal(new_b, new_a, layer)
    assert off(again_b @ again_a, new_b.double() @ new_a.double()) < 2 * tolerance or rank_of_b == 0
    sizes = new_b.norm(dim=0)
    assert torch.allclose(sizes, torch.linalg.svdvals(before)[:8].to(dtype), atol=100 * tolerance), "B is U S"


# Whole runs.


def whole(leaves: Mapping[str, Tensor]) -> Tree:
    """The product of each layer."""
    return {layer: product(dict(leaves), layer) for layer in low_rank.layers(leaves)}


def test_b_alone_is_sent_and_a_is_orthonormal_and_another_in_each_round(data: Path, tmp_path: Path) -> None:
    exp = made(data, HOLD, stages=STAGES)
    params, sent = course(exp, tmp_path / "run")
    for round, replies in sent.items():
        assert all(kinds(deltas) == {"lora_B"} for deltas in replies.values())
        for name, leaf in params[round + 1].items():
            if name.endswith("lora_A"):
                assert (leaf @ leaf.T - torch.eye(len(leaf))).abs().max() < 1e-12
                assert float((leaf - params[round][name]).norm()) > 1e-3
    out = sum(leaf.shape[0] for name, leaf in params[0].items() if name.endswith("lora_B"))
    assert tree.num_values(sent[0]["ann"]) == 4 * out, "rank times the sum of the layers' outputs"


def test_the_mean_is_exact(data: Path, tmp_path: Path) -> None:
    exp = made(data, HOLD, stages=STAGES)
    params, sent = course(exp, tmp_path / "run")
    assert all(bias(params[round], fresh(exp), sent[round]) < 1e-12 for round in range(ROUNDS))
    for round in range(ROUNDS):
        for layer, found in whole(params[round + 1]).items():
            b, a = low_rank.pair(params[round], layer)
            each = [SIZES[client] * (b + sent[round][client][f"{layer}.lora_B"]) @ a for client in CLIENTS]
            assert off(found, sum(each) / sum(SIZES.values())) < 1e-12  # type: ignore[arg-type]


def textbook(exp: Experiment, *, turned: bool = True) -> list[Tree]:
    """Products after each round: plain descent on B, the mean, and the SVD of whole products; or A is made orthonormal
    once and stands still."""
    model, train = load(exp.task), exp.federation.load(exp.key).train
    start, after = fresh(exp), []
    a = {name: leaf for name, leaf in start.items() if name.endswith("lora_A")}
    b = {name: leaf for name, leaf in start.items() if name.endswith("lora_B")}
    for round in range(ROUNDS):
        total = tree.zeros_like(b)
        for slot, client in enumerate(CLIENTS):
            examples = [e for record in train[client] if (e := model.encode(record, 48)) is not None]
            ctx, own = RoundContext(round, exp.key, len(CLIENTS), len(CLIENTS), ROUNDS, client, slot), dict(b)
            for (chosen,) in exp.work.plan(len(examples), ctx):
                leaves = {name: leaf[None].clone().requires_grad_() for name, leaf in own.items()}
                still = {name: leaf[None] for name, leaf in a.items()}
                loss = model.losses({**still, **leaves}, collate([[examples[index] for index in chosen]])).sum()
                gradients = torch.autograd.grad(loss, list(leaves.values()))
                own = {n: leaf - 0.5 * gradient[0] for (n, leaf), gradient in zip(own.items(), gradients, strict=True)}
            total = tree.add(total, own, SIZES[client] / sum(SIZES.values()))
        b = total
        after.append(whole({**a, **b}))
        if turned or round == 0:
            for layer, mean in after[-1].items():
                u, s, v = torch.linalg.svd(mean, full_matrices=False)
                b[f"{layer}.lora_B"], a[f"{layer}.lora_A"] = u[:, :4] * s[:4], v[:4]
    return after


def apart(one: Sequence[Tree], other: Sequence[Tree]) -> float:
    return max(tree.norm(tree.sub(x, y)) / tree.norm(y) for x, y in zip(one, other, strict=True))


def test_it_is_the_textbook_loop(data: Path, tmp_path: Path) -> None:
    exp = made(data, HOLD, PLAIN, STAGES)
    params, _ = course(exp, tmp_path / "run")
    found = [whole(leaves) for leaves in params[1:]]
    assert apart(found, textbook(exp)) < 1e-10
    plain, _ = course(made(data, HOLD, PLAIN), tmp_path / "plain")
    assert apart([whole(leaves) for leaves in plain[1:]], found) > 1e-3, "an A that is not orthonormal goes elsewhere"


def test_under_plain_descent_turning_a_within_its_span_changes_no_product(data: Path, tmp_path: Path) -> None:
    """B' = B R^T, A' = R A with orthogonal R: the gradient of B turns alike."""
    exp = made(data, HOLD, PLAIN, STAGES)
    assert apart(textbook(exp), textbook(exp, turned=False)) < 1e-10
    params, _ = course(exp, tmp_path / "run")
    for name, leaf in params[-1].items():
        if name.endswith("lora_A"):
            span = torch.linalg.qr(params[0][name].T)[0]
            assert off(leaf @ span @ span.T, leaf) < 1e-12


def test_clients_of_unequal_ranks_move_the_first_columns_of_b(data: Path, tmp_path: Path) -> None:
    """Beside lora_pad: the components are the largest ones, and the mean stays that of the products."""
    profiles = {"ann": Profile(rank=4), "ben": Profile(rank=1), "c*": Profile(rank=2), "dot": Profile(rank=3)}
    exp = made(data, HOLD, stages=(LoraSvd(), LoraPad(), ByExamples()))
    exp = replace(exp, federation=Shards(str(data), partition=By("who"), heldout=0.0, profiles=profiles))
    check_profiles(exp, {client: exp.federation.profile(client) for client in CLIENTS})
    params, sent = course(exp, tmp_path / "run")
    ranks = {client: exp.federation.profile(client).rank or 4 for client in CLIENTS}
    for round in range(ROUNDS):
        for layer, found in whole(params[round + 1]).items():
            b, a = low_rank.pair(params[round], layer)
            each = [
                SIZES[client] * (b + sent[round][client][f"{layer}.lora_B"])[:, : ranks[client]] @ a[: ranks[client]]
                for client in CLIENTS
            ]
            assert off(found, sum(each) / sum(SIZES.values())) < 1e-12  # type: ignore[arg-type]


def test_with_other_stages_stacks_give_the_same_and_a_run_resumes(data: Path, tmp_path: Path) -> None:
    """To the bit from every round; without them, and with Ray: tests/papers/test_presets_everywhere.py."""
    exp = made(data, HOLD, stages=(LoraSvd(), Prox(0.1), Uniform(), Quantize(8)))
    serial = launch.run(exp, engine=Serial(), out=tmp_path / "serial").params
    batched = launch.run(exp, engine=Batched(stack=3), out=tmp_path / "batched").params
    assert tree.norm(tree.sub(whole(batched), whole(serial))) < 1e-9 * tree.norm(whole(serial))
    assert tree.equal(dict(in_pieces(exp, tmp_path / "cut").params), dict(serial))


# Noise: what is sent is made noisy by a double, and the product of the server's factors is off by so much.


@dataclass(frozen=True)
class Noisy(Stage):
    """Adds noise of one size to each value that is sent."""

    sigma: float = 0.0
    sends: str = "*"

    def encode(self, update, scratch, memory, local):
        part, generator = update.parts["delta"], local.ctx.rng("noise")
        sent = {name: leaf for name, leaf in part.tree.items() if tree.matches(name, [self.sends])}
        noisy = {n: x + self.sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype) for n, x in sent.items()}
        return update.having("delta", replace(part, tree=noisy)), memory


class NoisySvd(Noisy, LoraSvd):
    """And turns the result."""


def squared_error(stage: Noisy, server: Tree, layer: str) -> float:
    """Of the product after a round in which nobody learned anything: all of it is noise."""
    noisy = Round(server, [server] * 3, stage).result()
    return float((product(noisy, layer) - product(server, layer)).square().sum())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
def test_at_equal_noise_the_product_is_nearer_than_that_of_lora(sigma: float, layer: str) -> None:
    """Of noise s on the means: s² rank out for B on an orthonormal A; for both factors s² (in ||B||² + out ||A||²) +
    s⁴ rank in out. With s² in >= 1 the second is the larger one whatever the factors are."""
    start = tree.map_leaves(Tensor.double, drawn(8, 1))
    turned = dict(start)
    for name in LAYERS:
        turned |= low_rank.layer_leaves(name, *low_rank.orthonormal(*low_rank.pair(start, name), name))
    size_out, size_in = LAYERS[layer]
    b, a = low_rank.pair(start, layer)
    s = sigma**2 * sum(weight**2 for weight in WEIGHTS)
    by_hand = s * (size_in * b.square().sum() + size_out * a.square().sum()) + s**2 * 8 * size_in * size_out
    lora = squared_error(Noisy(sigma), start, layer)
    svd = squared_error(NoisySvd(sigma, "*lora_B"), turned, layer)
    assert lora == pytest.approx(float(by_hand), rel=0.1)
    assert svd == pytest.approx(s * 8 * size_out, rel=0.1)
    assert svd < 0.1 * lora


# What cannot be.


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (Scope(freeze=("*lora_A",)), r"lora_svd works on both factors of lora, but task\.scope\.freeze"),
        (
            Scope(alternate=("*lora_A", "*lora_B")),
            r"lora_svd works on both factors of lora, but task\.scope\.alternate",
        ),
        (
            Scope(share=("*lora_A",)),
            r"lora_svd works on both .*, but keep \(task.scope.share asks for it\) keeps tensors on the client",
        ),
    ],
)
def test_factors_that_the_server_lacks_are_refused(scope: Scope, message: str, data: Path) -> None:
    with pytest.raises(CheckError, match=message):
        check(made(data, scope, stages=STAGES))
    check(made(data, HOLD, stages=STAGES))


@pytest.mark.parametrize("stages", [(Adam(), LoraSvd(), Uniform()), (LoraSvd(), Adam(), Uniform())])
def test_moments_of_entries_that_turn_are_refused_wherever_they_stand(stages: tuple[Stage, ...], data: Path) -> None:
    message = (
        "adam is right only while .* but lora_svd writes .* list lora_product in place of lora_svd and before adam"
    )
    with pytest.raises(CheckError, match=message):
        check(made(data, HOLD, stages=stages))


def test_another_adapter_is_refused(data: Path) -> None:
    exp = made(data, Scope(), stages=STAGES)
    with pytest.raises(CheckError, match=r"lora_svd works .*, but task\.adapter is full, which has none; use lora"):
        check(replace(exp, task=replace(exp.task, adapter=Full())))


@pytest.mark.parametrize(
    ("hold", "message"),
    [
        ("*", r"task\.scope\.hold leaves nothing to train; name fewer tensors"),
        ("*lora_C", r"task\.scope\.hold: '\*lora_C' fits no tensor"),
    ],
)
def test_what_cannot_be_held_is_refused(hold: str, message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=message):
        launch.run(made(data, Scope(hold=(hold,)), ADAMW, STAGES), out=tmp_path / "run")


def test_a_mean_that_is_not_finite_names_the_round_and_the_layer() -> None:
    spoilt = Round(drawn(8, 0), [drawn(8, seed) for seed in (1, 2, 3)], LoraSvd())
    spoilt.after[1]["down.lora_B"][3, 5] = math.nan
    with pytest.raises(RunError, match=r"round 0, down: the sum of the clients' products holds values that are not"):
        spoilt.result()
