"""Epsilon of a ledger."""

from __future__ import annotations

import pytest

from fedllm.privacy.accountant import epsilon
from fedllm.privacy.releases import Release
from fedllm.privacy.schemes import PoissonScheme


def test_a_row_of_the_table() -> None:
    assert epsilon({Release("gaussian", 1, PoissonScheme(0.1)): 100}, 1e-5).epsilon == pytest.approx(7.0466, abs=1e-3)
