"""Whether a tokenizer and a model belong together: found when they are loaded, before any token is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedllm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MISSING = (
    "has no tokenizer that can be read; put the tokenizer's files (such as tokenizer.json and tokenizer_config.json) "
    "beside its weights"
)


def require_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """
    Raises:
        ModelError: the tokenizer has no words or no end token, or tokens for which the model has no embedding.
    """
    known = tokenizer.get_vocab()
    if len(known) <= len(set(tokenizer.all_special_ids)):  # transformers makes an empty one where files are missing
        raise ModelError(f"{name} {MISSING}")
    rows, last = _num_rows(model), max(known.values())
    if last >= rows:
        token = next(text for text, number in known.items() if number == last)
        raise ModelError(
            f"the tokenizer of {name} has tokens up to number {last} ('{token}'), but the model has embeddings for "
            f"{rows} tokens (0 to {rows - 1}); use the tokenizer that belongs to the model, or save the model after "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {name} has no eos token, which ends an answer; set eos_token in its "
            "tokenizer_config.json"
        )


def _num_rows(model: PreTrainedModel) -> int:
    """Tokens that the model can both read and predict."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    read = int(words.num_embeddings)
    return read if head is None else min(read, int(head.out_features))
