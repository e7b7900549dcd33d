"""Attention within each sequence of an unpadded row, registered as transformers' attention "fedllm".

Every decoder that goes through transformers' attention interface can use it; `architecture.prepare` finds out. Outside
of a packed pass (generation) it is transformers' own "sdpa".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fedllm.errors import ModelError
from fedllm.tasks.current import current

NAME = "fedllm"
SHORT = 128  # tokens; up to here plain products beat the fused kernel's backward pass on CPUs
REFUSED = ("softcap", "s_aux", "position_bias")  # of the attention function


def register() -> None:
    """Make this attention known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """(1, heads, T, d) queries and (1, key heads, T, d) keys of a packed row to (1, T, heads, d).

    Causal within each sequence; honours `scaling` and `sliding_window`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in REFUSED:
        if options.get(name) is not None:
            raise ModelError(f"{type(module).__name__} has {name}, which fedllm's attention does not compute")
    lengths = current().lengths
    if lengths is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out, None
    scaling, window = options.get("scaling") or query.shape[-1] ** -0.5, options.get("sliding_window")
    rows = zip(*(torch.split(states[0], list(lengths), 1) for states in (query, key, value)), strict=True)
    outputs = [_sequence(q, k, v, scaling, window) for q, k, v in rows]
    return torch.cat(outputs, 1).transpose(0, 1)[None], None


def _sequence(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """(heads, L, d) and (key heads, L, d) of one sequence to (heads, L, d)."""
    heads, length, _ = query.shape
    if length > SHORT:
        allowed = None if window is None or window >= length else _bias(length, window, query) == 0
        return scaled_dot_product_attention(
            query[None], key[None], value[None], allowed, is_causal=allowed is None, scale=scaling, enable_gqa=True
        )[0]
    # the query heads of a key head become its rows
    groups = heads // len(key)
    bias = _bias(length, window, query).repeat(groups, 1).expand(len(key), -1, -1)
    scores = torch.baddbmm(bias, query.reshape(len(key), groups * length, -1), key.mT, alpha=scaling)
    return torch.bmm(scores.softmax(-1), value).view(heads, length, -1)


def _bias(length: int, window: int | None, like: Tensor) -> Tensor:
    """(L, L): 0 where a position sees another one, else minus infinity."""
    whole = torch.full((length, length), -torch.inf, dtype=like.dtype, device=like.device)
    bias = whole.triu(1)
    return bias if window is None or window >= length else bias + whole.tril(-window)


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """No mask for a packed row; transformers' own for an ordinary batch."""
    from transformers.masking_utils import sdpa_mask

    if current().lengths is not None:
        return None
    mask: Tensor | None = sdpa_mask(*args, **options)
    return mask
