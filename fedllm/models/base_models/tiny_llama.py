"""tiny-llama: a random Llama of 0.1 M parameters with a tokenizer of bytes, built in milliseconds.

It knows nothing. It is for tests, dry runs and measurements: same architecture, chat format and special tokens as
SmolLM2, and like there one token ends a turn and pads. The weights are drawn in float64 and rounded to bfloat16 before
they are cast, so the model is the same numbers in every dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

START, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
POSITIONS = 1024
SEED = 0
STD = 0.15  # below about 0.1 the tied embeddings win, and it repeats its last token
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_model(dtype: torch.dtype) -> LlamaForCausalLM:
    """The model: 2 layers, hidden 64, MLP 192, 4 heads, 2 key-value heads, tied embeddings of 259 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(SEED)
    for _, weight in sorted(model.named_parameters()):
        if weight.dim() > 1:  # the norms stay at one
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * STD
            weight.data.copy_(drawn.to(torch.bfloat16))
    return model.to(dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255 are the bytes), then start, end and unknown; any text comes back exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: value for value, letter in enumerate(_letters())}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([START, END, UNKNOWN])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _letters() -> list[str]:
    """The letter of each byte in a byte-level vocabulary (GPT-2): itself if printable, else from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (value for value in range(256) if value not in printable)
    shifted = {value: 256 + index for index, value in enumerate(others)}
    return [chr(shifted.get(value, value)) for value in range(256)]
