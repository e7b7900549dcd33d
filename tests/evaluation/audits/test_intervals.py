"""Intervals: figures that were worked out by hand or apart."""

from __future__ import annotations

import numpy as np
import pytest

from fedllm.evaluation.audits.intervals import auc, proportion, true_positives


def test_the_area_and_its_variance_by_delong() -> None:
    """Members .9, .8, .4 and others .7, .3: five of six pairs are right; variance 1/18."""
    found = auc(np.array([0.9, 0.8, 0.4]), np.array([0.7, 0.3]))
    assert found.value == pytest.approx(5 / 6)
    assert found.low == pytest.approx(5 / 6 - 1.959964 * (1 / 18) ** 0.5, abs=1e-6) and found.high == 1.0


def test_the_area_is_that_of_all_pairs_with_ties() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 9, 37).astype(float), rng.integers(0, 8, 53).astype(float)
    pairs = (members[:, None] > others).mean() + 0.5 * (members[:, None] == others).mean()
    assert auc(members, others).value == pytest.approx(pairs)
    rows = ((members[:, None] > others) + 0.5 * (members[:, None] == others)).astype(float)
    error = (rows.mean(1).var(ddof=1) / 37 + rows.mean(0).var(ddof=1) / 53) ** 0.5
    assert auc(members, others).low == pytest.approx(pairs - 1.959964 * error, abs=1e-6)


def test_where_all_are_told_apart_the_lower_end_is_that_of_a_rate() -> None:
    assert auc(np.array([2.0] * 10), np.array([1.0] * 30)).low == pytest.approx(0.6915, abs=1e-4)


@pytest.mark.parametrize(
    ("count", "of", "low", "high"), [(5, 100, 0.01643, 0.11284), (10, 10, 0.6915, 1.0), (0, 10, 0.0, 0.3085)]
)
def test_a_rate_by_clopper_and_pearson(count: int, of: int, low: float, high: float) -> None:
    found = proportion(count, of)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert proportion(0, 100, 0.9).high == pytest.approx(0.02951, abs=1e-4)


def test_a_rate_of_false_alarms_needs_enough_others() -> None:
    members, others = np.arange(100, 200.0), np.arange(0, 150.0)
    assert true_positives(members, others[:150], 0.01) is None, "75 of them set the threshold"
    found = true_positives(members, np.arange(0, 400.0) / 4, 0.01)
    assert found is not None and found.value == 1.0
    chance = true_positives(np.arange(0, 400.0), np.arange(0, 400.0), 0.05)
    assert chance is not None and chance.value == pytest.approx(0.05, abs=0.01)
