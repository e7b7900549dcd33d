"""Architectures, against plain transformers and peft: packed rows of K clients, and models that run apart.

The oracle reads the same model folder with transformers, puts peft's own layers on it, and differentiates a padded
batch of one client (or one sequence after another) with autograd. It shares no code with fedllm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedllm
from fedllm.events import RoundFinished
from fedllm.models.adapters import base
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.adapters.weights import Full
from fedllm.models.base_models.tiny_llama import tiny_tokenizer
from fedllm.models.batch import IGNORE, Batch, Example, collate
from fedllm.models.layers.attention import NAME, SHORT
from fedllm.models.layers.forward_context import Forward
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from tests.runs.small import events, small
from tests.wide import EXACT

WINDOW, RANK, ALPHA, PROMPT, END = 16, 2, 6.0, 4, 257
LENGTHS = ((5, SHORT + 12), (WINDOW + 4,), (SHORT + 1, 9, 40))  # of three clients
IDS: dict[str, Any] = {"vocab_size": 259, "pad_token_id": END, "bos_token_id": 256, "eos_token_id": END}
SIZES: dict[str, Any] = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
BOTH = ["sliding_attention", "full_attention"]
STRETCHED = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
PACKED: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=WINDOW, layer_types=BOTH),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
}
APART: Mapping[str, Callable[[], Any]] = {
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=8, sliding_window=WINDOW, layer_types=BOTH, final_logit_softcapping=5.0
    ),
    "mamba": lambda: transformers.MambaConfig(**IDS, hidden_size=32, num_hidden_layers=2, state_size=4),
    "lfm2": lambda: transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "longrope": lambda: transformers.Phi3Config(
        **SIZES, rope_parameters={**STRETCHED, "original_max_position_embeddings": 32}
    ),
}
REASONS = {
    "gemma2": "(gemma2) cannot train in packed rows: Gemma2Attention has softcap",
    "mamba": "(mamba) cannot train in packed rows: a row of sequences gives other values than each alone",
    "lfm2": "(lfm2) cannot train in packed rows: it has layers of type conv",
    "longrope": "(phi3) cannot train in packed rows: it has rotary embeddings of type longrope",
}
UNCACHED: Mapping[str, Callable[[], Any]] = {
    "bamba": lambda: transformers.BambaConfig(
        **SIZES, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8, attn_layer_indices=[1]
    ),
    "openai": lambda: transformers.OpenAIGPTConfig(vocab_size=259, n_embd=32, n_layer=2, n_head=4),
}
ALL = {**PACKED, **APART, **UNCACHED}


def build(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A random model whose layers matter: weights as large as those of trained models are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model, written once."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        place = root / name
        if not place.exists():
            build(ALL[name]()).save_pretrained(place)
            tiny_tokenizer().save_pretrained(place)
        return place

    return folder


def loaded(folder: Path, adapter: Adapter) -> LoadedModel:
    return load(Task(str(folder), adapter=adapter, dtype="float64", device="cpu"))


def plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def clients(lengths: Sequence[Sequence[int]] = LENGTHS) -> list[list[Example]]:
    """Random words; the last two thirds of each sequence carry a label."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for client in lengths:
        rows = [torch.randint(0, 250, (length,), generator=generator) for length in client]
        labels = [torch.cat([row[1:], row.new_tensor([IGNORE])]) for row in rows]
        for row in labels:
            row[: len(row) // 3] = IGNORE
        made.append([Example(row, label) for row, label in zip(rows, labels, strict=True)])
    return made


def stacked(model: LoadedModel, count: int) -> Tree:
    """Other leaves for each client, as large as trained ones."""
    generator = torch.Generator().manual_seed(4)
    fresh = model.initial_params(Key(5))
    drawn = [
        {name: torch.randn(leaf.shape, generator=generator, dtype=torch.float64) * 0.2 for name, leaf in fresh.items()}
        for _ in range(count)
    ]
    return {name: leaf.requires_grad_() for name, leaf in tree.stack(drawn).items()}


def differentiated(model: LoadedModel, stack: Tree, batch: Batch) -> tuple[Tensor, Tree]:
    losses = model.losses(stack, batch)
    grads = torch.autograd.grad(losses.sum(), list(stack.values()))
    return losses.detach(), dict(zip(stack, grads, strict=True))


def mean_loss(model: Any, examples: Sequence[Example], skipped: int = 0) -> Tensor:
    """One client by transformers: padded on the right, the mean over examples of the mean over labelled tokens.

    `skipped`: tokens that peft puts in front.
    """
    tokens = nn.utils.rnn.pad_sequence([example.tokens for example in examples], batch_first=True)
    mask = torch.stack([torch.arange(tokens.shape[1]) < len(example.tokens) for example in examples]).long()
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, skipped:]
    pairs = zip(logits, examples, strict=True)
    return torch.stack(
        [cross_entropy(row[: len(e.targets)], e.targets, ignore_index=IGNORE) for row, e in pairs]
    ).mean()


