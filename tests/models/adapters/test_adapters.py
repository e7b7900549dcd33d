"""Soft prompts, the model's own weights, and peft's adapters: against plain autograd, peft, and hand-made batches."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedllm.errors import CheckError, ConfigError
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.bottleneck import Bottleneck
from fedllm.models.adapters.peft import Peft
from fedllm.models.adapters.prefix import Prefix
from fedllm.models.adapters.soft_prompt import LEAF, SoftPrompt
from fedllm.models.adapters.weights import BitFit, Full, Norms
from fedllm.models.base_models.load import load_base
from fedllm.models.batch import IGNORE, Batch, Example, collate
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Scope, Task
from fedllm.rng import Key
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from tests.wide import SINGLE

KEY = Key(3)
IA3 = Peft("ia3")
PREFIX = Peft("prefix_tuning", {"num_virtual_tokens": 5})
DORA = Peft("lora", {"use_dora": True, "r": 4, "target_modules": ["q_proj", "down_proj"]})
PEFTS = [IA3, PREFIX, DORA, Peft("vera", {"r": 8}), Peft("prompt_tuning", {"num_virtual_tokens": 3})]
ALL = [SoftPrompt(tokens=3), Prefix(tokens=3), Bottleneck(size=2), Full(), Norms(), *PEFTS]


def ids(adapter: Any) -> str:
    return adapter.type if isinstance(adapter, Peft) else type(adapter).__name__


def task(adapter: Adapter, dtype: str = "float64", **more: Any) -> Task:
    return Task("tiny-llama", adapter=adapter, dtype=dtype, **more)  # type: ignore[arg-type]


def plain(dtype: str = "float64") -> Any:
    return load_base("tiny-llama", dtype=dtype).model


def example(length: int, seed: int = 0, labels: int | None = None) -> Example:
    """Random tokens; the last `labels` of them are to be predicted, all but the first by default."""
    tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))
    targets = tokens.roll(-1)
    targets[-1] = IGNORE
    if labels is not None:
        targets[: length - 1 - labels] = IGNORE
    return Example(tokens, targets)


def moved(params: Tree, seed: int = 0, by: float = 0.05) -> Tree:
    """Weights as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    noise = {n: torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for n, leaf in params.items()}
    return {name: leaf + by * noise[name].to(leaf) for name, leaf in params.items()}


def trained(model: LoadedModel, seed: int = 0, by: float = 0.05) -> Tree:
    return moved(model.initial_params(KEY), seed, by)


def gradients(model: LoadedModel, params: Tree, batch: Batch) -> Tree:
    stack = {name: leaf[None].clone().requires_grad_() for name, leaf in params.items()}
    model.losses(stack, batch).sum().backward()
    found = {name: leaf.grad for name, leaf in stack.items()}
    return {name: grad[0] for name, grad in found.items() if grad is not None}


