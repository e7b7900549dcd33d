"""Attention within each sequence of an unpadded row, registered as transformers' attention "fedllm".

Every decoder that goes through transformers' attention interface can use it; `prepare` refuses, by name, a model whose
other layers mix the sequences of a row. Outside of a packed pass (generation) it is transformers' own "sdpa".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fedllm.errors import ModelError
from fedllm.tasks.current import Forward, computing, current
from fedllm.tasks.short_attention import bias, short_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "fedllm"
SHORT = 512  # tokens; up to here plain products beat the fused kernel's backward pass on CPUs
REFUSED = ("softcap", "s_aux", "position_bias")  # of the attention function
REFUSED_SETTINGS = ("final_logit_softcapping", "attention_chunk_size")  # of the model's configuration
LAYERS = frozenset({"full_attention", "sliding_attention"})
PROBE = (3, 4)  # lengths of two sequences


def prepare(model: PreTrainedModel, name: str) -> None:
    """Make a model use this attention, and compare a packed row of two sequences with each alone.

    Raises:
        ModelError: the model computes something else there.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    for found in _unknown(model):
        raise ModelError(f"{name} ({model.config.model_type}) has {found}, which fedllm does not compute")
    head = model.get_output_embeddings().weight
    # words, for special tokens are where a 16-bit model's rounding is largest
    row = (torch.arange(sum(PROBE), device=model.device)[None] + len(head) // 2) % len(head)
    positions = torch.cat([torch.arange(length) for length in PROBE])[None].to(model.device)
    with torch.no_grad():
        alone = torch.cat([model(tokens, use_cache=False).logits for tokens in row.split(PROBE, 1)], 1)
        model.set_attn_implementation(NAME)
        with computing(Forward({}, PROBE)):
            packed = model.base_model(row, position_ids=positions, use_cache=False).last_hidden_state
        logits = packed @ head.T
    tolerance = 0.15 if torch.finfo(model.dtype).bits == 16 else 1e-3
    if not float((logits - alone).norm()) <= tolerance * float(alone.norm()):
        raise ModelError(
            f"{name} ({model.config.model_type}) gives other values for a row of sequences than for each alone; fedllm "
            "trains decoders whose tokens meet only in transformers' attention interface"
        )


def _unknown(model: PreTrainedModel) -> list[str]:
    """What a short row would not show."""
    settings = model.config.to_dict()
    found = [name for name in REFUSED_SETTINGS if settings.get(name)]
    found += [f"layers of type {kind}" for kind in settings.get("layer_types") or () if kind not in LAYERS]
    return found if model.get_output_embeddings().bias is None else [*found, "an output head with a bias"]


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
    if max(lengths) <= SHORT:
        return short_attention(query[0], key[0], value[0], lengths, scaling, window)[None], None
    rows = zip(*(torch.split(states[0], list(lengths), 1) for states in (query, key, value)), strict=True)
    return torch.cat([_sequence(q, k, v, scaling, window) for q, k, v in rows])[None], None


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
