"""A quantised base model: the model of its dequantised weights, on every engine and adapter; kept once, and checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedllm.data.partitioners.by import By
from fedllm.data.shards import Shards
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, ConfigError, ModelError
from fedllm.experiment.checks.check import check
from fedllm.experiment.config_file import build
from fedllm.experiment.record import Experiment
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.lora_xs import LoraXs
from fedllm.models.adapters.peft import Peft
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.adapters.sparse_lora import SparseLora
from fedllm.models.adapters.weights import Full, Norms
from fedllm.models.base_models import quantized
from fedllm.models.base_models.load import load_base
from fedllm.models.base_models.tiny_llama import tiny_model, tiny_tokenizer
from fedllm.models.batch import Example, collate
from fedllm.models.layers.quantized_linear import QuantizedEmbedding, QuantizedLinear, num_parameters
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.runs import launch
from fedllm.runs.export import export
from fedllm.stages.lora.merge import LoraMerge
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from tests.engines.cohort import experiment, write_records
from tests.stages.lora.one_round import off
from tests.wide import NARROW

KEY = Key(4)
every = pytest.mark.parametrize("kind", ["int8", "int4"])
ADAPTERS = (
    Lora(rank=3, alpha=6),
    LoraXs(rank=3),
    SoftPrompt(tokens=3),
    SparseLora(rank=2, density=0.05),
    Norms(),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's files."""
    tiny_model(torch.float32).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


# The model itself.


def losses(model: LoadedModel, params: Tree) -> tuple[Tensor, list[Tensor]]:
    leaves = {name: leaf[None].clone().requires_grad_() for name, leaf in params.items()}
    tokens = torch.tensor([5, 9, 2, 7, 3, 8])
    loss = model.losses(leaves, collate([[Example(tokens, tokens.roll(-1)), Example(tokens[:3], tokens[1:4])]]))
    return loss, list(torch.autograd.grad(loss.sum(), list(leaves.values())))


@every
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)
def test_losses_and_gradients_are_those_of_the_dequantised_weights(adapter: Adapter, kind: str) -> None:
    """The same model with the weights written out, through the plain layers."""
    task = Task("tiny-llama", adapter=adapter, dtype="float64", quantize=kind)  # type: ignore[arg-type]
    model = load(task)
    layers = {name: module for name, module in model.base.model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 15 and isinstance(model.base.model.get_input_embeddings(), QuantizedEmbedding)
    generator = torch.Generator().manual_seed(0)
    params = {
        name: leaf + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        for name, leaf in model.with_constants(KEY).initial_params(KEY).items()
    }
    found, grads = losses(model, params)
    weights = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    plain = load(replace(task, quantize=None))
    with torch.no_grad():
        for name, weight in weights.items():
            plain.base.model.get_parameter(name).copy_(weight)  # the head is the embedding
    try:
        if isinstance(adapter, LoraXs):  # its factors follow from the weights when it is attached
            plain = replace(plain, adapter=adapter.attach(plain.base))
        expected, theirs = losses(plain, params)
    finally:
        load.cache_clear()
    assert torch.allclose(found, expected, atol=1e-10)
    assert len(grads) == len(params)
    for mine, other in zip(grads, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-9)


@every
def test_generation_is_that_of_the_dequantised_weights(kind: str) -> None:
    base = load_base("tiny-llama", dtype="float64", quantize=kind).model
    plain = tiny_model(torch.float64)
    with torch.no_grad():
        for name, module in base.named_modules():
            if isinstance(module, QuantizedLinear):
                plain.get_parameter(f"{name}.weight").copy_(module.weight)
    tokens = torch.tensor([[5, 9, 2, 7]])
    assert torch.allclose(base(tokens).logits, plain(tokens).logits, atol=1e-10)
    assert not torch.allclose(base(tokens).logits, tiny_model(torch.float64)(tokens).logits, atol=1e-4)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.30), ("int4", 0.18)])
def test_the_matrices_take_a_share_of_float32(kind: str, share: float) -> None:
    model, plain = load_base("tiny-llama", quantize=kind).model, tiny_model(torch.float32)
    held = {leaf.data_ptr(): leaf.nbytes for leaf in [*model.parameters(), *model.buffers()]}
    assert sum(held.values()) < share * 4 * plain.num_parameters()
    assert num_parameters(model) == plain.num_parameters()


# What is kept.


