"""FLoRA and FedEx-LoRA: what the clients learned, exactly, and frozen weights that move by it, on every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fedllm.data.partitioners.by import By
from fedllm.data.shards import ClientOutage, Shards
from fedllm.engines import base_model_versions
from fedllm.engines.batched.engine import Batched
from fedllm.engines.client import Site
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, ClientError
from fedllm.events import Diagnosed, Event, MessageSent
from fedllm.experiment.checks.check import check
from fedllm.experiment.record import Demands, Experiment, Limits
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.traits import Fact
from fedllm.messages.update import Request
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.weights import Full
from fedllm.models.base_models.load import materialise
from fedllm.models.layers.base_delta_linear import moved
from fedllm.models.loaded_model import load
from fedllm.models.task import Scope
from fedllm.rng import Key
from fedllm.runs import launch
from fedllm.runs.export import export
from fedllm.runs.loaded_run import open_run
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.lora.merge import LoraMerge
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.residual import LoraResidual
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import low_rank, tree
from fedllm.tensors.base_delta import BaseDelta
from tests.engines.cohort import experiment, in_pieces, write_records
from tests.stages.lora.one_round import LAYERS, WEIGHTS, Round, a_round, drawn, off, product

# The aggregation itself, on layers that are not square, with unequal weights, over the wire.


def mean_of_products(round: Round, layer: str) -> Tensor:
    found = [p * product(leaves, layer) for p, leaves in zip(WEIGHTS, round.after, strict=True)]
    return torch.stack(found).sum(0)


def comes_to(round: Round, layer: str) -> Tensor:
    """What a layer computes with after the round: the product of its factors, and what joins its frozen weight."""
    total = round.total()
    after = tree.add(round.server, total.parts["delta"].tree)
    return product(after, layer) + product(total.parts["base_delta"].tree, layer)


def of_rank(rank: int, stage: Stage) -> Round:
    return Round(drawn(rank, 0), [drawn(rank, seed) for seed in (1, 2, 3)], stage)


@pytest.mark.parametrize("layer", LAYERS)
def test_flora_is_exact_for_unequal_ranks_and_zero_padding_is_not(layer: str) -> None:
    round = a_round(LoraMerge())
    assert off(comes_to(round, layer), mean_of_products(round, layer)) < 1e-6
    assert off(product(a_round(LoraPad()).result(), layer), mean_of_products(round, layer)) > 0.1


@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("layer", LAYERS)
def test_fedex_lora_is_exact_and_goes_on_from_the_means(layer: str, rank: int) -> None:
    round = of_rank(rank, LoraResidual())
    assert off(comes_to(round, layer), mean_of_products(round, layer)) < 1e-6
    for name in low_rank.layer_leaves(layer, *low_rank.pair(round.server, layer)):
        mean = sum(p * leaves[name].double() for p, leaves in zip(WEIGHTS, round.after, strict=True))
        assert off(round.result()[name], mean) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", LAYERS)
def test_the_factored_residual_is_the_dense_one_and_not_its_transpose(layer: str) -> None:
    round = of_rank(8, LoraResidual())
    after = round.result()
    dense = mean_of_products(round, layer) - product(after, layer)
    b, a = (leaf.double() for leaf in low_rank.pair(round.total().parts["base_delta"].tree, layer))
    assert off(b @ a, dense) < 1e-5 and len(a) == 3 * 8
    turned = (b @ a).T.reshape(dense.shape)
    assert off(turned, dense) > 1


def test_clients_that_agree_leave_no_residual() -> None:
    one = drawn(8, 5)
    base_delta = Round(drawn(8, 0), [one] * 3, LoraResidual()).total().parts["base_delta"].tree
    for layer in LAYERS:
        assert float(product(base_delta, layer).norm()) < 1e-6 * float(product(one, layer).norm())


def test_the_stack_is_as_high_as_the_ranks_together() -> None:
    base_delta = a_round(LoraMerge()).total().parts["base_delta"].tree
    for layer, (size_out, size_in) in LAYERS.items():
        b, a = low_rank.pair(base_delta, layer)
        assert b.shape == (size_out, 4 + 8 + 16) and a.shape == (4 + 8 + 16, size_in)


# A frozen weight that moves.


@pytest.mark.parametrize("size", [1e-4, 1.0])
@pytest.mark.parametrize("layer", LAYERS)
def test_two_terms_hold_in_bfloat16_what_one_loses(layer: str, size: float) -> None:
    linear = nn.Linear(*LAYERS[layer][::-1], bias=False).to(torch.bfloat16).requires_grad_(False)
    base_delta = BaseDelta({1: tree.scale(drawn(8, 1), size**0.5)})
    exact = linear.weight.double() + 2.0 * size * product(drawn(8, 1), layer)
    mine = {name: leaf for name, leaf in base_delta.steps[1].items() if name.startswith(layer)}
    found = moved({layer: linear}, [BaseDelta(), BaseDelta({1: mine})], 2.0)
    first, rest = found[f"{layer}.moved"].double(), found[f"{layer}.moved_rest"].double()
    assert found[f"{layer}.moved"].dtype == torch.bfloat16
    assert off(first + rest, exact) < 1e-5 < 1e-4 < off(first, exact)


# Whole runs.

PROFILES = {"ann": Profile(rank=4), "ben": Profile(rank=1), "c*": Profile(rank=2), "dot": Profile(rank=3)}
TRIPS: Mapping[str, tuple[Stage, ...]] = {
    "flora": (LoraMerge(), ByExamples()),
    "fedex_lora": (LoraResidual(), ByExamples()),
    "flora, prox and quantize": (Prox(0.1), LoraMerge(), ByExamples(), Quantize(8)),
}
SIZES = {"q_proj": (64, 64), "down_proj": (64, 192)}  # of tiny-llama's layers, out and in
ADAPTER = Lora(rank=4, alpha=8, targets=tuple(SIZES))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


def made(data: Path, stages: Sequence[Stage], *, lost: Sequence[ClientOutage] = (), **settings) -> Experiment:
    unequal = any(Fact.ONE_SHAPE in stage.traits.gives for stage in stages)
    federation = Shards(
        str(data), partition=By("who"), heldout=0.3, profiles=PROFILES if unequal else {}, failures=tuple(lost)
    )
    settings = {"rounds": 4, "adapter": ADAPTER, "limits": Limits(keep_last=9), **settings}
    return experiment(data, stages=tuple(stages), federation=federation, **settings)


def effective(result: launch.Result) -> tree.Tree:
    """By layer, what its products come to."""
    found = result.base_delta.folded(result.params)
    return {layer: product(found, layer) for layer in low_rank.layers(found)}


@pytest.mark.parametrize("method", ["flora", "flora, prox and quantize"])
def test_stacks_give_the_same(method: str, data: Path, tmp_path: Path) -> None:
    """Of clients of unequal ranks. With Ray they are compared in tests/papers/test_presets_everywhere.py."""
    exp = made(data, TRIPS[method])
    serial = launch.run(exp, engine=Serial(), out=tmp_path / "serial")
    batched = launch.run(exp, engine=Batched(stack=3), out=tmp_path / "batched")
    assert serial.base_delta.version == 4
    tolerance = 1e-9 if "quantize" not in method else 1e-3  # another last digit is another step of the grid
    for layer, found in effective(serial).items():
        assert off(effective(batched)[layer], found) < tolerance


@pytest.mark.parametrize("method", TRIPS)
def test_clients_train_on_the_weights_that_moved(method: str, data: Path, tmp_path: Path) -> None:
    """Negative control: without what was added, a client's next round goes another way."""
    exp = replace(made(data, TRIPS[method]), rounds=2)
    result = launch.run(exp, engine=Serial(), out=tmp_path / "run")
    site = Site.of(exp, None)
    ctx = RoundContext(2, exp.key, 5, 5, client="ann", profile=exp.federation.profile("ann"))
    request = Request(result.params, tuple({} for _ in exp.pipeline), ctx, result.base_delta)
    moved, still = (site.answer("work", one) for one in (request, replace(request, base_delta=BaseDelta())))
    assert not tree.equal(moved.parts["rows"].tree, still.parts["rows"].tree)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", TRIPS)
