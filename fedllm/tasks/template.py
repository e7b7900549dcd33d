"""Records to tokens: chat, alpaca and plain templates, and what happens to records that are too long.

A record has `messages` ([{role, content}, ...]), or `prompt` and `response` (and `system`), or `text`.
Truncation policy: the end is cut off. An example that is left without a labelled token is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedllm.batch import IGNORE, Example
from fedllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "alpaca", "plain"]
Piece = tuple[str, bool]  # text, and whether its tokens carry a label

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)


def messages_of(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """A record's turns.

    Raises:
        DataError: the record has neither messages nor prompt and response.
    """
    if "messages" in record:
        return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in record["messages"]]
    if "prompt" not in record or "response" not in record:
        raise DataError(
            f"a record has neither 'messages' nor 'prompt' and 'response' (it has {', '.join(sorted(record))}); "
            "map its fields with federation.shards.fields"
        )
    system = [{"role": "system", "content": str(record["system"])}] if record.get("system") else []
    turns = [("user", record["prompt"]), ("assistant", record["response"])]
    return system + [{"role": role, "content": str(content)} for role, content in turns]


def encode_response(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int
) -> Example | None:
    """An example whose responses carry the labels, each with its end token; None if none is left."""
    turns = messages_of(record)
    pieces = list(_chat(turns, tokenizer) if template == "chat" else _plain(turns, tokenizer, template))
    return _example(pieces, tokenizer, max_length)


def encode_text(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int
) -> Example | None:
    """An example whose tokens all carry labels."""
    if "text" in record:
        pieces = [(str(record["text"]) + str(tokenizer.eos_token), True)]
    else:
        turns = messages_of(record)
        chosen = _chat(turns, tokenizer) if template == "chat" else _plain(turns, tokenizer, template)
        pieces = [(text, True) for text, _ in chosen]
    return _example(pieces, tokenizer, max_length)


def prompt_text(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """What stands before the last response: the input of generation."""
    turns = messages_of(record)
    pieces = list(_chat(turns, tokenizer) if template == "chat" else _plain(turns, tokenizer, template))
    last = max(place for place, (_, labelled) in enumerate(pieces) if labelled)
    return "".join(text for text, _ in pieces[:last])


def response_text(record: Mapping[str, Any]) -> str:
    """The last response."""
    return next(turn["content"] for turn in reversed(messages_of(record)) if turn["role"] == "assistant")


def _chat(turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """The tokenizer's chat template, cut at each response."""
    if tokenizer.chat_template is None:
        raise DataError("the model's tokenizer has no chat template; set task.template to alpaca or plain")
    done = ""
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        opened = _rendered(turns[:place], tokenizer, opened=True)
        closed = _rendered(turns[: place + 1], tokenizer, opened=False)
        body, end = turn["content"], closed.find(str(tokenizer.eos_token), len(opened))
        stop = end + len(str(tokenizer.eos_token)) if end >= 0 else len(closed)
        if not closed.startswith(opened) or not opened.startswith(done) or body.strip() not in closed[len(opened) :]:
            raise DataError("the model's chat template rewrites earlier turns; set task.template to alpaca or plain")
        yield opened[len(done) :], False
        yield closed[len(opened) : stop], True
        done = closed[:stop]


def _rendered(turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, *, opened: bool) -> str:
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=opened))


def _plain(
    turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, template: Template
) -> Iterator[Piece]:
    pending = ""
    for turn in turns:
        if turn["role"] == "assistant":
            yield (ALPACA.format(prompt=pending.strip()) if template == "alpaca" else pending), False
            yield turn["content"] + str(tokenizer.eos_token), True
            pending = ""
        else:
            pending += turn["content"] + "\n"


def _example(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example | None:
    tokens: list[int] = []
    labels: list[bool] = []
    for text, labelled in pieces:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens += ids
        labels += [labelled] * len(ids)
    cut = max(0, len(tokens) - max_length)
    row, label = torch.tensor(tokens[:max_length]), torch.tensor(labels[:max_length])
    # position t predicts token t + 1
    targets = torch.where(label, row, IGNORE).roll(-1)
    targets[-1:] = IGNORE
    if not bool((targets != IGNORE).any()):
        return None
    return Example(row, targets, cut)
