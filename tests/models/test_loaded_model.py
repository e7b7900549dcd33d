"""A loaded task: mean losses, scores, greedy answers, its scope, and one load per process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedllm.errors import CheckError, ModelError
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.weights import BitFit
from fedllm.models.base_models.load import load_base
from fedllm.models.batch import IGNORE, Example, collate
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.objectives.language_modeling import Lm
from fedllm.models.objectives.sft import Sft
from fedllm.models.task import Scope, Task
from fedllm.models.templates import Template
from fedllm.rng import Key
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree

KEY = Key(11)
END = 257
LORA = Lora(rank=4)


def model_of(dtype: str = "float64", **more: Any) -> LoadedModel:
    return load(Task("tiny-llama", adapter=LORA, dtype=dtype, **more))  # type: ignore[arg-type]


def example(length: int, seed: int = 0, labels: int | None = None) -> Example:
    tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))
    targets = tokens.roll(-1)
    targets[-1] = IGNORE
    if labels is not None:
        targets[: length - 1 - labels] = IGNORE
    return Example(tokens, targets)


def trained(model: LoadedModel, seed: int = 0) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: leaf + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
        for name, leaf in model.initial_params(KEY).items()
    }


def merged(model: LoadedModel, params: Tree) -> Any:
    """Plain transformers with the adapter folded into the weights."""
    base = load_base("tiny-llama", dtype="float64").model
    base.load_state_dict(dict(model.adapter.merged(params)), strict=False)
    return base


# losses


def test_a_clients_loss_is_the_mean_of_its_examples_means() -> None:
    model = model_of()
    params, examples = trained(model), [example(4, labels=1), example(12, 1, labels=9), example(7, 2)]
    base = merged(model, params)
    own = [cross_entropy(base(e.tokens[None]).logits[0], e.targets, ignore_index=IGNORE) for e in examples]
    expected = torch.stack(own).mean()
    found = model.losses(tree.stack([params]), collate([examples]))
    assert found.shape == (1,) and float(found) == pytest.approx(float(expected), abs=1e-11)


def test_language_modelling_and_fine_tuning_differ_by_their_labels_alone() -> None:
    record = {"prompt": "2+2", "response": "4"}
    found = []
    for objective in (Sft(), Lm()):
        model = model_of(objective=objective)
        item = model.encode(record, 100)
        assert item is not None
        (losses,) = model.sequence_nll({}, [item])
        found.append(losses)
    answer, whole = found
    assert len(answer) == len("4") + 1 and torch.allclose(whole[-len(answer) :], answer, atol=1e-12)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=7), st.integers(1, 8))
@settings(max_examples=15)
def test_scores_do_not_depend_on_the_batches(lengths: list[int], batch_size: int) -> None:
    model = model_of()
    params, examples = trained(model), [example(n, seed, labels=n // 2) for seed, n in enumerate(lengths)]
    found = model.sequence_nll(params, examples, batch_size)
    assert [len(row) for row in found] == [n // 2 for n in lengths]
    for item, row in zip(examples, found, strict=True):
        (alone,) = model.sequence_nll(params, [item])
        assert torch.allclose(row, alone, atol=1e-11)


def test_scores_are_the_log_likelihoods_of_the_labelled_tokens() -> None:
    model = model_of()
    params, item = trained(model), example(9, labels=4)
    logits = merged(model, params)(item.tokens[None]).logits[0].log_softmax(-1)
    expected = torch.stack([-logits[place - 1, item.tokens[place]] for place in range(5, 9)])
    (found,) = model.sequence_nll(params, [item])
    assert torch.allclose(found, expected, atol=1e-11) and not found.requires_grad


# answers


def greedy(base: Any, prompt: Sequence[int], count: int) -> list[int]:
    """All tokens again for every new one."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(base(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :]


PROMPTS = [[256, 65, 66], [70], list(range(40, 60)), [256, *b"user\nHi", 257, 10]]


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_greedy_whatever_else_is_in_the_batch(seed: int) -> None:
    model = model_of()
    params = trained(model, seed)
    base, tokenizer = merged(model, params), model.base.tokenizer
    answers = model.generate(params, PROMPTS, 12)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer == tokenizer.decode(greedy(base, prompt, 12), skip_special_tokens=True)
        assert model.generate(params, [prompt], 12) == [answer]


