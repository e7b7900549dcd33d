"""Models of known shapes with random weights: what a step costs does not depend on what a model knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fedllm.models.base_models.tiny_llama import tiny_tokenizer

STD = 0.02
SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "smollm2-135m": {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        "llama-1b": {  # Llama 3.2 1B
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    }
)


def write(name: str, folder: Path, device: str) -> Path:
    """A folder in transformers' layout: bfloat16 weights drawn on the device, and a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    ends = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    config = LlamaConfig(**SHAPES[name], **ends, max_position_embeddings=2048, tie_word_embeddings=True)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        for weight in model.parameters():
            if weight.dim() > 1:  # the norms stay at one
                torch.nn.init.normal_(weight, std=STD)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