def test_a_run_resumes_to_the_bit(method: str, data: Path, tmp_path: Path) -> None:
    """From every round, and with clients that miss rounds, whose site has what they lack from others."""
    exp = made(data, TRIPS[method], lost=[ClientOutage("ann", 0), ClientOutage("ann", 1), ClientOutage("ben", 2)])
    whole = launch.run(exp, engine=Serial(), out=tmp_path / "whole")
    assert tree.equal(effective(in_pieces(exp, tmp_path / "cut")), effective(whole))


def test_a_client_is_sent_what_it_has_missed(data: Path, tmp_path: Path) -> None:
    """4 bytes x R (in + out) a layer; R: the ranks of those who answered in the rounds that it has missed."""
    sent: dict[tuple[int, str], int] = {}

    def note(event: Event) -> None:
        if isinstance(event, MessageSent) and event.direction == "down" and event.call == "work":
            sent[event.round, event.client] = event.parts.get("base_delta", 0)

    exp = made(data, TRIPS["flora"], lost=[ClientOutage("ben", 1)], dtype="float32")
    launch.run(exp, engine=Serial(), out=tmp_path / "run", listeners=[note])
    layers = [pair for pair in SIZES.values() for _ in range(2)]  # two decoder layers

    def size(*ranks: int) -> int:
        return sum(4 * min(sum(ranks) * (n + m), n * m) for n, m in layers)

    everybody, without_ben = 4 + 1 + 2 + 3 + 4, 4 + 2 + 3 + 4  # eve has the adapter's rank
    assert {bytes for (round, _), bytes in sent.items() if round == 0} == {0}
    assert {client: sent[2, client] for client in ("ann", "ben", "eve")} == {
        "ann": size(without_ben),
        "ben": size(everybody, without_ben),
        "eve": size(without_ben),
    }
    assert sent[3, "ben"] == sent[3, "ann"] == size(everybody)


