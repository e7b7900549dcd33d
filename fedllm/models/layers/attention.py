"""Attention within each sequence of an unpadded row, registered as transformers' attention "fedllm".

Every decoder that goes through transformers' attention interface can use it; `model_probe.prepare` finds out. Outside
of a packed pass (generation) it is transformers' own "sdpa".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fedllm.errors import ModelError
from fedllm.models.layers.forward_context import current
from fedllm.models.layers.prefix_attention import prefixed, without_front
from fedllm.models.layers.shared_prefix import shared_prefix
from fedllm.models.layers.short_attention import bias, short_attention
from fedllm.models.layers.varlen_attention import fits, varlen_attention

NAME = "fedllm"
SHORT = 512  # tokens; up to here plain products beat the fused kernel's backward pass on CPUs
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
    now = current()
    if now.lengths is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out, None
    scaling, window = options.get("scaling") or query.shape[-1] ** -0.5, options.get("sliding_window")
    found = prefixed(now, getattr(module, "layer_idx", -1), query[0], key[0], value[0])
    if found is None:
        return _row(query[0], key[0], value[0], now.lengths, scaling, window, now.shared)[None], None
    longer = found[3]
    return without_front(_row(*found, scaling, None), longer, longer[0] - now.lengths[0])[None], None


def _row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scaling: float,
    window: int | None,
    shared: tuple[int, ...] = (),
) -> Tensor:
    """(heads, T, d) and (key heads, T, d) of a packed row to (T, heads, d)."""
    on_cpu = not fits(query[None], value[None])
    if shared and not (on_cpu and max(lengths) <= SHORT):  # kernels that want each sequence whole
        row = shared_prefix(lengths, shared, str(query.device))
        q, k, v = (states.index_select(1, row.places) for states in (query, key, value))
        return _row(q, k, v, lengths, scaling, window).index_select(0, row.kept)
    if not on_cpu:
        return varlen_attention(query, key, value, lengths, scaling, window)
    if max(lengths) <= SHORT:
        return short_attention(query, key, value, lengths, scaling, window, shared)
    rows = zip(*(torch.split(states, list(lengths), 1) for states in (query, key, value)), strict=True)
    return torch.cat([_sequence(q, k, v, scaling, window) for q, k, v in rows])


def _sequence(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """(heads, L, d) and (key heads, L, d) of one sequence to (L, heads, d)."""
    length = query.shape[1]
    if length <= SHORT:
        return short_attention(query, key, value, (length,), scaling, window)
    allowed = None if window is None or window >= length else bias(length, window, 1, query.dtype, query.device) == 0
    return scaled_dot_product_attention(
        query[None], key[None], value[None], allowed, is_causal=allowed is None, scale=scaling, enable_gqa=True
    )[0].transpose(0, 1)


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """No mask for a packed row; transformers' own for an ordinary batch."""
    from transformers.masking_utils import sdpa_mask

    if current().lengths is not None:
        return None
    mask: Tensor | None = sdpa_mask(*args, **options)
    return mask
