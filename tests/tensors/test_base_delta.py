"""What is added to frozen weights: sums, what a lagging client lacks, and sizes, against sums of dense products."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.messages import serialization
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Request
from fedllm.rng import Key
from fedllm.tensors import low_rank, tree
from fedllm.tensors.base_delta import BaseDelta

LAYERS = {"a": (4, 6), "b": (10, 3)}  # out, in

ranks = st.lists(st.integers(0, 4), min_size=1, max_size=7)  # of each round; 0: it was empty


def step(version: int, rank: int) -> tree.Tree:
    found: tree.Tree = {}
    for layer, (size_out, size_in) in LAYERS.items():
        generator = Key(version).fold(layer).generator()
        b, a = (torch.randn(n, m, generator=generator).double() for n, m in ((size_out, rank), (rank, size_in)))
        found |= low_rank.layer_leaves(layer, b, a)
    return found


def moved(rounds: Sequence[int]) -> tuple[list[BaseDelta], list[dict[str, Tensor]]]:
    """The server after each round, and the dense sums."""
    base_deltas, sums = [BaseDelta()], [{layer: torch.zeros(size).double() for layer, size in LAYERS.items()}]
    for version, rank in enumerate(rounds, 1):
        added = step(version, rank)
        base_deltas.append(base_deltas[-1].stepped(version, added) if rank else base_deltas[-1])
        product = {layer: torch.matmul(*low_rank.pair(added, layer)) for layer in LAYERS}
        sums.append({layer: sums[-1][layer] + product[layer] for layer in LAYERS})
    return base_deltas, sums


def same(base_delta: BaseDelta, sums: dict[str, Tensor]) -> bool:
    if not base_delta.layers():
        return all(float(whole.abs().max()) == 0 for whole in sums.values())
    return all(torch.allclose(base_delta.dense(layer), whole, atol=1e-12) for layer, whole in sums.items())


@given(ranks)
def test_the_sum_is_that_of_the_products(rounds: list[int]) -> None:
    assert all(map(same, *moved(rounds)))


@given(ranks, st.data())
def test_a_client_that_comes_now_and_then_has_the_same_sum(rounds: list[int], data: st.DataObject) -> None:
    """It is sent what it lacks over the wire; its site may have more of it from another client."""
    base_deltas, sums = moved(rounds)
    seen, held = 0, BaseDelta()
    for base_delta, total in zip(base_deltas, sums, strict=True):
        if data.draw(st.booleans()):
            held = held.joined(over_the_wire(base_delta.since(held.version)))  # another client of the site
        if data.draw(st.booleans()):
            sent = over_the_wire(base_delta.since(seen))
            assert sent.after == seen and sent.version == (base_delta.version if base_delta.version > seen else seen)
            held, seen = held.joined(sent), base_delta.version
            assert held.version == base_delta.version and same(held, total)


def over_the_wire(base_delta: BaseDelta) -> BaseDelta:
    request = Request({}, (), RoundContext(0, Key(0), 1, 1), base_delta)
    back = serialization.deserialize(serialization.serialize(request))
    assert isinstance(back, Request)
    return back.base_delta


@given(ranks, st.data())
def test_what_is_sent_is_the_factors_or_the_layer_whichever_is_less(rounds: list[int], data: st.DataObject) -> None:
    base_delta = moved(rounds)[0][-1]
    seen = data.draw(st.integers(0, len(rounds)))
    sent = base_delta.since(seen)
    for layer, (size_out, size_in) in LAYERS.items():
        leaves = [leaf for part in sent.steps.values() for name, leaf in part.items() if name.startswith(f"{layer}.")]
        missed = sum(rounds[seen:]) * (size_out + size_in)
        assert sum(leaf.numel() for leaf in leaves) == (missed if missed < size_out * size_in else size_out * size_in)


@given(ranks)
def test_the_server_keeps_at_most_twice_the_layers(rounds: list[int]) -> None:
    base_delta = moved(rounds)[0][-1]
    assert base_delta.num_bytes < 2 * 8 * sum(n * m for n, m in LAYERS.values())


@given(ranks)
def test_folded_into_an_adapter_it_is_a_part_of_its_product(rounds: list[int]) -> None:
    base_deltas, sums = moved(rounds)
    own = step(99, 2)
    found = base_deltas[-1].folded({**own, "other": torch.ones(1)})
    for layer, whole in sums[-1].items():
        expected = torch.matmul(*low_rank.pair(own, layer)) + whole
        assert torch.allclose(torch.matmul(*low_rank.pair(found, layer)), expected, atol=1e-12)
    assert float(found["other"]) == 1


def test_a_layer_becomes_dense_when_its_factors_are_as_large() -> None:
    """4 x 6 = 24 values: ranks of 1 and 1 take 20, the third reaches 24. By hand."""
    base_deltas, _ = moved([1, 1, 1])
    forms = [{name for leaves in one.steps.values() for name in leaves if name[0] == "a"} for one in base_deltas]
    assert forms == [set(), {"a.lora_A", "a.lora_B"}, {"a.lora_A", "a.lora_B"}, {"a.lora_A", "a.lora_B", "a.lora_BA"}]
    last = base_deltas[3]
    assert [at for at, leaves in last.steps.items() if "a.lora_BA" in leaves] == [1], "the oldest, the newest stay"
    assert "a.lora_BA" not in last.since(1).steps[3] and "a.lora_BA" in last.since(0).steps[3]


def test_versions_of_a_request_rise() -> None:
    request = Request({}, (), RoundContext(0, Key(0), 1, 1), BaseDelta({1: step(1, 1), 3: step(3, 1)}, after=1))
    with pytest.raises(serialization.WireError, match="versions of its base delta do not rise"):
        serialization.deserialize(serialization.serialize(request))
