"""Calls of the library's functions on tensors; the C files have the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from typing import Any

from torch import Tensor

from fedllm.models.kernels.build import library

ERRORS = {1: (MemoryError, "no memory"), 2: (IndexError, "a target is no word of the vocabulary")}  # as in bf16.h
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
}


def call(name: str, *arguments: Tensor | float | None) -> None:
    """Call a function of SIGNATURES.

    Raises:
        MemoryError, IndexError: see ERRORS.
    """
    status = _function(name)(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])
    if status:
        kind, reason = ERRORS[status]
        raise kind(f"kernel {name}: {reason}")


@lru_cache(maxsize=64)
def _function(name: str) -> Any:
    handle = library().handle
    assert handle is not None, "see serve"
    function = handle[f"fedllm_{name}"]
    function.argtypes, function.restype = [KINDS[letter] for letter in SIGNATURES[name]], c_int
    return function


def addend(plus: Tensor | None, y: Tensor) -> Tensor | None:
    """What is added to y, which it is none of."""
    assert plus is None or (plus.shape == y.shape and plus.data_ptr() != y.data_ptr())
    return plus if plus is None else plus.contiguous()
