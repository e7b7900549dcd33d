"""Records to text: chat, alpaca and plain templates.

A record has `messages` ([{role, content}, ...]), or `prompt` and `response` (and `system`), or `text`.
What stands after the last response is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fedllm.errors import DataError, ModelError
from fedllm.models.chat_turns import Turn, last_answer, messages_of, tools_of
from fedllm.models.tokenization import Piece, Text, begins_texts, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "alpaca", "plain"]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
OTHERS = "set task.template to alpaca or plain"


class Chat(NamedTuple):
    """What a chat template is given."""

    turns: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    def until(self, place: int) -> Chat:
        """The turns before a place."""
        return Chat(self.turns[:place], self.tools)


def response_texts(
    records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template
) -> list[Text]:
    """Each record's text, cut into what stands before a response and the response, by turns; responses carry the
    labels, each with its end token."""
    chats = [Chat(messages_of(record), tools_of(record)) for record in records]
    if template == "chat":
        return [Text(pieces) for pieces in _chats(chats, tokenizer)]
    begins = begins_texts(tokenizer)
    return [Text(list(_plain(turns, str(tokenizer.eos_token), template)), begins) for turns, _ in chats]


def learned_texts(
    records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template
) -> list[Text]:
    """Each record's text, all of which carries labels."""
    begins = begins_texts(tokenizer)
    chats = iter(response_texts([record for record in records if "text" not in record], tokenizer, template))
    return [
        Text([(f"{record['text']}{tokenizer.eos_token}", True)], begins)
        if "text" in record
        else _all_labelled(next(chats))
        for record in records
    ]


