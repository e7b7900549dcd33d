"""Forms: what a record must hold to be used.

A record is a plain dictionary. It takes one of these forms at least, and may hold any other fields besides:

    prompt, response             a task
    messages                     turns, [{"role": ..., "content": ...}, ...]; the assistant's may have `tool_calls`
    prompt, choices, answer      multiple choice: a list of texts, and the index, letter or text of the right one;
                                 beside `messages` they are the choices of its last answer
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
    if CHOICE not in forms and not _is_choice(record):
        return record
    index = _index(record)
    if index is None and CHOICE in forms:
        choices, answer = len(record["choices"]), _short(record["answer"])
        raise DataError(f"{place}: 'answer' is {answer}, which is none of {choices} choices")
    return record if index is None else {**record, "answer": index}


def _text_wanted(value: Any) -> str:
    return "" if isinstance(value, str) else "text (a number can be made text by a template, such as '{label}')"


def _messages_wanted(value: Any) -> str:
    turns = value if isinstance(value, list) else []
    sound = all(isinstance(turn, dict) and isinstance(turn.get("role"), str) and _has_content(turn) for turn in turns)
    answered = sound and any(turn["role"] == "assistant" for turn in turns)
    return "" if answered else "a list of turns with text in 'role' and 'content', one of them by the assistant"


def _has_content(turn: Mapping[str, Any]) -> bool:
    """Text; a turn that calls tools may be without."""
    content, calls = turn.get("content"), turn.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        return False
    return isinstance(content, str) or (content is None and bool(calls))


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


def _is_choice(record: Record) -> bool:
    """Whether turns have choices: fields of these names that hold something else are no one's business."""
    if "messages" not in record or "choices" not in record:
        return False
    return not any(CHECKS[name](record.get(name)) for name in ("choices", "answer"))


def _index(record: Record) -> int | None:
    """The place of the right choice; None if there is none. A single letter is always read as one (A is the first)."""
    choices, answer = record["choices"], record["answer"]
    if isinstance(answer, str) and len(answer) == 1 and answer.isascii() and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    index = choices.index(answer) if answer in choices else answer
    return index if isinstance(index, int) and 0 <= index < len(choices) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