@pytest.mark.parametrize("method", ["flora", "fedex_lora"])
@pytest.mark.parametrize("rounds", [1, 4])  # as factors, and dense
def test_what_a_run_leaves_computes_as_its_clients_do(method: str, rounds: int, data: Path, tmp_path: Path) -> None:
    exp = replace(made(data, TRIPS[method]), rounds=rounds)
    result = launch.run(exp, engine=Serial(), out=tmp_path / "run")
    run, tokens = open_run(tmp_path / "run"), torch.tensor([[5, 9, 2, 7, 3]])
    ones = torch.ones_like(tokens)
    moved_model = run.model.with_base_delta(result.base_delta)
    stack = {**moved_model.constants, **result.params}
    expected, _ = run.model.adapter.logits(stack, tokens, ones, None)
    folded, _ = run.model.adapter.logits(run.params, tokens, ones, None)
    assert off(folded, expected) < 1e-9
    merged = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", "merged")).double()
    assert off(merged(tokens).logits[:, -1], expected) < 1e-5  # it is stored in float32
    base = AutoModelForCausalLM.from_pretrained(materialise(run.model.base)).double()
    peft = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).double()
    assert off(peft(tokens).logits[:, -1], expected) < 1e-5
    plain, _ = run.model.adapter.logits(dict(result.params), tokens, ones, None)
    assert off(plain, expected) > 1e-4, "what was added matters"


def test_diagnostics_see_no_bias_where_fedit_has_some(data: Path, tmp_path: Path) -> None:
    def biases(stages: Sequence[Stage]) -> list[float]:
        found: list[float] = []

        def note(event: Event) -> None:
            if isinstance(event, Diagnosed):
                found.append(-1.0 if event.bias is None else event.bias)

        launch.run(made(data, stages), engine=Serial(), out=tmp_path / str(stages), listeners=[note])
        return found

    fedit = biases((ByExamples(),))
    assert len(fedit) == 4 and min(fedit) > 1e-4
    for method in ("flora", "fedex_lora"):
        assert all(0 <= one < 1e-6 for one in biases(TRIPS[method])), method


# What is refused.


