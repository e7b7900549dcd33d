"""Attention within each sequence of an unpadded row, registered as transformers' attention "fedllm".

Every decoder that goes through transformers' attention interface can use it. Outside of a packed pass (generation with
a cache) it is plain scaled-dot-product attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fedllm.tasks.current import current

NAME = "fedllm"


def register() -> None:
    """Make the attention known to transformers. May be called again."""
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

    Causal within each sequence; honours `scaling`, `sliding_window` and `softcap`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths = current().lengths
    softcap, window = options.get("softcap"), options.get("sliding_window")
    if lengths is None and softcap is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out, None
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    if lengths is None:
        return _softcapped(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None
    pieces = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [_sequence(q, k, v, scaling, window, softcap) for q, k, v in pieces]
    return torch.cat(outputs, 2).transpose(1, 2), None


def _sequence(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    length = query.shape[2]
    mask = None
    if softcap is not None or (window is not None and window < length):
        place = torch.arange(length, device=query.device)
        gap = place[:, None] - place[None, :]
        mask = (gap >= 0) & (gap < (window or length))
    if softcap is not None:
        return _softcapped(query, key, value, mask, scaling, softcap)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    assert softcap is not None
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """No mask for a packed row; transformers' own for an ordinary batch."""
    from transformers.masking_utils import sdpa_mask

    if current().lengths is not None:
        return None
    mask: Tensor | None = sdpa_mask(*args, **options)
    return mask