def next_logits(model: LoadedModel, params: Tree, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.adapter.logits(params, tokens, torch.ones_like(tokens), None)[0]


def masked_loss(logits: list[Tensor], examples: list[Example]) -> Tensor:
    """Mean over examples of the mean over their own labelled tokens, written down."""
    losses = [
        cross_entropy(row[-len(item.targets) :], item.targets, ignore_index=IGNORE)
        for row, item in zip(logits, examples, strict=True)
    ]
    return torch.stack(losses).mean()


EXAMPLES = [example(6, labels=2), example(11, seed=1, labels=7), example(4, seed=2)]


# all of them


@pytest.mark.parametrize("adapter", ALL, ids=ids)
def test_fresh_values_come_from_the_key_alone(adapter: Adapter) -> None:
    model = load(task(adapter, "float32"))
    state = torch.get_rng_state()
    one, again, other = model.initial_params(KEY), model.initial_params(KEY), model.initial_params(Key(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert tree.equal(one, again)
    drawn = not isinstance(adapter, Full | Norms) and adapter not in (IA3, PEFTS[3])  # those start at fixed values
    assert tree.equal(one, other) is not drawn
    assert {leaf.dtype for leaf in one.values()} == {torch.float32}
    assert not any(leaf.requires_grad for leaf in one.values())


@pytest.mark.parametrize("adapter", ALL, ids=ids)
def test_without_parameters_it_is_the_base_model(adapter: Adapter) -> None:
    model, base = load(task(adapter)), plain()
    (losses,) = model.sequence_nll({}, EXAMPLES[:1])
    tokens, targets = EXAMPLES[0].tokens[None], EXAMPLES[0].targets
    expected = cross_entropy(base(tokens).logits[0], targets, ignore_index=IGNORE, reduction="none")
    assert torch.allclose(losses, expected[targets != IGNORE], atol=1e-10)
    assert torch.allclose(next_logits(model, {}, tokens), base(tokens).logits[:, -1], atol=1e-10)


@pytest.mark.parametrize("adapter", ALL, ids=ids)
def test_the_base_model_keeps_its_weights_and_takes_no_gradient(adapter: Adapter) -> None:
    model, params = load(task(adapter)), trained(load(task(adapter)))
    gradients(model, params, collate([EXAMPLES]))
    model.generate(params, [[65, 66]], 2)
    assert tree.equal(model.base.model.state_dict(), plain().state_dict())
    assert not any(leaf.requires_grad or leaf.grad is not None for leaf in model.base.model.parameters())
    assert not model.base.model.training


@pytest.mark.parametrize("adapter", ALL, ids=ids)
def test_padding_on_the_left_changes_nothing(adapter: Adapter) -> None:
    model, rows = load(task(adapter)), [EXAMPLES[k].tokens for k in range(3)]
    params = trained(model)
    width = max(map(len, rows))
    tokens = torch.stack([torch.cat([row.new_full((width - len(row),), 257), row]) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    with torch.no_grad():
        found, _ = model.adapter.logits(params, tokens, mask, None)
    for k, row in enumerate(rows):
        assert torch.allclose(found[k], next_logits(model, params, row[None])[0], atol=1e-10)


@pytest.mark.parametrize("adapter", ALL, ids=ids)
def test_generation_scores_as_training_does(adapter: Adapter) -> None:
    """The logits of the next token are those of the last hidden state of a packed row."""
    model = load(task(adapter))
    params, rows = trained(model), [item.tokens for item in EXAMPLES]
    stack = tree.stack([params])
    with torch.no_grad():
        hidden = model.adapter.hidden(stack, collate([[Example(row, row) for row in rows]]))
        assert hidden.shape == (sum(map(len, rows)), 64)
        ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        found = hidden[ends] @ model.adapter.head(stack).T
    for k, row in enumerate(rows):
        assert torch.allclose(found[k], next_logits(model, params, row[None])[0], atol=1e-9)


@pytest.mark.parametrize("adapter", ALL, ids=ids)
def test_a_cached_answer_is_the_answer_without_a_cache(adapter: Adapter) -> None:
    model = load(task(adapter))
    params, prompts = trained(model, by=0.2), [[65, 66, 67], [70], list(range(90, 100))]
    answers = model.generate(params, prompts, 6)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(next_logits(model, params, torch.tensor([tokens])).argmax()))
            if tokens[-1] == 257:
                break
        assert model.base.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True) == answer


# soft prompts


def by_hand(base: Any, prompt: Tensor, item: Example) -> Tensor:
    """Logits of one sequence behind a prompt, by transformers alone."""
    words = base.get_input_embeddings()(item.tokens)
    return base(inputs_embeds=torch.cat([prompt, words])[None]).logits[0]


def test_a_prompt_stands_before_each_sequence_and_carries_no_loss() -> None:
    model, base = load(task(SoftPrompt(tokens=3))), plain()
    prompt = trained(model)[LEAF].requires_grad_()
    loss = masked_loss([by_hand(base, prompt, item)[3:] for item in EXAMPLES], EXAMPLES)
    loss.backward()
    batch = collate([EXAMPLES])
    found = model.losses({LEAF: prompt.detach()[None]}, batch)
    assert float(found) == pytest.approx(float(loss.detach()), abs=1e-12)
    (grad,) = gradients(model, {LEAF: prompt.detach()}, batch).values()
    assert prompt.grad is not None and torch.allclose(grad, prompt.grad, atol=1e-12)
    assert float(grad.norm()) > 1e-3


def test_clients_of_a_stack_have_their_own_prompts() -> None:
    model = load(task(SoftPrompt(tokens=3)))
    trees = [trained(model, seed) for seed in range(3)]
    clients = [[EXAMPLES[0], EXAMPLES[1]], [], [EXAMPLES[2]]]
    stack = {name: leaf.requires_grad_() for name, leaf in tree.stack(trees).items()}
    losses = model.losses(stack, collate(clients))
    losses.sum().backward()
    grad = stack[LEAF].grad
    assert grad is not None and losses[1] == 0 and not grad[1].any()
    for k in (0, 2):
        batch = collate([clients[k]])
        assert float(model.losses(tree.stack([trees[k]]), batch)) == pytest.approx(float(losses[k].detach()), abs=1e-12)
        assert torch.allclose(gradients(model, trees[k], batch)[LEAF], grad[k], atol=1e-12)


def test_a_prompt_of_words_is_embeddings_of_the_vocabulary() -> None:
    model = load(task(SoftPrompt(tokens=4), "float32"))
    table = model.base.model.get_input_embeddings().weight
    for row in model.initial_params(KEY)[LEAF]:
        (place,) = (table == row).all(1).nonzero()[0].tolist()
        assert place not in model.base.tokenizer.all_special_ids


def test_a_normal_prompt_has_the_mean_and_deviation_of_embeddings() -> None:
    prompt = load(task(SoftPrompt(tokens=200, init="normal"), "float32")).initial_params(KEY)[LEAF]
    table = plain("float32").get_input_embeddings().weight[:256]
    assert float(prompt.std()) == pytest.approx(float(table.std()), rel=0.05)
    assert float(prompt.mean()) == pytest.approx(float(table.mean()), abs=0.01)


def test_peft_loads_a_prompt(tmp_path: Path) -> None:
    from peft import PeftModel

    model = load(task(SoftPrompt(tokens=3), "float32"))
    params, tokens = trained(model), EXAMPLES[1].tokens[None]
    model.adapter.save(params, tmp_path, "tiny-llama")
    other = PeftModel.from_pretrained(plain("float32"), tmp_path)
    with torch.no_grad():
        found = next_logits(model, params, tokens)
        assert float((other(input_ids=tokens).logits[:, -1] - found).norm()) < SINGLE * float(found.norm())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"], config["token_dim"]) == ("PROMPT_TUNING", 3, 64)
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], params[LEAF])


def test_a_prompt_cannot_be_merged_and_needs_a_token() -> None:
    model = load(task(SoftPrompt(tokens=3)))
    with pytest.raises(ConfigError, match="cannot be merged into weights; export --to peft"):
        model.adapter.merged(model.initial_params(KEY))
    with pytest.raises(ConfigError, match="tokens is 0; it must be 1 or more"):
        SoftPrompt(tokens=0)


# the model's own weights


def test_full_tuning_is_plain_autograd_with_a_tied_head() -> None:
    model, base = load(task(Full())), plain().requires_grad_(True)
    params = model.initial_params(KEY)
    assert params.keys() == dict(base.named_parameters()).keys()
    assert "lm_head.weight" not in params and tree.num_values(params) == 115_200
    loss = masked_loss([base(item.tokens[None]).logits[0] for item in EXAMPLES], EXAMPLES)
    loss.backward()
    grads = gradients(model, params, collate([EXAMPLES]))
    for name, parameter in base.named_parameters():
        assert torch.allclose(grads[name], parameter.grad, atol=1e-12), name
    inner = base.model.embed_tokens.weight.grad  # of words that stand nowhere: through the head alone
    absent = [word for word in range(256) if not any(word in item.tokens for item in EXAMPLES)]
    assert bool(inner[absent].any())


def test_trained_weights_are_used_everywhere() -> None:
    """Embedding, layers and head: the same loss and logits as transformers with these weights."""
    model, base = load(task(Full())), plain()
    params = trained(model)
    base.load_state_dict(params, strict=False)
    base.tie_weights()
    expected = masked_loss([base(item.tokens[None]).logits[0] for item in EXAMPLES], EXAMPLES)
    assert float(model.losses(tree.stack([params]), collate([EXAMPLES]))) == pytest.approx(float(expected), abs=1e-11)
    tokens = EXAMPLES[1].tokens[None]
    assert torch.allclose(next_logits(model, params, tokens), base(tokens).logits[:, -1], atol=1e-11)


def test_an_untied_head_is_a_leaf_of_its_own(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fedllm.models.base_models.tiny_llama import tiny_tokenizer

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=259, tie_word_embeddings=False, attention_bias=True, **small)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load(Task(str(tmp_path), adapter=Full(), dtype="float64"))
    base = load_base(str(tmp_path), dtype="float64").model.requires_grad_(True)
    params = trained(model)
    base.load_state_dict(params)
    masked_loss([base(item.tokens[None]).logits[0] for item in EXAMPLES], EXAMPLES).backward()
    grads = gradients(model, params, collate([EXAMPLES]))
    assert "lm_head.weight" in grads
    for name, parameter in base.named_parameters():
        assert torch.allclose(grads[name], parameter.grad, atol=1e-12), name
    biases = load(Task(str(tmp_path), adapter=BitFit(), dtype="float64")).initial_params(KEY)
    assert set(biases) == {f"model.layers.0.self_attn.{x}_proj.bias" for x in "qkvo"}


@pytest.mark.parametrize("adapter", [Norms(), Full()], ids=ids)
def test_norms_are_those_of_full_tuning(adapter: Adapter) -> None:
    norms = load(task(Norms())).initial_params(KEY)
    inner = [f"model.layers.{k}.{name}_layernorm.weight" for k in range(2) for name in ("input", "post_attention")]
    assert set(norms) == {*inner, "model.norm.weight"}
    model = load(task(adapter))
    grads = gradients(model, model.initial_params(KEY), collate([EXAMPLES]))
    base = plain().requires_grad_(True)
    masked_loss([base(item.tokens[None]).logits[0] for item in EXAMPLES], EXAMPLES).backward()
    for name in norms:
        assert torch.allclose(grads[name], base.get_parameter(name).grad, atol=1e-12)


def test_a_model_without_biases_has_nothing_for_bitfit() -> None:
    with pytest.raises(CheckError, match="selects no tensor of the adapter on tiny-llama"):
        load(task(BitFit())).initial_params(KEY)


def test_weights_train_in_float32_over_a_16_bit_base() -> None:
    model = load(task(Full(), "bfloat16"))
    params = model.initial_params(KEY)
    assert {leaf.dtype for leaf in params.values()} == {torch.float32}
    grads = gradients(model, params, collate([EXAMPLES]))
    assert grads.keys() == params.keys() and {leaf.dtype for leaf in grads.values()} == {torch.float32}
    step = {name: leaf * (1 + 1e-6) for name, leaf in params.items()}  # bfloat16 numbers are further apart
    assert not tree.equal(step, params)
    assert torch.equal(*(model.losses(tree.stack([p]), collate([EXAMPLES])) for p in (params, step)))


def test_weights_are_saved_and_merged_by_name(tmp_path: Path) -> None:
    model = load(task(Norms(), "float32"))
    params = trained(model)
    model.adapter.save(params, tmp_path, "tiny-llama")
    assert tree.equal(load_file(tmp_path / "adapter_model.safetensors"), params)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {"fedllm": "weights", "base_model_name_or_path": "tiny-llama"}
    assert tree.equal(dict(model.adapter.merged(params)), params)


def test_a_scope_over_weights_keeps_the_rest_at_the_base_models_values() -> None:
    half = load(task(Full(), scope=Scope(train=("*norm.weight",)))).with_constants(KEY)
    params = trained(half)
    assert set(params) == set(load(task(Norms())).initial_params(KEY))
    whole = load(task(Norms()))
    losses = [model.losses(tree.stack([params]), collate([EXAMPLES])) for model in (half, whole)]
    assert torch.allclose(*losses, atol=1e-12)


@pytest.mark.model
def test_the_whole_real_model_is_134_million_values(smollm2: str) -> None:
    params = load(Task(smollm2, adapter=Full(), dtype="bfloat16")).initial_params(KEY)
    load.cache_clear()
    assert (tree.num_values(params), tree.num_bytes(params)) == (134_515_008, 538_060_032)


# peft's


def peft_of(adapter: Peft, params: Tree, dtype: str) -> Any:
    """peft's own model with these weights, made without the code under test."""
    from peft import get_peft_config, get_peft_model

    settings = {"peft_type": adapter.type.upper(), "task_type": "CAUSAL_LM", **adapter.settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(plain(dtype), get_peft_config(settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(params[name.replace(".default", "").removeprefix("base_model.model.")])
    return model.eval()


@pytest.mark.parametrize("adapter", PEFTS, ids=ids)
def test_losses_and_gradients_are_those_of_peft(adapter: Peft) -> None:
    model = load(task(adapter))
    params = trained(model)
    other = peft_of(adapter, params, "float64")
    loss = masked_loss([other(input_ids=item.tokens[None]).logits[0] for item in EXAMPLES], EXAMPLES)
    loss.backward()
    batch = collate([EXAMPLES])
    assert float(model.losses(tree.stack([params]), batch)) == pytest.approx(float(loss.detach()), abs=1e-10)
    grads = gradients(model, params, batch)
    expected = {
        name.replace(".default", "").removeprefix("base_model.model."): parameter.grad
        for name, parameter in other.named_parameters()
        if parameter.requires_grad
    }
    assert grads.keys() == expected.keys()
    tolerance = 1e-7 if adapter.type.endswith("_tuning") else 1e-9  # peft's prompts are float32 over any base
    assert tree.norm(tree.sub(grads, expected)) < tolerance * tree.norm(expected)


@pytest.mark.parametrize("adapter", PEFTS, ids=ids)
def test_peft_loads_what_it_saved(adapter: Peft, tmp_path: Path) -> None:
    from peft import PeftModel

    model = load(task(adapter, "float32"))
    params, tokens = trained(model), EXAMPLES[1].tokens[None]
    model.adapter.save(params, tmp_path, "tiny-llama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama"
    other = PeftModel.from_pretrained(plain("float32"), tmp_path)
    with torch.no_grad():
        found = next_logits(model, params, tokens)
        assert float((other(input_ids=tokens).logits[:, -1] - found).norm()) < SINGLE * float(found.norm())
        assert float((found - next_logits(model, {}, tokens)).abs().max()) > 1e-3


@pytest.mark.parametrize("adapter", [IA3, DORA], ids=ids)
def test_what_peft_merges_gives_the_same_logits(adapter: Peft) -> None:
    model, base = load(task(adapter)), plain()
    params, tokens = trained(model), EXAMPLES[1].tokens[None]
    merged = model.adapter.merged(params)
    assert 0 < len(merged) < len(list(base.named_parameters()))
    base.load_state_dict(dict(merged), strict=False)
    assert torch.allclose(base(tokens).logits[:, -1], next_logits(model, params, tokens), atol=1e-9)
    assert tree.equal(model.base.model.state_dict(), plain().state_dict())


def test_a_prefix_cannot_be_merged() -> None:
    model = load(task(PREFIX))
    with pytest.raises(ConfigError, match="a prefix_tuning adapter cannot be merged into weights; export --to peft"):
        model.adapter.merged(model.initial_params(KEY))


def test_pefts_dropout_is_keyed_and_off_in_evaluation() -> None:
    model = load(task(Peft("lora", {"r": 4, "lora_dropout": 0.5})))
    stack, state = tree.stack([trained(model)]), torch.get_rng_state()

    def loss(*seeds: int) -> Tensor:
        return model.losses(stack, collate([EXAMPLES], tuple(torch.Generator().manual_seed(seed) for seed in seeds)))

    off, one, again, other = loss(), loss(1), loss(1), loss(2)
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, off)
    assert torch.equal(off, loss())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (Peft("ia4"), "unknown type 'ia4'; did you mean 'ia3'"),
        (Peft("lora", {"rr": 4, "lora_alpa": 3}), "lora has no 'rr'"),
        (Peft("lora", {"lora_alpa": 3}), "lora has no 'lora_alpa'; did you mean 'lora_alpha'"),
        (Peft("lora", {"task_type": "SEQ_CLS"}), "lora has no 'task_type'"),
        (Peft("xlora", {"adapters": {"a": "b"}}), "xlora has no 'adapters'"),
        (Peft("lora", {"target_modules": ["q_porj"]}), "lora on tiny-llama: .*q_porj.* not found"),
        (Peft("lora", {"r": 0}), "`r` should be a positive integer"),
        (Peft("lora", {"target_modules": ["lm_head"]}), "the output head cannot be adapted"),
        (Peft("lora", {"modules_to_save": ["lm_head"]}), "the output head cannot be adapted"),
        (Peft("lora", {"init_lora_weights": "pissa"}), "init_lora_weights: pissa changes the base model's weights"),
    ],
    ids=lambda value: value.type if isinstance(value, Peft) else None,
)
def test_what_peft_has_not_or_cannot_be_trained_is_refused(adapter: Peft, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(task(adapter, "float32")).initial_params(KEY)


def test_settings_are_plain_values_and_the_adapter_is_hashable() -> None:
    one, same = Peft("ia3", {"a": 1, "b": [2]}), Peft("ia3", {"b": [2], "a": 1})
    assert one == same and hash(one) == hash(same)
    others: list[Mapping[str, Any]] = [{"a": 2, "b": [2]}, {"a": 1}]
    assert all(one != Peft("ia3", other) and hash(one) != hash(Peft("ia3", other)) for other in others)
    assert hash(task(one)) == hash(task(same))
    with pytest.raises(ConfigError, match="must be plain JSON values"):
        Peft("ia3", {"a": object()})


def test_peft_and_transformers_do_not_warn_users_of_each_other() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load(task(Peft("ia3"))).initial_params(Key(0))


def test_peft_is_imported_only_when_it_is_used() -> None:
    code = """
import sys
import fedllm.models.adapters.peft, fedllm.models.task, fedllm.experiment.catalog
print(sorted({"peft", "transformers"} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
