"""Models of other makes: GPT-2's layers, tables of positions, tokenizers that do not fit, adapters of PEFT."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

import fedllm
from fedllm.errors import ConfigError, DataError, ModelError
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.bottleneck import Bottleneck
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.lora_xs import LoraXs
from fedllm.models.adapters.peft import Peft
from fedllm.models.adapters.prefix import Prefix
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.base_models.load import load_base
from fedllm.models.base_models.positions import num_positions
from fedllm.models.base_models.tiny_llama import tiny_model, tiny_tokenizer
from fedllm.models.batch import IGNORE, Example, collate
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from tests.runs.small import small

POSITIONS, END = 16, 257
IDS: Mapping[str, Any] = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": END, "pad_token_id": END}
GPT2 = transformers.GPT2Config(**IDS, n_positions=POSITIONS, n_embd=8, n_layer=1, n_head=2)
OPT = transformers.OPTConfig(
    **IDS, hidden_size=8, word_embed_proj_dim=8, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=POSITIONS,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models, large enough in their weights that layers matter."""
    root = tmp_path_factory.mktemp("other")
    for name, config in (("gpt2", GPT2), ("opt", OPT)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny_model(torch.float32).save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def model_of(folder: Path, adapter: Adapter, dtype: str = "float64") -> LoadedModel:
    return load(Task(str(folder), adapter=adapter, dtype=dtype, template="plain"))  # type: ignore[arg-type]


def trained(model: LoadedModel) -> Tree:
    generator = torch.Generator().manual_seed(0)
    return {
        name: leaf + 0.2 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
        for name, leaf in model.initial_params(Key(1)).items()
    }


# GPT-2's Conv1D


def examples() -> list[Example]:
    rows = [torch.arange(40, 40 + size) for size in (6, 11)]
    return [Example(row, torch.cat([row[1:], row.new_tensor([IGNORE])])) for row in rows]


def test_layers_of_gpt2_train_as_pefts_do(folders: Path, tmp_path: Path) -> None:
    """Losses and gradients of a stack of two clients, each against peft's own layers; then what is saved and merged."""
    from peft import PeftModel

    model = model_of(folders / "gpt2", Lora(rank=2, alpha=4.0))
    layers = {name.rpartition(".")[0] for name in model.initial_params(Key(1))}
    block = "transformer.h.0"
    assert layers == {f"{block}.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    clients, params = [examples(), examples()[:1]], trained(model)
    trees = [params, {name: -leaf for name, leaf in params.items()}]
    stack = {name: leaf.requires_grad_() for name, leaf in tree.stack(trees).items()}
    losses = model.losses(stack, collate(clients))
    losses.sum().backward()
    for k, client in enumerate(clients):
        model.adapter.save(trees[k], tmp_path / str(k), "gpt2")
        plain = transformers.AutoModelForCausalLM.from_pretrained(folders / "gpt2", dtype=torch.float64)
        other: Any = PeftModel.from_pretrained(plain, tmp_path / str(k), is_trainable=True).double().eval()
        rows = [cross_entropy(other(e.tokens[None]).logits[0], e.targets, ignore_index=IGNORE) for e in client]
        loss = torch.stack(rows).mean()
        loss.backward()
        assert float(losses[k].detach()) == pytest.approx(float(loss.detach()), rel=1e-10)
        own = {name: leaf.grad for name, leaf in other.named_parameters() if leaf.requires_grad}
        for name, leaf in stack.items():
            assert leaf.grad is not None
            expected = own[f"base_model.model.{name}.default.weight"]
            assert float((leaf.grad[k] - expected).norm()) < 1e-9 * float(expected.norm())
    assert json.loads((tmp_path / "0" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    plain = transformers.AutoModelForCausalLM.from_pretrained(folders / "gpt2", dtype=torch.float64)
    plain.load_state_dict(dict(model.adapter.merged(params)), strict=False)
    tokens = examples()[1].tokens[None]
    with torch.no_grad():
        assert torch.allclose(plain(tokens).logits[:, -1], next_logits(model, params, tokens), atol=1e-10)


@torch.no_grad()
def next_logits(model: LoadedModel, params: Tree, tokens: Tensor) -> Tensor:
    return model.adapter.logits(params, tokens, torch.ones_like(tokens), None)[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "adapter",
    [LoraXs(rank=2), Bottleneck(size=2, targets=("mlp.c_proj",)), Prefix(tokens=2), SoftPrompt(tokens=2)],
    ids=lambda adapter: type(adapter).__name__,
)
def test_other_adapters_of_gpt2_change_what_it_says(adapter: Adapter, folders: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model, tokens = model_of(folders / "gpt2", adapter), examples()[1].tokens[None]
    params = trained(model)
    base, found = (next_logits(model, leaves, tokens) for leaves in ({}, params))
    plain = transformers.AutoModelForCausalLM.from_pretrained(folders / "gpt2", dtype=torch.float64)
    assert torch.allclose(base, plain(tokens).logits[:, -1], atol=1e-12)
    assert float((found - base).norm()) > 1e-3
    model.adapter.save(params, tmp_path, "gpt2")
    if not isinstance(adapter, Bottleneck):
        other = PeftModel.from_pretrained(plain, tmp_path)
        assert torch.allclose(other(input_ids=tokens).logits[:, -1], found, atol=1e-5)


def test_a_target_that_fits_nothing_says_what_would(folders: Path, llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"'o_proj' fits no layer; did you mean 'c_proj'.* are c_attn, c_fc, c_proj$"):
        model_of(folders / "gpt2", Bottleneck())
    with pytest.raises(ConfigError, match=r"'query' fits no layer; known: c_attn, c_fc, c_proj$"):
        model_of(folders / "gpt2", Lora(rank=2, targets=("query",)))
    with pytest.raises(ConfigError, match="'lm_head' fits no layer that can be extended, for the output head cannot"):
        model_of(llama, Lora(rank=2, targets=("lm_head",)))


# positions


def test_a_table_of_positions_is_a_hard_limit_and_what_is_computed_is_none(folders: Path, llama: Path) -> None:
    for name in ("gpt2", "opt"):
        base = load_base(str(folders / name), dtype="float32")
        assert base.positions == POSITIONS
        with pytest.raises(IndexError):
            base.model(torch.zeros(1, POSITIONS + 1, dtype=torch.long))
        base.model(torch.zeros(1, POSITIONS, dtype=torch.long))
    assert load_base(str(llama)).positions is None
    gptj = transformers.GPTJConfig(**IDS, n_positions=POSITIONS, n_embd=8, n_layer=1, n_head=2, rotary_dim=4)
    assert num_positions(transformers.AutoModelForCausalLM.from_config(gptj)) == POSITIONS
    bloom = transformers.BloomConfig(**IDS, hidden_size=8, n_layer=1, n_head=2)
    assert num_positions(transformers.AutoModelForCausalLM.from_config(bloom)) is None


def test_sequences_are_held_against_the_positions(folders: Path) -> None:
    record = {"prompt": "abcdef", "response": "ghijklm"}  # 6 bytes, a line's end, 7 bytes, the end token
    model = model_of(folders / "opt", SoftPrompt(tokens=2))
    item = model.encode(record, POSITIONS - 2)
    assert item is not None and len(item.tokens) == 14
    model = model_of(folders / "opt", SoftPrompt(tokens=3))
    with pytest.raises(DataError) as caught:
        model.encode(record, 512)
    told = "opt has 16 positions, 3 of them taken by the adapter, too few for a record of 15 tokens"
    assert str(caught.value) == f"{told}; set work.sgd.max_length to 13 or less"


def test_an_answer_is_held_against_the_positions(folders: Path) -> None:
    model = model_of(folders / "gpt2", Lora(rank=2))
    prompt = list(range(40, 53))
    assert len(model.generate({}, [prompt], 4)) == 1  # 13 + 4 - 1: the last one is not read
    with pytest.raises(DataError, match=r"16 positions, too few for a prompt of 13 tokens and max_new_tokens 5; set"):
        model.generate({}, [prompt], 5)
    with pytest.raises(DataError, match=r"a prompt of 17 tokens and max_new_tokens 1; shorten the prompt"):
        model.generate({}, [list(range(17))], 1)


def test_records_that_will_be_evaluated_are_held_against_them_before_the_first_round(
    folders: Path, tmp_path: Path
) -> None:
    """Training sees short records alone."""
    for name, prompt in (("train", "ab"), ("long", "abcdefghijk")):
        lines = [{"prompt": prompt, "response": "c", "who": who} for who in ("ann", "ben")]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    experiment = small(
        tmp_path / "train.jsonl",
        task={"model": str(folders / "opt"), "template": "plain", "adapter": {"lora": {"rank": 2}}},
        federation__shards__heldout=str(tmp_path / "long.jsonl"),
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 8},
    )
    with pytest.raises(DataError, match="opt has 16 positions, too few for a prompt of 12 tokens and max_new_tokens 8"):
        fedllm.run(experiment, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# tokenizers


def test_a_tokenizer_without_an_end_token_is_refused(llama: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(llama)
    with pytest.raises(ModelError, match=r"tokenizer of .*llama has no eos token, which ends an answer; set eos_token"):
        load_base(str(llama))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(llama: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|note|>"]})
    tokenizer.save_pretrained(llama)
    told = "has the token '<|note|>' with the number 259, but the model has embeddings for 259 tokens (0 to 258)"
    with pytest.raises(ModelError, match=re.escape(told)):
        load_base(str(llama))


def test_a_padding_token_without_an_embedding_is_refused_where_a_text_has_it(llama: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(llama)
    model = model_of(llama, Lora(rank=2), "float32")
    good, bad = ({"prompt": f"a{text}", "response": "b"} for text in ("", "[PAD]"))
    assert model.encode(good, 64) is not None
    for use in (lambda: model.encode(bad, 64), lambda: model.prompt(bad)):
        with pytest.raises(DataError, match=r"the token '\[PAD\]' with the number 259, but the model has embeddings"):
            use()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_folder_without_a_tokenizer_says_so(name: str, folders: Path, llama: Path, tmp_path: Path) -> None:
    source = llama if name == "llama" else folders / name
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(source / file, bare)
    with pytest.raises(ModelError, match=r"bare has no tokenizer that can be read; put the tokenizer's files"):
        load_base(str(bare))


# adapters that were made elsewhere


def made_by_peft(folder: Path, **settings: Any) -> Lora:
    """An adapter of peft in a folder, and the task's settings that fit it."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_model(torch.float32),
            LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings),
        )
    model.save_pretrained(str(folder))  # type: ignore[operator]
    return Lora(rank=4, alpha=8.0, targets=("q_proj",), init_from=str(folder))


@torch.no_grad()
@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_an_adapter_of_peft_on_unchanged_weights_is_the_base_at_its_start(start: Any, tmp_path: Path) -> None:
    model = load(Task("tiny-llama", adapter=made_by_peft(tmp_path, init_lora_weights=start), dtype="float32"))
    params, tokens = model.initial_params(Key(0)), torch.arange(30, 40)[None]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.{name}.weight" for name in params} == saved.keys()
    base = tiny_model(torch.float32)(tokens).logits[:, -1]
    assert float((next_logits(model, params, tokens) - base).norm() / base.norm()) < 1e-5


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_on_weights_that_peft_changes_is_refused(start: str, tmp_path: Path) -> None:
    lora = made_by_peft(tmp_path, init_lora_weights=start)
    with pytest.raises(ConfigError, match=f"has init_lora_weights: {start}, so that its factors belong"):
        load(Task("tiny-llama", adapter=lora, dtype="float32")).initial_params(Key(0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *[({"init_lora_weights": name}, f"has init_lora_weights: {name}") for name in ("corda", "loftq", "lora_ga")],
        ({"use_dora": True}, "has use_dora: true, which the adapter lora does not compute"),
        ({"rank_pattern": {"q_proj": 8}}, "has rank_pattern: "),
        ({"alpha_pattern": {"q_proj": 8}}, "has alpha_pattern: "),
        ({"bias": "lora_only"}, 'has bias: "lora_only"'),
        ({"modules_to_save": ["embed_tokens"]}, "has modules_to_save: "),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices: "),
        ({"lora_bias": True}, "has lora_bias: true"),
        ({"layer_replication": [[0, 2]]}, "has layer_replication: "),
        ({"alora_invocation_tokens": [5]}, "has alora_invocation_tokens: "),
        ({"kasa_config": {"beta": 1}}, "has kasa_config: "),
        ({"something_new": 1}, "has something_new: 1"),
        ({"peft_type": "ADALORA"}, "is an adapter of type ADALORA; start from one of type LORA"),
        ({"use_rslora": True}, "was trained with the scale 4, the task has 2"),
        ({"r": 0}, "is no configuration of a LoRA adapter"),
    ],
)
def test_what_changes_an_adapters_function_is_refused_by_name(
    changes: Mapping[str, Any], reason: str, tmp_path: Path
) -> None:
    model = load(Task("tiny-llama", adapter=Lora(rank=4, alpha=8.0, targets=("q_proj",)), dtype="float32"))
    model.adapter.save(model.initial_params(Key(0)), tmp_path, "tiny-llama")
    again = Lora(rank=4, alpha=8.0, targets=("q_proj",), init_from=str(tmp_path))
    load(Task("tiny-llama", adapter=again, dtype="float32")).initial_params(Key(0))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ConfigError, match=re.escape(reason)):
        load(Task("tiny-llama", adapter=again, dtype="float32")).initial_params(Key(0))


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "eva", "loftq", "lora_ga"])
def test_pefts_starts_that_need_data_or_other_weights_are_refused_by_name(start: str) -> None:
    adapter = Peft("lora", {"r": 4, "init_lora_weights": start, "target_modules": ["q_proj"]})
    with pytest.raises(ConfigError, match=f"init_lora_weights: {start} changes the base model's weights or needs"):
        load(Task("tiny-llama", adapter=adapter, dtype="float32"))


def test_weights_that_peft_changes_in_place_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's olora subtracts from float32 weights where they lie."""
    from fedllm.models.adapters import peft

    monkeypatch.setattr(peft, "STARTS", ("nothing",))
    adapter = Peft("lora", {"r": 4, "init_lora_weights": "olora", "target_modules": ["q_proj"]})
    with pytest.raises(ConfigError, match="these settings of lora change the base model's weights"):
        load(Task("tiny-llama", adapter=adapter, dtype="float32"))


def test_a_type_of_peft_that_needs_its_own_trainer_is_refused() -> None:
    with pytest.raises(ConfigError, match="adalora moves ranks between layers by calls between its steps"):
        load(Task("tiny-llama", adapter=Peft("adalora", {"total_step": 10}), dtype="float32"))
