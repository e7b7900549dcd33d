"""Texts to tokens and labels.

The whole text of a record is tokenised at once, because many tokenizers put a space before a text that begins, or join
letters across the places where it is cut. A label then belongs to the tokens whose letters it covers.
Truncation policy: the end is cut off. An example that is left without a target token is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedllm.models.batch import IGNORE, Example

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Piece = tuple[str, bool]  # text, and whether its tokens carry a label
Find = Callable[[int, bool], int]  # the first token behind a border, and whether the piece before it carries labels
IDS_ALONE = {
    "add_special_tokens": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,  # no advice about texts that are longer than the model's positions: they are cut
}


@dataclass(frozen=True)
class Text:
    """A record's text in pieces. `begins`: the token that the tokenizer itself puts before a text comes first."""

    pieces: Sequence[Piece]
    begins: bool = False

    @property
    def whole(self) -> str:
        """All pieces end to end, without the token that begins it."""
        return "".join(text for text, _ in self.pieces)


def begins_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its beginning token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]


def encoded(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example | None]:
    """Texts to examples, in one call of the tokenizer; None where no label is left. A first token carries none."""
    if not texts:
        return []
    wholes = [text.whole for text in texts]
    batch = tokenizer(wholes, **IDS_ALONE)
    found: list[Example | None] = []
    for row, (text, whole, ids) in enumerate(zip(texts, wholes, batch["input_ids"], strict=True)):
        find = _by_offsets(batch, row, tokenizer) if batch.is_fast else _by_prefix(whole, ids, tokenizer)
        begin = _begin(text, tokenizer)
        found.append(_example(begin + ids, _labelled(text, len(whole), len(ids), find), len(begin), max_length))
    return found


def tokens_of(text: Text, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text."""
    ids: list[int] = tokenizer(text.whole, **IDS_ALONE)["input_ids"]
    return _begin(text, tokenizer) + ids


def _begin(text: Text, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [int(tokenizer.bos_token_id)] if text.begins else []


def _labelled(text: Text, letters: int, tokens: int, find: Find) -> list[tuple[int, int]]:
    """The tokens that carry labels, as (from, to). A token over the border of two pieces carries the label of either,
    unless it is a special one, which may take in the spaces behind it."""
    spans: list[tuple[int, int]] = []
    border = start = 0
    for piece, labelled in text.pieces:
        border += len(piece)
        stop = find(border, labelled) if border < letters else tokens
        if labelled:
            spans.append((start, stop))
        start = stop
    return spans


def _by_offsets(batch: BatchEncoding, row: int, tokenizer: PreTrainedTokenizerBase) -> Find:
    encoding = batch.encodings[row]

    def find(border: int, labelled: bool) -> int:
        token: int | None = encoding.char_to_token(border)
        if token is None:  # no token holds this letter: a space, of which some tokenizers give no offsets
            ends = [end for _, end in encoding.offsets]
            return next((token for token, end in enumerate(ends) if end > border), len(ends))
        begin, _ = encoding.token_to_chars(token)
        over = begin < border
        return token + (over and (labelled or encoding.ids[token] in tokenizer.added_tokens_decoder))

    return find


def _by_prefix(text: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Find:
    """For tokenizers without offsets: as many tokens as the text has in common with what stands before the border."""

    def find(border: int, labelled: bool) -> int:
        before = tokenizer(text[:border], **IDS_ALONE)["input_ids"]
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False)))
        return common + (labelled and common < len(before))

    return find


def _example(ids: list[int], spans: Sequence[tuple[int, int]], begin: int, max_length: int) -> Example | None:
    """The example of some tokens, of which those in the spans, counted from `begin`, carry labels."""
    # numpy, because torch itself takes three times as long to make a tensor of a list
    tokens = np.array(ids[:max_length], dtype=np.int64)
    targets, any_label = np.empty_like(tokens), False
    targets.fill(IGNORE)
    for start, stop in spans:
        first, last = max(begin + start, 1), min(begin + stop, len(tokens))
        if first < last:  # position t predicts token t + 1; the last one predicts nothing
            targets[first - 1 : last - 1] = tokens[first:last]
            any_label = True
    if not any_label:
        return None
    return Example(torch.from_numpy(tokens), torch.from_numpy(targets), cut=max(0, len(ids) - max_length))
