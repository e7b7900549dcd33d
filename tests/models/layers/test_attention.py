"""Packed rows: equal to transformers' padded batches for several architectures, apart to the bit, refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedllm.models.adapters.base import Decoder
from fedllm.models.base_models.load import Base
from fedllm.models.base_models.tiny_llama import tiny_tokenizer
from fedllm.models.batch import Example, collate
from fedllm.models.layers import attention
from fedllm.models.layers.attention import attend
from fedllm.models.layers.forward_context import Forward, current, forward_context
from fedllm.models.layers.model_probe import prepare

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 4
LENGTHS = (7, 1, 12, 5)


def gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=WINDOW, layer_types=kinds)


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "gemma3": gemma3,
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
}


def build(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A random model whose layers matter: weights as large as those of trained models are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def words(lengths: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=generator) for length in lengths]


def packed(model: Any, sequences: list[Tensor]) -> Tensor:
    base = Base(model, tiny_tokenizer(), None, "random", "random")
    return Decoder(base).row({}, collate([[Example(row, row) for row in sequences]]))


def padded(model: Any, sequences: list[Tensor]) -> Tensor:
    """transformers' own attention over a right-padded batch; the hidden states of the real tokens, in a row."""
    tokens = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.stack([torch.arange(tokens.shape[1]) < len(row) for row in sequences]).long()
    hidden = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    return torch.cat([row[: len(tokens)] for row, tokens in zip(hidden, sequences, strict=True)])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_packed_row_equals_a_padded_batch(name: str) -> None:
    model, sequences = build(ARCHITECTURES[name]()), words(LENGTHS)
    expected = padded(model, sequences)
    prepare(model, name)
    found = packed(model, sequences)
    assert float((found - expected).abs().max()) < 1e-10
    assert float(expected.std()) > 0.1


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_the_window_of_these_models_matters(name: str) -> None:
    """Else the test above would not see whether a window is honoured."""
    wide = ARCHITECTURES[name]()
    wide.sliding_window = 100
    narrow, other = build(ARCHITECTURES[name]()), build(wide)
    assert float((padded(narrow, words(LENGTHS)) - padded(other, words(LENGTHS))).abs().max()) > 1e-3


def test_a_position_does_not_see_what_comes_after_it() -> None:
    model, (row,) = build(ARCHITECTURES["llama"]()), words((9,))
    prepare(model, "llama")
    changed = row.clone()
    changed[6] += 1
    before, after = packed(model, [row]), packed(model, [changed])
    assert torch.equal(before[:6], after[:6])
    assert not torch.equal(before[6:], after[6:])


def test_a_sequence_changes_no_bit_of_another() -> None:
    model, sequences = build(ARCHITECTURES["qwen3"](), torch.float32), words((6, 9, 6))
    prepare(model, "qwen3")
    before = packed(model, sequences)
    after = packed(model, [sequences[0], sequences[1].flip(0), sequences[2]])
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[15:], after[15:])
    assert not torch.equal(before[6:15], after[6:15])


# the function alone


