"""LoRA-XS: its factors against singular values, its passes against the formula, and Fed-SB's rounds written out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedllm.data.partitioners.by import By
from fedllm.data.shards import Shards
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, ConfigError, ModelError
from fedllm.experiment.checks.check import check_profiles
from fedllm.experiment.config_file import build
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.update import Update
from fedllm.models.adapters import svd_init
from fedllm.models.adapters.lora_xs import LoraXs
from fedllm.models.adapters.svd_init import singular_factors
from fedllm.models.base_models.load import load_base
from fedllm.models.batch import Example, collate
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.runs import launch
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.export import export
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.tensors import low_rank, tree
from fedllm.tensors.tree import Tree
from tests.engines.cohort import ADAMW, CLIENTS, SGD, SIZES, Watched, experiment, farthest, sent, write_records
from tests.wide import NARROW

KEY = Key(7)
XS = LoraXs(rank=5, alpha=10)
SHAPES = {"k": (192, 576), "q": (576, 576), "down": (576, 1536), "up": (1536, 576)}  # out, in: of SmolLM2


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FEDLLM_CACHE", str(folder))
    load.cache_clear()
    yield folder
    load.cache_clear()


def task(adapter: LoraXs = XS, dtype: str = "float64") -> Task:
    return Task("tiny-llama", adapter=adapter, dtype=dtype)  # type: ignore[arg-type]


def trained(model: LoadedModel, seed: int = 0) -> Tree:
    """Weights as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.1 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.dtype)
        for name, leaf in model.initial_params(KEY).items()
    }


def example(length: int, seed: int = 0) -> Example:
    tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))
    targets = tokens.roll(-1)
    targets[-1] = -100
    return Example(tokens, targets)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# The fixed factors.


