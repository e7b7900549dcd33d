"""Turns: what a record asks and answers, as a list of messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.errors import DataError

Turn = Mapping[str, Any]


def messages_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record's turns, with all keys that they have; keys of null, as tables give them, are left out.

    `content` is text, or None in a turn that only calls tools.

    Raises:
        DataError: the record has neither messages nor prompt and response, or a turn without role and content.
    """
    if "messages" in record:
        try:
            return [_turn(turn) for turn in record["messages"]]
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError("'messages' of a record is not a list of turns with 'role' and 'content'") from error
    if "prompt" not in record or "response" not in record:
        raise DataError(
            f"a record has neither 'messages' nor 'prompt' and 'response' (it has {', '.join(sorted(record))}); "
            "map its fields with federation.shards.fields"
        )
    system = [{"role": "system", "content": str(record["system"])}] if record.get("system") else []
    turns = [("user", record["prompt"]), ("assistant", record["response"])]
    return system + [{"role": role, "content": str(content)} for role, content in turns]


def tools_of(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The descriptions of tools that stand beside `messages` in the field `tools`: a list of JSON objects with
    'function' or 'name', or the JSON text of one. None if there is nothing of that form."""
    found = record.get("tools") if "messages" in record else None
    if isinstance(found, str) and found.lstrip().startswith("["):
        try:
            found = json.loads(found)
        except json.JSONDecodeError:
            return None
    if not isinstance(found, list) or not found:
        return None
    return found if all(isinstance(tool, dict) and tool.keys() & {"function", "name"} for tool in found) else None


def response_text(record: Mapping[str, Any]) -> str:
    """The last response.

    Raises:
        DataError: the record has no response, or its last one calls a tool.
    """
    turns = messages_of(record)
    last = turns[last_answer(turns)]
    if last.get("tool_calls"):
        raise DataError("the last answer of a record calls a tool; exact_match and rouge_l compare texts alone")
    return str(last["content"])


def last_answer(turns: Sequence[Turn]) -> int:
    """The place of the last turn of the assistant.

    Raises:
        DataError: there is none.
    """
    for place in reversed(range(len(turns))):
        if turns[place]["role"] == "assistant":
            return place
    raise DataError("a record that is to be answered has no turn of the role 'assistant'")


def answered(record: Mapping[str, Any], response: str) -> dict[str, Any]:
    """The record with another last response."""
    rest = {name: value for name, value in record.items() if name != "text"}  # would win where `text` is learned
    if "messages" not in record:
        return {**rest, "response": response}
    turns = messages_of(record)
    return {**rest, "messages": [*turns[: last_answer(turns)], {"role": "assistant", "content": response}]}


def _turn(turn: Turn) -> dict[str, Any]:
    kept = {key: value for key, value in turn.items() if value is not None and (key, value) != ("tool_calls", [])}
    content = turn.get("content") if "tool_calls" in kept else turn["content"]
    if content is None and "tool_calls" not in kept:
        raise TypeError("no content")
    return {**kept, "role": str(turn["role"]), "content": content if content is None else str(content)}
