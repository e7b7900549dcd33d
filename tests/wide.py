"""Models in float64 that compute in float64 throughout, for bounds that hold on every processor.

transformers computes the norms of any model in float32, and some softmaxes and scans. In a float64 model that rounds
values to 24 bits: two orders of the same sum, 1e-16 apart, may fall on different sides of a rounding, and are 6e-8
apart from there on. Whether any do is a matter of the processor's instructions. Without these casts two correct
computations differ by the roundings of their sums alone: at most n u = 3e-14 of a sum of n = 259 terms (the largest
ones here, over the vocabulary), u = 1.1e-16, and some hundred sums stand one behind the other. `EXACT` is above that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

EXACT = 1e-11
SINGLE = 2e-5  # of a float32 model, in 2-norms: sqrt(n) u = 1e-6 for each of some hundred sums, which add up as roots
NARROW = 2.0**-20  # relative, where the casts stay, as in processes of Ray: 16 roundings to 24 bits in a row
MODELS = ("transformers.models.", "transformers.integrations.")


def widen(patch: pytest.MonkeyPatch) -> None:
    """Casts of transformers' models from float64 to float32 do nothing."""
    for owner, name in ((torch.Tensor, "float"), (torch.Tensor, "to"), (torch.nn.functional, "softmax")):
        patch.setattr(owner, name, _without_casts(name, getattr(owner, name)))


def _without_casts(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def called(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        if tensor.dtype != torch.float64 or not caller.startswith(MODELS):
            return function(tensor, *args, **options)
        if name == "float":
            return tensor
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        options = {key: torch.float64 if value is torch.float32 else value for key, value in options.items()}
        return function(tensor, *args, **options)

    return called