def with_lora(model: Any, leaves: Mapping[str, Tensor]) -> tuple[Any, dict[str, nn.Parameter]]:
    """peft's LoRA on the layers that `leaves` names, holding these values; and its parameters by leaf."""
    targets = sorted({name.rpartition(".")[0] for name in leaves})
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    wrapped = peft.get_peft_model(model, config).eval()
    own = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    assert own.keys() == leaves.keys()
    for name, parameter in own.items():
        parameter.data = leaves[name].detach().clone()
    return wrapped, own


def with_prompt(model: Any, leaves: Mapping[str, Tensor]) -> tuple[Any, dict[str, nn.Parameter]]:
    """peft's prompt tuning, holding these values."""
    shape = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4}  # peft does not find them in Mamba
    config = peft.PromptTuningConfig(num_virtual_tokens=PROMPT, task_type="CAUSAL_LM", **shape)  # type: ignore[arg-type]
    wrapped = peft.get_peft_model(model, config).eval()
    (prompt,) = (parameter for parameter in wrapped.parameters() if parameter.requires_grad)
    prompt.data = leaves["soft_prompt"].detach().clone()
    return wrapped, {"soft_prompt": prompt}


Wrap = Callable[[Any, Mapping[str, Tensor]], tuple[Any, dict[str, nn.Parameter]]]


def distances(
    folder: Path, wrap: Wrap, stack: Tree, examples: Sequence[Sequence[Example]], found: tuple[Tensor, Tree]
) -> tuple[float, float]:
    """The largest relative difference between `found` and the oracle: of the losses, of the clients' gradients."""
    losses, grads = found
    apart_losses, apart_grads = [], []
    for k, client in enumerate(examples):
        model, own = wrap(plain(folder), {name: leaf[k] for name, leaf in stack.items()})
        skipped = PROMPT if wrap is with_prompt else 0
        # padding itself changes some of the models that run apart
        batches = [client] if folder.name in PACKED else [[example] for example in client]
        loss = torch.stack([mean_loss(model, batch, skipped) for batch in batches]).mean()
        expected = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
        assert tree.norm(expected) > 1e-3
        apart_losses.append(abs(float(losses[k] / loss.detach()) - 1))
        apart_grads.append(tree.norm(tree.sub(tree.unstack(grads, k), expected)) / tree.norm(expected))
    return max(apart_losses), max(apart_grads)


# packed rows


LORA, SOFT = Lora(rank=RANK, alpha=ALPHA), SoftPrompt(tokens=PROMPT)


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_stack_has_the_losses_and_gradients_of_peft(name: str, folder_of: Callable[[str], Path]) -> None:
    model, examples = loaded(folder_of(name), LORA), clients()
    assert model.why_not_stackable is None and model.base.model.config._attn_implementation == NAME
    stack = stacked(model, 3)
    found = differentiated(model, stack, collate(examples))
    assert max(distances(folder_of(name), with_lora, stack, examples, found)) < EXACT


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_stacked_soft_prompts_have_those_of_peft(name: str, folder_of: Callable[[str], Path]) -> None:
    model, examples = loaded(folder_of(name), SOFT), clients()
    stack = stacked(model, 3)
    found = differentiated(model, stack, collate(examples))
    assert max(distances(folder_of(name), with_prompt, stack, examples, found)) < EXACT


