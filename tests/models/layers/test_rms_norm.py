"""Norms of 16-bit models: the same values to the bit, autograd's gradient within rounding, others left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from fedllm.models.layers import rms_norm


def norm_of(kind: Any, dtype: torch.dtype) -> Any:
    norm = kind(24).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 24))
    return norm.requires_grad_(False)


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(3).to(dtype)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_values_are_transformers_and_the_gradient_is_that_of_float64(kind: Any, dtype: torch.dtype) -> None:
    plain, ours = norm_of(kind, dtype), norm_of(kind, dtype)
    assert rms_norm.prepare(ours) == 1
    x, dy = drawn(1, 7, 24, seed=0, dtype=dtype).requires_grad_(), drawn(1, 7, 24, seed=1, dtype=dtype)
    weight = plain.weight.clone().requires_grad_()
    one = functional_call(plain, {"weight": weight}, (x,))
    two = functional_call(ours, {"weight": weight}, (x,))
    assert torch.equal(one, two) and two.dtype == dtype
    theirs, mine = (torch.autograd.grad(y, (x, weight), dy, retain_graph=True) for y in (one, two))
    wide, scale = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(
        scale * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6), (wide, scale), dy.double()
    )
    for found, other, truth in zip(mine, theirs, exact, strict=True):
        error, usual = (float((grad.double() - truth).norm() / truth.norm()) for grad in (found, other))
        assert error <= 1.5 * usual < 0.02


@pytest.mark.parametrize(
    "norm",
    [
        norm_of(LlamaRMSNorm, torch.float64),
        norm_of(Gemma3RMSNorm, torch.bfloat16),
    ],
    ids=["float64", "gemma3"],
)
def test_other_norms_are_left_as_they_are(norm: Any) -> None:
    assert rms_norm.prepare(norm) == 0
    assert "forward" not in vars(norm)


def test_a_norm_with_other_values_is_left_as_it_is() -> None:
    class TwiceRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    assert rms_norm.prepare(norm_of(TwiceRMSNorm, torch.bfloat16)) == 0
