"""LoRA beside sparse values: the formula left to autograd, positions that everybody draws alike, stacks, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedllm.errors import ConfigError
from fedllm.models.adapters.sparse_lora import AdaptedSparse, SparseLora
from fedllm.models.layers.forward_context import Forward, forward_context
from fedllm.models.loaded_model import load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.tensors import sparse_mask, tree

KEY, SHAPE = Key(5), (5, 7)  # out, in: not square


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_places_rise_and_are_the_same_for_everybody(rows: int, columns: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rows * columns))
    found = sparse_mask.positions("a", rows * columns, count)
    sparse_mask.positions.cache_clear()
    assert torch.equal(found, sparse_mask.positions("a", rows * columns, count))
    assert len(found) == count and bool((found[1:] > found[:-1]).all())
    assert int(found[0]) >= 0 and int(found[-1]) < rows * columns
    values = torch.arange(1.0, count + 1)
    whole = sparse_mask.scatter("a", values, (rows, columns))
    assert whole.shape == (rows, columns) and int(whole.count_nonzero()) == count
    assert torch.equal(sparse_mask.gather("a", whole, count), values)


def test_layers_have_places_of_their_own() -> None:
    assert not torch.equal(sparse_mask.positions("a", 1000, 100), sparse_mask.positions("b", 1000, 100))
    cells = torch.cat([sparse_mask.positions(f"layer {k}", 64 * 64, 41) for k in range(100)])
    assert abs(float((cells % 64).double().mean()) - 31.5) < 2, "columns are drawn evenly"
    assert abs(float((cells // 64).double().mean()) - 31.5) < 2, "rows are drawn evenly"


@pytest.mark.parametrize(("density", "count"), [(0.01, 41), (1e-9, 1), (1.0, 4096)])
def test_the_density_is_a_share_of_the_layer(density: float, count: int) -> None:
    assert sparse_mask.num_values((64, 64), density) == count


@pytest.mark.parametrize("sizes", [[4], [3, 0, 5]])
def test_values_and_gradients_are_the_formula(sizes: list[int]) -> None:
    layer, clients, n = nn.Linear(SHAPE[1], SHAPE[0]).double().requires_grad_(False), len(sizes), 6
    x = drawn(sum(sizes), SHAPE[1], seed=0).requires_grad_()
    values, a = drawn(clients, n, seed=1).requires_grad_(), drawn(clients, 2, SHAPE[1], seed=2).requires_grad_()
    b, gradient = drawn(clients, SHAPE[0], 2, seed=3).requires_grad_(), drawn(sum(sizes), SHAPE[0], seed=4)
    leaves = [x, values, a, b]
    stack = {"p.lora_A": a, "p.lora_B": b, "p.lora_sparse": values}
    with forward_context(Forward(stack, tuple(size for size in sizes if size), tuple(sizes))):
        found = AdaptedSparse(layer, "p", 1.5, 0.0)(x[None])[0]
    grads = torch.autograd.grad(found, leaves, gradient)
    pieces = []
    for k, x_k in enumerate(x.split(sizes)):
        whole = torch.zeros(SHAPE[0] * SHAPE[1], dtype=torch.float64)
        whole = whole.index_put((sparse_mask.positions("p", len(whole), n),), values[k]).view(SHAPE)
        pieces.append(layer(x_k) + 1.5 * (x_k @ whole.T + x_k @ a[k].T @ b[k].T))
    expected = torch.cat(pieces)
    assert torch.allclose(found, expected, atol=1e-12)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, leaves, gradient), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_it_begins_as_the_base_model_and_zeros_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(Task("tiny-llama", adapter=SparseLora(rank=2, density=0.1), dtype="float64"))
    params, tokens = model.initial_params(KEY), torch.tensor([[5, 9, 2]])
    monkeypatch.setattr(sparse_mask, "scatter", None)  # not called
    logits = [model.adapter.logits(leaves, tokens, torch.ones_like(tokens), None)[0] for leaves in ({}, params)]
    assert torch.equal(*logits)
    sizes = {name: len(leaf) for name, leaf in params.items() if name.endswith("lora_sparse")}
    assert sizes["model.layers.0.mlp.down_proj.lora_sparse"] == round(0.1 * 64 * 192) and len(sizes) == 14
    assert tree.equal(params, model.initial_params(KEY))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, "density is 0; it must be above 0 and at most 1"),
        ({"density": 1.5}, "density is 1.5; it must be above 0"),
        ({"density": float("nan")}, "density is nan"),
        ({"init": "singular"}, "begins at zero; leave out init and init_from"),
        ({"init_from": "runs/x"}, "begins at zero"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparseLora(**settings)  # type: ignore[arg-type]
