"""What fedllm finds out about a loaded model, by a few passes over seven tokens.

Most decoders train as one row of sequences. In some, tokens of different sequences would meet outside of attention, or
attention is not the plain one (state space layers, chunks, soft caps, sinks, ...). These keep their own, and their
sequences run one at a time. What fedllm would compute wrongly in any case is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm.errors import ModelError
from fedllm.models.layers import attention
from fedllm.models.layers.cross_entropy import capped, softcap
from fedllm.models.layers.forward_context import Forward, forward_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS = frozenset({"full_attention", "sliding_attention"})
ROPES = frozenset({"dynamic", "longrope"})  # their angles depend on the longest sequence of a row
CACHES = ("past_key_values", "cache_params")  # transformers' names: attention's, state spaces'
PROBE = (3, 4)  # lengths of two sequences


def prepare(model: PreTrainedModel, name: str) -> str | None:
    """Make a model use this attention if a packed row gives what each of its sequences gives alone.

    Returns:
        None, or why it cannot be packed; such a model is left as it was.

    Raises:
        ModelError: fedllm cannot train it at all: its logits are not those of `cross_entropy`, a token sees later ones,
            or it does not run.
    """
    attention.register()
    title, own, row = f"{name} ({model.config.model_type})", model.config._attn_implementation, _row(model)
    with torch.no_grad():
        alone = _alone(model, row, title)
        try:
            reason = _unknown(model) or _unlike(model, row, alone)
        except (TypeError, ValueError, RuntimeError) as error:  # a pass that it does not know fails in its own way
            reason = str(error).partition("\n")[0]
    if reason is None:
        return None
    model.set_attn_implementation(own)
    return f"{title} cannot train in packed rows: {reason}"


def past_key_values(output: Any) -> Mapping[str, Any]:
    """The caches of a model's output, as arguments of its next pass; none if it keeps none."""
    return {name: output[name] for name in CACHES if output.get(name) is not None}


@torch.no_grad()
def supports_cache(model: PreTrainedModel) -> bool:
    """Whether a pass over one more token, without mask and positions, goes on from the model's cache as it should."""
    row = _row(model)
    caches = past_key_values(model(row[:, :-1], use_cache=True))
    return bool(caches) and _alike(model(row[:, -1:], **caches, use_cache=True).logits, model(row).logits[:, -1:])


def _row(model: PreTrainedModel) -> Tensor:
    """(1, T) words, for special tokens are where a 16-bit model's rounding is largest."""
    size = int(model.get_output_embeddings().out_features)
    return (torch.arange(sum(PROBE), device=model.device)[None] + size // 2) % size


def _alone(model: PreTrainedModel, row: Tensor, title: str) -> Tensor:
    """(1, T, V) logits of the row's sequences, each by itself, if they are what fedllm computes."""
    head = model.get_output_embeddings()
    if head.bias is not None:
        raise ModelError(f"{title} has an output head with a bias, which fedllm does not compute")
    if model.base_model is model:
        raise ModelError(
            f"{title} keeps its layers where fedllm does not find them; it has no '{model.base_model_prefix}'"
        )
    first, second = row.split(PROBE, 1)
    other_end = torch.cat([first[:, :-1], second[:, -1:]], 1)
    try:
        logits, changed, rest = (model(tokens, use_cache=False).logits for tokens in (first, other_end, second))
        hidden = model.base_model(first, use_cache=False).last_hidden_state
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{title} does not run in {model.dtype} on {model.device}: {reason}; try another dtype"
        ) from error
    if not _alike(changed[:, :-1], logits[:, :-1]):
        raise ModelError(f"{title} lets tokens see the ones after them; fedllm trains decoders")
    if not _alike(_logits(model, hidden), logits):
        raise ModelError(
            f"{title} makes its logits otherwise than by its output head and a soft cap, which fedllm does not compute"
        )
    return torch.cat([logits, rest], 1)


def _unlike(model: PreTrainedModel, row: Tensor, alone: Tensor) -> str | None:
    """What differs when the row is packed."""
    model.set_attn_implementation(attention.NAME)
    if model.config._attn_implementation != attention.NAME:
        return "its attention does not go through transformers' interface"
    positions = torch.cat([torch.arange(length) for length in PROBE])[None].to(model.device)
    with forward_context(Forward({}, PROBE)):
        hidden = model.base_model(row, position_ids=positions, use_cache=False).last_hidden_state
    return None if _alike(_logits(model, hidden), alone) else "a row of sequences gives other values than each alone"


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    head = model.get_output_embeddings().weight
    return capped(hidden.to(head.dtype) @ head.T, softcap(model))


def _alike(found: Tensor, expected: Tensor) -> bool:
    tolerance = 0.15 if torch.finfo(found.dtype).bits == 16 else 1e-3
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


def _unknown(model: PreTrainedModel) -> str | None:
    """What a short row would not show."""
    settings = model.config.get_text_config().to_dict()
    if settings.get("attention_chunk_size"):
        return "it has attention_chunk_size"
    kinds = sorted({*(settings.get("layer_types") or ())} - LAYERS)
    if kinds:
        return f"it has layers of type {kinds[0]}"
    ropes = settings.get("rope_parameters") or {}
    # one mapping, or one for each type of layer
    used = {str(each.get("rope_type")) for each in (ropes, *ropes.values()) if isinstance(each, Mapping)} & ROPES
    return f"it has rotary embeddings of type {min(used)}, which depend on the longest sequence" if used else None