def prompt_text(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """What stands before the last response: the input of generation.

    Raises:
        DataError: the record has no response.
    """
    text = _prompt(record, tokenizer, template)
    return (str(tokenizer.bos_token) if text.begins else "") + text.whole


def prompt_tokens(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    """The tokens of `prompt_text`.

    Raises:
        DataError: the record has no response.
    """
    return tokens_of(_prompt(record, tokenizer, template), tokenizer)


def _prompt(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template) -> Text:
    last_answer(messages_of(record))
    (text,) = response_texts([record], tokenizer, template)
    return Text(text.pieces[:-1], text.begins)


def _all_labelled(text: Text) -> Text:
    return Text([(piece, True) for piece, _ in text.pieces], text.begins)


def _chats(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> list[list[Piece]]:
    """The tokenizer's chat template, cut at each response."""
    if tokenizer.chat_template is None:
        raise ModelError(f"the model's tokenizer has no chat template; {OTHERS}")
    places = [[place for place, turn in enumerate(chat.turns) if turn["role"] == "assistant"] for chat in chats]
    each = [(chat, place) for chat, own in zip(chats, places, strict=True) for place in own]
    opened = _rendered([chat.until(place) for chat, place in each], tokenizer, opened=True)
    closed = _rendered([chat.until(place + 1) for chat, place in each], tokenizer, opened=False)
    texts = zip(opened, closed, strict=True)
    for chat in chats:
        if chat.tools or any(len(turn) > 2 or turn["role"] == "tool" for turn in chat.turns):
            _check_tools(chat, tokenizer)
    return [list(_cut(chat, own, islice(texts, len(own)), tokenizer)) for chat, own in zip(chats, places, strict=True)]


def _cut(
    chat: Chat, places: Sequence[int], texts: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Piece]:
    """A chat's pieces, from its text up to each response, and with it."""
    rendered, done, end = list(texts), "", str(tokenizer.eos_token)
    following = [*(opened for opened, _ in rendered[1:]), None]
    for place, (opened, closed), after in zip(places, rendered, following, strict=False):
        if not (closed.startswith(opened) and opened.startswith(done)):
            raise _rewritten(chat.until(place), opened, closed, tokenizer)
        if (chat.turns[place]["content"] or "").strip() not in closed[len(opened) :]:
            how = "changes an answer, leaves it out or begins it in its generation prompt"
            raise DataError(f"the model's chat template {how}; {OTHERS}")
        last = closed.rfind(end, len(opened))
        stop = len(closed) if last < 0 else last + len(end)
        if last >= 0 and after is not None and not after.startswith(closed[:stop]):
            stop = last  # some templates write the end token behind the last turn alone
        yield opened[len(done) :], False
        yield closed[len(opened) : stop], True
        done = closed[:stop]


def _rewritten(before: Chat, opened: str, closed: str, tokenizer: PreTrainedTokenizerBase) -> DataError:
    """Why a chat with an answer (`closed`) does not begin as the generation prompt for that answer (`opened`)."""
    (asked,) = _rendered([before], tokenizer, opened=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(opened, closed, strict=False)))
    if opened[:common].startswith(asked) and common < len(opened):
        return DataError(
            f"the model's chat template ends its generation prompt with {opened[common:]!r} and does not write it "
            f"before an answer of the data; remove it from the template, or {OTHERS}"
        )
    return DataError(f"the model's chat template rewrites earlier turns; {OTHERS}")


def _check_tools(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that leaves out what a chat says about tools.

    Raises:
        DataError: the same text is written without the calls, the results or the descriptions of tools.
    """

    def written(chat: Chat) -> str:
        try:
            return _rendered([chat], tokenizer, opened=False)[0]
        except DataError:
            return ""  # it takes no such chat

    for what, whole, without in _about_tools(chat):
        text = written(whole)
        if text and text == written(without):
            raise DataError(f"the model's chat template leaves out {what}; remove them, or take another model")


def _about_tools(chat: Chat) -> Iterator[tuple[str, Chat, Chat]]:
    """What a chat says about tools: its name, the chat up to there, and the same without it."""
    if chat.tools:
        yield "the tools' descriptions ('tools')", chat, Chat(chat.turns)
    for place, turn in enumerate(chat.turns):
        whole, before = chat.until(place + 1), chat.turns[:place]
        if turn.get("tool_calls"):
            plain = {"role": turn["role"], "content": turn["content"] or ""}
            yield "the calls of tools ('tool_calls')", whole, Chat([*before, plain], chat.tools)
        elif turn["role"] == "tool" and turn["content"]:
            yield "the turns of the role 'tool'", whole, Chat([*before, {**turn, "content": ""}], chat.tools)


def _rendered(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, *, opened: bool) -> list[str]:
    from jinja2 import TemplateError

    if not all(chat.turns for chat in chats):
        raise DataError(f"a chat begins with a turn of the role 'assistant'; put what it answers first, or {OTHERS}")
    if not chats:
        return []
    if len(chats) > 1 and any(chat.tools for chat in chats):  # tools hold for a whole call
        return [text for chat in chats for text in _rendered([chat], tokenizer, opened=opened)]
    try:
        listed, tools = [chat.turns for chat in chats], chats[0].tools
        texts = tokenizer.apply_chat_template(listed, tools=tools, tokenize=False, add_generation_prompt=opened)
        return list(map(str, texts))
    except (TemplateError, TypeError) as error:
        if len(chats) > 1:  # which one?
            return [text for chat in chats for text in _rendered([chat], tokenizer, opened=opened)]
        roles = ", ".join(turn["role"] for turn in chats[0].turns)
        raise DataError(f"the model's chat template refuses the roles {roles} ({error}); {OTHERS}") from error


def _plain(turns: Sequence[Turn], end: str, template: Template) -> Iterator[Piece]:
    pending = ""
    for turn in turns:
        if turn.get("tool_calls"):
            raise DataError(f"the template '{template}' cannot write the calls of tools; set task.template to chat")
        if turn["role"] == "assistant":
            yield ALPACA.format(prompt=pending.strip()) if template == "alpaca" else pending, False
            yield f"{turn['content']}{end}", True
            pending = ""
        else:
            pending += turn["content"] + "\n"
