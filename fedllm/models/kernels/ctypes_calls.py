"""Calls of the library's functions on tensors; the C files have the formulas.

A function is there for bfloat16 and, with another ending, for float32: its first tensor says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedllm.models.kernels.build import library

ERRORS = {1: (MemoryError, "no memory"), 2: (IndexError, "a target is no word of the vocabulary")}  # as in bf16.h
WIDE = "_float"  # the ending of functions for float32
KINDS: Mapping[str, Any] = {"p": c_void_p, "n": c_int64, "x": c_float}
SIGNATURES = {
    "norm": "ppppnnx",
    "norm_backward": "ppppppnn",
    "gated": "pppn",
    "gated_backward": "pppppn",
    "rotary": "pnnpppnnn",
    "rotary_backward": "pnnpppnnn",
    "attention": "pnn" * 3 + "ppp" + "n" * 6 + "x",
    "attention_backward": "pnn" * 3 + "pppppp" + "n" * 7 + "x",
    "cross_entropy": "ppppnn",
    "low_rank": "ppppppnnnnnnxppppn",
    "low_rank_backward": "ppppppppp" + "n" * 8 + "xppn",
    "product": "pppppnnnnn",
    "laid_out": "ppnnn",
    "threads": "n",
}


def call(name: str, *arguments: Tensor | float | None) -> None:
    """Call a function of SIGNATURES.

    Raises:
        MemoryError, IndexError: see ERRORS.
    """
    first = arguments[0]
    ending = WIDE if isinstance(first, Tensor) and first.dtype == torch.float32 else ""
    status = _function(name + ending)(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])
    if status:
        kind, reason = ERRORS[status]
        raise kind(f"kernel {name}: {reason}")


@lru_cache(maxsize=64)
def _function(name: str) -> Any:
    handle = library().handle
    assert handle is not None, "see serve"
    function, signature = handle[f"fedllm_{name}"], SIGNATURES[name.removesuffix(WIDE)]
    function.argtypes, function.restype = [KINDS[letter] for letter in signature], c_int
    return function


def addend(plus: Tensor | None, y: Tensor) -> Tensor | None:
    """What is added to y, which it is none of."""
    assert plus is None or (plus.shape == y.shape and plus.data_ptr() != y.data_ptr())
    return plus if plus is None else plus.contiguous()
