"""Whole decoders in bfloat16: with the kernels no further from float64 than with PyTorch's operations."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedllm.models.adapters.lora import Lora
from fedllm.models.base_models.tiny_llama import tiny_tokenizer
from fedllm.models.batch import IGNORE, Batch, Example, collate
from fedllm.models.kernels import ctypes_calls
from fedllm.models.kernels.build import library
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from tests.models.kernels import decoders
from tests.models.kernels.decoders import distance
from tests.needs import needs_tiles

pytestmark = needs_tiles
SIZES: dict[str, Any] = {
    **decoders.SIZES,
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
}
BOTH = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, sliding_window=16, layer_types=BOTH),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=16),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
}
USED = {  # by what they compute; Gemma's norms and gates are others, Phi's gate and up are one layer
    "llama": {"norm", "gated", "attention", "rotary", "low_rank", "product", "cross_entropy"},
    "qwen3": {"norm", "gated", "attention", "rotary", "low_rank", "product", "cross_entropy"},
    "gemma3": {"attention", "rotary", "low_rank", "product", "cross_entropy"},
    "mistral": {"norm", "gated", "attention", "rotary", "low_rank", "product", "cross_entropy"},
    "phi3": {"norm", "attention", "rotary", "low_rank", "product", "cross_entropy"},
}


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """A loaded model has the kernels or not."""
    forget()
    yield
    forget()


def forget() -> None:
    load.cache_clear()
    library.cache_clear()


@pytest.fixture(params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model whose layers matter, under its name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param](), dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    place = tmp_path / request.param
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def batch_of(lengths: tuple[tuple[int, ...], ...], common: int, share: bool) -> Batch:
    """Sequences of clients, which begin with the same tokens; every other one later has a label."""

    def example(length: int) -> Example:
        tokens = torch.arange(length) * 7 % 251 + torch.where(torch.arange(length) < common, 0, length % 5)
        targets = tokens.roll(-1)
        targets[: common + 2], targets[-1] = IGNORE, IGNORE
        return Example(tokens, targets)

    return collate([[example(length) for length in own] for own in lengths], share=share)


def computed(folder: Path, dtype: str, batch: Batch, quantize: Literal["int8"] | None = None) -> list[Tensor]:
    """Losses of the clients, and their gradients."""
    model: LoadedModel = load(Task(str(folder), Lora(rank=3), dtype=dtype, device="cpu", quantize=quantize))
    generator = torch.Generator().manual_seed(1)
    stack = {
        name: (torch.stack([leaf] * 2).double() + 0.05 * torch.randn(2, *leaf.shape, generator=generator).double())
        for name, leaf in model.initial_params(Key(0)).items()
    }
    wide = torch.float64 if dtype == "float64" else torch.float32
    leaves = {name: leaf.to(wide).requires_grad_() for name, leaf in stack.items()}
    losses = model.losses(leaves, batch)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), list(leaves.values()))]


@pytest.mark.parametrize("share", [False, True], ids=["whole", "shared"])
def test_a_decoder_with_kernels(folder: Path, share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(((40, 33), (50,)), 12, share)
    assert bool(batch.shared) == share
    exact = computed(folder, "float64", batch_of(((40, 33), (50,)), 12, False))
    called, function = set[str](), ctypes_calls._function
    monkeypatch.setattr(ctypes_calls, "_function", lambda name: (called.add(name), function(name))[1])
    mine = computed(folder, "bfloat16", batch)
    gradients = {f"{name}_backward" for name in USED[folder.name] - {"cross_entropy", "product"}}
    assert called == USED[folder.name] | gradients
    monkeypatch.setenv("FEDLLM_KERNELS", "torch")
    forget()
    called.clear()
    theirs = computed(folder, "bfloat16", batch)
    assert not called
    assert distance(mine, exact) <= 1.1 * distance(theirs, exact) < 0.05
    assert torch.allclose(mine[0].double(), exact[0], rtol=0.01)


def test_a_quantised_decoder_has_the_same_kernels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert library().tiles  # found before the cache is another one, where they would be compiled again
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    called, function = set[str](), ctypes_calls._function
    monkeypatch.setattr(ctypes_calls, "_function", lambda name: (called.add(name), function(name))[1])
    losses, *_ = computed(folder, "bfloat16", batch_of(((40, 33), (50,)), 0, False), "int8")
    assert called >= USED[folder.name] - {"product"} and torch.isfinite(losses).all()


def test_one_clients_tokens_change_no_bit_of_another(folder: Path) -> None:
    batch = batch_of(((40, 33), (50,)), 0, False)
    tokens = torch.where(torch.arange(len(batch.tokens)) < 73, batch.tokens, 5)
    one, again, two = (
        computed(folder, "bfloat16", b) for b in (batch, batch, dataclasses.replace(batch, tokens=tokens))
    )
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))


def test_transformers_own_files_stay_as_they_are(folder: Path) -> None:
    names = {name: module for name, module in sys.modules.items() if name.startswith("transformers.models.")}
    before = {name: vars(module).get("apply_rotary_pos_emb") for name, module in names.items()}
    model = load(Task(str(folder), Lora(rank=3), dtype="bfloat16", device="cpu")).base.model
    attentions = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    assert attentions and all("forward" in vars(module) for module in attentions)
    assert all(vars(module).get("apply_rotary_pos_emb") is before[name] for name, module in names.items())