@pytest.mark.parametrize("name", PACKED)
def test_wrong_positions_are_seen(name: str, folder_of: Callable[[str], Path]) -> None:
    """Negative control. Positions that run on over the sequences would not do: rotary embeddings are relative."""
    model, examples = loaded(folder_of(name), LORA), clients()
    stack, batch = stacked(model, 3), collate(examples)
    found = differentiated(model, stack, replace(batch, positions=batch.positions * 2))
    assert min(distances(folder_of(name), with_lora, stack, examples, found)) > 1e-4


@pytest.mark.parametrize("name", PACKED)
def test_attention_across_sequences_is_seen(
    name: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""

    def one_sequence(stack: Tree, lengths: tuple[int, ...], *rest: Any) -> Forward:
        return Forward(stack, (sum(lengths),), *rest)

    model, examples = loaded(folder_of(name), LORA), clients()
    monkeypatch.setattr(base, "Forward", one_sequence)
    stack = stacked(model, 3)
    found = differentiated(model, stack, collate(examples))
    assert min(distances(folder_of(name), with_lora, stack, examples, found)) > 1e-4


# models that run apart


def targeted(name: str) -> Lora:
    """peft refuses some layers of Mamba."""
    return replace(LORA, targets=("in_proj", "x_proj")) if name == "mamba" else LORA


@pytest.mark.parametrize("name", APART)
def test_a_model_that_cannot_be_packed_runs_apart(name: str, folder_of: Callable[[str], Path]) -> None:
    model, own = loaded(folder_of(name), targeted(name)), plain(folder_of(name)).config._attn_implementation
    assert model.why_not_stackable is not None and REASONS[name] in model.why_not_stackable
    assert model.base.model.config._attn_implementation == own
    for examples in clients():
        stack = stacked(model, 1)
        found = differentiated(model, stack, collate([examples]))
        assert max(distances(folder_of(name), with_lora, stack, [examples], found)) < EXACT
    with pytest.raises(AssertionError, match="cannot train in packed rows"):
        model.losses(stacked(model, 3), collate(clients()))


@pytest.mark.parametrize("name", APART)
def test_soft_prompts_of_models_that_run_apart(name: str, folder_of: Callable[[str], Path]) -> None:
    model = loaded(folder_of(name), SOFT)
    examples = clients()[2]
    stack = stacked(model, 1)
    found = differentiated(model, stack, collate([examples]))
    assert max(distances(folder_of(name), with_prompt, stack, [examples], found)) < EXACT


def test_full_weights_of_a_model_that_runs_apart(folder_of: Callable[[str], Path]) -> None:
    """The head is tied and capped: its gradient is that of the embedding as well."""
    model, examples = loaded(folder_of("gemma2"), Full()), clients()[2]
    assert model.why_not_stackable == "adapter full trains one client at a time"
    stack = {name: leaf[None].requires_grad_() for name, leaf in model.initial_params(Key(0)).items()}
    loss, grads = differentiated(model, stack, collate([examples]))
    reference = plain(folder_of("gemma2"))
    expected = torch.stack([mean_loss(reference, [example]) for example in examples]).mean()
    expected.backward()
    assert float(loss[0]) == pytest.approx(float(expected.detach()), rel=EXACT)
    own = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    assert tree.norm(tree.sub(tree.unstack(grads, 0), own)) < EXACT * tree.norm(own)


def greedy(model: Any, start: Tensor) -> list[int]:
    """Six words at most after embeddings (L, d): all of them again for each new one."""
    rows, chosen = start, list[int]()
    while len(chosen) < 6 and END not in chosen:
        logits = model(inputs_embeds=rows[None], use_cache=False).logits[0, -1]
        chosen.append(int(logits.argmax()))
        rows = torch.cat([rows, model.get_input_embeddings()(torch.tensor(chosen[-1:]))])
    return chosen


@torch.no_grad()
@pytest.mark.parametrize("name", [*APART, *UNCACHED])
@pytest.mark.parametrize("trained", [LORA, SOFT, None], ids=["lora", "prompt", "base"])
def test_models_that_run_apart_answer(name: str, trained: Adapter | None, folder_of: Callable[[str], Path]) -> None:
    """A batch of unequal prompts, from a cache where the model's own works."""
    model = loaded(folder_of(name), targeted(name) if trained is LORA else SOFT)
    params = {} if trained is None else {leaf: value[0].detach() for leaf, value in stacked(model, 1).items()}
    assert model.base.caching == (name not in UNCACHED)
    reference = plain(folder_of(name))
    if trained is LORA:
        with_lora(reference, params)
    prompts = [example.tokens[:40] for client in clients() for example in client]
    before = [params["soft_prompt"]] if trained is SOFT else []
    starts = [torch.cat([*before, reference.get_input_embeddings()(prompt)]) for prompt in prompts]
    expected = [model.base.tokenizer.decode(greedy(reference, start), skip_special_tokens=True) for start in starts]
    assert model.generate(params, [prompt.tolist() for prompt in prompts], 6) == expected
    assert len(set(expected)) > 2


# a whole round


RECORDS = [
    {"prompt": "What is seven times six?", "response": "42", "who": "ann"},
    {"prompt": "Capital of France?", "response": "Paris, on the Seine", "who": "ann"},
    {"prompt": "Hi", "response": "Hello there. " * 9, "who": "ann"},
    {"prompt": "Tell me " * 3, "response": "Once upon a time, " * 2, "who": "ben"},
]
STEPS, LR, MOMENTUM = 3, 0.05, 0.9


def trained(folder: Path, start: Mapping[str, Tensor], records: Sequence[Mapping[str, str]]) -> tuple[Tree, float]:
    """A textbook loop, sequence by sequence: what one client's leaves become, and its mean loss."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, own = with_lora(plain(folder), start)
    optimizer = torch.optim.SGD(own.values(), lr=LR, momentum=MOMENTUM)
    seen = []
    for _ in range(STEPS):
        losses = []
        for record in records:
            before = f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            question, answer = tokenizer(before).input_ids, tokenizer(f"{record['response']}<|im_end|>").input_ids
            logits = model(input_ids=torch.tensor([question + answer]), use_cache=False).logits[0]
            losses.append(cross_entropy(logits[len(question) - 1 : -1], torch.tensor(answer)))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    return {name: parameter.detach() for name, parameter in own.items()}, sum(seen) / STEPS


@pytest.mark.parametrize("name", [*PACKED, *APART])
def test_a_serial_round_is_plain_training(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    data, folder = tmp_path / "data.jsonl", folder_of(name)
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    lora = targeted(name)
    experiment = small(
        data,
        task__model=str(folder),
        task__adapter={"lora": {"rank": RANK, "alpha": ALPHA, "targets": list(lora.targets)}},
        task__dtype="float64",
        federation__shards__heldout=0.0,
        work={"sgd": {"lr": LR, "momentum": MOMENTUM, "steps": STEPS, "batch_size": 3, "max_length": 256}},
        evaluation={"metrics": []},
        rounds=1,
    )
    result = fedllm.run(experiment, out=tmp_path / "run")
    start = load(experiment.task).initial_params(experiment.key)
    ends, weights, losses = [], [], []
    for who in ("ann", "ben"):
        mine = [record for record in RECORDS if record["who"] == who]
        end, loss = trained(
            folder, start, mine * (1 if who == "ann" else 3)
        )  # a batch of three goes through them again
        ends.append(end)
        weights.append(len(mine) / len(RECORDS))
        losses.append(loss)
    delta = {leaf: sum(w * (end[leaf] - start[leaf]) for w, end in zip(weights, ends, strict=True)) for leaf in start}
    assert tree.norm(delta) > 1e-2
    assert tree.norm(tree.sub(tree.sub(result.params, start), delta)) < EXACT * tree.norm(delta)
    (finished,) = (event for event in events(tmp_path / "run") if isinstance(event, RoundFinished))
    assert finished.loss == pytest.approx(sum(w * loss for w, loss in zip(weights, losses, strict=True)), rel=EXACT)
