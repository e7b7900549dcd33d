"""LoRA that begins with the singular values of the weights (PiSSA, FeDeRA): the base model at first, PEFT's factors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedllm.data.partitioners.by import By
from fedllm.data.shards import Shards
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, ConfigError
from fedllm.experiment.checks.check import check_profiles
from fedllm.experiment.config_file import build
from fedllm.experiment.record import Experiment
from fedllm.messages.context import Profile
from fedllm.models.adapters.lora import Lora
from fedllm.models.base_models.load import materialise
from fedllm.models.base_models.tiny_llama import tiny_model
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.runs import launch
from fedllm.runs.export import export
from fedllm.runs.loaded_run import open_run
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.tensors import low_rank, tree
from tests.engines.cohort import experiment, write_records
from tests.stages.lora.one_round import off
from tests.wide import NARROW

KEY = Key(3)
TARGETS = ("q_proj", "k_proj", "down_proj")  # 64 x 64, 32 x 64 and 64 x 192
LORA = Lora(rank=4, alpha=6, targets=TARGETS, init="singular")
TOKENS = torch.tensor([[5, 9, 2, 7, 3]])
ONES = torch.ones_like(TOKENS)


def loaded(dtype: str = "float64", lora: Lora = LORA) -> LoadedModel:
    return load(Task("tiny-llama", adapter=lora, dtype=dtype)).with_constants(KEY)  # type: ignore[arg-type]


def answer(model: LoadedModel, params: tree.Tree, *, moved: bool = True) -> Tensor:
    constants = model.constants if moved else {}
    return model.adapter.logits({**constants, **params} if params else {}, TOKENS, ONES, None)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_it_begins_as_the_base_model(dtype: str, tolerance: float) -> None:
    model = loaded(dtype)
    params, base = model.initial_params(KEY), answer(model, {})
    assert off(answer(model, params), base.double()) < tolerance
    assert off(answer(model, params, moved=False), base.double()) > 0.1, "without what the weights give up it does not"


@pytest.mark.parametrize("rslora", [False, True])
def test_the_product_is_the_best_of_its_rank_and_both_factors_have_the_roots(rslora: bool) -> None:
    lora = replace(LORA, rslora=rslora)
    params, weights = loaded(lora=lora).initial_params(KEY), dict(tiny_model(torch.float64).named_parameters())
    for layer in low_rank.layers(params):
        u, s, v = torch.linalg.svd(weights[f"{layer}.weight"].detach(), full_matrices=False)
        b, a = low_rank.pair(params, layer)
        assert off(lora.scale * b @ a, (u[:, :4] * s[:4]) @ v[:4]) < 1e-9
        assert torch.allclose(b.norm(dim=0), (s[:4] / lora.scale).sqrt()) and torch.allclose(
            a.norm(dim=1), (s[:4] / lora.scale).sqrt()
        )


def test_it_is_pefts_pissa() -> None:
    model = tiny_model(torch.float32)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS), init_lora_weights="pissa")
    theirs = dict(get_peft_model(model, config).named_parameters())
    ours = loaded("float32")
    params, moved = ours.initial_params(KEY), ours.constants
    for layer in low_rank.layers(params):
        path = f"base_model.model.{layer}"
        b, a = theirs[f"{path}.lora_B.default.weight"], theirs[f"{path}.lora_A.default.weight"]
        assert off(torch.matmul(*low_rank.pair(params, layer)), (b @ a).double()) < 1e-4
        assert off(moved[f"{layer}.moved"], theirs[f"{path}.base_layer.weight"].double()) < 1e-4


def test_two_terms_hold_the_rest_of_the_weight_in_bfloat16() -> None:
    model = loaded("bfloat16")
    params, weights = (
        model.initial_params(KEY),
        dict(tiny_model(torch.float64).named_parameters()),
    )  # they are bfloat16 numbers
    for layer in low_rank.layers(params):
        rest = weights[f"{layer}.weight"].detach() - LORA.scale * torch.matmul(*low_rank.pair(params, layer)).double()
        first, second = (model.constants[f"{layer}.{name}"].double() for name in ("moved", "moved_rest"))
        assert off(first + second, rest) < 1e-5 < off(first, rest)


# Whole runs.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


def made(data: Path, **settings) -> Experiment:
    federation = Shards(str(data), partition=By("who"), heldout=0.3)
    return experiment(data, adapter=LORA, stages=(ByExamples(),), federation=federation, **settings)


def test_stacks_give_the_same(data: Path, tmp_path: Path) -> None:
    exp = made(data)
    serial = launch.run(exp, engine=Serial(), out=tmp_path / "serial").params
    batched = launch.run(exp, engine=Batched(stack=3), out=tmp_path / "batched").params
    start = load(exp.task).with_constants(exp.key).initial_params(exp.key)
    assert not tree.equal(dict(serial), start)
    assert all(off(batched[name] - start[name], leaf - start[name]) < NARROW for name, leaf in serial.items())


def test_what_a_run_leaves_computes_as_its_clients_do(data: Path, tmp_path: Path) -> None:
    launch.run(made(data), engine=Serial(), out=tmp_path / "run")
    run = open_run(tmp_path / "run")
    expected = run.model.adapter.logits(run.params, TOKENS, ONES, None)[0]
    assert off(answer(run.model, {}), expected) > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", "merged")).double()
    assert off(merged(TOKENS).logits[:, -1], expected) < 1e-5  # it is stored in float32
    base = AutoModelForCausalLM.from_pretrained(materialise(run.model.base)).double()
    peft = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).double()
    assert off(peft(TOKENS).logits[:, -1], expected) < 1e-5


# What is refused.


def test_clients_of_unequal_ranks_are_refused(data: Path) -> None:
    """A client of a lower rank would lack what the weights give up."""
    exp = replace(made(data), stages=(LoraPad(), ByExamples()))
    with pytest.raises(CheckError, match=r"client b has rank 2 and .* 4, but task\.adapter has init: singular"):
        check_profiles(exp, {"a": Profile(), "b": Profile(rank=2)})


def test_a_start_is_one_of_two() -> None:
    with pytest.raises(ConfigError, match="init: singular and init_from; a start is one of the two"):
        Lora(init="singular", init_from="runs/other")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"lora": {"init": "zero"}},
            "method federa sets task.adapter.lora.init to singular, but the file",
        ),
        ({"lora": 8}, "method federa sets task.adapter.lora.init; give lora as a mapping"),
        ("full", "method federa needs the adapter lora"),
    ],
)
def test_a_file_that_says_otherwise_is_refused(adapter: object, message: str) -> None:
    spec = {
        "task": {"model": "tiny-llama", "adapter": adapter},
        "federation": {"shards": {"data": "quickstart", "partition": {"by": "organisation"}}},
        "work": {"sgd": {"steps": 1}},
        "method": "federa",
    }
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        build(spec)
