"""Chunked cross entropy: torch's own, value and gradients, without ever holding all logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from fedllm.models.layers.cross_entropy import CHUNK, _cut, row_losses
from tests.needs import needs_products


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(rows: int, *, vocabulary: int = 11, width: int = 5, frozen: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    hidden = drawn(rows, width, seed=0).requires_grad_()
    head = drawn(vocabulary, width, seed=1).requires_grad_(not frozen)
    return hidden, head, torch.arange(rows) * 7 % vocabulary


def test_a_value_by_hand() -> None:
    """Logits (ln 1, ln 3): the losses are ln 4 - ln 1 and ln 4 - ln 3."""
    head = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    losses = row_losses(torch.ones(2, 1, dtype=torch.float64), head, torch.tensor([0, 1]))
    assert losses.tolist() == pytest.approx([math.log(4), math.log(4 / 3)], abs=1e-15)


def test_a_capped_value_by_hand() -> None:
    """Logits (0, 2 z) of a cap of z = ln 3 / tanh(2): (0, ln 3)."""
    cap = math.log(3) / math.tanh(2)
    head = torch.tensor([[0.0], [2 * cap]], dtype=torch.float64)
    losses = row_losses(torch.ones(2, 1, dtype=torch.float64), head, torch.tensor([0, 1]), cap)
    assert losses.tolist() == pytest.approx([math.log(4), math.log(4 / 3)], abs=1e-15)


@given(
    rows=st.sampled_from([1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]),
    frozen=st.booleans(),
    cap=st.none() | st.sampled_from([0.5, 3.0]),
)
def test_it_is_cross_entropy_with_its_gradients(rows: int, frozen: bool, cap: float | None) -> None:
    hidden, head, targets = case(rows, frozen=frozen)
    weights = drawn(rows, seed=2)  # each row counts differently
    losses = row_losses(hidden, head, targets, cap)
    (losses * weights).sum().backward()
    other, other_head, _ = case(rows, frozen=frozen)
    logits = other @ other_head.T
    expected = cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="none")
    (expected * weights).sum().backward()
    assert torch.allclose(losses, expected, atol=1e-13, rtol=0)
    assert hidden.grad is not None and other.grad is not None
    assert torch.allclose(hidden.grad, other.grad, atol=1e-13, rtol=0)
    if frozen:
        assert head.grad is None
    else:
        assert head.grad is not None and other_head.grad is not None
        assert torch.allclose(head.grad, other_head.grad, atol=1e-12, rtol=0)


def test_only_the_head_may_train() -> None:
    hidden, head, targets = case(3, frozen=False)
    row_losses(hidden.detach(), head, targets).sum().backward()
    other = head.detach().clone().requires_grad_()
    cross_entropy(hidden.detach() @ other.T, targets, reduction="sum").backward()
    assert head.grad is not None and other.grad is not None and torch.allclose(head.grad, other.grad, atol=1e-13)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_by_finite_differences(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedllm.models.layers.cross_entropy.CHUNK", 2)
    hidden, head, targets = case(5, frozen=frozen)
    assert torch.autograd.gradcheck(lambda h, w: row_losses(h, w, targets), (hidden, head))


def test_a_head_that_is_the_embedding_gets_both_gradients() -> None:
    def loss(table: Tensor, chunked: bool) -> Tensor:
        hidden, targets = torch.tanh(table[torch.arange(6)]), torch.arange(6) + 3
        if chunked:
            return row_losses(hidden, table, targets).sum()
        return cross_entropy(hidden @ table.T, targets, reduction="sum")

    tables = [drawn(11, 5, seed=1).requires_grad_() for _ in range(2)]
    for table, chunked in zip(tables, (True, False), strict=True):
        loss(table, chunked).backward()
    left, right = (table.grad for table in tables)
    assert left is not None and right is not None and torch.allclose(left, right, atol=1e-13, rtol=0)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operator makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_the_logits_of_all_rows_never_exist_at_once(frozen: bool) -> None:
    rows, vocabulary = 10 * CHUNK, 50
    hidden, head, targets = case(rows, vocabulary=vocabulary, frozen=frozen)
    with Largest() as seen:
        row_losses(hidden, head, targets).sum().backward()
    assert seen.numel == max(CHUNK * vocabulary, hidden.numel()) < rows * vocabulary
    with Largest() as plain:
        cross_entropy(hidden @ head.T, targets)
    assert plain.numel == rows * vocabulary


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_float32_or_wider_and_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    hidden, head = torch.full((1, 1), 100.0, dtype=dtype), torch.tensor([[10.0], [20.0]], dtype=dtype)
    (loss,) = row_losses(hidden, head, torch.tensor([0]))
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert float(loss) == 1000.0


def test_the_gradient_of_a_16_bit_head_is_summed_wide() -> None:
    """A chunk of 256 and twenty of 0.5: in bfloat16 each 0.5 would be rounded away, for 256 has neighbours 2 apart."""
    rows = 21 * CHUNK
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    losses = row_losses(torch.ones(rows, 1, dtype=torch.bfloat16), head, torch.zeros(rows, dtype=torch.int64))
    weights = torch.full((rows,), 1 / CHUNK)  # each row's share of the gradient is half of its weight
    weights[:CHUNK] = 512 / CHUNK
    (losses * weights).sum().backward()
    assert head.grad is not None and head.grad.dtype == torch.bfloat16
    assert head.grad[:, 0].tolist() == [-266, 266]


def test_a_nan_stays_in_its_row() -> None:
    hidden, head, targets = case(4)
    spoilt = hidden.detach().clone()
    spoilt[1] = math.nan
    spoilt.requires_grad_()
    clean, found = row_losses(hidden, head, targets), row_losses(spoilt, head, targets)
    clean.sum().backward()
    found.sum().backward()
    assert hidden.grad is not None and spoilt.grad is not None
    for place in (0, 2, 3):
        assert torch.equal(found[place], clean[place]) and torch.equal(spoilt.grad[place], hidden.grad[place])
    assert bool(found[1].isnan())


def sharp(rows: int, vocabulary: int = 3000, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """A head whose rows have a mean, and hidden states that give most words next to no probability."""
    head = nn.Parameter((drawn(vocabulary, width, seed=1) / 8 + 0.1).bfloat16(), requires_grad=False)
    targets = torch.arange(rows) * 7 % vocabulary
    return (8 * (drawn(rows, width, seed=0) + head[targets])).bfloat16().requires_grad_(), head, targets


@needs_products
def test_words_that_hardly_count_stand_for_themselves_by_their_mean() -> None:
    hidden, head, targets = sharp(50)
    row_losses(hidden, head, targets).sum().backward()
    assert hidden.grad is not None
    logits = (hidden.detach() @ head.T).double()
    p = logits.softmax(1)
    gradient = p.scatter_add(1, targets[:, None], -torch.ones(50, 1, dtype=torch.float64))
    exact, small = gradient @ head.double(), gradient.abs() < (1 - p.gather(1, targets[:, None])) / 2**18
    assert small.double().mean() > 0.8  # most are left out
    dropped = gradient.masked_fill(small, 0) @ head.double()
    off = [float((each.double() - exact).norm() / exact.norm()) for each in (hidden.grad, dropped, exact.bfloat16())]
    assert off[0] < 2 * off[2]  # what rounding the exact gradient does


@needs_products
def test_a_row_has_the_bits_that_it_has_alone() -> None:
    hidden, head, targets = sharp(CHUNK + 40)
    row_losses(hidden, head, targets).sum().backward()
    own = hidden.detach()[100:103].requires_grad_()
    row_losses(own, head, targets[100:103]).sum().backward()
    assert hidden.grad is not None and own.grad is not None and torch.equal(own.grad, hidden.grad[100:103])
    spoilt = hidden.detach().clone()
    spoilt[100] = math.nan
    row_losses(spoilt.requires_grad_(), head, targets).sum().backward()
    assert spoilt.grad is not None and spoilt.grad[100].isnan().all()
    others = torch.arange(len(hidden)) != 100
    assert torch.equal(spoilt.grad[others], hidden.grad[others])


@given(st.integers(0, 2000), st.integers(1, 300))
def test_pieces_cover_all_rows_and_are_as_long_as_each_other(count: int, size: int) -> None:
    cut = _cut(count, size)
    assert [row for rows in cut for row in range(count)[rows]] == list(range(count))
    lengths = [rows.stop - rows.start for rows in cut] or [0]
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1 and len(cut) == math.ceil(count / size)
