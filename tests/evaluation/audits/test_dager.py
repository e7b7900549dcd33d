"""Texts out of one update: exact where the theory holds, and nothing where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.evaluation.audits.dager import Reconstruction, dager
from fedllm.evaluation.audits.overlap import best_overlaps, rouge_n
from fedllm.evaluation.audits.spans import Span, layer_spans
from fedllm.messages.context import RoundContext
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.weights import Full
from fedllm.models.batch import Example
from fedllm.models.loaded_model import load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.tensors.tree import Tree
from fedllm.training.base import ClientJob, run_work
from fedllm.training.sgd import Sgd
from tests.models.adapters.test_lora import example

TWO = (example(9, 1), example(7, 2))


def test_a_span_by_hand() -> None:
    """Inputs e1 and e2 of R^4 with independent errors: 0 to e1, 1 to e3, and 0.7071 to (e1 + e3) / sqrt 2."""
    rows = torch.outer(torch.tensor([1.0, 2, 0, 1, 3]), torch.eye(4)[0])
    rows += torch.outer(torch.tensor([0.0, 1, 1, -1, 2]), torch.eye(4)[1])
    span = Span.of(rows, cutoff=1)
    assert (len(span.basis), span.full) == (2, False)
    asked = torch.stack([torch.eye(4)[0], torch.eye(4)[2], torch.eye(4)[0] + torch.eye(4)[2]])
    assert torch.allclose(span.distance(asked), torch.tensor([0.0, 1.0, 0.5**0.5], dtype=torch.float64), atol=1e-6)
    assert Span.of(torch.eye(5, 4), cutoff=1).full, "a space that is whole tells nobody apart"


def test_overlaps_by_hand() -> None:
    """5 6 7 against 5 6 8: two of three tokens, one of two pairs. A prediction serves one reference."""
    assert rouge_n((5, 6, 7), (5, 6, 8), 1) == pytest.approx(2 / 3)
    assert rouge_n((5, 6, 7), (5, 6, 8), 2) == pytest.approx(1 / 2)
    assert rouge_n((5, 5), (5,), 1) == pytest.approx(2 / 3), "a token counts as often as it is there"
    one, two = best_overlaps([(1, 2, 3)], [(1, 2), (1, 2, 3)])
    assert (one.found, two.found, two.exact) == ((), (1, 2, 3), True)


def update(
    adapter: Any, examples: tuple[Example, ...] = TWO, name: str = "tiny-llama", **work: Any
) -> tuple[Any, Tree, Tree]:
    """A loaded model, the start, and the delta of a client's work."""
    model = load(Task(name, adapter=adapter, dtype="float32"))
    start = dict(model.initial_params(Key(1)))
    settings = {"lr": 0.05, "steps": 1, "batch_size": len(examples), **work}
    job = ClientJob(RoundContext(0, Key(1), 1, 1, client="a"), start, examples)
    (outcome,) = run_work(Sgd(**settings), [job], model)
    assert not isinstance(outcome, str)
    return model, start, dict(outcome[0].parts["delta"].tree)


def attacked(model: Any, start: Tree, delta: Tree) -> Reconstruction:
    first, second = (layer_spans(delta, start, f"model.layers.{block}.self_attn") for block in (0, 1))
    assert first is not None and second is not None
    return dager(model, first, second)


def texts(*examples: Example) -> list[tuple[int, ...]]:
    return [tuple(one.tokens[: one.needed].tolist()) for one in examples]


@pytest.mark.parametrize("adapter", [Full(), Lora(rank=24, alpha=24)], ids=["full", "lora"])
def test_two_texts_are_read_word_for_word(adapter: Any) -> None:
    found = attacked(*update(adapter))
    there = {token for text in texts(*TWO) for token in text}
    assert set(found.bag) == there
    assert [one.exact for one in best_overlaps(found.texts, texts(*TWO))] == [True, True]


def test_a_rank_below_the_tokens_stops_it() -> None:
    found = attacked(*update(Lora(rank=4, alpha=4)))
    assert (found.bag, found.texts) == ((), ()) and "as many as the update has directions" in found.reason


def test_more_tokens_than_the_model_is_wide_stop_it() -> None:
    many = tuple(example(40, seed) for seed in range(3))
    found = attacked(*update(Full(), many))
    assert not found.texts and found.reason


def test_noise_stops_it() -> None:
    model, start, delta = update(Lora(rank=24, alpha=24))
    generator = torch.Generator().manual_seed(0)
    scale = max(float(leaf.abs().max()) for leaf in delta.values())
    noised = {name: leaf + scale * torch.randn(leaf.shape, generator=generator) for name, leaf in delta.items()}
    found = attacked(model, start, noised)
    assert not found.texts
    there = {token for text in texts(*TWO) for token in text}
    assert len(there & set(found.bag)) <= 2


def test_adamw_hides_the_space() -> None:
    """Which is no proof of safety; the command refuses it."""
    found = attacked(*update(Full(), optimizer="adamw", lr=1e-3))
    assert not any(one.exact for one in best_overlaps(found.texts, texts(*TWO)))


def test_an_update_without_attention_is_not_covered() -> None:
    _, start, delta = update(Lora(rank=4, targets=("down_proj",)))
    assert layer_spans(delta, start, "model.layers.0.self_attn") is None


@pytest.mark.model
def test_two_texts_of_16_tokens_are_read_out_of_a_real_model(smollm2: str) -> None:
    generator = torch.Generator().manual_seed(5)
    some = []
    for _ in range(2):
        tokens = torch.randint(100, 49_000, (16,), generator=generator)
        targets = tokens.roll(-1)
        targets[-1] = -100
        some.append(Example(tokens, targets))
    found = attacked(*update(Full(), tuple(some), smollm2, lr=1.0))
    overlaps = best_overlaps(found.texts, texts(*some))
    assert sum(one.rouge_1 for one in overlaps) / 2 > 0.95
