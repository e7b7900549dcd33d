"""What tests of whole decoders in bfloat16 share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

SIZES: dict[str, Any] = {
    "pad_token_id": 257,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """Relative, of all gradients together: what comes after the losses."""
    apart = sum(float((f.double() - e).square().sum()) for f, e in zip(found[1:], exact[1:], strict=True))
    return (apart / sum(float(e.square().sum()) for e in exact[1:])) ** 0.5
