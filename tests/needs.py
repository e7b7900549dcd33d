"""What a test needs of the machine. Each reason names what lacks; the end of scripts/test counts them."""

from __future__ import annotations

import pytest
import torch

from fedllm.models.base_models.load import resolve_dtype
from fedllm.models.kernels.build import library

NO_KERNELS = f"kernels: {library().about}"
needs_kernels = pytest.mark.skipif(library().handle is None, reason=NO_KERNELS)
needs_tiles = pytest.mark.skipif(
    not library().tiles,
    reason=NO_KERNELS if library().handle is None else "the processor multiplies no vectors of bfloat16 (AVX-512 BF16)",
)
needs_products = pytest.mark.skipif(
    not library().products,
    reason=needs_tiles.kwargs["reason"] if not library().tiles else "the processor multiplies whole tiles (AMX)",
)
needs_floats = pytest.mark.skipif(
    not library().floats,
    reason=NO_KERNELS if library().handle is None else "the processor's vectors are too short (AVX2 or NEON)",
)
fast_in_bfloat16 = pytest.mark.skipif(
    resolve_dtype("auto", device="cpu") is not torch.bfloat16,
    reason="this processor is slow in bfloat16",
)
