"""Bytes as tensors of uint8, and back: what crosses in a message beside numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedllm.errors import WireError


def to_tensor(data: bytes) -> Tensor:
    """(n,) uint8; a copy."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def to_bytes(leaf: Tensor | None) -> bytes:
    """The bytes of such a tensor.

    Raises:
        WireError: it is another one, or none.
    """
    if leaf is None or leaf.dtype != torch.uint8 or leaf.dim() != 1:
        raise WireError("a tensor that is no bytes")
    return leaf.numpy().tobytes()
