"""What a client's sequences begin with in common is computed once, and gives what computing it again would give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.models.adapters.base import Adapter, Decoder
from fedllm.models.adapters.bottleneck import Bottleneck
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.lora_xs import LoraXs
from fedllm.models.adapters.prefix import Prefix
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.adapters.sparse_lora import SparseLora
from fedllm.models.adapters.weights import Full
from fedllm.models.base_models.load import Base
from fedllm.models.base_models.tiny_llama import tiny_tokenizer
from fedllm.models.batch import FEWEST, IGNORE, Batch, Example, collate, in_common, spared
from fedllm.models.layers import attention
from fedllm.models.layers.model_probe import prepare
from fedllm.models.layers.shared_prefix import shared_prefix
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.tensors import tree
from tests.models.layers.test_attention import ARCHITECTURES, build
from tests.wide import SINGLE

SHARED = (0, 12, 12, 0, 0, 9)  # of the sequences of `clients`
LENGTHS = (20, 15, 33, 7, 14, 11)


def example(length: int, common: int, seed: int, labelled_from: int | None = None) -> Example:
    """Its first `common` tokens do not depend on the seed, and carry no label."""
    own = torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(seed))
    tokens = torch.cat([torch.arange(3, 3 + common), own[common:]])
    targets = tokens.roll(-1)
    targets[: common if labelled_from is None else labelled_from] = IGNORE
    targets[-1] = IGNORE
    return Example(tokens, targets)


def clients() -> list[list[Example]]:
    """Three sequences with 12 tokens in common, one alone, an idle client, two with 9."""
    first = [example(length, 12, seed) for seed, length in enumerate(LENGTHS[:3])]
    return [first, [example(LENGTHS[3], 0, 4)], [], [example(length, 9, seed) for length, seed in ((14, 5), (11, 6))]]


def test_what_sequences_have_in_common_ends_at_a_token_or_a_label() -> None:
    first, second, third = clients()[0]
    assert in_common([first, second, third]) == 12
    assert in_common([first]) == in_common([]) == spared([first]) == 0
    assert spared([first, second, third]) == 24
    assert in_common([first, example(20, 12, 1, labelled_from=10)]) == 10
    assert in_common([first, example(20, FEWEST - 1, 1)]) == 0
    assert in_common([first, example(20, FEWEST, 1)]) == FEWEST


def test_a_batch_knows_what_it_shares_only_if_asked() -> None:
    batch, whole = collate(clients(), share=True), collate(clients())
    assert batch.shared == SHARED and whole.shared == ()
    assert batch.lengths == whole.lengths == tuple(length - 1 for length in LENGTHS)  # the last token is no input
    assert batch.client_tokens == whole.client_tokens == (68, 7, 0, 25)
    assert whole.client_computed == (65, 6, 0, 23) and batch.client_computed == (65 - 24, 6, 0, 23 - 9)
    assert batch.only(0).shared == (0, 12, 12) and batch.only(3).client_computed == (14,)
    assert collate([[example(9, 0, 1)], [example(9, 0, 1)]], share=True).shared == ()


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6))
def test_the_row_can_be_restored(drawn: list[tuple[int, int]]) -> None:
    common = drawn[0][0]
    sharing = [min(length, common) if place and wish % 2 else 0 for place, (length, wish) in enumerate(drawn)]
    sharing = [c if all(sharing[1 : i + 1]) else 0 for i, c in enumerate(sharing)]  # of one client, then others
    lengths = tuple(length for length, _ in drawn)
    sequences = enumerate(zip(lengths, sharing, strict=True))
    row = torch.cat([torch.cat([torch.arange(c), 100 * i + torch.arange(c, n)]) for i, (n, c) in sequences])
    found = shared_prefix(lengths, tuple(sharing))
    assert len(found.kept) == len(row) - sum(sharing)
    assert torch.equal(row[found.kept][found.places], row)


def losses_and_gradients(model: LoadedModel, stack: tree.Tree, batch: Batch) -> tuple[Tensor, tree.Tree]:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in stack.items()}
    losses = model.losses(leaves, batch)
    weights = torch.arange(1.0, len(losses) + 1).to(losses)
    found = torch.autograd.grad((losses * weights).sum(), list(leaves.values()), materialize_grads=True)
    return losses.detach(), dict(zip(leaves, found, strict=True))


def loaded(adapter: Adapter, dtype: str = "float32") -> LoadedModel:
    return load(Task("tiny-llama", adapter=adapter, dtype=dtype)).with_constants(Key(0))  # type: ignore[arg-type]


def stack_of(model: LoadedModel, count: int) -> tree.Tree:
    generator = torch.Generator().manual_seed(3)
    trees = [
        {
            n: leaf + 0.1 * torch.randn(leaf.shape, generator=generator).to(leaf)
            for n, leaf in model.initial_params(Key(0)).items()
        }
        for _ in range(count)
    ]
    return tree.stack(trees)


ADAPTERS: list[Adapter] = [Lora(rank=4, alpha=8.0), Bottleneck(size=4), LoraXs(rank=4), SparseLora(rank=2, density=0.1)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)
def test_losses_and_gradients_are_those_of_computing_it_again(adapter: Adapter, recompute: bool) -> None:
    model = loaded(adapter)
    assert model.shares_prefixes
    stack = stack_of(model, 4)
    found, expected = (
        losses_and_gradients(model, stack, collate(clients(), recompute=recompute, share=share))
        for share in (True, False)
    )
    assert torch.allclose(found[0], expected[0], rtol=SINGLE, atol=0)
    assert tree.norm(tree.sub(found[1], expected[1])) < SINGLE * tree.norm(expected[1])
    if recompute:
        kept = losses_and_gradients(model, stack, collate(clients(), share=True))
        assert all(torch.equal(found[1][name], leaf) for name, leaf in kept[1].items())


def test_all_weights_have_the_gradients_of_computing_it_again() -> None:
    model = loaded(Full())
    own, stack = [clients()[0]], tree.stack([model.initial_params(Key(0))])
    found, expected = (losses_and_gradients(model, stack, collate(own, share=share)) for share in (True, False))
    assert tree.norm(tree.sub(found[1], expected[1])) < SINGLE * tree.norm(expected[1])


def test_a_client_in_a_stack_has_its_gradients_alone() -> None:
    model = loaded(ADAPTERS[0])
    stack, cohort = stack_of(model, 4), clients()
    _, together = losses_and_gradients(model, stack, collate(cohort, share=True))
    own = {name: leaf[3:] for name, leaf in stack.items()}
    _, alone = losses_and_gradients(model, own, collate(cohort[3:], share=True))
    assert tree.norm(tree.sub(tree.unstack(together, 3), tree.unstack(alone, 0))) > 0  # weighted 4 to 1
    apart = tree.sub(tree.unstack(together, 3), {name: 4 * leaf for name, leaf in tree.unstack(alone, 0).items()})
    assert tree.norm(apart) < SINGLE * tree.norm(tree.unstack(together, 3))


def test_sharing_what_is_not_in_common_is_seen() -> None:
    """Negative control."""
    model = loaded(ADAPTERS[0])
    batch = collate(clients(), share=True)
    wrong = replace(batch, shared=(0, 13, 13, 0, 0, 9))
    found, expected = (losses_and_gradients(model, stack_of(model, 4), each) for each in (wrong, batch))
    assert tree.norm(tree.sub(found[1], expected[1])) > 1e-3 * tree.norm(expected[1])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt2"])
def test_every_architecture_gives_the_same_states(name: str) -> None:
    model = build(ARCHITECTURES[name]())
    assert prepare(model, name) is None
    decoder = Decoder(Base(model, tiny_tokenizer(), None, "random", "random"))
    found, expected = (decoder.row({}, collate(clients(), share=share)) for share in (True, False))
    assert float((found - expected).norm()) < SINGLE * float(expected.norm())


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("short", [512, 0], ids=["plain products", "fused kernel"])
def test_attention_and_its_gradient_are_exact(short: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT", short)
    row, generator = shared_prefix(LENGTHS, SHARED), torch.Generator().manual_seed(0)
    sizes: list[tuple[int, ...]] = [(6, len(row.kept), 4), (2, len(row.kept), 4), (2, len(row.kept), 4)]
    q, k, v = (torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes)
    gradient = torch.randn(len(row.kept), 6, 4, generator=generator, dtype=torch.float64)

    def gradients(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, (q, k, v), gradient)]

    whole = (states.index_select(1, row.places) for states in (q, k, v))
    expected = gradients(attention._row(*whole, LENGTHS, 0.5, window)[row.kept])  # type: ignore[misc,arg-type]
    found = gradients(attention._row(q, k, v, LENGTHS, 0.5, window, SHARED))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


UNSHARED: list[tuple[Adapter, dict[str, Any]]] = [
    (Lora(rank=4, dropout=0.1), {}),
    (Prefix(tokens=2), {}),
    (SoftPrompt(tokens=2), {}),
    (Lora(rank=4), {"dtype": "float64"}),
]


@pytest.mark.parametrize(("adapter", "settings"), UNSHARED)
def test_what_tells_beginnings_apart_shares_nothing(adapter: Adapter, settings: dict[str, Any]) -> None:
    assert not loaded(adapter, **settings).shares_prefixes
