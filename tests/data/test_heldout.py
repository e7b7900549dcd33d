"""Held-out records: disjoint, complete, seeded, and never all of a client's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.data.heldout import hold_out
from fedllm.errors import ConfigError
from fedllm.rng import Key

RECORDS = [{"text": str(row)} for row in range(40)]


@given(count=st.integers(1, 40), fraction=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 2**64 - 1))
def test_disjoint_complete_ordered(count: int, fraction: float, seed: int) -> None:
    train, heldout = hold_out(RECORDS[:count], fraction=fraction, key=Key(seed))
    rows = [int(record["text"]) for record in train], [int(record["text"]) for record in heldout]
    assert sorted(rows[0] + rows[1]) == list(range(count))
    assert all(part == sorted(part) for part in rows)
    assert train
    assert abs(len(heldout) - fraction * count) <= 0.5 or len(train) == 1


def test_counts() -> None:
    counts = [len(hold_out(RECORDS[:n], fraction=0.25, key=Key(0))[1]) for n in (1, 2, 3, 4, 10, 40)]
    assert counts == [0, 1, 1, 1, 3, 10]  # 0.25, 0.5, 0.75, 1, 2.5, 10 rounded, halves up


def test_none_holds_nothing_out() -> None:
    assert hold_out(RECORDS, fraction=None, key=Key(0)) == (RECORDS, [])


def test_seeded() -> None:
    drawn = [hold_out(RECORDS, fraction=0.5, key=Key(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fractions_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigError, match="held-out fraction is"):
        hold_out(RECORDS, fraction=fraction, key=Key(0))
