"""Clipping on a grid: what one example adds is bounded, whole, and the same in any order."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm.training.clipped_sums import PIECE, Clip, norms


@pytest.mark.parametrize("size", [1, 7, 1000, 3 * PIECE + 5])
def test_the_grid_by_hand(size: int) -> None:
    clip = Clip(0.3, size, on_grid=True)
    assert clip.levels == 2 ** max(20, 11 + math.ceil(math.log2(size) / 2)) and clip.unit == 0.3 / clip.levels
    assert clip.levels >= 2**11 * math.sqrt(size)
    assert 0.3 * (1 - 2.0**-11) < clip.bound < 0.3
    assert Clip(0.3, size, on_grid=False).bound == 0.3 and Clip(0.3, size, on_grid=False).unit == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 3 * PIECE + 5])
@pytest.mark.parametrize("kind", ["normal", "one large", "equal", "half steps"])
def test_no_example_is_longer_than_the_clip(kind: str, size: int, dtype: torch.dtype) -> None:
    """Rounding half a step in every coordinate, and in the last bits of float32, stays within; in integers."""
    clip, generator = Clip(0.3, size, on_grid=True), torch.Generator().manual_seed(size)
    rows = torch.randn(2, size, generator=generator, dtype=torch.float64)
    if kind == "one large":
        rows[:, 1:] = 0
    elif kind == "equal":
        rows[:] = 1
    elif kind == "half steps":  # each value is rounded up, by half a step
        rows[:] = (torch.floor(rows / rows.norm(dim=1, keepdim=True) * clip.levels).abs() + 0.5000001) * clip.unit
    for row in rows.to(dtype):
        total = torch.zeros(size, dtype=torch.float64)
        clip.add(total, row[None].clone())
        whole = total.long()
        assert torch.equal(whole.double(), total)
        assert int((whole * whole).sum()) <= clip.levels**2
        assert int((whole * whole).sum()) > 0.998 * clip.levels**2 or float(row.double().norm()) < 0.3


def test_short_gradients_are_rounded_to_the_nearest_step_and_long_ones_shrunk() -> None:
    clip = Clip(2.0, 3, on_grid=True)
    rows = torch.tensor([[0.1, -0.2, 0.3], [30.0, 40.0, 0.0]], dtype=torch.float64)
    total = torch.zeros(3, dtype=torch.float64)
    clip.add(total, rows.clone())
    first = (rows[0] * 2**19).round()
    second = (rows[1] / 50 * clip.bound / clip.unit).round()
    assert torch.equal(total, first + second)
    assert float(second.norm()) == pytest.approx(2**20, rel=4e-6)


def test_the_order_of_adding_shows_nowhere() -> None:
    clip, rows = Clip(1.0, 5000, on_grid=True), torch.randn(40, 5000, generator=torch.Generator().manual_seed(1))
    found = []
    for order in (torch.arange(40), torch.arange(39, -1, -1)):
        total = torch.zeros(5000, dtype=torch.float64)
        for part in rows[order].split(7):
            clip.add(total, part.clone())
        found.append(total)
    assert torch.equal(*found)


def test_norms_are_those_of_float64() -> None:
    rows = torch.randn(3, PIECE + 9, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [[1e-30], [1.0], [1e30]]
    )
    assert torch.allclose(norms(rows), rows.double().norm(dim=1), rtol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("grid", [True, False])
def test_what_is_not_finite_counts_as_zeros(value: float, grid: bool) -> None:
    clip, rows = Clip(1.0, 4, on_grid=grid), torch.full((3, 4), 0.25)
    rows[1, 2] = value
    total, expected = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    clip.add(total, rows.clone())
    clip.add(expected, rows[[0, 2]].clone())
    assert torch.equal(total, expected) and bool(total.all())
