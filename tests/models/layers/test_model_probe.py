"""What a model is found to be: refused by name, packed or apart in every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fedllm.errors import ModelError
from fedllm.models.layers.model_probe import prepare
from tests.models.test_decoders import ALL, APART, PACKED, SIZES, build


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4), "head with a bias"),
        (transformers.GraniteConfig(**SIZES, logits_scaling=4.0), r"\(granite\) makes its logits otherwise than by"),
        (transformers.CohereConfig(**SIZES, logit_scale=0.25), r"\(cohere\) makes its logits otherwise than by"),
        (
            transformers.Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True),
            "lets tokens see the ones after them; fedllm trains decoders",
        ),
        (transformers.Llama4TextConfig(**SIZES, head_dim=8, intermediate_size_mlp=48), "has no 'language_model'"),
        (
            transformers.MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
            "does not run in torch.float64 on cpu: .*; try another dtype",
        ),
    ],
    ids=["gptj", "granite", "cohere", "bidirectional", "llama4", "mixtral"],
)
def test_what_would_be_wrong_in_any_case_is_refused_by_name(config: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        prepare(build(config), "mine")


@pytest.mark.parametrize("name", [*PACKED, *APART])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_changes_nothing(name: str, dtype: torch.dtype) -> None:
    assert (prepare(build(ALL[name](), dtype), "mine") is None) == (name in PACKED)