def drawn(layer: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPES[layer], generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", SHAPES)
def test_the_factors_are_the_largest_singular_values_of_the_weight(layer: str, dtype: torch.dtype) -> None:
    weight = drawn(layer, dtype)
    b, a = low_rank.pair(singular_factors({layer: weight}, 6), layer)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    assert (b.T @ b - torch.eye(6)).abs().max() < 1e-10, "U"
    assert off(a.norm(dim=1), s[:6]) < 1e-12, "S V^T"
    assert off(b @ a, (u[:, :6] * s[:6]) @ v[:6]) < 1e-9
    assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all(), "one form, whatever the library's signs"


def test_they_are_kept_by_what_they_are_made_of(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"q": drawn("q"), "k": drawn("k")}
    first = singular_factors(weights, 3)
    (folder,) = (cache / "models").glob("singular-*")
    with monkeypatch.context() as patch:
        patch.setattr(svd_init, "_largest", None)  # whoever computes again would fail
        assert tree.equal(singular_factors(dict(weights), 3), first)
    assert folder.is_dir()
    singular_factors({**weights, "q": weights["q"] + 1e-9}, 3)
    singular_factors(weights, 2)
    assert len(list((cache / "models").glob("singular-*"))) == 3


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    weight = drawn("k")
    weight[3, 4] = torch.nan
    with pytest.raises(
        ModelError, match="the weights of layer k are not finite, so that they have no singular vectors"
    ):
        singular_factors({"k": weight}, 3)


# The passes.


def textbook(model: LoadedModel, params: Tree, scale: float = 2.0) -> dict[str, Tensor]:
    """W + s B R A of each layer, from the weights' own SVD."""
    found = {}
    for name, leaf in params.items():
        layer = name.removesuffix(".lora_R")
        weight = dict(load_base("tiny-llama", dtype="float64").model.named_parameters())[f"{layer}.weight"]
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        rank = len(leaf)
        sign = u[:, :rank].gather(0, u[:, :rank].abs().argmax(0, keepdim=True)).sign()
        b, a = u[:, :rank] * sign, (sign * s[:rank]).T * v[:rank]
        found[f"{layer}.weight"] = weight + scale * b @ leaf.double() @ a
    return found


def test_losses_are_those_of_the_changed_weights_for_each_client_of_a_stack() -> None:
    model = load(task())
    clients = [trained(model, seed) for seed in (0, 1)]
    batch = collate([[example(9), example(5, 1)], [example(12, 2)]])
    found = model.losses(tree.stack(clients), batch)
    alone = [model.losses(tree.stack([params]), collate([chosen])) for params, chosen in zip(
        clients, ([example(9), example(5, 1)], [example(12, 2)]), strict=True)]  # fmt: skip
    assert torch.allclose(found, torch.cat(alone), rtol=1e-12)
    other = load_base("tiny-llama", dtype="float64").model
    with torch.no_grad():
        for name, weight in textbook(model, clients[1]).items():
            other.get_parameter(name).copy_(weight)
    tokens, targets = example(12, 2).tokens, example(12, 2).targets
    expected = torch.nn.functional.cross_entropy(other(input_ids=tokens[None]).logits[0], targets, ignore_index=-100)
    assert float(found[1]) == pytest.approx(float(expected), rel=1e-9)


def test_gradients_are_differences_and_are_not_zero_at_the_start() -> None:
    model = load(task())
    batch, start = collate([[example(9)]]), model.initial_params(KEY)
    assert all(not leaf.any() for leaf in start.values())
    stack = {name: leaf[None].requires_grad_() for name, leaf in start.items()}
    model.losses(stack, batch).sum().backward()
    for name in list(start)[::5]:
        gradient = stack[name].grad
        assert gradient is not None and float(gradient.norm()) > 0
        bump = torch.zeros_like(start[name])
        bump[1, 3] = 1e-3  # the model's norms compute in float32, so that smaller differences drown
        up, down = (float(model.losses(tree.stack([{**start, name: step}]), batch)) for step in (bump, -bump))
        assert (up - down) / 2e-3 == pytest.approx(float(gradient[0, 1, 3]), rel=5e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_leaves_are_float32_or_wider_and_zero_is_the_base_model(dtype: str) -> None:
    model = load(task(dtype=dtype))
    start = model.initial_params(KEY)
    assert {leaf.dtype for leaf in start.values()} == {torch.float64 if dtype == "float64" else torch.float32}
    (base,), (same,) = model.sequence_nll({}, [example(8)]), model.sequence_nll(start, [example(8)])
    (other,) = model.sequence_nll(trained(model), [example(8)])
    assert torch.equal(base, same) and float((other - base).abs().max()) > 1e-2


def test_answers_with_a_cache_are_those_of_whole_passes() -> None:
    model = load(task())
    params = trained(model)
    prompts = [example(length).tokens.tolist() for length in (3, 7)]
    together = model.generate(params, prompts, 6)
    assert together == [model.generate(params, [prompt], 6)[0] for prompt in prompts]
    assert together != model.generate({}, prompts, 6)


# On disk.


def test_peft_loads_what_is_saved_and_merged_weights_are_the_formula(tmp_path: Path) -> None:
    from peft import PeftModel

    model = load(task())
    params, tokens = trained(model), example(10).tokens[None]
    model.adapter.save(params, tmp_path / "adapter", "tiny-llama")
    other = PeftModel.from_pretrained(load_base("tiny-llama", dtype="float64").model, tmp_path / "adapter")
    with torch.no_grad():
        found, _ = model.adapter.logits(params, tokens, torch.ones_like(tokens), None)
        assert off(other(tokens).logits[:, -1], found) < 1e-9
    merged = model.adapter.merged(params)
    assert merged.keys() == textbook(model, params).keys()
    assert all(off(merged[name], weight) < 1e-10 for name, weight in textbook(model, params).items())
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


# Fed-SB.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


def shards(data: Path) -> Shards:
    """Clients that another process can build, too."""
    return Shards(str(data), partition=By("who"), heldout=0.0)


def test_what_is_sent_is_rank_squared_a_layer_whatever_its_width(data: Path) -> None:
    exp = experiment(data, adapter=XS, dtype="float32")
    (first, *_) = sent(Serial(), exp).values()
    assert isinstance(first, Update)
    leaves = first.parts["delta"].tree
    assert len({leaf.shape for leaf in leaves.values()}) == 1 and len(leaves) == 14
    assert tree.num_bytes(leaves) == 4 * 5**2 * 14


def test_rounds_are_the_textbook_loop_and_the_mean_is_exact(data: Path, tmp_path: Path) -> None:
    """Plain descent on whole weights W + s B R A, whose mean is that of the means of R."""
    exp = experiment(data, adapter=XS, work=SGD_PLAIN, stages=(ByExamples(),), rounds=3)
    watched = Watched(Serial())
    launch.run(exp, engine=watched, out=tmp_path / "run")
    saved = Checkpoints(tmp_path / "run" / "checkpoints", 9)
    model, train = load(exp.task), exp.federation.load(exp.key).train
    r, total = model.initial_params(exp.key), sum(SIZES.values())
    for round in range(3):
        ends = {}
        for slot, client in enumerate(CLIENTS):
            examples = [e for record in train[client] if (e := model.encode(record, 48)) is not None]
            own = dict(r)
            for (chosen,) in exp.work.plan(len(examples), RoundContext(round, exp.key, 5, 5, 3, client, slot)):
                stack = {name: leaf[None].clone().requires_grad_() for name, leaf in own.items()}
                loss = model.losses(stack, collate([[examples[index] for index in chosen]])).sum()
                gradients = torch.autograd.grad(loss, list(stack.values()))
                own = {n: leaf - 0.05 * gradient[0] for (n, leaf), gradient in zip(own.items(), gradients, strict=True)}
            ends[client] = own
        r = {name: sum(SIZES[c] / total * ends[c][name] for c in CLIENTS) for name in r}  # type: ignore[misc]
        found = saved.load(round + 1)
        if found is not None:
            assert tree.norm(tree.sub(dict(found.params), r)) < 1e-10 * tree.norm(r)
    whole, each = textbook(model, r), {c: textbook(model, ends[c]) for c in CLIENTS}
    base = dict(load_base("tiny-llama", dtype="float64").model.named_parameters())
    for name, weight in whole.items():
        mean = sum(SIZES[c] / total * (each[c][name] - base[name]) for c in CLIENTS)
        assert off(weight - base[name], mean) < 1e-10  # type: ignore[arg-type]


SGD_PLAIN = type(SGD)(lr=0.05, steps=3, batch_size=2, max_length=48)


@pytest.mark.parametrize("work", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_stacks_give_the_same(work, data: Path) -> None:
    exp = experiment(data, adapter=XS, work=work, federation=shards(data))
    assert farthest(sent(Batched(stack=3), exp), sent(Serial(), exp)) < NARROW


def test_what_a_run_leaves_is_exported(data: Path, tmp_path: Path) -> None:
    exp = experiment(data, adapter=XS, federation=shards(data))
    whole = launch.run(exp, engine=Serial(), out=tmp_path / "whole")
    merged = load_base(str(export(tmp_path / "whole", "merged")), dtype="float64").model
    for name, weight in textbook(load(exp.task), dict(whole.params)).items():
        assert off(merged.get_parameter(name), weight) < 1e-6


# What cannot be.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"task\.adapter\.lora_xs\.rank is 0; it must be 1 or more"),
        ({"alpha": float("inf")}, r"task\.adapter\.lora_xs\.alpha is inf; it must be above 0 and finite"),
        ({"targets": ()}, r"task\.adapter\.lora_xs\.targets is empty; name layers, or all_linear"),
        ({"rank": 33}, r"lora_xs\.rank is 33, above the size 32x64 of layer model\.layers\.0\.self_attn\.k_proj"),
        ({"targets": ("q_prj",)}, r"lora_xs\.targets: 'q_prj' fits no layer; did you mean 'q_proj'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(task(LoraXs(**settings)))


def test_clients_of_unequal_ranks_are_refused(data: Path) -> None:
    message = r"client b has rank 2, but task\.adapter is lora_xs, whose tensors have one shape on all clients"
    with pytest.raises(CheckError, match=message):
        check_profiles(experiment(data, adapter=XS), {"a": Profile(), "b": Profile(rank=2)})


def test_the_method_needs_the_adapter() -> None:
    parts = {"federation": {"shards": "quickstart"}, "work": {"sgd": {"steps": 1}}, "method": "fed_sb"}
    assert build({"task": {"model": "tiny-llama"}, **parts}).task.adapter == LoraXs()
    with pytest.raises(
        ConfigError, match=r"method fed_sb needs the adapter lora_xs, but the file sets task\.adapter to"
    ):
        build({"task": {"model": "tiny-llama", "adapter": "lora"}, **parts})