@every
def test_a_folder_is_read_and_quantised_once(
    kind: str, folder: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = load_base(str(folder), dtype="float32", quantize=kind)
    monkeypatch.setattr(quantized, "from_folder", None)  # not called
    two = load_base(str(folder), dtype="float32", quantize=kind)
    assert tree.digest(one.model.state_dict()) == tree.digest(two.model.state_dict())
    inner, head = two.model.get_input_embeddings(), two.model.get_output_embeddings()
    assert head.codes.data_ptr() == inner.codes.data_ptr(), "the head is the embedding"
    other = load_base("tiny-llama", dtype="float32", quantize=kind)  # quantised in memory
    tokens = torch.tensor([[5, 9, 2, 7]])
    assert torch.equal(two.model(tokens).logits, other.model(tokens).logits)
    assert two.folder == folder and two.tokenizer.pad_token is not None
    wide = load_base(str(folder), dtype="float64", quantize=kind)
    assert wide.model(tokens).logits.dtype == torch.float64 == wide.model.dtype


def test_other_files_are_quantised_anew(folder: Path, cache_folder: Path) -> None:
    tokens = torch.tensor([[5, 9, 2]])
    before = load_base(str(folder), quantize="int8").model(tokens).logits
    model = tiny_model(torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(2)
    model.save_pretrained(folder)
    assert not torch.equal(load_base(str(folder), quantize="int8").model(tokens).logits, before)


def test_a_kept_file_that_is_damaged_is_named(folder: Path, cache_folder: Path) -> None:
    load_base(str(folder), quantize="int8")
    (kept,) = cache_folder.rglob("quantized.safetensors")
    held = bytearray(kept.read_bytes())
    held[-5] ^= 1
    kept.write_bytes(bytes(held))
    with pytest.raises(ModelError, match="is damaged: it is not what was written; delete"):
        load_base(str(folder), quantize="int8")


# Whole runs.


def made(data: Path, **settings) -> Experiment:
    federation = Shards(str(data), partition=By("who"), heldout=0.3)
    exp = experiment(data, federation=federation, stages=(ByExamples(),), adapter=Lora(rank=4, alpha=8), **settings)
    return replace(exp, task=replace(exp.task, quantize="int8"))


def test_stacks_give_the_same(data: Path, tmp_path: Path) -> None:
    exp = made(data)
    serial = launch.run(exp, engine=Serial(), out=tmp_path / "serial").params
    batched = launch.run(exp, engine=Batched(stack=3), out=tmp_path / "batched").params
    start = load(exp.task).initial_params(exp.key)
    assert all(off(batched[name] - start[name], leaf - start[name]) < NARROW for name, leaf in serial.items())


def test_without_it_nothing_changes_and_bytes_are_the_same(data: Path, tmp_path: Path) -> None:
    exp = made(data)
    plain = replace(exp, task=replace(exp.task, quantize=None))
    one, two = (launch.run(e, engine=Serial(), out=tmp_path / str(k)) for k, e in enumerate((exp, plain)))
    assert one.summary["bytes_up"] == two.summary["bytes_up"]
    assert not tree.equal(dict(one.params), dict(two.params))


def test_eight_bits_end_nearer_than_four(data: Path, tmp_path: Path) -> None:
    exp = made(data)
    ends = {
        kind: launch.run(
            replace(exp, task=replace(exp.task, quantize=kind)), engine=Serial(), out=tmp_path / str(kind)
        ).params
        for kind in (None, "int8", "int4")
    }
    apart = {kind: tree.norm(tree.sub(dict(ends[kind]), dict(ends[None]))) for kind in ("int8", "int4")}
    assert 0 < 3 * apart["int8"] < apart["int4"]


def test_what_is_exported_is_the_quantised_model_written_out(data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    launch.run(made(data), engine=Serial(), out=tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", "merged"))
    layer = load_base("tiny-llama", quantize="int8").model.get_submodule("model.layers.0.mlp.up_proj")
    whole = merged.get_parameter("model.layers.0.mlp.up_proj.weight") - layer.weight
    assert int(torch.linalg.matrix_rank(whole, rtol=1e-3)) <= 4 and float(whole.norm()) > 0


# What is refused.


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Full(), "task.adapter is full and changes the matrices of the base model, but task.quantize holds"),
        (Peft("ia3"), "is peft and changes .*, but task.quantize holds them in int8; leave out one"),
        (Lora(init="singular"), "is lora with init: singular and changes .*, but task.quantize"),
    ],
)
def test_an_adapter_that_changes_the_matrices_is_refused(data: Path, adapter: Adapter, message: str) -> None:
    exp = made(data)
    with pytest.raises(CheckError, match=message):
        check(replace(exp, task=replace(exp.task, adapter=adapter)))


def test_a_stage_that_moves_them_is_refused(data: Path) -> None:
    with pytest.raises(CheckError, match=r"lora_merge adds to .*, but task\.quantize holds them in int8; leave out"):
        check(replace(made(data), stages=(LoraMerge(), ByExamples())))


def test_an_unknown_kind_is_refused() -> None:
    spec = {
        "task": {"model": "tiny-llama", "quantize": "int9"},
        "federation": {"shards": {"data": "quickstart", "partition": {"by": "organisation"}}},
        "work": {"sgd": {"steps": 1}},
        "method": "fedit",
    }
    with pytest.raises(ConfigError, match=r"task\.quantize is 'int9'"):
        build(spec)


@pytest.mark.model
def test_a_real_model_says_nearly_the_same(smollm2: str) -> None:
    """NLL a token of a few sentences, base model, against full precision."""
    text = "The quick brown fox jumps over the lazy dog. Water boils at one hundred degrees, and ice melts at zero."

    def nll(kind: str | None) -> float:
        base = load_base(smollm2, dtype="float32", quantize=kind)
        tokens = base.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return float(base.model(tokens, labels=tokens).loss)

    full, eight, four = map(nll, (None, "int8", "int4"))
    assert abs(eight - full) < 0.02 * full and abs(four - full) < 0.15 * full
