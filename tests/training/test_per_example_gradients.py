"""Per-example gradients: those of each example alone, by plain autograd and by peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import fedllm
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.base_models.load import load_base
from fedllm.models.base_models.tiny_llama import tiny_tokenizer
from fedllm.models.batch import IGNORE, Example, collate
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from fedllm.training.client_stack import BufferLayout
from fedllm.training.gradients import Stack
from fedllm.training.per_example_gradients import fill

KEY = Key(3)


def examples() -> list[Example]:
    """Unequal lengths, from one to six labels."""
    made = []
    for seed, (length, labels) in enumerate(((9, 3), (4, 1), (17, 6), (9, 2))):
        tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))
        targets = tokens.roll(-1)
        targets[-1] = IGNORE
        targets[: length - 1 - labels] = IGNORE
        made.append(Example(tokens, targets))
    return made


def trained(model: LoadedModel) -> Tree:
    generator = torch.Generator().manual_seed(7)
    return {
        n: leaf + 0.05 * torch.randn(leaf.shape, generator=generator) for n, leaf in model.initial_params(KEY).items()
    }


@pytest.mark.parametrize("adapter", [Lora(rank=4), SoftPrompt(tokens=3)], ids=["lora", "prompt"])
def test_all_at_once_is_one_by_one(adapter: Adapter) -> None:
    model = load(Task("tiny-llama", adapter=adapter, dtype="float64"))
    params, batch = trained(model), examples()
    grads, losses = fedllm.per_example_gradients(model, params, batch)
    for place, example in enumerate(batch):
        leaves = {name: leaf[None].clone().requires_grad_() for name, leaf in params.items()}
        (loss,) = model.losses(leaves, collate([[example]]))
        alone = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        assert float(losses[place]) == pytest.approx(float(loss.detach()), rel=1e-12)
        expected = tree.unstack(alone, 0)
        assert tree.norm(tree.sub(tree.unstack(grads, place), expected)) < 1e-9 * tree.norm(expected)
    assert tree.norm(tree.sub(tree.unstack(grads, 0), tree.unstack(grads, 2))) > 0.1 * tree.norm(grads)


def test_each_is_that_of_peft() -> None:
    model = load(Task("tiny-llama", adapter=Lora(rank=4, alpha=16, targets=("q_proj", "down_proj")), dtype="float64"))
    params = trained(model)
    other, named = peft_twin("tiny-llama", params, "float64", rank=4, alpha=16)
    grads, _ = fedllm.per_example_gradients(model, params, examples())
    for place, example in enumerate(examples()):
        logits = other(input_ids=example.tokens[None]).logits[0]
        loss = cross_entropy(logits, example.targets, ignore_index=IGNORE)
        expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        assert tree.norm(tree.sub(tree.unstack(grads, place), expected)) < 1e-9 * tree.norm(expected)


IDS: dict[str, Any] = {"vocab_size": 259, "pad_token_id": 257, "bos_token_id": 256, "eos_token_id": 257}
SIZES: dict[str, Any] = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mamba": lambda: transformers.MambaConfig(**IDS, hidden_size=32, num_hidden_layers=2, state_size=4),
}
TARGETS = {"mamba": ("in_proj", "x_proj")}  # peft refuses the others


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_on_other_architectures_each_is_that_of_peft(kind: str, dtype: Any, tmp_path: Path) -> None:
    """Those of a micro-batch, in any order. `mamba` takes one sequence at a time."""
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[kind]()).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load(
        Task(str(tmp_path), adapter=Lora(rank=2, alpha=6, targets=TARGETS.get(kind, ("all_linear",))), dtype=dtype)
    )
    assert (model.why_not_stackable is not None) is (kind == "mamba")
    params = {name: leaf.to(getattr(torch, dtype)) for name, leaf in trained(model).items()}
    other, named = peft_twin(str(tmp_path), params, dtype, rank=2, alpha=6)
    items = [*examples()[1:], examples()[0]]
    layout = BufferLayout.of([params])
    stack = Stack(layout.filled([params]).expand(len(items), -1), layout.zeros(len(items)), layout.stacked, {})
    losses = fill(stack, collate([items]).apart, model)
    for place, example in enumerate(items):
        loss = cross_entropy(other(input_ids=example.tokens[None]).logits[0], example.targets, ignore_index=IGNORE)
        expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        found = tree.sub(layout.client(stack.gradient[place], 0), expected)
        assert tree.norm(found) < (1e-9 if dtype == "float64" else 1e-5) * tree.norm(expected)
        assert float(losses[place]) == pytest.approx(float(loss.detach()), rel=1e-5)


def peft_twin(model: str, params: Tree, dtype: str, *, rank: int, alpha: int) -> tuple[Any, dict[str, Any]]:
    """The same model with peft's layers, and its trained weights by fedllm's names."""
    from peft import LoraConfig, get_peft_model

    paths = sorted({name.rpartition(".lora_")[0] for name in params})
    turned = any(path.endswith("c_attn") for path in paths)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=paths, fan_in_fan_out=turned, task_type="CAUSAL_LM")
    other: Any = get_peft_model(load_base(model, dtype=dtype).model, config)
    named = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): value
        for name, value in other.named_parameters()
        if value.requires_grad
    }
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(params[name])
    return other, named
