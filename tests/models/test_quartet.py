"""Prefixes and bottlenecks: peft's prefix tuning and a textbook bottleneck, stacks of unequal clients, whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from fedllm.data.partitioners.by import By
from fedllm.data.shards import Shards
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.errors import ConfigError, ModelError
from fedllm.experiment.config_file import build
from fedllm.experiment.record import Experiment
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.bottleneck import Bottleneck, Narrowed
from fedllm.models.adapters.prefix import Prefix
from fedllm.models.adapters.random_tokens import random_tokens
from fedllm.models.base_models.load import materialise
from fedllm.models.base_models.tiny_llama import tiny_model, tiny_tokenizer
from fedllm.models.batch import Example, collate
from fedllm.models.layers.forward_context import Forward, forward_context
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.runs import launch
from fedllm.runs.export import export
from fedllm.runs.loaded_run import open_run
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from tests.engines.cohort import experiment, write_records
from tests.stages.lora.one_round import off
from tests.wide import NARROW, SINGLE

KEY, SIZE = Key(6), 5
LAYERS, HEADS, DIM = 2, 2, 16  # of tiny-llama: key heads and the size of each
TOKENS = torch.tensor([[5, 9, 2, 7, 3]])
BOTH = (Prefix(tokens=SIZE), Bottleneck(size=3))
both = pytest.mark.parametrize("adapter", BOTH, ids=["prefix", "bottleneck"])


def loaded(adapter: Adapter, dtype: str = "float64") -> LoadedModel:
    return load(Task("tiny-llama", adapter=adapter, dtype=dtype))  # type: ignore[arg-type]


def moved(model: LoadedModel, seed: int = 0) -> Tree:
    """Weights as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: leaf + 0.2 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        for name, leaf in model.initial_params(KEY).items()
    }


def answered(model: LoadedModel, params: Tree) -> Tensor:
    return model.adapter.logits(params, TOKENS, torch.ones_like(TOKENS), None)[0]


def example(length: int, seed: int = 0) -> Example:
    tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))
    targets = tokens.roll(-1)
    targets[-1] = -100
    return Example(tokens, targets)


def losses(model: LoadedModel, trees: list[Tree], batch: list[list[Example]]) -> tuple[Tensor, list[Tensor]]:
    leaves = {name: leaf.requires_grad_() for name, leaf in tree.stack(trees).items()}
    loss = model.losses(leaves, collate(batch))
    return loss, list(torch.autograd.grad(loss.sum(), [leaves[name] for name in sorted(leaves)]))


# Prefix.


def test_it_begins_as_the_words_that_it_was_made_of() -> None:
    """The base model that reads the words first gives the same logits."""
    model = loaded(Prefix(tokens=SIZE))
    words = random_tokens(model.base.tokenizer, SIZE, KEY.fold("adapter").fold("prefix").generator())
    read = torch.cat([words[None], TOKENS], 1)
    assert off(answered(model, model.initial_params(KEY)), tiny_model(torch.float64)(read).logits[:, -1]) < 1e-12


def as_peft(params: Tree) -> Tensor:
    """(tokens, layers x (keys, values) x heads x d)."""
    return torch.cat([params[f"prefix.{n}.{part}"] for n in range(LAYERS) for part in ("key", "value")], 1)


def test_losses_and_gradients_are_those_of_peft() -> None:
    model = loaded(Prefix(tokens=SIZE))
    params = moved(model)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=SIZE)
    theirs = get_peft_model(tiny_model(torch.float64), config).double()
    weight = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(as_peft(params))
    examples = [example(7), example(4, seed=1)]
    found, grads = losses(model, [params], [examples])
    total = torch.zeros((), dtype=torch.float64)
    for one in examples:
        mask = torch.ones(1, len(one.tokens), dtype=torch.long)
        logits = theirs(input_ids=one.tokens[None], attention_mask=mask).logits[0, :-1]
        total = total + nn.functional.cross_entropy(logits, one.tokens[1:]) / len(examples)
    (gradient,) = torch.autograd.grad(total, weight)
    assert float(found) == pytest.approx(float(total), rel=1e-9)
    mine = as_peft({name: grad[0] for name, grad in zip(sorted(params), grads, strict=True)})
    assert off(mine, gradient) < 1e-9


def test_peft_loads_what_is_saved(tmp_path: Path) -> None:
    model = loaded(Prefix(tokens=SIZE), "float32")
    params = moved(model)
    model.adapter.save(params, tmp_path, str(materialise(model.base)))
    base = AutoModelForCausalLM.from_pretrained(materialise(model.base))
    theirs = PeftModel.from_pretrained(base, str(tmp_path))
    assert off(answered(model, params), theirs(TOKENS).logits[:, -1].double()) < SINGLE


def test_a_long_sequence_sees_its_prefix_too() -> None:
    """Beyond the length where another kernel takes over: against transformers with the prefix as its cache."""
    model = loaded(Prefix(tokens=SIZE))
    params, tokens = moved(model), example(600).tokens
    hidden = model.adapter.hidden(tree.stack([params]), collate([[Example(tokens, tokens.roll(-1))]]))
    logits, _ = model.adapter.logits(params, tokens[None], torch.ones(1, 600, dtype=torch.long), None)
    assert off(hidden[-1:] @ model.adapter.head({}).T, logits) < 1e-9


@pytest.mark.parametrize("tokens", [1, SIZE])
def test_a_prefix_has_a_key_and_a_value_for_each_token_and_layer(tokens: int) -> None:
    params = loaded(Prefix(tokens=tokens)).initial_params(KEY)
    assert tree.num_values(params) == 2 * LAYERS * tokens * HEADS * DIM