@pytest.mark.parametrize(
    ("stages", "settings", "message"),
    [
        ((LoraResidual(), Momentum(), Uniform()), {}, "momentum"),
        (
            (Momentum(), LoraResidual(), Uniform()),
            {},
            "lora_residual adds to the frozen weights what the mean of the factors lacks, but momentum before it takes",
        ),
        ((Momentum(), LoraMerge(), Uniform()), {}, "momentum is right only while an entry of lora_A"),
        (
            (LoraMerge(), LoraResidual(), Uniform()),
            {},
            "lora_residual makes the part 'columns', which lora_merge",
        ),
        ((LoraMerge(), Uniform()), {"demands": Demands(secrecy=True)}, "nothing but sums, but lora_merge shows it"),
        ((LoraMerge(), Uniform()), {"adapter": Full()}, "lora_merge works on lora_A .*, but task.adapter is full"),
        ((Keep(("*.0.*",)), LoraMerge(), Uniform()), {}, "lora_merge works on both .*, but keep keeps"),
        ((LoraResidual(), Uniform()), {"scope": Scope(freeze=("*lora_A",))}, "lora_residual works on both factors"),
    ],
)
def test_what_cannot_be_is_refused(data: Path, stages, settings, message: str) -> None:
    scope = settings.pop("scope", None)
    exp = made(data, stages, **settings)
    with pytest.raises(CheckError, match=message):
        check(exp if scope is None else replace(exp, task=replace(exp.task, scope=scope)))


@pytest.mark.parametrize(
    "leaves",
    [
        {"model.layers.9.q_proj.lora_BA": torch.ones(64, 64)},
        {"model.layers.0.self_attn.q_proj.lora_BA": torch.ones(64, 63)},
        {"model.layers.0.self_attn.q_proj.lora_A": torch.ones(2, 64)},
        {"model.layers.0.self_attn.q_proj.lora_BA": torch.ones(64, 64, dtype=torch.int64)},
    ],
)
def test_a_shift_that_does_not_fit_is_the_clients_failure(leaves: tree.Tree, data: Path) -> None:
    site = Site.of(made(data, TRIPS["flora"]), None)
    ctx = RoundContext(1, Key(0), 5, 5, client="ann")
    request = Request(site.fresh, ({}, {}), ctx, BaseDelta({1: leaves}))
    assert site.base_versions.taken(request) is request
    answer = site.answer("work", request)
    assert "version 1 of the frozen weights holds" in answer.reason  # type: ignore[union-attr]


def test_what_a_request_brings_is_kept_once_for_all_that_wait(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr(base_model_versions, "trim", lambda: given.append(True))
    site, layer = Site.of(made(data, TRIPS["flora"]), None), "model.layers.0.self_attn.q_proj"
    added = BaseDelta({1: {f"{layer}.lora_BA": torch.ones(64, 64)}})
    requests = [
        Request(site.fresh, ({}, {}), RoundContext(1, Key(0), 5, 5, client=name), added) for name in ("ann", "bob")
    ]
    waiting = [site.base_versions.taken(request) for request in requests]
    assert [(request.base_delta.steps, request.base_delta.version) for request in waiting] == [({}, 1)] * 2
    assert site.base_versions.model(waiting[1]) is site.base_versions.model(requests[0])
    assert torch.equal(site.base_versions.moved[0].dense(layer), torch.ones(64, 64))
    assert len(given) == 1, "memory is given back when the weights move, and not for each client"


def test_a_site_that_lacks_an_earlier_version_says_so(data: Path) -> None:
    site = Site.of(made(data, TRIPS["flora"]), None)
    request = Request(site.fresh, ({}, {}), RoundContext(3, Key(0), 5, 5, client="ann"), BaseDelta({3: {}}, after=2))
    with pytest.raises(ClientError, match="adds to version 2 of the frozen weights, which is not kept here"):
        site.base_versions.model(request)


def test_other_adapters_do_not_move(data: Path) -> None:
    site = Site.of(made(data, (ByExamples(),), adapter=Full()), None)
    request = Request(site.fresh, ({},), RoundContext(3, Key(0), 5, 5, client="ann"), BaseDelta({3: {}}))
    with pytest.raises(ClientError, match="the adapter here does not move; use lora"):
        site.base_versions.model(request)
    assert load(site.experiment.task).with_base_delta(BaseDelta()).constants == {}
