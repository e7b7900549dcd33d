"""Records to tokens: chat, alpaca and plain templates, and what happens to records that are too long.

A record has `messages` ([{role, content}, ...]), or `prompt` and `response` (and `system`), or `text`.
Truncation policy: the end is cut off. An example that is left without a labelled token is left out.
What stands after the last response is left out, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedllm.batch import IGNORE, Example
from fedllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "alpaca", "plain"]
Piece = tuple[str, bool]  # text, and whether its tokens carry a label
Turn = Mapping[str, str]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
IDS_ALONE = {"return_attention_mask": False, "return_token_type_ids": False}
OTHERS = "set task.template to alpaca or plain"


def messages_of(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """A record's turns.

    Raises:
        DataError: the record has neither messages nor prompt and response, or a turn without role and content.
    """
    if "messages" in record:
        try:
            return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in record["messages"]]
        except (TypeError, KeyError) as error:
            raise DataError("'messages' of a record is not a list of turns with 'role' and 'content'") from error
    if "prompt" not in record or "response" not in record:
        raise DataError(
            f"a record has neither 'messages' nor 'prompt' and 'response' (it has {', '.join(sorted(record))}); "
            "map its fields with federation.shards.fields"
        )
    system = [{"role": "system", "content": str(record["system"])}] if record.get("system") else []
    turns = [("user", record["prompt"]), ("assistant", record["response"])]
    return system + [{"role": role, "content": str(content)} for role, content in turns]


def response_pieces(
    records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template
) -> list[list[Piece]]:
    """Each record's text, cut into what stands before a response and the response, by turns; responses carry the
    labels, each with its end token."""
    chats = [messages_of(record) for record in records]
    if template == "chat":
        return _chats(chats, tokenizer)
    begin = _begin(tokenizer)
    return [list(_plain(turns, begin, str(tokenizer.eos_token), template)) for turns in chats]


def text_pieces(
    records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template
) -> list[list[Piece]]:
    """Each record's text, all of which carries labels."""
    begin = _begin(tokenizer)
    chats = iter(response_pieces([record for record in records if "text" not in record], tokenizer, template))
    return [
        [(f"{begin}{record['text']}{tokenizer.eos_token}", True)]
        if "text" in record
        else [(text, True) for text, _ in next(chats)]
        for record in records
    ]


def encoded(
    records: Sequence[Sequence[Piece]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Example | None]:
    """Records in pieces to examples; None where no label is left. A first token carries none."""
    texts, fields = [text for pieces in records for text, _ in pieces], {"add_special_tokens": False, **IDS_ALONE}
    ids = iter(tokenizer(texts, **fields)["input_ids"] if texts else ())
    return [_example([(next(ids), labelled) for _, labelled in pieces], max_length) for pieces in records]


def prompt_text(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """What stands before the last response: the input of generation.

    Raises:
        DataError: the record has no response.
    """
    response_text(record)
    (pieces,) = response_pieces([record], tokenizer, template)
    return "".join(text for text, _ in pieces[:-1])


def response_text(record: Mapping[str, Any]) -> str:
    """The last response.

    Raises:
        DataError: the record has no response.
    """
    for turn in reversed(messages_of(record)):
        if turn["role"] == "assistant":
            return turn["content"]
    raise DataError("a record that is to be answered has no turn of the role 'assistant'")


def _chats(chats: Sequence[Sequence[Turn]], tokenizer: PreTrainedTokenizerBase) -> list[list[Piece]]:
    """The tokenizer's chat template, cut at each response."""
    if tokenizer.chat_template is None:
        raise DataError(f"the model's tokenizer has no chat template; {OTHERS}")
    places = [[place for place, turn in enumerate(turns) if turn["role"] == "assistant"] for turns in chats]
    each = [(turns, place) for turns, own in zip(chats, places, strict=True) for place in own]
    opened = _rendered([turns[:place] for turns, place in each], tokenizer, opened=True)
    closed = _rendered([turns[: place + 1] for turns, place in each], tokenizer, opened=False)
    texts, end = zip(opened, closed, strict=True), str(tokenizer.eos_token)
    return [
        list(_cut([turns[place]["content"] for place in own], islice(texts, len(own)), end))
        for turns, own in zip(chats, places, strict=True)
    ]


def _cut(responses: Sequence[str], texts: Iterable[tuple[str, str]], end: str) -> Iterator[Piece]:
    """A chat's pieces, from its text up to each response, and with it."""
    done = ""
    for response, (opened, closed) in zip(responses, texts, strict=True):
        whole = closed.startswith(opened) and opened.startswith(done)
        if not whole or response.strip() not in closed[len(opened) :]:
            raise DataError(f"the model's chat template rewrites earlier turns; {OTHERS}")
        last = closed.rfind(end, len(opened))
        stop = len(closed) if last < 0 else last + len(end)
        yield opened[len(done) :], False
        yield closed[len(opened) : stop], True
        done = closed[:stop]


def _rendered(chats: Sequence[Sequence[Turn]], tokenizer: PreTrainedTokenizerBase, *, opened: bool) -> list[str]:
    from jinja2 import TemplateError

    if not all(chats):
        raise DataError(f"a chat begins with a turn of the role 'assistant'; put what it answers first, or {OTHERS}")
    if not chats:
        return []
    try:
        listed = [list(turns) for turns in chats]
        return list(map(str, tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=opened)))
    except TemplateError as error:
        if len(chats) > 1:  # which one?
            return [text for turns in chats for text in _rendered([turns], tokenizer, opened=opened)]
        roles = ", ".join(turn["role"] for turn in chats[0])
        raise DataError(f"the model's chat template refuses the roles {roles} ({error}); {OTHERS}") from error


def _plain(turns: Sequence[Turn], begin: str, end: str, template: Template) -> Iterator[Piece]:
    pending = ""
    for turn in turns:
        if turn["role"] == "assistant":
            yield begin + (ALPACA.format(prompt=pending.strip()) if template == "alpaca" else pending), False
            yield f"{turn['content']}{end}", True
            begin, pending = "", ""
        else:
            pending += turn["content"] + "\n"


def _begin(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the tokenizer itself puts before a text, if it does."""
    if tokenizer.bos_token_id is None:
        return ""
    return str(tokenizer.bos_token) if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def _example(pieces: Sequence[tuple[list[int], bool]], max_length: int) -> Example | None:
    tokens: list[int] = []
    labels: list[int] = []
    for ids, labelled in pieces:
        tokens += ids
        labels += ids if labelled else [IGNORE] * len(ids)
    # position t predicts token t + 1; the last one predicts nothing
    targets = [*labels[1:max_length], IGNORE]
    if targets.count(IGNORE) == len(targets):
        return None
    return Example(_tensor(tokens[:max_length]), _tensor(targets), cut=max(0, len(tokens) - max_length))


def _tensor(numbers: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(numbers, dtype=np.int64))  # torch itself takes three times as long for a list
