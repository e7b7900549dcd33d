"""Per-example gradients: those of each example alone, by plain autograd and by peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import fedllm
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.base_models.load import load_base
from fedllm.models.batch import IGNORE, Example, collate
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree

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
    from peft import LoraConfig, get_peft_model

    model = load(Task("tiny-llama", adapter=Lora(rank=4, alpha=16, targets=("q_proj", "down_proj")), dtype="float64"))
    params = trained(model)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    other: Any = get_peft_model(load_base("tiny-llama", dtype="float64").model, config)
    named = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): value
        for name, value in other.named_parameters()
        if value.requires_grad
    }
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(params[name])
    grads, _ = fedllm.per_example_gradients(model, params, examples())
    for place, example in enumerate(examples()):
        logits = other(input_ids=example.tokens[None]).logits[0]
        loss = cross_entropy(logits, example.targets, ignore_index=IGNORE)
        expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        assert tree.norm(tree.sub(tree.unstack(grads, place), expected)) < 1e-9 * tree.norm(expected)