# Bottleneck.


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("sizes", [[4], [3, 0, 2]])
def test_values_and_gradients_are_the_textbooks(activation: str, sizes: list[int]) -> None:
    def drawn(*shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    layer = nn.Linear(7, 5).double().requires_grad_(False)
    x, gradient = drawn(sum(sizes), 7, seed=0).requires_grad_(), drawn(sum(sizes), 5, seed=1)
    down, up = drawn(len(sizes), 2, 5, seed=2).requires_grad_(), drawn(len(sizes), 5, 2, seed=3).requires_grad_()
    stack = {"p.bottleneck_down": down, "p.bottleneck_up": up}
    with forward_context(Forward(stack, tuple(size for size in sizes if size), tuple(sizes))):
        found = Narrowed(layer, "p", activation)(x[None])[0]
    grads = torch.autograd.grad(found, [x, down, up], gradient)
    act = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU()}[activation]
    rows = []
    for k, x_k in enumerate(x.split(sizes)):
        h = layer(x_k)
        rows.append(h + act(h @ down[k].T) @ up[k].T)
    expected = torch.cat(rows)
    assert torch.allclose(found, expected, atol=1e-12)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, [x, down, up], gradient), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_it_begins_as_the_base_model_and_has_two_small_layers_at_the_end_of_each_block() -> None:
    model = loaded(Bottleneck(size=3))
    params = model.initial_params(KEY)
    assert torch.equal(answered(model, params), answered(model, {}))
    assert tree.num_values(params) == LAYERS * 2 * 2 * 3 * 64
    assert {name.split(".")[-2] for name in params} == {"o_proj", "down_proj"}


# Both.


@both
def test_a_client_of_a_stack_is_as_it_is_alone(adapter: Adapter) -> None:
    model = loaded(adapter)
    trees = [moved(model, seed) for seed in range(3)]
    batch = [[example(9, 1), example(3, 2)], [example(5, 3)], [example(6, 4), example(2, 5), example(7, 6)]]
    together, grads = losses(model, trees, batch)
    for k, own in enumerate(trees):
        alone, single = losses(model, [own], [batch[k]])
        assert torch.allclose(together[k], alone[0], atol=1e-12)
        for joint, one in zip(grads, single, strict=True):
            assert torch.allclose(joint[k], one[0], atol=1e-12)
    trees[1] = tree.map_leaves(lambda leaf: 2 * leaf, trees[1])
    other, _ = losses(model, trees, batch)
    assert torch.equal(other[[0, 2]], together[[0, 2]]) and not torch.equal(other[1], together[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


def made(data: Path, adapter: Adapter, **settings) -> Experiment:
    federation = Shards(str(data), partition=By("who"), heldout=0.3)
    return experiment(data, adapter=adapter, stages=(ByExamples(),), federation=federation, **settings)


@both
def test_stacks_give_the_same(adapter: Adapter, data: Path, tmp_path: Path) -> None:
    exp = made(data, adapter)
    serial = launch.run(exp, engine=Serial(), out=tmp_path / "serial").params
    batched = launch.run(exp, engine=Batched(stack=3), out=tmp_path / "batched").params
    start = load(exp.task).initial_params(exp.key)
    assert all(off(batched[name] - start[name], leaf - start[name]) < NARROW for name, leaf in serial.items())


@both
def test_what_a_run_leaves_is_the_adapter(adapter: Adapter, data: Path, tmp_path: Path) -> None:
    launch.run(made(data, adapter), engine=Serial(), out=tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert off(answered(run.model, {}), answered(run.model, run.params)) > 1e-6
    assert (export(tmp_path / "run", "peft") / "adapter_model.safetensors").is_file()
    with pytest.raises(ConfigError, match="cannot be merged into weights; export --to peft"):
        export(tmp_path / "run", "merged", out=tmp_path / "merged")


@both
def test_it_goes_with_a_quantised_base(adapter: Adapter, data: Path, tmp_path: Path) -> None:
    exp = made(data, adapter)
    exp = replace(exp, task=replace(exp.task, quantize="int8"))
    assert launch.run(exp, engine=Batched(), out=tmp_path / "run").summary["rounds"] == 2


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"prefix": {"tokens": 0}}, r"task\.adapter\.prefix\.tokens is 0; it must be 1 or more"),
        ({"bottleneck": {"size": 0}}, r"task\.adapter\.bottleneck\.size is 0; it must be 1 or more"),
        ({"bottleneck": {"targets": []}}, r"task\.adapter\.bottleneck\.targets is empty"),
        ({"bottleneck": {"activation": "rely"}}, r"activation is 'rely'"),
        ({"prefix": {"token": 3}}, r"unknown key 'task\.adapter\.prefix\.token'; did you mean 'tokens'"),
    ],
)
def test_settings_that_cannot_be_are_refused(adapter: dict[str, object], message: str) -> None:
    spec = {
        "task": {"model": "tiny-llama", "adapter": adapter},
        "federation": {"shards": {"data": "quickstart", "partition": {"by": "organisation"}}},
        "work": {"sgd": {"steps": 1}},
        "method": "fedavg",
    }
    with pytest.raises(ConfigError, match=message):
        build(spec)


def test_targets_that_fit_no_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.adapter\.bottleneck\.targets: 'oproj' fits no layer; did you mean"):
        loaded(Bottleneck(targets=("oproj",)))


def test_layers_that_see_a_window_are_refused(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=4, bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="see a window, in which a prefix would not stay; use lora"):
        load(Task(str(tmp_path), adapter=Prefix()))
