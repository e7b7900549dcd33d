"""What a GPU's kernel is asked for: a double that reads the arguments as torch documents them gives our attention."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fedllm.models.layers import varlen_attention
from fedllm.models.layers.short_attention import short_attention


def documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """(T, heads, d): position by position."""
    assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert max_q == int(cu_seq_q.diff().max()) and all(states.is_contiguous() for states in (query, key, value))
    groups, (left, right) = query.shape[1] // key.shape[1], window_size
    out = torch.zeros_like(query)
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        for place in range(start, end):
            seen = slice(start if left < 0 else max(start, place - left), min(end, place + right + 1))
            for head in range(query.shape[1]):
                scores = key[seen, head // groups] @ query[place, head] * scale
                out[place, head] = scores.softmax(0) @ value[seen, head // groups]
    return out


def older(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """The kernel of torch 2.11, which knows no heads that share a key."""
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kernel", [documented, older])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_kernel_is_asked_for_our_attention(
    window: int | None, groups: int, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(heads: int, seed: int) -> Tensor:
        return torch.randn(heads, 12, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    monkeypatch.setattr(varlen_attention, "kernel", lambda: kernel)
    states: Any = drawn(2 * groups, 0), drawn(2, 1), drawn(2, 2)
    found = varlen_attention.varlen_attention(*states, (5, 1, 6), 0.3, window)
    assert torch.allclose(found, short_attention(*states, (5, 1, 6), 0.3, window), atol=1e-12)


def test_the_arguments_are_those_of_torch() -> None:
    run = varlen_attention.kernel()
    if run is None:
        pytest.skip("this torch has no such kernel")
    assert set(inspect.signature(documented).parameters) <= set(inspect.signature(run).parameters)


def test_states_on_a_cpu_are_not_for_it() -> None:
    states = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    assert not varlen_attention.fits(states, states)
