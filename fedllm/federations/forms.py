"""Forms: what a record must hold to be used.

A record is a plain dictionary. It takes one of these forms at least, and may hold any other fields besides:

    prompt, response             a task
    messages                     turns, [{"role": ..., "content": ...}, ...]
    prompt, choices, answer      multiple choice: a list of texts, and the index, letter or text of the right one
    text                         text as it is

`system`, the instruction before a prompt, may stand in any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedllm.errors import DataError

Record = dict[str, Any]

CHOICE = ("prompt", "choices", "answer")
FORMS = (("prompt", "response"), ("messages",), CHOICE, ("text",))


def checked(record: Record, place: str) -> Record:
    """The record, its forms checked: `answer` becomes an index, a `system` of null is dropped.

    Raises:
        DataError: no form fits, or a value has the wrong type; with the place.
    """
    forms = [form for form in FORMS if all(name in record for name in form)]
    if not forms:
        wanted = ", or ".join(" + ".join(form) for form in FORMS)
        raise DataError(f"{place} holds {', '.join(record)}; name in `fields` which of them are {wanted}")
    record = {name: value for name, value in record.items() if name != "system" or value is not None}
    for name in sorted({"system", *(name for form in forms for name in form)}):
        if name in record and (wanted := CHECKS[name](record[name])):
            raise DataError(f"{place}: '{name}' must be {wanted}, but it is {_short(record[name])}")
    return {**record, "answer": _index(record, place)} if CHOICE in forms else record


def _text_wanted(value: Any) -> str:
    return "" if isinstance(value, str) else "text (a number can be made text by a template, such as '{label}')"


def _messages_wanted(value: Any) -> str:
    turns = value if isinstance(value, list) else []
    sound = all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )
    answered = sound and any(turn["role"] == "assistant" for turn in turns)
    return "" if answered else "a list of turns with text in 'role' and 'content', one of them by the assistant"


def _choices_wanted(value: Any) -> str:
    sound = isinstance(value, list) and len(value) >= 2 and all(isinstance(choice, str) for choice in value)
    return "" if sound else "a list of two texts or more"


def _answer_wanted(value: Any) -> str:
    return "" if isinstance(value, str) or type(value) is int else "the index, the letter or the text of a choice"


CHECKS: Mapping[str, Callable[[Any], str]] = {
    **dict.fromkeys(("prompt", "response", "text", "system"), _text_wanted),
    "messages": _messages_wanted,
    "choices": _choices_wanted,
    "answer": _answer_wanted,
}


def _index(record: Record, place: str) -> int:
    """The place of the right choice. A single letter is always read as one (A is the first choice)."""
    choices, answer = record["choices"], record["answer"]
    if isinstance(answer, str) and len(answer) == 1 and answer.isascii() and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    index: int = choices.index(answer) if answer in choices else answer
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise DataError(f"{place}: 'answer' is {_short(record['answer'])}, which is none of {len(choices)} choices")
    return index


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
