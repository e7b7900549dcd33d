"""Weights under several names: what is written for transformers computes what the adapter does, or is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from fedllm.errors import ConfigError
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.peft import Peft
from fedllm.models.adapters.weights import Full
from fedllm.models.base_models.load import load_base
from fedllm.models.base_models.tied_weights import set_weights
from fedllm.models.base_models.tiny_llama import tiny_model, tiny_tokenizer
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.runs.export import _require_equal
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree

TOKENS = torch.arange(20, 32)[None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = ("embed_tokens",)


def trained(adapter: Adapter, dtype: str = "float32", model: str = "tiny-llama") -> tuple[LoadedModel, Tree]:
    """Leaves as after some steps."""
    loaded = load(Task(model, adapter=adapter, dtype=dtype))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    fresh = loaded.initial_params(Key(1))
    return loaded, {name: leaf + 0.1 * torch.randn(leaf.shape, generator=generator) for name, leaf in fresh.items()}


def written(model: LoadedModel, params: Tree, folder: Path) -> Any:
    """The merged model as transformers reads it from its files."""
    base = load_base(model.base.name, dtype="float32")
    set_weights(base.model, model.adapter.merged(params, base))
    base.model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def last(model: LoadedModel, params: Tree) -> Tensor:
    return model.adapter.logits(params, TOKENS, torch.ones_like(TOKENS), None)[0]


@torch.no_grad()
@pytest.mark.parametrize("setting", ["target_modules", "modules_to_save"])
def test_an_embedding_that_alone_changes_parts_from_its_head(setting: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, params = trained(Peft("lora", {"r": 4, setting: list(WORDS)}))
    model.adapter.save(params, tmp_path / "adapter", "tiny-llama")
    adapted = PeftModel.from_pretrained(tiny_model(torch.float32), tmp_path / "adapter")(TOKENS).logits
    merged, plain = written(model, params, tmp_path / "merged"), tiny_model(torch.float32)
    assert torch.equal(merged.lm_head.weight, plain.lm_head.weight)
    assert not torch.equal(merged.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    found = merged(TOKENS).logits
    assert float((found - adapted).norm() / adapted.norm()) < 1e-5
    assert float((found - plain(TOKENS).logits).norm() / adapted.norm()) > 1e-2


@torch.no_grad()
def test_a_head_that_changes_with_its_embedding_stays_tied(tmp_path: Path) -> None:
    model, params = trained(Full())
    merged = written(model, params, tmp_path)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings
    assert torch.equal(merged.lm_head.weight, params[EMBEDDING])
    assert float((merged(TOKENS).logits[:, -1] - last(model, params)).norm()) < 1e-5 * float(last(model, params).norm())


def test_other_layers_that_share_a_weight_cannot_part() -> None:
    model = tiny_model(torch.float32)
    q = "self_attn.q_proj"
    first, second = (model.get_submodule(f"model.layers.{k}.{q}") for k in range(2))
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    second.weight = first.weight
    new = torch.ones_like(first.weight)
    set_weights(model, {f"model.layers.{k}.{q}.weight": new for k in range(2)})
    assert torch.equal(first.weight, new)
    with pytest.raises(ConfigError, match=r"0\.self_attn\.q_proj\.weight and model\.layers\.1\.self_attn.*one weight"):
        set_weights(model, {f"model.layers.1.{q}.weight": 2 * new})


@torch.no_grad()
def test_weights_that_a_16_bit_run_rounds_are_merged_as_the_files_hold_them(tmp_path: Path) -> None:
    """W + s B A by hand, of a model whose own weights have more than 8 bits."""
    sizes: Mapping[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=259, num_attention_heads=2, **sizes)
    plain = AutoModelForCausalLM.from_config(config)
    plain.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, params = trained(Lora(rank=2, alpha=4.0, targets=("q_proj",)), "bfloat16", str(tmp_path))
    layer = "model.layers.0.self_attn.q_proj"
    weight = plain.get_parameter(f"{layer}.weight")
    assert not torch.equal(weight, weight.bfloat16().float())
    merged = model.adapter.merged(params, load_base(str(tmp_path), dtype="float32"))
    expected = weight + 2.0 * params[f"{layer}.lora_B"] @ params[f"{layer}.lora_A"]
    assert tree.equal(dict(merged), {f"{layer}.weight": expected})


def test_merged_weights_that_do_not_give_what_the_adapter_does_are_refused() -> None:
    """peft runs the first layer twice, which weights of two layers cannot say."""
    twice = Peft("lora", {"r": 4, "layer_replication": [[0, 2], [0, 1]], "target_modules": ["q_proj"]})
    for adapter, wrong in ((Peft("lora", {"r": 4, "target_modules": ["q_proj"]}), False), (twice, True)):
        model, params = trained(adapter)
        base = load_base("tiny-llama", dtype="float32")
        set_weights(base.model, model.adapter.merged(params, base))
        run: Any = SimpleNamespace(experiment=SimpleNamespace(task=model.task), model=model, params=params)
        if not wrong:
            _require_equal(run, base)
            continue
        with pytest.raises(ConfigError, match="merged weights do not give what this adapter does"):
            _require_equal(run, base)