def test_answers_are_those_of_transformers() -> None:
    model = model_of()
    params = trained(model)
    base, tokenizer = merged(model, params), model.base.tokenizer
    width = max(map(len, PROMPTS))
    tokens = torch.tensor([[END] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    made = base.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=12, do_sample=False)
    expected = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
    assert model.generate(params, PROMPTS, 12) == expected
    assert len(set(expected)) > 1


class Scripted:
    """An adapter whose answers are written down: at each step the token of each row."""

    def __init__(self, script: list[list[int]], cached: bool) -> None:
        self.script, self.cached, self.widths = script, cached, list[int]()

    def logits(self, params: Tree, tokens: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        chosen = self.script[len(self.widths)]
        self.widths.append(tokens.shape[1])
        out = torch.zeros(len(tokens), 259)
        out[torch.arange(len(tokens)), torch.tensor(chosen)] = 1
        return out, "cache" if self.cached else None


@pytest.mark.parametrize(("cached", "widths"), [(True, [2, 1, 1]), (False, [2, 3, 4])])
def test_an_answer_ends_with_its_end_token(cached: bool, widths: list[int]) -> None:
    """The first row ends at once; what the model says for it afterwards is ignored; the second ends third."""
    script = Scripted([[END, 65], [66, 67], [68, END], [69, 70]], cached)
    model = replace(model_of(), adapter=script)
    assert model.generate({}, [[1], [1, 2]], 10) == ["", "AC"]
    assert script.widths == widths


def test_an_answer_has_at_most_so_many_tokens() -> None:
    script = Scripted([[65]] * 9, True)
    assert replace(model_of(), adapter=script).generate({}, [[1]], 4) == ["AAAA"]
    assert replace(model_of(), adapter=script).generate({}, [[1]], 0) == [""]


def test_the_models_own_end_tokens_end_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    assert model.end_tokens == [END]
    monkeypatch.setattr(model.base.model.generation_config, "eos_token_id", [258, END])
    assert model.end_tokens == [END, 258]
    script = Scripted([[65], [258], [66]], True)
    assert replace(model, adapter=script).generate({}, [[1]], 9) == ["A"]


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
def test_a_prompt_and_its_answer_are_the_example(template: Template) -> None:
    model = model_of(template=template)
    record = {"prompt": "2+2", "response": "4"}
    item = model.encode(record, 1000)
    assert item is not None
    assert [*model.prompt(record), *b"4", END] == item.tokens.tolist()


# scope


def test_only_what_the_scope_trains_is_a_leaf() -> None:
    whole = model_of().initial_params(KEY)
    half = model_of(scope=Scope(train=("*.layers.1.*",), freeze=("*lora_A",)))
    assert set(half.initial_params(KEY)) == {n for n in whole if ".layers.1." in n and n.endswith("lora_B")}
    assert all(torch.equal(leaf, whole[name]) for name, leaf in half.initial_params(KEY).items())


def test_frozen_leaves_take_part_and_empty_parameters_are_the_base() -> None:
    """Constants of a large B: they change the loss of trained parameters, not that of the base."""
    item = example(8)
    model = model_of(scope=Scope(freeze=("*.layers.0.*",)))
    params = model.initial_params(KEY)
    frozen = {
        name: torch.full_like(leaf, 0.2)
        for name, leaf in model_of().initial_params(KEY).items()
        if ".layers.0." in name
    }
    bound = replace(model, constants=frozen)
    (base,), (start,), (changed,) = (
        model.sequence_nll({}, [item]),
        model.with_constants(KEY).sequence_nll(params, [item]),
        bound.sequence_nll(params, [item]),
    )
    assert torch.equal(base, start)  # a fresh adapter is the identity
    assert float((changed - base).abs().max()) > 1e-2
    assert torch.equal(*bound.sequence_nll({}, [item]), base)
    assert bound.generate({}, PROMPTS, 4) == model.generate({}, PROMPTS, 4) != bound.generate(params, PROMPTS, 4)


def test_a_bound_model_holds_the_frozen_leaves_of_its_key() -> None:
    model = model_of(scope=Scope(freeze=("*lora_A",)))
    whole = model_of().initial_params(KEY)
    constants = model.with_constants(KEY).constants
    assert tree.equal(constants, {name: leaf for name, leaf in whole.items() if name.endswith("lora_A")})
    assert not tree.equal(model.with_constants(Key(12)).constants, constants)
    assert not model_of().with_constants(KEY).constants


@pytest.mark.parametrize(
    ("scope", "reason"),
    [
        (Scope(train=("*lora_C",)), r"task.scope.train: '\*lora_C' fits no tensor of the adapter \(its tensors: model"),
        (Scope(share=("!*lora_b",)), r"task.scope.share: '!\*lora_b' fits no tensor"),
        (Scope(freeze=("*",)), "selects no tensor of the adapter on tiny-llama"),
    ],
)
def test_scopes_that_fit_nothing_are_refused(scope: Scope, reason: str) -> None:
    with pytest.raises(CheckError, match=reason):
        model_of(scope=scope).initial_params(KEY)


def test_a_pattern_may_name_what_is_left_out() -> None:
    scope = Scope(share=("!*lora_B",))
    assert scope.shares("x.lora_A") and not scope.shares("x.lora_B")


# one load per process


def test_a_task_is_loaded_once() -> None:
    assert model_of() is model_of()
    assert model_of() is not model_of(scope=Scope(freeze=("*lora_A",)))


def test_a_model_with_other_logits_is_refused_when_it_is_loaded(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, GraniteConfig

    from fedllm.models.base_models.tiny_llama import tiny_tokenizer

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GraniteConfig(vocab_size=259, num_key_value_heads=1, logits_scaling=4.0, **small)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"granite\) makes its logits otherwise"):
        load(Task(str(tmp_path)))


def test_what_can_be_stacked_depends_on_the_adapter() -> None:
    assert model_of().why_not_stackable is None
    assert load(Task("tiny-llama", adapter=BitFit())).why_not_stackable == "adapter bitfit trains one client at a time"


@pytest.mark.model
def test_the_real_model_answers_and_learns_in_a_stack(smollm2: str) -> None:
    model = load(Task(smollm2, adapter=Lora(rank=4, targets=("q_proj", "v_proj")), dtype="float32"))
    records = [{"prompt": "What is the capital of France?", "response": "The capital of France is Paris."}]
    answer = model.generate(model.initial_params(KEY), [model.prompt(records[0])], 10)
    assert answer == ["The capital of France is Paris."]
    item = model.encode(records[0], 100)
    assert item is not None
    (right,) = model.sequence_nll({}, [item])
    assert float(right.mean()) < 0.5 < math.log(49152)
    stack = {name: leaf.requires_grad_() for name, leaf in tree.stack([model.initial_params(KEY)] * 2).items()}
    model.losses(stack, collate([[item], [item]])).sum().backward()
    grads = {name: leaf.grad for name, leaf in stack.items() if leaf.grad is not None}
    load.cache_clear()
    assert grads.keys() == stack.keys() and tree.finite(grads)
    assert tree.norm(tree.sub(tree.unstack(grads, 0), tree.unstack(grads, 1))) < 1e-4 * tree.norm(grads)
