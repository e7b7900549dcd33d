"""Whether a tokenizer and a model belong together: found when they are loaded, before any token is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedllm.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MISSING = (
    "has no tokenizer that can be read; put the tokenizer's files (such as tokenizer.json and tokenizer_config.json) "
    "beside its weights"
)


def require_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """
    Raises:
        ModelError: the tokenizer has no words or no end token, or tokens for which the model has no embedding. Its
            tokens for what it does not know and for padding may have none: readers of models add them, and most texts
            never need them (`require_rows`).
    """
    known = tokenizer.get_vocab()
    if len(known) <= len(set(tokenizer.all_special_ids)):  # transformers makes an empty one where files are missing
        raise ModelError(f"{name} {MISSING}")
    rows, spare = num_rows(model), (tokenizer.unk_token, tokenizer.pad_token)
    beyond = sorted((number, text) for text, number in known.items() if number >= rows and text not in spare)
    if beyond and not name.endswith(".gguf"):  # whose reader adds tokens that its kind of tokenizer has elsewhere
        number, text = beyond[0]
        raise ModelError(
            f"the tokenizer of {name} has the token '{text}' with the number {number}, but the model has embeddings "
            f"for {rows} tokens (0 to {rows - 1}); use the tokenizer that belongs to the model, or save the model "
            "after model.resize_token_embeddings(len(tokenizer))"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {name} has no eos token, which ends an answer; set eos_token in its "
            "tokenizer_config.json"
        )


def require_rows(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """
    Raises:
        DataError: the model has no embedding for one of them.
    """
    rows = num_rows(model)
    last = max(tokens, default=0)
    if last >= rows:
        text = tokenizer.convert_ids_to_tokens(last)
        raise DataError(
            f"a record has the token '{text}' with the number {last}, but the model has embeddings for {rows} tokens; "
            "leave it out of the text"
        )


def num_rows(model: PreTrainedModel) -> int:
    """Tokens that the model can both read and predict."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    read = int(words.num_embeddings)
    return read if head is None else min(read, int(head.out_features))
