"""The gradients of a stack in the memory that it has for them, whoever writes them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fedllm.models.batch import IGNORE, Example, collate
from fedllm.models.kernels.build import library
from fedllm.models.layers.low_rank_linear import Frozen, low_rank_linear
from fedllm.tensors.tree import Tree
from fedllm.training.gradients import Stack, gradients
from tests.needs import needs_tiles

RANK, SIZE, CLIENTS = 3, 16, 2
LEAVES = {
    "once.a": (RANK, SIZE),
    "once.b": (SIZE, RANK),
    "often.a": (RANK, SIZE),
    "often.b": (SIZE, RANK),
    "idle": (4,),
}


def leaves(buffer: Tensor) -> Tree:
    """Views of a (K, P) buffer, with a gap behind each."""
    found, at = dict[str, Tensor](), 0
    for name, (rows, *columns) in LEAVES.items():
        size = rows * (columns[0] if columns else 1)
        found[name] = buffer[:, at : at + size].view(len(buffer), rows, *columns)
        at += size + 5
    return found


@dataclass(frozen=True)
class Layers:
    """One layer, another one several times, and a leaf that no loss depends on."""

    passes: int
    weight: Tensor

    def losses(self, stack: Tree, batch: Any) -> Tensor:
        counts = tuple(batch.client_tokens)
        x = (batch.tokens[:, None] * torch.linspace(0.1, 1, SIZE)).sin().to(self.weight.dtype)
        for name in ("once", *["often"] * self.passes):
            x = low_rank_linear(x, None, Frozen(self.weight), (stack[f"{name}.a"], stack[f"{name}.b"]), counts, 2.0)
        return torch.stack([own.float().square().mean() for own in x.split(counts)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("micro", [1, 2])
def test_they_are_those_of_plain_autograd(dtype: str, passes: int, micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel has written where it belongs is not copied: all but the idle leaf, and sums of several."""
    if dtype == "bfloat16" and not library().tiles:
        pytest.skip(needs_tiles.kwargs["reason"])
    generator = torch.Generator().manual_seed(0)
    model: Any = Layers(passes, torch.randn(SIZE, SIZE, generator=generator).to(getattr(torch, dtype)) / 4)
    values = 0.3 * torch.randn(CLIENTS, 250, generator=generator)

    def example(length: int) -> Example:
        tokens = torch.arange(length)
        return Example(tokens, torch.where(tokens > 0, tokens, IGNORE))

    batches = [collate([[example(7 + step)], [example(4), example(9)]]) for step in range(micro)]
    gradient = torch.full_like(values, torch.nan)
    copied, copy = list[int](), torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda into, found: (copied.append(len(into)), copy(into, found))[1])
    losses = gradients(Stack(values, gradient, leaves, {}), batches, model)
    own = {name: leaf.clone().requires_grad_() for name, leaf in leaves(values).items()}
    totals = torch.tensor([batch.counts for batch in batches]).sum(0)
    exact = sum(model.losses(own, batch) * torch.tensor(batch.counts) / totals for batch in batches)
    expected = torch.autograd.grad(exact.sum(), list(own.values()), materialize_grads=True)
    assert torch.allclose(losses, exact.detach().double())
    for (name, found), true in zip(leaves(gradient).items(), expected, strict=True):
        assert torch.allclose(found, true, rtol=1e-5, atol=1e-6), name
        assert bool(found.any()) == (name != "idle")
    if passes == 1:
        assert copied == [1 if dtype == "bfloat16" or library().floats else len(LEAVES)]