def oracle(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """Position by position, head by head."""
    groups, length = len(query) // len(key), query.shape[1]
    out = torch.zeros(*query.shape[:2], value.shape[2], dtype=query.dtype)
    for head in range(len(query)):
        for place in range(length):
            first = 0 if window is None else max(0, place - window + 1)
            seen = slice(first, place + 1)
            scores = (key[head // groups, seen] @ query[head, place]) * scaling
            out[head, place] = torch.softmax(scores, 0) @ value[head // groups, seen]
    return out


def attended(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], **options: Any) -> Tensor:
    with forward_context(Forward({}, lengths)):
        out, _ = attend(nn.Module(), query[None], key[None], value[None], None, **options)
    return out[0].transpose(0, 1)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 12),
    groups=st.integers(1, 3),
    short=st.sampled_from([0, 5, 100]),
)
def test_attention_is_the_textbook_one(lengths: list[int], window: int | None, groups: int, short: int) -> None:
    total, before = sum(lengths), attention.SHORT
    query, key, value = drawn(2 * groups, total, 4), drawn(2, total, 4, seed=1), drawn(2, total, 6, seed=2)
    attention.SHORT = short  # both ways to compute it
    try:
        found = attended(query, key, value, tuple(lengths), scaling=0.7, sliding_window=window)
    finally:
        attention.SHORT = before
    pieces = zip(*(torch.split(states, lengths, 1) for states in (query, key, value)), strict=True)
    expected = torch.cat([oracle(q, k, v, 0.7, window) for q, k, v in pieces], 1)
    assert float((found - expected).abs().max()) < 1e-12


def test_the_scale_is_one_over_the_root_of_the_size_unless_it_is_given() -> None:
    query, key, value = drawn(2, 5, 16), drawn(2, 5, 16, seed=1), drawn(2, 5, 16, seed=2)
    found = attended(query, key, value, (5,))
    assert torch.allclose(found, oracle(query, key, value, 1 / math.sqrt(16), None), atol=1e-12)


@pytest.mark.parametrize("short", [0, 100])
def test_a_nan_stays_in_its_sequence(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT", short)
    states = [drawn(2, 12, 4, seed=seed).requires_grad_() for seed in range(3)]
    clean = attended(*states, (5, 3, 4))
    spoilt = [state.detach().clone() for state in states]
    for state in spoilt:
        state[:, 5:8] = math.nan
        state.requires_grad_()
    out = attended(*spoilt, (5, 3, 4))
    assert torch.equal(out[:, :5], clean[:, :5]) and torch.equal(out[:, 8:], clean[:, 8:])
    clean.square().sum().backward()
    out.square().sum().backward()
    for before, after in zip(states, spoilt, strict=True):
        assert before.grad is not None and after.grad is not None
        assert torch.equal(after.grad[:, :5], before.grad[:, :5]) and torch.equal(after.grad[:, 8:], before.grad[:, 8:])
        assert bool(after.grad[:, 5:8].isnan().any())


# what cannot be packed


def reason(model: Any) -> str:
    """Why it cannot, after a look at what `prepare` left behind."""
    before = padded(model, words(LENGTHS))
    found = prepare(model, "mine")
    assert found is not None and torch.equal(padded(model, words(LENGTHS)), before)
    return found


def test_models_that_compute_something_else_are_told_by_name() -> None:
    inner = transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=None)
    assert "mine (gemma2) cannot train in packed rows: Gemma2Attention has softcap" in reason(build(inner))
    conv = transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"])
    assert "layers of type conv" in reason(build(conv))
    sinks = transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    assert "GptOssAttention has s_aux" in reason(build(sinks, torch.float32))


def test_rotary_embeddings_that_depend_on_the_longest_sequence_are_told() -> None:
    """Also where each type of layer has its own, and only by name: the probe is too short to show them."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "rotary embeddings of type dynamic" in reason(
        build(transformers.LlamaConfig(**SIZES, rope_parameters=dynamic))
    )
    plain = {"rope_type": "default", "rope_theta": 1e4}
    nested = {"full_attention": dynamic, "sliding_attention": plain}
    found = transformers.Gemma3TextConfig(**SIZES, head_dim=8, rope_parameters=nested)
    assert "rotary embeddings of type dynamic" in reason(build(found))
    assert prepare(build(transformers.LlamaConfig(**SIZES, rope_parameters=plain)), "mine") is None


@pytest.mark.parametrize(
    "config",
    [
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        transformers.GPTNeoConfig(
            vocab_size=64, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]]
        ),
    ],
    ids=["bloom", "gpt_neo"],
)
def test_attention_outside_of_the_interface_is_told(config: Any) -> None:
    """GPT-Neo gives the right values even in a row, but one sequence's NaN would reach the others."""
    assert "its attention does not go through transformers' interface" in reason(build(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_packed_as_well(dtype: torch.dtype) -> None:
    assert prepare(build(ARCHITECTURES["llama"](), dtype), "llama") is None


# the pass of a thread


def test_a_pass_ends_with_its_block_even_after_an_error() -> None:
    outer, inner = Forward({}, (1,)), Forward({}, (2,))
    with forward_context(outer):
        with pytest.raises(ZeroDivisionError), forward_context(inner):
            assert current() is inner
            raise ZeroDivisionError
        assert current() is outer
    assert current().lengths is None and not current().stack
