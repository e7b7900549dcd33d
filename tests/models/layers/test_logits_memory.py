"""How many rows of logits exist at once."""

from __future__ import annotations

import pytest
import torch

from fedllm.models.layers.cross_entropy import pieces


@pytest.mark.parametrize(
    ("words", "dtype", "rows"),
    [
        (49_152, torch.bfloat16, 256),  # 24 MiB
        (49_152, torch.float32, 170),  # 2^25 / (49,152 x 4) = 170.7
        (128_256, torch.float32, 65),
        (300_000, torch.float32, 32),
        (259, torch.float32, 256),
    ],
)
def test_logits_fit_a_block_that_the_allocator_keeps(words: int, dtype: torch.dtype, rows: int) -> None:
    assert pieces(torch.empty(words, 2, dtype=dtype))[0] == rows
