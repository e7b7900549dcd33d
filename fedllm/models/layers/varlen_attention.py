"""Attention within the sequences of a row on a GPU: torch's kernel for unequal lengths (flash attention)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def kernel() -> Callable[..., Any] | None:
    """The kernel; None in a torch that has none yet, or one without a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    found: Callable[..., Any] = varlen_attn
    return found if set(inspect.signature(found).parameters) >= {"scale", "window_size"} else None


def fits(query: Tensor, value: Tensor) -> bool:
    """True if the kernel takes such states: 16 bits, on a GPU, values as wide as keys."""
    wide = query.shape[-1]
    return query.is_cuda and query.element_size() == 2 and value.shape[-1] == wide <= 256 and kernel() is not None


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float, window: int | None
) -> Tensor:
    """(heads, T, d) queries, (key heads, T, d) keys and values of a row to (T, heads, d)."""
    run = kernel()
    assert run is not None, "see fits"
    edges = _edges(tuple(lengths), query.device)
    shared, grouped = len(query) // len(key), {}
    if shared > 1 and "enable_gqa" in inspect.signature(run).parameters:
        grouped = {"enable_gqa": True}
    elif shared > 1:  # an older kernel: each head gets a key of its own
        key, value = (states.repeat_interleave(shared, 0) for states in (key, value))
    rows = (states.transpose(0, 1).contiguous() for states in (query, key, value))
    out: Tensor = run(
        *rows,
        edges,
        edges,
        max(lengths),
        max(lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # to the left, and causal
        **grouped,
    )
    return out


@lru_cache(maxsize=64)
def _edges(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(S + 1,): where each sequence begins, and the end. Kept, for a copy to the GPU waits for all that it does."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
